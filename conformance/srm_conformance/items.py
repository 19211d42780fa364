"""What the suite consists of: one item for each thing that is checked, named operator/check/case/dtype/…"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from srm_conformance.outcome import Report
from srm_conformance.subject import Subject
from srm_conformance.tolerances import Judge, Law
from srm_core.registry import registry
from srm_core.spec import FLOAT, Case, Kernel, OpSpec

Run = Callable[[Report], None]
MOST = 1024  # of what is remembered of each kind


@dataclass(frozen=True)
class Item:
    """One check of one operator. run(report) returns, or raises `Wrong` or `NotClaimed`."""

    op: str
    check: str
    parts: tuple[str, ...]
    run: Run = field(repr=False, compare=False)
    dtype: str = ""

    @property
    def id(self) -> str:
        return "/".join((self.op, self.check, *self.parts)).replace(" ", "_")


@dataclass(frozen=True)
class Target:
    """A kernel of the subject, and the library whose arrays it is given."""

    subject: Subject
    spec: OpSpec
    kernel: Kernel
    library: str

    def item(self, check: str, parts: tuple[str, ...], run: Run, dtype: str = "") -> Item:
        return Item(self.spec.name, check, parts, run, dtype)

    def cases(self, *tags: str) -> list[Case]:
        """The cases that are small enough to be judged by the reference's loops; of these tags, if some are named."""
        return [c for c in self.spec.cases if "ci" in c.tags and all(t in c.tags for t in tags)]

    def dtypes(self) -> tuple[str, ...]:
        return tuple(d for d in FLOAT if d in self.kernel.dtypes)

    def one_half(self) -> tuple[str, ...]:
        """float32, or what there is instead, and one half type: enough for what does not depend on the dtype."""
        wide = [d for d in ("float32", "float64") if d in self.kernel.dtypes][:1]
        half = [d for d in ("bfloat16", "float16") if d in self.kernel.dtypes][:1]
        return (*wide, *half)

    def judge(self, case: Case, dtype: str, seed: int = 0, precision: str = "ieee") -> Judge:
        return judge_of(self.spec.name, case.name, dtype, seed, precision, self.looser)

    @property
    def looser(self) -> float:
        """By what factor the backend's profile asks for more tolerance."""
        looser = self.subject.profile.looser.get(self.spec.name)
        return looser.factor if looser else 1.0


@lru_cache(maxsize=MOST)
def judge_of(op: str, case: str, dtype: str, seed: int, precision: str, looser: float) -> Judge:
    """What the results of a case are held against: the same for each layout, thread and repetition."""
    spec = registry().spec(op)
    found = next(c for c in spec.cases if c.name == case)
    return Judge(spec, *sampled(spec, found, dtype, seed), precision=precision, looser=looser)


_judges: dict[tuple[str, ...], Judge] = {}


def remembered(key: tuple[str, ...], make: Callable[[], Judge]) -> Judge:
    """What is held against the results of arguments that are made in some way from a case's: `key` says how."""
    if key not in _judges:
        if len(_judges) >= MOST:
            _judges.clear()
        _judges[key] = make()
    return _judges[key]


@lru_cache(maxsize=MOST)
def law_of(op: str, law: str, case: str, dtype: str) -> Law:
    """A law between calls, in a case."""
    spec = registry().spec(op)
    found = next(c for c in spec.cases if c.name == case)
    return Law(spec, next(i for i in spec.invariants if i.name == law), *sampled(spec, found, dtype))


def sampled(spec: OpSpec, case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if spec.sample is None:
        raise TypeError(f"{spec.name}: its specification has cases, but no sample")
    return spec.bind(*spec.sample(case, dtype, seed))


Check = Callable[[Target], Iterator[Item]]
