"""`scan` in Triton: y_t = g_t * y_{t-1} + x_t, and its gradient, which is the same recurrence against time.

A program takes a tile of STEPS by CHANNELS of one sequence. With many channels it goes on to the next tile with the
state in registers (`scan_tiles`); with few channels and a long time there is a program for each tile, in the order of
their tickets, and they hand on states through memory (`scan_chained`). Every element is read once and written once.

Steps beyond a length have the gate 1 and the token 0, which carry the state through; constant gates are read once.
The backward runs against time with the gates of the step after: a_t = dy_t + g_{t+1} * a_{t+1}; then dx_t = a_t and
dg_t = a_t * y_{t-1}.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.autotune import BYTES, Question, choose
from srm_backends.triton.common import state_dtype
from srm_backends.triton.launch import Config, blocks, launch, power_of_2
from srm_backends.triton.recurrence import (
    broken,
    in_order,
    incoming,
    join,
    last_rows,
    length_of,
    publish,
    state_of,
    states,
)
from srm_core.context import LaunchContext, Residuals

FULL, STEPWISE, CONSTANT = 0, 1, 2  # gates (B, T, D); (B, T, 1); constant in time
MANY = 120  # programs that each go through all steps: nearly one for each multiprocessor
LONG = 2048  # steps


@triton.jit
def _load(
    of, n, j, inside, T, length,
    GATES: tl.constexpr, TOKENS: tl.constexpr, LENGTHS: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """(g, x) of the steps n + j of the run, (chunks, rows, 1). of: see `_place`."""
    gates, tokens = of
    i = n + j
    on = tl.cast(n, tl.int64)
    if DOWN:
        on = -on
    valid = i < T
    given = valid
    if BACK:
        given = valid & (i > 0)
    if LENGTHS:
        t = i
        before = i - 1
        if DOWN:
            t = T - 1 - i
            before = t + 1
        valid = valid & (t < length)
        given = given & (t < length)
        if BACK:  # the gate is that of the step that came before in this run
            given = given & (before < length)
    if GATES == 2:  # a rounding of the products would be the same in every tile, and add up
        g = tl.where(given, tl.load(gates[0] + gates[1], inside, other=1), 1).to(tl.float64)
    elif GATES == 1:
        g = tl.where(inside, tl.load(gates[0] + on * gates[2] + gates[1], given, other=1).to(tl.float32), 1)
    else:
        g = tl.load(gates[0] + on * gates[2] + gates[1], given & inside, other=1).to(tl.float32)
    if TOKENS:
        x = tl.load(tokens[0] + on * tokens[2] + tokens[1], valid & inside, other=0).to(tl.float32)
    else:
        x = tl.zeros(g.shape, tl.float32)
    return g, x


@triton.jit
def _store(
    to, out, first, n, j, inside, T, length,
    GATES: tl.constexpr, KEEP: tl.constexpr, LENGTHS: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Write y at the steps n + j, or both gradients; returns a constant gate's from these steps, (1, channels).

    to: see `_place`. first: the state before the sequence, (1, channels).
    """
    y, d_gates, past = to
    i = n + j
    on = tl.cast(n, tl.int64)
    if DOWN:
        on = -on
    written = (i < T) & inside
    valid = written
    known = written
    if BACK:
        known = (i + 1 < T) & inside
    if LENGTHS:
        t = i
        before = i + 1  # the step before, in the forward's run
        if DOWN:
            t = T - 1 - i
            before = t - 1
        valid = valid & (t < length)
        known = known & (before < length)
        out = tl.where(t < length, out, 0)
    tl.store(y[0] + on * y[2] + y[1], out.to(y[0].dtype.element_ty), written)
    share = tl.zeros_like(first)
    if KEEP:  # in float32, where y is rounded
        tl.store(past[0] + on * past[2] + past[1], out, written)
    if BACK:
        before_it = tl.load(past[0] + on * past[2] + past[1], known & valid, other=0).to(tl.float32)
        d = out * tl.where(known, before_it, first[None, :, :])
        d = tl.where(valid, d, 0)
        if GATES == 2:
            share = tl.sum(tl.sum(d, 0), 0)[None, :]
        elif GATES == 1:
            tl.store(d_gates[0] + on * d_gates[2] + d_gates[1], tl.sum(d, 2)[:, :, None], i < T)
        else:
            tl.store(d_gates[0] + on * d_gates[2] + d_gates[1], d.to(d_gates[0].dtype.element_ty), written)
    return share


