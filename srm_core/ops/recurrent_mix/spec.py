"""The specification of `recurrent_mix`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srm_core.arrays import library_of
from srm_core.contract import as_index, check_lengths
from srm_core.errors import ContractError
from srm_core.ops.recurrent_mix import cases
from srm_core.ops.recurrent_mix.reference import reference, vjp
from srm_core.ops.recurrent_step.spec import PARAMETERS, SOURCE
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, ResidualSpec, TensorSpec


def _check_start(name: str, value: Any, dims: Mapping[str, int]) -> None:
    as_index("recurrent_mix", name, value)


def _check_values(
    dims: Mapping[str, int], x: Any, weight: Any, bias: Any, decay: Any, mode: Any, initial_state: Any,
    *, start: Any, lengths: Any,
) -> None:  # fmt: skip
    last = dims["L"] - dims["T"]
    if library_of(start) is None and not 0 <= as_index("recurrent_mix", "start", start) <= last:
        raise ContractError(
            "recurrent_mix", "start", f"positions {start} to {start + dims['T'] - 1}",
            f"positions 0 to {dims['L'] - 1}, which the weights have",
        )  # fmt: skip
    if lengths is not None:
        check_lengths("recurrent_mix", lengths, dims["T"])


SPEC = OpSpec(
    name="recurrent_mix",
    version=1,
    summary="the structured recurrent mixer over a whole sequence (training, prefill)",
    parameters=(
        TensorSpec("x", ("B T H D",), doc="the inputs of the steps"),
        *PARAMETERS,
        TensorSpec("initial_state", ("B H D",), role="state", optional=True, doc="s[-1]; None: 0"),
        OptionSpec(
            "start",
            _check_start,
            default=0,
            keyword=True,
            dynamic=True,
            axes=("B",),
            schema="SymInt",
            doc="the position of x[:, 0], 0 <= start <= L-T; out of range as the index of recurrent_step",
        ),
        TensorSpec("lengths", ("B",), role="integer", optional=True, keyword=True, doc="0 <= length <= T; None: all T"),
    ),
    outputs=(
        OutputSpec("y", "B T H D", like=("x",), doc="0 beyond a length"),
        OutputSpec(
            "final_state", "B H D", like=("initial_state",), state=True, doc="the state at each sequence's length"
        ),
    ),
    reference=reference,
    vjp=vjp,
    check_values=_check_values,
    residuals=(ResidualSpec("states", "B T H D"),),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("split = whole", cases.split_is_whole),
        Invariant("folds steps", cases.folds_steps),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    formula=(
        "row: s[t] = w[t]*x[t] + d*s[t-1],  y[t] = s[t] + b[t]\n"
        "col: s[t] = x[t] + d*s[t-1],  y[t] = w[t]*s[t] + b[t]\n"
        "with w[t] = weight[h, start + t], b[t] = bias[h, start + t], d = decay[h] of head h"
    ),
    source=SOURCE,
)
