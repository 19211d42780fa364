"""What a plugin does to the process while it loads is kept from everybody else where that can be, and told.

Installing a plugin must change no result and no output of a program that does not ask for it. So what it prints goes
to stderr, and what it sets of NumPy's error state and of the SRM_ variables is undone. Other variables stay as the
plugin left them: a library that it loads later may read them.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

SLOW = 0.5  # seconds; with a few such plugins a listing is no longer quick


class Loading:
    """`with Loading() as seen:` around the load of a plugin; afterwards `seen.seconds` and `seen.notes` tell of it.

    Run it in a copy of the context (`contextvars.copy_context().run`), in which context variables are set to no effect;
    NumPy's error state is one.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.notes: list[str] = []

    def __enter__(self) -> Loading:
        self._environ, self._numpy = dict(os.environ), np.geterr()
        self._real = sys.stdout
        self._stdout = sys.stdout if sys.stdout is None else _Stdout(sys.stdout)
        sys.stdout = self._stdout
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begun
        if self._stdout is not None:
            self._stdout.stop()
            if sys.stdout is self._stdout:
                sys.stdout = self._real
            elif threading.active_count() == 1:  # else it may be that of another thread
                sys.stdout = self._real
                self.notes.append("replaced sys.stdout while it loaded, which is undone")
            if said := self._stdout.said.strip():
                first = said.splitlines()[0]
                line = f"{first[:40]}..." if len(first) > 40 else first
                self.notes.append(f"wrote to stdout while it loaded, which went to stderr: {line!r}")
        now = dict(os.environ)
        changed = sorted(n for n in self._environ.keys() | now.keys() if self._environ.get(n) != now.get(n))
        ours = [n for n in changed if n.startswith("SRM_")]
        for name in ours:
            _set(name, self._environ.get(name))
        if ours:
            self.notes.append(f"changed {', '.join(ours)} while it loaded, which is undone: they are the user's")
        if others := [n for n in changed if n not in ours]:
            self.notes.append(f"changed the environment while it loaded: {', '.join(others)}")
        if np.geterr() != self._numpy:
            self.notes.append("changed NumPy's error state while it loaded, which is undone")
        if self.seconds >= SLOW:
            self.notes.append(f"took {self.seconds:.1f} s to load; import what is heavy in the modules of its kernels")


class _Stdout:
    """Stands in for sys.stdout: what this thread writes goes to stderr, and is remembered; others write as before."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._thread: int | None = threading.get_ident()
        self.said = ""

    def write(self, text: str) -> int:
        if threading.get_ident() != self._thread:
            return int(self._real.write(text))
        self.said += text
        if sys.stderr is not None:
            sys.stderr.write(text)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def stop(self) -> None:
        """From now on only hand on: a handler that the plugin has made may hold this object."""
        self._thread = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def _set(name: str, value: str | None) -> None:
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value


@contextmanager
def results_only() -> Iterator[None]:
    """Whatever is written to stdout inside goes to stderr, also by C libraries and child processes.

    For the command line, whose process has one thread: descriptors belong to all threads of a process.
    """
    saved, other = os.dup(1), os.dup(2) if sys.stderr is not None else os.open(os.devnull, os.O_WRONLY)
    os.dup2(other, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _flush_c()
        os.dup2(saved, 1)
        os.close(saved)
        os.close(other)


def _flush_c() -> None:
    # What printf keeps in its buffer would come out at exit, behind the results.
    if os.name == "posix":
        ctypes.CDLL(None).fflush(None)
