"""`hds_query`: keys and values are pooled to the level that is asked for, and attended to."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_backend_cpp.arrays import Array, dense, like
from srm_backend_cpp.native import kernels
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.attention.reference import default_scale


def forward(
    ctx: LaunchContext, query: Array, keys: Array, values: Array,
    *, level: int = -1, num_levels: int = 3, pool: int = 4, scale: float | None = None,
) -> Array:  # fmt: skip
    out: Array = ctx.empty((*query.shape[:3], values.shape[3]), query.dtype)
    k, v = (_at_level(a, range(num_levels)[level], pool) for a in (keys, values))
    kernels.attend(dense(query), k, v, default_scale(scale, query.shape[3]), out)
    return out


def backward(ctx: LaunchContext, residuals: Residuals, grad_out: Array) -> tuple[Any, ...]:
    """Pooling and the probabilities again, which is cheaper than to keep them."""
    query, keys, values = residuals.args
    options = residuals.options
    pool, top = options["pool"], range(options["num_levels"])[options["level"]]
    memories = tuple(_at_level(a, top, pool) for a in (keys, values))
    d_query, *gradients = (like(ctx, a) for a in residuals.args)
    pooled = tuple(ctx.scratch((len(query), *m.shape[1:]), m.dtype) for m in memories)
    scale = default_scale(options["scale"], query.shape[3])
    kernels.attend_backward(dense(query), *memories, scale, dense(grad_out), d_query, *pooled)
    for grad, into in zip(pooled, gradients, strict=True):
        of_memory = grad if len(grad) == len(into) else grad.sum(0, keepdims=True)
        kernels.spread(of_memory, pool**top, into)
    return d_query, *gradients


def _at_level(memory: Array, level: int, pool: int) -> Array:
    """(B, H, M, D) at a level; the memory itself is level 0."""
    memory = dense(memory)
    if not level:
        return memory
    pooled = np.empty((*memory.shape[:2], memory.shape[2] // pool**level, memory.shape[3]), memory.dtype)
    kernels.pool(memory, level, pool, pooled)
    return pooled
