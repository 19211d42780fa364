"""`kernels`: the extension that was compiled for the newest instruction set that this CPU has.

`SRM_CPP_LEVEL` (base, v3 or v4) takes another one, to test it; one that the CPU lacks is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from srm_backend_cpp import _cpu  # type: ignore[attr-defined]

LEVELS = {"v4": 4, "v3": 3, "base": 1}  # the newest first
SPINS = "1000"  # about 20 microseconds


@contextmanager
def _short_spins() -> Iterator[None]:
    """GNU's OpenMP reads the environment when it is loaded. Its threads would spin for milliseconds before they sleep,
    and keep the pools of BLAS and torch in the same process from working; unless the user wants that."""
    mine = not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys()
    if mine:
        os.environ["GOMP_SPINCOUNT"] = SPINS
    try:
        yield
    finally:
        if mine:
            del os.environ["GOMP_SPINCOUNT"]


def _load(wanted: str) -> ModuleType:
    has = _cpu.level()
    if wanted and wanted not in LEVELS:
        raise ImportError(f"SRM_CPP_LEVEL={wanted}: there are only {', '.join(LEVELS)}")
    if wanted and LEVELS[wanted] > has:
        raise ImportError(f"SRM_CPP_LEVEL={wanted}: this CPU has no x86-64-{wanted}; unset the variable")
    for name in [wanted] if wanted else [n for n, level in LEVELS.items() if level <= has]:
        if find_spec(f"srm_backend_cpp._{name}") is not None:
            with _short_spins():
                return import_module(f"srm_backend_cpp._{name}")
    raise ImportError(f"it was built without the level {wanted or 'base'}")


kernels = _load(os.environ.get("SRM_CPP_LEVEL", ""))
