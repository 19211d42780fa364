"""`lstm` on torch's own: oneDNN on a CPU, cuDNN on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor

from srm_backends.torch.common import compute_dtype, nothing_of, only, state_dtype, valid_steps, wants_gradient
from srm_backends.torch.policy import under_policy
from srm_core.context import LaunchContext

SHUT = 1e30  # what shuts a gate, or opens it, against any sum
SMALL_WIDTH = 192
SMALL = 1e14  # in Euclidean length: no product of two such comes near to it, nor is there a NaN


def forward(
    ctx: LaunchContext, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    h0: Tensor | None = None, c0: Tensor | None = None, *, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, c = _layer(ctx, x, w_ih, w_hh, b_ih, b_hh, h0, c0, lengths, ctx.precision)
    return y.to(x.dtype), h.to(state_dtype(h0, x)), c.to(state_dtype(c0, x))


@under_policy("rnn")
def _layer(
    x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, h0: Tensor | None,
    c0: Tensor | None, lengths: Tensor | None, precision: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, h_n, c_n) in the dtype of computation."""
    (batch, steps, _), width = x.shape, w_hh.shape[1]
    compute = x.dtype if _is_half(x, w_ih, w_hh, b_ih, b_hh, h0, c0) else compute_dtype(x.dtype)
    x, w_ih, w_hh = x.to(compute), w_ih.to(compute), w_hh.to(compute)
    h, c = (x.new_zeros(batch, width) if s is None else s.to(compute).contiguous() for s in (h0, c0))
    biases = [w_ih.new_zeros(len(w_ih)) if b is None else b.to(compute) for b in (b_ih, b_hh)]
    if not batch or not steps or not width:
        none = nothing_of(only(valid_steps(lengths, steps), x), w_ih, w_hh, *biases)
        return none.expand(batch, steps, width).clone(), h + none, c + none
    weights = [w_ih, w_hh, *biases]
    if x.is_cuda:  # cuDNN wants them in one piece of memory, biases and all
        flat = torch.cat([w.reshape(-1) for w in weights])
        weights = [p.view(w.shape) for p, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True)]
    train, exact = wants_gradient(x, *weights, h, c), precision == "ieee"
    if lengths is None:
        return _run(x, h, c, weights, train, exact)
    x = only(valid_steps(lengths, steps), x)
    form = _at_once if x.device.type == "cpu" and _are_small(x, h, c, *weights) else _in_parts
    y, h, c = form(x, h, c, weights, lengths, train, exact)
    return only(valid_steps(lengths, steps), y), h, c


def _is_half(x: Tensor, *others: Tensor | None) -> bool:
    """Is all of it of one half type, on CUDA and without gradients? cuDNN accumulates in float32 and rounds the states
    that it gives; its gradients are rounded further, and oneDNN would round the cell between steps."""
    if not x.is_cuda or others[-2] is None or others[-1] is None or wants_gradient(x, *others):
        return False
    return all(t is None or t.dtype is x.dtype for t in others)


def _are_small(*tensors: Tensor) -> bool:
    return all(float(torch.linalg.vector_norm(t.detach())) < SMALL for t in tensors)


def _run(
    x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], train: bool, exact: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All the steps. Of up to SMALL_WIDTH channels cuDNN has a kernel whose sigmoids are good to 16 bits alone, which
    it does not take for sequences that are packed: so they are, to be exact."""
    (batch, steps, _), states = x.shape, (h[None], c[None])
    if exact and x.is_cuda and x.dtype is torch.float32 and h.shape[1] <= SMALL_WIDTH:
        packed, sizes = x.transpose(0, 1).flatten(0, 1), torch.full((steps,), batch)
        y, h, c = torch._VF.lstm(packed, sizes, states, weights, True, 1, 0.0, train, False)
        y = y.view(steps, batch, -1).transpose(0, 1)
    else:
        y, h, c = torch._VF.lstm(x, states, weights, True, 1, 0.0, train, False, True)
    return y, h[0], c[0]


def _at_once(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: list[Tensor],
    lengths: Tensor,
    train: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Within the lengths: all steps, and past a length an input of its own shuts i and opens f, so that c stays.

    Where there is a NaN or an infinity it would not.
    """
    (batch, steps, _), (w_ih, *others) = x.shape, weights
    beyond, some = torch.arange(steps) >= lengths[:, None], lengths[:, None] > 0
    hold = w_ih.new_tensor([-SHUT, SHUT, 0, 0]).repeat_interleave(len(w_ih) // 4)
    x = torch.cat([x, beyond[..., None]], 2)
    held = torch.cat([w_ih, hold[:, None]], 1)
    y, _, kept = _run(x, torch.where(some, h, 0.0), torch.where(some, c, 0.0), [held, *others], train, exact)
    last = y[torch.arange(batch), lengths.clamp(1) - 1]
    return y, torch.where(some, last, h), torch.where(some, kept, c)


def _in_parts(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weights: list[Tensor],
    lengths: Tensor,
    train: bool,
    exact: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Within the lengths, whatever the weights are, and without a look at either: runs of half of the steps, of half of
    the rest, and so on.

    A sequence takes part in a run if it has that many steps left; any length is a sum of some of the runs, which have
    T steps altogether. Another computes in its stead something of no account, from ones: zeros would make NaN of an
    infinite weight.
    """
    batch, steps, inputs = x.shape
    every, row = torch.arange(steps, device=x.device), torch.arange(batch, device=x.device)[:, None]
    source = x.reshape(-1, inputs)  # row b*T + t
    place = torch.zeros(batch, steps, dtype=torch.int64, device=x.device)  # of each step among what the runs computed
    parts, begin, done = [], 0, torch.zeros_like(lengths)[:, None]
    while begin < steps:
        size = (steps - begin + 1) // 2
        takes = lengths[:, None] - done >= size  # (B, 1)
        index = row * steps + done + every[:size]
        taken = source.index_select(0, index.reshape(-1)).view(batch, size, inputs)
        taken = torch.where(takes[:, :, None], taken, 1.0)
        y, h_end, c_end = _run(taken, torch.where(takes, h, 1.0), torch.where(takes, c, 1.0), weights, train, exact)
        h, c = torch.where(takes, h_end, h), torch.where(takes, c_end, c)
        since = every - done
        place = torch.where(takes & (since >= 0) & (since < size), batch * begin + row * size + since, place)
        parts.append(y.reshape(batch * size, -1))
        begin, done = begin + size, done + takes * size
    return torch.cat(parts).index_select(0, place.reshape(-1)).view(batch, steps, -1), h, c
