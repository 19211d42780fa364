"""The specification of `hds_update_`, which writes into a hierarchical memory in place."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from srm_core.contract import arrays_of, as_index, check_writable
from srm_core.errors import ContractError
from srm_core.ops.hds_pool.hierarchy import LEVELS, POOL, SOURCE, level_sizes
from srm_core.ops.hds_update_ import cases
from srm_core.ops.hds_update_.reference import reference
from srm_core.spec import Invariant, OpSpec, OptionSpec, TensorSpec

NAME = "hds_update_"
TRIES = 1000  # at how many places it is looked for memory that two arrays share; then they are taken to share some


def _check_index(name: str, value: Any, dims: Mapping[str, int]) -> None:
    as_index(NAME, name, value)


def _constrain(call: Any) -> None:
    memory, levels, new, pool = (call.values[n] for n in ("memory", "levels", "new", "pool"))
    slots, written, rank = call.dims["M"], call.dims["S"], len(memory.shape)
    if len(new.shape) != rank:
        raise call.error("new", f"{len(new.shape)} axes beside {rank} of memory", f"{rank} axes")
    if written > slots:
        raise call.error("new", f"{written} slots for a memory of {slots}", "at most as many as memory has")
    sizes = level_sizes(slots, len(levels) + 1, pool)[1:]
    if len(levels) > len(sizes):
        raise call.error(
            "levels", f"{len(levels)} levels above {slots} slots in pools of {pool}",
            f"at most {len(sizes)}, so that no level is empty", "pass the levels of hds_pool, and its pool",
        )  # fmt: skip
    for (name, level), size in zip(arrays_of("levels", levels), sizes, strict=True):
        if len(level.shape) != rank:
            raise call.error(name, f"{len(level.shape)} axes beside {rank} of memory", f"{rank} axes")
        if level.shape[-2] != size:
            raise call.error(
                name, f"{level.shape[-2]} slots", f"{size}, of a memory of {slots} in pools of {pool}",
                "pass the levels of hds_pool, and its pool",
            )  # fmt: skip


def _check_values(dims: Mapping[str, int], memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> None:
    written = [("memory", memory), *arrays_of("levels", levels)]
    for name, array in written:
        check_writable(NAME, name, array)
    for (one, a), (other, b) in combinations(written, 2):
        if isinstance(a, np.ndarray) and np.may_share_memory(a, b, max_work=TRIES):
            raise ContractError(NAME, other, f"an array that shares memory with {one}", "memory of its own")


SPEC = OpSpec(
    name=NAME,
    version=1,
    summary="writes slots of a hierarchical memory in place, and refreshes the levels above them",
    parameters=(
        TensorSpec("memory", ("B M D", "B H M D"), differentiable=False, doc="level 0, a ring of M slots; updated"),
        TensorSpec(
            "levels",
            ("B * D", "B H * D"),
            many=True,
            differentiable=False,
            doc="levels 1, 2, ... of memory's rank, as hds_pool gives them; updated where they stand above new slots",
        ),
        TensorSpec("new", ("B S D", "B H S D"), differentiable=False, doc="what is written, of memory's rank; S <= M"),
        OptionSpec(
            "index",
            _check_index,
            dynamic=True,
            axes=("", "B"),
            schema="SymInt",
            doc="the first slot that is written, modulo M",
        ),
        POOL,
    ),
    outputs=(),
    shape_order=("memory", "new"),
    reference=reference,
    constrain=_constrain,
    check_values=_check_values,
    mutates=("memory", "levels"),
    permitted_roundings=(LEVELS,),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("in two = at once", cases.in_two_is_at_once),
        Invariant("slot by slot = at once", cases.slot_by_slot_is_at_once),
        Invariant("the others stay", cases.others_stay),
        Invariant("ring", cases.index_goes_round),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    formula=(
        "memory[(index+s) mod M] = new[s]\n"
        "level[l+1,m] = (level[l,pool*m] + ... + level[l,pool*m+pool-1]) / pool, for each m above one of those"
    ),
    source=SOURCE,
)
