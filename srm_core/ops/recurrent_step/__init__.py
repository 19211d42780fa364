"""`recurrent_step`: one decode step of the structured recurrent mixer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srm_core.contract import host_tuple
from srm_core.dispatch import define
from srm_core.ops.recurrent_step.spec import SPEC

_operator = define(SPEC)


def recurrent_step(
    x: Any, state: Any, weight: Any, bias: Any, decay: Any, mode: Sequence[str], index: Any,
    *, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """One step of the structured recurrent mixer; returns new arrays, changes none.

        row: s' = w*x + d*s,  y = s' + b        col: s' = x + d*s,  y = w*s' + b

    with w = weight[h, index], b = bias[h, index], d = decay[h] of head h.

    x: (B, H, D). state: s, (B, H, D), of x's dtype, or float32 beside half x.
    weight, bias: (H, L). decay: (H,). They have x's dtype, or float32 beside half x.
    mode: H words, "row" or "col"; a host sequence (a tuple saves time).
    index: the position, an integer 0 <= index < L, or an integer array of shape () or (B,), which may live on
        the device; where a value of an array is out of range, w and b are NaN.
    backend: a selection for this call.

    Returns (y, new_state), both (B, H, D): y of x's dtype, new_state of state's. Half types compute in float32.

    Errors: `ContractError`, `NoBackendError`.

    >>> import numpy as np, srm_core
    >>> x, state = np.ones((1, 2, 1)), np.full((1, 2, 1), 10.0)  # one sequence, two heads, one channel
    >>> weight, bias, decay = np.full((2, 4), 3.0), np.zeros((2, 4)), np.array([0.5, 0.5])
    >>> y, state = srm_core.recurrent_step(x, state, weight, bias, decay, ("row", "col"), 0)
    >>> y.ravel().tolist(), state.ravel().tolist()
    ([8.0, 18.0], [8.0, 6.0])
    """
    result: tuple[Any, Any] = _operator.run(backend, x, state, weight, bias, decay, host_tuple(mode), index)
    return result
