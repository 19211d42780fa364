"""`recurrent_step` on NumPy, all heads of both modes at once.

A row head weighs what goes into its state, a col head what comes out of it: with (w, 1) for a row head and
(1, w) for a col head, s' = w_in * x + d * s and y = w_out * s' + b for both. Multiplying by 1 is exact.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from srm_backends.numpy.common import Array, compute_dtype, quiet, result
from srm_core.context import LaunchContext, Residuals


@lru_cache(maxsize=256)
def row_heads(mode: tuple[str, ...]) -> Array:
    """Which heads are row heads, (H,)."""
    return np.array([m == "row" for m in mode])


def at_positions(parameter: Array, positions: Any, compute: Any) -> Array:
    """parameter (H, L) at one position: (H,); at an array of positions: (..., H), NaN where out of range."""
    if isinstance(positions, int | np.integer):
        return parameter[:, positions].astype(compute)
    length = parameter.shape[1]
    if length == 0:
        return np.full((*np.shape(positions), parameter.shape[0]), np.nan, compute)
    inside = (positions >= 0) & (positions < length)
    found = parameter[:, np.where(inside, positions, 0)].astype(compute)  # (H, ...)
    return np.moveaxis(np.where(inside, found, compute(np.nan)), 0, -1)


def _advance(
    x: Array, state: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...], index: Any
) -> tuple[Array, Array]:
    """(y, new state) in the dtype of computation."""
    compute = compute_dtype(x.dtype)
    row = row_heads(mode)
    w, b = at_positions(weight, index, compute), at_positions(bias, index, compute)  # (H,) or (B, H)
    w_in, w_out = np.where(row, w, 1)[..., None], np.where(row, 1, w)[..., None]
    new = state.astype(compute, copy=False) * decay.astype(compute)[:, None]
    new += x.astype(compute, copy=False) * w_in
    y = new * w_out
    y += b[..., None]
    return y, new


@quiet
def forward(
    ctx: LaunchContext, x: Array, state: Array, weight: Array, bias: Array, decay: Array,
    mode: tuple[str, ...], index: Any,
) -> tuple[Array, Array]:  # fmt: skip
    y, new = _advance(x, state, weight, bias, decay, mode, index)
    return result(ctx, y, x.dtype), result(ctx, new, state.dtype)


@quiet
def forward_(
    ctx: LaunchContext, x: Array, state: Array, weight: Array, bias: Array, decay: Array,
    mode: tuple[str, ...], index: Any, *, slots: Array | None = None,
) -> Array:  # fmt: skip
    rows: Any = slice(None) if slots is None else slots
    y, new = _advance(x, state[rows], weight, bias, decay, mode, index)
    state[rows] = new
    return result(ctx, y, x.dtype)


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_state: Array) -> tuple[Array, ...]:
    """With a the gradient of s': a = w_out*dy + ds', dx = w_in*a, ds = d*a; see the reference's vjp."""
    x, state, weight, bias, decay, mode, index = residuals.args
    compute = compute_dtype(x.dtype)
    row = row_heads(mode)
    w = at_positions(weight, index, compute)
    w_in, w_out = np.where(row, w, 1)[..., None], np.where(row, 1, w)[..., None]
    d = decay.astype(compute)[:, None]
    x_c, s, dy = x.astype(compute), state.astype(compute), grad_y.astype(compute)
    a = w_out * dy + grad_state.astype(compute)
    d_w = np.where(row, (a * x_c).sum(-1), (dy * (x_c + d * s)).sum(-1))  # (B, H)
    d_weight, d_bias = np.zeros(weight.shape, compute), np.zeros(bias.shape, compute)
    scatter(d_weight, d_w, index)
    scatter(d_bias, dy.sum(-1), index)
    gradients = (w_in * a, d * a, d_weight, d_bias, (a * s).sum((0, 2)))
    likes = (x, state, weight, bias, decay)
    return tuple(result(ctx, g, like.dtype) for g, like in zip(gradients, likes, strict=True))


def scatter(into: Array, values: Array, positions: Any) -> None:
    """into[h, positions[i]] += values[i, h], leaving out positions out of range. into (H, L), values (B, H)."""
    if isinstance(positions, int | np.integer):
        into[:, positions] += values.sum(0)
        return
    if values.size == 0:
        return
    p = np.broadcast_to(positions, values.shape[:-1]).reshape(-1)
    inside = (p >= 0) & (p < into.shape[1])
    np.add.at(into.T, p[inside], values.reshape(-1, values.shape[-1])[inside])
