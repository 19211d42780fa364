"""`attention` in Triton: the backward. It makes the probabilities again, from the peak and the total of each row.

    P = exp(score - peak) / total, dS = P * (dout @ v^T - delta), delta = sum of dout * out
    dq = scale * dS @ k, dk = scale * dS^T @ q, dv = P^T @ dout, dmask = dS

As one number, the logarithm of the sum, the two would be off by the rounding of the peak where scores are large.

Three kernels: delta; dk and dv, a program for a tile of slots, which goes through the steps of all heads that share
them; dq, a program for a tile of steps. Nothing is added by two programs, so the same bits at every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.attention import Call, load_rows, prepare, scaled
from srm_backends.triton.attention_masks import ADDITIVE, Lists, first_of, lists, masked
from srm_backends.triton.autotune import FLOPS, Question, choose
from srm_backends.triton.common import dot
from srm_backends.triton.launch import Config, blocks, launch
from srm_core.context import LaunchContext, Residuals


@triton.jit
def load_softmax(of_rows, row, there):
    """(peak, 1 / total, delta) of rows, the first two 0 for one that attends to nothing. of_rows: three pointers."""
    peak = tl.load(of_rows[0] + row, there, other=0)
    total = tl.load(of_rows[1] + row, there, other=0)
    delta = tl.load(of_rows[2] + row, there, other=0)
    return tl.where(peak == float("-inf"), 0, peak), tl.where(total == 0, 0, 1 / total), delta


@triton.jit
def attention_delta(
    grad_out, out, delta, rows, heads, T, E, gb, gh, gt, ge, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """delta (B, H, T) = the sum of grad_out * out over E."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_E)[None, :]
    there = row < rows
    inside = there[:, None] & (column < E)
    b, h, t = row // T // heads, row // T % heads, row % T
    grad = tl.load(grad_out + (b * gb + h * gh + t * gt)[:, None] + column * ge, inside, other=0).to(tl.float32)
    given = tl.load(out + row[:, None] * E + column, inside, other=0).to(tl.float32)
    tl.store(delta + row, tl.sum(grad * given, 1), there)


