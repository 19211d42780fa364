"""`lstm`: one layer of long short-term memory, in one direction."""

from __future__ import annotations

from typing import Any

from srm_core.dispatch import define
from srm_core.ops.lstm.spec import SPEC

_operator = define(SPEC)


def lstm(
    x: Any, w_ih: Any, w_hh: Any, b_ih: Any = None, b_hh: Any = None, h0: Any = None, c0: Any = None,
    *, lengths: Any = None, backend: str | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """One LSTM layer in one direction, with the weights and the order of gates i, f, g, o of torch.nn.LSTM.

    [i, f, g, o] = x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh;
    c = sigmoid(f) * c + sigmoid(i) * tanh(g); h = sigmoid(o) * tanh(c).

    x: (B, T, I).
    w_ih: (4H, I). w_hh: (4H, H). b_ih, b_hh: (4H,), each may be None for 0. Parameters: x's dtype, or float32
        beside half x.
    h0, c0: (B, H), the initial state and cell, each may be None for 0; x's dtype, or float32 beside half x.
    lengths: (B,) integers, 0 <= length <= T: beyond a sequence's length y is 0, and its last state and cell are
        those there.
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns (y, h_n, c_n): y (B, T, H) of x's dtype, h after each step; h_n, c_n (B, H) of h0's and c0's dtype, else
    float32 for half x. T = 0 and B = 0 are valid. Half types are computed in float32; the h that is multiplied by
    weights may be rounded to them.

    Errors: `ContractError` for a shape, dtype or value that breaks the above; `NoBackendError` if no selected backend
    can run it. Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers, Schmidhuber and Cummins 2000.

    >>> import numpy as np, srm_core
    >>> x, w_ih, w_hh = np.ones((1, 3, 1)), np.zeros((4, 1)), np.zeros((4, 1))
    >>> bias = np.array([100.0, 100.0, 100.0, 100.0])  # every gate open: c counts the steps
    >>> y, h_n, c_n = srm_core.lstm(x, w_ih, w_hh, bias)
    >>> c_n.tolist()
    [[3.0]]
    """
    result: tuple[Any, Any, Any] = _operator.run(backend, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths)
    return result
