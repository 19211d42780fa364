"""`attention` in Triton: the forward. Probabilities are never in memory (T. Dao et al., "FlashAttention", 2022).

    score = scale * q . k + mask, out = sum of exp(score) v / sum of exp(score), over the slots that a step attends to

A program has a tile of BLOCK_M rows, steps of one head, and goes through the slots in tiles of BLOCK_N with three
things in registers: the largest score of each row, the sum of the weights relative to it, and of the weighted values.
Exponentials are powers of two: `factor` is scale * log2(e). Under a causal mask only the tiles on the diagonal ask
which slots count, and those beyond it are not read. Where heads share keys and there are few steps, the rows of a tile
are the steps of all these heads. Where there are few rows at all, programs share the slots of a row (SPLITS), and a
second kernel joins what they found.
"""

from __future__ import annotations

from math import log2
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.attention_masks import ADDITIVE, BOOLEAN, LOG2_E, Lists, first_of, lists, masked
from srm_backends.triton.autotune import FLOPS, Question, choose
from srm_backends.triton.common import dot
from srm_backends.triton.hds import window_sum
from srm_backends.triton.launch import Config, blocks, launch, multiprocessors, power_of_2
from srm_backends.triton.tiles import available, describe
from srm_core.context import LaunchContext
from srm_core.ops.attention.reference import default_scale

FAR = 1 << 23  # a stride with which an offset within a tile may not fit 32 bits


