"""`scan` on Apple GPUs: a Metal kernel, one thread a channel; its gradient is the same kernel against time.

Gradients go through float32, like the torch backend's: steps beyond a length get the gate 1 and the token 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.mps import shaders
from srm_backends.torch import scan as composed
from srm_backends.torch.common import only, state_dtype, valid_steps, wants_gradient
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, gates: Tensor, tokens: Tensor | None = None, initial_state: Tensor | None = None,
    *, reverse: bool = False, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not shaders.available():
        return composed.forward(ctx, gates, tokens, initial_state, reverse=reverse, lengths=lengths)
    like = gates if tokens is None else tokens
    state_type = state_dtype(initial_state, like)
    if not wants_gradient(gates, tokens, initial_state):
        y = ctx.empty(like.shape, like.dtype)
        last = ctx.empty((like.shape[0], like.shape[2]), state_type)
        return write_scan(y, last, gates, tokens, initial_state, reverse, lengths)
    valid = valid_steps(lengths, like.shape[1])
    g = only(valid, gates.float(), 1.0)
    x = None if tokens is None else only(valid, tokens.float())
    if initial_state is None:
        state = g.new_full((like.shape[0], like.shape[2]), 1.0 if tokens is None else 0.0)
    else:
        state = initial_state.float()
    y, last = recurrence(g, x, state, reverse)
    return only(valid, y).to(like.dtype), last.to(state_type)


def write_scan(
    y: Tensor, last: Tensor, gates: Tensor, tokens: Tensor | None, state: Tensor | None, reverse: bool,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fill y (B, T, D) and the final state (B, D), which autograd does not see. gates: (B or 1, T or 1, D or 1)."""
    batch, steps, width = y.shape
    if not y.numel():  # nothing to launch on; at T = 0 the state stays what it is
        return y, last.fill_(1 if tokens is None else 0) if state is None else last.copy_(state)
    plan = [
        steps, int(reverse), int(tokens is not None), int(state is not None), *shaders.integers(lengths),
        *shaders.strides(gates),
        *(shaders.strides(tokens) if tokens is not None else (0, 0, 0)),
        *(shaders.strides(state) if state is not None else (0, 0)),
        *shaders.strides(y), *shaders.strides(last),
    ]  # fmt: skip
    # What is absent is not read, but a buffer must stand there.
    buffers = [gates if a is None else a for a in (gates, tokens, state, lengths)]
    shaders.launch("scan", (y.dtype, gates.dtype, last.dtype), [*buffers, y, last, plan], (width, batch))
    return y, last


def recurrence(gates: Tensor, tokens: Tensor | None, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """The scan of float32 tensors with a state and without lengths, differentiable any number of times."""
    y, last = Recurrence.apply(gates, tokens, state, reverse)
    return y, last


class Recurrence(torch.autograd.Function):
    """a_t = dy_t + g_{t+1} * a_{t+1}, a scan against time; then dx_t = a_t and dg_t = a_t * y_{t-1}."""

    @staticmethod
    def forward(gates: Tensor, tokens: Tensor | None, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        batch, width = state.shape
        steps = (gates if tokens is None else tokens).shape[1]
        y, last = state.new_empty((batch, steps, width)), state.new_empty((batch, width))
        return write_scan(y, last, gates, tokens, state, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gates, tokens, state, ctx.reverse = inputs
        ctx.save_for_backward(gates, state, output[0])
        ctx.has_tokens = tokens is not None

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
        gates, state, y = ctx.saved_tensors
        reverse, steps = ctx.reverse, y.shape[1]
        if not steps:
            return torch.zeros_like(gates), grad_y if ctx.has_tokens else None, grad_last, None
        ends = slice(0, 1) if reverse else slice(steps - 1, steps)  # the step that is taken last
        others = slice(1, None) if reverse else slice(0, steps - 1)
        begins = slice(steps - 1, steps) if reverse else slice(0, 1)
        start = grad_y[:, ends] + grad_last[:, None]
        varying = gates.shape[1] > 1
        later = gates[:, slice(0, steps - 1) if reverse else slice(1, None)] if varying else gates
        earlier, _ = recurrence(later, grad_y[:, others], start[:, 0], not reverse)
        a = torch.cat([start, earlier] if reverse else [earlier, start], 1)
        before = torch.cat([y[:, 1:], state[:, None]] if reverse else [state[:, None], y[:, :-1]], 1)
        d_gates = (a * before).sum_to_size(gates.shape) if ctx.needs_input_grad[0] else None
        d_state = (a[:, begins] * (gates[:, begins] if varying else gates))[:, 0]
        return d_gates, a if ctx.needs_input_grad[1] else None, d_state, None
