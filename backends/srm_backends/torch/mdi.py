"""`mdi` on torch, element by element. What is kept for its gradient is z, h and the sigmoids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import as_dtype, compute_dtype, wants_gradient
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, z: Tensor, h: Tensor, gate_logits: Tensor, decay_logits: Tensor,
    modulation_logits: Tensor | None = None, *, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    arguments = (z, h, gate_logits, decay_logits, modulation_logits)
    call: Any = Integration.apply if wants_gradient(*arguments) else Integration.forward
    new, gamma, *_ = call(*arguments, eps)
    return new, gamma


class Integration(torch.autograd.Function):
    """See the vjp of the specification's reference.

    The sigmoids are outputs, so that what the backward makes of them can be differentiated again.
    """

    @staticmethod
    def forward(
        z: Tensor, h: Tensor, gate_logits: Tensor, decay_logits: Tensor, modulation_logits: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        compute = compute_dtype(z.dtype)
        state, g, decay = as_dtype(h, compute), _sigmoid(gate_logits, compute), _sigmoid(decay_logits, compute)
        modulation = None if modulation_logits is None else _sigmoid(modulation_logits, compute)
        gamma = (decay if modulation is None else decay * modulation).clamp(eps, 1 - eps)
        new = (1 - g).mul_(state).addcmul_(g, as_dtype(z, compute)).addcmul_(gamma, state)
        return as_dtype(new, h.dtype), as_dtype(gamma, z.dtype), g, decay, modulation

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        z, h, *logits, ctx.eps = inputs
        ctx.dtypes = [None if t is None else t.dtype for t in (z, h, *logits)]
        ctx.save_for_backward(z, h, *output[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_new: Any, grad_gamma: Any, *grad_sigmoids: Any) -> tuple[Any, ...]:
        z, h, g, decay, modulation = ctx.saved_tensors
        state = as_dtype(h, g.dtype)
        a = torch.zeros_like(g) if grad_new is None else as_dtype(grad_new, g.dtype)
        product = decay if modulation is None else decay * modulation
        gamma = product.clamp(ctx.eps, 1 - ctx.eps)
        needs = ctx.needs_input_grad
        grads: list[Any] = [None] * 5
        if needs[0]:
            grads[0] = a * g
        if needs[1]:
            grads[1] = a * (1 - g + gamma)
        if needs[2]:
            grads[2] = _through(a * (as_dtype(z, g.dtype) - state), grad_sigmoids[0], g)
        if needs[3] or needs[4]:
            e = a * state if grad_gamma is None else torch.addcmul(as_dtype(grad_gamma, g.dtype), a, state)
            e = torch.where(gamma == product, e, 0.0)  # 0 where it is clamped
            if needs[3]:
                grads[3] = _through(e if modulation is None else e * modulation, grad_sigmoids[1], decay)
            if needs[4]:
                grads[4] = _through(e * decay, grad_sigmoids[2], modulation)
        return *(None if d is None else as_dtype(d, like) for d, like in zip(grads, ctx.dtypes, strict=True)), None


def _sigmoid(logits: Tensor, compute: torch.dtype) -> Tensor:
    return as_dtype(logits, compute).sigmoid()


def _through(grad: Tensor, direct: Tensor | None, value: Tensor) -> Tensor:
    """The gradient of the logits, of that of a sigmoid's value: grad, and what came to the sigmoid directly."""
    result: Tensor = torch.ops.aten.sigmoid_backward(grad if direct is None else grad + direct, value)
    return result
