"""Its import takes a second."""

import time

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel

time.sleep(1)


@hookimpl
def srm_backend_info():
    return BackendInfo("slow", "test", (Kernel("scan", "slow:scan"),))
