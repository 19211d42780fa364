"""`scan` in Triton: y_t = g_t * y_{t-1} + x_t, and its gradient, which is the same recurrence against time.

A program takes a tile of STEPS by CHANNELS of one sequence. With many channels it goes on to the next tile with the
state in registers (`scan_tiles`); with few channels and a long time there is a program for each tile, in the order of
their tickets, and they hand on states through memory (`scan_chained`). Every element is read once and written once.

Steps beyond a length have the gate 1 and the token 0, which carry the state through; constant gates are read once.
The backward runs against time with the gates of the step after: a_t = dy_t + g_{t+1} * a_{t+1}; then dx_t = a_t and
dg_t = a_t * y_{t-1}.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.common import state_dtype
from srm_backends.triton.launch import Config, blocks, launch, power_of_2
from srm_backends.triton.recurrence import await_words, broken, combine, incoming, publish, row, value
from srm_core.context import LaunchContext, Residuals

FULL, STEPWISE, CONSTANT = 0, 1, 2  # gates (B, T, D); (B, T, 1); constant in time
GROUP = 16  # tiles that find their incoming state together


@triton.jit
def _time(i, T, DOWN: tl.constexpr):
    """The time of the i-th step of a run."""
    if DOWN:
        i = T - 1 - i
    return i


@triton.jit
def _load(of, i, inside, T, length, GATES: tl.constexpr, TOKENS: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr):
    """(g, x) of the steps i (steps, 1), in float32. of: pointers at time 0, and strides."""
    gates, tokens, gt, xt = of
    t = _time(i, T, DOWN)
    valid = (i < T) & (t < length)
    at = t
    given = valid
    if BACK:  # the gate of the step that came before in this run
        at = _time(i - 1, T, DOWN)
        given = valid & (i > 0) & (at < length)
    if GATES == 2:
        g = tl.where(given, tl.load(gates, inside, other=1).to(tl.float32), 1)
    elif GATES == 1:
        g = tl.load(gates + at.to(tl.int64) * gt, given, other=1).to(tl.float32)
        g = tl.where(inside, g, 1)
    else:
        g = tl.load(gates + at.to(tl.int64) * gt, given & inside, other=1).to(tl.float32)
    if TOKENS:
        x = tl.load(tokens + t.to(tl.int64) * xt, valid & inside, other=0).to(tl.float32)
    else:
        x = tl.zeros(g.shape, tl.float32)
    return g, x


@triton.jit
def _store(
    to, out, first, i, inside, T, length,
    GATES: tl.constexpr, KEEP: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Write y at the steps i, or both gradients; returns a constant gate's from these steps, (1, channels).

    to: pointers at time 0, and strides. first: (1, channels), the state before the sequence.
    """
    y, d_gates, states, yt, dt = to
    t = _time(i, T, DOWN)
    valid = (i < T) & (t < length)
    written = (i < T) & inside
    tl.store(y + t.to(tl.int64) * yt, tl.where(valid, out, 0).to(y.dtype.element_ty), written)
    if KEEP:  # in float32, where y is not and the gates are
        tl.store(states + t.to(tl.int64) * yt, out, written)
    share = tl.zeros_like(first)
    if BACK:
        before = _time(i + 1, T, DOWN)  # the step before, in the forward's run
        known = valid & (i + 1 < T) & (before < length)
        past = tl.load(states + before.to(tl.int64) * yt, known & inside, other=0).to(tl.float32)
        d = tl.where(valid & inside, out * tl.where(known, past, first), 0)
        if GATES == 2:
            share = tl.sum(d, 0)[None, :]
        elif GATES == 1:
            tl.store(d_gates + t.to(tl.int64) * dt, tl.sum(d, 1)[:, None], i < T)
        else:
            tl.store(d_gates + t.to(tl.int64) * dt, d.to(d_gates.dtype.element_ty), written)
    return share


