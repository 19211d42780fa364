"""Odd values: NaN, infinity, huge, tiny; and garbage beyond the lengths. Empty arrays and sizes about a block are
cases of the specifications, tagged `edge`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_conformance.checks.values import check_backward, check_forward, drawn
from srm_conformance.items import Item, Target, sampled
from srm_conformance.outcome import Report
from srm_conformance.tolerances import Judge
from srm_conformance.trial import Trial, Values
from srm_core.spec import Case, TensorSpec

ODD = {"nan": np.nan, "infinity": np.inf, "minus_infinity": -np.inf, "huge": 1e30, "tiny": 1e-42}


def edges(target: Target) -> Iterator[Item]:
    """One odd value in one argument, in two cases: the first one, and the one with the most arguments."""
    dtype = target.one_half()[0]
    for case in _two(target):
        for p in target.spec.tensors:
            if p.many or p.role in ("integer", "mask") or _of(target, case, dtype, p) is None:
                continue
            for word, value in ODD.items():

                def run(report: Report, case: Case = case, p: TensorSpec = p, value: float = value) -> None:
                    given = sampled(target.spec, case, dtype)
                    array = _named(target, given)[p.name]
                    array.flat[array.size // 2] = value
                    judge = Judge(target.spec, *given)
                    check_forward(target, given, judge, report)
                    if target.spec.vjp is not None and target.kernel.pulls_back:
                        check_backward(target, given, judge, report)

                yield target.item("edges", (case.name, dtype, p.name, word), run, dtype)


def lengths(target: Target) -> Iterator[Item]:
    """What stands beyond a length changes nothing: neither values, nor gradients."""
    for case in target.cases():
        for dtype in target.dtypes():
            given = sampled(target.spec, case, dtype)
            if given[1].get("lengths") is None:
                break

            def run(report: Report, case: Case = case, dtype: str = dtype) -> None:
                clean, dirty = sampled(target.spec, case, dtype), sampled(target.spec, case, dtype)
                n = dirty[1]["lengths"]
                for p in target.spec.tensors:
                    array = _named(target, dirty)[p.name]
                    if array is not None and _over_time(p, array, clean, target):
                        _garbage(array, n)
                judge = target.judge(case, dtype)
                check_forward(target, dirty, judge, report)
                if target.spec.vjp is None or not target.kernel.pulls_back:
                    return
                trial = Trial(target.subject, target.spec, dirty, target.library, report)
                trial.claimed(gradients=True)
                outputs, pullback = trial.vjp()
                grads = drawn(outputs)
                bad = [g.copy() for g in grads]
                _garbage(bad[0], n)
                report.judge(judge.backward(grads, trial.pull_back(outputs, pullback, bad)))

            yield target.item("lengths", (case.name, dtype), run, dtype)


def _garbage(array: Any, lengths: Any) -> None:
    for b, n in enumerate(lengths):
        array[b, n:] = np.nan


def _over_time(p: TensorSpec, array: Any, values: Values, target: Target) -> bool:
    """Is this argument (B, T, …), of more than one step?"""
    axes = p.axes[0].split()
    return axes[:2] == ["B", "T"] and array.ndim == len(axes) and array.shape[1] > 1 and p.role != "integer"


def _named(target: Target, given: Values) -> dict[str, Any]:
    args, options = given
    return {**dict(zip((p.name for p in target.spec.parameters), args, strict=False)), **options}


def _of(target: Target, case: Case, dtype: str, p: TensorSpec) -> Any:
    array = _named(target, sampled(target.spec, case, dtype))[p.name]
    return array if array is not None and array.size else None


def _two(target: Target) -> list[Case]:
    """The first case, and that with the most arguments, of those in which no slot is masked: whether what is masked
    may be NaN is left open."""
    dtype = target.one_half()[0]
    counts: dict[str, int] = {}
    for case in target.cases():
        named = _named(target, sampled(target.spec, case, dtype))
        if named.get("attn_mask") is None and not named.get("is_causal"):
            counts[case.name] = sum(v is not None and getattr(v, "size", 0) > 0 for v in named.values())
    best = max(counts, key=lambda name: counts[name], default="")
    first = next(iter(counts), "")
    return [c for c in target.cases() if c.name in (first, best)]
