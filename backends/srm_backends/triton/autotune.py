"""Which of a few ways of running an operator is the fastest on this GPU: measured once, then remembered on disk.

A choice is a tuple of numbers, a tile and its warps for instance. The first of a list is what a measurement chose for
the sizes of the speed table; it is taken where nothing may be measured: for small work, in the middle of a captured
graph, under `srm_core.deterministic()`, in the interpreter, and with SRM_AUTOTUNE=off.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from srm_backends.triton.launch import INTERPRETED
from srm_core import __version__
from srm_core.config import cache_folder
from srm_core.context import LaunchContext
from srm_core.errors import KernelError
from srm_core.registry import registry

Choice = TypeVar("Choice", bound=tuple[Any, ...])

# Work that takes an H100 some 15 microseconds. Below it the host is what takes time.
FLOPS = 1 << 33
BYTES = 1 << 26
MARGIN = 0.97  # of the first choice's time: another has to be better than noise
log = logging.getLogger(__name__)
_lock = threading.Lock()


class Question(NamedTuple):
    """bucket: what the answer is kept under: strings, numbers, sizes rounded to powers of two. worth: is there enough
    work for a measurement?"""

    bucket: tuple[Any, ...]
    worth: bool
    choices: Sequence[Any]


def choose(
    ctx: LaunchContext, name: str, key: tuple[Any, ...], ask: Callable[[], Question], run: Callable[[Choice], Any]
) -> Choice:
    """One of the choices of `ask()`, the fastest in `run`.

    key: what `ask` looks at beside what all calls of this kind have in common (`LaunchContext.memo`). run: does the
    whole work on the caller's arrays, any number of times, and gives the same result each time. A choice for which it
    raises `KernelError`, because the GPU is too small for it, is passed over.
    """
    key = name, key
    known: Choice | None = ctx.memo.get(key)
    if known is not None:
        return known
    bucket, worth, choices = ask()
    choice: Choice = choices[0]
    if worth and len(choices) > 1 and not INTERPRETED and not ctx.deterministic and registry().config.autotune:
        label = f"{name} {' '.join(map(str, bucket))}"
        with _lock:
            table = _table(ctx.device.index)
            kept = [c for c in choices if json.loads(json.dumps(c)) == table.known.get(label)]
            if kept:
                choice = kept[0]
            elif torch.cuda.is_current_stream_capturing():
                return choice
            else:
                with torch.cuda.device(ctx.device.index):  # the clock is that of the current one
                    choice = _fastest(label, choices, run)
                table.add(label, choice)
    ctx.memo[key] = choice
    return choice


def _fastest(label: str, choices: Sequence[Choice], run: Callable[[Choice], Any]) -> Choice:
    log.info("measuring %d ways of %s", len(choices), label)
    times: dict[int, float] = {}
    for i, choice in enumerate(choices):
        try:
            times[i] = triton.testing.do_bench(lambda c=choice: run(c), warmup=5, rep=25, return_mode="median")
        except KernelError as error:
            log.info("%s: %s cannot run here: %s", label, choice, error)
        except torch.OutOfMemoryError:
            return choices[0]  # there is no room to measure; the caller's own call may still fit
    best = min(times, key=times.__getitem__, default=0)
    if times.get(0, float("inf")) * MARGIN < times.get(best, 0.0):
        best = 0
    log.info("%s: %s of %s ms", label, choices[best], {str(choices[i]): round(t, 4) for i, t in times.items()})
    return choices[best]


class Table:
    """What is known of one GPU with these versions; a JSON object in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not there yet, or damaged: it is measured again
            return {}
        return found if isinstance(found, dict) else {}

    def add(self, label: str, choice: tuple[Any, ...]) -> None:
        """Also on disk, beside what other processes have found; where it cannot be written, for this process alone."""
        self.known = {**self.known, **self._read(), label: json.loads(json.dumps(choice))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump(self.known, file, indent=1, sort_keys=True)
            os.replace(file.name, self.path)
        except OSError as error:
            log.warning("%s: what was measured cannot be kept: %s", self.path, error.strerror)


@cache
def _table(device: int) -> Table:
    of = torch.cuda.get_device_properties(device)
    words = (of.name, f"{of.major}.{of.minor}", "torch", torch.__version__, "triton", triton.__version__, __version__)
    name = "".join(c if c.isalnum() or c in ".-" else "-" for c in "-".join(words))
    return Table(cache_folder() / "triton" / f"{name}.json")
