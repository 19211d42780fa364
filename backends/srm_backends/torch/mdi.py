"""`mdi` on torch, element by element. Its gradient is computed from the arguments, which are all that is kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import compute_dtype, wants_gradient
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, z: Tensor, h: Tensor, gate_logits: Tensor, decay_logits: Tensor,
    modulation_logits: Tensor | None = None, *, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = (z, h, gate_logits, decay_logits, modulation_logits)
    return Integration.apply(*arguments, eps) if wants_gradient(*arguments) else _integrate(*arguments, eps)


def _integrate(
    z: Tensor, h: Tensor, gate_logits: Tensor, decay_logits: Tensor, modulation_logits: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    compute = compute_dtype(z.dtype)
    state, g = h.to(compute), gate_logits.to(compute).sigmoid()
    gamma, _ = _decay(decay_logits, modulation_logits, compute)
    gamma = gamma.clamp(eps, 1 - eps)
    kept = torch.addcmul((1 - g) * state, g, z.to(compute))
    return torch.addcmul(kept, gamma, state).to(h.dtype), gamma.to(z.dtype)


def _decay(
    decay_logits: Tensor, modulation_logits: Tensor | None, compute: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """(gamma before it is clamped, its factors)."""
    decay = decay_logits.to(compute).sigmoid()
    if modulation_logits is None:
        return decay, (decay, None)
    modulation = modulation_logits.to(compute).sigmoid()
    return decay * modulation, (decay, modulation)


class Integration(torch.autograd.Function):
    """See the vjp of the specification's reference."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:
        return _integrate(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        *tensors, ctx.eps = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_new: Tensor, grad_gamma: Tensor) -> tuple[Any, ...]:
        z, h, gate_logits, decay_logits, modulation_logits = ctx.saved_tensors
        compute = compute_dtype(z.dtype)
        a, state, g = grad_new.to(compute), h.to(compute), gate_logits.to(compute).sigmoid()
        product, (decay, modulation) = _decay(decay_logits, modulation_logits, compute)
        grads: list[Any] = [None] * 6
        if ctx.needs_input_grad[0]:
            grads[0] = (a * g).to(z.dtype)
        if ctx.needs_input_grad[1]:
            grads[1] = (a * (1 - g + product.clamp(ctx.eps, 1 - ctx.eps))).to(h.dtype)
        if ctx.needs_input_grad[2]:
            grads[2] = (a * (z.to(compute) - state) * g * (1 - g)).to(gate_logits.dtype)
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            clamped = (product < ctx.eps) | (product > 1 - ctx.eps)
            e = torch.where(clamped, 0.0, torch.addcmul(grad_gamma.to(compute), a, state)) * product
            if ctx.needs_input_grad[3]:
                grads[3] = (e * (1 - decay)).to(decay_logits.dtype)
            if modulation is not None and ctx.needs_input_grad[4]:
                grads[4] = (e * (1 - modulation)).to(modulation_logits.dtype)
        return tuple(grads)
