"""Values, gradients, laws: what comes out is what the specification says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import srm_core
from srm_conformance.items import Item, Target, law_of, sampled
from srm_conformance.layouts import PLAIN, Layout, to_numpy
from srm_conformance.outcome import Report, Wrong
from srm_conformance.tolerances import Judge
from srm_conformance.trial import Trial, Values
from srm_core.contract import arrays_of
from srm_core.ops.common import TF32
from srm_core.spec import Case


def drawn(outputs: Any, seed: int = 0) -> list[Any]:
    """Gradients of the outputs: normal values of their shapes and dtypes."""
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(o.shape)).astype(o.dtype) for o in map(to_numpy, outputs)]


def check_forward(
    target: Target, values: Values, judge: Judge, report: Report, layout: Layout = PLAIN, library: str = ""
) -> None:
    """One call, judged."""
    keep = target.spec.mutates if not layout.writeable or layout.repeats is not None else ()
    trial = Trial(target.subject, target.spec, values, library or target.library, report, layout, keep)
    trial.claimed()
    report.judge(judge.forward(*trial.forward()))


def check_backward(
    target: Target, values: Values, judge: Judge, report: Report, layout: Layout = PLAIN, library: str = "",
    grad_layout: Layout = PLAIN,
) -> None:  # fmt: skip
    """The outputs of a forward that keeps residuals, and the gradients of its arguments, judged."""
    trial = Trial(target.subject, target.spec, values, library or target.library, report, layout)
    trial.claimed(gradients=True)
    outputs, pullback = trial.vjp()
    report.judge(judge.forward(tuple(map(to_numpy, outputs))))
    grads = [grad_layout.of(g) for g in drawn(outputs)]
    report.judge(judge.backward(grads, trial.pull_back(outputs, pullback, grads, grad_layout)))


def values(target: Target) -> Iterator[Item]:
    """Each case in each dtype, with arrays of each library that the kernel takes natively."""
    yield from _every_case(target, "values", check_forward)


def gradients(target: Target) -> Iterator[Item]:
    """The same of the backward. A kernel without one does not claim it."""
    if target.spec.vjp is None:
        return
    yield from _every_case(target, "gradients", check_backward)
    dtype = target.one_half()[0]

    def left_out(report: Report) -> None:
        trial = Trial(
            target.subject, target.spec, sampled(target.spec, target.cases()[0], dtype), target.library, report
        )
        trial.claimed(gradients=True)
        outputs, pullback = trial.vjp()
        grads = drawn(outputs)
        for i in range(len(grads)):
            some = [g if k == i else None for k, g in enumerate(grads)]
            full = [g if k == i else np.zeros_like(g) for k, g in enumerate(grads)]
            got, expected = (trial.pull_back(outputs, pullback, g) for g in (some, full))
            for name, a, b in zip(target.spec.differentiable, got, expected, strict=True):
                if (a is None) != (b is None) or (a is not None and not np.array_equal(a, b)):
                    raise Wrong(f"gradient of {name}: one output gradient left out is not the same as zeros")

    yield target.item("gradients", ("left_out", dtype), left_out, dtype)


def _every_case(target: Target, check: str, perform: Callable[..., None]) -> Iterator[Item]:
    for library in target.subject.libraries(target.kernel):
        other = () if library == target.library else (library,)
        for case in target.cases():
            for dtype in target.dtypes():

                def run(report: Report, case: Case = case, dtype: str = dtype, library: str = library) -> None:
                    given = sampled(target.spec, case, dtype)
                    perform(target, given, target.judge(case, dtype), report, library=library)

                yield target.item(check, (case.name, dtype, *other), run, dtype)


def invariants(target: Target) -> Iterator[Item]:
    """The laws between calls, which need no reference."""
    for invariant in target.spec.invariants:
        for case in target.cases():
            for dtype in target.one_half():

                def run(report: Report, law: str = invariant.name, case: Case = case, dtype: str = dtype) -> None:
                    report.judge(law_of(target.spec.name, law, case.name, dtype).judge(numpy_call(target, report)))

                yield target.item("invariants", (invariant.name, case.name, dtype), run, dtype)


def numpy_call(target: Target, report: Report) -> Any:
    """The operator on the backend, as a function of NumPy arrays."""

    def call(*args: Any, **options: Any) -> Any:
        bound, named = target.spec.bind(args, options)
        trial = Trial(target.subject, target.spec, (bound, named), target.library, report)
        trial.claimed()
        outputs, mutated = trial.forward()
        given = {**dict(zip((p.name for p in target.spec.parameters), bound, strict=False)), **named}
        arrays = [array for n in target.spec.mutates for _, array in arrays_of(n, given[n])]
        for array, after in zip(arrays, mutated, strict=True):
            array[...] = after
        return target.spec.pack(outputs)

    return call


def tf32(target: Target) -> Iterator[Item]:
    """Under the precision "tf32" products may be rounded, and nothing else."""
    if TF32 not in target.spec.permitted_roundings or "float32" not in target.kernel.dtypes:
        return
    for case in target.cases()[:4]:

        def run(report: Report, case: Case = case) -> None:
            with srm_core.precision("tf32"):
                judge = target.judge(case, "float32", precision="tf32")
                check_forward(target, sampled(target.spec, case, "float32"), judge, report)
                if target.spec.vjp is not None and target.kernel.pulls_back:
                    check_backward(target, sampled(target.spec, case, "float32"), judge, report)

        yield target.item("tf32", (case.name,), run, "float32")
