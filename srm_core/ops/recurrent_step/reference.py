"""One step of the structured recurrent mixer as loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array


def position_weights(compute: Any, weight: Array, bias: Array, h: int, position: int) -> tuple[Any, Any]:
    """(w, b) of head h at a position; NaN where the model has none."""
    if not 0 <= position < weight.shape[1]:
        return compute(np.nan), compute(np.nan)
    return weight[h, position].astype(compute), bias[h, position].astype(compute)


def step(x: Array, state: Array, w: Any, b: Any, d: Any, mode: str) -> tuple[Array, Array]:
    """row: s' = w*x + d*s, y = s' + b.  col: s' = x + d*s, y = w*s' + b."""
    if mode == "row":
        state = w * x + d * state
        return state + b, state
    state = x + d * state
    return w * state + b, state


def reference(
    compute: Any, x: Array, state: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...],
    index: Any,
) -> tuple[Array, Array]:  # fmt: skip
    """row: s' = w*x + d*s, y = s' + b.  col: s' = x + d*s, y = w*s' + b, with w = weight[h, index], b likewise.

    The recurrent form of the structured mixer's lower-triangular matrices M[t, s] = d^(t-s) w[s] (row) and
    d^(t-s) w[t] (col).
    """
    batch, heads, _ = x.shape
    positions = np.broadcast_to(index, (batch,))
    x, state, decay = x.astype(compute), state.astype(compute), decay.astype(compute)
    y, new_state = np.zeros_like(x), np.zeros_like(x)
    for i in range(batch):
        for h in range(heads):
            w, b = position_weights(compute, weight, bias, h, int(positions[i]))
            y[i, h], new_state[i, h] = step(x[i, h], state[i, h], w, b, decay[h], mode[h])
    return y, new_state


def vjp(
    compute: Any, grads: tuple[Array, Array], x: Array, state: Array, weight: Array, bias: Array, decay: Array,
    mode: tuple[str, ...], index: Any,
) -> tuple[Array, Array, Array, Array, Array]:  # fmt: skip
    """row: a = dy + ds', dx = w*a, dw = sum(a*x).  col: a = w*dy + ds', dx = a, dw = sum(dy*s').

    Both: ds = d*a, dd = sum(a*s), db = sum(dy). A position out of range has no weight to give a gradient to.
    """
    batch, heads, _ = x.shape
    grad_y, grad_state = (g.astype(compute) for g in grads)
    positions = np.broadcast_to(index, (batch,))
    x, state, decay_c = x.astype(compute), state.astype(compute), decay.astype(compute)
    d_x, d_state = np.zeros_like(x), np.zeros_like(x)
    d_weight, d_bias = np.zeros(weight.shape, compute), np.zeros(bias.shape, compute)
    d_decay = np.zeros(decay.shape, compute)
    for i in range(batch):
        p = int(positions[i])
        for h in range(heads):
            w, b = position_weights(compute, weight, bias, h, p)
            dy = grad_y[i, h]
            if mode[h] == "row":
                a = dy + grad_state[i, h]
                d_x[i, h], d_w = w * a, (a * x[i, h]).sum()
            else:
                a = w * dy + grad_state[i, h]
                _, new = step(x[i, h], state[i, h], w, b, decay_c[h], mode[h])
                d_x[i, h], d_w = a, (dy * new).sum()
            d_state[i, h] = decay_c[h] * a
            d_decay[h] += (a * state[i, h]).sum()
            if 0 <= p < weight.shape[1]:
                d_weight[h, p] += d_w
                d_bias[h, p] += dy.sum()
    return d_x, d_state, d_weight, d_bias, d_decay
