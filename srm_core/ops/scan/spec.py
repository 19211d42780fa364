"""The specification of `scan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srm_core.contract import check_bool, check_lengths
from srm_core.ops.scan import cases
from srm_core.ops.scan.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, ResidualSpec, TensorSpec


def _check_values(
    dims: Mapping[str, int], gates: Any, tokens: Any, initial_state: Any, *, reverse: bool, lengths: Any
) -> None:
    if lengths is not None:
        check_lengths("scan", lengths, dims["T"])


SPEC = OpSpec(
    name="scan",
    version=1,
    summary="the linear recurrence y_t = g_t * y_{t-1} + x_t over time",
    parameters=(
        TensorSpec("gates", ("B T D", "B T 1", "B 1 D", "1 1 D"), role="parameter"),
        TensorSpec("tokens", ("B T D",), optional=True),
        TensorSpec("initial_state", ("B D",), role="state", optional=True),
        OptionSpec("reverse", check_bool, default=False, keyword=True),
        TensorSpec("lengths", ("B",), role="integer", optional=True, keyword=True),
    ),
    outputs=(
        OutputSpec("y", "B T D", like=("tokens", "gates")),
        OutputSpec("final_state", "B D", like=("initial_state",), state=True),
    ),
    shape_order=("tokens", "gates"),
    reference=reference,
    vjp=vjp,
    check_values=_check_values,
    residuals=(ResidualSpec("states", "B T D"),),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("split = whole", cases.split_is_whole),
        Invariant("flip = reverse", cases.flip_is_reverse),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
)
