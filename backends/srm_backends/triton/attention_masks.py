"""Masks of `attention` in Triton: what they make of scores, and which tiles of them count at all.

A mask that many heads share is read once more than it must be, to list for each tile of rows the tiles of columns in
which anything counts. Kernels then go through these alone: padding, windows, documents side by side cost what is seen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.launch import Config, blocks, launch
from srm_core.context import LaunchContext

LOG2_E = tl.constexpr(1.4426950408889634)
BOOLEAN, ADDITIVE = tl.constexpr(1), tl.constexpr(2)  # kinds of masks; 0: none
LARGE = 1 << 20  # steps * slots from which on lists are worth a launch
READERS = 4  # heads that share a byte of the mask, from which on they are worth the reading


@triton.jit
def masked(scores, masks, at, inside, MASK: tl.constexpr):
    """Scores in powers of two with the mask that stands at masks + at, and -inf outside."""
    if MASK == BOOLEAN:
        inside = inside & (tl.load(masks + at, inside, other=0) != 0)
    if MASK == ADDITIVE:
        scores += tl.load(masks + at, inside, other=0).to(tl.float32) * LOG2_E
    return tl.where(inside, scores, float("-inf"))


@triton.jit
def first_of(starts, at, LISTED: tl.constexpr, BLOCK: tl.constexpr):
    """Where the tile begins that stands at column `at` of a list; without one at column `at` of the mask."""
    if LISTED:
        at = tl.multiple_of(tl.load(starts + at // BLOCK), BLOCK)
    return at


@triton.jit
def list_tiles(
    mask, counts, starts, tiles, columns, H, M, N, mb, mh, mm, mn,
    MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """For each tile of rows, how many tiles of columns count, and where they start, in order.
    counts (B, H, tiles), starts (B, H, tiles, columns)."""
    unit = tl.program_id(0)
    tile, head = unit % tiles, unit // tiles
    base = mask + (head // H).to(tl.int64) * mb + (head % H).to(tl.int64) * mh
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    count = unit * 0
    for i in range(columns):
        n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (m < M)[:, None] & (n < N)[None, :]
        at = base + m.to(tl.int64)[:, None] * mm + n.to(tl.int64)[None, :] * mn
        if MASK == BOOLEAN:
            counted = tl.load(at, inside, other=0) != 0
        else:
            counted = tl.load(at, inside, other=float("-inf")) != float("-inf")
        some = tl.max(tl.max(counted.to(tl.int32), 1), 0)
        tl.store(starts + unit.to(tl.int64) * columns + count, i * BLOCK_N, some > 0)
        count += some
    tl.store(counts + unit, count)


class Lists(NamedTuple):
    """What `list_tiles` found. strides: of batch, head and tile in `counts`, and of a tile in `starts` on top."""

    counts: Tensor | None = None
    starts: Tensor | None = None
    strides: tuple[int, int, int] = (0, 0, 0)


def lists(ctx: LaunchContext, mask: Tensor | None, block_m: int, block_n: int, of_slots: bool) -> Lists:
    """For tiles of block_m steps by block_n slots; of_slots: for each tile of slots those of steps. mask: (B, H, T, S).
    Nothing where it is not worth while."""
    if mask is None or mask.shape[2] * mask.shape[3] < LARGE:
        return Lists()
    heads = [1 if s == 0 else n for n, s in zip(mask.shape[:2], mask.stride(), strict=False)]
    if heads[0] * heads[1] * mask.element_size() * READERS > mask.shape[0] * mask.shape[1]:
        return Lists()
    kind = BOOLEAN.value if mask.dtype is torch.uint8 else ADDITIVE.value
    if of_slots:
        mask, block_m, block_n = mask.transpose(2, 3), block_n, block_m
    rows, columns = mask.shape[2:]
    tiles, wide = blocks(rows, block_m), blocks(columns, block_n)
    counts = ctx.scratch((*heads, tiles), "int32")
    starts = ctx.scratch((*heads, tiles, wide), "int32")

    def configure() -> Config:
        sizes = (tiles, wide, heads[1], rows, columns, *mask.stride())
        return Config((counts.numel(),), sizes, (kind, block_m, block_n))

    launch(ctx, list_tiles, (mask.stride(), block_m, block_n, of_slots), (mask, counts, starts), configure)
    shared = [0 if n == 1 else s for n, s in zip(heads, counts.stride(), strict=False)]
    return Lists(counts, starts, (shared[0], shared[1], wide))