@triton.jit
def rows_of(tile, T, heads, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """(head within those that share keys, step, is it there) of a tile's rows, (BLOCK_M,)."""
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if PACK:
        return row // T, row % T, row < heads * T
    return tl.zeros_like(row), row, row < T


@triton.jit
def load_rows(base, rows, inside, column, stride, width):
    """(rows, columns) of a matrix, 0 outside; rows: offsets."""
    at = base + rows[:, None] + (column * stride)[None, :]
    return tl.load(at, inside[:, None] & (column < width)[None, :], other=0)


@triton.jit
def load_slots(base, slot, inside, column, row_stride, stride, width, WINDOW: tl.constexpr):
    """(slots, columns) of keys or values; with WINDOW > 1 means of so many rows each, as `hds_query` pools them."""
    rows = slot.to(tl.int64) * WINDOW * row_stride
    if WINDOW == 1:
        found = load_rows(base, rows, inside, column, stride, width)
    else:
        at = base + rows[:, None] + (column * stride)[None, :]
        mean = window_sum(at, inside[:, None] & (column < width)[None, :], row_stride, WINDOW) / WINDOW
        found = mean.to(base.dtype.element_ty)
    return found


@triton.jit
def scaled(q, factor):
    """(q, factor) of which the product is the same. In float32 it is done first: beside a large score, the rounding of
    score * factor would show in the exponential."""
    if q.dtype == tl.float32:
        q = q * factor
        factor = 1.0
    return q, factor


@triton.jit
def _attend(
    average, total, peak, q, keys, values, key_tiles, value_tiles, b, g, masks, starts, step, there, column_d, column_e,
    first, last, factor, S, D, E, ks, kd, vs, vd, ms,
    MASK: tl.constexpr, EDGE: tl.constexpr, CAUSAL: tl.constexpr, RAW: tl.constexpr, PRECISION: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go through slots first ... last - 1. keys, values, masks: bases of slot 0; or tiles of key and value, at [b, g].
    starts: a list of the tiles that count, or None; then first and last are columns of the list.

    RAW: scores are multiplied by a positive factor as they enter the exponential. EDGE: tiles may have slots that are
    not there, or that lie ahead of a step.
    """
    n = tl.arange(0, BLOCK_N)
    end = last
    if starts is not None:
        end = S
    for at in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        start = first_of(starts, at, starts is not None, BLOCK_N)
        slot = start + n
        inside = slot < end
        if key_tiles is not None:
            k = tl.reshape(key_tiles.load([b, g, start, 0]), (BLOCK_N, BLOCK_D))
            v = tl.reshape(value_tiles.load([b, g, start, 0]), (BLOCK_N, BLOCK_E))
        else:
            k = load_slots(keys, slot, inside, column_d, ks, kd, D, WINDOW)
            v = load_slots(values, slot, inside, column_e, vs, vd, E, WINDOW)
        scores = dot(q, tl.trans(k), PRECISION)
        if not RAW:
            scores = scores * factor
        if EDGE:
            counts = there[:, None] & inside[None, :]
            if CAUSAL:
                counts = counts & (slot[None, :] <= step[:, None])
            scores = masked(scores, masks, slot.to(tl.int64)[None, :] * ms, counts, MASK)
        highest = tl.max(scores, 1)
        if RAW:
            highest = highest * factor
        highest = tl.maximum(peak, highest)
        shift = tl.where(highest == float("-inf"), 0, highest)
        if RAW:
            scores = scores * factor
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(peak - shift)
        peak = highest
        total = total * fade + tl.sum(weights, 1)
        average = average * fade[:, None]
        average = dot(weights.to(v.dtype), v, PRECISION, average)
    return average, total, peak


@triton.jit(do_not_specialize=["factor"])
def attention_forward(
    query, key, value, mask, counts, starts, out, peaks, totals, factor, key_tiles, value_tiles,
    tiles, share, B, H, G, T, S, D, E, qb, qh, qt, qd, kb, kg, ks, kd, vb, vg, vs, vd, mb, mh, mt, ms, cb, ch, columns,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, RAW: tl.constexpr, PACK: tl.constexpr, KEEP: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """key_tiles, value_tiles: what key and value are read with, or None. counts, starts: see `Lists`, or None.
    out (B, H, T, E); peaks and totals (B, H, T): the largest score, in powers of two, and the sum of the weights.
    Where a step attends to nothing, they are -inf and 0. With SPLITS all have one more axis in front, and out is the
    sum of the weighted values, not their mean. share: the slots of a split, a multiple of BLOCK_N."""
    unit = tl.program_id(0)
    split = unit * 0
    if SPLITS > 1:
        split, unit = unit % SPLITS, unit // SPLITS
    tile, unit = tiles - 1 - unit % tiles, unit // tiles  # the longest of a causal mask first
    heads = H // G
    if PACK:
        at_b, at_g = unit // G, unit % G
        h = at_g.to(tl.int64) * heads
    else:
        at_b, at_g = unit // H, unit % H // heads
        h = (unit % H).to(tl.int64)
    b, g = at_b.to(tl.int64), at_g.to(tl.int64)
    member, step, there = rows_of(tile, T, heads, PACK, BLOCK_M)
    head, t = h + member.to(tl.int64), step.to(tl.int64)
    column_d, column_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q, factor = scaled(load_rows(query, b * qb + head * qh + t * qt, there, column_d, qd, D), factor)
    keys, values = key + b * kb + g * kg, value + b * vb + g * vg
    masks = mask
    if MASK:
        masks = mask + (b * mb + head * mh + t * mt)[:, None]

    first, last, full = split * share, S, S
    if CAUSAL:
        if PACK:
            last, full = tl.minimum(S, T), 0
        else:
            last, full = tl.minimum(S, (tile + 1) * BLOCK_M), tile * BLOCK_M + 1
    if SPLITS > 1:
        last = tl.minimum(last, first + share)
    full = first + tl.maximum(tl.minimum(full, last) - first, 0) // BLOCK_N * BLOCK_N
    if MASK:
        full = first
    listed = starts
    if starts is not None:
        row_of_list = b * cb + h * ch + tile
        last = tl.load(counts + row_of_list) * BLOCK_N
        listed = starts + row_of_list * columns
    average = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    total, peak = tl.zeros((BLOCK_M,), tl.float32), tl.full((BLOCK_M,), float("-inf"), tl.float32)
    if not MASK:
        average, total, peak = _attend(
            average, total, peak, q, keys, values, key_tiles, value_tiles, at_b, at_g, masks, listed, step, there,
            column_d, column_e, first, full, factor, S, D, E, ks, kd, vs, vd, ms,
            0, False, False, RAW, PRECISION, WINDOW, BLOCK_N, BLOCK_D, BLOCK_E, STAGES,
        )  # fmt: skip
    average, total, peak = _attend(
        average, total, peak, q, keys, values, key_tiles, value_tiles, at_b, at_g, masks, listed, step, there,
        column_d, column_e, full, last, factor, S, D, E, ks, kd, vs, vd, ms,
        MASK, True, CAUSAL, RAW, PRECISION, WINDOW, BLOCK_N, BLOCK_D, BLOCK_E, STAGES,
    )  # fmt: skip

    row = ((split * B + b) * H + head) * T + t
    if SPLITS == 1:
        average = average / tl.where(total == 0, 1, total)[:, None]
    column = column_e[None, :]
    tl.store(out + row[:, None] * E + column, average.to(out.dtype.element_ty), there[:, None] & (column < E))
    if KEEP:
        tl.store(peaks + row, peak, there)
        tl.store(totals + row, total, there)


@triton.jit
def join_splits(
    parts, part_peaks, part_totals, out, peaks, totals, rows, E,
    KEEP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out (rows, E), peaks and totals (rows,) of what the splits found: parts (SPLITS, rows, E), of weighted values."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_E)[None, :]
    there = row < rows
    inside = there[:, None] & (column < E)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for i in range(SPLITS):
        peak = tl.maximum(peak, tl.load(part_peaks + i * rows + row, there, other=0))
    shift = tl.where(peak == float("-inf"), 0, peak)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for i in range(SPLITS):
        at = i * rows + row
        weight = tl.exp2(tl.load(part_peaks + at, there, other=0) - shift)
        total += weight * tl.load(part_totals + at, there, other=0)
        sums += weight[:, None] * tl.load(parts + at[:, None] * E + column, inside, other=0)
    average = sums / tl.where(total == 0, 1, total)[:, None]
    tl.store(out + row[:, None] * E + column, average.to(out.dtype.element_ty), inside)
    if KEEP:
        tl.store(peaks + row, peak, there)
        tl.store(totals + row, total, there)


class Call(NamedTuple):
    """What the forward and the backward of a call share. mask: 0, `BOOLEAN` or `ADDITIVE`."""

    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, G, S, D)
    value: Tensor  # (B, G, S, E)
    mask: Tensor | None  # (B, H, T, S)
    causal: bool
    scale: float
    precision: str
    window: int = 1  # how many rows of key and value make a slot, their mean; then S counts rows

    @property
    def slots(self) -> int:
        return self.key.shape[2] // self.window

    @property
    def factor(self) -> float:
        return self.scale * LOG2_E.value

    @property
    def mask_kind(self) -> int:
        if self.mask is None:
            return 0
        return BOOLEAN.value if self.mask.dtype is torch.uint8 else ADDITIVE.value

    @property
    def strides(self) -> tuple[int, ...]:
        of_mask = (0, 0, 0, 0) if self.mask is None else self.mask.stride()
        return (*self.query.stride(), *self.key.stride(), *self.value.stride(), *of_mask)

    @property
    def slotted(self) -> tuple[tuple[Tensor, int], ...]:
        """Key and value, each with the width of its tiles."""
        return (self.key, self.widths[0]), (self.value, self.widths[1])

    @property
    def bucket(self) -> tuple[Any, ...]:
        """What a measured choice depends on."""
        (batch, heads, steps, _), slots = self.query.shape, self.slots
        sizes = (power_of_2(n, 1, 1 << 40) for n in (batch * heads, steps, slots, *self.widths))
        return str(self.query.dtype)[6:], *sizes, self.causal, self.mask_kind, self.window, self.precision

    @property
    def widths(self) -> tuple[int, int]:
        """Of tiles: BLOCK_D, BLOCK_E."""
        return power_of_2(self.query.shape[3], 16, 256), power_of_2(self.value.shape[3], 16, 256)


def prepare(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None, precision: str
) -> Call:
    query, key, value = (t.contiguous() if max(t.stride()[2:]) >= FAR else t for t in (query, key, value))
    if mask is not None:
        mask = (mask.view(torch.uint8) if mask.dtype is torch.bool else mask).expand(*query.shape[:3], key.shape[2])
    scale = default_scale(scale, query.shape[3])
    return Call(query, key, value, mask, causal, scale, "tf32" if precision == "tf32" else "ieee")


class Tile(NamedTuple):
    """tiled: by the hardware's own copies. rows: BLOCK_M, of queries; slots: BLOCK_N."""

    tiled: bool
    rows: int
    slots: int
    warps: int
    stages: int


def _tiles(ctx: LaunchContext, call: Call) -> list[Tile]:
    """The ways to cut the work, the first as measured on an H200."""
    rows, width = call.query.shape[2], max(call.widths)
    if call.query.dtype is torch.float32:  # products on the plain units: small tiles, or registers spill
        narrow, wide = (power_of_2(rows, 16, 64), 32, 8, 1), (power_of_2(rows, 16, 32), 64, 8, 1)
        return [Tile(False, *t) for t in ((narrow, wide) if width <= 64 else (wide, narrow))]
    small = power_of_2(rows, 16, 64)
    if call.window > 1:
        return [Tile(False, small, n, 4, 1) for n in (32, 64)]
    # Small tiles, so that several programs share a multiprocessor.
    block_n = 128 if width <= 64 or rows <= 16 else 64
    shared = (small, block_n if width <= 128 else 32, 4, 2 if block_n == 128 else 3)
    found = []
    if available(ctx) and all(describe(t, (1, 1, shared[1], w)) for t, w in call.slotted):
        found = [Tile(True, *shared), Tile(True, small, 64 if width <= 128 else 32, 4, 2)]
    if rows <= 64:
        return [*found, Tile(False, *shared)]
    found += [Tile(False, 128, 64, 4 if width <= 64 else 8, 3 if width <= 128 else 2)]
    if width <= 128:
        large = Tile(False, 128, 128, 8, 3)
        found = [*found, large] if found[0].tiled or width <= 64 else [large, *found]
    return [*found, Tile(False, *shared)]


def attend(ctx: LaunchContext, call: Call, keep: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, peaks, totals), the latter two if they are to be kept."""
    (batch, heads, steps, width), (groups, _, wide), slots = call.query.shape, call.value.shape[1:], call.slots
    out = ctx.empty((batch, heads, steps, wide), call.query.dtype)
    kept = (ctx.empty(out.shape[:3], "float32"), ctx.empty(out.shape[:3], "float32")) if keep else (None, None)
    if not out.numel() or not slots:
        return out.zero_(), *kept

    def ask() -> Question:
        bucket = (*call.bucket, heads // groups, available(ctx), keep)
        worth = 2 * batch * heads * steps * slots * (width + wide) >= FLOPS
        return Question(bucket, worth, _tiles(ctx, call))

    tile: Tile = choose(ctx, "attention", (keep,), ask, lambda t: _attend_by(ctx, call, t, out, kept))
    _attend_by(ctx, call, tile, out, kept)
    return out, *kept


def _attend_by(
    ctx: LaunchContext, call: Call, tile: Tile, out: Tensor, kept: tuple[Tensor | None, Tensor | None]
) -> None:
    (batch, heads, steps, width), (groups, _, wide), slots = call.query.shape, call.value.shape[1:], call.slots
    rows, keep = (batch, heads, steps), kept[0] is not None
    strides, kind = call.strides, call.mask_kind
    described = [describe(t, (1, 1, tile.slots, w)) for t, w in call.slotted] if tile.tiled else [None, None]
    if tile.tiled and None in described:  # other strides than those of the call for which the tile was chosen
        tile = next(t for t in _tiles(ctx, call) if not t.tiled)
        described = [None, None]
    _, block_m, block_n, warps, stages = tile
    pack = heads > groups and steps < block_m
    tiles = blocks(heads // groups * steps, block_m) if pack else blocks(steps, block_m)
    units = tiles * batch * (groups if pack else heads)
    # A power of two, so that few variants are compiled; each split has several tiles of slots to go through.
    splits = 1 << int(log2(max(1, min(2 * multiprocessors(ctx) // units, slots // (4 * block_n), 64))))
    parts: tuple[Tensor | None, ...] = (out, *kept)
    if splits > 1:
        parts = tuple(ctx.scratch((splits, *rows, *last), "float32") for last in ((wide,), (), ()))
    positive = call.scale > 0
    found = Lists() if splits > 1 or pack else lists(ctx, call.mask, block_m, block_n, False)

    def configure() -> Config:
        share = blocks(blocks(slots, splits), block_n) * block_n
        sizes = (tiles, share, batch, heads, groups, steps, slots, width, wide, *strides, *found.strides)
        raw = positive and kind != ADDITIVE.value
        what = (kind, call.causal, raw, pack, keep or splits > 1, splits, call.precision, call.window)
        return Config((units * splits,), sizes, (*what, block_m, block_n, *call.widths, stages), warps, stages)

    tensors = (call.query, call.key, call.value, call.mask, found.counts, found.starts, *parts)
    key = strides, found.strides, keep, positive, call.causal, call.precision, call.window, described[0] is None, tile
    launch(ctx, attention_forward, key, tensors, configure, (call.factor, *described))
    if splits > 1:
        count = batch * heads * steps
        block_e = call.widths[1]
        fit = max(1, 2048 // block_e)

        def joined() -> Config:
            return Config((blocks(count, fit),), (count, wide), (keep, splits, fit, block_e))

        launch(ctx, join_splits, (keep, splits), (*parts, out, *kept), joined)


def forward(
    ctx: LaunchContext, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    call = prepare(query, key, value, attn_mask, is_causal, scale, ctx.precision)
    out, *kept = attend(ctx, call, ctx.wants_residuals)
    for name, array in zip(("out", "peak", "total"), (out, *kept), strict=True):
        ctx.keep(name, array)
    return out
