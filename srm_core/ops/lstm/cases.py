"""Sizes, samples, wrong calls and laws of `lstm`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize, normal, sample_lengths
from srm_core.spec import HALF, Case, ErrorSample

TENSORS = ("x", "w_ih", "w_hh", "b_ih", "b_hh", "h0", "c0")


def _case(name: str, b: int, t: int, i: int, h: int, *tags: str, **settings: Any) -> Case:
    return Case(name, {"B": b, "T": t, "I": i, "H": h}, frozenset(tags or ("ci",)), settings)


BIASES, STATES = ("b_ih", "b_hh"), ("h0", "c0")

# given: the optional tensors that there are; both biases unless it is said.
CASES = (
    _case("small", 2, 5, 3, 4),
    _case("odd", 3, 31, 7, 17),
    _case("wide", 2, 5, 3, 65),
    _case("long", 1, 130, 3, 5),
    _case("no_biases", 2, 9, 6, 5, given=()),
    _case("one_bias", 2, 9, 6, 5, given=("b_ih",)),
    _case("other_bias", 2, 9, 6, 5, given=("b_hh", "h0")),
    _case("states", 2, 9, 6, 5, given=(*BIASES, *STATES)),
    _case("cell_alone", 2, 9, 6, 5, given=("b_ih", "c0")),
    _case("lengths", 4, 12, 5, 6, lengths=True),
    _case("lengths_states", 4, 12, 5, 6, given=(*BIASES, *STATES), lengths=True),
    _case("float32_parameters", 2, 9, 6, 5, given=(*BIASES, *STATES), wide_parameters=True),
    _case("one", 1, 1, 1, 1, "ci", "edge"),
    _case("one_step", 3, 1, 4, 8, "ci", "edge", given=(*BIASES, *STATES)),
    _case("one_channel", 3, 7, 1, 1, "ci", "edge"),
    _case("no_steps", 2, 0, 3, 4, "ci", "edge"),
    _case("no_steps_states", 2, 0, 3, 4, "ci", "edge", given=STATES),
    _case("no_batch", 0, 3, 3, 4, "ci", "edge", given=(*BIASES, *STATES)),
    _case("no_inputs", 2, 3, 0, 4, "ci", "edge"),
    _case("no_channels", 2, 3, 4, 0, "ci", "edge"),
    _case("block", 16, 3, 16, 16, "ci", "edge"),
    _case("block_plus_1", 17, 3, 17, 17, "ci", "edge"),
    _case("block_minus_1", 15, 3, 15, 15, "ci", "edge"),
    _case("seed_256", 16, 32, 128, 256, "seed", "bench"),
    _case("seed_512", 8, 64, 256, 512, "seed"),
    _case("seed_1024", 4, 128, 512, 1024, "seed"),
    _case("h512", 16, 1024, 512, 512, "bench"),
    _case("h768", 16, 1024, 768, 768, "bench"),
    _case("one_sequence", 1, 1024, 256, 256, "bench"),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: weights with which gates are neither open nor shut."""
    rng, s = generator(case, seed), case.settings
    b, t, i, h = (case.dims[k] for k in "BTIH")
    wide = "float32" if s.get("wide_parameters") and dtype in HALF else dtype
    shapes = {"b_ih": (4 * h,), "b_hh": (4 * h,), "h0": (b, h), "c0": (b, h)}
    x = normal(rng, (b, t, i), dtype)
    weights = [normal(rng, (4 * h, n), wide, max(1, n) ** -0.5) for n in (i, h)]
    rest = [normal(rng, shape, wide) if n in s.get("given", BIASES) else None for n, shape in shapes.items()]
    return (x, *weights, *rest), {"lengths": sample_lengths(rng, b, t)} if s.get("lengths") else {}


def flops(case: Case) -> int:
    """Two operations for each weight a step, and thirty for each channel."""
    b, t, i, h = (case.dims[k] for k in "BTIH")
    return b * t * (8 * h * (i + h) + 30 * h)


