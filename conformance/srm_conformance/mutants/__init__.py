"""Deliberately wrong backends, with which the suite is itself tested: it must find each of them to be wrong.

`python -m srm_conformance.mutants` runs the suite on each, prints how many were killed, and which survived.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from srm_conformance.mutants.mutant import CATALOGUE, Mutant

__all__ = ["Mutant", "mutants"]
MACHINERY = ("mutant", "runner", "__main__")


def mutants() -> tuple[Mutant, ...]:
    """All of them, in the order of the catalogue."""
    for module in sorted(m.name for m in iter_modules(__path__)):
        if module not in MACHINERY:
            import_module(f"{__name__}.{module}")
    return tuple(CATALOGUE)
