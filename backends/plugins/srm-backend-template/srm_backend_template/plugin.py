"""What this backend has. Listings import this module: nothing heavy here, kernels are named as "module:function"."""

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Given, Kernel

HERE = "srm_backend_template.kernels"

KERNELS = (
    Kernel(
        "scan", f"{HERE}:scan", f"{HERE}:scan_backward",
        supports=f"{HERE}:scan_supports", features=(Given("tokens"), Given("lengths")),
    ),
    Kernel("mdi", f"{HERE}:mdi", f"{HERE}:mdi_backward"),
)  # fmt: skip


@hookimpl
def srm_backend_info():
    return BackendInfo("template", tech="numpy", kernels=KERNELS)
