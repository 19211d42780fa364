"""Writing into a memory, and into the levels above what was written."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array, Rounding, exact
from srm_core.ops.hds_pool.hierarchy import ancestors, pooled


def reference(
    compute: Any, memory: Array, levels: tuple[Array, ...], new: Array, index: Any,
    *, pool: int = 4, rounding: Rounding = exact,
) -> tuple[Array, ...]:  # fmt: skip
    """memory[(index + s) mod M] = new[s]; every slot above one of those is the mean of its `pool` slots, as they
    are stored, from the lowest level up. (The hierarchical memory of the MM-Rec model.)

    Returns what memory and each level hold afterwards.
    """
    after = [a.astype(compute) for a in (memory, *levels)]
    sizes = {"M": memory.shape[-2], "S": new.shape[-2]}
    for b, first in enumerate(np.broadcast_to(np.asarray(index), memory.shape[:1])):
        touched = ancestors(sizes, int(first), len(after), pool)
        after[0][b][..., touched[0], :] = new[b]
        for below, above, slots in zip(after, after[1:], touched[1:], strict=False):
            for slot in slots:
                children = below[b][..., slot * pool : (slot + 1) * pool, :]
                above[b][..., slot : slot + 1, :] = pooled(children, pool, rounding)
    return tuple(after)
