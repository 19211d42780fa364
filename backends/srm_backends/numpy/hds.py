"""`hds_pool`, `hds_update_` and `hds_query` on NumPy.

Means are sums over the `pool` slots of a window in the order of the slots, whatever the layout. A level is averaged a
part at a time, which is in the cache when it is divided.

A query pools keys and values to the level that it asks for, several levels at once: level l averages the first
M_l * pool^l slots of the memory and no others, since a remainder is dropped at each level. Then it is attention. With
one memory for all sequences their steps are rows of one large product.

An update of consecutive slots touches consecutive ones in each level, so it works on slices: two where the ring
closes. With an index for each sequence it works on pairs (sequence, slot).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from srm_backends.numpy.attention import attend, attend_backward
from srm_backends.numpy.common import Array, compute_dtype, quiet, result
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.attention.reference import default_scale
from srm_core.ops.hds_pool.hierarchy import level_sizes

BLOCK = 1 << 19  # numbers of a level that are averaged at a time; measured
WINDOW = 64  # slots that a query sums at once; more would lose digits that means of means keep


@quiet
def pool_forward(ctx: LaunchContext, memory: Array, *, num_levels: int = 3, pool: int = 4) -> tuple[Array, ...]:
    compute = compute_dtype(memory.dtype)
    levels, below = [], memory
    for size in level_sizes(memory.shape[-2], num_levels, pool)[1:]:
        level = ctx.empty((*memory.shape[:-2], size, memory.shape[-1]), memory.dtype)
        exact = level if level.dtype == compute else ctx.scratch(level.shape, compute)
        _means(below, pool, exact)
        if exact is not level:
            level[...] = exact
        levels.append(level)
        below = exact
    return tuple(levels)


@quiet
def pool_backward(ctx: LaunchContext, residuals: Residuals, *grads: Array) -> tuple[Array]:
    """From the top down: a slot's gradient is its own and 1/pool of that of the slot above it."""
    (memory,) = residuals.args
    pool = residuals.options["pool"]
    compute = compute_dtype(memory.dtype)
    total: Array | None = None
    for grad in reversed(grads):
        own = grad.astype(compute)
        if total is not None:
            _add_spread(own, total, pool)
        total = own
    d_memory = ctx.zeros(memory.shape, memory.dtype)
    if total is not None:
        _windows(d_memory, pool)[...] = (total / compute(pool))[..., None, :]
    return (d_memory,)


