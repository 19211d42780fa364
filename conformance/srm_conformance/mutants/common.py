"""What the mutants share: tampering with arguments, residuals and results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from srm_conformance.measures import rounded_to
from srm_core.context import Residuals

SEQUENCES = ("scan", "recurrent_mix", "mdi_recurrence", "lstm")


def each(decorate: Callable[..., Any], name: str, *ops: str, **at: Any) -> Callable[[Any], Any]:
    """One wrapper for several operators; a decorator around `forward` or `backward`.

    at: operators whose wrapper is to know where something stands, which it is given as `at`.
    """

    def add(wrapper: Any) -> Any:
        for op in ops:
            decorate(op, name)(wrapper)
        for op, where in at.items():
            decorate(op, name)(partial(wrapper, at=where))
        return wrapper

    return add


def put(values: Any, at: int, value: Any) -> tuple[Any, ...]:
    """The same, with another value at `at`."""
    return (*values[:at], value, *values[at + 1 :])


def tampered(residuals: Any, args: Any = None, options: Any = None, **kept: Any) -> Residuals:
    """What a backward sees, in part another."""
    return Residuals(args or residuals.args, {**residuals.options, **(options or {})}, {**residuals.kept, **kept})


def map_arrays(change: Callable[[Any], Any], values: Any) -> Any:
    """`change` of each array in a result, which may be None, an array or a tuple."""
    if isinstance(values, tuple):
        return tuple(map_arrays(change, v) for v in values)
    return values if values is None else change(values)


def is_half(array: Any) -> bool:
    return bool(array.dtype.itemsize == 2)


def rounded(array: Any, dtype: Any) -> Any:
    """The array, its values rounded to another dtype."""
    return rounded_to(rounded_to(array, np.dtype(dtype).name), array.dtype.name)


def beyond(lengths: Any, steps: int) -> Any:
    """Which of the (B, T) steps lie beyond their sequence."""
    return np.arange(steps) >= np.asarray(lengths)[:, None]


def stepwise(
    honest: Any, ctx: Any, args: Any, options: Any, over_time: tuple[int, ...], states: tuple[int, ...],
    between: Callable[[int, Any], Any],
) -> Any:  # fmt: skip
    """A recurrence step by step: each step begins with what `between(t, state)` makes of the states after step t.

    over_time, states: where the arguments over time and the initial states stand.
    """
    lengths, start = options.get("lengths"), options.get("start")
    steps = max(args[i].shape[1] for i in over_time if args[i] is not None)
    order = range(steps)[:: -1 if options.get("reverse") else 1]
    parts, current = {}, [args[i] for i in states]
    for t in order:
        now, step = dict(options), args
        for i in over_time:
            if args[i] is not None and args[i].shape[1] == steps:
                step = put(step, i, args[i][:, t : t + 1])
        for i, state in zip(states, current, strict=True):
            step = put(step, i, state)
        if lengths is not None:
            now["lengths"] = np.clip(lengths - t, 0, 1)
        if start is not None:
            now["start"] = start + t
        parts[t], *current = honest(ctx, *step, **now)
        current = [between(t, state) for state in current]
    y, *last = honest(ctx, *args, **options)  # for the residuals
    for t, part in parts.items():
        y[:, t : t + 1] = part
    for out, state in zip(last, current if steps else last, strict=True):
        out[...] = state
    return (y, *last)
