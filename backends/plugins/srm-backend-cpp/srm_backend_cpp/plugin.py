"""What the `cpp` backend offers, and whether it can run here."""

from __future__ import annotations

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel, Reason

HERE = "srm_backend_cpp"
DTYPES = ("float32", "float64")


def _kernel(op: str, module: str, prefix: str = "") -> Kernel:
    return Kernel(op, f"{HERE}.{module}:{prefix}forward", f"{HERE}.{module}:{prefix}backward", dtypes=DTYPES)


KERNELS = (
    _kernel("scan", "scan"),
    _kernel("recurrent_mix", "mix"),
    _kernel("recurrent_step", "mix", "step_"),
    _kernel("mdi", "mdi"),
    _kernel("mdi_recurrence", "mdi_recurrence"),
    _kernel("lstm", "lstm"),
    _kernel("hds_query", "hds_query"),
)


@hookimpl
def srm_backend_info() -> BackendInfo:
    return BackendInfo("cpp", tech="c++", kernels=KERNELS)


@hookimpl
def srm_probe(backend: str) -> list[Reason]:
    """The extension must load, and have been built for a CPU like this one."""
    if backend != "cpp":
        return []
    try:
        from srm_backend_cpp.native import kernels  # noqa: F401
    except ImportError as error:
        hint = "pip install --force-reinstall srm-backend-cpp, with libgomp (or libomp) on the system"
        return [Reason("extension", f"its extension does not load: {error}", found=str(error), hint=hint)]
    return []
