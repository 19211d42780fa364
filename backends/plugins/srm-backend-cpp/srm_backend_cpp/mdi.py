"""`mdi`: one pass over the elements."""

from __future__ import annotations

from typing import Any

from srm_backend_cpp.arrays import Array, dense, dense_or_none, like
from srm_backend_cpp.native import kernels
from srm_core.context import LaunchContext, Residuals


def forward(
    ctx: LaunchContext, z: Array, h: Array, gate_logits: Array, decay_logits: Array,
    modulation_logits: Array | None = None, *, eps: float = 1e-6,
) -> tuple[Array, Array]:  # fmt: skip
    h_new, gamma = like(ctx, h), like(ctx, z)
    inputs = map(dense_or_none, (z, h, gate_logits, decay_logits, modulation_logits))
    kernels.mdi(*inputs, eps, h_new, gamma)
    return h_new, gamma


def backward(ctx: LaunchContext, residuals: Residuals, grad_h: Array, grad_gamma: Array) -> tuple[Any, ...]:
    gradients = tuple(like(ctx, a) for a in residuals.args)
    inputs = map(dense_or_none, residuals.args)
    kernels.mdi_backward(*inputs, residuals.options["eps"], dense(grad_h), dense(grad_gamma), *gradients)
    return gradients
