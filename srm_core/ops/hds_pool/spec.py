"""The specification of `hds_pool`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srm_core.ops.hds_pool import cases
from srm_core.ops.hds_pool.hierarchy import LEVELS, NUM_LEVELS, POOL, SOURCE, constrain_levels, level_sizes
from srm_core.ops.hds_pool.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OutputSpec, TensorSpec

FORMULA = "level[l+1,m] = (level[l,pool*m] + ... + level[l,pool*m+pool-1]) / pool, where level[0] = memory"


def _shapes(values: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of levels 1, 2, ..., of memory's rank."""
    *lead, slots, width = values["memory"].shape
    return [(*lead, n, width) for n in level_sizes(slots, values["num_levels"], values["pool"])[1:]]


SPEC = OpSpec(
    name="hds_pool",
    version=1,
    summary="the levels of a hierarchical memory: means of means over windows of slots",
    parameters=(
        TensorSpec("memory", ("B M D", "B H M D"), doc="the slots of level 0"),
        NUM_LEVELS,
        POOL,
    ),
    outputs=(
        OutputSpec(
            "levels",
            "B * D",
            like=("memory",),
            many=_shapes,
            doc="levels 1 to num_levels - 1, of memory's rank: level l has M // pool^l slots; a remainder is dropped",
        ),
    ),
    reference=reference,
    vjp=vjp,
    constrain=constrain_levels,
    permitted_roundings=(LEVELS,),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("fewer levels are the first", cases.fewer_levels_are_the_first),
        Invariant("pooling on", cases.pooling_on_gives_the_rest),
        Invariant("remainder", cases.a_remainder_does_not_count),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    formula=FORMULA,
    source=SOURCE,
)
