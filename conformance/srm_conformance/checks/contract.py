"""Wrong calls and predicates: every backend says the same of a wrong call; a yes is a yes, a no has reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import srm_core
from srm_conformance.items import Item, Target, sampled
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.proof import recording
from srm_conformance.trial import Trial
from srm_core.errors import ContractError
from srm_core.spec import ErrorSample


def errors(target: Target) -> Iterator[Item]:
    """A wrong call is refused by the specification, before any kernel runs."""
    for sample in target.spec.error_samples:

        def run(report: Report, sample: ErrorSample = sample) -> None:
            messages = []
            for backend in (target.subject.backend, "reference"):
                args, options = sample.make()
                with recording() as launches:
                    try:
                        srm_core.call(target.spec.name, *args, backend=backend, **options)
                    except ContractError as error:
                        messages.append(str(error))
                        param = error.param.partition("[")[0]
                    except Exception as error:
                        raise Wrong(f"it raised {type(error).__name__}: {error}; required ContractError") from error
                    else:
                        raise Wrong(f"a wrong call was accepted; required ContractError about {sample.param}")
                if launches:
                    raise Wrong(f"{launches[0]} ran on a wrong call")
                if param != sample.param:
                    raise Wrong(f"the error names {param}; required {sample.param}")
            if messages[0] != messages[1]:
                raise Wrong(f"it says {messages[0]!r}, the reference {messages[1]!r}")

        yield target.item("errors", (sample.name,), run)


def predicates(target: Target) -> Iterator[Item]:
    """What is declared is taken in some case at least; the same question has one answer; a no has reasons."""
    for dtype in target.dtypes():

        def run(report: Report, dtype: str = dtype) -> None:
            taken: Counter[bool] = Counter()
            backward = refused = ""
            for case in target.cases():
                values = sampled(target.spec, case, dtype)
                answers = []
                for _ in range(2):
                    trial = Trial(target.subject, target.spec, values, target.library, report)
                    try:
                        trial.claimed()
                        answers.append("")
                    except NotClaimed as no:
                        answers.append(str(no))
                if answers[0] != answers[1]:
                    raise Wrong(f"{case.name}: it said {answers[0] or 'yes'!r}, then {answers[1] or 'yes'!r}")
                taken[not answers[0]] += 1
                refused = refused or answers[0]
                if not answers[0] and target.kernel.pulls_back and not backward:
                    trial.claimed(gradients=True)
                    backward = case.name
            if not taken[True]:
                raise Wrong(f"it declares {dtype}, and takes none of {taken[False]} cases of it: {refused}")

        yield target.item("predicates", (dtype,), run, dtype)
