"""What the `torch` backend offers."""

from __future__ import annotations

from typing import Any

from srm_core.hookspecs import hookimpl
from srm_core.spec import BackendInfo, Kernel

HERE = "srm_backends.torch"


def _kernel(op: str, target: str, backward: str | None = "autograd") -> Kernel:
    """A kernel of torch operations, which autograd records."""
    return Kernel(
        op, f"{HERE}.{target}", backward, arrays=("torch",), platforms=("cpu", "cuda"), graph_safe=True, rank=10
    )


KERNELS = (
    _kernel("scan", "scan:forward"),
    _kernel("recurrent_mix", "recurrent_mix:forward"),
    _kernel("recurrent_step", "recurrent_step:forward"),
    _kernel("recurrent_step_", "recurrent_step:forward_", None),
    _kernel("mdi", "mdi:forward"),
    _kernel("mdi_recurrence", "mdi_recurrence:forward"),
    _kernel("lstm", "lstm:forward"),
    _kernel("hds_pool", "hds:pool"),
    _kernel("hds_update_", "hds:update_", None),
    _kernel("hds_query", "hds:query"),
    _kernel("attention", "attention:forward"),
    _kernel("conv_bn", "conv_bn:forward"),
    _kernel("conv_bn_train", "conv_bn:forward_train"),
)


SUMS = "torch adds in another order than the rounding model: one product after the other"


@hookimpl
def srm_conformance_profile(backend: str) -> Any:
    from srm_conformance.profile import Looser, Profile

    if backend != "torch":
        return None
    return Profile(
        looser={"mdi_recurrence": Looser(2, SUMS), "conv_bn": Looser(2, SUMS), "conv_bn_train": Looser(2, SUMS)}
    )


@hookimpl
def srm_backend_info() -> BackendInfo:
    return BackendInfo("torch", tech="torch", platforms=("cpu", "cuda"), requires=("torch>=2.4",), kernels=KERNELS)
