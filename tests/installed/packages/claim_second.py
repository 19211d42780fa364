"""One of two that call their backend "shared"."""

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel


@hookimpl
def srm_backend_info():
    return BackendInfo("shared", "test", (Kernel("scan", "claim_second:scan"),))
