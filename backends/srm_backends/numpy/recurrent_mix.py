"""`recurrent_mix` on NumPy: one linear recurrence with a constant gate, all heads of both modes at once.

As in `recurrent_step`: s_t = w_in*x_t + d*s_{t-1} and y_t = w_out*s_t + b_t, with (w, 1) for a row head and
(1, w) for a col head.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_backends.numpy.common import Array, compute_dtype, gradient, quiet, result
from srm_backends.numpy.recurrence import linear_recurrence
from srm_backends.numpy.recurrent_step import at_positions, row_heads, scatter
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.common import valid_steps


def _positions(start: Any, steps: int) -> Array:
    """(1, T) for one start, (B, T) for an array of them."""
    positions: Array = np.asarray(start).reshape(-1, 1) + np.arange(steps)
    return positions


def _weights(weight: Array, mode: tuple[str, ...], positions: Array, compute: Any) -> tuple[Array, Array]:
    """(w_in, w_out), each (1 or B, T, H, 1)."""
    row = row_heads(mode)
    w = at_positions(weight, positions, compute)
    return np.where(row, w, 1)[..., None], np.where(row, 1, w)[..., None]


def _run(gates: Array, tokens: Array, state: Array) -> Array:
    """The recurrence over (B, T, H, D), in place of `tokens`; returns the last state (B, H, D)."""
    batch, steps, heads, width = tokens.shape
    flat = tokens.reshape(batch, steps, heads * width)
    last = linear_recurrence(gates, flat, state.reshape(batch, heads * width), flat)
    return last.reshape(batch, heads, width)


def _gates(decay: Array, width: int, compute: Any) -> Array:
    return np.repeat(decay.astype(compute), width)[None, None]  # (1, 1, H*D)


@quiet
def forward(
    ctx: LaunchContext, x: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...],
    initial_state: Array | None = None, *, start: Any = 0, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    batch, steps, heads, width = x.shape
    compute = compute_dtype(x.dtype)
    positions = _positions(start, steps)
    w_in, w_out = _weights(weight, mode, positions, compute)
    state = _start(x, initial_state, compute)
    states = ctx.scratch(x.shape, compute)
    np.multiply(x, w_in, out=states, casting="same_kind")
    last = _run(_gates(decay, width, compute), states, state)
    ctx.keep("states", states)
    if lengths is not None and steps:
        n = np.asarray(lengths)
        ends = states[np.arange(batch), np.maximum(n - 1, 0)]
        last = np.where((n > 0)[:, None, None], ends, state)
    y = ctx.empty(x.shape, x.dtype)
    b = at_positions(bias, positions, compute)[..., None]
    if y.dtype == compute:
        np.multiply(states, w_out, out=y)
        y += b
    else:
        y[...] = states * w_out + b
    valid = valid_steps(lengths, batch, steps)
    if valid is not None:
        y[~valid] = 0
    return y, result(ctx, last, compute if initial_state is None else initial_state.dtype)


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_final: Array) -> tuple[Any, ...]:
    """a_t = w_out*dy_t + d*a_{t+1}: the same recurrence against time; then `recurrent_step`'s gradients."""
    x, weight, bias, decay, mode, initial_state = residuals.args
    start, lengths = residuals.options["start"], residuals.options["lengths"]
    batch, steps, heads, width = x.shape
    compute = compute_dtype(x.dtype)
    positions = _positions(start, steps)
    w_in, w_out = _weights(weight, mode, positions, compute)
    state, states = _start(x, initial_state, compute), residuals.get("states")
    # The gradient of the final state enters at each sequence's last step; beyond it nothing flows.
    dy, d_state = grad_y.astype(compute), grad_final.astype(compute)
    ends = np.full(batch, steps) if lengths is None else np.asarray(lengths)
    beyond = np.arange(steps) >= ends[:, None]  # (B, T)
    dy[beyond] = 0
    a = np.multiply(w_out, dy, order="C")  # whatever the gradient's layout: the recurrence runs in place
    a[beyond] = 0  # w_out may be NaN there
    some = np.flatnonzero(ends)
    a[some, ends[some] - 1] += d_state[some]
    if a.size:
        flat = a.reshape(batch, steps, heads * width)
        gates = _gates(decay, width, compute)
        if lengths is not None and not np.isfinite(gates).all():  # which times the 0 beyond a length is not 0
            gates = np.where(beyond[:, :0:-1, None], 0, gates)
        linear_recurrence(gates, flat[:, -2::-1], flat[:, -1].copy(), flat[:, -2::-1])
        d_state[some] = decay.astype(compute)[:, None] * a[some, 0]
    before = np.concatenate([state[:, None], states], axis=1)[:, :-1]
    before = np.where(beyond[:, :, None, None], 0, before)
    d_x = w_in * a
    d_x[beyond] = 0
    into = np.where(row_heads(mode), (a * x.astype(compute)).sum(-1), (dy * states).sum(-1))  # (B, T, H)
    into[beyond] = 0
    d_weight, d_bias = np.zeros(weight.shape, compute), np.zeros(bias.shape, compute)
    for target, values in ((d_weight, into), (d_bias, dy.sum(-1))):
        if positions.shape[0] == 1 and batch:
            scatter(target, values.sum(0), positions[0])
        else:
            scatter(target, values, positions)
    d_decay = (a * before).sum((0, 1, 3))
    pairs = ((d_x, x), (d_weight, weight), (d_bias, bias), (d_decay, decay), (d_state, initial_state))
    return tuple(gradient(ctx, g, like) for g, like in pairs)


def _start(x: Array, initial_state: Array | None, compute: Any) -> Array:
    if initial_state is None:
        return np.zeros((x.shape[0], *x.shape[2:]), compute)
    return initial_state.astype(compute)
