"""Sizes, samples, wrong calls and laws of `hds_query`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import exact, generator, itemsize, normal
from srm_core.ops.hds_pool.hierarchy import hierarchy, level_sizes
from srm_core.spec import Case, ErrorSample


def _case(name: str, shape: tuple[int, ...], slots: int, *tags: str, value_width: int | None = None,
          **settings: Any) -> Case:  # fmt: skip
    """shape: (B, H, T, D); E is D unless given."""
    b, h, t, d = shape
    dims = {"B": b, "H": h, "T": t, "M": slots, "D": d, "E": d if value_width is None else value_width}
    return Case(name, dims, frozenset(tags or ("ci",)), settings)


# shared: the arrays whose batch is 1.
CASES = (
    _case("small", (2, 3, 5, 4), 37),
    _case("level_0", (2, 2, 5, 4), 37, level=0),
    _case("level_1", (2, 2, 5, 4), 37, level=1, num_levels=2),
    _case("level_below", (2, 2, 5, 4), 37, level=-2),
    _case("shared", (3, 2, 7, 4), 41, shared=("keys", "values")),
    _case("shared_level_0", (3, 2, 7, 4), 17, shared=("keys", "values"), level=-3),
    _case("shared_keys", (3, 2, 7, 4), 41, shared=("keys",), level=1),
    _case("shared_values", (3, 2, 7, 4), 41, shared=("values",), level=1),
    _case("primes", (1, 2, 37, 11), 53, value_width=7, num_levels=2, pool=3),
    _case("scale", (1, 2, 9, 5), 37, scale=0.37, level=1),
    _case("scale_zero", (1, 1, 6, 3), 37, scale=0, level=1),
    _case("one_level", (2, 2, 5, 4), 11, num_levels=1),
    _case("pool_of_one", (2, 2, 5, 4), 11, pool=1),
    _case("pool_of_two", (1, 3, 6, 4), 45, pool=2, num_levels=5, level=-2),
    _case("one_step", (2, 2, 1, 8), 80, "ci", "edge"),
    _case("one_step_shared", (5, 2, 1, 8), 80, "ci", "edge", shared=("keys", "values")),
    _case("block", (1, 1, 128, 16), 512, "ci", "edge", level=1),
    _case("block_plus_1", (1, 1, 129, 16), 517, "ci", "edge", level=1),
    _case("block_minus_1", (1, 1, 127, 16), 511, "ci", "edge", level=1),
    _case("no_steps", (2, 2, 0, 3), 16, "ci", "edge"),
    _case("no_slots", (2, 2, 4, 3), 0, "ci", "edge", num_levels=1),
    _case("no_batch", (0, 2, 4, 3), 16, "ci", "edge"),
    _case("no_batch_shared", (0, 2, 4, 3), 16, "ci", "edge", shared=("keys", "values")),
    _case("no_heads", (2, 0, 4, 3), 16, "ci", "edge", shared=("keys",)),
    _case("no_width", (1, 2, 4, 0), 20, "ci", "edge", value_width=3, level=1),
    _case("d64_t16_4096", (4, 8, 16, 64), 4096, "bench"),
    _case("d64_t16_65536", (4, 8, 16, 64), 65536, "bench"),
    _case("d64_t2048_4096", (4, 8, 2048, 64), 4096, "bench"),
    _case("d64_t2048_16384", (1, 8, 2048, 64), 16384, "bench"),
    _case("d64_t16_65536_shared", (16, 8, 16, 64), 65536, "bench", shared=("keys", "values")),
    _case("d64_t2048_65536_shared", (4, 8, 2048, 64), 65536, "bench", shared=("keys", "values")),
)
OPTIONS = ("level", "num_levels", "pool", "scale")


def _batch(case: Case, name: str) -> int:
    return 1 if name in case.settings.get("shared", ()) else case.dims["B"]


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: normal values, so that scores are of about 1 at level 0."""
    rng = generator(case, seed)
    b, h, t, m, d, e = (case.dims[k] for k in "BHTMDE")
    shapes = ((b, h, t, d), (_batch(case, "keys"), h, m, d), (_batch(case, "values"), h, m, e))
    return tuple(normal(rng, s, dtype) for s in shapes), {k: case.settings[k] for k in OPTIONS if k in case.settings}


def _window(options: Any) -> tuple[int, int, int]:
    """(num_levels, pool, level counted from 0)."""
    count, pool = options.get("num_levels", 3), options.get("pool", 4)
    return count, pool, range(count)[options.get("level", -1)]


def flops(case: Case) -> int:
    """An operation for each slot that is averaged on the way to the level; two for each product of query with key
    and of probability with value."""
    b, h, t, m, d, e = (case.dims[k] for k in "BHTMDE")
    count, pool, level = _window(case.settings)
    sizes = level_sizes(m, count, pool)[: level + 1]
    averaged = sum(sizes[1:]) * pool * (_batch(case, "keys") * d + _batch(case, "values") * e)
    return h * (averaged + 2 * b * t * sizes[-1] * (d + e))


