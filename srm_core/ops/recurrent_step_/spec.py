"""The specification of `recurrent_step_`, the form that updates states in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from srm_core.arrays import LIBRARIES, library_of
from srm_core.contract import as_index, check_writable
from srm_core.errors import ContractError
from srm_core.ops.common import Array
from srm_core.ops.recurrent_step.reference import reference as step_reference
from srm_core.ops.recurrent_step.spec import FORMULA, INDEX, PARAMETERS, SOURCE, check_range
from srm_core.ops.recurrent_step_ import cases
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, TensorSpec


def reference(
    compute: Any, x: Array, state: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...],
    index: Any, *, slots: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """`recurrent_step` on the rows `slots` of state. Returns y, then what state holds afterwards.

    A slot out of range (only a device array can hold one) names no state: its y is NaN.
    """
    rows = np.arange(x.shape[0]) if slots is None else np.asarray(slots)
    good = (rows >= 0) & (rows < state.shape[0])
    after = state.astype(compute)
    gathered = np.full(x.shape, np.nan, compute)
    gathered[good] = after[rows[good]]
    y, new = step_reference(compute, x, gathered, weight, bias, decay, mode, index)
    after[rows[good]] = new[good]
    return y, after


def _check_index(name: str, value: Any, dims: Mapping[str, int]) -> None:
    as_index("recurrent_step_", name, value)


def _constrain(call: Any) -> None:
    if call.values["slots"] is None and call.dims["N"] != call.dims["B"]:
        raise call.error(
            "state", f"{call.dims['N']} states for a batch of {call.dims['B']}", "as many states as sequences",
            "or name the rows with slots=",
        )  # fmt: skip


def _check_values(
    dims: Mapping[str, int], x: Any, state: Any, weight: Any, bias: Any, decay: Any, mode: Any, index: Any,
    *, slots: Any,
) -> None:  # fmt: skip
    check_range("recurrent_step_", "index", index, dims["L"] - 1)
    check_writable("recurrent_step_", "state", state)
    if slots is None or LIBRARIES[library_of(slots) or "numpy"].platform(slots) != "cpu" or not dims["B"]:
        return
    rows = np.asarray(slots)
    low, high = int(rows.min()), int(rows.max())
    if low < 0 or high >= dims["N"]:
        bad = low if low < 0 else high
        raise ContractError("recurrent_step_", "slots", f"the slot {bad}", f"0 <= slot < N = {dims['N']}")
    if np.unique(rows).size != rows.size:
        raise ContractError("recurrent_step_", "slots", "a slot that stands twice", "each slot at most once")


SPEC = OpSpec(
    name="recurrent_step_",
    version=1,
    summary="one decode step that updates the states in place, at chosen rows",
    parameters=(
        TensorSpec("x", ("B H D",), differentiable=False, doc="the input of this step"),
        TensorSpec(
            "state",
            ("N H D",),
            role="state",
            differentiable=False,
            doc="s, updated to s' at the rows slots, and nowhere else",
        ),
        *PARAMETERS,
        OptionSpec("index", _check_index, dynamic=True, axes=("", "B"), schema="SymInt", doc=INDEX),
        TensorSpec(
            "slots",
            ("B",),
            role="integer",
            optional=True,
            keyword=True,
            doc="the row of each sequence, all distinct, 0 <= slot < N; None: row i for sequence i, and N must be B; "
            "one out of range in device memory, which is not checked, gives NaN in y and changes no state",
        ),
    ),
    outputs=(OutputSpec("y", "B H D", like=("x",), doc="the output of this step"),),
    reference=reference,
    constrain=_constrain,
    check_values=_check_values,
    mutates=("state",),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(Invariant("equals recurrent_step", cases.equals_step),),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    formula=FORMULA,
    source=SOURCE,
)
