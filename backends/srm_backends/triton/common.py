"""What the kernels share: the sigmoid, and the dtypes of states and results."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), which is 0 where exp overflows."""
    return 1 / (1 + tl.exp(-x))


def state_dtype(given: Any, like: Any) -> torch.dtype:
    """The dtype of a state that comes back: that of the one that came in, else float32."""
    return torch.float32 if given is None else given.dtype
