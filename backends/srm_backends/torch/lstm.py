"""`lstm` on torch's own: oneDNN on a CPU, cuDNN on CUDA.

Sequences of different lengths go packed; that needs their lengths on the host, so on CUDA this waits for them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from srm_backends.torch.common import compute_dtype, nothing_of, only, state_dtype, valid_steps
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
    valid = valid_steps(lengths, steps)
    x, w_ih, w_hh = only(valid, x.to(compute)), w_ih.to(compute), w_hh.to(compute)
    h, c = (x.new_zeros(batch, width) if s is None else s.to(compute) for s in (h0, c0))
    if not batch or not steps or not width:
        none = nothing_of(x, w_ih, w_hh, *(None if b is None else b.to(compute) for b in (b_ih, b_hh)))
        return none.expand(batch, steps, width).clone(), h + none, c + none
    biases = [w_ih.new_zeros(len(w_ih)) if b is None else b.to(compute) for b in (b_ih, b_hh)]
    weights = [w_ih, w_hh, *([] if b_ih is None and b_hh is None else biases)]
    if x.is_cuda:  # cuDNN wants them in one piece of memory
        flat = torch.cat([w.reshape(-1) for w in weights])
        weights = [p.view(w.shape) for p, w in zip(flat.split([w.numel() for w in weights]), weights, strict=True)]
    train = torch.is_grad_enabled()
    if lengths is None:
        y, h, c = torch._VF.lstm(x, (h[None], c[None]), weights, len(weights) > 2, 1, 0.0, train, False, True)
        return y, h[0], c[0]
    return _packed(x, h, c, weights, lengths, train)


def _packed(
    x: Tensor, h0: Tensor, c0: Tensor, weights: list[Tensor], lengths: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same within the lengths. A sequence without steps is left out: it has no part in any sum."""
    counts = lengths.cpu()
    some = counts.nonzero().squeeze(1)
    if len(some) == 0:
        none = nothing_of(x, *weights)
        return none.expand(*x.shape[:2], h0.shape[1]).clone(), h0 + none, c0 + none
    rows, steps = some.to(x.device), x.shape[1]
    packed = pack_padded_sequence(x[rows], counts[some], batch_first=True, enforce_sorted=False)
    order, back = rows[packed.sorted_indices], packed.unsorted_indices
    data, h, c = torch._VF.lstm(
        packed.data, packed.batch_sizes, (h0[order][None], c0[order][None]), weights, len(weights) > 2, 1, 0.0, train,
        False,
    )  # fmt: skip
    ran = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, back)
    y, _ = pad_packed_sequence(ran, batch_first=True, total_length=steps)
    if len(some) == len(counts):
        return y, h[0][back], c[0][back]
    whole = y.new_zeros(len(counts), steps, y.shape[2]).index_copy(0, rows, y)
    return whole, h0.index_copy(0, rows, h[0][back]), c0.index_copy(0, rows, c[0][back])
