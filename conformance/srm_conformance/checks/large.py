"""Arrays of more than 2**31 elements: a small batch, judged by the reference, repeated until it is so large.

A sequence does not see its neighbours. So each row of the large result must be that of the small one; it is looked at
in the first and the last rows, and about where 2**31 elements and 2**32 bytes end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from math import prod
from typing import Any

from srm_conformance.items import Item, Target, sampled
from srm_conformance.layouts import to_numpy
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.proof import recording
from srm_conformance.trial import Trial
from srm_core.arrays import library_of
from srm_core.errors import KernelError

ELEMENTS = 2**31


def large(target: Target) -> Iterator[Item]:
    """The first case of more than one sequence, in the smallest dtype."""
    dtype = target.one_half()[-1]
    case = next((c for c in target.cases() if c.dims.get("B", 0) > 1), None)
    if case is None or target.spec.mutates or any(o.many for o in target.spec.outputs):
        return

    def run(report: Report) -> None:
        trial = Trial(target.subject, target.spec, sampled(target.spec, case, dtype), target.library, report)
        trial.claimed()
        expected, _ = trial.forward()
        report.judge(target.judge(case, dtype).forward(expected))
        given = trial.named()
        batch = case.dims["B"]
        batched = {n for n in _batched(target) if given[n] is not None and given[n].shape[0] == batch}
        per_batch = max(prod(given[n].shape) for n in batched)
        copies = ELEMENTS // per_batch + 1
        try:
            big = {n: _tiled(v, copies) if n in batched else v for n, v in given.items()}
            with recording() as launches:
                result = target.subject.call(target.spec, big)
        except (MemoryError, KernelError) as error:
            if "memory" not in f"{error} {error.__cause__}".lower():
                raise Wrong(f"{copies} copies of the batch: it raised {error}") from error
            raise NotClaimed(f"there is not enough memory here: {error}") from error
        report.launches += len(launches)
        for output, large_one, small in zip(target.spec.outputs, target.spec.unpack(result), expected, strict=True):
            if output.axes.split()[0] == "B":
                _compare(output.name, large_one, small, per_batch // batch)

    yield target.item("large", (case.name, dtype), run, dtype)


def _batched(target: Target) -> list[str]:
    """The parameters whose first axis is the batch."""
    return [p.name for p in target.spec.tensors if p.axes[0].split()[:1] in (["B"], ["B?"])]


def _tiled(array: Any, copies: int) -> Any:
    module = sys.modules[library_of(array) or "numpy"]
    return module.tile(array, (copies, *(1 for _ in array.shape[1:])))


def _compare(name: str, big: Any, small: Any, per_row: int) -> None:
    rows, n = big.shape[0], len(small)
    edges = {0, rows - n, *(e // per_row // n * n for e in (2**30, ELEMENTS - 1, ELEMENTS))}
    for start in sorted(e for e in edges if 0 <= e <= rows - n):
        if to_numpy(big[start : start + n]).tobytes() != small.tobytes():
            raise Wrong(f"{name}: rows {start} to {start + n - 1} of {rows} are not those of the small batch")
