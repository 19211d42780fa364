"""What the kernels of this backend share: the dtype of computation, dtypes of results, the steps of a sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), without the price of the call where there is nothing to do."""
    return t if t.dtype is dtype else t.to(dtype)


def in_order(t: Tensor) -> Tensor:
    """t, but not with odd strides along axes of one: contiguous to torch, they are an error to cuBLAS in `addmm`."""
    step, strides = 1, []
    for size in reversed(t.shape):
        strides.append(step)
        step *= size
    odd = t.is_contiguous() and t.stride() != tuple(strides[::-1])
    return t.clone(memory_format=torch.contiguous_format) if odd else t


def state_dtype(given: Tensor | None, like: Tensor) -> torch.dtype:
    """The dtype of a state that comes back: that of the one that came in, else float32 beside half types."""
    return compute_dtype(like.dtype) if given is None else given.dtype


def valid_steps(lengths: Tensor | None, steps: int) -> Tensor | None:
    """Which of the (B, T) steps lie within their sequence; None if all do."""
    return None if lengths is None else torch.arange(steps, device=lengths.device) < lengths[:, None]


def only(valid: Tensor | None, values: Tensor, beyond: float = 0.0) -> Tensor:
    """The values (B, T, ...), and `beyond` where a step is past its sequence, whatever stands there."""
    if valid is None:
        return values
    return torch.where(valid.reshape(*valid.shape, *(1,) * (values.dim() - 2)), values, beyond)


def nothing_of(*tensors: Tensor | None) -> Tensor:
    """0, which depends on every tensor: what is made of it has gradients, of zeros."""
    return torch.stack([t[..., :0].sum() for t in tensors if t is not None]).sum()


def wants_gradient(*tensors: Any) -> bool:
    """Does autograd record what is done with one of them?"""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def channels_last(x: Tensor) -> bool:
    """Are they images (B, C, H, W) dense in channels-last order, and not in their own as well?"""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def no_conflict(good: Tensor) -> Tensor:
    """For writes of which some, known to the device alone, must not happen: (..., K) which write to do instead.

    A write that is not good is replaced by the first good one of its row, which is then done twice; where none is
    good, by the first, whose value must be what stands there.
    """
    order = torch.arange(good.shape[-1], device=good.device)
    return torch.where(good, order, good.to(torch.int32).argmax(-1, keepdim=True))