def bytes_moved(case: Case, dtype: str) -> int:
    """x and the parameters read once, y written once, the states."""
    b, t, i, h = (case.dims[k] for k in "BTIH")
    wide = itemsize("float32" if case.settings.get("wide_parameters") and dtype in HALF else dtype)
    given = case.settings.get("given", BIASES)
    parameters = 4 * h * (i + h + sum(n in BIASES for n in given)) + b * h * (2 + sum(n in STATES for n in given))
    return itemsize(dtype) * b * t * (i + h) + wide * parameters


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def _wrong(name: str, param: str, value: Any = None, **options: Any) -> ErrorSample:
    """B = 2, T = 4, I = 5, H = 3, ones, but for one argument."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        shapes = ((2, 4, 5), (12, 5), (12, 3), (12,), (12,), (2, 3), (2, 3))
        right = {n: _f32(*s) for n, s in zip(TENSORS, shapes, strict=True)}
        return tuple(value if n == param else a for n, a in right.items()), options

    return ErrorSample(name, param, make)


ERROR_SAMPLES = (
    _wrong("x of rank 2", "x", _f32(4, 5)),
    _wrong("x missing", "x"),
    _wrong("w_ih of other inputs", "w_ih", _f32(12, 4)),
    _wrong("w_ih of three gates", "w_ih", _f32(9, 5)),
    _wrong("w_ih transposed", "w_ih", _f32(5, 12)),
    _wrong("w_hh of another width", "w_hh", _f32(12, 4)),
    _wrong("w_hh of other gates", "w_hh", _f32(16, 3)),
    _wrong("w_hh missing", "w_hh"),
    _wrong("b_ih of one gate", "b_ih", _f32(3)),
    _wrong("b_hh of rank 2", "b_hh", _f32(1, 12)),
    _wrong("h0 with a layer", "h0", _f32(1, 2, 3)),
    _wrong("c0 of another batch", "c0", _f32(1, 3)),
    _wrong("x of integers", "x", np.ones((2, 4, 5), int)),
    _wrong("weights of float64", "w_ih", np.ones((12, 5))),
    _wrong("a half bias", "b_hh", np.ones(12, np.float16)),
    _wrong("c0 of float64", "c0", np.ones((2, 3))),
    _wrong("a length past T", "lengths", lengths=np.array([4, 5])),
    _wrong("a negative length", "lengths", lengths=np.array([-1, 2])),
    _wrong("lengths of another batch", "lengths", lengths=np.array([1, 2, 3])),
    _wrong("lengths of floats", "lengths", lengths=np.array([1.0, 2.0])),
)


def _per_sequence(args: tuple[Any, ...], change: Any) -> tuple[Any, ...]:
    """The call with x and the states changed."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = args
    x, h0, c0 = (None if a is None else change(a) for a in (x, h0, c0))
    return x, w_ih, w_hh, b_ih, b_hh, h0, c0


def split_is_whole(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A sequence in two chunks, the second begun with the first one's state and cell, equals the whole."""
    x, *weights = args[:5]
    steps = x.shape[1]
    if options.get("lengths") is not None or steps < 2:
        return
    cut, (y, h_n, c_n) = steps // 2, call(*args, **options)
    first, h, c = call(x[:, :cut], *weights, *args[5:])
    second, h, c = call(x[:, cut:], *weights, h, c)
    yield "y of the first chunk", first, y[:, :cut]
    yield "y of the second chunk", second, y[:, cut:]
    yield "h_n", h, h_n
    yield "c_n", c, c_n


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    order = np.arange(len(args[0]))[::-1].copy()
    lengths = options.get("lengths")
    permuted = options if lengths is None else {**options, "lengths": lengths[order]}
    results = call(*_per_sequence(args, lambda a: a[order]), **permuted)
    for name, got, expected in zip(("y", "h_n", "c_n"), results, call(*args, **options), strict=True):
        yield name, got, expected[order]


def biases_add_up(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The two biases may change places."""
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = args
    results = call(x, w_ih, w_hh, b_hh, b_ih, h0, c0, **options)
    yield from zip(("y", "h_n", "c_n"), results, call(*args, **options), strict=True)
