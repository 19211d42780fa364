"""`recurrent_mix`: the structured recurrent mixer over a whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srm_core.contract import host_tuple
from srm_core.dispatch import define
from srm_core.ops.recurrent_mix.spec import SPEC

_operator = define(SPEC)


def recurrent_mix(
    x: Any, weight: Any, bias: Any, decay: Any, mode: Sequence[str], initial_state: Any = None,
    *, start: Any = 0, lengths: Any = None, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """`recurrent_step` folded over time: the form for training and for reading a prompt.

        row: s_t = w_t*x_t + d*s_{t-1},  y_t = s_t + b_t        col: s_t = x_t + d*s_{t-1},  y_t = w_t*s_t + b_t

    with w_t = weight[h, start + t], b_t likewise, d = decay[h] of head h.

    x: (B, T, H, D). weight, bias: (H, L). decay: (H,). mode: H words, "row" or "col".
    initial_state: s_{-1}, (B, H, D), of x's dtype, or float32 beside half x; None: 0.
    start: the position of x[:, 0], an integer, or an integer array (B,); positions start ... start+T-1 must
        lie in 0 ... L-1; where a value of an array puts one outside, w and b are NaN there.
    lengths: (B,) integers, 0 <= length <= T: beyond a sequence's length y is 0, and its final state is the one
        at its length.
    backend: a selection for this call.

    Returns (y, final_state): y (B, T, H, D) of x's dtype; final_state (B, H, D) of initial_state's dtype, else
    float32 for half x. A sequence in two chunks equals the whole. Half types accumulate in float32.

    Errors: `ContractError`, `NoBackendError`.

    >>> import numpy as np, srm_core
    >>> rng = np.random.default_rng(0)
    >>> x, weight, bias = rng.normal(size=(2, 10, 2, 3)), rng.normal(size=(2, 16)), rng.normal(size=(2, 16))
    >>> parameters = weight, bias, np.array([0.9, 1.0]), ("row", "col")
    >>> whole, final = srm_core.recurrent_mix(x, *parameters)
    >>> first, state = srm_core.recurrent_mix(x[:, :4], *parameters)
    >>> second, state = srm_core.recurrent_mix(x[:, 4:], *parameters, state, start=4)  # in two chunks
    >>> np.allclose(np.concatenate([first, second], axis=1), whole), np.allclose(state, final)
    (True, True)
    >>> y, state = srm_core.recurrent_step(x[:, 0], state, *parameters, 10)  # go on in steps
    """
    mode = host_tuple(mode)
    result: tuple[Any, Any] = _operator.run(backend, x, weight, bias, decay, mode, initial_state, start, lengths)
    return result
