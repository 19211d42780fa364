"""`scan`: the linear recurrence over time."""

from __future__ import annotations

from typing import Any

from srm_core.dispatch import define
from srm_core.ops.scan.spec import SPEC

_operator = define(SPEC)


def scan(
    gates: Any, tokens: Any = None, initial_state: Any = None, *,
    reverse: bool = False, lengths: Any = None, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The linear recurrence y_t = g_t * y_{t-1} + x_t along time.

    gates: (B, T, D), (B, T, 1), or constant in time (B, 1, D) or (1, 1, D); linear, not logarithms.
        A parameter: it has tokens' dtype, or float32 beside half tokens.
    tokens: x, (B, T, D). None: the cumulative product, y_t = g_t * y_{t-1}; gates must then have T.
    initial_state: y_{-1}, (B, D); None: 0, or 1 without tokens.
    reverse: t runs from the end to 0.
    lengths: (B,) integers, 0 <= length <= T: beyond a sequence's length y is 0, and its final state is the
        one at its length.
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns (y, final_state): y (B, T, D) of tokens' dtype; final_state (B, D) of initial_state's dtype, else
    float32 for half tokens. T = 0 and B = 0 are valid. Half types accumulate in float32.

    Errors: `ContractError` for a shape, dtype or value that breaks the above; `NoBackendError` if no selected
    backend can run it. Source: Martin and Cundy 2018, eq. 5.

    >>> import numpy as np, srm_core
    >>> y, final = srm_core.scan(np.full((1, 4, 1), 0.5), np.ones((1, 4, 1)))
    >>> y.ravel().tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    result: tuple[Any, Any] = _operator.run(backend, gates, tokens, initial_state, reverse, lengths)
    return result
