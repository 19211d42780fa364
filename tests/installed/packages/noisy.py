"""It writes to stdout at import, in its probe, from C, and from a child process; and to stderr."""

import ctypes
import os
import subprocess
import sys

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel


def shout(when):
    print("noisy: print", when)
    sys.stderr.write(f"noisy: stderr {when}\n")
    os.write(1, f"noisy: descriptor 1 {when}\n".encode())
    ctypes.CDLL(None).printf(b"noisy: printf\n")
    subprocess.run(["echo", "noisy: child", when], check=True)


shout("at import")


@hookimpl
def srm_backend_info():
    return BackendInfo("noisy", "test", (Kernel("scan", "noisy:scan"),))


@hookimpl
def srm_probe(backend):
    shout("in its probe")
    return []
