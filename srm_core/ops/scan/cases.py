"""Sizes, samples, wrong calls and laws of `scan`, shared by tests and benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize, normal, sample_lengths, uniform
from srm_core.spec import Case, ErrorSample

FOREIGN = ">f4" if sys.byteorder == "little" else "<f4"
GATE_AXES = {"full": "B T D", "channel": "B 1 D", "shared": "1 1 D", "step": "B T 1"}


def _case(name: str, b: int, t: int, d: int, *tags: str, **settings: Any) -> Case:
    return Case(name, {"B": b, "T": t, "D": d}, frozenset(tags or ("ci",)), settings)


CASES = (
    _case("small", 2, 7, 5),
    _case("odd", 3, 131, 17),
    _case("long", 1, 1037, 4),
    _case("wide", 2, 33, 520),
    _case("reverse", 2, 65, 6, reverse=True),
    _case("state", 2, 300, 8, initial_state=True),
    _case("reverse_state", 2, 300, 8, initial_state=True, reverse=True),
    _case("channel_gate", 2, 300, 8, gates="channel", initial_state=True),
    _case("shared_gate", 3, 64, 8, gates="shared"),
    _case("step_gate", 2, 300, 8, gates="step", reverse=True),
    _case("product", 2, 300, 8, tokens=False),
    _case("product_state", 2, 40, 8, tokens=False, initial_state=True, reverse=True),
    _case("lengths", 4, 300, 6, lengths=True, initial_state=True),
    _case("lengths_reverse", 4, 300, 6, lengths=True, reverse=True, initial_state=True),
    _case("lengths_channel_gate", 4, 50, 6, lengths=True, gates="channel"),
    _case("lengths_product", 4, 50, 6, lengths=True, tokens=False),
    _case("float32_gates", 2, 65, 6, wide_parameters=True, initial_state=True),
    _case("one_step", 2, 1, 3, "ci", "edge"),
    _case("no_steps", 2, 0, 3, "ci", "edge"),
    _case("no_steps_state", 2, 0, 3, "ci", "edge", initial_state=True),
    _case("no_batch", 0, 4, 3, "ci", "edge"),
    _case("block", 1, 256, 3, "ci", "edge"),
    _case("block_minus_1", 1, 255, 3, "ci", "edge"),
    _case("block_plus_1", 1, 257, 3, "ci", "edge"),
    _case("cpu_long_16", 1, 8192, 16, "bench"),
    _case("cpu_long_64", 1, 16384, 64, "bench"),
    _case("wide_1536", 8, 4096, 1536, "bench"),
    _case("wide_1024", 4, 16384, 1024, "bench"),
    _case("narrow_512", 1, 131072, 512, "bench"),
    _case("narrow_64", 1, 65536, 64, "bench"),
    _case("narrow_128", 16, 16384, 128, "bench"),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: gates in [0.8, 1.02], so that states neither vanish nor explode at once."""
    rng, s = generator(case, seed), case.settings
    b, t, d = (case.dims[k] for k in "BTD")
    extent = {"B": b, "T": t, "D": d, "1": 1}
    shape = tuple(extent[a] for a in GATE_AXES[s.get("gates", "full")].split())
    wide = "float32" if s.get("wide_parameters") and dtype in ("float16", "bfloat16") else dtype
    gates = uniform(rng, shape, wide, 0.8, 1.0 if t > 500 else 1.02)
    tokens = normal(rng, (b, t, d), dtype) if s.get("tokens", True) else None
    state = normal(rng, (b, d), wide) if s.get("initial_state") else None
    options: dict[str, Any] = {"reverse": s.get("reverse", False)}
    if s.get("lengths"):
        options["lengths"] = sample_lengths(rng, b, t)
    return (gates, tokens, state), options


def flops(case: Case) -> int:
    """One multiplication and one addition an element."""
    return 2 * case.dims["B"] * case.dims["T"] * case.dims["D"]


def bytes_moved(case: Case, dtype: str) -> int:
    """Gates and tokens read once, y written once; the states are small change but counted."""
    extent = {**case.dims, "1": 1}
    b, t, d = (case.dims[k] for k in "BTD")
    gates = 1
    for axis in GATE_AXES[case.settings.get("gates", "full")].split():
        gates *= extent[axis]
    streams = 2 if case.settings.get("tokens", True) else 1
    states = 1 + bool(case.settings.get("initial_state"))
    return itemsize(dtype) * (gates + streams * b * t * d + states * b * d)


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


