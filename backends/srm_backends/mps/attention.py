"""`attention` on Apple GPUs: the torch backend's, but for a causal mask in half types, which is spelt out.

There torch's own is_causal lets a query see up to three later keys, and says nothing (pytorch issue #195910).
"""

from __future__ import annotations

import torch
from torch import Tensor

from srm_backends.torch import attention as composed
from srm_core.context import LaunchContext


def forward(
    ctx: LaunchContext, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if is_causal and query.dtype is not torch.float32:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()  # (T, S)
        is_causal = False
    return composed.forward(
        ctx, query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )  # fmt: skip
