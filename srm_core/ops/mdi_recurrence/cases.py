"""Sizes, samples, wrong calls and laws of `mdi_recurrence`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize, normal, sample_lengths, uniform
from srm_core.spec import HALF, Case, ErrorSample

TENSORS = ("z", "gamma", "h0", "w_gate", "b_gate", "w_mdi", "b_mdi")


def _case(name: str, b: int, t: int, d: int, *tags: str, **settings: Any) -> Case:
    return Case(name, {"B": b, "T": t, "D": d}, frozenset(tags or ("ci",)), settings)


CASES = (
    _case("small", 2, 5, 4),
    _case("odd", 3, 31, 17),
    _case("wide", 2, 5, 65),
    _case("long", 1, 130, 5),
    _case("mix", 2, 9, 6, mix=-0.7),
    _case("no_mix", 2, 9, 6, mix=0),
    _case("lengths", 4, 12, 5, lengths=True),
    _case("lengths_wide", 3, 6, 33, lengths=True, mix=0.5),
    _case("float32_parameters", 2, 9, 6, wide_parameters=True),
    _case("one", 1, 1, 1, "ci", "edge"),
    _case("one_step", 3, 1, 8, "ci", "edge"),
    _case("one_channel", 3, 7, 1, "ci", "edge"),
    _case("no_steps", 2, 0, 4, "ci", "edge"),
    _case("no_batch", 0, 3, 4, "ci", "edge"),
    _case("no_channels", 2, 3, 0, "ci", "edge"),
    _case("block", 16, 3, 16, "ci", "edge"),
    _case("block_plus_1", 17, 3, 17, "ci", "edge"),
    _case("block_minus_1", 15, 3, 15, "ci", "edge"),
    _case("cpu_64", 1, 512, 64, "bench"),
    _case("cpu_256", 4, 512, 256, "bench"),
    _case("d128", 16, 256, 128, "bench"),
    _case("d256", 16, 256, 256, "bench"),
    _case("d512", 16, 256, 512, "bench"),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: gamma in [0.3, 0.9], so that states stay of about 1."""
    rng, s = generator(case, seed), case.settings
    b, t, d = (case.dims[k] for k in "BTD")
    wide = "float32" if s.get("wide_parameters") and dtype in HALF else dtype
    scale = max(1, d) ** -0.5
    weights = normal(rng, (d, d), wide, scale), normal(rng, (d,), wide), normal(rng, (d, 2 * d), wide, scale)
    options = {k: s[k] for k in ("mix",) if k in s}
    if s.get("lengths"):
        options["lengths"] = sample_lengths(rng, b, t)
    z, gamma, h0 = normal(rng, (b, t, d), dtype), uniform(rng, (b, t, d), dtype, 0.3, 0.9), normal(rng, (b, d), wide)
    return (z, gamma, h0, *weights, normal(rng, (d,), wide)), options


def flops(case: Case) -> int:
    """Two operations for each of three products of D by D a step, and twenty an element for the rest."""
    b, t, d = (case.dims[k] for k in "BTD")
    return b * t * (6 * d * d + 20 * d)


def bytes_moved(case: Case, dtype: str) -> int:
    """z, gamma and the parameters read once, h written once, two states."""
    b, t, d = (case.dims[k] for k in "BTD")
    wide = itemsize("float32" if case.settings.get("wide_parameters") and dtype in HALF else dtype)
    return itemsize(dtype) * 3 * b * t * d + wide * (3 * d * d + 2 * d + 2 * b * d)


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def _wrong(name: str, param: str, value: Any = None, **options: Any) -> ErrorSample:
    """B = 2, T = 4, D = 3, ones, but for one argument."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        shapes = ((2, 4, 3), (2, 4, 3), (2, 3), (3, 3), (3,), (3, 6), (3,))
        right = {n: _f32(*s) for n, s in zip(TENSORS, shapes, strict=True)}
        return tuple(value if n == param else a for n, a in right.items()), options

    return ErrorSample(name, param, make)


ERROR_SAMPLES = (
    _wrong("z of rank 2", "z", _f32(4, 3)),
    _wrong("gamma of one width", "gamma", _f32(2, 4, 1)),
    _wrong("h0 of another batch", "h0", _f32(1, 3)),
    _wrong("h0 with a step", "h0", _f32(2, 1, 3)),
    _wrong("h0 missing", "h0"),
    _wrong("w_gate not square", "w_gate", _f32(3, 6)),
    _wrong("b_gate of another width", "b_gate", _f32(6)),
    _wrong("w_mdi square", "w_mdi", _f32(3, 3)),
    _wrong("w_mdi transposed", "w_mdi", _f32(6, 3)),
    _wrong("b_mdi missing", "b_mdi"),
    _wrong("z of integers", "z", np.ones((2, 4, 3), int)),
    _wrong("gamma of float64", "gamma", np.ones((2, 4, 3))),
    _wrong("half weights", "w_gate", np.ones((3, 3), np.float16)),
    _wrong("mix a word", "mix", mix="much"),
    _wrong("mix not finite", "mix", mix=float("nan")),
    _wrong("a length past T", "lengths", lengths=np.array([4, 5])),
    _wrong("a negative length", "lengths", lengths=np.array([-1, 2])),
    _wrong("lengths of another batch", "lengths", lengths=np.array([1, 2, 3])),
    _wrong("lengths of floats", "lengths", lengths=np.array([1.0, 2.0])),
)


def split_is_whole(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A sequence in two chunks, the second begun with the first one's state, equals the whole."""
    z, gamma, h0, *weights = args
    steps = z.shape[1]
    if options.get("lengths") is not None or steps < 2:
        return
    cut, (h, last) = steps // 2, call(*args, **options)
    first, state = call(z[:, :cut], gamma[:, :cut], h0, *weights, **options)
    second, state = call(z[:, cut:], gamma[:, cut:], state, *weights, **options)
    yield "h of the first chunk", first, h[:, :cut]
    yield "h of the second chunk", second, h[:, cut:]
    yield "h_last", state, last


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    z, gamma, h0, *weights = args
    order = np.arange(len(z))[::-1].copy()
    lengths = options.get("lengths")
    permuted = options if lengths is None else {**options, "lengths": lengths[order]}
    results = call(z[order], gamma[order], h0[order], *weights, **permuted)
    for name, got, expected in zip(("h", "h_last"), results, call(*args, **options), strict=True):
        yield name, got, expected[order]
