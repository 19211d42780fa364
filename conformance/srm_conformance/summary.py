"""What a run has come to, for people: operators by checks, with counts."""

from __future__ import annotations

from collections.abc import Sequence

from srm_conformance.certificate import counts, verdict_of
from srm_conformance.checks import CHECKS
from srm_conformance.checks.device import DEVICE_CHECKS
from srm_conformance.session import ABSENT, Ended
from srm_conformance.subject import Subject
from srm_core.registry import registry

LEGEND = "a number: passed; F: failed; x: failed as expected; n: not claimed by the backend"


def matrix(ended: Sequence[Ended], width: int = 100) -> list[str]:
    """Lines of a table, operator by check, in as many parts as the width needs."""
    absent = {e.op: e.message for e in ended if e.check == ABSENT}
    ops = [o for o in registry().specs if o not in absent and any(e.op == o for e in ended)]
    seen = {e.check for e in ended} - {ABSENT}
    checks = [c for c in (*CHECKS, *DEVICE_CHECKS, *sorted(seen)) if c in seen]
    checks = list(dict.fromkeys(checks))
    cells = {(o, c): _cell([e for e in ended if (e.op, e.check) == (o, c)]) for o in ops for c in checks}
    verdicts = {o: verdict_of([e for e in ended if e.op == o]) for o in ops}
    first = max(len(o) for o in ["operator", *ops])
    wide = {c: max(len(c), *(len(cells[o, c]) for o in ops)) for c in checks}
    lines: list[str] = []
    while checks:
        part = [checks.pop(0)]
        while checks and first + sum(wide[c] + 2 for c in [*part, checks[0]]) <= width:
            part.append(checks.pop(0))
        last = "" if checks else "  verdict"
        lines.append("  ".join([f"{'operator':{first}}", *(f"{c:>{wide[c]}}" for c in part)]) + last)
        for o in ops:
            last = "" if checks else f"  {verdicts[o]}"
            lines.append("  ".join([f"{o:{first}}", *(f"{cells[o, c]:>{wide[c]}}" for c in part)]) + last)
        lines.append("")
    for why in dict.fromkeys(absent.values()):
        lines += [f"not claimed: {', '.join(o for o, w in absent.items() if w == why)}: {why}", ""]
    return [*lines, LEGEND]


def _cell(ended: Sequence[Ended]) -> str:
    found = counts(ended)
    parts = [f"{found['passed']}"] if found["passed"] else []
    parts += [
        f"{found[key]}{mark}" for key, mark in (("failed", "F"), ("xfailed", "x"), ("not_claimed", "n")) if found[key]
    ]
    return "+".join(parts) or "-"


def closing(subject: Subject, ended: Sequence[Ended]) -> list[str]:
    """The last lines: what ran, what was loosened, what could not be proved."""
    found, launches = counts(ended), sum(e.launches for e in ended)
    known = f"{subject.distribution} {subject.version}".strip()
    lines = [
        f"backend {subject.backend} ({known}) on {subject.device}: {found['passed']} passed, {found['failed']} failed, "
        f"{found['xfailed']} failed as expected, {found['not_claimed']} not claimed; {launches} kernel launches"
    ]
    for op, looser in subject.profile.looser.items():
        lines.append(f"{op}: may be wrong by {looser.factor:g} times what is allowed: {looser.reason}")
    if not launches:
        lines.append(NOTHING_RAN)
    return lines


NOTHING_RAN = "no kernel ran, so nothing is proved: this is a failure"