@triton.jit
def _place(
    gates, tokens, past, y, d_gates, j, b, block, d, share, T, gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd,
    GATES: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr, CHANNELS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of sequence b, a block of channels and steps j of a run: (what `_load` reads, where `_store` writes).

    d: the channels within the block (1, 1, channels). share: where this program's part of the gradient of gates that
    are not full begins. Each is a place in memory, one for all threads, offsets from it, and the stride of time.
    """
    first = tl.zeros_like(b)  # time of the run's first step
    after = 1
    if DOWN:
        first = first + T - 1
        after = -1
    gate, before = first, first
    if BACK:
        gate, before = first - after, first + after
    t = tl.cast(j * after, WIDE)
    c = block.to(tl.int64) * CHANNELS
    d = tl.cast(d, WIDE)
    g0 = gates + b * gb
    d0 = d_gates + share + b * db
    of_g, of_d = tl.zeros_like(d), tl.zeros_like(d)
    if GATES != 1:
        g0 = g0 + c * gd
        d0 = d0 + c * dd
        of_g, of_d = d * gd, d * dd
    if GATES != 2:
        g0 = g0 + gate * gt
        d0 = d0 + first * dt
    if GATES == 1:
        of_g, of_d = t * gt, t * dt
    elif GATES == 0:
        of_g, of_d = t * gt + of_g, t * dt + of_d
    y0 = b * yb + c * yd
    of_x, of_y = t * xt + d * xd, t * yt + d * yd
    of = ((g0, of_g, gt), (tokens + b * xb + c * xd + first * xt, of_x, xt))
    to = ((y + y0 + first * yt, of_y, yt), (d0, of_d, dt), (past + y0 + before * yt, of_y, yt))
    return of, to


@triton.jit
def _begin(initial, grad_last, lengths, b, d, D, T, DEFAULT: tl.constexpr, INITIAL: tl.constexpr,
           LENGTHS: tl.constexpr, BACK: tl.constexpr):  # fmt: skip
    """(the state before the sequence, the state that the run begins with, both (1, channels), and the length)."""
    inside = d < D
    first = tl.full(d.shape, DEFAULT, tl.float32)
    if INITIAL:
        first = tl.load(initial + b * D + d, inside, other=0).to(tl.float32)
    start = first
    if BACK:
        start = tl.load(grad_last + b * D + d, inside, other=0).to(tl.float32)
    length = T
    if LENGTHS:
        length = length_of(lengths, b, T)
    return first, start, length


@triton.jit
def _one_by_one(
    of, to, state, first, start, stop, inside, T, length, GATES: tl.constexpr, TOKENS: tl.constexpr,
    KEEP: tl.constexpr, LENGTHS: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """The steps from start to stop, from the state (1, channels): (the last state, a constant gate's gradient)."""
    share = tl.zeros_like(first)
    j = tl.zeros((1, 1, 1), tl.int32)
    for n in range(start, stop):
        g, x = _load(of, n, j, inside, T, length, GATES, TOKENS, LENGTHS, DOWN, BACK)
        state = tl.sum(g.to(tl.float32) * state[None, :, :] + x, 0)
        out = state[None, :, :]
        share += _store(to, out, first, n, j, inside, T, length, GATES, KEEP, LENGTHS, DOWN, BACK)
    return state, share


@triton.jit
def _end(gates, last, state, b, d, D, length, gb, gt, gd, DOWN: tl.constexpr, BACK: tl.constexpr):
    """Write the last state, or the gradient of the state before the sequence."""
    inside = d < D
    if BACK:
        step = tl.maximum(length - 1, 0)  # that came first in the forward's run
        if DOWN:
            step = step * 0
        at = gates + b * gb + step.to(tl.int64) * gt + d * gd
        g = tl.load(at, inside & (length > 0), other=1).to(tl.float32)
        state = g * state
    tl.store(last + b * D + d, state.to(last.dtype.element_ty), inside)


@triton.jit
def scan_tiles(
    gates, tokens, past, initial, grad_last, lengths, y, last, d_gates,
    T, D, channel_blocks, part, gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd,
    GATES: tl.constexpr, TOKENS: tl.constexpr, DEFAULT: tl.constexpr, INITIAL: tl.constexpr, LENGTHS: tl.constexpr,
    KEEP: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr, GT: tl.constexpr, XT: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All steps of CHANNELS channels of one sequence, ROWS * CHUNKS at a time."""
    if GT == 1:
        gt = GT
    if XT == 1:
        xt, yt = XT, XT
    block = tl.program_id(0) % channel_blocks
    b = (tl.program_id(0) // channel_blocks).to(tl.int64)
    c = tl.arange(0, CHANNELS)[None, :]
    d = (block * CHANNELS + c).to(tl.int64)
    inside = (d < D)[None, :, :]
    share = block.to(tl.int64) * part
    if GATES == 2:
        share = share * 0
    first, start, length = _begin(initial, grad_last, lengths, b, d, D, T, DEFAULT, INITIAL, LENGTHS, BACK)
    j = tl.arange(0, CHUNKS)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    of, to = _place(
        gates, tokens, past, y, d_gates, j, b, block, c[None, :, :], share, T,
        gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, GATES, DOWN, BACK, CHANNELS, WIDE,
    )  # fmt: skip
    state = start
    constant = tl.zeros_like(first)
    for n in tl.range(0, T, ROWS * CHUNKS, num_stages=STAGES):
        g, x = _load(of, n, j, inside, T, length, GATES, TOKENS, LENGTHS, DOWN, BACK)
        if CHUNKS == 1:
            out = in_order(g, x, state, ROWS)
            state = last_rows(out, ROWS)
        else:
            factor, end, before_g, before_x = join(g, x, ROWS, CHUNKS)
            out = states(g, x, before_g, before_x, state, ROWS)
            state = end + factor.to(tl.float32) * state
        constant += _store(to, out, first, n, j, inside, T, length, GATES, KEEP, LENGTHS, DOWN, BACK)
    if CHUNKS > 1 and broken(state):
        tl.debug_barrier()  # what follows is written where other threads may be writing still
        of_one, to_one = _place(
            gates, tokens, past, y, d_gates, tl.zeros((1, 1, 1), tl.int32), b, block, c[None, :, :], share, T,
            gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, GATES, DOWN, BACK, CHANNELS, WIDE,
        )  # fmt: skip
        state, constant = _one_by_one(
            of_one, to_one, start, first, 0, T, inside, T, length, GATES, TOKENS, KEEP, LENGTHS, DOWN, BACK
        )
    _end(gates, last, state, b, d, D, length, gb, gt, gd, DOWN, BACK)
    if BACK and GATES == 2:
        tl.store(d_gates + share + b * db + d * dd, constant, d < D)


@triton.jit
def scan_chained(
    gates, tokens, past, initial, grad_last, lengths, y, last, d_gates, words,
    T, D, channel_blocks, part, gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, chains, tiles, stride, plane,
    GATES: tl.constexpr, TOKENS: tl.constexpr, DEFAULT: tl.constexpr, INITIAL: tl.constexpr, LENGTHS: tl.constexpr,
    KEEP: tl.constexpr, DOWN: tl.constexpr, BACK: tl.constexpr, GT: tl.constexpr, XT: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, CHUNKS: tl.constexpr, CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """ROWS * CHUNKS steps of CHANNELS channels of one sequence.

    words: the tickets drawn, then (3, tiles, chains, CHANNELS) factors, ends and states.
    """
    if GT == 1:
        gt = GT
    if XT == 1:
        xt, yt = XT, XT
    ticket = tl.atomic_add(words, 1)  # what a tile waits for has been started before it
    chain = (ticket % chains).to(tl.int32)
    k = (ticket // chains).to(tl.int32)
    block = chain % channel_blocks
    b = (chain // channel_blocks).to(tl.int64)
    c = tl.arange(0, CHANNELS)[None, :]
    d = (block * CHANNELS + c).to(tl.int64)
    inside = (d < D)[None, :, :]
    share = block.to(tl.int64) * part
    if GATES == 2:
        share = k.to(tl.int64) * part
    first, start, length = _begin(initial, grad_last, lengths, b, d, D, T, DEFAULT, INITIAL, LENGTHS, BACK)
    factors = words + 1 + chain * CHANNELS + c  # of tile 0
    ends, lasts = factors + plane, factors + 2 * plane
    mine = k.to(tl.int64) * stride
    n = k * (ROWS * CHUNKS)
    j = tl.arange(0, CHUNKS)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    of, to = _place(
        gates, tokens, past, y, d_gates, j, b, block, c[None, :, :], share, T,
        gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, GATES, DOWN, BACK, CHANNELS, WIDE,
    )  # fmt: skip
    g, x = _load(of, n, j, inside, T, length, GATES, TOKENS, LENGTHS, DOWN, BACK)
    factor, end, before_g, before_x = join(g, x, ROWS, CHUNKS)
    factor = factor.to(tl.float32)
    bad = tl.maximum(broken(factor), broken(end))
    publish(factors + mine, factor, 1 + bad, d < D)
    publish(ends + mine, end, 1 + bad, d < D)
    state, others = incoming(factors, ends, lasts, k, stride, start, d < D, GROUP)
    after = end + factor * state
    bad = tl.maximum(tl.maximum(bad, others), broken(after))
    if bad == 0:
        publish(lasts + mine, after, 1, d < D)
        out = states(g, x, before_g, before_x, state, ROWS)
        constant = _store(to, out, first, n, j, inside, T, length, GATES, KEEP, LENGTHS, DOWN, BACK)
    else:
        state = start
        if k > 0:
            state = state_of(lasts + mine - stride, d < D, GROUP)
        of_one, to_one = _place(
            gates, tokens, past, y, d_gates, tl.zeros((1, 1, 1), tl.int32), b, block, c[None, :, :], share, T,
            gb, gt, gd, xb, xt, xd, yb, yt, yd, db, dt, dd, GATES, DOWN, BACK, CHANNELS, WIDE,
        )  # fmt: skip
        after, constant = _one_by_one(
            of_one, to_one, state, first, n, tl.minimum(n + ROWS * CHUNKS, T), inside, T, length,
            GATES, TOKENS, KEEP, LENGTHS, DOWN, BACK,
        )  # fmt: skip
        publish(lasts + mine, after, 1, d < D)
    if k == tiles - 1:
        _end(gates, last, after, b, d, D, length, gb, gt, gd, DOWN, BACK)
    if BACK and GATES == 2:
        tl.store(d_gates + share + b * db + d * dd, constant, d < D)


class Plan(NamedTuple):
    """How a run is cut. chained: a program for each tile, else one for all tiles of its channels. A tile's steps are
    rows * chunks: rows within a thread. group: tiles that find their incoming state together."""

    chained: bool
    rows: int
    chunks: int
    channels: int
    num_warps: int
    stages: int = 2
    group: int = 16

    @property
    def steps(self) -> int:
        return self.rows * self.chunks


def plans(batch: int, steps: int, width: int, size: int, by_time: bool, back: bool) -> list[Plan]:
    """The ways to cut the work, the first as measured on an H200. size: of an element in bytes; by_time: a channel's
    steps lie side by side in memory, not a step's channels; back: the gradient's run, which keeps more in registers."""
    vector = 16 // size  # elements of one access
    if by_time:
        chunks = blocks(steps, vector)
        by_steps = ((128, 1, 4, 2), (128, 1, 4, 3), (256, 1, 4, 2), (256, 1, 8, 2), (64, 1, 2, 3), (128, 2, 4, 2))
        return [
            Plan(False, vector, power_of_2(chunks, 4, n), power_of_2(width, 1, c), warps, stages)
            for n, c, warps, stages in by_steps
        ]
    most = (16 if back else 32) // vector  # rows

    def serial(channels: int, warps: int, times: int) -> Plan:
        chunks = warps * 32 * vector // channels  # a thread has a vector of channels, or rows would be shared
        return Plan(False, power_of_2(blocks(steps, chunks), 1, times * most), chunks, channels, warps, 3)

    def chained(channels: int, warps: int) -> Plan:
        return Plan(True, 2 * most, warps * 32 * vector // channels, channels, warps)

    for channels in (64, 32, 16) if size == 2 else (32, 16):
        if batch * blocks(width, channels) >= MANY or (channels == 32 and steps < LONG):
            first = serial(channels, 2 if channels == 64 else 4, 1 if size == 4 and (back or channels == 16) else 2)
            cuts = ((32, 4, 1), (32, 4, 2), (64, 4, 1), (64, 4, 2), (16, 4, 1), (32, 2, 2), (64, 2, 2), (32, 2, 1))
            ways = [first, *(serial(*cut) for cut in cuts)]
            return list(dict.fromkeys(ways if steps < LONG else [*ways, chained(32, 4)]))
    few = batch * blocks(width, 32) * blocks(steps, 256) <= 5 * MANY  # tiles
    ways = [chained(32, 8 if few else 4), *(chained(*cut) for cut in ((32, 4), (32, 8), (64, 4), (16, 4), (32, 2)))]
    if size == 2:
        ways.append(chained(32, 4)._replace(rows=4 * most))
    return list(dict.fromkeys(ways))


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
        reach = max(abs(s) for a in (strides[1:3], strides[4:6], strides[7:9], of_gates[1:]) for s in a)
        reach *= cut.steps + cut.channels  # what a program adds to its own place in memory
        wide = tl.int32 if reach < 2**31 else tl.int64
        known = int(strides[1] == 1), int(x.stride(1) == 1 and y.stride(1) == 1)  # along time, for gates and the rest
        what = (kind, *given, states is not None and not back, down, back, *known, wide)
        shape = (cut.rows, cut.chunks, cut.channels)
        if not cut.chained:
            return Config((chains,), sizes, (*what, *shape, cut.stages), cut.num_warps)
        stride = chains * cut.channels
        of_words = (chains, tiles, stride, stride * tiles)
        return Config((chains * tiles,), (*sizes, *of_words), (*what, *shape, cut.group), cut.num_warps)

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


def _cut(
    ctx: LaunchContext, name: str, kind: int, y: Tensor, by_time: bool, product: bool, more: bool,
    run_by: Callable[[Plan], Any],
) -> Plan:  # fmt: skip
    def ask() -> Question:
        (batch, steps, width), size = y.shape, y.element_size()
        bucket = (str(y.dtype)[6:], kind, *(power_of_2(n, 1, 1 << 40) for n in y.shape), by_time, product, more)
        ways = plans(batch, steps, width, size, by_time, name == "scan_backward")
        return Question(bucket, 2 * y.numel() * size >= BYTES, ways)

    return choose(ctx, name, (by_time, more), ask, run_by)


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
    kind = _kind(gates, steps, width)
    states = None
    if ctx.wants_residuals and y.dtype != torch.float32 and not (kind == FULL and gates.dtype == y.dtype):
        states = _empty(ctx, like, by_time, "float32")  # rounded ones would show in a sum, or in float32
    default = 1 if tokens is None else 0

    def run_by(cut: Plan) -> None:
        run(ctx, kind, reverse, gates, tokens, states, initial, None, lengths, y, last, None, cut, default)

    run_by(_cut(ctx, "scan", kind, y, by_time, tokens is None, states is None, run_by))
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
    kind = _kind(gates, steps, width)
    initial = None if initial_state is None else initial_state.contiguous()
    lengths = None if lengths is None else lengths.to(gates.device).contiguous()
    last = grad_last.contiguous()

    def run_by(cut: Plan) -> Tensor:
        if kind == FULL:
            of_gates = _empty(ctx, grad_y, _by_time(d_tokens), gates.dtype)
        elif kind == STEPWISE:
            of_gates = ctx.scratch((blocks(width, cut.channels), batch, steps), "float32")
        else:
            of_gates = ctx.scratch((blocks(steps, cut.steps) if cut.chained else 1, batch, width), "float32")
        run(
            ctx, kind, not reverse, gates, grad_y, states, initial, last, lengths, d_tokens, d_state,
            of_gates, cut, 1 if tokens is None else 0,
        )  # fmt: skip
        return of_gates

    d_gates = run_by(_cut(ctx, "scan_backward", kind, d_tokens, by_time, tokens is None, False, run_by))
    if kind != FULL:
        total = d_gates.sum(0)
        total = total[:, :, None] if kind == STEPWISE else total[:, None]
        d_gates = total.sum_to_size(gates.shape).to(gates.dtype)
    return d_gates, None if tokens is None else d_tokens, None if initial_state is None else d_state
