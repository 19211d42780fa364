"""Odd values: NaN, infinity, huge, tiny; and garbage beyond the lengths. Empty arrays and sizes about a block are
cases of the specifications, tagged `edge`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_conformance.checks.layouts import LOOSER
from srm_conformance.checks.values import check_backward, check_forward, drawn
from srm_conformance.items import Item, Target, remembered, sampled
from srm_conformance.outcome import Report
from srm_conformance.tolerances import Judge
from srm_conformance.trial import Trial, Values
from srm_core.spec import Case, TensorSpec

ODD = {"nan": np.nan, "infinity": np.inf, "minus_infinity": -np.inf, "large": 1e6}
TINY = 1e-41  # times an argument: below the smallest normal number of float32, where nothing may become 0
CASES = 4
CONVOLUTIONS = ("conv_bn", "conv_bn_train")
# Whether the zeros about an image, or those between the pixels of a strided gradient, times NaN are NaN is left open;
# so is what an infinite bn_weight gives: infinities cancel if it is folded into the kernels, not if it comes after.
OPEN = {*((op, "weight", word) for op in CONVOLUTIONS for word in ("nan", "infinity", "minus_infinity"))}
OPEN |= {(op, "bn_weight", word) for op in CONVOLUTIONS for word in ("infinity", "minus_infinity")}


def edges(target: Target) -> Iterator[Item]:
    """One odd value in one argument or in the gradient of one output, or an argument of tiny values."""
    dtype = target.one_half()[0]
    for case in _varied(target, dtype):
        given = _named(target, sampled(target.spec, case, dtype))
        for p in target.spec.tensors:
            if p.many or p.role in ("integer", "mask") or given[p.name] is None or not given[p.name].size:
                continue
            for word in (*ODD, "tiny"):
                if (target.spec.name, p.name, word) in OPEN:
                    continue

                def run(report: Report, case: Case = case, p: TensorSpec = p, word: str = word) -> None:
                    values = sampled(target.spec, case, dtype)
                    array = _named(target, values)[p.name]
                    if word == "tiny":
                        array *= array.dtype.type(TINY)
                    else:
                        array.flat[array.size // 2] = ODD[word]
                    # The spacing of tiny numbers is wide: a sum in another order is off by more of them.
                    looser = max(LOOSER if word == "tiny" else 1.0, target.looser)
                    key = (target.spec.name, case.name, dtype, p.name, word, str(looser))
                    judge = remembered(key, lambda: Judge(target.spec, *values, looser=looser))
                    check_forward(target, values, judge, report)
                    if target.spec.vjp is not None and target.kernel.pulls_back:
                        check_backward(target, values, judge, report)

                yield target.item("edges", (case.name, dtype, p.name, word), run, dtype)
        if target.spec.vjp is None or not target.kernel.pulls_back:
            continue
        padded = target.spec.name in CONVOLUTIONS and sampled(target.spec, case, dtype)[1]["padding"] not in (0, (0, 0))
        for i, output in enumerate(target.spec.outputs):
            if padded and output.format:
                continue  # a gradient of NaN at a pixel whose taps see the zeros about the image

            def odd_gradient(report: Report, case: Case = case, i: int = i) -> None:
                values = sampled(target.spec, case, dtype)
                trial = Trial(target.subject, target.spec, values, target.library, report)
                trial.claimed(gradients=True)
                outputs, pullback = trial.vjp()
                grads = drawn(outputs)
                if grads[i].size:
                    grads[i].flat[grads[i].size // 2] = np.nan
                report.judge(target.judge(case, dtype).backward(grads, trial.pull_back(outputs, pullback, grads)))

            yield target.item("edges", (case.name, dtype, f"gradient of {output.name}", "nan"), odd_gradient, dtype)


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


def _varied(target: Target, dtype: str) -> list[Case]:
    """A few cases that differ in what is given: optional arguments and options. None in which slots are masked, for
    whether NaN spreads from what is masked is left open."""
    chosen: list[Case] = []
    seen: set[tuple[str, str]] = set()
    for _ in range(CASES):
        best, most = None, 0
        for case in target.cases():
            named = _named(target, sampled(target.spec, case, dtype))
            if named.get("attn_mask") is not None or named.get("is_causal") or not _full(target, named):
                continue
            new = len(_given(target, named) - seen)
            if new > most:
                best, most = case, new
        if best is None:
            break
        chosen.append(best)
        seen |= _given(target, _named(target, sampled(target.spec, best, dtype)))
    return chosen


def _given(target: Target, named: dict[str, Any]) -> set[tuple[str, str]]:
    return {(n, "given" if hasattr(v, "shape") else str(v)) for n, v in named.items() if not isinstance(v, tuple)}


def _full(target: Target, named: dict[str, Any]) -> bool:
    return all(getattr(v, "size", 1) for v in named.values())
