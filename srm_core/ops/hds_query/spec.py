"""The specification of `hds_query`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srm_core.contract import check_scale
from srm_core.ops.attention.spec import SPEC as ATTENTION
from srm_core.ops.hds_pool.hierarchy import LEVELS, NUM_LEVELS, POOL, SOURCE, constrain_levels
from srm_core.ops.hds_query import cases
from srm_core.ops.hds_query.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, TensorSpec


def _check_level(name: str, value: Any, dims: Mapping[str, int]) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r}; required an integer")


def _constrain(call: Any) -> None:
    level, count = call.values["level"], call.values["num_levels"]
    if not -count <= level < count:
        raise call.error("level", f"level {level} of {count}", f"{-count} <= level < {count}", "-1 is the top")
    constrain_levels(call)


SPEC = OpSpec(
    name="hds_query",
    version=1,
    summary="attention over one level of a hierarchical memory",
    parameters=(
        TensorSpec("query", ("B H T D",), doc="what each step looks for"),
        TensorSpec("keys", ("B? H M D",), doc="what each slot of level 0 is found by; a batch of 1 is for all"),
        TensorSpec("values", ("B? H M E",), doc="what each slot of level 0 holds; a batch of 1 is for all"),
        OptionSpec(
            "level",
            _check_level,
            default=-1,
            keyword=True,
            schema="int",
            doc="which level is attended to; -1 is the top",
        ),
        NUM_LEVELS,
        POOL,
        OptionSpec(
            "scale", check_scale, default=None, keyword=True, schema="float?", doc="what scores are multiplied by"
        ),
    ),
    outputs=(OutputSpec("out", "B H T E", like=("query",), doc="0 where there are no slots"),),
    shape_order=("query", "keys", "values"),
    constrain=_constrain,
    reference=reference,
    vjp=vjp,
    residuals=ATTENTION.residuals,
    permitted_roundings=(LEVELS, *ATTENTION.permitted_roundings),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("slots within a window", cases.slots_permute_in_their_window),
        Invariant("pooled before = level 0", cases.pooled_before_is_level_0),
        Invariant("one memory for all = copies", cases.shared_is_repeated),
        Invariant("levels from the top", cases.levels_count_from_the_top),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    autocast="lower",
    formula=(
        "k, v = keys, values pooled to the level, as in hds_pool\n"
        "p[t,s] = exp(scale * (q[t] . k[s])) / sum over s of exp(scale * (q[t] . k[s]))\n"
        "out[t] = sum over s of p[t,s] * v[s]"
    ),
    source=SOURCE,
)
