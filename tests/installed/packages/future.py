"""It is written for another API version."""

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel


@hookimpl
def srm_backend_info():
    return BackendInfo("future", "test", (Kernel("scan", "future:scan"),), api_version=99)
