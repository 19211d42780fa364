"""How an item ends: right, wrong, or not claimed; and what it has to report."""

from __future__ import annotations

from collections.abc import Sequence

from srm_conformance.tolerances import Judgement


class Wrong(AssertionError):
    """The backend does something that it may not; each line says what."""


class NotClaimed(Exception):
    """The backend does not say that it can do this: nothing was checked."""


class Report:
    """What an item has seen: how many kernels ran, and the worst error over what was allowed."""

    def __init__(self) -> None:
        self.launches = 0
        self.worst = 0.0
        self.worst_of = ""

    def judge(self, judgements: Sequence[Judgement], where: str = "") -> None:
        """Take note of judgements. Errors: `Wrong` with those that are not right."""
        for j in judgements:
            if j.measure in ("frobenius", "row", "peak") and j.ok and j.ratio >= self.worst:
                self.worst, self.worst_of = float(j.ratio), j.what
        wrong = [str(j) for j in judgements if not j.ok]
        if wrong:
            raise Wrong("\n".join(f"{where}: {w}" if where else w for w in wrong))
