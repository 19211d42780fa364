"""The sizes of a hierarchy's levels and the slots above a slot, for the three operators on one.

Level 0 is the memory. A slot of level l + 1 is the mean of `pool` neighbours in level l; what is left of a level
after its last whole window has nothing above it. So level l stands for the first M_l * pool^l slots of the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from srm_core.contract import check_count
from srm_core.ops.common import Array, Rounding
from srm_core.spec import OptionSpec

LEVELS = "levels"  # a level may be pooled from the rounded level below it
SOURCE = "the hierarchical memory of the MM-Rec model"

NUM_LEVELS = OptionSpec(
    "num_levels",
    check_count(1),
    default=3,
    keyword=True,
    schema="int",
    doc="how many levels there are, with the memory as level 0",
)
POOL = OptionSpec(
    "pool", check_count(1), default=4, keyword=True, schema="int", doc="how many slots are averaged into one above"
)


def level_sizes(slots: int, num_levels: int, pool: int) -> list[int]:
    """M_0 = M, M_1, ...: the number of slots of each level; a level that would be empty is left out."""
    sizes = [slots]
    while len(sizes) < num_levels and sizes[-1] >= pool:
        sizes.append(sizes[-1] // pool)
    return sizes


def constrain_levels(call: Any) -> None:
    """Every level of the call's hierarchy over M slots must have a slot."""
    slots, num_levels, pool = call.dims["M"], call.values["num_levels"], call.values["pool"]
    there = len(level_sizes(slots, num_levels, pool))
    if there < num_levels:
        raise call.error(
            "num_levels", f"{num_levels} levels over {slots} slots in pools of {pool}",
            f"at most {there}, so that no level is empty", "take fewer levels, smaller pools or a larger memory",
        )  # fmt: skip


def pooled(level: Array, pool: int, rounding: Rounding) -> Array:
    """The level above: the means of whole windows. level: (..., M, D) in the dtype of computation."""
    *lead, slots, width = level.shape
    count = slots // pool
    windows = level[..., : count * pool, :].reshape(*lead, count, pool, width)
    return rounding(LEVELS, windows.sum(axis=-2) / pool)


def hierarchy(memory: Array, num_levels: int, pool: int, rounding: Rounding) -> list[Array]:
    """All levels, of which the memory is the first."""
    levels = [memory]
    for _ in range(1, num_levels):
        levels.append(pooled(levels[-1], pool, rounding))
    return levels


def spread(grad: Array, slots: int, pool: int) -> Array:
    """The gradient (..., M, D) that a level has from that of the level above: a share for each slot of a window."""
    below = np.zeros((*grad.shape[:-2], slots, grad.shape[-1]), grad.dtype)
    below[..., : grad.shape[-2] * pool, :] = np.repeat(grad, pool, axis=-2) / pool
    return below


def ancestors(dims: Mapping[str, int], first: int, num_levels: int, pool: int) -> list[Array]:
    """The slots of each level, from 0, that writing S slots from `first` on changes in a memory of M slots."""
    slots = max(dims["M"], 1)
    touched = [(first % slots + np.arange(dims["S"])) % slots]
    for size in level_sizes(dims["M"], num_levels, pool)[1:]:
        parents = np.unique(touched[-1] // pool)
        touched.append(parents[parents < size])
    return touched
