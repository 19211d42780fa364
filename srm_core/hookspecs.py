"""The hooks a plugin may implement. Mark them with `srm_core.hookimpl`; implement the ones you need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from srm_core.decision import Decision
    from srm_core.spec import BackendInfo, OpSpec, Reason

PROJECT = "srm"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def srm_backend_info() -> BackendInfo | list[BackendInfo]:  # type: ignore[empty-body]
    """Describe the backend (or backends). Must be cheap and import nothing heavy: every listing calls it."""


@hookspec
def srm_probe(backend: str) -> list[Reason]:  # type: ignore[empty-body]
    """Can this backend run here at all (driver, device, compiler), not merely be imported? [] means yes.

    Called once a process, when the backend is first a candidate.
    """


@hookspec
def srm_ops() -> list[OpSpec]:  # type: ignore[empty-body]
    """Operators that this plugin adds."""


@hookspec
def srm_conformance_profile(backend: str) -> Any:
    """What the conformance suite should know of this backend: a `srm_conformance.profile.Profile`, or None."""


@hookspec
def srm_on_decision(decision: Decision) -> None:
    """Called when a backend has been chosen: for a kind of call that was not seen before."""
