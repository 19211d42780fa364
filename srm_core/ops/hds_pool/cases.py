"""Sizes, samples, wrong calls and laws of `hds_pool`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize
from srm_core.ops.hds_pool.hierarchy import level_sizes
from srm_core.spec import Case, ErrorSample


def dims_of(shape: tuple[int, ...]) -> dict[str, int]:
    """The extents of a memory (B, M, D) or (B, H, M, D)."""
    return dict(zip("BMD" if len(shape) == 3 else "BHMD", shape, strict=True))


def _case(name: str, shape: tuple[int, ...], *tags: str, **settings: int) -> Case:
    return Case(name, dims_of(shape), frozenset(tags or ("ci",)), settings)


CASES = (
    _case("small", (2, 37, 3)),
    _case("whole", (2, 64, 5)),
    _case("heads", (2, 3, 21, 4), num_levels=4, pool=2),
    _case("primes", (3, 53, 7), num_levels=4, pool=3),
    _case("two_levels", (1, 11, 4), num_levels=2, pool=5),
    _case("pool_of_one", (2, 5, 3), pool=1),
    _case("wide_window", (1, 100, 3), num_levels=2, pool=33),
    _case("offset", (1, 1100, 3), num_levels=2, pool=1000, offset=2),
    _case("six_levels", (1, 2, 35, 3), num_levels=6, pool=2),
    _case("block", (1, 64, 16), "ci", "edge"),
    _case("block_minus_1", (1, 63, 16), "ci", "edge"),
    _case("block_plus_1", (1, 65, 16), "ci", "edge"),
    _case("one_at_the_top", (2, 16, 3), "ci", "edge"),
    _case("one_slot", (2, 1, 3), "ci", "edge", num_levels=4, pool=1),
    _case("one_level", (0, 3, 2), "ci", "edge", num_levels=1),
    _case("no_batch", (0, 16, 3), "ci", "edge"),
    _case("no_heads", (2, 0, 16, 3), "ci", "edge"),
    _case("no_width", (2, 16, 0), "ci", "edge"),
    _case("d512_65536", (8, 65536, 512), "bench"),
    _case("d512_4096", (8, 4096, 512), "bench"),
    _case("heads_d64_16384", (4, 8, 16384, 64), "bench"),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: normal values, and an offset, with which a sum grows large beside its terms."""
    values = generator(case, seed).standard_normal(tuple(case.dims.values())) + case.settings.get("offset", 0)
    return (values.astype(dtype),), {n: v for n, v in case.settings.items() if n != "offset"}


def sizes(case: Case) -> list[int]:
    """The number of slots of each level of a case."""
    return level_sizes(case.dims["M"], case.settings.get("num_levels", 3), case.settings.get("pool", 4))


def _slot(case: Case) -> int:
    """The numbers in one slot of every sequence and head."""
    return prod(n for name, n in case.dims.items() if name != "M")


def flops(case: Case) -> int:
    """An operation for each slot that is averaged: pool - 1 sums and a division a window."""
    pool: int = case.settings.get("pool", 4)
    return _slot(case) * sum(sizes(case)[1:]) * pool


def bytes_moved(case: Case, dtype: str) -> int:
    """memory read once, every level written once."""
    return itemsize(dtype) * _slot(case) * sum(sizes(case))


def _wrong(name: str, param: str, memory: Any, **options: Any) -> ErrorSample:
    return ErrorSample(name, param, lambda: ((memory,), options))


_RIGHT = np.ones((2, 16, 3), np.float32)

ERROR_SAMPLES = (
    _wrong("memory of rank 2", "memory", _RIGHT[0]),
    _wrong("memory of rank 5", "memory", _RIGHT[None, None]),
    _wrong("memory missing", "memory", None),
    _wrong("integer memory", "memory", np.ones((2, 16, 3), int)),
    _wrong("memory a list", "memory", [[[1.0]]]),
    _wrong("no levels", "num_levels", _RIGHT, num_levels=0),
    _wrong("num_levels no integer", "num_levels", _RIGHT, num_levels=2.0),
    _wrong("num_levels a bool", "num_levels", _RIGHT, num_levels=True),
    _wrong("a level that would be empty", "num_levels", _RIGHT, num_levels=4),
    _wrong("a window wider than the memory", "num_levels", _RIGHT, num_levels=2, pool=17),
    _wrong("no slots to pool", "num_levels", _RIGHT[:, :0], pool=1),
    _wrong("pool of 0", "pool", _RIGHT, pool=0),
    _wrong("pool no integer", "pool", _RIGHT, pool=2.0),
)


def fewer_levels_are_the_first(
    call: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """With one level less, the others are the same."""
    levels = call(*args, **options)
    if levels:
        fewer = call(*args, **{**options, "num_levels": len(levels)})
        for i, pair in enumerate(zip(fewer, levels, strict=False)):
            yield f"levels[{i}]", *pair


def pooling_on_gives_the_rest(
    call: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Pooling level 1 gives level 2 and those above it."""
    levels = call(*args, **options)
    if levels:
        rest = call(levels[0], **{**options, "num_levels": len(levels)})
        for i, pair in enumerate(zip(rest, levels[1:], strict=True)):
            yield f"levels[{i + 1}]", *pair


def a_remainder_does_not_count(
    call: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Slots after the last whole window of the top level's reach change nothing up there."""
    levels = call(*args, **options)
    if levels:
        reach = levels[-1].shape[-2] * options.get("pool", 4) ** len(levels)
        yield f"levels[{len(levels) - 1}]", call(args[0][..., :reach, :], **options)[-1], levels[-1]


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    order = np.arange(len(args[0]))[::-1].copy()
    for i, pair in enumerate(zip(call(args[0][order], **options), call(*args, **options), strict=True)):
        yield f"levels[{i}]", pair[0], pair[1][order]
