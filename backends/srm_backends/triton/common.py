"""What the kernels share: the sigmoid and tanh, products of tiles, and the dtypes of states and results."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), which is 0 where exp overflows."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """Good to 2 units of the last place, also where x is next to nothing: below 0.6 an odd polynomial, fitted at the
    zeros of a Chebyshev polynomial (relative error 4e-10)."""
    u = x * x
    p = 2.37354e-3
    p = p * u - 8.41258e-3
    p = p * u + 2.178912e-2
    p = p * u - 5.396165e-2
    p = p * u + 0.13333313
    p = p * u - 0.33333333
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.6, x + x * u * p, tl.where(x < 0, -far, far))


@triton.jit
def tf32(x):
    """float32 rounded to TF32's 10 bits behind the point: the matrix units would cut the others off."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr, acc=None):
    """a @ b, and + acc, in float32. PRECISION: of float32 factors, "ieee" or "tf32"."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a = tf32(a)
        b = tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def state_dtype(given: Any, like: Any) -> torch.dtype:
    """The dtype of a state that comes back: that of the one that came in, else float32."""
    return torch.float32 if given is None else given.dtype
