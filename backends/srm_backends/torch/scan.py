"""`scan` on torch: y_t = g_t * y_{t-1} + x_t.

Steps beyond a sequence's length get the gate 1 and the token 0, which carry the state through unchanged: so one
recurrence serves both directions, and the last state is every sequence's final one.
"""

from __future__ import annotations

from torch import Tensor

from srm_backends.torch.common import compute_dtype, only, state_dtype, valid_steps
from srm_backends.torch.recurrence import recurrence
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, gates: Tensor, tokens: Tensor | None = None, initial_state: Tensor | None = None,
    *, reverse: bool = False, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    like = gates if tokens is None else tokens
    batch, steps, width = like.shape
    compute = compute_dtype(like.dtype)
    valid = valid_steps(lengths, steps)
    g = only(valid, gates.to(compute), 1.0)
    x = None if tokens is None else only(valid, tokens.to(compute))
    if initial_state is not None:
        state = initial_state.to(compute)
    else:
        state = g.new_full((batch, width), 1.0 if tokens is None else 0.0)
    y, last = recurrence(g, x, state, reverse)
    return only(valid, y).to(like.dtype), last.to(state_dtype(initial_state, like))
