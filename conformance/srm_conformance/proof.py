"""Proof that a kernel ran: every run is recorded, and the memory it is given to write to is poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from srm_core.arrays import LIBRARIES
from srm_core.registry import instrumented, registry

_recorder: ContextVar[list[str] | None] = ContextVar("srm_conformance_recorder", default=None)
_spoil: ContextVar[Callable[[Any, tuple[Any, ...]], None] | None] = ContextVar("srm_conformance_spoil", default=None)


class PoisonedContext:
    """A launch context whose `empty` and `scratch` hold NaN, or the largest integer: no kernel may count on zeros."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._poisoned(self._context.empty(shape, dtype))

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self._poisoned(self._context.scratch(shape, dtype))

    def _poisoned(self, array: Any) -> Any:
        name = LIBRARIES[self._context.array_library].dtype_name(array.dtype)
        value: Any = float("nan") if "float" in name else 2 ** (8 * array.dtype.itemsize - 1) - 1
        if name == "bool":
            value = True
        if hasattr(array, "fill_"):
            array.fill_(value)  # torch's assignment would copy from the host, which no graph captures
        else:
            array[...] = value
        return array


@contextmanager
def watched() -> Iterator[None]:
    """Within it every kernel of every backend is recorded and gets poisoned memory."""
    kernels = [e.kernel for entries in registry().kernels.values() for e in entries.values()]
    targets = {target for k in kernels for target in (k.forward, k.backward) if target}

    def wrap(target: str, function: Callable[..., Any]) -> Callable[..., Any]:
        if target not in targets:  # a predicate
            return function

        def run(context: Any, *args: Any, **options: Any) -> Any:
            launches = _recorder.get()
            if launches is not None:
                launches.append(target)
            result = function(PoisonedContext(context), *args, **options)
            spoil = _spoil.get()
            if spoil is not None:
                spoil(result, args)
            return result

        return run

    with instrumented(wrap):
        yield


@contextmanager
def recording() -> Iterator[list[str]]:
    """The targets that run within it, in this thread, in order."""
    launches: list[str] = []
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


@contextmanager
def broken(spoil: Callable[[Any, tuple[Any, ...]], None]) -> Iterator[None]:
    """Within it `spoil(result, arguments)` damages what each kernel has done: a session must notice."""
    token = _spoil.set(spoil)
    try:
        yield
    finally:
        _spoil.reset(token)
