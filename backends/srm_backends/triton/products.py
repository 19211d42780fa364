"""Large matrix products outside the kernels, on the library that torch brings."""

from __future__ import annotations

import torch
from torch import Tensor

from srm_backends.torch.policy import held
from srm_core.context import LaunchContext


def multiply(ctx: LaunchContext, a: Tensor, b: Tensor) -> Tensor:
    """a (..., K) @ b (K, N) in float32, (..., N), under the call's policy of precision; half types are not rounded."""
    if a.dtype is not b.dtype:
        a, b = a.float(), b.float()
    flat = a.flatten(0, -2)
    with held(ctx, flat, "matmul"):
        if flat.dtype is torch.float32:
            found = flat @ b
        elif flat.is_cuda:
            found = torch.mm(flat, b, out_dtype=torch.float32)
        else:
            found = flat.float() @ b.float()
    return found.view(*a.shape[:-1], b.shape[1])


def gradient_of_weights(ctx: LaunchContext, grad: Tensor, given: Tensor, like: Tensor) -> Tensor:
    """The sum over all steps of grad (B, T, N) times given (B, T, K): (N, K), in the dtype of `like`."""
    return multiply(ctx, grad.flatten(0, 1).T, given.flatten(0, 1)).to(like.dtype)
