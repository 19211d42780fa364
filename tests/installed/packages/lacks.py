"""It needs a distribution that is not installed."""

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel


@hookimpl
def srm_backend_info():
    return BackendInfo("lacks", "test", (Kernel("scan", "lacks:scan"),), requires=("srm-no-such-thing>=2",))
