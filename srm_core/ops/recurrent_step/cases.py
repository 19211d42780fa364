"""Sizes, samples, wrong calls and laws of `recurrent_step`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import generator, itemsize, normal, uniform
from srm_core.spec import Case, ErrorSample

HALF = ("float16", "bfloat16")


def modes(kind: str, heads: int) -> tuple[str, ...]:
    """Head modes by name: "row", "col", "half" (first half col), "mixed" (alternating)."""
    if kind == "half":
        return ("col",) * (heads // 2) + ("row",) * (heads - heads // 2)
    if kind == "mixed":
        return tuple("row" if h % 2 else "col" for h in range(heads))
    return (kind,) * heads


def case(name: str, b: int, h: int, d: int, length: int, *tags: str, **settings: Any) -> Case:
    return Case(name, {"B": b, "H": h, "D": d, "L": length}, frozenset(tags or ("ci",)), settings)


CASES = (
    case("row", 2, 3, 5, 11, modes="row", index=4),
    case("col", 2, 3, 5, 11, modes="col", index=10),
    case("half", 3, 4, 8, 16, modes="half", index=0),
    case("mixed", 3, 5, 17, 16, modes="mixed", index=15),
    case("index_array", 4, 3, 8, 16, modes="mixed", index="array"),
    case("index_equal", 4, 3, 8, 16, modes="mixed", index="equal"),
    case("index_scalar_array", 4, 3, 8, 16, modes="mixed", index="scalar"),
    case("index_out_of_range", 4, 3, 8, 16, "ci", "edge", modes="mixed", index="out"),
    case("wide_parameters", 2, 4, 8, 16, modes="half", index=3, wide_parameters=True),
    case("half_state", 2, 4, 8, 16, modes="half", index=3, half_state=True),
    case("one", 1, 1, 1, 1, "ci", "edge", modes="row", index=0),
    case("no_batch", 0, 2, 4, 8, "ci", "edge", modes="half", index=0),
    case("decode_64", 64, 32, 128, 512, "bench", modes="half", index=100),
    case("decode_8192", 8192, 32, 128, 512, "bench", modes="half", index=100),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rng, s = generator(case, seed), case.settings
    b, h, d, length = (case.dims[k] for k in "BHDL")
    wide = "float32" if s.get("wide_parameters") and dtype in HALF else dtype
    state_dtype = "float32" if dtype in HALF and not s.get("half_state") else dtype
    index: Any = s["index"]
    if index == "array":
        index = rng.integers(0, length, b)
    elif index == "equal":
        index = np.array([5, 9, 5, 5][:b])
    elif index == "scalar":
        index = np.array(length - 1, np.int32)
    elif index == "out":
        index = np.array([-1, length, 0, length - 1][:b])
    args = (
        normal(rng, (b, h, d), dtype), normal(rng, (b, h, d), state_dtype), normal(rng, (h, length), wide),
        normal(rng, (h, length), wide), uniform(rng, (h,), wide, 0.9, 1.0), modes(s["modes"], h), index,
    )  # fmt: skip
    return args, {}


def flops(case: Case) -> int:
    """Two multiplications and two additions an element."""
    return 4 * case.dims["B"] * case.dims["H"] * case.dims["D"]


def bytes_moved(case: Case, dtype: str) -> int:
    """x and state read, y and new state written; one weight, bias and decay a head."""
    elements = case.dims["B"] * case.dims["H"] * case.dims["D"]
    state = 4 if dtype in HALF else itemsize(dtype)
    return 2 * elements * (itemsize(dtype) + state) + 3 * case.dims["H"] * itemsize(dtype)


def _call(**change: Any) -> Any:
    """A maker of a valid call with some arguments replaced."""

    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        one = np.float32
        args = {
            "x": np.ones((2, 3, 4), one), "state": np.ones((2, 3, 4), one), "weight": np.ones((3, 8), one),
            "bias": np.ones((3, 8), one), "decay": np.ones(3, one), "mode": ("row", "col", "row"), "index": 0,
        }  # fmt: skip
        return tuple({**args, **change}.values()), {}

    return make


ERROR_SAMPLES = (
    ErrorSample("x of rank 2", "x", _call(x=np.ones((2, 3), np.float32))),
    ErrorSample("state of another width", "state", _call(state=np.ones((2, 3, 5), np.float32))),
    ErrorSample("state missing", "state", _call(state=None)),
    ErrorSample("weight of other heads", "weight", _call(weight=np.ones((2, 8), np.float32))),
    ErrorSample("bias of another length", "bias", _call(bias=np.ones((3, 9), np.float32))),
    ErrorSample("decay of rank 0", "decay", _call(decay=np.ones((), np.float32))),
    ErrorSample("decay in float64", "decay", _call(decay=np.ones(3))),
    ErrorSample("one mode too few", "mode", _call(mode=("row", "col"))),
    ErrorSample("an unknown mode", "mode", _call(mode=("row", "col", "diag"))),
    ErrorSample("a mode for all", "mode", _call(mode="row")),
    ErrorSample("index past the end", "index", _call(index=8)),
    ErrorSample("negative index", "index", _call(index=-1)),
    ErrorSample("index a float", "index", _call(index=1.0)),
    ErrorSample("index a bool", "index", _call(index=True)),
    ErrorSample("index of another batch", "index", _call(index=np.zeros(3, int))),
    ErrorSample("index of floats", "index", _call(index=np.zeros(2))),
)


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Sequences do not see each other."""
    x, state, weight, bias, decay, mode, index = args
    order = np.arange(x.shape[0])[::-1].copy()
    y, new = call(*args)
    moved = index[order] if getattr(index, "ndim", 0) else index
    y_moved, new_moved = call(x[order], state[order], weight, bias, decay, mode, moved)
    yield "y", y_moved, y[order]
    yield "new_state", new_moved, new[order]


def heads_are_independent(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each head alone gives what it gives among the others."""
    x, state, weight, bias, decay, mode, index = args
    y, new = call(*args)
    for h in range(x.shape[1]):
        one = slice(h, h + 1)
        y_one, new_one = call(x[:, one], state[:, one], weight[one], bias[one], decay[one], mode[one], index)
        yield f"y of head {h}", y_one, y[:, one]
        yield f"new_state of head {h}", new_one, new[:, one]
