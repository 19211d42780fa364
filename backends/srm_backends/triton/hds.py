"""The hierarchical memory in Triton: `hds_pool`, its gradient, and `hds_update_`.

    level[l+1][m] = mean of level[l][pool * m + i] over 0 <= i < pool

Pooling makes two levels of one read, in float32: a program has windows of the upper one. An update is one launch for
two levels: a program has some channels of one sequence, writes the new slots, and then, level by level, the means of
the windows that have one of them. What it reads there was written by itself or by nobody, so a barrier within the
program is enough.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.launch import Config, blocks, launch, power_of_2
from srm_backends.triton.recurrent_step import indexed
from srm_core.context import LaunchContext, Residuals

UNROLLED = tl.constexpr(16)  # rows that are read at once, each with an address of its own
TWO_LEVELS = 64  # slots of a window of the upper one


@triton.jit
def window_sum(base, inside, stride, POOL: tl.constexpr):
    """The sum in float32 of POOL rows, `stride` apart."""
    total = tl.zeros(inside.shape, tl.float32)
    if POOL <= UNROLLED:
        for i in tl.static_range(POOL):
            total += tl.load(base + i * stride, inside, other=0).to(tl.float32)
    else:
        at = base
        for _ in range(POOL):
            total += tl.load(at, inside, other=0).to(tl.float32)
            at += stride
    return total


@triton.jit
def pool_levels(
    memory, first, second, tiles, parts, H, N1, N2, D, mb, mh, mm, md,
    POOL: tl.constexpr, TWO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """first (B, H, N1, D), and with TWO second (B, H, N2, D), whose windows a program has BLOCK_N of."""
    unit = tl.program_id(0)
    part, unit = unit % parts, unit // parts
    tile, unit = unit % tiles, (unit // tiles).to(tl.int64)
    c = (part * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    n = (tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    base = memory + unit // H * mb + unit % H * mh + c * md
    if TWO:
        above = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        for j in tl.static_range(POOL):
            slot = n * POOL + j
            inside = (slot < N1) & (c < D)
            mean = window_sum(base + slot * POOL * mm, inside, mm, POOL) / POOL
            tl.store(first + (unit * N1 + slot) * D + c, mean.to(first.dtype.element_ty), inside)
            above += mean
        above = (above / POOL).to(second.dtype.element_ty)
        tl.store(second + (unit * N2 + n) * D + c, above, (n < N2) & (c < D))
    else:
        inside = (n < N1) & (c < D)
        mean = window_sum(base + n * POOL * mm, inside, mm, POOL) / POOL
        tl.store(first + (unit * N1 + n) * D + c, mean.to(first.dtype.element_ty), inside)


@triton.jit
def spread_levels(
    own, first, second, out, tiles, parts, H, M, N1, N2, D, ob, oh, om, od, fb, fh, fm, fd, sb, sh, sm, sd,
    POOL: tl.constexpr, OWN: tl.constexpr, TWO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[m] = own[m] + (first[m // POOL] + second[m // POOL^2] / POOL) / POOL, (B, H, M, D)."""
    unit = tl.program_id(0)
    part, unit = unit % parts, unit // parts
    tile, unit = unit % tiles, (unit // tiles).to(tl.int64)
    b, h = unit // H, unit % H
    c = (part * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    m = (tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    there = (m < M) & (c < D)
    n = m // POOL
    total = tl.load(first + b * fb + h * fh + n * fm + c * fd, there & (n < N1), other=0).to(tl.float32)
    if TWO:
        n = n // POOL
        total += tl.load(second + b * sb + h * sh + n * sm + c * sd, there & (n < N2), other=0).to(tl.float32) / POOL
    total = total / POOL
    if OWN:
        total += tl.load(own + b * ob + h * oh + m * om + c * od, there, other=0).to(tl.float32)
    tl.store(out + (unit * M + m) * D + c, total.to(out.dtype.element_ty), there)


@triton.jit
def _refresh(below, level, first, c, S, M, N, size, bm, lm, D, POOL: tl.constexpr, BLOCK_S: tl.constexpr):
    """Means of the windows, of `size` slots of the memory each, that have one of S slots from `first` on.

    One slot in `size` is looked at, and the last: windows that are neighbours have one each.
    """
    for j in range(0, tl.cdiv(S, size) + 1, BLOCK_S):
        nth = (j + tl.arange(0, BLOCK_S))[:, None].to(tl.int64) * size
        window = (first + tl.minimum(nth, S - 1)) % M // size
        inside = (window < N) & (nth < S + size) & (c < D)
        mean = window_sum(below + window * POOL * bm, inside, bm, POOL) / POOL
        tl.store(level + window * lm, mean.to(level.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["place"])
def update_levels(
    memory, new, index, first, second, place, parts, H, S, M, N1, N2, D, power, stride,
    mb, mh, mm, md, nb, nh, nn, nd, fb, fh, fm, fd, sb, sh, sm, sd,
    WRITE: tl.constexpr, LEVELS: tl.constexpr, INDEXED: tl.constexpr, POOL: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write S slots, unless it was done, and refresh up to two levels.

    memory: what the levels are made of, in which a slot stands for `power` slots of the memory of M.
    """
    unit = tl.program_id(0)
    part, unit = unit % parts, (unit // parts).to(tl.int64)
    b, h = unit // H, unit % H
    c = (part * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    start = place.to(tl.int64)
    if INDEXED:
        start = tl.load(index + b * stride).to(tl.int64)
        start = (start % M + M) % M  # C's remainder has the sign of the dividend
    memory += b * mb + h * mh + c * md
    if WRITE:
        new += b * nb + h * nh + c * nd
        for s in range(0, S, BLOCK_S):
            row = (s + tl.arange(0, BLOCK_S))[:, None]
            inside = (row < S) & (c < D)
            value = tl.load(new + row.to(tl.int64) * nn, inside, other=0)
            tl.store(memory + (start + row) % M * mm, value, inside)
        tl.debug_barrier()
    if LEVELS > 0:
        first += b * fb + h * fh + c * fd
        _refresh(memory, first, start, c, S, M, N1, power * POOL, mm, fm, D, POOL, BLOCK_S)
    if LEVELS > 1:
        tl.debug_barrier()
        second += b * sb + h * sh + c * sd
        _refresh(first, second, start, c, S, M, N2, power * POOL * POOL, fm, sm, D, POOL, BLOCK_S)


def with_heads(level: Tensor) -> Tensor:
    """(B, H, M, D) of (B, M, D)."""
    return level[:, None] if level.dim() == 3 else level


def _tile(rows: int, width: int, most: int = 2048) -> tuple[int, int]:
    """(slots, channels) of a tile."""
    channels = power_of_2(width, 8, 128)
    return power_of_2(rows, 1, most // channels), channels


def pooled(ctx: LaunchContext, memory: Tensor, pool: int, outs: tuple[Tensor, ...]) -> None:
    """Fill one or two levels above memory (B, H, M, D); pool: of a window."""
    batch, heads, _, width = memory.shape
    first, second = outs[0], outs[-1]
    two = len(outs) > 1
    above, upper = first.shape[-2], second.shape[-2]

    def configure() -> Config:
        rows = blocks(above, pool) if two else above
        block_n, block_d = _tile(rows, width, 512)
        tiles, parts = blocks(rows, block_n), blocks(width, block_d)
        sizes = (tiles, parts, heads, above, upper, width, *memory.stride())
        return Config((tiles * parts * batch * heads,), sizes, (pool, two, block_n, block_d))

    launch(ctx, pool_levels, (memory.shape, memory.stride(), pool, two), (memory, first, second), configure)


def pool(ctx: LaunchContext, memory: Tensor, *, num_levels: int, pool: int) -> tuple[Tensor, ...]:
    levels: list[Tensor] = []
    slots = memory.shape[-2]
    for _ in range(1, num_levels):
        slots //= pool
        levels.append(ctx.empty((*memory.shape[:-2], slots, memory.shape[-1]), memory.dtype))
    below, step = memory, 2 if pool * pool <= TWO_LEVELS else 1
    for i in range(0, len(levels) if memory.numel() else 0, step):
        pooled(ctx, with_heads(below), pool, tuple(levels[i : i + step]))
        below = levels[min(i + step, len(levels)) - 1]
    return tuple(levels)


def spread(
    ctx: LaunchContext, out: Tensor, pool: int, first: Tensor, second: Tensor | None = None, own: Tensor | None = None
) -> None:
    """Fill the gradient of a level (B, H, M, D) from those of one or two levels above, and its own."""
    batch, heads, slots, width = out.shape
    strides = tuple(s for t in (own, first, second) for s in ((0,) * 4 if t is None else t.stride()))

    def configure() -> Config:
        block_n, block_d = _tile(slots, width)
        tiles, parts = blocks(slots, block_n), blocks(width, block_d)
        upper = 0 if second is None else second.shape[2]
        sizes = (tiles, parts, heads, slots, first.shape[2], upper, width, *strides)
        what = (pool, own is not None, second is not None, block_n, block_d)
        return Config((tiles * parts * batch * heads,), sizes, what)

    launch(ctx, spread_levels, (strides, out.shape, pool, own is None), (own, first, second, out), configure)


def pool_backward(ctx: LaunchContext, residuals: Residuals, *grads: Tensor) -> tuple[Tensor]:
    (memory,), size = residuals.args, residuals.options["pool"]
    d_memory = ctx.empty(memory.shape, memory.dtype)
    if not grads or not memory.numel():
        return (d_memory.zero_(),)
    levels = [with_heads(g) for g in grads]
    total = levels.pop()
    while len(levels) > 1:
        own = levels.pop()
        out = ctx.scratch(own.shape, "float32")
        spread(ctx, out, size, total, own=own)
        total = out
    out = with_heads(d_memory)
    spread(ctx, out, size, *(*levels, total))
    return (d_memory,)


def update_(
    ctx: LaunchContext, memory: Tensor, levels: tuple[Tensor, ...], new: Tensor, index: Any, *, pool: int
) -> None:
    memory, new, levels = with_heads(memory), with_heads(new), tuple(map(with_heads, levels))
    if not new.numel():
        return
    slots = memory.shape[2]
    position, stride, value = indexed(index)
    below, power = memory, 1
    for i in range(0, max(len(levels), 1), 2):
        pair = (*levels[i : i + 2], None, None)[:2]
        _update(ctx, below, new, position, pair, (value % slots, stride, slots, power, pool))
        below, power = levels[min(i + 2, len(levels)) - 1] if levels else memory, power * pool * pool


def _update(
    ctx: LaunchContext, below: Tensor, new: Tensor, position: Tensor | None, pair: tuple[Tensor | None, ...],
    numbers: tuple[int, ...],
) -> None:  # fmt: skip
    (batch, heads, _, width), count = below.shape, new.shape[2]
    value, stride, slots, power, pool = numbers
    there = [level for level in pair if level is not None]
    strides = tuple(s for t in (below, new, *pair) for s in ((0,) * 4 if t is None else t.stride()))

    def configure() -> Config:
        block_s, block_d = _tile(count, width, 1024)
        parts = blocks(width, block_d)
        sizes_above = (*(level.shape[2] for level in there), 0, 0)[:2]
        sizes = (parts, heads, count, slots, *sizes_above, width, power, stride, *strides)
        what = (power == 1, len(there), position is not None, pool, block_s, block_d)
        return Config((parts * batch * heads,), sizes, what, num_stages=1)

    key = strides, stride, power, pool, len(there)
    launch(ctx, update_levels, key, (below, new, position, *pair), configure, (value,))
