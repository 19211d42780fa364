"""What kernels of linear recurrences share: s_t = g_t * s_{t-1} + x_t over tiles of (time, channels).

Within a tile, a tree finds for each step what all before it have made of the state that came in: a factor G and an
end X from zero, s_t = X_t + G_t * s. Over a long time, tiles of one chain (a sequence's channels) run in parallel, and
tell each other their G, X and last state in words of 64 bits, a float32 and a flag, so that no word needs a fence.
A tile's incoming state is always made in the same way, out of the tiles of its group before it and the state that
came into the group; so a result does not depend on who was first.

What is not finite stays so: a tree may make NaN of infinities where the plain loop has an infinity, and that shows in
the last state. Such a chain, or tile, is done again, step by step.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST = tl.constexpr(3.4028234663852886e38)  # of float32
EMPTY, BROKEN = tl.constexpr(0), tl.constexpr(2)  # flags of words; 1: a finite value


@triton.jit
def _combine(g1, x1, g2, x2):
    """First 1, then 2. Factors may be float64."""
    return g1 * g2, g2.to(tl.float32) * x1 + x2


@triton.jit
def _combine_before(g1, x1, p1, e1, g2, x2, p2, e2):
    """As `_combine`; and in p and e the same without the last element."""
    return g1 * g2, g2.to(tl.float32) * x1 + x2, g1 * p2, p2.to(tl.float32) * x1 + e2


@triton.jit
def _row(tile, at, ROWS: tl.constexpr):
    """The row `at` of a tile (ROWS, channels), as (1, channels)."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == at)[:, None], tile, 0), 0)[None, :]


@triton.jit
def length_of(lengths, b, T):
    """Of sequence b, within 0 and T: nobody has looked at lengths that are on a device."""
    return tl.minimum(tl.maximum(tl.load(lengths + b), 0), T).to(tl.int32)


@triton.jit
def last_rows(tile, ROWS: tl.constexpr):
    """Of a tile (chunks, ROWS, channels) the last row, (chunks, channels)."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == ROWS - 1)[None, :, None], tile, 0), 1)


@triton.jit
def join(g, x, ROWS: tl.constexpr, CHUNKS: tl.constexpr):
    """What the steps of a tile make of the state that comes in, step c * ROWS + r at [c, r].

    Returns (factor, end) of the tile, (1, channels), and (factors, ends) before each chunk, (chunks, channels). As
    Triton lays such a tile out, lanes and warps share its channels and chunks and each has all rows of its own: only
    the chunks' ends have to be passed between threads.
    """
    g, x = tl.associative_scan((g, x), 1, _combine)
    of_g, of_x = last_rows(g, ROWS), last_rows(x, ROWS)
    one, zero = tl.full(of_g.shape, 1, of_g.dtype), tl.zeros(of_x.shape, tl.float32)
    of_g, of_x, before_g, before_x = tl.associative_scan((of_g, of_x, one, zero), 0, _combine_before)
    return _row(of_g, CHUNKS - 1, CHUNKS), _row(of_x, CHUNKS - 1, CHUNKS), before_g, before_x


@triton.jit
def in_order(g, x, state, ROWS: tl.constexpr):
    """The states of the steps of chunks from those that come into each, (chunks, channels): in the order of the plain
    loop, and from the gates and tokens themselves, so that nothing else of a tile is kept while a state is awaited."""
    r = tl.arange(0, ROWS)[None, :, None]
    g = g.to(tl.float32)
    x = tl.where(r == 0, g * state[:, None, :] + x, x)
    _, x = tl.associative_scan((g, x), 1, _combine)
    return x


@triton.jit
def states(g, x, before_g, before_x, state, ROWS: tl.constexpr):
    """The states of a tile's steps, from that which comes in, (1, channels)."""
    return in_order(g, x, before_x + before_g.to(tl.float32) * state, ROWS)


@triton.jit
def broken(state):
    """1 if any element of (1, channels) is NaN or infinite, else 0."""
    return tl.max(tl.max(tl.where(tl.abs(state) <= LARGEST, 0, 1), 1), 0)


@triton.jit
def publish(words, values, flag, inside):
    """Write words of float32 values and a flag."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(words, bits | ((tl.zeros_like(bits) + flag) << 32), inside)


@triton.jit
def value(words):
    return (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def read_words(words, inside):
    """Words (rows, channels) as they are now. They must be as many as there are threads: of threads that read the same
    word, each for itself and not at the same time, only one is asked what it saw."""
    return tl.load(words, inside, other=0x100000000, volatile=True)


@triton.jit
def await_words(found, words, inside):
    """The words that `found` was read from, as soon as none of them is empty."""
    while tl.min(tl.min(found >> 32, 1), 0) == EMPTY:
        found = read_words(words, inside)
    return found


@triton.jit
def incoming(factors, ends, lasts, k, stride, first, inside, GROUP: tl.constexpr):
    """(the state that comes into tile k of a chain (1, channels), 1 if it must be found step by step instead).

    factors, ends, lasts: words of the chain's tile 0, (1, channels); stride: from tile to tile. first: the state that
    comes into the chain.
    """
    start = k // GROUP * GROUP
    r = tl.arange(0, GROUP)[:, None]
    there = (start + r < k) & inside
    at = (start + r).to(tl.int64) * stride
    # All are on their way at once. The state is one row, which is read as the first of a group.
    state_at = lasts + (start - 1).to(tl.int64) * stride + tl.zeros((GROUP, 1), tl.int64)
    state_there = (start > 0) & (r == 0) & inside
    gs, xs = read_words(factors + at, there), read_words(ends + at, there)
    state = read_words(state_at, state_there)
    gs, xs = await_words(gs, factors + at, there), await_words(xs, ends + at, there)
    bad = tl.max(tl.max(tl.maximum(gs >> 32, xs >> 32), 1), 0) == BROKEN
    g, x = tl.associative_scan((tl.where(there, value(gs), 1), tl.where(there, value(xs), 0)), 0, _combine)
    g, x = _row(g, GROUP - 1, GROUP), _row(x, GROUP - 1, GROUP)
    before = tl.where(start > 0, _row(value(await_words(state, state_at, state_there)), 0, GROUP), first)
    return x + g * before, bad.to(tl.int32)


@triton.jit
def state_of(lasts, inside, GROUP: tl.constexpr):
    """The last state of a tile, (1, channels), as soon as it is known."""
    at = lasts + tl.zeros((GROUP, 1), tl.int64)
    there = (tl.arange(0, GROUP)[:, None] == 0) & inside
    return _row(value(await_words(read_words(at, there), at, there)), 0, GROUP)
