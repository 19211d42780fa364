"""The same values in other layouts: strides, offsets, alignments, read-only memory, stride 0."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from srm_conformance.checks.values import check_backward, check_forward
from srm_conformance.items import Item, Target, remembered, sampled
from srm_conformance.layouts import LAYOUTS, Layout
from srm_conformance.outcome import Report
from srm_conformance.tolerances import Judge
from srm_conformance.trial import Values
from srm_core.spec import Case

# Of values that nobody has looked at, some cancel: a sum in another order is off by more than the rounding model is.
# What these checks are for, a stride or a size that is mistaken, is wrong by far more.
LOOSER = 4.0


def layouts(target: Target) -> Iterator[Item]:
    """Each case in each layout, forward and backward; the output gradients in the layout, too."""
    for layout in LAYOUTS:
        if target.library not in layout.libraries:
            continue
        # Equal values need a truth of their own, which takes time: one dtype will do.
        dtypes = target.one_half() if layout.repeats is None else target.one_half()[:1]
        for case in target.cases():
            if layout.other_integers and not _has_integers(sampled(target.spec, case, dtypes[0])):
                continue
            for dtype in dtypes:

                def run(report: Report, layout: Layout = layout, case: Case = case, dtype: str = dtype) -> None:
                    given = fitted(target, sampled(target.spec, case, dtype), layout)
                    judge = target.judge(case, dtype)
                    if layout.repeats is not None:
                        judge = remembered(
                            (target.spec.name, case.name, dtype, layout.name), partial(_lenient, target, given)
                        )
                    check_forward(target, given, judge, report, layout)
                    if target.spec.vjp is not None and target.kernel.pulls_back:
                        check_backward(target, given, judge, report, layout, grad_layout=layout)

                yield target.item("layouts", (case.name, dtype, layout.name), run, dtype)


def _lenient(target: Target, given: Values) -> Judge:
    return Judge(target.spec, *given, looser=LOOSER)


def _has_integers(given: Values) -> bool:
    return any(getattr(v, "dtype", None) in ("int32", "int64") for v in (*given[0], *given[1].values()))


def fitted(target: Target, given: Values, layout: Layout) -> Values:
    """The values as the layout can hold them; what is mutated stays as it is."""
    args, options = given
    names = [p.name for p in target.spec.parameters]

    def of(name: str, value: object) -> object:
        if name in target.spec.mutates or not hasattr(value, "dtype"):
            return value
        return layout.of(value)

    return (
        tuple(of(n, v) for n, v in zip(names, args, strict=False)),
        {n: of(n, v) for n, v in options.items()},
    )
