"""Sizes, samples, wrong calls and laws of `attention`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.axes import extents
from srm_core.ops.common import generator, itemsize, normal
from srm_core.spec import HALF, Case, ErrorSample


def _case(name: str, shape: tuple[int, ...], *tags: str, slots: int | None = None, groups: int | None = None,
          value_width: int | None = None, **settings: Any) -> Case:  # fmt: skip
    """shape: (B, H, T, D); S, G and E are T, H and D unless given."""
    b, h, t, d = shape
    s, g, e = (x if n is None else n for n, x in ((slots, t), (groups, h), (value_width, d)))
    return Case(name, {"B": b, "H": h, "G": g, "T": t, "S": s, "D": d, "E": e}, frozenset(tags or ("ci",)), settings)


def _seed(width: int, heads: int, steps: int, batch: int, *tags: str, **settings: Any) -> Case:
    causal = "_causal" if settings else ""
    return _case(f"seed_{width}{causal}", (batch, heads, steps, width // heads), "seed", *tags, **settings)


# mask: its axes, in which "1" is an axis of 1; additive unless boolean. empty: one step in four attends to nothing.
CASES = (
    _case("small", (2, 3, 5, 4)),
    _case("primes", (1, 2, 37, 11), slots=53, value_width=7),
    _case("causal", (2, 2, 33, 8), is_causal=True),
    _case("causal_more_slots", (1, 2, 17, 8), slots=29, is_causal=True),
    _case("causal_more_steps", (1, 2, 29, 8), slots=17, is_causal=True),
    _case("scale", (1, 2, 9, 5), scale=0.37),
    _case("sharp", (1, 2, 17, 8), scale=4.0),
    _case("scale_zero", (1, 1, 6, 3), scale=0),
    _case("boolean", (2, 3, 9, 4), slots=11, mask="B H T S", boolean=True, empty=True),
    _case("boolean_shared", (2, 3, 9, 4), slots=11, mask="T S", boolean=True),
    _case("boolean_slots", (3, 2, 9, 4), slots=70, mask="B 1 1 S", boolean=True, empty=True),
    _case("additive", (2, 3, 9, 4), slots=11, mask="B H T S", empty=True),
    _case("additive_shared", (2, 3, 9, 4), slots=11, mask="T S"),
    _case("additive_heads", (2, 3, 9, 4), slots=11, mask="H 1 S"),
    _case("additive_slots", (2, 3, 9, 4), slots=11, mask="B 1 1 S"),
    _case("boolean_steps", (2, 3, 9, 4), slots=11, mask="1 1 T 1", boolean=True, empty=True),
    _case("float32_mask", (1, 2, 9, 4), mask="1 H T S", wide_parameters=True),
    _case("gqa", (2, 6, 10, 4), slots=13, groups=2, enable_gqa=True),
    _case("gqa_causal", (2, 4, 33, 4), groups=1, is_causal=True, enable_gqa=True),
    _case("gqa_mask", (1, 6, 7, 4), slots=9, groups=3, mask="H T S", enable_gqa=True),
    _case("one_step", (2, 2, 1, 8), "ci", "edge", slots=19),
    _case("no_steps", (2, 2, 0, 3), "ci", "edge", slots=4),
    _case("no_slots", (2, 2, 4, 3), "ci", "edge", slots=0, mask="T S"),
    _case("no_batch", (0, 2, 4, 3), "ci", "edge", mask="B 1 T S"),
    _case("no_width", (1, 2, 4, 0), "ci", "edge", slots=5, value_width=3, is_causal=True),
    _case("block", (1, 1, 128, 16), "ci", "edge", is_causal=True),
    _case("block_plus_1", (1, 1, 129, 16), "ci", "edge", slots=129, mask="T S", boolean=True),
    _case("block_minus_1", (1, 1, 127, 16), "ci", "edge"),
    _seed(256, 4, 64, 8),
    _seed(512, 8, 128, 4),
    _seed(1024, 16, 256, 2),
    _seed(256, 4, 64, 8, is_causal=True),
    _seed(512, 8, 128, 4, is_causal=True),
    _seed(1024, 16, 256, 2, is_causal=True),
    _case("cpu_1024", (1, 8, 1024, 64), "bench"),
    _case("cpu_1024_causal", (1, 8, 1024, 64), "bench", is_causal=True),
    _case("d128_4096", (4, 16, 4096, 128), "bench"),
    _case("d128_4096_causal", (4, 16, 4096, 128), "bench", is_causal=True),
    _case("d128_16384_causal", (1, 16, 16384, 128), "bench", is_causal=True),
    _case("d64_4096_causal", (4, 32, 4096, 64), "bench", is_causal=True),
)


def _mask_shape(case: Case) -> tuple[int, ...]:
    return extents(case.settings["mask"], case.dims)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: normal values, so that scores are of about 1; masks with a third masked."""
    rng, s = generator(case, seed), case.settings
    b, h, g, t, n, d, e = (case.dims[k] for k in "BHGTSDE")
    arrays = [normal(rng, shape, dtype) for shape in ((b, h, t, d), (b, g, n, d), (b, g, n, e))]
    options = {k: s[k] for k in ("is_causal", "scale", "enable_gqa") if k in s}
    if "mask" not in s:
        return (*arrays, None), options
    shape = _mask_shape(case)
    attends = rng.random(shape) < 2 / 3
    if s.get("empty"):
        attends[..., ::4, :] = False
    if s.get("boolean"):
        return (*arrays, attends), options
    wide = "float32" if s.get("wide_parameters") and dtype in HALF else dtype
    mask = normal(rng, shape, wide)
    mask[~attends] = -np.inf
    return (*arrays, mask), options


