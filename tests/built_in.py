"""The backends that this package itself declares, so that a new one changes no test of the registry."""

from __future__ import annotations

from importlib.metadata import distribution

GROUP = "srm_core.backends"
BUILT_IN = sorted(entry.name for entry in distribution("srm-core").entry_points if entry.group == GROUP)
