"""What a kernel does again and again: the same thing, also from many threads at once."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import numpy as np

import srm_core
from srm_conformance.checks.values import drawn
from srm_conformance.items import Item, Target, sampled
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.trial import Trial
from srm_core.spec import Case

RUNS = {"cpu": 3, "cuda": 100, "mps": 20}
THREADS, ROUNDS = 8, 3


def results(target: Target, case: Case, dtype: str, seed: int, report: Report) -> list[Any]:
    """Everything that a case gives: outputs, what was mutated, and gradients if there is a backward."""
    values = sampled(target.spec, case, dtype, seed)
    trial = Trial(target.subject, target.spec, values, target.library, report)
    trial.claimed()
    outputs, mutated = trial.forward()
    gradients: tuple[Any, ...] = ()
    if target.spec.vjp is not None and target.kernel.pulls_back:
        kept, pullback = trial.vjp()
        gradients = trial.pull_back(kept, pullback, drawn(kept, seed))
    return [*outputs, *mutated, *gradients]


def judged(target: Target, case: Case, dtype: str, seed: int, got: list[Any], report: Report, where: str) -> None:
    judge = target.judge(case, dtype, seed)
    count = len(target.spec.differentiable) if target.spec.vjp is not None and target.kernel.pulls_back else 0
    head, gradients = (got[:-count], got[-count:]) if count else (got, [])
    mutated = len(head) - _outputs(target, case, dtype)
    outputs = head[: len(head) - mutated]
    report.judge(judge.forward(outputs, head[len(outputs) :]), where)
    if count:
        report.judge(judge.backward(drawn(outputs, seed), gradients), where)


def _outputs(target: Target, case: Case, dtype: str) -> int:
    from srm_core.contract import Call

    return len(Call(target.spec, *sampled(target.spec, case, dtype)).output_names())


def assert_same(got: list[Any], expected: list[Any], where: str) -> None:
    for i, (a, b) in enumerate(zip_longest(got, expected)):
        if (a is None) != (b is None) or (a is not None and a.tobytes() != b.tobytes()):
            differ = "" if a is None or b is None else f"; got {_first(a, b)}"
            raise Wrong(f"{where}: result {i} is not the same bits{differ}")


def _first(a: Any, b: Any) -> str:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {a.shape}, before {b.dtype} {b.shape}"
    different = np.atleast_1d(a != b)
    index = tuple(int(i) for i in np.unravel_index(int(different.argmax()), different.shape))
    return f"{np.atleast_1d(a)[index]} at {list(index)}, before {np.atleast_1d(b)[index]}"


def determinism(target: Target) -> Iterator[Item]:
    """The same call gives the same bits, where the kernel is declared deterministic."""
    for case in target.cases():
        for dtype in target.one_half():

            def run(report: Report, case: Case = case, dtype: str = dtype) -> None:
                if not target.kernel.deterministic:
                    raise NotClaimed("is not declared deterministic")
                first = results(target, case, dtype, 0, report)
                for i in range(1, RUNS[target.subject.device]):
                    assert_same(results(target, case, dtype, 0, report), first, f"run {i + 1} of the same call")
                # Each of these may have run the forward an even number of times: twice alone, for what takes turns.
                args = sampled(target.spec, case, dtype)
                for _ in range(2):
                    trial = Trial(target.subject, target.spec, args, target.library, report)
                    outputs, mutated = trial.forward()
                    assert_same([*outputs, *mutated], first[: len(outputs) + len(mutated)], "the same call once more")
                with srm_core.deterministic():
                    asked = results(target, case, dtype, 0, report)
                judged(target, case, dtype, 0, asked, report, "under srm_core.deterministic()")

            yield target.item("determinism", (case.name, dtype), run, dtype)


def repeats(target: Target) -> Iterator[Item]:
    """Other values of the same shapes give other results: nothing is remembered by shape."""
    dtype = target.one_half()[0]
    for case in target.cases()[:3]:

        def run(report: Report, case: Case = case) -> None:
            for seed in (0, 1, 0):
                judged(target, case, dtype, seed, results(target, case, dtype, seed, report), report, f"seed {seed}")

        yield target.item("repeats", (case.name, dtype), run, dtype)


def threads(target: Target) -> Iterator[Item]:
    """Threads that call at the same time, each with its own values, get what each would get alone."""
    dtype = target.one_half()[0]
    for case in target.cases()[:3]:

        def run(report: Report, case: Case = case) -> None:
            alone = [results(target, case, dtype, seed, report) for seed in range(THREADS)]
            found: list[list[list[Any]]] = [[] for _ in range(THREADS)]
            with together(THREADS) as start:

                def work(seed: int) -> None:
                    for _ in range(ROUNDS):
                        found[seed].append(results(target, case, dtype, seed, Report()))

                start(work)
            for seed, rounds in enumerate(found):
                for got in rounds:
                    where = f"thread {seed} of {THREADS}"
                    if target.kernel.deterministic:
                        assert_same(got, alone[seed], where)
                    else:
                        judged(target, case, dtype, seed, got, report, where)

        yield target.item("threads", (case.name, dtype), run, dtype)


@contextmanager
def together(count: int) -> Iterator[Any]:
    """`start(work)` runs work(0) … work(count - 1) in threads that begin at once and change places often."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(count)

    def start(work: Any) -> None:
        def one(number: int) -> None:
            try:
                barrier.wait()
                work(number)
            except BaseException as error:
                errors.append(error)

        workers = [threading.Thread(target=one, args=(i,)) for i in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if errors:
            raise errors[0]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield start
    finally:
        sys.setswitchinterval(interval)