def _pairs(case: Case) -> int:
    """How many pairs of a step and a slot are attended to in a head, were no mask given."""
    steps, slots = case.dims["T"], case.dims["S"]
    if not case.settings.get("is_causal"):
        return steps * slots
    full = min(steps, slots)  # step t sees t + 1 slots, until it sees all
    return full * (full + 1) // 2 + (steps - full) * slots


def flops(case: Case) -> int:
    """Two operations for each product of query with key and of probability with value; masks save none."""
    d = case.dims
    return 2 * d["B"] * d["H"] * _pairs(case) * (d["D"] + d["E"])


def bytes_moved(case: Case, dtype: str) -> int:
    """query, key, value and a mask read once, out written once."""
    b, h, g, t, n, d, e = (case.dims[k] for k in "BHGTSDE")
    size = itemsize(dtype) * b * (h * t * (d + e) + g * n * (d + e))
    if "mask" in case.settings:
        wide = case.settings.get("wide_parameters") and dtype in HALF
        of_mask = 1 if case.settings.get("boolean") else itemsize("float32" if wide else dtype)
        size += of_mask * int(np.prod(_mask_shape(case)))
    return size


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def _wrong(name: str, param: str, change: dict[str, Any], **options: Any) -> ErrorSample:
    """query (2, 4, 3, 5), key (2, 4, 6, 5) and value (2, 4, 6, 7) of ones, but for what is changed."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        right = {"query": _f32(2, 4, 3, 5), "key": _f32(2, 4, 6, 5), "value": _f32(2, 4, 6, 7), "attn_mask": None}
        return tuple({**right, **change}.values()), options

    return ErrorSample(name, param, make)


ERROR_SAMPLES = (
    _wrong("query of rank 3", "query", {"query": _f32(4, 3, 5)}),
    _wrong("query missing", "query", {"query": None}),
    _wrong("key of rank 3", "key", {"key": _f32(4, 6, 5)}),
    _wrong("key of another width", "key", {"key": _f32(2, 4, 6, 4)}),
    _wrong("key of another batch", "key", {"key": _f32(1, 4, 6, 5)}),
    _wrong("key missing", "key", {"key": None}),
    _wrong("value of other slots", "value", {"value": _f32(2, 4, 5, 7)}),
    _wrong("value of other heads", "value", {"value": _f32(2, 2, 6, 7)}),
    _wrong("fewer heads of keys", "key", {"key": _f32(2, 2, 6, 5), "value": _f32(2, 2, 6, 7)}),
    _wrong("no divisor", "key", {"key": _f32(2, 3, 6, 5), "value": _f32(2, 3, 6, 7)}, enable_gqa=True),
    _wrong("more heads of keys", "key", {"key": _f32(2, 8, 6, 5), "value": _f32(2, 8, 6, 7)}, enable_gqa=True),
    _wrong("no heads of keys", "key", {"key": _f32(2, 0, 6, 5), "value": _f32(2, 0, 6, 7)}, enable_gqa=True),
    _wrong("half values", "value", {"value": np.ones((2, 4, 6, 7), np.float16)}),
    _wrong("float64 keys", "key", {"key": np.ones((2, 4, 6, 5))}),
    _wrong("integer queries", "query", {"query": np.ones((2, 4, 3, 5), int)}),
    _wrong("mask and is_causal", "attn_mask", {"attn_mask": _f32(3, 6)}, is_causal=True),
    _wrong("mask of rank 1", "attn_mask", {"attn_mask": _f32(6)}),
    _wrong("mask of rank 5", "attn_mask", {"attn_mask": _f32(1, 2, 4, 3, 6)}),
    _wrong("mask transposed", "attn_mask", {"attn_mask": _f32(6, 3)}),
    _wrong("mask of other heads", "attn_mask", {"attn_mask": _f32(2, 2, 3, 6)}),
    _wrong("mask by batch alone", "attn_mask", {"attn_mask": _f32(2, 3, 6)}),
    _wrong("integer mask", "attn_mask", {"attn_mask": np.ones((3, 6), int)}),
    _wrong("float64 mask", "attn_mask", {"attn_mask": np.ones((3, 6))}),
    _wrong("mask a list", "attn_mask", {"attn_mask": [[True] * 6] * 3}),
    _wrong("is_causal is no bool", "is_causal", {}, is_causal=1),
    _wrong("enable_gqa is no bool", "enable_gqa", {}, enable_gqa="yes"),
    _wrong("scale a word", "scale", {}, scale="1"),
    _wrong("scale not finite", "scale", {}, scale=float("inf")),
    _wrong("scale is bool", "scale", {}, scale=True),
)


def slots_permute(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Keys and values, with their mask, may be given in any order."""
    if options.get("is_causal"):
        return
    query, key, value, mask = args
    order = np.roll(np.arange(key.shape[2])[::-1], 1)
    if mask is not None and mask.shape[-1] == len(order):
        mask = mask[..., order]
    yield "out", call(query, key[:, :, order], value[:, :, order], mask, **options), call(*args, **options)


