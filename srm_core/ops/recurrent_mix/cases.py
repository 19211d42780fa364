"""Sizes, samples, wrong calls and laws of `recurrent_mix`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize, normal, sample_lengths, uniform
from srm_core.ops.recurrent_step.cases import HALF, modes
from srm_core.spec import Case, ErrorSample


def _case(name: str, b: int, t: int, h: int, d: int, length: int, *tags: str, **settings: Any) -> Case:
    dims = {"B": b, "T": t, "H": h, "D": d, "L": length}
    return Case(name, dims, frozenset(tags or ("ci",)), settings)


CASES = (
    _case("row", 2, 9, 3, 5, 9, modes="row"),
    _case("col", 2, 9, 3, 5, 11, modes="col"),
    _case("half", 2, 65, 4, 8, 80, modes="half", initial_state=True),
    _case("mixed", 1, 131, 5, 3, 131, modes="mixed"),
    _case("narrow", 1, 300, 2, 4, 300, modes="half", initial_state=True),
    _case("wide", 2, 40, 4, 160, 64, modes="half"),
    _case("start", 2, 20, 4, 8, 32, modes="half", start=12, initial_state=True),
    _case("start_array", 3, 20, 4, 8, 32, modes="mixed", start="array", initial_state=True),
    _case("start_out_of_range", 2, 6, 4, 8, 8, "ci", "edge", modes="mixed", start="out"),
    _case("lengths", 4, 20, 4, 8, 32, modes="half", lengths=True, initial_state=True),
    _case("lengths_start_array", 4, 20, 4, 8, 32, modes="mixed", lengths=True, start="array"),
    _case("wide_parameters", 2, 20, 4, 8, 32, modes="half", wide_parameters=True, initial_state=True),
    _case("half_state", 2, 20, 4, 8, 32, modes="half", initial_state=True, half_state=True),
    _case("one_step", 2, 1, 2, 4, 4, "ci", "edge", modes="half"),
    _case("no_steps", 2, 0, 2, 4, 4, "ci", "edge", modes="half"),
    _case("no_steps_state", 2, 0, 2, 4, 4, "ci", "edge", modes="half", initial_state=True),
    _case("no_batch", 0, 5, 2, 4, 8, "ci", "edge", modes="half"),
    _case("prefill_512", 8, 512, 16, 64, 512, "bench", modes="half"),
    _case("prefill_4096", 8, 4096, 12, 128, 4096, "bench", modes="half"),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rng, s = generator(case, seed), case.settings
    b, t, h, d, length = (case.dims[k] for k in "BTHDL")
    wide = "float32" if s.get("wide_parameters") and dtype in HALF else dtype
    state_dtype = "float32" if dtype in HALF and not s.get("half_state") else dtype
    state = normal(rng, (b, h, d), state_dtype) if s.get("initial_state") else None
    args = (
        normal(rng, (b, t, h, d), dtype), normal(rng, (h, length), wide), normal(rng, (h, length), wide),
        uniform(rng, (h,), wide, 0.9, 1.0), modes(s["modes"], h), state,
    )  # fmt: skip
    start: Any = s.get("start", 0)
    if start == "array":
        start = rng.integers(0, length - t + 1, b)
    elif start == "out":
        start = np.array([-2, length - t + 2])
    options = {"start": start}
    if s.get("lengths"):
        options["lengths"] = sample_lengths(rng, b, t)
    return args, options


def flops(case: Case) -> int:
    """Two multiplications and two additions an element."""
    return 4 * case.dims["B"] * case.dims["T"] * case.dims["H"] * case.dims["D"]


def bytes_moved(case: Case, dtype: str) -> int:
    """Two streams: x read, y written; the weights and biases of T positions, and the states."""
    b, t, h, d = (case.dims[k] for k in "BTHD")
    states = 1 + bool(case.settings.get("initial_state"))
    state_size = 4 if dtype in HALF else itemsize(dtype)
    return itemsize(dtype) * (2 * b * t * h * d + 2 * h * t + h) + states * b * h * d * state_size


def _call(options: dict[str, Any] | None = None, **change: Any) -> Any:
    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        one = np.float32
        args = {
            "x": np.ones((2, 5, 3, 4), one), "weight": np.ones((3, 8), one), "bias": np.ones((3, 8), one),
            "decay": np.ones(3, one), "mode": ("row", "col", "row"), "initial_state": None,
        }  # fmt: skip
        return tuple({**args, **change}.values()), dict(options or {})

    return make


ERROR_SAMPLES = (
    ErrorSample("x of rank 3", "x", _call(x=np.ones((2, 3, 4), np.float32))),
    ErrorSample("x of integers", "x", _call(x=np.ones((2, 5, 3, 4), int))),
    ErrorSample("weight of other heads", "weight", _call(weight=np.ones((2, 8), np.float32))),
    ErrorSample("bias of another length", "bias", _call(bias=np.ones((3, 9), np.float32))),
    ErrorSample("decay a number", "decay", _call(decay=0.9)),
    ErrorSample("an unknown mode", "mode", _call(mode=("row", "col", "Row"))),
    ErrorSample("modes missing", "mode", _call(mode=None)),
    ErrorSample("state of another batch", "initial_state", _call(initial_state=np.ones((3, 3, 4), np.float32))),
    ErrorSample("start past the end", "start", _call({"start": 4})),
    ErrorSample("negative start", "start", _call({"start": -1})),
    ErrorSample("start a float", "start", _call({"start": 1.0})),
    ErrorSample("start of another batch", "start", _call({"start": np.zeros(3, int)})),
    ErrorSample("a length past T", "lengths", _call({"lengths": np.array([5, 6])})),
    ErrorSample("longer than the weights", "start", _call(x=np.ones((2, 9, 3, 4), np.float32))),
)


def split_is_whole(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A sequence in two chunks, the second begun at the first one's end, equals the whole."""
    x, *weights, state = args
    steps = x.shape[1]
    if options.get("lengths") is not None or steps < 2:
        return
    cut, start = steps // 2, options.get("start", 0)
    y, final = call(*args, **options)
    y_first, middle = call(x[:, :cut], *weights, state, start=start)
    y_second, last = call(x[:, cut:], *weights, middle, start=start + cut)
    yield "y of the first chunk", y_first, y[:, :cut]
    yield "y of the second chunk", y_second, y[:, cut:]
    yield "final_state", last, final


def folds_steps(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """One position at a time, through T = 1 calls, equals the whole."""
    x, *weights, state = args
    if options.get("lengths") is not None or not 0 < x.shape[1] <= 16:
        return
    y, final = call(*args, **options)
    for t in range(x.shape[1]):
        y_t, state = call(x[:, t : t + 1], *weights, state, start=options.get("start", 0) + t)
        yield f"y at step {t}", y_t, y[:, t : t + 1]
    yield "final_state", state, final


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    x, *weights, state = args
    order = np.arange(x.shape[0])[::-1].copy()
    moved = {k: v[order] if getattr(v, "ndim", 0) else v for k, v in options.items()}
    y, final = call(*args, **options)
    y_moved, final_moved = call(x[order], *weights, None if state is None else state[order], **moved)
    yield "y", y_moved, y[order]
    yield "final_state", final_moved, final[order]
