"""`recurrent_step` on Apple GPUs: a Metal kernel, one thread an element; with gradients, the torch operations."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import Tensor

from srm_backends.mps import shaders
from srm_backends.torch import recurrent_step as composed
from srm_backends.torch.common import wants_gradient
from srm_core.context import LaunchContext

MOST_HEADS = 512 * 32  # Metal takes 4096 bytes of an argument that is no buffer


@lru_cache(maxsize=256)
def _row_heads(mode: tuple[str, ...]) -> list[int]:
    """Which heads are row heads, 32 of them in a number."""
    words = [0] * (len(mode) // 32 + 1)
    for h, word in enumerate(mode):
        words[h // 32] |= (word == "row") << h % 32
    return words


def forward(
    ctx: LaunchContext, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, decay: Tensor,
    mode: tuple[str, ...], index: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, width = x.shape
    if not shaders.available() or heads >= MOST_HEADS or wants_gradient(x, state, weight, bias, decay):
        return composed.forward(ctx, x, state, weight, bias, decay, mode, index)
    y, new = ctx.empty(x.shape, x.dtype), ctx.empty(state.shape, state.dtype)
    if not y.numel():
        return y, new
    if not weight.dtype is bias.dtype is decay.dtype:  # few, and seldom
        weight, bias, decay = weight.float(), bias.float(), decay.float()
    array = index if isinstance(index, Tensor) else None
    plan = [
        weight.shape[1], 0 if array is not None else int(index), *shaders.integers(array),
        *shaders.strides(x), *shaders.strides(state), *shaders.strides(weight), *shaders.strides(bias),
        *shaders.strides(decay), *shaders.strides(y), *shaders.strides(new),
    ]  # fmt: skip
    buffers = [x, state, weight, bias, decay, x if array is None else array, y, new]
    dtypes = (x.dtype, weight.dtype, state.dtype)
    shaders.launch("recurrent_step", dtypes, [*buffers, _row_heads(mode), plan], (width, heads, batch))
    return y, new
