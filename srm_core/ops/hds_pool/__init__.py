"""`hds_pool`: the levels of a hierarchical memory."""

from __future__ import annotations

from typing import Any

from srm_core.dispatch import define
from srm_core.ops.hds_pool.spec import SPEC

_operator = define(SPEC)


def hds_pool(memory: Any, *, num_levels: int = 3, pool: int = 4, backend: str | None = None) -> Any:
    """The levels above a memory, each slot the mean of `pool` neighbours in the level below it.

    memory: (B, M, D) or (B, H, M, D). It is level 0.
    num_levels: at least 1, with the memory. pool: at least 1.
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns a tuple of the levels 1 to num_levels - 1, of memory's rank and dtype; with num_levels=1 it is empty.
    Level l has M // pool**l slots: what is left after a level's last whole window is dropped. B, H and D may be 0.
    Half types accumulate in float32; a level may be computed from the rounded one below it.

    Errors: `ContractError` for a shape, dtype or option that breaks the above, and for a level that would be empty;
    `NoBackendError` if no selected backend can run it. Source: the hierarchical memory of the MM-Rec model.

    >>> import numpy as np, srm_core
    >>> memory = np.arange(9.0).reshape(1, 9, 1)
    >>> [level.ravel().tolist() for level in srm_core.hds_pool(memory, pool=2)]
    [[0.5, 2.5, 4.5, 6.5], [1.5, 5.5]]
    """
    return _operator.run(backend, memory, num_levels, pool)
