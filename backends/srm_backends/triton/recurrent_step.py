"""`recurrent_step` and `recurrent_step_` in Triton, all heads of both modes in one launch.

    row: s' = w * x + d * s,  y = s' + b        col: s' = x + d * s,  y = w * s' + b

A row is the D channels of one head of one sequence; a program takes a tile of ROWS rows by WIDTH channels. Index and
slots may lie in device memory, so that a captured graph sees new ones at each replay. w and b are NaN at an index out
of range; a slot out of range names no state: its y is NaN and nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.launch import Config, blocks, launch, power_of_2
from srm_core.context import LaunchContext, Residuals

TILE = 1024  # elements of a program at most, times the size of one: with fewer the memory is not kept busy
FEWEST = 512  # programs, if there is work for them
ROWS, COLS, MIXED = 0, 1, 2  # modes: of all heads, or given head by head


@lru_cache(maxsize=256)
def row_heads(mode: tuple[str, ...], device: torch.device) -> Tensor:
    """(H,) 1 for row heads. Made once: a copy from the host has no place in a captured graph."""
    with torch.inference_mode(False):
        return torch.tensor([word == "row" for word in mode], dtype=torch.int8, device=device)


def modes(mode: tuple[str, ...], device: torch.device) -> tuple[int, Tensor | None]:
    """(ROWS, COLS or MIXED; which heads are row heads, if mixed)."""
    if "col" not in mode:
        return ROWS, None
    return (COLS, None) if "row" not in mode else (MIXED, row_heads(mode, device))


@triton.jit
def is_row(heads, h, inside, MODE: tl.constexpr):
    """Which of the heads h are row heads."""
    if MODE == 2:
        row = tl.load(heads + h, inside, other=0) != 0
    else:
        row = h * 0 == MODE
    return row


@triton.jit
def _place(x_or_state, batch, h, d, stride_b, stride_h, stride_d):
    """Pointers of (rows, channels) in a tensor (B, H, D)."""
    return x_or_state + (batch * stride_b + h * stride_h)[:, None] + d[None, :].to(tl.int64) * stride_d


@triton.jit
def _rows(count, heads, ROWS: tl.constexpr):
    """(sequence (ROWS,) int64, head (ROWS,) int64, which rows there are)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row // heads, row % heads, row < count


@triton.jit
def _columns(weight, bias, index, batch, h, inside, length, strides_w, strides_i, SHARED: tl.constexpr):
    """(w, b, position, is it one) of each row, from the device or the host."""
    if SHARED:
        position = tl.zeros(h.shape, tl.int64) + index
    else:
        position = tl.load(index + batch * strides_i, inside, other=0).to(tl.int64)
    good = (position >= 0) & (position < length)
    at = h * strides_w[0] + position * strides_w[1]
    w = tl.load(weight + at, inside & good, other=0).to(tl.float32)
    at = h * strides_w[2] + position * strides_w[3]
    b = tl.load(bias + at, inside & good, other=0).to(tl.float32)
    return tl.where(good, w, float("nan")), tl.where(good, b, float("nan")), position, good


