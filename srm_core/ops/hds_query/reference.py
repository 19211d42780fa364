"""Attention over one level of a hierarchical memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.attention import reference as attention
from srm_core.ops.common import Array, Rounding, exact, sum_to
from srm_core.ops.hds_pool.hierarchy import hierarchy, level_sizes, spread


def reference(
    compute: Any, query: Array, keys: Array, values: Array,
    *, level: int = -1, num_levels: int = 3, pool: int = 4, scale: float | None = None, rounding: Rounding = exact,
) -> tuple[Array]:  # fmt: skip
    """out = softmax(scale * query @ k^T) @ v, where k and v are keys and values pooled to `level`, the same for all
    sequences where their batch is 1. Without slots it is 0. (The hierarchical memory of the MM-Rec model.)
    """
    k, v = (_at_level(compute, a, len(query), level, num_levels, pool, rounding) for a in (keys, values))
    return attention.reference(compute, query, k, v, scale=scale, rounding=rounding)


def vjp(
    compute: Any, grads: tuple[Array], query: Array, keys: Array, values: Array,
    *, level: int = -1, num_levels: int = 3, pool: int = 4, scale: float | None = None, rounding: Rounding = exact,
) -> tuple[Array, ...]:  # fmt: skip
    """That of attention; the gradient of a pooled slot is shared by the slots that it averages."""
    k, v = (_at_level(compute, a, len(query), level, num_levels, pool, rounding) for a in (keys, values))
    d_query, *pooled, _ = attention.vjp(compute, grads, query, k, v, scale=scale, rounding=rounding)
    sizes = level_sizes(keys.shape[2], num_levels, pool)[: range(num_levels)[level]]
    gradients = [d_query]
    for grad, like in zip(pooled, (keys, values), strict=True):
        total = sum_to(grad, (len(like), *grad.shape[1:]))
        for slots in reversed(sizes):
            total = spread(total, slots, pool)
        gradients.append(total)
    return tuple(gradients)


def _at_level(
    compute: Any, memory: Array, batch: int, level: int, num_levels: int, pool: int, rounding: Rounding
) -> Array:
    """Keys or values at a level, for every sequence."""
    found = hierarchy(memory.astype(compute), num_levels, pool, rounding)[level]
    return np.broadcast_to(found, (batch, *found.shape[1:]))