def bytes_moved(case: Case, dtype: str) -> int:
    """query, keys and values read once, out written once."""
    b, h, t, m, d, e = (case.dims[k] for k in "BHTMDE")
    return itemsize(dtype) * h * (b * t * (d + e) + m * (_batch(case, "keys") * d + _batch(case, "values") * e))


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def _wrong(name: str, param: str, change: dict[str, Any], **options: Any) -> ErrorSample:
    """query (2, 4, 3, 5), keys (2, 4, 16, 5) and values (2, 4, 16, 7) of ones, but for what is changed."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        right = {"query": _f32(2, 4, 3, 5), "keys": _f32(2, 4, 16, 5), "values": _f32(2, 4, 16, 7)}
        return tuple({**right, **change}.values()), options

    return ErrorSample(name, param, make)


ERROR_SAMPLES = (
    _wrong("query of rank 3", "query", {"query": _f32(4, 3, 5)}),
    _wrong("query missing", "query", {"query": None}),
    _wrong("integer queries", "query", {"query": np.ones((2, 4, 3, 5), int)}),
    _wrong("keys of rank 3", "keys", {"keys": _f32(2, 16, 5)}),
    _wrong("keys of another width", "keys", {"keys": _f32(2, 4, 16, 4)}),
    _wrong("keys of another batch", "keys", {"keys": _f32(3, 4, 16, 5)}),
    _wrong("keys of other heads", "keys", {"keys": _f32(2, 2, 16, 5)}),
    _wrong("keys missing", "keys", {"keys": None}),
    _wrong("float64 keys", "keys", {"keys": np.ones((2, 4, 16, 5))}),
    _wrong("values of other slots", "values", {"values": _f32(2, 4, 15, 7)}),
    _wrong("values of another batch", "values", {"values": _f32(3, 4, 16, 7)}),
    _wrong("values of other heads", "values", {"values": _f32(2, 1, 16, 7)}),
    _wrong("half values", "values", {"values": np.ones((2, 4, 16, 7), np.float16)}),
    _wrong("a level past the top", "level", {}, level=3),
    _wrong("a level before the first", "level", {}, level=-4),
    _wrong("level no integer", "level", {}, level=1.0),
    _wrong("level a bool", "level", {}, level=True),
    _wrong("no levels", "num_levels", {}, num_levels=0),
    _wrong("a level that would be empty", "num_levels", {}, num_levels=4, level=0),
    _wrong("no slots to pool", "num_levels", {"keys": _f32(2, 4, 0, 5), "values": _f32(2, 4, 0, 7)}),
    _wrong("pool of 0", "pool", {}, pool=0),
    _wrong("pool a word", "pool", {}, pool="4"),
    _wrong("scale a word", "scale", {}, scale="1"),
    _wrong("scale not finite", "scale", {}, scale=float("nan")),
)


def slots_permute_in_their_window(
    call: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """The slots that one slot of the level stands for may change places."""
    query, *memory = args
    _, pool, level = _window(options)
    slots, window = memory[0].shape[2], pool**level
    order = np.arange(slots)
    order[: slots // window * window] = order[: slots // window * window].reshape(-1, window)[:, ::-1].ravel()
    yield "out", call(query, *(a[:, :, order] for a in memory), **options), call(*args, **options)


def pooled_before_is_level_0(
    call: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """The level of keys and values pooled before is level 0 of a hierarchy of one level."""
    query, *memory = args
    count, pool, level = _window(options)
    wide = [np.asarray(a, np.result_type(a.dtype, np.float32)) for a in memory]
    pooled = [hierarchy(a, count, pool, exact)[level].astype(query.dtype) for a in wide]
    before = call(query, *pooled, **{**options, "level": 0, "num_levels": 1})
    yield "out", before, call(*args, **options)


def shared_is_repeated(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys or values for all sequences give what copies for each give."""
    query, *memory = args
    copies = [np.broadcast_to(a, (len(query), *a.shape[1:])).copy() for a in memory]
    if any(a.shape != c.shape for a, c in zip(memory, copies, strict=True)):
        yield "out", call(*args, **options), call(query, *copies, **options)


def levels_count_from_the_top(
    call: Any, args: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """Level l is level l - num_levels."""
    count, _, level = _window(options)
    got, expected = (call(*args, **{**options, "level": x}) for x in (level, level - count))
    yield "out", got, expected


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    order = np.arange(len(args[0]))[::-1].copy()
    mixed = (a[order] if len(a) == len(order) else a for a in args)
    yield "out", call(*mixed, **options), call(*args, **options)[order]