@triton.jit(do_not_specialize=["index_value"])
def step_forward(
    x, state, weight, bias, decay, heads, index, slots, y, new, index_value,
    count, H, D, L, N, xb, xh, xd, sb, sh, sd, wh, wl, bh, bl, dh, ib, yb, nb, nh, nd,
    MODE: tl.constexpr, SHARED: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    batch, h, inside = _rows(count, H, ROWS)
    if SHARED:
        w, b, _, _ = _columns(weight, bias, index_value, batch, h, inside, L, (wh, wl, bh, bl), ib, SHARED)
    else:
        w, b, _, _ = _columns(weight, bias, index, batch, h, inside, L, (wh, wl, bh, bl), ib, SHARED)
    decays = tl.load(decay + h * dh, inside, other=0).to(tl.float32)
    row = is_row(heads, h, inside, MODE)
    slot = batch
    known = inside
    if SLOTS:
        slot = tl.load(slots + batch, inside, other=0).to(tl.int64)
        known = inside & (slot >= 0) & (slot < N)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    there = inside[:, None] & (d < D)[None, :]
    alive = known[:, None] & (d < D)[None, :]
    given = tl.load(_place(x, batch, h, d, xb, xh, xd), there, other=0).to(tl.float32)
    before = tl.load(_place(state, slot, h, d, sb, sh, sd), alive, other=0).to(tl.float32)
    after = tl.where(row, w, 1)[:, None] * given + decays[:, None] * before
    out = tl.where(row, 1, w)[:, None] * after + b[:, None]
    if SLOTS:
        out = tl.where(known[:, None], out, float("nan"))
    tl.store(_place(y, batch, h, d, yb, D, 1), out.to(y.dtype.element_ty), there)
    tl.store(_place(new, slot, h, d, nb, nh, nd), after.to(new.dtype.element_ty), alive)


@triton.jit(do_not_specialize=["index_value"])
def step_backward(
    grad_y, grad_state, x, state, weight, bias, decay, heads, index, d_x, d_s, parts, index_value,
    count, double, H, D, L, rb, gb, gh, gd, ab, ah, ad, xb, xh, xd, sb, sh, sd, wh, wl, bh, bl, dh, ib,
    MODE: tl.constexpr, SHARED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """a = (1 or w) * dy + ds'; dx = (w or 1) * a; ds = d * a. parts (3, B*H): each row's share of dw, db and dd."""
    batch, h, inside = _rows(count, H, ROWS)
    if SHARED:
        w, b, _, good = _columns(weight, bias, index_value, batch, h, inside, L, (wh, wl, bh, bl), ib, SHARED)
    else:
        w, b, _, good = _columns(weight, bias, index, batch, h, inside, L, (wh, wl, bh, bl), ib, SHARED)
    decays = tl.load(decay + h * dh, inside, other=0).to(tl.float32)
    row = is_row(heads, h, inside, MODE)
    of_w = tl.zeros((ROWS, WIDTH), tl.float32)
    of_b = tl.zeros((ROWS, WIDTH), tl.float32)
    of_d = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, D, WIDTH):
        d = start + tl.arange(0, WIDTH)
        there = inside[:, None] & (d < D)[None, :]
        dy = tl.load(_place(grad_y, batch, h, d, gb, gh, gd), there, other=0).to(tl.float32)
        ds = tl.load(_place(grad_state, batch, h, d, ab, ah, ad), there, other=0).to(tl.float32)
        given = tl.load(_place(x, batch, h, d, xb, xh, xd), there, other=0).to(tl.float32)
        before = tl.load(_place(state, batch, h, d, sb, sh, sd), there, other=0).to(tl.float32)
        a = tl.where(row, 1, w)[:, None] * dy + ds
        of_x = tl.where(row, w, 1)[:, None] * a
        tl.store(_place(d_x, batch, h, d, rb, D, 1), of_x.to(d_x.dtype.element_ty), there)
        tl.store(_place(d_s, batch, h, d, rb, D, 1), (decays[:, None] * a).to(d_s.dtype.element_ty), there)
        after = given + decays[:, None] * before
        of_w += tl.where(there, tl.where(row[:, None], a * given, dy * after), 0)
        of_b += tl.where(there, dy, 0)
        of_d += tl.where(there, a * before, 0)
    at = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    tl.store(parts + at, tl.where(good, tl.sum(of_w, 1), 0), inside)
    tl.store(parts + count + at, tl.where(good, tl.sum(of_b, 1), 0), inside)
    tl.store(parts + double + at, tl.sum(of_d, 1), inside)


@triton.jit(do_not_specialize=["start_value"])
def gather_positions(
    parts, start, d_weight, d_bias, start_value,
    B, T, H, L, sequence, plane, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """d_weight[h, l] = the sum of parts[0, b, t, h] with start[b] + t = l, d_bias of parts[1]; in one order."""
    h = tl.program_id(0)
    l = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    of_w = tl.zeros((BLOCK,), tl.float32)
    of_b = tl.zeros((BLOCK,), tl.float32)
    there = l < L
    at = parts + h  # of sequence b
    for b in range(B):
        if SHARED:
            t = l.to(tl.int64) - start_value
        else:
            t = l.to(tl.int64) - tl.load(start + b).to(tl.int64)
        given = there & (t >= 0) & (t < T)
        of_w += tl.load(at + t * H, given, other=0)
        of_b += tl.load(at + plane + t * H, given, other=0)
        at += sequence
    to = h.to(tl.int64) * L + l
    tl.store(d_weight + to, of_w.to(d_weight.dtype.element_ty), there)
    tl.store(d_bias + to, of_b.to(d_bias.dtype.element_ty), there)


def indexed(index: Any) -> tuple[Tensor | None, int, int]:
    """(the index in device memory, its stride from sequence to sequence, or else its value)."""
    if isinstance(index, Tensor):
        return index, index.stride(0) if index.dim() else 0, 0
    return None, 0, int(index)


def _tile(x: Tensor, most: int) -> tuple[int, int]:
    """(rows, channels)."""
    width = x.shape[-1]
    size = power_of_2(x.numel() // FEWEST, 512, most)
    channels = power_of_2(width, 16, size)
    return size // channels, channels


def forward(
    ctx: LaunchContext, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor,
    mode: tuple[str, ...], index: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, new = ctx.empty(x.shape, x.dtype), ctx.empty(state.shape, state.dtype)
    if x.numel():
        _step(ctx, x, state, weight, bias, decay, mode, index, None, y, new)
    return y, new


def forward_(
    ctx: LaunchContext, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor,
    mode: tuple[str, ...], index: Any, *, slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    y = ctx.empty(x.shape, x.dtype)
    if x.numel():
        if slots is not None:
            slots = slots.to(x.device).contiguous()
        _step(ctx, x, state, weight, bias, decay, mode, index, slots, y, state)
    return y


def _step(
    ctx: LaunchContext, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor,
    mode: tuple[str, ...], index: Any, slots: Tensor | None, y: Tensor, new: Tensor,
) -> None:  # fmt: skip
    position, index_stride, value = indexed(index)
    which, heads = modes(mode, x.device)
    strides = (*x.stride(), *state.stride(), *weight.stride(), *bias.stride(), *decay.stride(), index_stride)

    def configure() -> Config:
        (batch, H, D), (rows, width) = x.shape, _tile(x, TILE * x.element_size())
        sizes = (batch * H, H, D, weight.shape[1], state.shape[0], *strides, H * D, *new.stride())
        grid = blocks(batch * H, rows), blocks(D, width)
        return Config(grid, sizes, (which, position is None, slots is not None, rows, width))

    tensors = (x, state, weight, bias, decay, heads, position, slots, y, new)
    launch(ctx, step_forward, strides, tensors, configure, (value,))


def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Tensor, grad_state: Tensor) -> tuple[Any, ...]:
    x, state, weight, bias, decay, mode, index = residuals.args
    batch, H, D = x.shape
    d = tuple(ctx.empty(t.shape, t.dtype) for t in (x, state, weight, bias))
    if not x.numel():
        for gradient in d:
            gradient.zero_()
        return *d, ctx.zeros(decay.shape, decay.dtype)
    position, index_stride, value = indexed(index)
    which, heads = modes(mode, x.device)
    parts = ctx.scratch((3, batch, 1, H), "float32")
    strided: Sequence[Tensor] = (grad_y, grad_state, x, state, weight, bias, decay)
    strides = (*(s for t in strided for s in t.stride()), index_stride)

    def configure() -> Config:
        rows, width = _tile(x, TILE)
        sizes = (batch * H, 2 * batch * H, H, D, weight.shape[1], H * D, *strides)
        return Config((blocks(batch * H, rows),), sizes, (which, position is None, rows, width))

    launch(ctx, step_backward, strides, (*strided, heads, position, d[0], d[1], parts), configure, (value,))
    sum_positions(ctx, parts, position, index_stride, value, d[2], d[3])
    return *d, parts[2].sum((0, 1)).to(decay.dtype)


def sum_positions(
    ctx: LaunchContext, parts: Tensor, start: Tensor | None, stride: int, value: int, d_weight: Tensor, d_bias: Tensor
) -> None:
    """Write d_weight and d_bias (H, L) from the shares parts (2 or 3, B, T, H) of the positions from start on."""
    _, batch, steps, H = parts.shape
    if start is not None:
        start = start.expand(batch).contiguous() if stride != 1 else start
    length = d_weight.shape[1]
    block = power_of_2(length, 16, 128)

    def configure() -> Config:
        return Config(
            (H, blocks(length, block)), (batch, steps, H, length, steps * H, batch * steps * H), (start is None, block)
        )

    if length:
        launch(ctx, gather_positions, batch, (parts, start, d_weight, d_bias), configure, (value,))
