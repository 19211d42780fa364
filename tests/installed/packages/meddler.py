"""It changes at import what belongs to the whole process."""

import os
import sys

import numpy as np

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel

os.environ["SRM_BACKEND"] = "meddler"
os.environ.pop("SRM_TRACE", None)
os.environ["MEDDLER_THREADS"] = "1"
np.seterr(all="raise")
sys.stdout = sys.stderr


@hookimpl
def srm_backend_info():
    return BackendInfo("meddler", "test", (Kernel("scan", "meddler:scan"),))