def boolean_is_additive(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A boolean mask is one of 0 where it is True, and -inf elsewhere."""
    *arrays, mask = args
    if mask is None or mask.dtype != bool:
        return
    additive = np.where(mask, 0, -np.inf).astype(arrays[0].dtype)
    yield "out", call(*arrays, mask, **options), call(*arrays, additive, **options)


def causal_is_a_mask(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """`is_causal` is the boolean mask that is True on and below the diagonal."""
    if not options.get("is_causal"):
        return
    query, key, value, _ = args
    mask = np.tri(query.shape[2], key.shape[2], dtype=bool)
    masked = call(query, key, value, mask, **{**options, "is_causal": False})
    yield "out", call(*args, **options), masked


def grouped_is_repeated(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Heads that share keys and values give what they give with copies of their own."""
    if not options.get("enable_gqa"):
        return
    query, key, value, mask = args
    times = query.shape[1] // key.shape[1]
    repeated = call(
        query, np.repeat(key, times, 1), np.repeat(value, times, 1), mask, **{**options, "enable_gqa": False}
    )
    yield "out", call(*args, **options), repeated


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    *arrays, mask = args
    order = np.arange(len(arrays[0]))[::-1].copy()
    if mask is not None and mask.ndim == 4 and mask.shape[0] == len(order):
        mask = mask[order]
    yield "out", call(*(a[order] for a in arrays), mask, **options), call(*args, **options)[order]
