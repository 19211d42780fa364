"""`lstm` on NumPy: the input product once for all steps, then a loop of one thin product and passes in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_backends.numpy.common import Array, compute_dtype, gradient, quiet, result, sigmoid_
from srm_backends.numpy.gated import StateProduct, batch_major, before, clear, project, rows, running, time_major
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.common import valid_steps


@quiet
def forward(
    ctx: LaunchContext, x: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None,
    h0: Array | None = None, c0: Array | None = None, *, lengths: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    (batch, steps, _), width, compute = x.shape, w_hh.shape[1], compute_dtype(x.dtype)
    valid = valid_steps(lengths, batch, steps)
    gates = project(w_ih.astype(compute, copy=False), time_major(x, valid, compute))  # (T, 4H, B)
    bias = np.zeros(4 * width, compute)
    for b in (b_ih, b_hh):
        if b is not None:
            bias += b
    gates += bias[:, None]
    multiply = StateProduct(w_hh.astype(compute, copy=False), batch)
    states, cells = (np.empty((steps, width, batch), compute) for _ in range(2))
    h, c = (_start(s, width, batch, compute) for s in (h0, c0))  # (H, B)
    product, term = np.empty((4 * width, batch), compute), np.empty((width, batch), compute)
    for t in range(steps):
        gate, next_h, next_c = gates[t], states[t], cells[t]
        multiply(h, product)
        gate += product
        i, f, g, o = gate.reshape(4, width, batch)
        sigmoid_(gate[: 2 * width])
        np.tanh(g, out=g)
        sigmoid_(o)
        np.multiply(f, c, out=next_c)
        np.multiply(i, g, out=term)
        next_c += term
        np.tanh(next_c, out=next_h)
        next_h *= o
        if valid is not None:
            np.copyto(next_h, h, where=~valid[:, t])
            np.copyto(next_c, c, where=~valid[:, t])
        h, c = next_h, next_c
    for name, kept in (("gates", gates), ("states", states), ("cells", cells)):
        ctx.keep(name, kept.transpose(2, 0, 1))
    y = batch_major(ctx, states, x.dtype, valid)
    h_n, c_n = (result(ctx, s.T, compute if s0 is None else s0.dtype) for s, s0 in ((h, h0), (c, c0)))
    return y, h_n, c_n


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_h: Array, grad_c: Array) -> tuple[Any, ...]:
    """See the reference's vjp. What does not wait for a gradient is computed for all steps before the loop."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = residuals.args
    (batch, steps, _), width, compute = x.shape, w_hh.shape[1], compute_dtype(x.dtype)
    valid = valid_steps(residuals.options["lengths"], batch, steps)
    gates, states, cells = (residuals.get(n).transpose(1, 2, 0) for n in ("gates", "states", "cells"))
    i, f, g, o = (gates[:, k * width : (k + 1) * width] for k in range(4))
    start_h, start_c = (_start(s, width, batch, compute) for s in (h0, c0))
    through = np.tanh(cells)
    of_h = o * (1 - through * through)  # what a gradient of h gives to c
    d_gates = np.empty(gates.shape, compute)  # the derivatives of the gates, then their gradients
    parts = tuple(d_gates[:, k * width : (k + 1) * width] for k in range(4))
    parts[0][...] = g * i * (1 - i)
    parts[1][...] = before(start_c, cells, valid) * f * (1 - f)
    parts[2][...] = i * (1 - g * g)
    parts[3][...] = through * o * (1 - o)
    clear(d_gates, valid)
    d_y, back = time_major(grad_y, valid, compute), StateProduct(w_hh.astype(compute, copy=False).T, batch)
    d_h, d_c = grad_h.T.astype(compute, order="C"), grad_c.T.astype(compute, order="C")
    term = np.empty_like(d_c)
    for t in reversed(range(steps)):
        where, through_h = running(valid, t), d_y[t]
        of_c, of_o = d_gates[t, : 3 * width].reshape(3, width, batch), d_gates[t, 3 * width :]
        np.add(through_h, d_h, out=through_h, where=where)
        np.multiply(through_h, of_h[t], out=term)
        np.add(d_c, term, out=d_c, where=where)
        of_o *= through_h
        np.multiply(of_c, d_c, out=of_c, where=where)
        np.multiply(d_c, f[t], out=d_c, where=where)
        back(d_gates[t], term)
        np.copyto(d_h, term, where=where)
    flat = rows(d_gates)  # (4H, T*B)
    d_bias = flat.sum(1)
    d_x = project(w_ih.astype(compute, copy=False).T, d_gates)
    return (
        batch_major(ctx, d_x, x.dtype, valid),
        gradient(ctx, flat @ rows(time_major(x, valid, compute)).T, w_ih),
        gradient(ctx, flat @ rows(before(start_h, states, valid)).T, w_hh),
        gradient(ctx, d_bias, b_ih),
        gradient(ctx, d_bias, b_hh),
        gradient(ctx, d_h.T, h0),
        gradient(ctx, d_c.T, c0),
    )


def _start(state: Array | None, width: int, batch: int, compute: Any) -> Array:
    """The initial state, (H, B)."""
    return np.zeros((width, batch), compute) if state is None else state.T.astype(compute, order="C")
