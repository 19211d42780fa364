"""`hds_query`: attention over a level of a hierarchical memory."""

from __future__ import annotations

from typing import Any

from srm_core.dispatch import define
from srm_core.ops.hds_query.spec import SPEC

_operator = define(SPEC)


def hds_query(
    query: Any, keys: Any, values: Any,
    *, level: int = -1, num_levels: int = 3, pool: int = 4, scale: float | None = None, backend: str | None = None,
) -> Any:  # fmt: skip
    """Attention of queries to the keys and values of one level, pooled as by `hds_pool`.

    query: (B, H, T, D).
    keys: (B, H, M, D), values: (B, H, M, E), both level 0. The batch of either may be 1: a memory for all sequences.
    level: which level is attended to, -num_levels <= level < num_levels; -1 is the top, 0 the memory itself.
    num_levels, pool: as for `hds_pool`; the whole hierarchy must exist.
    scale: a finite number; None: 1 / sqrt(D).
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns out (B, H, T, E) of query's dtype; zeros where M = 0 (and num_levels = 1). Gradients are those of query,
    keys and values, summed over the batch where it is 1. B, H, T, D and E may be 0. Half types accumulate in
    float32; levels may be rounded to them, and what `attention` may round.

    Errors: `ContractError` for a shape, dtype or option that breaks the above, and for a level that would be empty;
    `NoBackendError` if no selected backend can run it. Source: the hierarchical memory of the MM-Rec model.

    >>> import numpy as np, srm_core
    >>> query, keys = np.zeros((1, 1, 1, 1)), np.zeros((1, 1, 5, 1))
    >>> values = np.array([1.0, 3.0, 4.0, 8.0, 100.0]).reshape(1, 1, 5, 1)
    >>> srm_core.hds_query(query, keys, values, num_levels=2, pool=2).item()
    4.0
    """
    return _operator.run(backend, query, keys, values, level, num_levels, pool, scale)
