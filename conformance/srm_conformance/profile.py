"""What a plugin tells the suite of its backend, through the hook `srm_conformance_profile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Looser:
    """An operator whose results may be wrong by `factor` times what the suite would allow, and why.

    The reason is printed with every run, and is part of the certificate.
    """

    factor: float
    reason: str

    def __post_init__(self) -> None:
        if not self.factor > 1 or not self.reason.strip():
            raise ValueError(f"found {self!r}; required a factor above 1 and a reason")


@dataclass(frozen=True)
class Profile:
    """looser: operators that need more tolerance, by name."""

    looser: Mapping[str, Looser] = field(default_factory=dict)
