"""`srm-core conformance`: what it needs beside the base installation."""

from __future__ import annotations

from importlib.util import find_spec

from srm_core.errors import ConfigError


def check_installed(processes: int) -> None:
    """Errors: `ConfigError` that says what to install."""
    for module in ("pytest", "hypothesis", *(("xdist",) if processes > 1 else ())):
        if find_spec(module) is None:
            extra = "pytest-xdist" if module == "xdist" else "'srm-core[conformance]'"
            raise ConfigError(f"the suite needs {module}, which is not installed; pip install {extra}")
