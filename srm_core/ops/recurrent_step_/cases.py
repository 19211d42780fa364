"""Sizes, samples, wrong calls and laws of `recurrent_step_`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import generator, normal
from srm_core.ops.recurrent_step import cases as step_cases
from srm_core.ops.recurrent_step.cases import bytes_moved, case, flops
from srm_core.spec import Case, ErrorSample

__all__ = ["CASES", "ERROR_SAMPLES", "bytes_moved", "equals_step", "flops", "sample"]

CASES = (
    *step_cases.CASES,
    case("slots", 3, 4, 8, 16, modes="half", index=3, slots=7),
    case("slots_index_array", 3, 4, 8, 16, modes="mixed", index="array", slots=3),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, options = step_cases.sample(case, dtype, seed)
    rows = case.settings.get("slots")
    if rows is None:
        return args, options
    rng = generator(case, seed + 1)
    x, state, *rest = args
    state = normal(rng, (rows, *x.shape[1:]), state.dtype.name)
    return (x, state, *rest), {"slots": rng.permutation(rows)[: x.shape[0]]}


def _with_state(change: Any) -> Any:
    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        (_, _, *rest), _ = step_cases.ERROR_SAMPLES[0].make()
        one = np.ones((2, 3, 4), np.float32)
        return (one, change(one.copy()), *rest), {}

    return make


def _read_only(state: Any) -> Any:
    state.flags.writeable = False
    return state


def _shared(state: Any) -> Any:
    return np.lib.stride_tricks.as_strided(state, state.shape, (0, 16, 4))


def _with_slots(slots: Any, rows: int = 5) -> Any:
    def make() -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, _ = step_cases.ERROR_SAMPLES[0].make()
        x, _, *rest = args
        one = np.ones((2, 3, 4), np.float32)
        return (one, np.ones((rows, 3, 4), np.float32), *rest), {"slots": slots}

    return make


ERROR_SAMPLES = (
    *(s for s in step_cases.ERROR_SAMPLES if s.name != "state of another batch"),
    ErrorSample("a read-only state", "state", _with_state(_read_only)),
    ErrorSample("one state for all", "state", _with_state(_shared)),
    ErrorSample("more states than sequences", "state", _with_slots(None)),
    ErrorSample("a slot past the end", "slots", _with_slots(np.array([0, 5]))),
    ErrorSample("a negative slot", "slots", _with_slots(np.array([0, -1]))),
    ErrorSample("a slot twice", "slots", _with_slots(np.array([3, 3]))),
    ErrorSample("too many slots", "slots", _with_slots(np.array([0, 1, 2]))),
    ErrorSample("slots of floats", "slots", _with_slots(np.array([0.0, 1.0]))),
)


def equals_step(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Steps at slots equal a step on those rows taken out, and leave the other rows as they were."""
    x, state, *rest = args
    rows = options.get("slots")
    if rows is None:
        rows = np.arange(x.shape[0])
    inner = np.ascontiguousarray(state[rows])
    y_inner = call(x, inner, *rest)
    after = state.copy()
    y = call(x, after, *rest, slots=rows)
    others = np.setdiff1d(np.arange(state.shape[0]), rows)
    yield "y", y, y_inner
    yield "state at the slots", after[rows], inner
    yield "the other rows", after[others], state[others]
