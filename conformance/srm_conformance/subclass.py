"""The suite as a class, for those who want it in their own test tree."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from srm_conformance.plugin import perform
from srm_conformance.session import Options, Session


class Conformance:
    """A subclass is a test class with one test for each item of its backend:

        from srm_conformance import Conformance

        class TestMine(Conformance):
            backend = "mine"

    ops: only these operators. The other attributes are the options of the command line.
    """

    backend: ClassVar[str] = ""
    device: ClassVar[str] = "cpu"
    arrays: ClassVar[str | None] = None
    ops: ClassVar[tuple[str, ...]] = ()
    xfails: ClassVar[Path | None] = None
    profile: ClassVar[str] = "ci"
    large: ClassVar[bool] = False
    _session: ClassVar[Session | None] = None

    @classmethod
    def session(cls) -> Session:
        """The items of this class. Errors: as the command line's."""
        if "_session" not in vars(cls) or cls._session is None:
            options = Options(
                cls.backend, cls.device, cls.arrays, cls.ops, "", cls.xfails, cls.profile, large=cls.large
            )
            cls._session = Session(options)
        return cls._session

    def test_conforms(self, srm_item: Any, request: pytest.FixtureRequest) -> None:
        """One item of the suite."""
        perform(request.node, self.session(), srm_item)