@quiet
def update_(
    ctx: LaunchContext, memory: Array, levels: Sequence[Array], new: Array, index: Any, *, pool: int = 4
) -> None:
    slots, written = memory.shape[-2], new.shape[-2]
    if not written:
        return
    if np.may_share_memory(memory, new):
        new = new.copy()
    if np.ndim(index):
        _update_each(memory, levels, new, index, pool)
        return
    first = int(index) % slots
    ranges = [(first, min(first + written, slots)), (0, max(0, first + written - slots))]
    ranges = [(start, end) for start, end in ranges if start < end]
    done = 0
    for start, end in ranges:
        memory[..., start:end, :] = new[..., done : done + end - start, :]
        done += end - start
    compute = compute_dtype(memory.dtype)
    for below, level in pairwise((memory, *levels)):
        ranges = [(start // pool, min((end - 1) // pool + 1, level.shape[-2])) for start, end in ranges]
        ranges = [(start, end) for start, end in ranges if start < end]
        for start, end in ranges:
            into = np.empty((*level.shape[:-2], end - start, level.shape[-1]), compute)
            _means(below[..., start * pool : end * pool, :], pool, into)
            level[..., start:end, :] = into


def _update_each(memory: Array, levels: Sequence[Array], new: Array, index: Array, pool: int) -> None:
    """An update at an index of its own for each sequence."""
    compute = compute_dtype(memory.dtype)
    batch, slots, written = len(memory), memory.shape[-2], new.shape[-2]
    rows = np.repeat(np.arange(batch), written)
    at = ((index.astype(np.int64)[:, None] % slots + np.arange(written)) % slots).ravel()
    # Arrays are seen as (B, M, ...), since a pair of indices is to be of neighbouring axes.
    source = new.swapaxes(1, -2)
    below = memory.swapaxes(1, -2)
    below[rows, at] = source.reshape(batch * written, *source.shape[2:])
    for seen in (level.swapaxes(1, -2) for level in levels):
        size = seen.shape[1]
        fits = at // pool < size
        rows, at = np.divmod(np.unique((rows * size + at // pool)[fits]), size)
        means = np.zeros((len(rows), *seen.shape[2:]), compute)
        for i in range(pool):
            means += below[rows, at * pool + i]
        means /= pool
        seen[rows, at] = means
        below = seen


@quiet
def query_forward(
    ctx: LaunchContext, query: Array, keys: Array, values: Array,
    *, level: int = -1, num_levels: int = 3, pool: int = 4, scale: float | None = None,
) -> Array:  # fmt: skip
    out: Array = ctx.empty((*query.shape[:3], values.shape[3]), query.dtype)
    k, v = (_at_level(a, level, num_levels, pool) for a in (keys, values))
    q = _rows(query, k, v)
    straight = q is query and out.dtype == compute_dtype(out.dtype)
    exact = out if straight else np.empty((*q.shape[:3], v.shape[3]), compute_dtype(query.dtype))
    logsumexp = attend(q, _for_each(k, q), _for_each(v, q), default_scale(scale, query.shape[3]), exact)
    exact, logsumexp = _of_sequences(exact, out), _of_sequences(logsumexp, out)
    if not straight:
        out[...] = exact
    ctx.keep("out", exact)
    ctx.keep("logsumexp", logsumexp)
    return out


@quiet
def query_backward(ctx: LaunchContext, residuals: Residuals, grad_out: Array) -> tuple[Array, ...]:
    query, keys, values = residuals.args
    options = residuals.options
    pool, scale = options["pool"], default_scale(options["scale"], query.shape[3])
    k, v = (_at_level(a, options["level"], options["num_levels"], pool) for a in (keys, values))
    q, out, logsumexp, d_out = (
        _rows(a, k, v) for a in (query, residuals.get("out"), residuals.get("logsumexp"), grad_out)
    )
    d_query, *pooled, _ = attend_backward(q, _for_each(k, q), _for_each(v, q), scale, out, logsumexp, d_out)
    gradients = [result(ctx, _of_sequences(d_query, query), query.dtype)]
    window = pool ** range(options["num_levels"])[options["level"]]
    for grad, like in zip(pooled, (keys, values), strict=True):
        if len(like) != len(grad):
            grad = grad.sum(0, keepdims=True)
        d_like = ctx.zeros(like.shape, like.dtype)
        _windows(d_like, window, grad.shape[2])[...] = (grad / grad.dtype.type(window))[..., None, :]
        gradients.append(d_like)
    return tuple(gradients)


def _at_level(memory: Array, level: int, num_levels: int, pool: int) -> Array:
    """Keys or values (B, H, M, D) at a level, (B, H, M_level, D); level 0 as it is, the others to compute with.

    Several levels at once, as long as their windows stay small.
    """
    sizes = level_sizes(memory.shape[2], num_levels, pool)
    top, done = range(num_levels)[level], 0
    while done < top:
        reach = done + 1
        while reach < top and pool ** (reach + 1 - done) <= WINDOW:
            reach += 1
        means = np.empty((*memory.shape[:2], sizes[reach], memory.shape[3]), compute_dtype(memory.dtype))
        _means(memory, pool ** (reach - done), means)
        memory, done = means, reach
    return memory


def _rows(array: Array, k: Array, v: Array) -> Array:
    """(B, H, T, ...) as it is, or as (1, H, B * T, ...) where one memory is for all sequences."""
    batch, heads, steps, *rest = array.shape
    if batch < 2 or len(k) != 1 or len(v) != 1:
        return array
    return array.swapaxes(0, 1).reshape(1, heads, batch * steps, *rest)


def _of_sequences(rows: Array, like: Array) -> Array:
    """What `_rows` gave, as (B, H, T, ...) again."""
    batch, heads, steps = like.shape[:3]
    if len(rows) == batch:
        return rows
    return rows.reshape(heads, batch, steps, *rows.shape[3:]).swapaxes(0, 1)


def _for_each(memory: Array, query: Array) -> Array:
    return np.broadcast_to(memory, (len(query), *memory.shape[1:])) if len(memory) != len(query) else memory


def _windows(level: Array, pool: int, count: int | None = None) -> Array:
    """(..., M, D) as whole windows (..., M // pool, pool, D), a view."""
    *lead, slots, width = level.shape
    count = slots // pool if count is None else count
    return level[..., : count * pool, :].reshape(*lead, count, pool, width)


def _add_spread(level: Array, of_above: Array, pool: int) -> None:
    """Add to the gradient of a level what comes from that of the level above."""
    windows = _windows(level, pool)
    windows += (of_above / level.dtype.type(pool))[..., None, :]


def _means(level: Array, pool: int, into: Array) -> None:
    """Write the means of the windows of a level (..., M, D) into (..., M // pool, D), of the dtype of computation."""
    size = into.size * pool
    for axis, extent in enumerate(into.shape[:-1]):
        if size > BLOCK and extent > 1:
            step = max(1, extent * BLOCK // size)
            wide = pool if axis == into.ndim - 2 else 1
            for start in range(0, extent, step):
                stop = min(start + step, extent)
                at = (slice(None),) * axis
                _means(level[(*at, slice(start * wide, stop * wide))], pool, into[(*at, slice(start, stop))])
            return
    rows = np.require(_windows(level, pool, into.shape[-2]), into.dtype, ["ALIGNED"])
    if rows.size and (rows.strides[-1] != rows.itemsize or rows.strides[-2] != rows.itemsize * rows.shape[-1]):
        rows = rows.copy()  # (..., n, pool, D), in which the sum has one order whatever the layout was
    np.einsum("...pd->...d", rows, out=into)
    into /= into.dtype.type(pool)
