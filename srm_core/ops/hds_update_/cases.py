"""Sizes, samples, wrong calls and laws of `hds_update_`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize, normal
from srm_core.ops.hds_pool.cases import dims_of
from srm_core.ops.hds_pool.hierarchy import ancestors
from srm_core.ops.hds_pool.reference import reference as pooled_afresh
from srm_core.spec import Case, ErrorSample


def _case(name: str, shape: tuple[int, ...], written: int, index: Any, *tags: str, **settings: Any) -> Case:
    """shape: of memory. index: an int, or a tuple of them for an array."""
    dims = {**dims_of(shape), "S": written}
    return Case(name, dims, frozenset(tags or ("ci",)), {"index": index, **settings})


CASES = (
    _case("small", (2, 37, 3), 5, 9),
    _case("around", (2, 37, 3), 7, 33),
    _case("heads", (2, 3, 21, 4), 4, 5, num_levels=4, pool=2),
    _case("heads_around", (2, 3, 22, 4), 4, 19, num_levels=4, pool=2),
    _case("index_array", (3, 37, 3), 6, (0, 19, 34)),
    _case("index_array_heads", (3, 2, 21, 4), 5, (-1, 10**6, 4), num_levels=4, pool=2),
    _case("index_scalar_array", (2, 37, 3), 6, 30, scalar=True),
    _case("index_negative", (2, 37, 3), 5, -3),
    _case("index_beyond", (2, 37, 3), 5, 1000),
    _case("primes", (1, 53, 7), 11, 47, num_levels=4, pool=3),
    _case("wide_window", (1, 100, 3), 3, 31, num_levels=2, pool=33),
    _case("pool_of_one", (2, 5, 3), 3, 3, pool=1),
    _case("two_levels", (1, 11, 4), 2, 4, num_levels=2, pool=5),
    _case("one_slot", (2, 64, 16), 1, 63, "ci", "edge"),
    _case("block", (1, 64, 16), 16, 16, "ci", "edge"),
    _case("block_minus_1", (1, 64, 16), 15, 17, "ci", "edge"),
    _case("block_plus_1", (1, 64, 16), 17, 15, "ci", "edge"),
    _case("all", (2, 16, 3), 16, 0, "ci", "edge"),
    _case("all_around", (2, 18, 3), 18, 5, "ci", "edge"),
    _case("remainder", (2, 37, 3), 1, 36, "ci", "edge"),
    _case("remainder_above", (2, 37, 3), 3, 32, "ci", "edge"),
    _case("one_level", (2, 7, 3), 3, 5, "ci", "edge", num_levels=1),
    _case("nothing_new", (2, 37, 3), 0, 9, "ci", "edge"),
    _case("no_slots", (2, 0, 3), 0, 9, "ci", "edge", num_levels=1),
    _case("no_batch", (0, 37, 3), 5, 9, "ci", "edge"),
    _case("no_batch_array", (0, 37, 3), 5, (), "ci", "edge"),
    _case("no_width", (2, 37, 0), 5, (3, 36), "ci", "edge"),
    _case("s1_1024", (4, 1024, 64), 1, 517, "bench"),
    _case("s1_1048576", (4, 1048576, 64), 1, 517, "bench"),
    _case("s64_1024", (4, 1024, 64), 64, 517, "bench"),
    _case("s64_1048576", (4, 1048576, 64), 64, 517, "bench"),
    _case("s64_1048576_array", (4, 1048576, 64), 64, (517, 9999, 77777, 1048575), "bench"),
)


def _levels(case: Case) -> int:
    found: int = case.settings.get("num_levels", 3)
    return found


def _pool(case: Case) -> int:
    found: int = case.settings.get("pool", 4)
    return found


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: normal values, and levels that are those of the memory."""
    rng, index = generator(case, seed), case.settings["index"]
    shape = tuple(n for name, n in case.dims.items() if name != "S")
    memory = normal(rng, shape, dtype)
    new = normal(rng, (*shape[:-2], case.dims["S"], shape[-1]), dtype)
    compute = np.result_type(np.dtype(dtype), np.float32)

    def rounding(name: str, values: Any) -> Any:
        return values.astype(dtype).astype(compute)

    levels = pooled_afresh(compute, memory, num_levels=_levels(case), pool=_pool(case), rounding=rounding)
    if isinstance(index, tuple):
        index = np.array(index, np.int64)
    elif case.settings.get("scalar"):
        index = np.array(index, np.int32)
    options = {"pool": case.settings["pool"]} if "pool" in case.settings else {}
    return (memory, tuple(level.astype(dtype) for level in levels), new, index), options


