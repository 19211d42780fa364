"""`lstm` on torch's own: oneDNN on a CPU, cuDNN on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from srm_backends.torch.common import compute_dtype, nothing_of, only, state_dtype, valid_steps, wants_gradient
from srm_backends.torch.policy import under_policy
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    h0: Tensor | None = None, c0: Tensor | None = None, *, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, c = _layer(ctx, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths)
    return y.to(x.dtype), h.to(state_dtype(h0, x)), c.to(state_dtype(c0, x))


@under_policy
def _layer(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    c0: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h_n, c_n) in the dtype of computation: torch's own would keep a half cell between steps."""
    (batch, steps, _), width, compute = x.shape, w_hh.shape[1], compute_dtype(x.dtype)
    x, w_ih, w_hh = x.to(compute), w_ih.to(compute), w_hh.to(compute)
    h, c = (x.new_zeros(batch, width) if s is None else s.to(compute) for s in (h0, c0))
    biases = [w_ih.new_zeros(len(w_ih)) if b is None else b.to(compute) for b in (b_ih, b_hh)]
    if not batch or not steps or not width:
        none = nothing_of(only(valid_steps(lengths, steps), x), w_ih, w_hh, *biases)
        return none.expand(batch, steps, width).clone(), h + none, c + none
    weights = [w_ih, w_hh, *biases]
    if x.is_cuda:  # cuDNN wants them in one piece of memory, biases and all
        flat = torch.cat([w.reshape(-1) for w in weights])
        weights = [p.view(w.shape) for p, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True)]
    train = wants_gradient(x, *weights, h, c)
    return _run(x, h, c, weights, train) if lengths is None else _within(x, h, c, weights, lengths, train)


def _run(x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], train: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, h, c = torch._VF.lstm(x, (h[None], c[None]), weights, True, 1, 0.0, train, False, True)
    return y, h[0], c[0]


def _within(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], lengths: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same within the lengths, which nobody waits for: in runs of a half of the steps, half of the rest, and so on.

    A sequence takes part in a run if it has that many steps left; any length is a sum of some of the runs, which have
    T steps altogether. Another computes something without meaning in its stead, of ones: zeros would make NaN of an
    infinite weight.
    """
    batch, steps, inputs = x.shape
    # What stands past a length is never read.
    source = torch.cat([x.reshape(-1, inputs), x.new_ones(1, inputs)])
    every, at = torch.arange(steps, device=x.device), torch.zeros_like(lengths)
    row = torch.arange(batch, device=x.device) * steps  # where each sequence begins in the source
    place = torch.full((batch, steps), batch * steps, device=x.device)  # of each step, in what the runs computed
    parts, begin = [], 0
    while begin < steps:
        size = (steps - begin + 1) // 2
        part = lengths - at >= size
        here = part[:, None]
        index = torch.where(here, (row + at)[:, None] + every[:size], batch * steps)
        one = source.index_select(0, index.reshape(-1)).view(batch, size, inputs)
        y, *ends = _run(one, *(torch.where(here, s, 1.0) for s in (h, c)), weights, train)
        h, c = (torch.where(here, e, s) for e, s in zip(ends, (h, c), strict=True))
        since = every - at[:, None]
        found = batch * begin + torch.arange(batch, device=x.device)[:, None] * size + since
        place = torch.where(here & (since >= 0) & (since < size), found, place)
        parts.append(y.reshape(-1, y.shape[2]))
        begin, at = begin + size, at + part * size
    parts.append(x.new_zeros(1, h.shape[1]))
    return torch.cat(parts).index_select(0, place.reshape(-1)).view(batch, steps, -1), h, c
