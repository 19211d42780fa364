"""`recurrent_step` and `recurrent_step_` on torch, all heads of both modes at once.

Both modes are s' = w_in*x + d*s and y = w_out*s' + b, with (w_in, w_out) = (w, 1) for a row head and (1, w) for a
col head.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import as_dtype, compute_dtype, no_conflict
from srm_core.context import LaunchContext


@lru_cache(maxsize=256)
def _row_heads(mode: tuple[str, ...], device: torch.device) -> Tensor:
    """(H,) True for row heads. Made once: a copy from the host has no place in a captured graph."""
    with torch.inference_mode(False):
        return torch.tensor([word == "row" for word in mode], dtype=torch.bool, device=device)


def in_and_out(w: Tensor, mode: tuple[str, ...]) -> tuple[Any, Any]:
    """(w_in, w_out) of w (..., H); a number where it is 1 for every head."""
    if "col" not in mode:
        return w, 1.0
    if "row" not in mode:
        return 1.0, w
    row = _row_heads(mode, w.device)
    return torch.where(row, w, 1.0), torch.where(row, 1.0, w)


def at_positions(parameter: Tensor, positions: Tensor) -> Tensor:
    """parameter (H, L) at positions (...): (..., H); NaN where a position is out of range."""
    last = parameter.shape[1] - 1
    inside = (positions >= 0) & (positions <= last)
    if last < 0:  # there is nothing to take; one column in its place, which nobody sees
        parameter, last = torch.nn.functional.pad(parameter, (0, 1)), 0
    # A position without axes would be asked for its value.
    taken = parameter.T[positions.clamp(0, last).reshape(-1)].view(*positions.shape, len(parameter))
    return torch.where(inside[..., None], taken, torch.nan)


def _columns(weight: Tensor, bias: Tensor, index: Any, compute: torch.dtype) -> tuple[Tensor, Tensor]:
    """(w, b) at the index, (H, 1) or (B, H, 1)."""
    if not isinstance(index, Tensor):
        return as_dtype(weight.narrow(1, index, 1), compute), as_dtype(bias.narrow(1, index, 1), compute)
    w, b = (at_positions(as_dtype(p, compute), index) for p in (weight, bias))
    return w.unsqueeze(-1), b.unsqueeze(-1)


def _advance(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, mode: tuple[str, ...], index: Any
) -> tuple[Tensor, Tensor]:
    """(y, s') in the dtype of computation."""
    compute = compute_dtype(x.dtype)
    w, b = _columns(weight, bias, index, compute)
    x, state, d = as_dtype(x, compute), as_dtype(state, compute), as_dtype(decay, compute).unsqueeze(-1)
    if "col" not in mode:
        new = torch.addcmul(x * w, d, state)
        return new + b, new
    if "row" not in mode:
        new = torch.addcmul(x, d, state)
        return torch.addcmul(b, w, new), new
    w_in, w_out = in_and_out(w.squeeze(-1), mode)
    new = torch.addcmul(x * w_in.unsqueeze(-1), d, state)
    return torch.addcmul(b, w_out.unsqueeze(-1), new), new


def forward(
    ctx: LaunchContext, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor,
    mode: tuple[str, ...], index: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y, new = _advance(x, state, weight, bias, decay, mode, index)
    return as_dtype(y, x.dtype), as_dtype(new, state.dtype)


def forward_(
    ctx: LaunchContext, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor,
    mode: tuple[str, ...], index: Any, *, slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    with torch.no_grad():
        if slots is None:
            y, new = _advance(x, state, weight, bias, decay, mode, index)
            state.copy_(new)
            return as_dtype(y, x.dtype)
        if not x.shape[0]:
            return torch.empty_like(x, memory_format=torch.contiguous_format)
        if slots.device.type == "cpu":  # they have been checked
            y, new = _advance(x, state.index_select(0, slots), weight, bias, decay, mode, index)
            state.index_copy_(0, slots.long(), as_dtype(new, state.dtype))
            return as_dtype(y, x.dtype)
        return _unchecked(x, state, weight, bias, decay, mode, index, slots)


def _unchecked(
    x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor, mode: tuple[str, ...], index: Any,
    slots: Tensor,
) -> Tensor:  # fmt: skip
    """With slots that may be out of range, in device memory: those give NaN and change nothing."""
    if not state.shape[0]:
        return torch.full_like(x, torch.nan, memory_format=torch.contiguous_format)
    good = (slots >= 0) & (slots < state.shape[0])  # (B,)
    rows = torch.where(good, slots, 0).long()
    before = state[rows]
    y, new = _advance(x, before, weight, bias, decay, mode, index)
    source = no_conflict(good)
    after = torch.where(good[:, None, None], new.to(state.dtype), before)
    state.index_copy_(0, rows[source], after[source])
    return torch.where(good[:, None, None], y, torch.nan).to(x.dtype)
