"""Choosing a kernel: who is asked, in which order, and every reason why one cannot."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from srm_core import certificates
from srm_core.bridge import view_library
from srm_core.config import Selection, State, parse_selection
from srm_core.contract import Call, arrays_of
from srm_core.errors import ConfigError, ContractError, KernelError, UndeclaredFeature
from srm_core.registry import Entry, Registry, checked_reasons, resolve
from srm_core.spec import COMMON_FEATURES, Feature, Reason


@dataclass(frozen=True)
class Candidate:
    """A backend that was asked: why not, or () if it can; None if it was not asked any more."""

    backend: str
    reasons: tuple[Reason, ...] | None
    entry: Entry | None = field(default=None, repr=False, compare=False)
    platform: str = field(default="cpu", repr=False, compare=False)

    @property
    def conformance(self) -> str:
        """What its certificate says of the operator; read from its file at each look."""
        return certificates.verdict(self.entry, self.platform) if self.entry is not None else ""


@dataclass(frozen=True)
class Decision:
    """Which backend runs a call, and why. `chosen` is None if no candidate can."""

    op: str
    call: str
    chosen: str | None
    why: str
    selection: str
    source: str
    candidates: tuple[Candidate, ...]
    entry: Entry | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        wide = max([len("backend"), *(len(c.backend) for c in self.candidates)])
        lines = [self.call, f"chosen: {self.chosen or 'none'} ({self.why})", ""]
        return "\n".join(lines + [f"{name:{wide}}  {why}" for name, why in self.rows()])

    def rows(self) -> list[tuple[str, str]]:
        """(backend, what it said) for each candidate."""
        return [(c.backend, "runs it" if c.backend == self.chosen else _reasons(c)) for c in self.candidates]


def _reasons(candidate: Candidate) -> str:
    if candidate.reasons is None:
        return "not asked: an earlier one runs"
    if not candidate.reasons:
        return "could run it"
    return "; ".join(str(r) for r in candidate.reasons)


class View:
    """What a predicate sees of a call: the declared features, and nothing else.

    `view.dtype`, `view.platform`, `view.array_library` are always declared; others are read as `view[feature]`.
    """

    __slots__ = ("_call", "_declared")

    def __init__(self, call: Call, declared: tuple[Feature, ...]) -> None:
        self._call, self._declared = call, declared

    def __getitem__(self, feature: Feature) -> Any:
        if feature not in self._declared:
            known = ", ".join(f.name for f in self._declared)
            raise UndeclaredFeature(
                f"{self._call.spec.name}: the predicate reads {getattr(feature, 'name', feature)!r}, which is not "
                f"declared; declared: {known}; add it to the kernel's features"
            )
        return feature.read(self._call)

    def __getattr__(self, name: str) -> Any:
        for feature in COMMON_FEATURES:
            if feature.name == name:
                return feature.read(self._call)
        raise UndeclaredFeature(
            f"{self._call.spec.name}: the predicate reads {name!r}; required dtype, platform, array_library, "
            "or view[feature] with a declared feature"
        )


def decide(
    found: Registry,
    call: Call,
    state: State,
    backend: str | None = None,
    *,
    gradients: bool = False,
    all_of: bool = False,
) -> Decision:
    """Ask the candidates in order. `all_of` goes on asking after one can run, for explain."""
    op = call.spec.name
    if backend is not None:
        selection = parse_selection(backend, "backend=")
        found.check_selection(selection)
    else:
        selection = state.selection or found.selection(op)
    asked: list[Candidate] = []
    chosen: Entry | None = None
    for name, entry in found.candidates(op, selection, call.array_library):
        if chosen is not None and not all_of:
            asked.append(Candidate(name, None, entry, call.platform))
            continue
        reasons = tuple(_why_not(found, entry, call, state, gradients))
        asked.append(Candidate(name, reasons, entry, call.platform))
        if chosen is None and not reasons:
            chosen = entry
    why = _why(chosen, selection, call) if chosen else f"{selection.source} selects {selection}"
    return Decision(
        op, describe(call), chosen.backend.name if chosen else None, why,
        str(selection), selection.source, tuple(asked), chosen,
    )  # fmt: skip


def _why(entry: Entry, selection: Selection, call: Call) -> str:
    name = entry.backend.name
    if name in selection.names:
        return f"named by {selection.source}"
    if call.array_library in entry.kernel.arrays:
        return f"auto: takes {call.array_library} arrays natively, rank {entry.kernel.rank}"
    return f"auto: takes {call.array_library} arrays as views, rank {entry.kernel.rank}"


def _why_not(found: Registry, entry: Entry | None, call: Call, state: State, gradients: bool) -> Iterator[Reason]:
    """Every reason why this kernel cannot take this call; what needs an import is asked last."""
    if entry is None:
        yield Reason("no-kernel", f"has no kernel for {call.spec.name}")
        return
    kernel = entry.kernel
    reasons = []
    if call.platform not in kernel.platforms:
        runs = f"runs on {', '.join(kernel.platforms)}; the arrays are on {call.platform}"
        reasons.append(_mismatch("platform", runs, call.platform, kernel.platforms, "move the arrays there"))
    elif view_library(call, kernel.arrays) is None:
        takes = f"takes arrays of {', '.join(kernel.arrays)}, not of {call.array_library}"
        reasons.append(_mismatch("library", takes, call.array_library, kernel.arrays))
    if call.dtype not in kernel.dtypes:
        takes = f"takes {', '.join(kernel.dtypes)}, not {call.dtype}"
        reasons.append(_mismatch("dtype", takes, call.dtype, kernel.dtypes, "cast the arrays"))
    if state.deterministic and not kernel.deterministic:
        reasons.append(Reason("nondeterministic", "is not deterministic, which srm_core.deterministic() asks for"))
    if gradients and not kernel.pulls_back:
        reasons.append(Reason("no-backward", "has no backward"))
    yield from reasons
    runnable = found.runnable(entry.backend, entry.plugin)
    yield from runnable
    if kernel.supports is not None and not reasons and not runnable:
        view = View(call, (*COMMON_FEATURES, *call.spec.features, *kernel.features))
        try:
            yield from checked_reasons(resolve(kernel.supports)(view))
        except UndeclaredFeature:
            raise
        except (Exception, SystemExit) as error:
            yield Reason("predicate-failed", f"its predicate raised {type(error).__name__}: {error}")


PASSED = (ContractError, KernelError)  # a kernel that raises one of these means the caller to have it as it is


def kernel_error(decision: Decision, error: Exception, direction: str = "forward") -> KernelError:
    return KernelError(
        f"{decision.op}: the {direction} kernel of backend {decision.chosen!r} raised "
        f"{type(error).__name__}: {error}; call: {decision.call}"
    )


def no_backend(decision: Decision) -> str:
    reasons = " | ".join(f"{c.backend}: {_reasons(c)}" for c in decision.candidates) or "there are no backends"
    return f"{decision.call}: no backend of {decision.selection!r} ({decision.source}) can run it: {reasons}"


def _mismatch(code: str, message: str, found: str, allowed: tuple[str, ...], hint: str = "") -> Reason:
    return Reason(code, message, found=found, required=", ".join(allowed), hint=hint)


def describe(call: Call) -> str:
    """The call in one line, such as scan(gates=float32[2,8,4], reverse=False)."""
    parts = []
    for name, value in call.values.items():
        if value is None:
            continue
        for one, array in arrays_of(name, value):
            if one in call.dtypes:
                parts.append(f"{one}={call.dtypes[one]}[{','.join(map(str, array.shape))}]")
        if name not in call.dtypes and f"{name}[0]" not in call.dtypes:
            parts.append(f"{name}={value}")
    return f"{call.spec.name}({', '.join(parts)}) on {call.array_library}/{call.platform}"


def trace(found: Registry, decision: Decision) -> None:
    if found.config.trace is None:
        return
    row = {
        "time": time.time(), "pid": os.getpid(), "thread": threading.get_ident(), "op": decision.op,
        "call": decision.call, "chosen": decision.chosen, "why": decision.why,
        "selection": decision.selection, "source": decision.source,
        "candidates": [
            {"backend": c.backend, "reasons": None if c.reasons is None else [r.code for r in c.reasons]}
            for c in decision.candidates
        ],
    }  # fmt: skip
    # Opened for each line, in append mode: whole lines from any thread, and from both sides of a fork.
    try:
        with open(found.config.trace, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise ConfigError(f"SRM_TRACE={found.config.trace}: cannot be written ({error.strerror})") from None
