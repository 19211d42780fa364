"""The levels above a memory, one from the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array, Rounding, exact
from srm_core.ops.hds_pool.hierarchy import hierarchy, level_sizes, spread


def reference(
    compute: Any, memory: Array, *, num_levels: int = 3, pool: int = 4, rounding: Rounding = exact
) -> tuple[Array, ...]:
    """level[l+1, m] = the sum of level[l, pool*m + i] over 0 <= i < pool, divided by pool; level[0] is the memory.

    (The hierarchical memory of the MM-Rec model.)
    """
    return tuple(hierarchy(memory.astype(compute), num_levels, pool, rounding)[1:])


def vjp(
    compute: Any, grads: tuple[Array, ...], memory: Array,
    *, num_levels: int = 3, pool: int = 4, rounding: Rounding = exact,
) -> tuple[Array]:  # fmt: skip
    """A level's gradient is the one that it was given, and 1/pool of that of the slot above; down to the memory.

    No rounding is permitted here.
    """
    sizes = level_sizes(memory.shape[-2], num_levels, pool)
    total = grads[-1].astype(compute) if grads else np.zeros(memory.shape, compute)
    for level in range(num_levels - 2, -1, -1):
        total = spread(total, sizes[level], pool)
        if level:
            total = total + grads[level - 1].astype(compute)
    return (total,)