def _touched(case: Case) -> tuple[int, int]:
    """How many slots are written in memory, and refreshed in all levels; of all sequences, one head."""
    index, batch = case.settings["index"], case.dims["B"]
    firsts = index if isinstance(index, tuple) else (index,) * batch
    found = [ancestors(case.dims, first, _levels(case), _pool(case)) for first in firsts]
    return batch * case.dims["S"], sum(len(slots) for touched in found for slots in touched[1:])


def _width(case: Case) -> int:
    return prod(case.dims.get(name, 1) for name in "HD")


def flops(case: Case) -> int:
    """An operation for each number written to memory, and for each that a refreshed slot averages. The rest of the
    memory does not count."""
    written, refreshed = _touched(case)
    return _width(case) * (written + refreshed * _pool(case))


def bytes_moved(case: Case, dtype: str) -> int:
    """new read and its slots written; of each refreshed slot, its `pool` slots read and itself written."""
    written, refreshed = _touched(case)
    return itemsize(dtype) * _width(case) * (2 * written + refreshed * (_pool(case) + 1))


def _right() -> dict[str, Any]:
    shapes = {"memory": (2, 16, 3), "new": (2, 5, 3)}
    right: dict[str, Any] = {n: np.ones(s, np.float32) for n, s in shapes.items()}
    return {**right, "levels": tuple(np.ones((2, n, 3), np.float32) for n in (4, 1)), "index": 3}


def _wrong(name: str, param: str, change: Callable[[dict[str, Any]], dict[str, Any]], **options: Any) -> ErrorSample:
    """memory (2, 16, 3), levels of 4 and 1 slots, new (2, 5, 3), all of ones, but for what is changed."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        right = _right()
        right.update(change(right))
        return tuple(right[n] for n in ("memory", "levels", "new", "index")), options

    return ErrorSample(name, param, make)


def _read_only(array: Any) -> Any:
    array.flags.writeable = False
    return array


def _repeated(array: Any) -> Any:
    return np.lib.stride_tricks.as_strided(array, array.shape, (0, *array.strides[1:]))


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


ERROR_SAMPLES = (
    _wrong("memory of rank 2", "memory", lambda a: {"memory": a["memory"][0]}),
    _wrong("memory missing", "memory", lambda a: {"memory": None}),
    _wrong("integer memory", "memory", lambda a: {"memory": a["memory"].astype(int)}),
    _wrong("a read-only memory", "memory", lambda a: {"memory": _read_only(a["memory"])}),
    _wrong("one memory for all", "memory", lambda a: {"memory": _repeated(a["memory"])}),
    _wrong("levels missing", "levels", lambda a: {"levels": None}),
    _wrong("levels an array", "levels", lambda a: {"levels": a["levels"][0]}),
    _wrong("a level missing", "levels", lambda a: {"levels": (None, a["levels"][1])}),
    _wrong("a level of rank 4", "levels", lambda a: {"levels": (_f32(2, 3, 4, 3), a["levels"][1])}),
    _wrong("a level of another batch", "levels", lambda a: {"levels": (_f32(1, 4, 3), a["levels"][1])}),
    _wrong("a level of another width", "levels", lambda a: {"levels": (a["levels"][0], _f32(2, 1, 4))}),
    _wrong("a level of another size", "levels", lambda a: {"levels": (_f32(2, 5, 3), a["levels"][1])}),
    _wrong("levels upside down", "levels", lambda a: {"levels": a["levels"][::-1]}),
    _wrong("a level too many", "levels", lambda a: {"levels": (*a["levels"], _f32(2, 0, 3))}),
    _wrong("levels of another pool", "levels", lambda a: {}, pool=3),
    _wrong("a level of float64", "levels", lambda a: {"levels": (a["levels"][0].astype("f8"), a["levels"][1])}),
    _wrong("a read-only level", "levels", lambda a: {"levels": (_read_only(a["levels"][0]), a["levels"][1])}),
    _wrong("one level for all", "levels", lambda a: {"levels": (a["levels"][0], _repeated(a["levels"][1]))}),
    _wrong("a level within memory", "levels", lambda a: {"levels": (a["memory"][:, 3:7], a["levels"][1])}),
    _wrong("levels that share memory", "levels", lambda a: {"levels": (a["levels"][0], a["levels"][0][:, 3:])}),
    _wrong("new missing", "new", lambda a: {"new": None}),
    _wrong("new of another rank", "new", lambda a: {"new": _f32(2, 3, 5, 3)}),
    _wrong("new of another batch", "new", lambda a: {"new": _f32(1, 5, 3)}),
    _wrong("new of another width", "new", lambda a: {"new": _f32(2, 5, 4)}),
    _wrong("more new slots than there are", "new", lambda a: {"new": _f32(2, 17, 3)}),
    _wrong("new of float64", "new", lambda a: {"new": a["new"].astype("f8")}),
    _wrong("index a float", "index", lambda a: {"index": 1.0}),
    _wrong("index a bool", "index", lambda a: {"index": True}),
    _wrong("index missing", "index", lambda a: {"index": None}),
    _wrong("index of another batch", "index", lambda a: {"index": np.array([1, 2, 3])}),
    _wrong("index of floats", "index", lambda a: {"index": np.array([1.0, 2.0])}),
    _wrong("pool of 0", "pool", lambda a: {}, pool=0),
    _wrong("pool no integer", "pool", lambda a: {}, pool=4.0),
)


def _after(call: Any, arrays: tuple[Any, ...], updates: Any, options: dict[str, Any]) -> tuple[Any, ...]:
    """Copies of memory and levels after some updates (new, index)."""
    memory, *levels = (a.copy() for a in arrays)
    for new, index in updates:
        call(memory, tuple(levels), new, index, **options)
    return memory, *levels


def _pairs(got: tuple[Any, ...], expected: tuple[Any, ...]) -> Iterator[tuple[str, Any, Any]]:
    for i, pair in enumerate(zip(got, expected, strict=True)):
        yield f"levels[{i - 1}]" if i else "memory", *pair


def in_two_is_at_once(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The first half and then the second are both at once."""
    memory, levels, new, index = args
    n = new.shape[-2] // 2
    halves = ((new[..., :n, :], index), (new[..., n:, :], index + n))
    got, expected = (_after(call, (memory, *levels), u, options) for u in (halves, ((new, index),)))
    yield from _pairs(got, expected)


