"""`mdi` on NumPy: blocks of elements that stay in the cache while a dozen simple passes go over them.

Forward and backward walk over flat views of the arguments, converting a block at a time to the dtype of computation;
so beside contiguous arguments no temporary is larger than a block, whatever the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_backends.numpy.common import Array, compute_dtype, quiet, sigmoid_
from srm_core.context import LaunchContext, Residuals

BLOCK = 8192  # elements: half a dozen blocks of float32 fit into 256 KB


@quiet
def forward(
    ctx: LaunchContext, z: Array, h: Array, gate_logits: Array, decay_logits: Array,
    modulation_logits: Array | None = None, *, eps: float,
) -> tuple[Array, Array]:  # fmt: skip
    compute = compute_dtype(z.dtype)
    h_new, gamma = ctx.empty(z.shape, h.dtype), ctx.empty(z.shape, z.dtype)
    inputs = _flat(z, h, gate_logits, decay_logits, modulation_logits)
    outputs = [h_new.reshape(-1), gamma.reshape(-1)]
    low = compute(eps)
    for part in _parts(z.size):
        z_, h_, g, d, m = _blocks(inputs, part, compute)
        sigmoid_(g)
        sigmoid_(d)
        if m is not None:
            d *= sigmoid_(m)
        np.clip(d, low, 1 - low, out=d)
        outputs[1][part] = d
        z_ *= g
        np.subtract(1, g, out=g)
        g *= h_
        d *= h_
        z_ += g
        z_ += d
        outputs[0][part] = z_
    return h_new, gamma


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_h: Array, grad_gamma: Array) -> tuple[Any, ...]:
    """See the reference's vjp; the sigmoids are computed again, which is cheaper than to keep them."""
    args = residuals.args
    compute = compute_dtype(args[0].dtype)
    low, high = compute(residuals.options["eps"]), 1 - compute(residuals.options["eps"])
    inputs = _flat(*args, grad_h, grad_gamma)
    gradients = [None if a is None else ctx.empty(a.shape, a.dtype) for a in args]
    outputs = [None if g is None else g.reshape(-1) for g in gradients]
    for part in _parts(args[0].size):
        z, h, g, d, m, a, d_gamma = _blocks(inputs, part, compute)
        sigmoid_(g)
        sigmoid_(d)
        product = d.copy() if m is None else d * sigmoid_(m)
        gamma = np.clip(product, low, high)
        e = d_gamma
        e += a * h
        e *= product
        e[(product < low) | (product > high)] = 0
        d_gate = a * (z - h) * (g * (1 - g))
        found = (a * g, a * (1 - g + gamma), d_gate, e * (1 - d), None if m is None else e * (1 - m))
        for out, values in zip(outputs, found, strict=True):
            if out is not None:
                out[part] = values
    return tuple(gradients)


def _flat(*arrays: Array | None) -> list[Array | None]:
    """Views with one axis; copies where there is no such view."""
    return [None if a is None else a.reshape(-1) for a in arrays]


def _parts(size: int) -> Iterator[slice]:
    for i in range(0, size, BLOCK):
        yield slice(i, i + BLOCK)


def _blocks(flat: list[Array | None], part: slice, compute: Any) -> list[Any]:
    """Copies of a block of each in the dtype of computation."""
    return [None if a is None else a[part].astype(compute) for a in flat]
