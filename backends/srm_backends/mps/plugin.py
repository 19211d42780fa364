"""What the `mps` backend offers, and whether there is an Apple GPU here."""

from __future__ import annotations

import subprocess
import sys

from srm_core.hookspecs import hookimpl
from srm_core.spec import HALF, BackendInfo, Given, Kernel, Reason

HERE, TORCH = "srm_backends.mps", "srm_backends.torch"
DTYPES = ("float32", *HALF)  # Metal has no float64
# What the predicates look at beyond the dtype. They import torch, which this module must not.
PREDICATES = {"recurrent_step_": "recurrent_step_", "attention": "attention", "hds_query": "attention"}
FEATURES = {"recurrent_step_": (Given("slots"),)}


def _kernel(op: str, target: str, backward: str | None = "autograd") -> Kernel:
    return Kernel(
        op, target, backward, arrays=("torch",), dtypes=DTYPES, platforms=("mps",), rank=5,
        features=FEATURES.get(op, ()), supports=f"{HERE}.supports:{PREDICATES.get(op, 'dtypes')}",
    )  # fmt: skip


KERNELS = (
    _kernel("scan", f"{HERE}.scan:forward"),
    _kernel("recurrent_mix", f"{TORCH}.recurrent_mix:forward"),
    _kernel("recurrent_step", f"{HERE}.recurrent_step:forward"),
    _kernel("recurrent_step_", f"{TORCH}.recurrent_step:forward_", None),
    _kernel("mdi", f"{TORCH}.mdi:forward"),
    _kernel("mdi_recurrence", f"{TORCH}.mdi_recurrence:forward"),
    _kernel("lstm", f"{TORCH}.lstm:forward"),
    _kernel("hds_pool", f"{TORCH}.hds:pool"),
    _kernel("hds_update_", f"{TORCH}.hds:update_", None),
    _kernel("hds_query", f"{TORCH}.hds:query"),
    _kernel("attention", f"{HERE}.attention:forward"),
    _kernel("conv_bn", f"{TORCH}.conv_bn:forward"),
    _kernel("conv_bn_train", f"{TORCH}.conv_bn:forward_train"),
)


@hookimpl
def srm_backend_info() -> BackendInfo:
    return BackendInfo("mps", tech="torch", platforms=("mps",), requires=("torch>=2.4",), kernels=KERNELS)


@hookimpl
def srm_probe(backend: str) -> list[Reason]:
    return why_not(sys.platform) if backend == "mps" else []


def why_not(platform: str) -> list[Reason]:
    """An Apple GPU is needed, and a torch that was built for it. Elsewhere than on macOS torch need not be asked."""
    if platform != "darwin":
        return [Reason("platform", "needs macOS and an Apple GPU", found=platform, required="darwin")]
    built, failure = ask_torch()
    if not built:
        hint = "install a torch wheel for macOS on Apple silicon"
        return [Reason("not-built", "this torch was built without MPS", hint=hint)]
    if failure:
        hint = "it needs the macOS that this torch was built for, and a GPU, which many virtual machines lack"
        return [Reason("no-device", f"torch cannot use an Apple GPU here: {failure}", hint=hint)]
    return []


def ask_torch() -> tuple[bool, str]:
    """(built with MPS, the error of a small computation there). If torch is not imported yet, another process asks: a
    listing imports no torch."""
    if "torch" in sys.modules:
        return try_out()
    code = "from srm_backends.mps.plugin import try_out; print(*try_out(), sep=chr(10))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    built, failure = done.stdout.splitlines()
    return built == "True", failure


def try_out() -> tuple[bool, str]:
    """Virtual machines have devices that are there for torch, and have no memory."""
    import torch

    try:
        torch.ones(1, device="mps").sum().item()
    except Exception as error:
        return torch.backends.mps.is_built(), f"{type(error).__name__}: {error}".splitlines()[0]
    return torch.backends.mps.is_built(), ""
