"""Sizes, seeds and layouts that nobody thought of, drawn by hypothesis from the specification's own cases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

from hypothesis import HealthCheck, assume, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from srm_conformance.checks.layouts import LOOSER, fitted
from srm_conformance.checks.values import check_backward, check_forward
from srm_conformance.items import Item, Target, sampled
from srm_conformance.layouts import LAYOUTS, PLAIN
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.tolerances import Judge
from srm_conformance.trial import Values
from srm_core.contract import Call
from srm_core.spec import Case

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257)
MOST = 20_000  # the product of a case's extents, so that the reference's loops stay short
EXAMPLES = {"ci": 12, "wide": 300}


def random(target: Target, profile: str = "ci", number: int = 0) -> Iterator[Item]:
    """profile: "ci" draws the same few examples each time, "wide" many, from the seed `number`."""
    layouts = [PLAIN, *(x for x in LAYOUTS if target.library in x.libraries)]
    for dtype in target.dtypes():

        def run(report: Report, dtype: str = dtype) -> None:
            tried = []

            @st.composite
            def cases(draw: st.DrawFn) -> Case:
                case = draw(st.sampled_from(target.cases()))
                sizes = {n: draw(st.just(e) | st.sampled_from(SIZES)) for n, e in case.dims.items()}
                assume(prod(max(1, n) for n in sizes.values()) <= MOST)
                return replace(case, dims=sizes)

            @settings(
                max_examples=EXAMPLES[profile], derandomize=profile == "ci", database=None, deadline=None,
                suppress_health_check=list(HealthCheck), print_blob=False,
            )  # fmt: skip
            @given(cases(), st.integers(0, 99), st.sampled_from(layouts))
            def one(case: Case, draw: int, layout: Any) -> None:
                values = _sample(target, case, dtype, draw)
                assume(values is not None)
                assert values is not None
                values = fitted(target, values, layout)
                judge = Judge(target.spec, *values, looser=LOOSER)
                tried.append(case)
                try:
                    check_forward(target, values, judge, report, layout)
                    if target.spec.vjp is not None and target.kernel.pulls_back:
                        check_backward(target, values, judge, report, layout)
                except NotClaimed:
                    assume(False)
                except Wrong as wrong:
                    sizes = ", ".join(f"{n}={e}" for n, e in case.dims.items())
                    raise Wrong(f"case {case.name} with {sizes}, seed {draw}, layout {layout.name}: {wrong}") from None

            try:
                (one if profile == "ci" else seed(number)(one))()
            except Unsatisfiable:
                if tried:
                    raise
                raise NotClaimed("it takes none of the calls that were drawn") from None

        yield target.item("random", (dtype,), run, dtype)


def _sample(target: Target, case: Case, dtype: str, draw: int) -> Values | None:
    """A sample of the case in other sizes, or None where they do not go together."""
    try:
        values = sampled(target.spec, case, dtype, draw)
        call = Call(target.spec, *values)
        if target.spec.check_values is not None:
            target.spec.check_values(call.dims, *values[0], **values[1])
    except (ValueError, IndexError, ZeroDivisionError, TypeError, KeyError):
        return None
    return values
