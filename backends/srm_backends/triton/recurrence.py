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
def combine(g1, x1, g2, x2):
    """First 1, then 2."""
    return g1 * g2, g2 * x1 + x2


@triton.jit
def broken(state):
    """1 if any element of (1, channels) is NaN or infinite, else 0."""
    return tl.max(tl.max(tl.where(tl.abs(state) <= LARGEST, 0, 1), 1), 0)


@triton.jit
def row(tile, at, ROWS: tl.constexpr):
    """The row `at` of a tile (ROWS, channels)."""
    return tl.sum(tl.where((tl.arange(0, ROWS) == at)[:, None], tile, 0), 0)


@triton.jit
def publish(words, values, flag, inside):
    """Write words of float32 values and a flag."""
    bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    tl.store(words, bits | ((tl.zeros_like(bits) + flag) << 32), inside)


@triton.jit
def value(words):
    return (words & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def await_words(words, inside):
    """Words (rows, channels), as soon as none of them is empty."""
    found = tl.load(words, inside, other=0x100000000, volatile=True)
    while tl.min(tl.min(found >> 32, 1), 0) == EMPTY:
        found = tl.load(words, inside, other=0x100000000, volatile=True)
    return found


@triton.jit
def incoming(factors, ends, states, k, stride, first, inside, GROUP: tl.constexpr):
    """(the state that comes into tile k of a chain (1, channels), 1 if it must be found step by step instead).

    factors, ends, states: words of the chain's tile 0, (1, channels); stride: from tile to tile. first: the state that
    comes into the chain.
    """
    start = k // GROUP * GROUP
    r = tl.arange(0, GROUP)[:, None]
    there = (start + r < k) & inside
    at = (start + r).to(tl.int64) * stride
    gs = await_words(factors + at, there)
    xs = await_words(ends + at, there)
    bad = tl.max(tl.max(tl.maximum(gs >> 32, xs >> 32), 1), 0) == BROKEN
    g, x = tl.associative_scan((tl.where(there, value(gs), 1), tl.where(there, value(xs), 0)), 0, combine)
    before = first
    if start > 0:
        before = value(await_words(states + (start - 1).to(tl.int64) * stride, inside))
    return row(x, GROUP - 1, GROUP)[None, :] + row(g, GROUP - 1, GROUP)[None, :] * before, bad.to(tl.int32)
