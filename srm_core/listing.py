"""What is here: the table of operators and backends, and the report of versions, devices and environment."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from srm_core.plugins import BUILT_IN
from srm_core.registry import registry

NO_KERNEL = ("has no kernel for it",)
LIBRARIES = ("numpy", "ml_dtypes", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x")


@dataclass(frozen=True)
class Cell:
    """One operator of one backend: "forward+backward", "forward", or "no", with the reasons for what lacks."""

    op: str
    backend: str
    provides: str
    reasons: tuple[str, ...]

    @property
    def has_kernel(self) -> bool:
        return self.reasons != NO_KERNEL


@dataclass(frozen=True)
class Listing:
    """All backends by all operators, the plugins that they come from, and those that could not be used.

    A plugin's `notes` are what it should not have done while it loaded, which took `seconds`.
    """

    backends: tuple[dict[str, Any], ...]
    cells: tuple[Cell, ...]
    quarantined: tuple[dict[str, str], ...]
    blocked: tuple[str, ...]
    plugins: tuple[dict[str, Any], ...]

    def cell(self, op: str, backend: str) -> Cell:
        return next(c for c in self.cells if (c.op, c.backend) == (op, backend))

    @property
    def ops(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.op for c in self.cells))


def list_backends() -> Listing:
    """Every backend and operator, with the reason for every gap. Imports none of torch, triton, cupy."""
    found = registry()
    backends, cells = [], []
    for name, (info, plugin) in found.backends.items():
        runnable = [str(r) for r in found.runnable(info, plugin)]
        backends.append(
            {
                "name": name, "tech": info.tech, "platforms": list(info.platforms), "plugin": plugin.name,
                "distribution": plugin.distribution, "built_in": plugin.distribution == BUILT_IN,
                "reasons": [*runnable, *(f"no operator is called {op!r}" for b, op in found.orphans if b == name)],
            }
        )  # fmt: skip
        for op, spec in found.specs.items():
            entry = found.kernels[op].get(name)
            reasons = tuple(runnable)
            provides = "no"
            if entry is None:
                reasons = NO_KERNEL
            elif not runnable:
                provides = "forward+backward" if entry.kernel.pulls_back else "forward"
                if not entry.kernel.pulls_back:
                    reasons = ("changes its state, so it has no gradient" if spec.mutates else "has no backward",)
            cells.append(Cell(op, name, provides, reasons))
    lost = tuple(
        {"name": q.name, "distribution": q.distribution, "error": q.error, "traceback": q.traceback}
        for q in found.plugins.quarantined
    )
    plugins = tuple(
        {
            "name": p.name, "distribution": p.distribution, "backends": [b.name for b in p.backends],
            "operators": [o.name for o in p.ops], "seconds": round(p.seconds, 4), "notes": list(p.notes),
        }
        for p in found.plugins.plugins
    )  # fmt: skip
    return Listing(tuple(backends), tuple(cells), lost, tuple(found.plugins.blocked), plugins)


def report(look_for_devices: bool = False) -> dict[str, Any]:
    """Versions, devices and the environment variables in force. Imports no array library but NumPy.

    look_for_devices: import CuPy or torch, where one is installed, to list its devices; otherwise they are listed
    only if the library is imported already.
    """
    versions: dict[str, str | None] = {}
    for name in ("srm-core", *LIBRARIES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": [f"cpu ({os.cpu_count()} cores, {platform.machine()})", *_gpus(look_for_devices)],
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith("SRM_")},
        "backends": [b["name"] for b in list_backends().backends],
    }


def _gpus(look: bool) -> list[str]:
    """CUDA devices, through the first library that can tell."""
    for library in ("cupy", "torch"):
        if library not in sys.modules and not (look and find_spec(library)):
            continue
        module = importlib.import_module(library)
        if not module.cuda.is_available():
            continue
        if library == "torch":
            names = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())]
        else:
            runtime = module.cuda.runtime
            names = [runtime.getDeviceProperties(i)["name"].decode() for i in range(runtime.getDeviceCount())]
        return [f"cuda:{i} ({name})" for i, name in enumerate(names)]
    return []
