"""How the rows and slots of an attention are cut into tiles, and what a mask does to a tile of scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_backends.numpy.common import Array

SCORES, ROWS, KEYS = 1 << 19, 1024, 512  # the most of a tile: scores, steps, slots; measured
CAUSAL_ROWS = 128  # fewer, since half of the tile on the diagonal is computed for nothing

Heads = tuple[slice, slice]  # of B and G


class Tiles:
    """The tiles of query (B, H, T, D) against key (B, G, S, D). R = H / G heads share a key head.

    A tile is of some sequences and key heads, some steps, and some slots. Its scores are (nB, nG, R * nT, nS): one
    matrix for each key head.
    """

    def __init__(self, query: Array, key: Array, mask: Array | None, is_causal: bool) -> None:
        self.batch, heads, self.length, _ = query.shape
        self.groups, self.size = key.shape[1:3]
        self.repeats = heads // max(1, self.groups)
        self.is_causal = is_causal
        self.boolean = mask is not None and mask.dtype == bool
        self.of_mask = None if mask is None else self._masks(mask)
        columns = max(1, min(self.size, KEYS))
        most = CAUSAL_ROWS if is_causal else ROWS
        self.rows = max(1, min(self.length, most, SCORES // (columns * max(1, self.repeats))))
        self.together = max(1, SCORES // (columns * max(1, self.repeats) * self.rows))  # key heads in a tile

    def grouped(self, array: Array) -> Array:
        """(B, H, T, ...) as (B, G, R, T, ...)."""
        return array.reshape(self.batch, self.groups, self.repeats, *array.shape[2:])

    def _masks(self, mask: Array) -> Array:
        """A mask as (B or 1, G or 1, R or 1, T or 1, S or 1)."""
        mask = mask[(None,) * (4 - mask.ndim)]
        split = (1, 1) if mask.shape[1] == 1 else (self.groups, self.repeats)
        return mask.reshape(mask.shape[0], *split, *mask.shape[2:])

    def space(self, compute: Any) -> Array:
        """Memory for the largest tile of scores."""
        heads = min(self.together, self.batch * self.groups)
        return np.empty(heads * self.repeats * self.rows * min(self.size, KEYS), compute)

    def heads(self) -> Iterator[Heads]:
        """Few sequences with all of their heads, or few heads of one sequence."""
        sequences, groups = max(1, self.together // max(1, self.groups)), min(self.together, max(1, self.groups))
        for b in range(0, self.batch, sequences):
            for g in range(0, self.groups, groups):
                yield slice(b, min(b + sequences, self.batch)), slice(g, min(g + groups, self.groups))

    def shared(self, array: Array, heads: Heads) -> Array:
        """The part of a key or value (B, G, S, ...) that the heads see; of one sequence if it is the same in all."""
        return array[:1, heads[1]] if array.strides[0] == 0 else array[heads]

    def steps(self) -> Iterator[slice]:
        for t in range(0, self.length, self.rows):
            yield slice(t, min(t + self.rows, self.length))

    def slots(self, heads: Heads, steps: slice) -> Iterator[slice]:
        """The tiles in which a step may attend to a slot."""
        end = min(self.size, steps.stop) if self.is_causal else self.size
        for s in range(0, end, KEYS):
            slots = slice(s, min(s + KEYS, end))
            if self.of_mask is None or self._any(_part(self.of_mask, heads, steps, slots)):
                yield slots

    def _any(self, mask: Array) -> bool:
        return bool(mask.any() if self.boolean else (mask != -np.inf).any())

    def mask(self, scores: Array, heads: Heads, steps: slice, slots: slice) -> None:
        """Mask the scores of a tile, in place."""
        apart = self.apart(scores, steps)
        if self.of_mask is not None and not self.boolean:
            np.add(apart, _part(self.of_mask, heads, steps, slots), out=apart, dtype=scores.dtype)
            return
        found = self._attends(heads, steps, slots)
        if found is not None:
            attends, columns = found
            # fmin takes the number where the other is NaN, and -inf before NaN: a selection, at a tenth of its cost
            choice = np.where(attends, scores.dtype.type(np.nan), scores.dtype.type(-np.inf))
            np.fmin(apart[..., columns], choice, out=apart[..., columns])

    def hide(self, d_scores: Array, heads: Heads, steps: slice, slots: slice) -> None:
        """Make the gradients of a tile's scores 0 where the slot is hidden from the step, also if they are NaN."""
        found = self._attends(heads, steps, slots)
        if found is not None:
            attends, columns = found
            np.copyto(self.apart(d_scores, steps)[..., columns], 0, where=~attends)

    def _attends(self, heads: Heads, steps: slice, slots: slice) -> tuple[Array, slice] | None:
        """(which steps attend to which slots, in which columns of the tile), if some do not."""
        if self.of_mask is not None and self.boolean:
            mask = _part(self.of_mask, heads, steps, slots)
            return None if mask.all() else (mask, slice(None))
        first = max(steps.start + 1, slots.start)  # the slots before it are behind every step
        if not self.is_causal or first >= slots.stop:
            return None
        return np.arange(steps.start, steps.stop)[:, None] >= np.arange(first, slots.stop), slice(
            first - slots.start, None
        )

    def sum_into(self, d_mask: Array, d_scores: Array, heads: Heads, steps: slice, slots: slice) -> None:
        """Add the gradients of a tile's scores to those of the mask, of its shape and contiguous."""
        into = _part(self._masks(d_mask), heads, steps, slots)
        apart = self.apart(d_scores, steps)
        axes = tuple(i for i, n in enumerate(into.shape) if n == 1 and apart.shape[i] != 1)
        into += apart.sum(axes, keepdims=True) if axes else apart

    def apart(self, scores: Array, steps: slice) -> Array:
        """(nB, nG, R * nT, nS) as (nB, nG, R, nT, nS), a view."""
        return scores.reshape(*scores.shape[:2], self.repeats, steps.stop - steps.start, scores.shape[-1])


def _part(mask: Array, heads: Heads, steps: slice, slots: slice) -> Array:
    """The part of a mask (B, G, R, T, S) that a tile sees, its axes of 1 as they are."""
    parts = (*heads, slice(None), steps, slots)
    return mask[tuple(slice(None) if n == 1 else p for n, p in zip(mask.shape, parts, strict=True))]


def flat(rows: Array) -> Array:
    """(nB, nG, R, nT, ...) as (nB, nG, R * nT, ...)."""
    return rows.reshape(*rows.shape[:2], rows.shape[2] * rows.shape[3], *rows.shape[4:])