def slot_by_slot_is_at_once(
    call: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Slots may be written one by one, in any order."""
    memory, levels, new, index = args
    each = [(new[..., s : s + 1, :], index + s) for s in reversed(range(new.shape[-2]))]
    got, expected = (_after(call, (memory, *levels), u, options) for u in (each, ((new, index),)))
    yield from _pairs(got, expected)


def others_stay(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A slot that is neither written nor above a written one stays as it was."""
    memory, levels, new, index = args
    before = (memory, *levels)
    dims = {"M": memory.shape[-2], "S": new.shape[-2]}
    firsts = np.broadcast_to(np.asarray(index), memory.shape[:1])
    stays = [np.ones((len(memory), a.shape[-2]), bool) for a in before]
    for b, first in enumerate(firsts):
        for mask, slots in zip(stays, ancestors(dims, int(first), len(before), options.get("pool", 4)), strict=True):
            mask[b, slots] = False
    after = _after(call, before, ((new, index),), options)
    yield from _pairs(*(tuple(a.swapaxes(1, -2)[m] for a, m in zip(x, stays, strict=True)) for x in (after, before)))


def index_goes_round(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """M more, or less, is the same index."""
    memory, levels, new, index = args
    slots = memory.shape[-2]
    expected = _after(call, (memory, *levels), ((new, index),), options)
    for other in (index + slots, index - 3 * slots):
        yield from _pairs(_after(call, (memory, *levels), ((new, other),), options), expected)


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    memory, levels, new, index = args
    order = np.arange(len(memory))[::-1].copy()
    other = index[order] if np.ndim(index) else index
    got = _after(call, tuple(a[order] for a in (memory, *levels)), ((new[order], other),), options)
    yield from _pairs(got, tuple(a[order] for a in _after(call, (memory, *levels), ((new, index),), options)))
