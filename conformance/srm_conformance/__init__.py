"""What decides who is right: the suite that checks any installed backend, and the tolerances that it judges by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srm_conformance.subclass import Conformance as Conformance

__all__ = ["Conformance"]


def __getattr__(name: str) -> Any:
    # pytest loads the plugin in every run of an environment; the suite is imported when it is asked for.
    if name == "Conformance":
        from srm_conformance.subclass import Conformance

        return Conformance
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
