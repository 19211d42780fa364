"""`scan` on NumPy: y_t = g_t * y_{t-1} + x_t.

Steps beyond a sequence's length get the gate 1 and the token 0, which carry the state through unchanged: so
one loop serves both directions, and the last state is every sequence's final one.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_backends.numpy.common import Array, compute_dtype, gradient, quiet, result
from srm_backends.numpy.recurrence import linear_recurrence
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.common import sum_to, valid_steps


@quiet
def forward(
    ctx: LaunchContext, gates: Array, tokens: Array | None = None, initial_state: Array | None = None,
    *, reverse: bool = False, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    like = gates if tokens is None else tokens
    batch, steps, width = like.shape
    compute = compute_dtype(like.dtype)
    valid = valid_steps(lengths, batch, steps)
    state = _start(gates, tokens, initial_state, compute)
    y = ctx.empty((batch, steps, width), like.dtype)
    states = y  # the states in the dtype of computation, which the backward wants
    if ctx.wants_residuals and y.dtype != compute:
        states = ctx.scratch((batch, steps, width), compute)
    g, x = gates, tokens
    if valid is not None:
        g, x = _pass_through(gates, tokens, valid)
    flip = slice(None, None, -1 if reverse else None)
    last = linear_recurrence(
        g[:, flip] if g.shape[1] == steps else g, None if x is None else x[:, flip], state, states[:, flip]
    )
    ctx.keep("states", states)
    if states is not y:
        y[...] = states
    if valid is not None:
        y[~valid] = 0
    return y, result(ctx, last, compute if initial_state is None else initial_state.dtype)


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_final: Array) -> tuple[Any, ...]:
    """a_t = dy_t + g_{t+1} a_{t+1}: the same recurrence against time. dx_t = a_t, dg_t = a_t y_{t-1}."""
    gates, tokens, initial_state = residuals.args
    reverse, lengths = residuals.options["reverse"], residuals.options["lengths"]
    batch, steps, width = grad_y.shape
    compute = compute_dtype(grad_y.dtype)
    valid = valid_steps(lengths, batch, steps)
    start = _start(gates, tokens, initial_state, compute)
    states = residuals.get("states")
    d_y: Any = grad_y
    g = gates
    if valid is not None:
        g, d_y = _pass_through(gates, grad_y, valid)
        # The kept states are zero beyond the length where they are y itself; the first true step of a
        # reversed sequence comes after that padding and needs the state that was carried through it.
        states = np.where(valid[:, :, None], states, start[:, None] if reverse else 0)
    if reverse:
        d_y, states = d_y[:, ::-1], states[:, ::-1]
        g = g[:, ::-1] if g.shape[1] == steps else g

    a = np.empty((batch, steps, width), compute)
    d_state = grad_final.astype(compute)
    if steps:
        a[:, -1] = d_state + d_y[:, -1]
        later = g[:, :0:-1] if g.shape[1] == steps else g
        linear_recurrence(later, d_y[:, -2::-1], a[:, -1].copy(), a[:, -2::-1])
        d_state = g[:, 0].astype(compute) * a[:, 0]
    d_gates = a.copy()
    if steps:
        d_gates[:, 0] *= start
        d_gates[:, 1:] *= states[:, :-1]
    if reverse:
        a, d_gates = a[:, ::-1], d_gates[:, ::-1]
    if valid is not None:
        a[~valid] = 0
        d_gates[~valid] = 0
    return (
        gradient(ctx, sum_to(d_gates, gates.shape), gates),
        gradient(ctx, a, tokens),
        gradient(ctx, d_state, initial_state),
    )


def _start(gates: Array, tokens: Array | None, initial_state: Array | None, compute: Any) -> Array:
    if initial_state is not None:
        return initial_state.astype(compute)
    like = gates if tokens is None else tokens
    return np.full((like.shape[0], like.shape[2]), 1 if tokens is None else 0, compute)


def _pass_through(gates: Array, tokens: Array | None, valid: Array) -> tuple[Array, Array | None]:
    where = valid[:, :, None]
    one, zero = gates.dtype.type(1), gates.dtype.type(0)
    x = None if tokens is None else np.where(where, tokens, zero.astype(tokens.dtype))
    return np.where(where, gates, one), x
