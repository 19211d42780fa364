"""The linear recurrence y_t = g_t * y_{t-1} + x_t as loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array, sum_to


def reference(
    compute: Any, gates: Array, tokens: Array | None = None, initial_state: Array | None = None,
    *, reverse: bool = False, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """y_t = g_t * y_{t-1} + x_t, with y_{-1} the initial state or 0.

    Without tokens: y_t = g_t * y_{t-1}, with y_{-1} the initial state or 1. With `reverse`, t runs from the
    sequence's end to 0. (E. Martin and C. Cundy, "Parallelizing linear recurrent neural nets over sequence
    length", 2018, eq. 5.)
    """
    batch, steps, width, gates, state = _prepare(compute, gates, tokens, initial_state)
    y = np.zeros((batch, steps, width), compute)
    for b in range(batch):
        for t in _order(b, steps, reverse, lengths):
            state[b] = gates[b, t] * state[b]
            if tokens is not None:
                state[b] += tokens[b, t].astype(compute)
            y[b, t] = state[b]
    return y, state


def vjp(
    compute: Any, grads: tuple[Array, Array], gates: Array, tokens: Array | None = None,
    initial_state: Array | None = None, *, reverse: bool = False, lengths: Array | None = None,
) -> tuple[Array, Array | None, Array | None]:  # fmt: skip
    """With a the gradient of the state: a_t = dy_t + g_{t+1} a_{t+1}; dx_t = a_t; dg_t = a_t y_{t-1}."""
    grad_y, grad_final = (g.astype(compute) for g in grads)
    shape = gates.shape
    batch, steps, width, gates, start = _prepare(compute, gates, tokens, initial_state)
    y, _ = reference(compute, gates, tokens, initial_state, reverse=reverse, lengths=lengths)
    d_gates, d_tokens = np.zeros_like(y), np.zeros_like(y)
    d_state = grad_final.copy()
    for b in range(batch):
        order = _order(b, steps, reverse, lengths)
        for i in reversed(range(len(order))):
            t = order[i]
            previous = y[b, order[i - 1]] if i > 0 else start[b]
            d_state[b] += grad_y[b, t]
            d_tokens[b, t] = d_state[b]
            d_gates[b, t] = d_state[b] * previous
            d_state[b] *= gates[b, t]
    return (
        sum_to(d_gates, shape),
        None if tokens is None else d_tokens,
        None if initial_state is None else d_state,
    )


def _prepare(
    compute: Any, gates: Array, tokens: Array | None, initial_state: Array | None
) -> tuple[int, int, int, Array, Array]:
    batch, steps, width = (gates if tokens is None else tokens).shape
    gates = np.broadcast_to(gates.astype(compute), (batch, steps, width))
    if initial_state is not None:
        state = initial_state.astype(compute)
    else:
        state = np.full((batch, width), 1 if tokens is None else 0, compute)
    return batch, steps, width, gates, state


def _order(b: int, steps: int, reverse: bool, lengths: Array | None) -> range:
    n = steps if lengths is None else int(lengths[b])
    return range(n - 1, -1, -1) if reverse else range(n)
