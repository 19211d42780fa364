"""`recurrent_mix` on torch: one linear recurrence with a constant gate, all heads of both modes at once.

As in `recurrent_step`: s_t = w_in*x_t + d*s_{t-1} and y_t = w_out*s_t + b_t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import compute_dtype, only, state_dtype, valid_steps
from srm_backends.torch.recurrence import recurrence
from srm_backends.torch.recurrent_step import at_positions, in_and_out
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, x: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, mode: tuple[str, ...],
    initial_state: Tensor | None = None, *, start: Any = 0, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, steps, heads, width = x.shape
    compute = compute_dtype(x.dtype)
    valid = valid_steps(lengths, steps)
    # Beyond a length nothing may reach a gradient, not even times 0: neither x nor a weight out of range.
    w = only(valid, _along(weight, start, steps, compute))  # (1 or B, T, H)
    b = _along(bias, start, steps, compute)[..., None]
    w_in, w_out = in_and_out(w, mode)
    tokens = only(valid, x.to(compute))
    if isinstance(w_in, Tensor):
        tokens = tokens * w_in[..., None]
    gates = decay.to(compute).repeat_interleave(width)[None, None]  # (1, 1, H*D)
    flat = tokens.reshape(batch, steps, heads * width)
    if initial_state is None:
        state = flat.new_zeros(batch, heads * width)
    else:
        state = initial_state.to(compute).reshape(batch, heads * width)
    states, last = recurrence(only(valid, gates, 1.0), flat, state)
    states = states.unflatten(2, (heads, width))
    y = torch.addcmul(b, w_out[..., None], states) if isinstance(w_out, Tensor) else states + b
    return only(valid, y).to(x.dtype), last.unflatten(1, (heads, width)).to(state_dtype(initial_state, x))


def _along(parameter: Tensor, start: Any, steps: int, compute: torch.dtype) -> Tensor:
    """parameter (H, L) at the T positions from start on: (1, T, H) for one start, (B, T, H) for an array of them."""
    if not isinstance(start, Tensor):
        return parameter[:, start : start + steps].T[None].to(compute)
    return at_positions(parameter.to(compute), start[:, None] + torch.arange(steps, device=start.device))
