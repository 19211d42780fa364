"""The suite tests itself: with its results damaged in one element, the kernel must be found to be wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from srm_conformance.checks.values import check_forward
from srm_conformance.items import Item, Target, sampled
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.proof import broken
from srm_core.arrays import library_of


def self_test(target: Target) -> Iterator[Item]:
    """The first case that the kernel takes, once as it is and once damaged."""

    def run(report: Report) -> None:
        refused = ""
        for dtype in target.one_half():
            for case in target.cases():
                given = sampled(target.spec, case, dtype)
                judge = target.judge(case, dtype)
                damaged: list[bool] = []
                try:
                    check_forward(target, given, judge, Report())
                except NotClaimed as no:
                    refused = refused or str(no)
                    continue
                except Wrong:
                    return  # it can fail, as it just did; the check of this case says of what
                try:
                    with broken(_damage(damaged)):
                        check_forward(target, given, judge, report)
                except Wrong:
                    return
                if any(damaged):
                    raise Wrong(f"{case.name}, {dtype}: one element was damaged, and the suite did not notice")
        raise NotClaimed(refused or "no case has an element")

    yield target.item("self-test", ("damaged",), run)


def _damage(damaged: list[bool]) -> Callable[[Any, tuple[Any, ...]], None]:
    """Change the last element of the first array that has one: of the results, or else of what was mutated."""

    def spoil(result: Any, arguments: tuple[Any, ...]) -> None:
        array = next((a for a in _arrays([result]) or _arrays(arguments) if 0 not in a.shape), None)
        if array is not None:
            last = (-1,) * len(array.shape)
            array[last] = 3 - 2 * array[last]  # neither 1, its fixed point, nor NaN stands there in a sample
        damaged.append(array is not None)

    return spoil


def _arrays(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        if isinstance(value, tuple):
            found += _arrays(value)
        elif library_of(value) is not None:
            found.append(value)
    return found
