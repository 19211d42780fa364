"""`attention` on torch's scaled_dot_product_attention, with the rows mended that have nothing to attend to."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from srm_backends.torch.common import compute_dtype, nothing_of
from srm_backends.torch.policy import under_policy
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return attend(ctx, query, key, value, attn_mask, is_causal, scale, enable_gqa)[0]


@under_policy
def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> tuple[Tensor]:  # fmt: skip
    """out (B, H, T, E) of query (B, H, T, D), key (B, G, S, D), value (B, G, S, E)."""
    shape, slots = (*query.shape[:3], value.shape[3]), key.shape[2]
    if 0 in shape or not slots:
        return (nothing_of(query, key, value).expand(shape).clone(),)
    if not query.shape[3]:  # every score is 0, or the mask's
        query, key = pad(query, (0, 1)), pad(key, (0, 1))
        scale = 1.0
    dtype, dead = query.dtype, None
    if attn_mask is not None:
        if attn_mask.dtype not in (torch.bool, dtype):  # a float32 mask beside halves is not rounded
            query, key, value = (a.to(attn_mask.dtype) for a in (query, key, value))
        if attn_mask.dtype is torch.bool:
            dead = ~attn_mask.any(-1, keepdim=True)
            attn_mask = attn_mask | dead
        else:
            dead = (attn_mask == -torch.inf).all(-1, keepdim=True)
            attn_mask = torch.where(dead, 0.0, attn_mask)
        attn_mask = attn_mask.expand(*shape[:3], slots)
    fused = scale != 0 and (query.device.type != "cpu" or _are_finite(query, key))
    out = (scaled_dot_product_attention if fused else _composed)(
        query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return ((out if dead is None else torch.where(dead, 0.0, out)).to(dtype),)


def _are_finite(*tensors: Tensor) -> bool:
    return all(bool(t.detach().sum(dtype=compute_dtype(t.dtype)).isfinite()) for t in tensors)


def _composed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, _: float, is_causal: bool, *, scale: float | None,
    enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """The same in single operations: torch's fused kernels give 0 where a score is NaN (on a CPU), and gradients of 0
    where the scale is 0, also of what is infinite."""
    compute = compute_dtype(query.dtype)
    q, k, v = (a.to(compute) for a in (query, key, value))
    if enable_gqa:
        k, v = (a.repeat_interleave(q.shape[1] // a.shape[1], 1) for a in (k, v))
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype is torch.bool else scores + mask
    return scores.softmax(-1) @ v
