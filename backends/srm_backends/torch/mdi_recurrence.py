"""`mdi_recurrence` on torch: z's product once for all steps, both products of the state as one, few launches a step.

u and g are the sigmoids of the two gates. On CUDA the steps are replayed from a graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import compute_dtype, in_order, only, valid_steps, wants_gradient
from srm_backends.torch.graphs import pieces, replayed
from srm_backends.torch.policy import held
from srm_core.context import LaunchContext

Tensors = tuple[Tensor, ...]


def forward(
    ctx: LaunchContext, z: Tensor, gamma: Tensor, h0: Tensor, w_gate: Tensor, b_gate: Tensor, w_mdi: Tensor,
    b_mdi: Tensor, *, mix: float, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    compute = compute_dtype(z.dtype)
    valid = valid_steps(lengths, z.shape[1])
    given = (only(valid, z.to(compute)), only(valid, gamma.to(compute)), h0, w_gate, b_gate, w_mdi, b_mdi)
    arguments: tuple[Any, ...] = tuple(in_order(a.to(compute)) for a in given)
    run = Loop.apply if wants_gradient(*arguments) else Loop.forward
    h, last = run(ctx, *arguments, valid, float(mix))
    return only(valid, h).to(z.dtype), last.to(h0.dtype)


class Loop(torch.autograd.Function):
    """The recurrence with its gradient; see the vjp of the specification's reference. It keeps the arguments and the
    states; the gates are computed again from them, for all steps at once."""

    @staticmethod
    def forward(launch: LaunchContext, *arguments: Any) -> tuple[Tensor, Tensor]:
        with held(launch, arguments[0], "matmul"), torch.no_grad():
            return _run(launch, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.launch, *tensors, ctx.mix = inputs
        ctx.save_for_backward(*tensors, output[0])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
        *arguments, valid, states = ctx.saved_tensors
        with held(ctx.launch, states, "matmul"):
            if torch.is_grad_enabled():
                found = _again(arguments, valid, ctx.mix, (grad_y, grad_last))
            else:
                wanted = ctx.needs_input_grad[1:8]
                found = _pull(ctx.launch, arguments, valid, states, ctx.mix, (grad_y, grad_last), wanted)
        return (None, *found, None, None)


def _weights(w_gate: Tensor, w_mdi: Tensor) -> tuple[Tensor, Tensor]:
    """(what multiplies the state: w_gate over w_mdi's second half, (2D, D); what multiplies z, (D, D))."""
    width = len(w_gate)
    return torch.cat([w_gate, w_mdi[:, width:]]), w_mdi[:, :width]


def _masks(valid: Tensor | None) -> Tensors:
    return () if valid is None else (valid[:, :, None],)


def _run(
    launch: LaunchContext, z: Tensor, gamma: Tensor, h0: Tensor, w_gate: Tensor, b_gate: Tensor, w_mdi: Tensor,
    b_mdi: Tensor, valid: Tensor | None, mix: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(the states (B, T, D), carried on past a length; the last one)."""
    states = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    if z.numel() == 0:
        return states, h0.clone()
    (_, steps, width), (weight, of_z) = z.shape, _weights(w_gate, w_mdi)
    of_g = torch.addmm(b_mdi, z.reshape(-1, width), of_z.T).view_as(states)
    sequences = (z, torch.cat([b_gate.expand_as(of_g), of_g], 2), gamma + mix * gamma, *_masks(valid))
    h = h0
    for part in pieces(steps, z):
        inputs = (h, weight, *(s[:, part] for s in sequences))
        replayed(_steps, (states[:, part],), inputs, mix, launch.precision)
        h = states[:, part.stop - 1]
    return states, h.clone()


def _steps(outputs: Tensors, inputs: Tensors, mix: float) -> None:
    """h' = (1 + mix) * gamma * h + mix * (1 - g) * h + mix * g * z + u * z, for every step."""
    h, weight, *sequences = inputs
    gates, rest = h.new_empty(len(h), len(weight)), torch.empty_like(h)
    (u, g), one, back = gates.chunk(2, 1), h.new_ones(()), weight.T
    rows = zip(outputs[0].unbind(1), *(s.unbind(1) for s in sequences), strict=True)
    for new, z, constant, gamma, *running in rows:
        torch.addmm(constant, h, back, out=gates).sigmoid_()
        torch.sub(one, g, out=rest)
        torch.mul(gamma, h, out=new).addcmul_(rest, h, value=mix).addcmul_(g, z, value=mix).addcmul_(u, z)
        if running:
            torch.where(running[0], new, h, out=new)
        h = new


def _pull(
    launch: LaunchContext, arguments: list[Tensor], valid: Tensor | None, states: Tensor, mix: float,
    grads: tuple[Tensor, Tensor], wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of the arguments that are wanted."""
    z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi = arguments
    grad_y, d_h = grads
    if z.numel() == 0:
        return (*(torch.zeros_like(a) for a in (z, gamma)), d_h, *(torch.zeros_like(a) for a in arguments[3:]))
    (batch, steps, width), (weight, of_z) = z.shape, _weights(w_gate, w_mdi)
    past = only(valid, torch.cat([h0[:, None], states[:, :-1]], 1))
    of_past, of_given = past.view(-1, width), z.reshape(-1, width)
    gates = torch.addmm(torch.cat([b_gate, b_mdi]), of_past, weight.T)
    gates[:, width:].addmm_(of_given, of_z.T)
    u, g = gates.sigmoid_().view(batch, steps, -1).chunk(2, 2)

    # What a step's gradient is multiplied by: for u and g before their sigmoids, and, but for the products, for the
    # state before. Then the products themselves, in place.
    slopes = z * u * (1 - u), mix * (z - past) * g * (1 - g)
    flow = torch.cat([*(only(valid, s) for s in slopes), gamma + mix * (1 - g + gamma)], 2)
    e = only(valid, grad_y).contiguous()
    e = e.clone() if e.data_ptr() == grad_y.data_ptr() else e
    first = torch.empty_like(h0, memory_format=torch.contiguous_format)
    for part in reversed(pieces(steps, z)):
        sequences = (flow[:, part], e[:, part], *(m[:, part] for m in _masks(valid)))
        replayed(_back_steps, (first, *sequences[:2]), (d_h, weight, *sequences), None, launch.precision)
        d_h = first

    of_z_wanted, of_gamma_wanted, _, *of_weights_wanted = wanted
    d_gates = flow.view(-1, 3 * width)[:, : 2 * width]
    d_z = d_gamma = None
    if of_z_wanted:
        d_z = torch.addcmul(e * u, e, g, value=mix)
        d_z.view(-1, width).addmm_(d_gates[:, width:], of_z)
    if of_gamma_wanted:
        d_gamma = (1 + mix) * e * past
    if not any(of_weights_wanted):
        return d_z, d_gamma, d_h, None, None, None, None
    d_weight, d_bias = d_gates.T @ of_past, d_gates.sum(0)
    d_mdi = torch.cat([d_gates[:, width:].T @ of_given, d_weight[width:]], 1)
    return d_z, d_gamma, d_h, d_weight[:width], d_bias[:width], d_mdi, d_bias[width:]


def _back_steps(outputs: Tensors, inputs: Tensors, _: Any) -> None:
    """From the last step on: e, the gradient of each state; it times the three of the flow; the gradient before."""
    first, products, gradients = outputs
    d_h, weight, *sequences = inputs
    width, buffers, zero = d_h.shape[1], (torch.empty_like(first), first), d_h.new_zeros(())
    rows = zip(*(s.unbind(1) for s in (products, gradients, *sequences)), strict=True)
    for t, (product, e, flow, grad, *running) in enumerate(reversed(list(rows))):
        torch.add(grad, d_h, out=e)
        if running:
            torch.where(running[0], e, zero, out=e)
        torch.mul(flow.unflatten(1, (3, width)), e[:, None], out=product.unflatten(1, (3, width)))
        of_gates, direct = product.split([2 * width, width], 1)
        before = torch.addmm(direct, of_gates, weight, out=buffers[t % 2])
        d_h = torch.where(running[0], before, d_h) if running else before
    first.copy_(d_h)


def _again(arguments: list[Tensor], valid: Any, mix: float, grads: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
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
