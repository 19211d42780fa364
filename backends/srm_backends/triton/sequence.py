"""What the loops of `lstm` and `mdi_recurrence` share: a product with the same weights at every step.

A program has ROWS sequences and UNITS channels, with the weights of all their gates on chip (HELD) for the whole
sequence. Where that is all channels (ALONE), the state stays on chip too. Else programs tell each other the state, or
the gradients of the gates, in words of a value and the number of the step, so that whoever reads a word knows whether
it is the one that it waits for, and nothing needs a fence. There are two slots of words, for even steps and odd: a
program writes one anew when it has read all of the other, which nobody could have written without having read this one.
Programs that wait for each other must all run at once, for which the launch asks; where they cannot, each step is a
launch (not WAIT).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.common import dot
from srm_backends.triton.launch import INTERPRETED, Config, blocks, launch, multiprocessors, power_of_2
from srm_core.context import LaunchContext

ON_CHIP = 128 * 1024  # bytes of weights that a program holds in its registers
ALONE = 32  # channels of a half type, up to which a program needs less time than several that wait for each other
AT_ONCE = 32768  # words that a program receives for a product with weights on chip
AT_ONCE_BY_ROWS = tl.constexpr(4096)  # and for one by rows: as many registers as it has to spare
WEIGHTS = 128  # that a thread holds then
DEEPEST = 2048  # terms of a sum in a product by rows
CHUNKS = 4  # launches among which the rows of a batch are shared at most, rather than one launch a step


@triton.jit
def word(values, step, WIDE: tl.constexpr):
    """A float32 beside the number of a step in 64 bits (WIDE), or 16 bits of a half type beside it in 32."""
    if WIDE:
        bits = values.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        found = bits | ((tl.zeros_like(bits) + step + 1) << 32)
    else:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        found = bits | ((tl.zeros_like(bits) + step + 1) << 16)
    return found


@triton.jit
def slot_of(words, step, rows, K):
    """Where the words (rows, K) of a step are."""
    return words + (tl.zeros((), tl.int64) + step % 2) * rows * K


@triton.jit
def receive(words, inside, step, DTYPE: tl.constexpr, WAIT: tl.constexpr):
    """The values of words of a step, as soon as all are there; 0 outside.

    They must be as many as there are threads: of threads that read the same word, each for itself and not at the same
    time, only one is asked what it saw.
    """
    WIDE: tl.constexpr = DTYPE == tl.float32
    found = tl.load(words, inside, other=0, volatile=True)
    if WAIT:
        mark = (step + 1) if WIDE else (step + 1) & 0xFFFF
        while tl.max((inside & (((found >> 32) if WIDE else (found >> 16) & 0xFFFF) != mark)).to(tl.int32)) != 0:
            found = tl.load(words, inside, other=0, volatile=True)
    if WIDE:
        values = (found & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    else:
        values = (found & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.where(inside, values, tl.zeros_like(values))


@triton.jit
def place(program, lengths, row0, tiles, B, T, H, ROWS: tl.constexpr, UNITS: tl.constexpr):
    """What a program, by its number, has of a loop: (its sequences (ROWS,), its channels (UNITS,), is a channel one, is
    an element of (ROWS, UNITS) one, where that stands in (B, H), the sequences' lengths)."""
    unit, tile = program % tiles, program // tiles
    row = (row0 + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    n = unit * UNITS + tl.arange(0, UNITS)
    length = row * 0 + T
    if lengths is not None:
        length = tl.load(lengths + row, row < B, other=0)
    return row, n, n < H, (row < B)[:, None] & (n < H)[None, :], row[:, None] * H + n[None, :], length


@triton.jit
def columns_of(block, H, BLOCK: tl.constexpr, GATES: tl.constexpr, BESIDE: tl.constexpr):
    """(rows of the weights (GATES * H, K), are they any): the columns of a tile with all gates of its units.

    They are ordered such that `apart` finds gates in one thread: BESIDE, which is also how they lie in memory then (see
    `held_order`), as [unit, gate]; else, as matrix units leave pairs in a thread, 4 gates as [gate // 2, unit,
    gate % 2] and 2 as [gate, unit].
    """
    UNITS: tl.constexpr = BLOCK // GATES
    column = tl.arange(0, BLOCK)
    if BESIDE:
        row = block * BLOCK + column
        there = row < GATES * H
    else:
        if GATES == 4:
            gate, unit = column // (2 * UNITS) * 2 + column % 2, column % (2 * UNITS) // 2
        else:
            gate, unit = column // UNITS, column % UNITS
        row = gate * H + block * UNITS + unit
        there = block * UNITS + unit < H
    return row, there


@triton.jit
def four_apart(tile, ROWS: tl.constexpr, UNITS: tl.constexpr, BESIDE: tl.constexpr):
    """The gates of (ROWS, 4 UNITS), each (ROWS, UNITS)."""
    if BESIDE:
        tile = tl.permute(tl.reshape(tile, (ROWS, UNITS, 2, 2)), (0, 1, 3, 2))
    else:
        tile = tl.permute(tl.reshape(tile, (ROWS, 2, UNITS, 2)), (0, 2, 3, 1))
    even, odd = tl.split(tile)
    first, second = tl.split(even)
    third, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def four_together(first, second, third, fourth, ROWS: tl.constexpr, UNITS: tl.constexpr):
    tile = tl.join(tl.join(first, second), tl.join(third, fourth))  # (ROWS, UNITS, gate % 2, gate // 2)
    return tl.reshape(tl.permute(tile, (0, 3, 1, 2)), (ROWS, 4 * UNITS))


@triton.jit
def two_apart(tile, ROWS: tl.constexpr, UNITS: tl.constexpr, BESIDE: tl.constexpr):
    if BESIDE:
        tile = tl.reshape(tile, (ROWS, UNITS, 2))
    else:
        tile = tl.permute(tl.reshape(tile, (ROWS, 2, UNITS)), (0, 2, 1))
    first, second = tl.split(tile)
    return first, second


@triton.jit
def two_together(first, second, ROWS: tl.constexpr, UNITS: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), (ROWS, 2 * UNITS))


@triton.jit
def hold(weight, depth, column, there, stride_k, stride_n, K, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr):
    """Weights (BLOCK_K, columns), or (SPLIT, BLOCK_K / SPLIT, columns) of which each warp has its part.

    depth: the row of BLOCK_K, `column`: of weights as they are in memory; there: is the column one?
    """
    at = weight + depth.to(tl.int64)[:, None] * stride_k + column.to(tl.int64)[None, :] * stride_n
    tile = tl.load(at, (depth < K)[:, None] & there[None, :], other=0)
    if SPLIT > 1:
        tile = tl.reshape(tile, (SPLIT, BLOCK_K // SPLIT, tile.shape[1]))
    return tile


@triton.jit
def by_rows(found, values, held, first: tl.constexpr, PART: tl.constexpr):
    """found (ROWS, columns), with PART rows from `first` on: values (PART, K) times weights (K, columns) in plain
    arithmetic. A row is given to all threads, whose weights stay in their registers; tl.dot would pass those through
    shared memory at every step."""
    r, part = tl.arange(0, found.shape[0])[:, None], tl.arange(0, PART)[:, None]
    for i in tl.static_range(PART):
        row = tl.sum(tl.where(part == i, values, 0), 0)
        found = tl.where(r == first + i, tl.sum(row[:, None] * held, 0)[None, :], found)
    return found


@triton.jit
def times(values, held, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """(ROWS, columns): values (ROWS, BLOCK_K) on chip times weights that are held."""
    if SPLIT > 1:
        parts = tl.permute(tl.reshape(values, (ROWS, SPLIT, BLOCK_K // SPLIT)), (1, 0, 2))
        found = tl.sum(dot(parts, held, PRECISION), 0)
    elif SPLIT == 0:
        found = by_rows(tl.zeros((ROWS, held.shape[1]), tl.float32), values, held, 0, ROWS)
    else:
        found = dot(values, held, PRECISION)
    return found


@triton.jit
def told(
    words, row, rows, step, held, weight, column, there, stride_k, stride_n, K, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, HELD: tl.constexpr, WAIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ROWS, columns): what all programs told of a step, (rows, K), times weights: those `held`, or read again."""
    DTYPE: tl.constexpr = weight.dtype.element_ty
    base = slot_of(words, step, rows, K)
    if HELD:
        if SPLIT > 1:
            part = tl.arange(0, SPLIT)[:, None, None] * (BLOCK_K // SPLIT)
            k = part + tl.arange(0, BLOCK_K // SPLIT)[None, None, :]
            at, inside = base + row[None, :, None] * K + k, (row < rows)[None, :, None] & (k < K)
            found = tl.sum(dot(receive(at, inside, step, DTYPE, WAIT), held, PRECISION), 0)
        elif SPLIT == 0:
            PART: tl.constexpr = min(ROWS, max(1, AT_ONCE_BY_ROWS // BLOCK_K))
            found = tl.zeros((ROWS, held.shape[1]), tl.float32)
            k = tl.arange(0, BLOCK_K)[None, :]
            for first in tl.static_range(0, ROWS, PART):
                some = (tl.min(row, 0) + first + tl.arange(0, PART))[:, None]
                values = receive(base + some * K + k, (some < rows) & (k < K), step, DTYPE, WAIT)
                found = by_rows(found, values, held, first, PART)
        else:
            k = tl.arange(0, BLOCK_K)[None, :]
            at, inside = base + row[:, None] * K + k, (row < rows)[:, None] & (k < K)
            found = dot(receive(at, inside, step, DTYPE, WAIT), held, PRECISION)
    else:
        found = tl.zeros((ROWS, column.shape[0]), tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            at, inside = base + row[:, None] * K + k[None, :], (row < rows)[:, None] & (k < K)[None, :]
            tile = hold(weight, k, column, there, stride_k, stride_n, K, BLOCK_K, 1)
            values = receive(at, inside, step, DTYPE, WAIT)
            found = dot(values, tile, PRECISION, found)
    return found


@triton.jit
def tell_first(values, like, words, count, BLOCK: tl.constexpr):
    """The words of step 0, of values in float32, in the dtype of `like`."""
    DTYPE: tl.constexpr = like.dtype.element_ty
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = at < count
    tl.store(words + at, word(tl.load(values + at, there, other=0).to(DTYPE), 0, DTYPE == tl.float32), there)


class Plan(NamedTuple):
    """How a loop is shared among programs. split: parts of the sum of a product, a warp each; 0: a product in plain
    arithmetic, row by row. together: do programs wait for each other within a launch of `chunk` rows?"""

    rows: int
    units: int
    block_k: int
    split: int
    warps: int
    held: bool
    alone: bool
    together: bool
    chunk: int


def plan(ctx: LaunchContext, batch: int, width: int, gates: int, dtype: torch.dtype, backward: bool) -> Plan:
    """For a state of `width` channels and products of `dtype`. A backward has the gates as rows of its weights.

    Programs that wait have as many words to read at once as threads (see `receive`): rows * block_k.
    """
    on_matrix_units = dtype is not torch.float32 or ctx.precision == "tf32"
    block, most = power_of_2(width, 16, 1 << 30), multiprocessors(ctx)
    depth, unit = block * (gates if backward else 1), block * gates * dtype.itemsize
    together = not INTERPRETED
    if not on_matrix_units and (found := _by_rows(batch, width, gates, backward, most)):
        return found
    least = (8 if backward else 32 // gates) if on_matrix_units else 4
    choices = [(8, least), (8, 2 * least), (16, least), (16, 2 * least), (16, 4 * least)]
    if not on_matrix_units:
        choices = [(4, least << n) for n in range(4)]
    # Small shares come first: what a program receives at each step is what it waits for most.
    for rows, units in choices:
        rows = min(rows, power_of_2(batch, 1, 16))
        if width <= ALONE or blocks(width, units) * blocks(batch, rows) > most:
            continue
        if units * unit > ON_CHIP or rows * depth > AT_ONCE:
            block_k = min(depth, 256)
            return Plan(rows, units, block_k, 1, min(8, rows * block_k // 32), False, False, together, batch)
        if on_matrix_units and not backward:  # as many warps as tiles of 8 columns: none has a part of a sum
            warps = min(units * gates // 8, rows * depth // 32)
            return Plan(rows, units, depth, 1, warps, True, False, together, batch)
        warps = min(8 if on_matrix_units or units * unit <= ON_CHIP // 8 else 4, rows * depth // 32)
        return Plan(rows, units, depth, min(8, depth // 16), warps, True, False, together, batch)
    if on_matrix_units and block * unit <= ON_CHIP // (2 if backward else 1):
        return Plan(16, block, depth, 1, 8 if block >= 64 else 4, True, True, False, batch)
    rows, units = choices[-1]
    room = most // blocks(width, units) * rows
    if room * CHUNKS >= batch:
        held = units * unit <= ON_CHIP and rows * depth <= AT_ONCE
        split, block_k = (min(8, depth // 16), depth) if held else (1, min(depth, 256))
        return Plan(rows, units, block_k, split, 8, held, False, together, room)
    return Plan(power_of_2(batch, 16, 64), 32, 64, 1, 4, False, False, False, batch)


def _by_rows(batch: int, width: int, gates: int, backward: bool, most: int) -> Plan | None:
    """With products row by row, on at most `most` multiprocessors: alone where half of what fits is enough; else of as
    few rows as possible, as they come one after the other, then of few channels. As measured on an H200."""
    block = power_of_2(width, 16, 1 << 30)
    depth, unit = block * (gates if backward else 1), block * gates * 4

    def by(rows: int, units: int, least_warps: int, alone: bool, chunk: int) -> Plan:
        warps = power_of_2(units * unit // (4 * 32 * WEIGHTS), least_warps, 8)
        part = min(rows, max(1, AT_ONCE_BY_ROWS.value // depth))
        if not alone:
            warps = min(warps, part * depth // 32)
        return Plan(rows, units, depth, 0, warps, True, alone, not (alone or INTERPRETED), chunk)

    if block * unit <= ON_CHIP // 2:
        return by(1, block, 1, True, batch)
    least = ON_CHIP * gates // (8 if backward else 16)  # with less they wait for each other more than they compute
    shares = [n for n in (4, 8, 16, 32, 64) if n < block and least <= n * unit <= ON_CHIP]
    if depth > DEEPEST or not shares:
        return None
    for rows in (1, 2, 4, 8, 16):
        for units in shares:
            if blocks(width, units) * blocks(batch, rows) <= most:
                return by(rows, units, 4, False, batch)
    if block * unit <= ON_CHIP:
        return by(1, block, 8, True, batch)
    room = most // blocks(width, shares[-1]) * 16
    return by(16, shares[-1], 4, False, room) if room * CHUNKS >= batch else None


def run(
    ctx: LaunchContext, kernel: Any, how: Plan, key: Any, tensors: tuple[Tensor | None, ...], batch: int, steps: int,
    width: int, sizes: tuple[int, ...], constants: tuple[Any, ...] = (), *, scalars: tuple[float, ...] = (),
    end: int = 0,
) -> None:  # fmt: skip
    """Launch a loop: kernel(*tensors, first step, last step, first row, *scalars, tiles, B, T, H, *sizes, *constants,
    *plan).

    end: launches with no step after the last, which read what was told last; where all is one launch it does so itself.
    """
    tiles = blocks(width, how.units)
    pace, ends = (steps, 0) if how.alone or how.together else (1, end)
    for row in range(0, batch, how.chunk):
        grid = tiles * blocks(min(how.chunk, batch - row), how.rows)

        def configure(grid: int = grid) -> Config:
            shape = (how.rows, how.units, how.block_k, how.split, how.held, how.alone, how.together)
            precision = "tf32" if ctx.precision == "tf32" else "ieee"
            options = {"launch_cooperative_grid": True} if how.together else {}
            return Config(
                (grid,), (tiles, batch, steps, width, *sizes), (*constants, precision, *shape),
                num_warps=how.warps, options=options,
            )  # fmt: skip

        for step in range(0, steps + ends, pace):
            last = min(step + pace, steps)
            launch(ctx, kernel, (key, grid, how), tensors, configure, (step, last, row, *scalars))


def held_order(how: Plan, weight: Tensor, gates: int) -> Tensor:
    """Weights (gates * H, K) as a forward holds them: for products row by row, the gates of a channel side by side."""
    if how.split:
        return weight
    rows, depth = weight.shape
    return weight.view(gates, rows // gates, depth).permute(2, 1, 0).contiguous().view(depth, rows).T


def new_words(ctx: LaunchContext, how: Plan, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Two slots of words for values of a dtype, none of which is of any step; None for a program that is alone."""
    if how.alone:
        return None
    words = ctx.scratch((2, *shape), torch.int64 if dtype is torch.float32 else torch.int32)
    return words.zero_()


def begin(ctx: LaunchContext, words: Tensor | None, values: Tensor, like: Tensor) -> None:
    """Tell the state before the first step."""
    if words is None:
        return
    count = values.numel()

    def configure() -> Config:
        return Config((blocks(count, 1024),), (count,), (1024,))

    launch(ctx, tell_first, (), (values, like, words), configure)


def first_state(ctx: LaunchContext, given: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """A state in float32, to go through the steps with and to give back: a copy; 0 where there is none."""
    state: Tensor = ctx.empty(shape, "float32")
    return state.zero_() if given is None else state.copy_(given)


def dense(*vectors: Tensor | None) -> list[Tensor | None]:
    return [None if v is None else v.contiguous() for v in vectors]


def within(values: Tensor, lengths: Tensor | None) -> Tensor:
    """Values (B, T, C), and 0 past a length, whatever stands there: 0 times what is not finite is not 0."""
    if lengths is None:
        return values
    steps = torch.arange(values.shape[1], device=values.device)
    return torch.where((steps < lengths[:, None])[:, :, None], values, 0)
