"""`attention` on torch's scaled_dot_product_attention, with the rows mended that have nothing to attend to."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from srm_backends.torch.common import compute_dtype, nothing_of
from srm_backends.torch.policy import under_policy
from srm_core.context import LaunchContext

MANY = 2**28  # scores: a GiB of float32


def forward(
    ctx: LaunchContext, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    return attend(ctx, query, key, value, attn_mask, is_causal, scale, enable_gqa, ctx.precision)[0]


@under_policy("matmul")
def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None,
    enable_gqa: bool, precision: str,
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
    fused = scale != 0 and (_is_exact(query, key) if query.device.type == "cpu" else _is_fused(query, slots, precision))
    if fused:
        query, key, value = (_aligned(a) for a in (query, key, value))
        attn_mask = None if attn_mask is None else _aligned(attn_mask)
        out = scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        if out.is_cuda and out.requires_grad:
            out.register_hook(_aligned)  # its backward reads the gradient in the same way
    else:
        out = _composed(query, key, value, attn_mask, is_causal, scale)
    return ((out if dead is None else torch.where(dead, 0.0, out)).to(dtype),)


def _is_exact(query: Tensor, key: Tensor) -> bool:
    """On a CPU torch's fused kernel gives 0 where a score is NaN."""
    return all(bool(t.detach().sum(dtype=compute_dtype(t.dtype)).isfinite()) for t in (query, key))


def _is_fused(query: Tensor, slots: int, precision: str) -> bool:
    """On CUDA torch's fused kernel makes float32 products of three TF32 ones: an infinity gives NaN, tiny numbers 0,
    and gradients of large scores are wrong. It is taken where that was asked for, and where the scores would fill the
    memory."""
    if query.dtype not in (torch.float32, torch.float64):
        return True
    return precision == "tf32" or prod(query.shape[:3]) * slots > MANY


def _aligned(a: Tensor) -> Tensor:
    """What torch's fused kernels on CUDA can read: they take a start between 16 bytes for an aligned one, and fail, or
    read something else."""
    if a.device.type == "cpu" or (a.data_ptr() % 16 == 0 and a.stride(-1) == 1):
        return a
    return a.clone(memory_format=torch.contiguous_format)


def _composed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """The same in single operations; the query heads that share a key head are one after the other in its rows."""
    compute = compute_dtype(query.dtype)
    (batch, heads, steps, width), (groups, slots) = query.shape, key.shape[1:3]
    rows = heads // groups * steps

    def merged(a: Tensor, *shape: int) -> Tensor:  # (B * G, ...)
        return a.to(compute).reshape(batch * groups, *shape)

    q, k, v = merged(query, rows, width), merged(key, slots, width), merged(value, slots, value.shape[3])
    if is_causal:
        mask = torch.ones(steps, slots, dtype=torch.bool, device=q.device).tril()
    if mask is None:
        added = q.new_zeros(())
    elif mask.dtype is torch.bool:
        added = q.new_zeros(()).masked_fill(~mask, -torch.inf)
    else:
        added = mask
    if added.dim():
        added = merged(added.expand(batch, heads, steps, slots), rows, slots)
    factor = width**-0.5 if scale is None else scale
    if factor:
        scores = torch.baddbmm(added, q, k.transpose(1, 2), beta=float(mask is not None), alpha=factor)  # (B * G, R, S)
    else:  # which has no product then, and no NaN of it
        scores = q @ k.transpose(1, 2) * factor + added
    return (scores.softmax(-1) @ v).view(batch, heads, steps, -1)