@triton.jit
def _one_by_one(
    of, to, state, first, start, stop, inside, T, length,
    GATES: tl.constexpr, TOKENS: tl.constexpr, KEEP: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The steps from start to stop, from the state (1, channels): (the last state, a constant gate's gradient)."""
    share = tl.zeros_like(first)
    for n in range(start, stop):
        i = tl.zeros((1, 1), tl.int32) + n
        g, x = _load(of, i, inside, T, length, GATES, TOKENS, DOWN, BACK)
        state = g * state + x
        share += _store(to, state, first, i, inside, T, length, GATES, KEEP, DOWN, BACK)
    return state, share


@triton.jit
def _place(
    gates, tokens, states, initial, grad_last, lengths, y, d_gates, T, D, b, d, share,
    gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd,
    GATES: tl.constexpr, DEFAULT: tl.constexpr, INITIAL: tl.constexpr, LENGTHS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Of sequence b and channels d: (what `_load` reads, where `_store` writes, the state before the sequence, the
    state that a run begins with, the length); states are (1, channels). share: where this program's part of the
    gradient of gates that are not full begins."""
    inside = (d < D)[None, :]
    d = d.to(tl.int64)[None, :]
    length = T
    if LENGTHS:
        length = tl.load(lengths + b).to(tl.int32)
    if INITIAL:
        first = tl.load(initial + b * D + d, inside, other=0).to(tl.float32)
    else:
        first = tl.full(d.shape, DEFAULT, tl.float32)
    begin = first
    if BACK:
        begin = tl.load(grad_last + b * D + d, inside, other=0).to(tl.float32)
    g0 = gates + b * gb
    d0 = d_gates + share + b * db
    if GATES != 1:
        g0 = g0 + d * gd
        d0 = d0 + d * dd
    of = (g0, tokens + b * xb + d * xd, gt, xt)
    to = (y + b * yb + d * yd, d0, states + b * yb + d * yd, yt, dt)
    return of, to, first, begin, length


@triton.jit
def _end(of, last, state, b, d, D, length, DOWN: tl.constexpr, BACK: tl.constexpr):
    """Write the last state, or the gradient of the state before the sequence."""
    inside = (d < D)[None, :]
    if BACK:
        gates, _, gt, _ = of
        step = tl.maximum(length - 1, 0)  # that came first in the forward's run
        if DOWN:
            step = step * 0
        at = gates + step.to(tl.int64) * gt + tl.zeros_like(d)[None, :]
        g = tl.load(at, inside & (length > 0), other=1).to(tl.float32)
        state = g * state
    tl.store(last + b * D + d.to(tl.int64)[None, :], state.to(last.dtype.element_ty), inside)


@triton.jit
def scan_tiles(
    gates, tokens, states, initial, grad_last, lengths, y, last, d_gates,
    T, D, channel_blocks, part, gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd,
    GATES: tl.constexpr, TOKENS: tl.constexpr, DEFAULT: tl.constexpr, INITIAL: tl.constexpr, LENGTHS: tl.constexpr,
    KEEP: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All steps of CHANNELS channels of one sequence."""
    block = tl.program_id(0) % channel_blocks
    b = (tl.program_id(0) // channel_blocks).to(tl.int64)
    d = block * CHANNELS + tl.arange(0, CHANNELS)
    inside = (d < D)[None, :]
    share = block.to(tl.int64) * 0
    if GATES == 1:
        share = block.to(tl.int64) * part
    of, to, first, begin, length = _place(
        gates, tokens, states, initial, grad_last, lengths, y, d_gates, T, D, b, d, share,
        gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, GATES, DEFAULT, INITIAL, LENGTHS, BACK,
    )  # fmt: skip
    state = begin
    constant = tl.zeros_like(first)
    for n in tl.range(0, T, STEPS, num_stages=STAGES):
        i = n + tl.arange(0, STEPS)[:, None]
        g, x = _load(of, i, inside, T, length, GATES, TOKENS, DOWN, BACK)
        g, x = tl.associative_scan((g, x), 0, combine)
        out = x + g * state
        constant += _store(to, out, first, i, inside, T, length, GATES, KEEP, DOWN, BACK)
        state = row(out, STEPS - 1, STEPS)[None, :]
    if broken(state):
        state, constant = _one_by_one(
            of, to, begin, first, 0, T, inside, T, length, GATES, TOKENS, KEEP, DOWN, BACK
        )  # fmt: skip
    _end(of, last, state, b, d, D, length, DOWN, BACK)
    if BACK and GATES == 2:
        tl.store(to[1], constant, inside)


@triton.jit
def scan_chained(
    gates, tokens, states, initial, grad_last, lengths, y, last, d_gates, words,
    T, D, channel_blocks, part, gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, chains, tiles, stride, plane,
    GATES: tl.constexpr, TOKENS: tl.constexpr, DEFAULT: tl.constexpr, INITIAL: tl.constexpr, LENGTHS: tl.constexpr,
    KEEP: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """STEPS steps of CHANNELS channels of one sequence.

    words: the tickets drawn, then (3, tiles, chains, CHANNELS) factors, ends and states.
    """
    ticket = tl.atomic_add(words, 1)  # what a tile waits for has been started before it
    chain = (ticket % chains).to(tl.int32)
    k = (ticket // chains).to(tl.int32)
    block = chain % channel_blocks
    b = (chain // channel_blocks).to(tl.int64)
    c = tl.arange(0, CHANNELS)
    d = block * CHANNELS + c
    inside = (d < D)[None, :]
    share = block.to(tl.int64) * part
    if GATES == 2:
        share = k.to(tl.int64) * part
    of, to, first, begin, length = _place(
        gates, tokens, states, initial, grad_last, lengths, y, d_gates, T, D, b, d, share,
        gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, GATES, DEFAULT, INITIAL, LENGTHS, BACK,
    )  # fmt: skip
    factors = words + 1 + chain * CHANNELS + c[None, :]  # of tile 0
    ends, lasts = factors + plane, factors + 2 * plane
    mine = k.to(tl.int64) * stride

    i = k * STEPS + tl.arange(0, STEPS)[:, None]
    g, x = _load(of, i, inside, T, length, GATES, TOKENS, DOWN, BACK)
    g, x = tl.associative_scan((g, x), 0, combine)
    factor, end = row(g, STEPS - 1, STEPS)[None, :], row(x, STEPS - 1, STEPS)[None, :]
    bad = tl.maximum(broken(factor), broken(end))
    publish(factors + mine, factor, 1 + bad, inside)
    publish(ends + mine, end, 1 + bad, inside)
    state, others = incoming(factors, ends, lasts, k, stride, begin, inside, GROUP)
    after = end + factor * state
    bad = tl.maximum(tl.maximum(bad, others), broken(after))
    if bad == 0:
        publish(lasts + mine, after, 1, inside)
        constant = _store(to, x + g * state, first, i, inside, T, length, GATES, KEEP, DOWN, BACK)
    else:
        if k > 0:
            state = value(await_words(lasts + mine - stride, inside))
        else:
            state = begin
        after, constant = _one_by_one(
            of, to, state, first, k * STEPS, k * STEPS + STEPS, inside, T, length, GATES, TOKENS, KEEP, DOWN, BACK
        )
        publish(lasts + mine, after, 1, inside)
    if k == tiles - 1:
        _end(of, last, after, b, d, D, length, DOWN, BACK)
    if BACK and GATES == 2:
        tl.store(to[1], constant, inside)


class Plan(NamedTuple):
    """How a run is cut. chained: a program for each tile, else one for all tiles of its channels."""

    chained: bool
    steps: int
    channels: int
    num_warps: int
    stages: int = 2


def plan(batch: int, steps: int, width: int, by_time: bool) -> Plan:
    """by_time: a channel's steps lie side by side in memory, not a step's channels."""
    if by_time:
        return Plan(False, power_of_2(steps, 16, 512), power_of_2(width, 1, 4), 4)
    channels = power_of_2(width, 8, 32)
    if batch * blocks(width, channels) < 128 and steps >= 2048:
        return Plan(True, 256, channels, 4)
    return Plan(False, power_of_2(steps, 16, 64), channels, 4)


def _by_time(t: Tensor) -> bool:
    return t.stride(1) == 1 and t.stride(2) != 1 and t.shape[1] > 1


def _empty(ctx: LaunchContext, like: Tensor, by_time: bool, dtype: Any = None) -> Tensor:
    """Memory for (B, T, D), in one of two orders."""
    batch, steps, width = like.shape
    if by_time:
        return cast(Tensor, ctx.empty((batch, width, steps), dtype or like.dtype)).transpose(1, 2)
    return cast(Tensor, ctx.empty((batch, steps, width), dtype or like.dtype))


def _strides(t: Tensor) -> tuple[int, ...]:
    """With 0 along an axis of one: it stands for all."""
    return tuple(0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))


def run(
    ctx: LaunchContext, kind: int, down: bool, gates: Tensor, tokens: Tensor | None, states: Tensor | None,
    initial: Tensor | None, grad_last: Tensor | None, lengths: Tensor | None, y: Tensor, last: Tensor,
    d_gates: Tensor | None, cut: Plan, default: int,
) -> None:  # fmt: skip
    """One run of the recurrence; with `d_gates` the gradient's: then `tokens` are dy, and the states are read, not
    written. default: the state before the sequence, where none is given."""
    batch, steps, width = y.shape
    x = y if tokens is None else tokens
    strides = (*_strides(gates), *x.stride(), *y.stride())
    per_sequence = blocks(width, cut.channels)
    chains, tiles = batch * per_sequence, blocks(steps, cut.steps)
    back = d_gates is not None
    kept = y if states is None else states
    tensors = (gates, x, kept, initial, grad_last, lengths, y, last, y if d_gates is None else d_gates)

    def configure() -> Config:
        part, of_gates = 0, y.stride()
        if kind == STEPWISE:
            part, of_gates = batch * steps, (steps, 1, 0)
        elif kind == CONSTANT:
            part, of_gates = batch * width, (width, 0, 1)
        sizes = (steps, width, per_sequence, part, *strides, *of_gates)
        given = tokens is not None, default, initial is not None, lengths is not None
        what = (kind, *given, states is not None and not back, down, back, cut.steps, cut.channels)
        if not cut.chained:
            return Config((chains,), sizes, (*what, cut.stages), cut.num_warps)
        stride = chains * cut.channels
        return Config((chains * tiles,), (*sizes, chains, tiles, stride, stride * tiles), (*what, GROUP), cut.num_warps)

    key = strides, down, back, states is None, cut
    if not cut.chained:
        launch(ctx, scan_tiles, key, tensors, configure)
        return
    words = ctx.zeros((1 + 3 * tiles * chains * cut.channels,), "int64")
    launch(ctx, scan_chained, key, (*tensors, words), configure)


def _kind(gates: Tensor, steps: int, width: int) -> int:
    if gates.shape[1] == 1 and steps != 1:
        return CONSTANT
    return STEPWISE if gates.shape[2] == 1 and width != 1 else FULL


def forward(
    ctx: LaunchContext, gates: Tensor, tokens: Tensor | None = None, initial_state: Tensor | None = None,
    *, reverse: bool = False, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = gates if tokens is None else tokens
    batch, steps, width = like.shape
    by_time = _by_time(like)
    y = _empty(ctx, like, by_time)
    last = ctx.empty((batch, width), state_dtype(initial_state, like))
    if not y.numel():
        if initial_state is not None:
            last.copy_(initial_state)
        else:
            last.fill_(1 if tokens is None else 0)
        return y, last
    initial = None if initial_state is None else initial_state.contiguous()
    lengths = None if lengths is None else lengths.to(gates.device).contiguous()
    cut = plan(batch, steps, width, by_time)
    kind = _kind(gates, steps, width)
    states = None
    if ctx.wants_residuals and y.dtype != torch.float32 and not (kind == FULL and gates.dtype == y.dtype):
        states = _empty(ctx, like, by_time, "float32")  # rounded ones would show in a sum, or in float32
    default = 1 if tokens is None else 0
    run(ctx, kind, reverse, gates, tokens, states, initial, None, lengths, y, last, None, cut, default)
    ctx.keep("states", y if states is None else states)
    return y, last


def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
    gates, tokens, initial_state = residuals.args
    reverse, lengths = residuals.options["reverse"], residuals.options["lengths"]
    batch, steps, width = grad_y.shape
    d_state = ctx.empty((batch, width), grad_last.dtype)
    if not grad_y.numel():
        d_state.copy_(grad_last)
        d_tokens = None if tokens is None else ctx.zeros(tokens.shape, tokens.dtype)
        return ctx.zeros(gates.shape, gates.dtype), d_tokens, None if initial_state is None else d_state
    states = residuals.get("states")
    by_time = _by_time(states)
    d_tokens = _empty(ctx, grad_y, by_time)
    if states.stride() != d_tokens.stride():  # it has been elsewhere since the forward
        states, d_tokens = states.contiguous(), _empty(ctx, grad_y, False)
    kind, cut = _kind(gates, steps, width), plan(batch, steps, width, by_time)
    if kind == FULL:
        d_gates = _empty(ctx, grad_y, _by_time(d_tokens), gates.dtype)
    elif kind == STEPWISE:
        d_gates = ctx.scratch((blocks(width, cut.channels), batch, steps), "float32")
    else:
        d_gates = ctx.scratch((blocks(steps, cut.steps) if cut.chained else 1, batch, width), "float32")
    initial = None if initial_state is None else initial_state.contiguous()
    lengths = None if lengths is None else lengths.to(gates.device).contiguous()
    run(
        ctx, kind, not reverse, gates, grad_y, states, initial, grad_last.contiguous(), lengths, d_tokens, d_state,
        d_gates, cut, 1 if tokens is None else 0,
    )  # fmt: skip
    if kind != FULL:
        total = d_gates.sum(0)
        total = total[:, :, None] if kind == STEPWISE else total[:, None]
        d_gates = total.sum_to_size(gates.shape).to(gates.dtype)
    return d_gates, None if tokens is None else d_tokens, None if initial_state is None else d_state