@triton.jit
def _through_steps(
    d_k, d_v, k, v, queries, grads, of_rows, masks, starts, slot, there, column_d, column_e, first, last, factor,
    T, D, E, qt, qd, gt, ge, mt,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add what steps first ... last - 1 of a head give to d_k (BLOCK_N, BLOCK_D) and d_v (BLOCK_N, BLOCK_E).
    starts: a list of the tiles that count, or None; then first and last are columns of the list."""
    m = tl.arange(0, BLOCK_M)
    end = last
    if starts is not None:
        end = T
    for at in tl.range(first, last, BLOCK_M):
        step = first_of(starts, at, starts is not None, BLOCK_M) + m
        inside = step < end
        q = load_rows(queries, step.to(tl.int64) * qt, inside, column_d, qd, D)
        grad = load_rows(grads, step.to(tl.int64) * gt, inside, column_e, ge, E)
        peak, share, delta = load_softmax(of_rows, step, inside)
        q_scaled, rest = scaled(q, factor)
        scores = dot(k, tl.trans(q_scaled), PRECISION) * rest  # (BLOCK_N, BLOCK_M)
        if MASK or CAUSAL:
            counts = there[:, None] & inside[None, :]
            if CAUSAL:
                counts = counts & (slot[:, None] <= step[None, :])
            scores = masked(scores, masks, step.to(tl.int64)[None, :] * mt, counts, MASK)
        p = tl.exp2(scores - peak[None, :]) * share[None, :]
        d_v = dot(p.to(grad.dtype), grad, PRECISION, d_v)
        d_p = dot(v, tl.trans(grad), PRECISION)
        d_s = p * (d_p - delta[None, :])
        if MASK or CAUSAL:
            d_s = tl.where(scores == float("-inf"), 0, d_s)
        d_k = dot(d_s.to(q.dtype), q, PRECISION, d_k)
    return d_k, d_v


@triton.jit(do_not_specialize=["factor", "scale"])
def attention_backward_slots(
    grad_out, query, key, value, mask, peaks, totals, delta, counts, starts, d_key, d_value, factor, scale,
    tiles, members, H, G, T, S, D, E, gb, gh, gt, ge, qb, qh, qt, qd, kb, kg, ks, kd, vb, vg, vs, vd, mb, mh, mt, ms,
    cb, ch, columns,
    SHARED: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d_key (B, G, S, D), d_value (B, G, S, E), or with SHARED of batch 1, summed over it.

    members: how many heads, of all sequences if SHARED, use a tile's slots.
    """
    unit = tl.program_id(0)
    tile, unit = unit % tiles, unit // tiles
    heads = H // G
    batch, g = (unit // G).to(tl.int64), (unit % G).to(tl.int64)
    slot = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = slot < S
    far = slot.to(tl.int64)
    column_d, column_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    k = load_rows(key + batch * kb + g * kg, far * ks, there, column_d, kd, D)
    v = load_rows(value + batch * vb + g * vg, far * vs, there, column_e, vd, E)
    d_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_v = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for member in range(members):
        b = batch
        if SHARED:
            b = batch + member // heads
        h = g * heads + member % heads
        queries, grads = query + b * qb + h * qh, grad_out + b * gb + h * gh
        row = (b * H + h) * T
        of_rows = peaks + row, totals + row, delta + row
        masks = mask
        if MASK:
            masks = mask + b * mb + h * mh + (far * ms)[:, None]
        first, last = 0, T
        listed = starts
        if starts is not None:
            row_of_list = b * cb + h * ch + tile
            last = tl.load(counts + row_of_list) * BLOCK_M
            listed = starts + row_of_list * columns
        if CAUSAL:
            first = tile * BLOCK_N // BLOCK_M * BLOCK_M
            after = tl.minimum((tl.cdiv((tile + 1) * BLOCK_N, BLOCK_M)) * BLOCK_M, T)
            d_k, d_v = _through_steps(
                d_k, d_v, k, v, queries, grads, of_rows, masks, None, slot, there, column_d, column_e, first, after,
                factor, T, D, E, qt, qd, gt, ge, mt, MASK, True, PRECISION, BLOCK_M,
            )  # fmt: skip
            first = after
        d_k, d_v = _through_steps(
            d_k, d_v, k, v, queries, grads, of_rows, masks, listed, slot, there, column_d, column_e, first, last,
            factor, T, D, E, qt, qd, gt, ge, mt, MASK, False, PRECISION, BLOCK_M,
        )  # fmt: skip
    row = ((batch * G + g) * S + far)[:, None]
    at_d, at_e = column_d[None, :], column_e[None, :]
    d_k = (d_k * scale).to(d_key.dtype.element_ty)
    tl.store(d_key + row * D + at_d, d_k, there[:, None] & (at_d < D))
    tl.store(d_value + row * E + at_e, d_v.to(d_value.dtype.element_ty), there[:, None] & (at_e < E))


@triton.jit
def _through_slots(
    d_q, q, grad, softmax, keys, values, masks, d_masks, starts, step, there, column_d, column_e, first, last, factor,
    S, D, E, ks, kd, vs, vd, ms,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, MASK_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what slots first ... last - 1 give to d_q (BLOCK_M, BLOCK_D). starts: as in `_through_steps`."""
    peak, share, delta = softmax
    n = tl.arange(0, BLOCK_N)
    end = last
    if starts is not None:
        end = S
    for at in tl.range(first, last, BLOCK_N):
        slot = first_of(starts, at, starts is not None, BLOCK_N) + n
        inside = slot < end
        far = slot.to(tl.int64)
        k = load_rows(keys, far * ks, inside, column_d, kd, D)
        v = load_rows(values, far * vs, inside, column_e, vd, E)
        scores = dot(q, tl.trans(k), PRECISION) * factor
        counts = there[:, None] & inside[None, :]
        if MASK or CAUSAL:
            if CAUSAL:
                counts = counts & (slot[None, :] <= step[:, None])
            scores = masked(scores, masks, far[None, :] * ms, counts, MASK)
        p = tl.exp2(scores - peak[:, None]) * share[:, None]
        d_p = dot(grad, tl.trans(v), PRECISION)
        d_s = p * (d_p - delta[:, None])
        if MASK or CAUSAL:
            d_s = tl.where(scores == float("-inf"), 0, d_s)
        if MASK_GRADIENT:
            tl.store(d_masks + far[None, :], d_s.to(d_masks.dtype.element_ty), counts)
        d_q = dot(d_s.to(k.dtype), k, PRECISION, d_q)
    return d_q


@triton.jit(do_not_specialize=["factor", "scale"])
def attention_backward_steps(
    grad_out, query, key, value, mask, peaks, totals, delta, counts, starts, d_query, d_mask, factor, scale,
    tiles, H, G, T, S, D, E, gb, gh, gt, ge, qb, qh, qt, qd, kb, kg, ks, kd, vb, vg, vs, vd, mb, mh, mt, ms,
    cb, ch, columns,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, MASK_GRADIENT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """d_query (B, H, T, D), and with MASK_GRADIENT d_mask (B, H, T, S)."""
    unit = tl.program_id(0)
    tile, unit = tiles - 1 - unit % tiles, unit // tiles
    b, h = (unit // H).to(tl.int64), (unit % H).to(tl.int64)
    g = h // (H // G)
    step = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there, t = step < T, step.to(tl.int64)
    column_d, column_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    row = (b * H + h) * T + t
    q, factor = scaled(load_rows(query + b * qb + h * qh, t * qt, there, column_d, qd, D), factor)
    grad = load_rows(grad_out + b * gb + h * gh, t * gt, there, column_e, ge, E)
    softmax = load_softmax((peaks, totals, delta), row, there)
    keys, values = key + b * kb + g * kg, value + b * vb + g * vg
    masks, d_masks = mask, d_mask
    if MASK:
        masks = mask + b * mb + h * mh + (t * mt)[:, None]
    if MASK_GRADIENT:
        d_masks = d_mask + row[:, None] * S
    d_q = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last, full = S, S
    listed = starts
    if starts is not None:
        row_of_list = b * cb + h * ch + tile
        last = tl.load(counts + row_of_list) * BLOCK_N
        listed, full = starts + row_of_list * columns, last
    if CAUSAL:
        last = tl.minimum(S, (tile + 1) * BLOCK_M)
        full = tl.minimum(S, tile * BLOCK_M + 1) // BLOCK_N * BLOCK_N
        d_q = _through_slots(
            d_q, q, grad, softmax, keys, values, masks, d_masks, None, step, there, column_d, column_e, full, last,
            factor, S, D, E, ks, kd, vs, vd, ms, MASK, True, MASK_GRADIENT, PRECISION, BLOCK_N,
        )  # fmt: skip
    d_q = _through_slots(
        d_q, q, grad, softmax, keys, values, masks, d_masks, listed, step, there, column_d, column_e, 0, full,
        factor, S, D, E, ks, kd, vs, vd, ms, MASK, False, MASK_GRADIENT, PRECISION, BLOCK_N,
    )  # fmt: skip
    column = column_d[None, :]
    d_q = (d_q * scale).to(d_query.dtype.element_ty)
    tl.store(d_query + row[:, None] * D + column, d_q, there[:, None] & (column < D))


class Tile(NamedTuple):
    """rows: BLOCK_M, of queries; slots: BLOCK_N."""

    rows: int
    slots: int
    warps: int
    stages: int


def _tiles(call: Call, of_slots: bool) -> list[Tile]:
    """The ways to cut the work, the first as measured on an H200."""
    width = max(call.widths)
    if call.query.dtype is torch.float32:
        return [Tile(32, 16 if width == 128 else 32, 8, 1)]
    if width > 128:
        return [Tile(32, 64, 8, 1) if of_slots else Tile(64, 32, 8, 1)]
    if of_slots:
        narrow, wide = Tile(64, 128, 8, 1), Tile(64, 64, 4, 1)
        return [narrow, wide] if width <= 64 else [wide, Tile(64, 64, 8, 1), Tile(64, 128, 8, 1)]
    return [Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 64, 4, 2)]


def pull(
    ctx: LaunchContext, call: Call, kept: tuple[Tensor, ...], grad_out: Tensor, shared: bool, mask_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value, and of the mask in float32 (B, H, T, S).

    kept: out, peaks, totals. shared: key and value have the same slots for all sequences, their gradients a batch of 1.
    """
    (batch, heads, steps, width), (groups, slots, wide) = call.query.shape, call.value.shape[1:]
    out, peaks, totals = kept
    d_query = ctx.empty(call.query.shape, call.query.dtype)
    rows = 1 if shared else batch
    d_key = ctx.empty((rows, groups, slots, width), call.key.dtype)
    d_value = ctx.empty((rows, groups, slots, wide), call.value.dtype)
    d_mask = ctx.scratch((batch, heads, steps, slots), "float32") if mask_gradient else None
    if not out.numel() or not slots:
        return d_query.zero_(), d_key.zero_(), d_value.zero_(), d_mask
    delta = ctx.scratch(totals.shape, "float32")
    of_grad, widths = grad_out.stride(), call.widths
    strides, kind = (*of_grad, *call.strides), call.mask_kind
    key = strides, call.causal, call.precision

    def of_delta() -> Config:
        block = max(1, 4096 // widths[1])
        total = batch * heads * steps
        return Config((blocks(total, block),), (total, heads, steps, wide, *of_grad), (block, widths[1]))

    def of_slots(tile: Tile, of_lists: tuple[int, ...]) -> Config:
        block_m, block_n, warps, stages = tile
        tiles, members = blocks(slots, block_n), heads // groups * (batch if shared else 1)
        sizes = (tiles, members, heads, groups, steps, slots, width, wide, *strides, *of_lists)
        what = (shared, kind, call.causal, call.precision, block_m, block_n, *widths)
        return Config((tiles * rows * groups,), sizes, what, warps, stages)

    def of_steps(tile: Tile, of_lists: tuple[int, ...]) -> Config:
        block_m, block_n, warps, stages = tile
        tiles = blocks(steps, block_m)
        sizes = (tiles, heads, groups, steps, slots, width, wide, *strides, *of_lists)
        what = (kind, call.causal, mask_gradient, call.precision, block_m, block_n, *widths)
        return Config((tiles * batch * heads,), sizes, what, warps, stages)

    launch(ctx, attention_delta, of_grad, (grad_out, out, delta), of_delta)
    given = (grad_out, call.query, call.key, call.value, call.mask, peaks, totals, delta)
    numbers = (call.factor, call.scale)

    def slots_by(tile: Tile) -> None:
        *arrays, of_lists = lists(ctx, call.mask, tile.rows, tile.slots, True)
        tensors, known = (*given, *arrays, d_key, d_value), (key, of_lists, shared, tile)
        launch(ctx, attention_backward_slots, known, tensors, lambda: of_slots(tile, of_lists), numbers)

    def steps_by(tile: Tile) -> None:
        # The gradient of a mask is written for every slot.
        found = Lists() if mask_gradient else lists(ctx, call.mask, tile.rows, tile.slots, False)
        *arrays, of_lists = found
        tensors, known = (*given, *arrays, d_query, d_mask), (key, of_lists, mask_gradient, tile)
        launch(ctx, attention_backward_steps, known, tensors, lambda: of_steps(tile, of_lists), numbers)

    def ask(of_slots: bool) -> Question:
        worth = 2 * batch * heads * steps * slots * (width + wide) >= FLOPS
        return Question((*call.bucket, heads // groups, shared, mask_gradient), worth, _tiles(call, of_slots))

    slots_by(choose(ctx, "attention_slots", (shared,), lambda: ask(True), slots_by))
    steps_by(choose(ctx, "attention_steps", (mask_gradient,), lambda: ask(False), steps_by))
    return d_query, d_key, d_value, d_mask


def backward(ctx: LaunchContext, residuals: Residuals, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask = residuals.args
    options = residuals.options
    call = prepare(query, key, value, mask, options["is_causal"], options["scale"], ctx.precision)
    wanted = mask is not None and call.mask_kind == ADDITIVE.value and residuals.wants("attn_mask")
    kept = tuple(residuals.get(name) for name in ("out", "peak", "total"))
    d_query, d_key, d_value, d_mask = pull(ctx, call, kept, grad_out, False, wanted)
    if d_mask is None:
        return d_query, d_key, d_value, None
    if not d_mask.numel() or not value.shape[3]:
        return d_query, d_key, d_value, ctx.zeros(mask.shape, mask.dtype)
    of_mask = ctx.empty(mask.shape, mask.dtype)
    return d_query, d_key, d_value, of_mask.copy_(d_mask.sum_to_size(mask.shape))
