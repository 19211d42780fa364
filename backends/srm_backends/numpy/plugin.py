"""What the `numpy` backend offers."""

from __future__ import annotations

from srm_core.hookspecs import hookimpl
from srm_core.spec import BackendInfo, Kernel

HERE = "srm_backends.numpy"

KERNELS = (
    Kernel("scan", f"{HERE}.scan:forward", f"{HERE}.scan:backward"),
    Kernel("recurrent_mix", f"{HERE}.recurrent_mix:forward", f"{HERE}.recurrent_mix:backward"),
    Kernel("recurrent_step", f"{HERE}.recurrent_step:forward", f"{HERE}.recurrent_step:backward"),
    Kernel("recurrent_step_", f"{HERE}.recurrent_step:forward_"),
    Kernel("mdi", f"{HERE}.mdi:forward", f"{HERE}.mdi:backward"),
    Kernel("mdi_recurrence", f"{HERE}.mdi_recurrence:forward", f"{HERE}.mdi_recurrence:backward"),
    Kernel("lstm", f"{HERE}.lstm:forward", f"{HERE}.lstm:backward"),
    Kernel("hds_pool", f"{HERE}.hds:pool_forward", f"{HERE}.hds:pool_backward"),
    Kernel("hds_update_", f"{HERE}.hds:update_"),
    Kernel("hds_query", f"{HERE}.hds:query_forward", f"{HERE}.hds:query_backward"),
    Kernel("attention", f"{HERE}.attention:forward", f"{HERE}.attention:backward"),
    Kernel("conv_bn", f"{HERE}.conv_bn:forward", f"{HERE}.conv_bn:backward"),
    Kernel("conv_bn_train", f"{HERE}.conv_bn:forward_train", f"{HERE}.conv_bn:backward_train"),
)


@hookimpl
def srm_backend_info() -> BackendInfo:
    return BackendInfo("numpy", tech="numpy", kernels=KERNELS)
