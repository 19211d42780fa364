"""Sizes, samples, wrong calls and laws of `mdi`."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize, normal, sigmoid
from srm_core.spec import HALF, Case, ErrorSample

TENSORS = ("z", "h", "gate_logits", "decay_logits", "modulation_logits")


def _case(name: str, shape: tuple[int, ...], *tags: str, **settings: Any) -> Case:
    return Case(name, {"N": prod(shape)}, frozenset(tags or ("ci",)), {"shape": shape, **settings})


# spread: of the logits. offset: added to those of decay, so that gamma comes near a bound. cancelling: z is such that
# h_new is small beside its terms.
CASES = (
    _case("small", (2, 3, 5)),
    _case("plain", (2, 3, 5), modulation=False),
    _case("vector", (131,)),
    _case("rank_4", (2, 3, 5, 7), modulation=False),
    _case("many", (3, 5000)),
    _case("steep", (7, 11), spread=6.0),
    _case("faint", (7, 11), offset=-9.0),
    _case("clamped", (7, 11), spread=3.0, eps=0.2),
    _case("clamped_plain", (7, 11), spread=3.0, eps=0.3, modulation=False),
    _case("unclamped", (7, 11), eps=0),
    _case("cancelling", (7, 11), modulation=False, cancelling=True),
    _case("float32_state", (3, 17), wide_parameters=True),
    _case("one", (1,), "ci", "edge"),
    _case("scalar", (), "ci", "edge"),
    _case("none", (0,), "ci", "edge"),
    _case("no_steps", (2, 0, 4), "ci", "edge", modulation=False),
    _case("block", (8192,), "ci", "edge"),
    _case("block_plus_1", (8193,), "ci", "edge"),
    _case("block_minus_1", (8191,), "ci", "edge", modulation=False),
    _case("wide", (8, 4096, 1024), "bench"),
    _case("wide_plain", (8, 4096, 1024), "bench", modulation=False),
    _case("step", (64, 1024), "bench"),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: normal values."""
    rng, s = generator(case, seed), case.settings
    wide = "float32" if s.get("wide_parameters") and dtype in HALF else dtype
    arrays = [normal(rng, s["shape"], d) for d in (dtype, wide)]
    offsets = (0.0, s.get("offset", 0.0), 0.0)
    spread = s.get("spread", 1.0)
    given = [np.asarray(spread * rng.standard_normal(s["shape"]) + o).astype(dtype) for o in offsets]
    if s.get("cancelling"):
        g, gamma = (sigmoid(a.astype("float64")) for a in given[:2])
        arrays[0] = (-(1 - g + gamma) / g * arrays[1].astype("float64")).astype(dtype)
    return (*arrays, *given[:2], given[2] if s.get("modulation", True) else None), {k: s[k] for k in ("eps",) if k in s}


def _streams(case: Case) -> int:
    return 4 + bool(case.settings.get("modulation", True))


def flops(case: Case) -> int:
    """Eight operations an element for h_new and the clamp, five for each sigmoid, one for the product of two."""
    sigmoids = _streams(case) - 2
    return case.dims["N"] * (8 + 5 * sigmoids + (sigmoids == 3))


def bytes_moved(case: Case, dtype: str) -> int:
    """Every tensor once: h and h_new may be wider."""
    state = itemsize("float32" if case.settings.get("wide_parameters") and dtype in HALF else dtype)
    return case.dims["N"] * ((_streams(case)) * itemsize(dtype) + 2 * state)


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


def _wrong(name: str, param: str, value: Any, **options: Any) -> ErrorSample:
    """Arguments of ones (2, 3), but for one."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(value if n == param else _f32(2, 3) for n in TENSORS), options

    return ErrorSample(name, param, make)


ERROR_SAMPLES = (
    _wrong("h of another shape", "h", _f32(2, 4)),
    _wrong("h of as many elements", "h", _f32(3, 2)),
    ErrorSample("z without axes beside one element", "h", lambda: ((_f32(), *(_f32(1) for _ in range(3))), {})),
    _wrong("gate_logits that would broadcast", "gate_logits", _f32(3)),
    _wrong("decay_logits missing", "decay_logits", None),
    _wrong("modulation_logits of another rank", "modulation_logits", _f32(1, 2, 3)),
    _wrong("z a float", "z", 1.0),
    _wrong("h of float64", "h", np.ones((2, 3))),
    _wrong("half logits", "gate_logits", np.ones((2, 3), np.float16)),
    _wrong("integers", "z", np.ones((2, 3), int)),
    _wrong("negative eps", "eps", None, eps=-1e-6),
    _wrong("eps past the middle", "eps", None, eps=0.6),
    _wrong("eps a word", "eps", None, eps="small"),
    _wrong("eps a bool", "eps", None, eps=True),
)


def _names() -> tuple[str, str]:
    return "h_new", "gamma"


def _of_each(change: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(None if a is None else change(a) for a in args)


def shape_does_not_matter(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The elements may lie in any shape."""
    flat = call(*_of_each(lambda a: a.reshape(-1), args), **options)
    for name, got, expected in zip(_names(), flat, call(*args, **options), strict=True):
        yield name, got, expected.reshape(-1)


def elements_are_apart(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Two halves of the elements give what they give together."""
    whole = call(*args, **options)
    cut = args[0].size // 2
    for part in (slice(None, cut), slice(cut, None)):
        halves = call(*_of_each(lambda a, p=part: a.reshape(-1)[p], args), **options)
        for name, got, expected in zip(_names(), halves, whole, strict=True):
            yield name, got, expected.reshape(-1)[part]


def factors_change_places(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Decay and modulation are factors of one product."""
    z, h, gate, decay, modulation = args
    if modulation is None:
        return
    swapped = call(z, h, gate, modulation, decay, **options)
    yield from zip(_names(), swapped, call(*args, **options), strict=True)
