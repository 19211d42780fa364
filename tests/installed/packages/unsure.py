"""The probes of its backends raise, exit, panic as Rust does, and answer nonsense."""

import sys

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel


class Panic(BaseException):
    pass


@hookimpl
def srm_backend_info():
    return [BackendInfo(n, "test", (Kernel("scan", "unsure:scan"),)) for n in ("raises", "exits", "panics", "answers")]


@hookimpl
def srm_probe(backend):
    if backend == "raises":
        raise OSError("driver too old")
    if backend == "exits":
        sys.exit("no licence")
    if backend == "panics":
        raise Panic("rust")
    return "no"
