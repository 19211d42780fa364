"""`mdi_recurrence` on torch: z's product once for all steps, both products of the state as one, few launches a step.

Time comes first in memory, so that a step is a row. u and g are the sigmoids of the two gates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import compute_dtype, only, valid_steps, wants_gradient
from srm_backends.torch.graphs import replayed
from srm_backends.torch.policy import held
from srm_core.context import LaunchContext

Arguments = tuple[Tensor, ...]  # z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi


def forward(
    ctx: LaunchContext, z: Tensor, gamma: Tensor, h0: Tensor, w_gate: Tensor, b_gate: Tensor, w_mdi: Tensor,
    b_mdi: Tensor, *, mix: float, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    compute = compute_dtype(z.dtype)
    valid = valid_steps(lengths, z.shape[1])
    given = (only(valid, z.to(compute)), only(valid, gamma.to(compute)), h0, w_gate, b_gate, w_mdi, b_mdi)
    arguments: tuple[Any, ...] = tuple(a.to(compute) for a in given)
    if wants_gradient(*arguments):
        h, last = Loop.apply(ctx, *arguments, valid, float(mix))
    else:
        with held(ctx, arguments[0]):
            h, last = _run(arguments, valid, float(mix))
    return only(valid, h).to(z.dtype), last.to(h0.dtype)


def _weights(w_gate: Tensor, w_mdi: Tensor) -> tuple[Tensor, Tensor]:
    """(what multiplies the state: w_gate over w_mdi's second half, (2D, D); what multiplies z, (D, D))."""
    width = len(w_gate)
    return torch.cat([w_gate, w_mdi[:, width:]]), w_mdi[:, :width]


def _run(arguments: Arguments, valid: Any, mix: float) -> tuple[Tensor, Tensor]:
    """(the states (B, T, D), carried on past a length; the last one)."""
    z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi = arguments
    batch, steps, width = z.shape
    if z.numel() == 0:
        return torch.empty_like(z, memory_format=torch.contiguous_format), h0.clone()
    weight, of_z = _weights(w_gate, w_mdi)
    zs = z.transpose(0, 1).contiguous()  # (T, B, D)
    given = torch.cat([b_gate.expand(steps, batch, width), torch.addmm(b_mdi, zs.flatten(0, 1), of_z.T).view_as(zs)], 2)
    masks = () if valid is None else (valid.T[:, :, None].contiguous(),)

    (states,) = replayed(_steps, (zs, given, gamma.transpose(0, 1).contiguous(), h0, weight, *masks), mix)
    return states.transpose(0, 1).contiguous(), states[-1].clone()


def _steps(tensors: tuple[Tensor, ...], mix: float) -> tuple[Tensor]:
    """The states (T, B, D)."""
    zs, given, gammas, h, weight, *masks = tensors
    width, back = zs.shape[2], weight.T
    states, gates = torch.empty_like(zs), torch.empty_like(given[0])
    n, kept, one = torch.empty_like(h), torch.empty_like(h), h.new_ones(())
    u, g = gates[:, :width], gates[:, width:]
    for t, (z, constant, gamma, state) in enumerate(
        zip(zs.unbind(), given.unbind(), gammas.unbind(), states.unbind(), strict=True)
    ):
        torch.addmm(constant, h, back, out=gates).sigmoid_()
        torch.sub(one, g, out=n).mul_(h).addcmul_(g, z)  # (1 - g) * h + g * z
        torch.mul(gamma, h, out=kept)
        torch.add(kept, n.add_(kept), alpha=mix, out=state).addcmul_(z, u)
        if masks:
            state.copy_(torch.where(masks[0][t], state, h))
        h = state
    return (states,)


def _back_steps(tensors: tuple[Tensor, ...], mix: float) -> tuple[Tensor, ...]:
    """(gradients of the gates (T, B, 2D), of the states (T, B, D), of the first state), from the last step on."""
    slopes, through, d_y, d_h, weight, *masks = tensors
    d_gates, e = slopes.clone(), d_y.clone()
    d_h = d_h.clone()
    for t in reversed(range(len(e))):
        gradient, both = e[t], d_gates[t].unflatten(1, (2, -1))
        gradient.add_(d_h)
        if masks:
            gradient.copy_(torch.where(masks[0][t], gradient, 0.0))
        both.mul_(gradient[:, None])
        before = torch.addmm(gradient * through[t], d_gates[t], weight)
        d_h = torch.where(masks[0][t], before, d_h) if masks else before
    return d_gates, e, d_h


class Loop(torch.autograd.Function):
    """The recurrence with its gradient; see the vjp of the specification's reference. It keeps the arguments and the
    states; the gates are computed again from them, for all steps at once."""

    @staticmethod
    def forward(ctx: Any, launch: LaunchContext, *arguments: Any) -> tuple[Tensor, Tensor]:
        tensors, valid, mix = arguments[:-2], arguments[-2], arguments[-1]
        with held(launch, tensors[0]):
            states, last = _run(tensors, valid, mix)
        ctx.save_for_backward(*tensors, states, valid)
        ctx.launch, ctx.mix = launch, mix
        return states, last

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
        saved: Any = ctx.saved_tensors
        arguments, states, valid = saved[:-2], saved[-2], saved[-1]
        with held(ctx.launch, states):
            if torch.is_grad_enabled():
                found = _again(arguments, valid, ctx.mix, (grad_y, grad_last))
            else:
                found = _pull(arguments, states, valid, ctx.mix, grad_y, grad_last)
        return (None, *found, None, None)


def _pull(
    arguments: Arguments, states: Tensor, valid: Any, mix: float, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor, ...]:
    z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi = arguments
    batch, steps, width = z.shape
    if z.numel() == 0:
        return (
            *(torch.zeros_like(a) for a in (z, gamma)),
            grad_last,
            *map(torch.zeros_like, (w_gate, b_gate, w_mdi, b_mdi)),
        )
    weight, of_z = _weights(w_gate, w_mdi)
    zs, gammas, past = (a.transpose(0, 1) for a in (z, gamma, torch.cat([h0[:, None], states[:, :-1]], 1)))
    masks = () if valid is None else (valid.T[:, :, None].contiguous(),)
    past = torch.where(masks[0], past, 0.0) if masks else past
    rows, given = past.reshape(-1, width), zs.reshape(-1, width)
    gates = torch.addmm(torch.cat([b_gate, b_mdi]), rows, weight.T)
    gates[:, width:].addmm_(given, of_z.T)
    u, g = gates.sigmoid_().view(steps, batch, 2 * width).split(width, 2)
    slopes = torch.cat([zs * u * (1 - u), mix * (zs - past) * g * (1 - g)], 2)
    through = gammas + mix * (1 - g + gammas)  # what a step's gradient gives to the state before, but for the products
    d_y = grad_y.transpose(0, 1)
    if masks:
        slopes, d_y = (torch.where(masks[0], a, 0.0) for a in (slopes, d_y))
    inputs = (slopes, through.contiguous(), d_y.contiguous(), grad_last.contiguous(), weight, *masks)
    d_gates, e, d_h = replayed(_back_steps, inputs, mix)
    d_z = (d_gates[:, :, width:].reshape(-1, width) @ of_z).view_as(e) + e * (u + mix * g)
    flat = d_gates.view(-1, 2 * width)
    d_weight, d_bias = flat.T @ rows, flat.sum(0)
    d_mdi = torch.cat([flat[:, width:].T @ given, d_weight[width:]], 1)
    return (
        d_z.transpose(0, 1), ((1 + mix) * e * past).transpose(0, 1), d_h, d_weight[:width], d_bias[:width], d_mdi,
        d_bias[width:],
    )  # fmt: skip


def _again(arguments: Arguments, valid: Any, mix: float, grads: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
    """The gradients as something that can be differentiated: of the formula, step by step."""
    z, gamma, h, w_gate, b_gate, w_mdi, b_mdi = arguments
    states = []
    for t in range(z.shape[1]):
        u = torch.sigmoid(h @ w_gate.T + b_gate)
        g = torch.sigmoid(torch.cat([z[:, t], h], 1) @ w_mdi.T + b_mdi)
        kept = gamma[:, t] * h
        new = kept + mix * ((1 - g) * h + g * z[:, t] + kept) + z[:, t] * u
        h = new if valid is None else torch.where(valid[:, t, None], new, h)
        states.append(h)
    outputs = (torch.stack(states, 1) if states else z * 0, h)
    wanted = [a for a in arguments if a.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    return tuple(next(found) if a.requires_grad else None for a in arguments)
