"""`mdi_recurrence`: z's product for all steps at once, then a loop over time."""

from __future__ import annotations

from typing import Any

from srm_backend_cpp.arrays import Array, dense, filled, integers, like
from srm_backend_cpp.native import kernels
from srm_core.context import LaunchContext, Residuals


def forward(
    ctx: LaunchContext, z: Array, gamma: Array, h0: Array, w_gate: Array, b_gate: Array, w_mdi: Array, b_mdi: Array,
    *, mix: float = 0.1, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    states, last = like(ctx, z), like(ctx, h0)
    gates = ctx.scratch((*z.shape[:2], 2 * z.shape[2]), z.dtype)
    inputs = map(dense, (z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi))
    kernels.mdi_recurrence(*inputs, mix, integers(lengths), gates, states, last)
    ctx.keep("gates", gates)
    ctx.keep("states", states)
    return states, last


def backward(ctx: LaunchContext, residuals: Residuals, grad_out: Array, grad_last: Array) -> tuple[Any, ...]:
    gates = residuals.get("gates")
    z, gamma, h0, *weights = residuals.args
    d_z, d_gamma, *d_weights = (like(ctx, a) for a in (z, gamma, *weights))
    d_h0 = filled(ctx, h0.shape, h0.dtype, grad_last)
    d_gates = ctx.scratch(gates.shape, gates.dtype)
    kernels.mdi_recurrence_backward(
        *map(dense, residuals.args), residuals.options["mix"], integers(residuals.options["lengths"]),
        gates, residuals.get("states"), dense(grad_out), d_gates, d_z, d_gamma, d_h0, *d_weights,
    )  # fmt: skip
    return d_z, d_gamma, d_h0, *d_weights
