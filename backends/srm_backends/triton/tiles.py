"""Tiles that the hardware copies by itself (the tensor memory accelerator of NVIDIA GPUs from Hopper on).

What is outside a tensor is 0 in a tile. A thread makes no addresses and holds none, which leaves registers to a kernel.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from srm_backends.triton.launch import INTERPRETED
from srm_core.context import LaunchContext

FIRST = 9  # major compute capability
STEP = 16  # bytes: of addresses, and of all strides but the last, which is 1


def available(ctx: LaunchContext) -> bool:
    return INTERPRETED or (ctx.device is not None and _capability(ctx.device.index) >= FIRST)


@cache
def _capability(device: int) -> int:
    return 0 if torch.version.hip else int(torch.cuda.get_device_capability(device)[0])


def describe(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor | None:
    """What a kernel reads tiles of the shape `block` with; None if the hardware has no such tiles of this tensor."""
    shape, strides, size = tensor.shape, list(tensor.stride()), tensor.element_size()
    if tensor.data_ptr() % STEP or 0 in shape or max(shape) >= 1 << 31:
        return None
    for i, n in enumerate(shape):
        last = i == len(shape) - 1
        if n == 1:
            strides[i] = 1 if last else STEP // size
        elif (last and strides[i] != 1) or (not last and (strides[i] <= 0 or strides[i] * size % STEP)):
            return None
    return TensorDescriptor(tensor, list(shape), strides, list(block))
