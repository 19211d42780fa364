"""`lstm`: x's product for all steps at once, then a loop over time."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_backend_cpp.arrays import Array, dense, filled, integers, like
from srm_backend_cpp.native import kernels
from srm_core.context import LaunchContext, Residuals


def forward(
    ctx: LaunchContext, x: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None,
    h0: Array | None = None, c0: Array | None = None, *, lengths: Array | None = None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    (batch, steps, _), width, dtype = x.shape, w_hh.shape[1], x.dtype
    bias = np.zeros(4 * width, dtype)
    for b in (b_ih, b_hh):
        if b is not None:
            bias += b
    y, h_n = ctx.empty((batch, steps, width), dtype), ctx.empty((batch, width), dtype)
    c_n = filled(ctx, (batch, width), dtype, 0 if c0 is None else c0)
    gates = ctx.scratch((batch, steps, 4 * width), dtype)
    cells = ctx.scratch(y.shape, dtype) if ctx.wants_residuals else None
    inputs = map(dense, (x, w_ih, w_hh, bias, _start(x, w_hh, h0)))
    kernels.lstm(*inputs, integers(lengths), gates, y, cells, h_n, c_n)
    for name, kept in (("gates", gates), ("states", y), ("cells", cells)):
        ctx.keep(name, kept)
    return y, h_n, c_n


def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_h: Array, grad_c: Array) -> tuple[Any, ...]:
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = residuals.args
    gates, states, cells = map(residuals.get, ("gates", "states", "cells"))
    d_x, d_w_ih, d_w_hh = (like(ctx, a) for a in (x, w_ih, w_hh))
    d_h, d_c = (filled(ctx, g.shape, g.dtype, g) for g in (grad_h, grad_c))
    d_bias = np.empty(len(w_hh), x.dtype)
    kernels.lstm_backward(
        *map(dense, (x, w_ih, w_hh, _start(x, w_hh, h0), _start(x, w_hh, c0))), integers(residuals.options["lengths"]),
        gates, states, cells, dense(grad_y), ctx.scratch(gates.shape, gates.dtype), d_h, d_c, d_x, d_w_ih, d_w_hh,
        d_bias,
    )  # fmt: skip
    d_biases = (None if b is None else filled(ctx, b.shape, b.dtype, d_bias) for b in (b_ih, b_hh))
    return d_x, d_w_ih, d_w_hh, *d_biases, None if h0 is None else d_h, None if c0 is None else d_c


def _start(x: Array, w_hh: Array, state: Array | None) -> Array:
    return np.zeros((len(x), w_hh.shape[1]), x.dtype) if state is None else state
