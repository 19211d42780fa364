"""`recurrent_mix` in Triton: a recurrence with one constant gate a head, its weights and biases in the same pass.

    row: s_t = w_t * x_t + d * s_{t-1},  y_t = s_t + b_t        col: s_t = x_t + d * s_{t-1},  y_t = w_t * s_t + b_t

A program takes all steps of CHANNELS channels of one head of one sequence, ROWS * CHUNKS at a time, as `scan_tiles`
does: x is read once and y written once. The states are written only if a backward will follow, which reads them. It
runs against time and leaves each program's share of the gradients of w, b and d, which are added in one order
afterwards.
w and b are NaN at a position out of range, which gets no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.autotune import BYTES, Question, choose
from srm_backends.triton.common import state_dtype
from srm_backends.triton.launch import Config, blocks, launch, power_of_2
from srm_backends.triton.recurrence import broken, join, length_of, states
from srm_backends.triton.recurrent_step import indexed, is_row, modes, sum_positions
from srm_core.context import LaunchContext, Residuals


@triton.jit
def _head(blocks_of_head, H, CHANNELS: tl.constexpr):
    """(block of channels, head, sequence) of this program; channels (1, channels)."""
    program = tl.program_id(0)
    block = program % blocks_of_head
    h = ((program // blocks_of_head) % H).to(tl.int64)
    b = (program // blocks_of_head // H).to(tl.int64)
    return block, h, b, (block * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)[None, :]


@triton.jit
def _first_position(start, start_value, b, SHARED: tl.constexpr):
    if SHARED:
        position = tl.zeros_like(b) + start_value
    else:
        position = tl.load(start + b).to(tl.int64)
    return position


@triton.jit
def _at(parameter, position, stride, there, L):
    """A parameter of the head at positions, in float32; NaN out of range."""
    good = (position >= 0) & (position < L)
    found = tl.load(parameter + position * stride, there & good, other=0).to(tl.float32)
    return tl.where(good, found, float("nan"))


@triton.jit
def _gates(d, given, there):
    """The gate d, or 1 where none is given, of every channel; in float64, as a rounding of its powers would be the same
    in every tile, and add up."""
    return tl.where(given & there, d, 1).to(tl.float64)


@triton.jit
def _forward_steps(x, weight, bias, n, j, position, length, d, row, inside, L, xt, wl, bl):
    """(g, tokens, w_out, b) of the steps n + j."""
    t = n + j
    valid = t < length
    w = _at(weight, position + t, wl, valid, L)
    b = _at(bias, position + t, bl, valid, L)
    given = tl.load(x + t.to(tl.int64) * xt, valid & inside, other=0).to(tl.float32)
    token = tl.where(valid & inside, tl.where(row, w, 1) * given, 0)
    return _gates(d, valid, inside), token, tl.where(row, 1, w), b


@triton.jit
def _forward_store(out, w_out, b, y, past, n, j, length, inside, T, yt, KEEP: tl.constexpr):
    t = n + j
    at = t.to(tl.int64) * yt
    result = tl.where(t < length, w_out * out + b, 0)
    tl.store(y + at, result.to(y.dtype.element_ty), (t < T) & inside)
    if KEEP:
        tl.store(past + at, out, (t < T) & inside)


@triton.jit(do_not_specialize=["start_value"])
def mix_forward(
    x, weight, bias, decay, heads, initial, start, lengths, y, past, last, start_value,
    T, H, D, L, head_blocks, xb, xt, xh, xd, yb, yt, wh, wl, bh, bl, dh,
    MODE: tl.constexpr, SHARED: tl.constexpr, INITIAL: tl.constexpr, LENGTHS: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block, h, b, c = _head(head_blocks, H, CHANNELS)
    inside = (c < D)[None, :, :]
    length = T
    if LENGTHS:
        length = length_of(lengths, b, T)
    position = _first_position(start, start_value, b, SHARED)
    row = is_row(heads, h, h >= 0, MODE)
    d = tl.load(decay + h * dh).to(tl.float32)
    weight += h * wh
    bias += h * bh
    x0 = x + b * xb + h * xh + (c * xd)[None, :, :]
    to = (b * yb + h * D + c)[None, :, :]
    begin = tl.zeros(c.shape, tl.float32)
    if INITIAL:
        begin = tl.load(initial + (b * H + h) * D + c, c < D, other=0).to(tl.float32)
    state = begin
    j = tl.arange(0, CHUNKS)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    for n in tl.range(0, T, ROWS * CHUNKS, num_stages=STAGES):
        g, token, w_out, of_b = _forward_steps(
            x0, weight, bias, n, j, position, length, d, row, inside, L, xt, wl, bl
        )  # fmt: skip
        factor, end, before_g, before_x = join(g, token, ROWS, CHUNKS)
        out = states(g, token, before_g, before_x, state, ROWS)
        state = end + factor.to(tl.float32) * state
        _forward_store(out, w_out, of_b, y + to, past + to, n, j, length, inside, T, yt, KEEP)
    if broken(state):
        tl.debug_barrier()  # what follows is written where other threads may be writing still
        state = begin
        one = tl.zeros((1, 1, 1), tl.int32)
        for n in range(T):
            g1, token1, w_out1, of_b1 = _forward_steps(
                x0, weight, bias, n, one, position, length, d, row, inside, L, xt, wl, bl
            )  # fmt: skip
            state = tl.sum(g1.to(tl.float32) * state[None, :, :] + token1, 0)
            _forward_store(state[None, :, :], w_out1, of_b1, y + to, past + to, n, one, length, inside, T, yt, KEEP)
    tl.store(last + (b * H + h) * D + c, state.to(last.dtype.element_ty), c < D)


@triton.jit
def _backward_steps(grad_y, weight, n, j, position, length, d, row, inside, T, L, gt, wl):
    """(g, dy, the tokens w_out * dy, w_in, t) of the steps n + j of the run against time."""
    t = T - 1 - n - j
    valid = (t >= 0) & (t < length)
    w = _at(weight, position + t, wl, valid, L)
    dy = tl.load(grad_y + t.to(tl.int64) * gt, valid & inside, other=0).to(tl.float32)
    token = tl.where(valid & inside, tl.where(row, 1, w) * dy, 0)
    return _gates(d, valid & (t + 1 < length), inside), dy, token, tl.where(row, w, 1), t


@triton.jit
def _backward_store(a, dy, w_in, t, x, d_x, past, first, to_w, to_b, row, inside, length, xt, yt, pt):
    """Write dx and the shares of dw and db; returns that of dd, (1, channels)."""
    valid = (t >= 0) & (t < length)
    there = valid & inside
    at = t.to(tl.int64)
    given = tl.load(x + at * xt, there, other=0).to(tl.float32)
    now = tl.load(past + at * yt, there, other=0)
    before = tl.load(past + (at - 1) * yt, there & (t > 0), other=0)
    before = tl.where(t > 0, before, first[None, :, :])
    tl.store(d_x + at * yt, tl.where(valid, w_in * a, 0).to(d_x.dtype.element_ty), (t >= 0) & inside)
    of_w = tl.where(there, tl.where(row, a * given, dy * now), 0)
    tl.store(to_w + at * pt, tl.sum(of_w, 2)[:, :, None], t >= 0)
    tl.store(to_b + at * pt, tl.sum(tl.where(there, dy, 0), 2)[:, :, None], t >= 0)
    return tl.sum(tl.sum(tl.where(there, a * before, 0), 0), 0)[None, :]


@triton.jit(do_not_specialize=["start_value"])
def mix_backward(
    grad_y, grad_last, x, weight, decay, heads, initial, start, lengths, past, d_x, d_initial, parts, of_decay,
    start_value, T, H, D, L, head_blocks, batch, plane, gb, gt, gh, gd, xb, xt, xh, xd, yb, yt, wh, wl, dh,
    MODE: tl.constexpr, SHARED: tl.constexpr, INITIAL: tl.constexpr, LENGTHS: tl.constexpr,
    ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """a_t = w_out * dy_t + d * a_{t+1}, dx = w_in * a; shares: parts (2, blocks, B, T, H), of_decay (blocks, B, H)."""
    block, h, b, c = _head(head_blocks, H, CHANNELS)
    inside = (c < D)[None, :, :]
    length = T
    if LENGTHS:
        length = length_of(lengths, b, T)
    position = _first_position(start, start_value, b, SHARED)
    row = is_row(heads, h, h >= 0, MODE)
    d = tl.load(decay + h * dh).to(tl.float32)
    weight += h * wh
    g0 = grad_y + b * gb + h * gh + (c * gd)[None, :, :]
    x0 = x + b * xb + h * xh + (c * xd)[None, :, :]
    to = (b * yb + h * D + c)[None, :, :]
    to_w = parts + (block.to(tl.int64) * batch + b) * T * H + h
    to_b = to_w + plane
    own = (b * H + h) * D + c
    first = tl.zeros(c.shape, tl.float32)
    if INITIAL:
        first = tl.load(initial + own, c < D, other=0).to(tl.float32)
    begin = tl.load(grad_last + own, c < D, other=0).to(tl.float32)
    state = begin
    of_d = tl.zeros(c.shape, tl.float32)
    j = tl.arange(0, CHUNKS)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    for n in tl.range(0, T, ROWS * CHUNKS, num_stages=STAGES):
        g, dy, token, w_in, t = _backward_steps(
            g0, weight, n, j, position, length, d, row, inside, T, L, gt, wl
        )  # fmt: skip
        factor, end, before_g, before_x = join(g, token, ROWS, CHUNKS)
        a = states(g, token, before_g, before_x, state, ROWS)
        state = end + factor.to(tl.float32) * state
        of_d += _backward_store(
            a, dy, w_in, t, x0, d_x + to, past + to, first, to_w, to_b, row, inside, length, xt, yt, H
        )
    if broken(state):
        tl.debug_barrier()  # what follows is written where other threads may be writing still
        state = begin
        of_d = tl.zeros(c.shape, tl.float32)
        one = tl.zeros((1, 1, 1), tl.int32)
        for n in range(T):
            g1, dy1, token1, w_in1, t1 = _backward_steps(
                g0, weight, n, one, position, length, d, row, inside, T, L, gt, wl
            )  # fmt: skip
            state = tl.sum(g1.to(tl.float32) * state[None, :, :] + token1, 0)
            of_d += _backward_store(
                state[None, :, :], dy1, w_in1, t1, x0, d_x + to, past + to, first, to_w, to_b, row, inside, length,
                xt, yt, H,
            )  # fmt: skip
    tl.store(d_initial + own, tl.where(length > 0, d * state, state).to(d_initial.dtype.element_ty), c < D)
    tl.store(of_decay + (block.to(tl.int64) * batch + b) * H + h, tl.sum(tl.sum(of_d, 1), 0))


class Cut(NamedTuple):
    """A tile has rows * chunks steps: rows within a thread, which has a vector of channels."""

    rows: int
    chunks: int
    channels: int
    warps: int
    stages: int


def _cuts(x: Tensor, back: bool) -> list[Cut]:
    """The ways to cut the work, the first as measured on an H200."""
    _, steps, _, width = x.shape
    vector = 16 // x.element_size()
    most, stages = (16 // vector, 2) if back else (32 // vector, 3)

    def cut(channels: int, warps: int, times: int = 1) -> Cut:
        channels = power_of_2(width, 8, channels)
        chunks = warps * 32 * vector // channels
        return Cut(power_of_2(blocks(steps, chunks), 1, times * most), chunks, channels, warps, stages)

    ways = [cut(32, 2), cut(32, 4), cut(64, 4), cut(64, 2), cut(16, 2), cut(32, 1), cut(32, 2, 2)]
    return list(dict.fromkeys(ways))


def _best(ctx: LaunchContext, name: str, x: Tensor, more: bool, run_by: Callable[[Cut], Any]) -> Cut:
    def ask() -> Question:
        bucket = (str(x.dtype)[6:], *(power_of_2(n, 1, 1 << 40) for n in x.shape), more)
        worth = 2 * x.numel() * x.element_size() >= BYTES
        return Question(bucket, worth, _cuts(x, name == "recurrent_mix_backward"))

    return choose(ctx, name, (more,), ask, run_by)


def forward(
    ctx: LaunchContext, x: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, mode: tuple[str, ...],
    initial_state: Tensor | None = None, *, start: Any = 0, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, steps, heads, width = x.shape
    y, last = ctx.empty(x.shape, x.dtype), ctx.empty((batch, heads, width), state_dtype(initial_state, x))
    if not x.numel():
        if initial_state is None:
            last.zero_()
        else:
            last.copy_(initial_state)
        return y, last
    past = ctx.empty(x.shape, "float32") if ctx.wants_residuals else None
    position, stride, value = indexed(start)
    which, row_heads = modes(mode, x.device)
    strides = (*x.stride(), *weight.stride(), *bias.stride(), *decay.stride())

    def configure(cut: Cut) -> Config:
        per_head = blocks(width, cut.channels)
        xb, xt, xh, xd, *rest = strides
        sizes = (steps, heads, width, weight.shape[1], per_head, xb, xt, xh, xd, *y.stride()[:2], *rest)
        what = (which, position is None, initial_state is not None, lengths is not None, past is not None)
        return Config((batch * heads * per_head,), sizes, (*what, *cut[:3], cut.stages), cut.warps)

    given = _dense(initial_state), _spread(position, stride, batch), _on(lengths, x)
    tensors = (x, weight, bias, decay, row_heads, *given, y, y if past is None else past, last)

    def run_by(cut: Cut) -> None:
        launch(ctx, mix_forward, (strides, past is None, cut), tensors, lambda: configure(cut), (value,))

    run_by(_best(ctx, "recurrent_mix", x, past is None, run_by))
    if past is not None:
        ctx.keep("states", past)
    return y, last


def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    x, weight, bias, decay, mode, initial_state = residuals.args
    start, lengths = residuals.options["start"], residuals.options["lengths"]
    batch, steps, heads, width = x.shape
    d_x, d_initial = ctx.empty(x.shape, x.dtype), ctx.empty(grad_last.shape, grad_last.dtype)
    d_weight, d_bias = ctx.empty(weight.shape, weight.dtype), ctx.empty(bias.shape, bias.dtype)
    if not x.numel():
        d_initial.copy_(grad_last)
        d_decay = ctx.zeros(decay.shape, decay.dtype)
        return d_x, d_weight.zero_(), d_bias.zero_(), d_decay, None if initial_state is None else d_initial
    position, stride, value = indexed(start)
    which, row_heads = modes(mode, x.device)
    strides = (*grad_y.stride(), *x.stride(), *weight.stride(), *decay.stride())
    position = _spread(position, stride, batch)
    given = (
        grad_y, grad_last.contiguous(), x, weight, decay, row_heads, _dense(initial_state), position, _on(lengths, x),
        residuals.get("states"), d_x, d_initial,
    )  # fmt: skip

    def configure(cut: Cut, stride_of_parts: int) -> Config:
        per_head = blocks(width, cut.channels)
        sizes = (steps, heads, width, weight.shape[1], per_head, batch, stride_of_parts)
        sizes = (*sizes, *strides[:8], *d_x.stride()[:2], *strides[8:])
        what = (which, position is None, initial_state is not None, lengths is not None)
        return Config((batch * heads * per_head,), sizes, (*what, *cut[:3], cut.stages), cut.warps)

    def run_by(cut: Cut) -> tuple[Tensor, Tensor]:
        per_head = blocks(width, cut.channels)
        parts = ctx.scratch((2, per_head, batch, steps, heads), "float32")
        of_decay = ctx.scratch((per_head, batch, heads), "float32")
        tensors = (*given, parts, of_decay)
        launch(ctx, mix_backward, (strides, cut), tensors, lambda: configure(cut, parts.stride(0)), (value,))
        return parts, of_decay

    parts, of_decay = run_by(_best(ctx, "recurrent_mix_backward", x, False, run_by))
    per_head = parts.shape[1]
    every = None if position is None else position.repeat(per_head)
    sum_positions(ctx, parts.view(2, -1, steps, heads), every, 1, value, d_weight, d_bias)
    d_decay = of_decay.sum((0, 1)).to(decay.dtype)
    return d_x, d_weight, d_bias, d_decay, None if initial_state is None else d_initial


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _on(t: Tensor | None, like: Tensor) -> Tensor | None:
    return None if t is None else t.to(like.device).contiguous()


def _spread(position: Tensor | None, stride: int, batch: int) -> Tensor | None:
    return None if position is None else position.expand(batch).contiguous()
