"""A run of the suite: which items there are, and how each of them ends."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Literal

from srm_conformance.checks import CHECKS
from srm_conformance.checks.device import DEVICE_CHECKS
from srm_conformance.checks.large import large
from srm_conformance.checks.random import EXAMPLES, random
from srm_conformance.items import Check, Item, Target
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.subject import Subject
from srm_conformance.xfails import matching, read, unmatched
from srm_core.errors import ConfigError, UnknownNameError
from srm_core.registry import registry

ABSENT = "kernel"  # the check of an operator for which there is nothing to run
Verdict = Literal["passed", "failed", "not claimed", "xfailed"]


@dataclass(frozen=True)
class Options:
    """What is checked, and how."""

    backend: str
    device: str = "cpu"
    arrays: str | None = None
    ops: tuple[str, ...] = ()
    only: str = ""
    xfails: Path | None = None
    profile: str = "ci"
    seed: int = 0
    large: bool = False


@dataclass(frozen=True)
class Ended:
    """How an item ended. worst: the largest error over what was allowed, and of what; launches: of kernels."""

    backend: str
    device: str
    id: str
    op: str
    check: str
    dtype: str
    verdict: Verdict
    message: str = ""
    worst: float = 0.0
    worst_of: str = ""
    launches: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Session:
    """The items of a backend. Errors: `ConfigError`, `UnknownNameError` for options that make no sense."""

    def __init__(self, options: Options) -> None:
        self.options = options
        if options.profile not in EXAMPLES:
            raise ConfigError(f"--srm-profile: found {options.profile!r}; required one of {', '.join(EXAMPLES)}")
        self.subject = Subject(options.backend, options.device, options.arrays)
        known = registry().specs
        for op in options.ops:
            if op not in known:
                raise UnknownNameError("operator", op, known, source="--srm-op")
        self.xfails = [] if options.xfails is None else read(options.xfails, options.device)
        everything = list(self._all())
        lost = unmatched(self.xfails, (i.id for i in everything))
        if lost:
            raise ConfigError(
                f"{options.xfails}: {lost[0].id} matches no item of backend {options.backend!r} on {options.device}; "
                "take the entry out, or mend its id"
            )
        ops = options.ops or tuple(known)
        self.items = [i for i in everything if i.op in ops and (not options.only or fnmatchcase(i.id, options.only))]
        if not self.items:
            what = f"--srm-only {options.only!r}" if options.only else f"the operators {', '.join(ops)}"
            raise ConfigError(f"{what}: no item of backend {options.backend!r} is called so; see --collect-only")

    def _all(self) -> Iterator[Item]:
        runnable = self.subject.runnable()
        for spec in self.subject.specs():
            kernel = self.subject.kernel(spec.name)
            libraries = self.subject.libraries(kernel) if kernel else ()
            if kernel is None:
                yield _absent(spec.name, "it has no kernel for it")
            elif runnable:
                yield _absent(spec.name, "; ".join(map(str, runnable)))
            elif not libraries:
                yield _absent(
                    spec.name,
                    f"its kernel takes arrays of {', '.join(kernel.arrays)} on {', '.join(kernel.platforms)}; none of "
                    f"these libraries is installed and sees {self.subject.device}",
                )
            elif not spec.cases:
                yield _absent(spec.name, "its specification has no cases")
            else:
                yield from self._of(Target(self.subject, spec, kernel, libraries[0]))

    def _of(self, target: Target) -> Iterator[Item]:
        checks: dict[str, Check] = {
            **CHECKS,
            "random": partial(random, profile=self.options.profile, number=self.options.seed),
        }
        if self.subject.device == "cuda":
            checks |= DEVICE_CHECKS
        if self.options.large:
            checks["large"] = large
        for check in checks.values():
            yield from check(target)

    def run(self, item: Item) -> Ended:
        """Run an item, within `proof.watched()`."""
        report, start = Report(), time.perf_counter()
        known = matching(self.xfails, item.id)
        verdict: Verdict = "passed"
        message = ""
        try:
            # What the caller's settings do to warnings is theirs; a kernel may warn of nothing.
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                item.run(report)
            if known:
                verdict = "failed"
                message = f"it passes, and was expected to fail ({known.reason}); take its entry out of the xfails"
        except NotClaimed as no:
            verdict, message = "not claimed", str(no)
        except Wrong as wrong:
            verdict, message = "failed", str(wrong)
        except Exception as error:  # a kernel's result may be such that the suite itself stumbles over it
            verdict, message = "failed", f"the check could not be made: {type(error).__name__}: {error}"
        if known and verdict == "failed" and not message.startswith("it passes"):
            verdict, message = "xfailed", f"{known.reason} (until {known.expires}): {message}"
        if verdict == "failed":
            message = self._explained(item, message)
        return Ended(
            self.options.backend, self.options.device, item.id, item.op, item.check, item.dtype, verdict, message,
            report.worst, report.worst_of, report.launches, time.perf_counter() - start,
        )  # fmt: skip

    def _explained(self, item: Item, message: str) -> str:
        about = f"{item.op} on {self.options.backend} ({self.options.device}), {item.check}: {', '.join(item.parts)}"
        return f"{about}\n{message}\nreproduce: {self.command(item.id)}"

    def command(self, item: str) -> str:
        """The line that runs this item alone."""
        o = self.options
        words = ["pytest --pyargs srm_conformance --srm-backend", o.backend, "--srm-only", shlex.quote(item)]
        if o.device != "cpu":
            words += ["--srm-device", o.device]
        if o.arrays:
            words += ["--srm-arrays", o.arrays]
        if o.profile != "ci":
            words += ["--srm-profile", o.profile, "--srm-seed", str(o.seed)]
        return " ".join(words)


def _absent(op: str, why: str) -> Item:
    def run(report: Report) -> None:
        raise NotClaimed(why)

    return Item(op, ABSENT, ("none",), run)