ERROR_SAMPLES = (
    ErrorSample("gates of another width", "gates", lambda: ((_f32(2, 4, 7), _f32(2, 4, 3)), {})),
    ErrorSample("gates of rank 2", "gates", lambda: ((_f32(4, 3), _f32(2, 4, 3)), {})),
    ErrorSample("gates of rank 2 alone", "gates", lambda: ((_f32(4, 3),), {})),
    ErrorSample("tokens of rank 2", "tokens", lambda: ((_f32(2, 4, 3), _f32(4, 3)), {})),
    ErrorSample("state of another batch", "initial_state", lambda: ((_f32(2, 4, 3), _f32(2, 4, 3), _f32(3, 3)), {})),
    ErrorSample("gates missing", "gates", lambda: ((None, _f32(2, 4, 3)), {})),
    ErrorSample("a list", "tokens", lambda: ((_f32(1, 1, 1), [[[1.0]]]), {})),
    ErrorSample("integers", "tokens", lambda: ((_f32(1, 2, 1), np.ones((1, 2, 1), int)), {})),
    ErrorSample("two dtypes", "gates", lambda: ((np.ones((2, 4, 3)), _f32(2, 4, 3)), {})),
    ErrorSample("reverse is no bool", "reverse", lambda: ((_f32(2, 4, 3),), {"reverse": "yes"})),
    ErrorSample("a length past T", "lengths", lambda: ((_f32(2, 4, 3),), {"lengths": np.array([1, 5])})),
    ErrorSample("a negative length", "lengths", lambda: ((_f32(2, 4, 3),), {"lengths": np.array([-1, 2])})),
    ErrorSample("too many lengths", "lengths", lambda: ((_f32(2, 4, 3),), {"lengths": np.array([1, 2, 3])})),
    ErrorSample("float lengths", "lengths", lambda: ((_f32(2, 4, 3),), {"lengths": np.array([1.0, 2.0])})),
    ErrorSample("lengths a list", "lengths", lambda: ((_f32(2, 4, 3),), {"lengths": [1, 2]})),
    ErrorSample("byte order", "gates", lambda: ((np.ones((2, 4, 3), FOREIGN),), {})),
    ErrorSample("masked array", "gates", lambda: ((np.ma.ones((2, 4, 3)),), {})),
)


def split_is_whole(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A sequence in two chunks, the second begun with the first one's state, equals the whole."""
    gates, tokens, state = args
    steps = (gates if tokens is None else tokens).shape[1]
    if options.get("lengths") is not None or steps < 2:
        return
    cut, (y, final) = steps // 2, call(*args, **options)

    def part(where: slice) -> tuple[Any, Any]:
        return (gates[:, where] if gates.shape[1] == steps else gates), None if tokens is None else tokens[:, where]

    first, second = slice(0, cut), slice(cut, None)
    if options.get("reverse"):
        first, second = second, first
    y_first, middle = call(*part(first), state, **options)
    y_second, last = call(*part(second), middle, **options)
    yield "y of the first chunk", y_first, y[:, first]
    yield "y of the second chunk", y_second, y[:, second]
    yield "final_state", last, final


def flip_is_reverse(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Flipping time and setting `reverse` gives the flipped result."""
    if options.get("lengths") is not None:
        return
    y, final = call(*args, **options)
    flipped = [None if a is None else a[:, ::-1].copy() for a in args[:2]]
    y_flipped, final_flipped = call(*flipped, args[2], reverse=not options.get("reverse", False))
    yield "y", y_flipped[:, ::-1], y
    yield "final_state", final_flipped, final


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    gates, tokens, state = args
    batch = (gates if tokens is None else tokens).shape[0]
    order = np.arange(batch)[::-1].copy()
    y, final = call(*args, **options)
    lengths = options.get("lengths")
    permuted = {**options, **({} if lengths is None else {"lengths": lengths[order]})}
    parts = [None if a is None else (a[order] if a.shape[0] == batch else a) for a in (gates, tokens, state)]
    y_permuted, final_permuted = call(*parts, **permuted)
    yield "y", y_permuted, y[order]
    yield "final_state", final_permuted, final[order]
