"""What the `reference` backend offers."""

from __future__ import annotations

from srm_core.hookspecs import hookimpl
from srm_core.ops import SPECS
from srm_core.registry import reference_kernel
from srm_core.spec import BackendInfo


@hookimpl
def srm_backend_info() -> BackendInfo:
    return BackendInfo("reference", tech="numpy", kernels=tuple(reference_kernel(s) for s in SPECS.values()))
