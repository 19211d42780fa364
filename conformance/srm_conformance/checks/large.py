"""Arrays of more than 2**31 elements: a small batch, judged by the reference, repeated until it is so large.

A sequence does not see its neighbours, and statistics of a batch stay those of its repetitions. So each row of the
large result must be good for the small one; they are judged in the first and the last rows, and about where 2**31
elements and 2**32 bytes end. They need not have its bits: a library may multiply larger matrices in another order.
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
        judge = target.judge(case, dtype)
        report.judge(judge.forward(trial.forward()[0]))
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
        outputs = list(zip(target.spec.outputs, target.spec.unpack(result), strict=True))
        for start in _starts(copies * batch, batch, per_batch // batch):
            rows = slice(start, start + batch)
            found = [to_numpy(large_one[rows] if o.axes.split()[0] == "B" else large_one) for o, large_one in outputs]
            try:
                report.judge(judge.forward(tuple(found)))
            except Wrong as error:
                raise Wrong(f"rows {start} to {start + batch - 1} of {copies * batch}: {error}") from error

    yield target.item("large", (case.name, dtype), run, dtype)


def _batched(target: Target) -> list[str]:
    """The parameters whose first axis is the batch."""
    return [p.name for p in target.spec.tensors if p.axes[0].split()[:1] in (["B"], ["B?"])]


def _tiled(array: Any, copies: int) -> Any:
    module = sys.modules[library_of(array) or "numpy"]
    return module.tile(array, (copies, *(1 for _ in array.shape[1:])))


def _starts(rows: int, batch: int, per_row: int) -> list[int]:
    """Of the batches that are looked at."""
    edges = {0, rows - batch, *(e // per_row // batch * batch for e in (2**30, ELEMENTS - 1, ELEMENTS))}
    return sorted(e for e in edges if 0 <= e <= rows - batch)
