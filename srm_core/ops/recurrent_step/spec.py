"""The specification of `recurrent_step`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srm_core.arrays import library_of
from srm_core.contract import as_index, check_modes
from srm_core.errors import ContractError
from srm_core.ops.recurrent_step import cases
from srm_core.ops.recurrent_step.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, TensorSpec

FORMULA = (
    "row: s' = w*x + d*s,  y = s' + b\n"
    "col: s' = x + d*s,  y = w*s' + b\n"
    "with w = weight[h, index], b = bias[h, index], d = decay[h] of head h"
)
SOURCE = (
    "the recurrent form of the structured mixer's lower-triangular matrices, "
    "M[t, s] = d^(t-s) w[s] (row) and d^(t-s) w[t] (col)"
)
PARAMETERS = (
    TensorSpec("weight", ("H L",), role="parameter", doc="w of each head at each of L positions"),
    TensorSpec("bias", ("H L",), role="parameter", doc="b likewise"),
    TensorSpec("decay", ("H",), role="parameter", doc="d of each head"),
    OptionSpec("mode", check_modes, schema="str[]", doc='H words, "row" or "col"; a host sequence, a tuple saves time'),
)


INDEX = (
    "the position, 0 <= index < L; a host integer out of range is an error, while a value of an array that is gives "
    "NaN for w and b: y is NaN, the state of a row head too, and the state of a col head stays finite"
)


def check_index(name: str, value: Any, dims: Mapping[str, int]) -> None:
    as_index("recurrent_step", name, value)


def check_range(op: str, param: str, value: Any, last: int) -> None:
    """0 <= value <= last for a host integer; an array's values are the kernel's to judge."""
    if library_of(value) is None and not 0 <= as_index(op, param, value) <= last:
        raise ContractError(op, param, f"{value}", f"0 <= {param} <= {last}: the weights have {last + 1} positions")


def _check_values(
    dims: Mapping[str, int], x: Any, state: Any, weight: Any, bias: Any, decay: Any, mode: Any, index: Any
) -> None:
    check_range("recurrent_step", "index", index, dims["L"] - 1)


SPEC = OpSpec(
    name="recurrent_step",
    version=1,
    summary="one decode step of the structured recurrent mixer",
    parameters=(
        TensorSpec("x", ("B H D",), doc="the input of this step"),
        TensorSpec("state", ("B H D",), role="state", doc="s, what the steps before have left"),
        *PARAMETERS,
        OptionSpec("index", check_index, dynamic=True, axes=("", "B"), schema="SymInt", doc=INDEX),
    ),
    outputs=(
        OutputSpec("y", "B H D", like=("x",), doc="the output of this step"),
        OutputSpec("new_state", "B H D", like=("state",), state=True, doc="s', for the next step"),
    ),
    reference=reference,
    vjp=vjp,
    check_values=_check_values,
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("batch permutation", cases.batch_permutes),
        Invariant("heads are independent", cases.heads_are_independent),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    formula=FORMULA,
    source=SOURCE,
)
