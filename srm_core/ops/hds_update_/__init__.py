"""`hds_update_`: writing into a hierarchical memory in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srm_core.contract import host_tuple
from srm_core.dispatch import define
from srm_core.ops.hds_update_.spec import SPEC

_operator = define(SPEC)


def hds_update_(
    memory: Any, levels: Sequence[Any], new: Any, index: Any, *, pool: int = 4, backend: str | None = None
) -> None:
    """Writes slots of a memory, a ring, and refreshes what stands above them in the levels of `hds_pool`. The cost
    does not depend on M.

    memory: (B, M, D) or (B, H, M, D), updated in place.
    levels: the levels 1, 2, ... as `hds_pool` gives them, a tuple or list, also empty; updated in place. Only slots
        above a written one change, each from the stored slots of the level below it.
    new: (B, S, D) or (B, H, S, D), as memory; S <= M. It is written at the slots index, index + 1, ... modulo M.
    index: any integer, or integers of shape () or (B,), one for each sequence.
    pool: as for `hds_pool`; the sizes of the levels must be those that it gives.
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns None. If the levels were those of memory before, they are afterwards: as if pooled afresh. There is no
    gradient: what was there is gone. Half types accumulate in float32.

    Errors: `ContractError` for a shape, dtype or option that breaks the above, and for arrays that cannot be
    updated in place or share memory with each other; nothing is changed then. `NoBackendError` if no selected
    backend can run it. Source: the hierarchical memory of the MM-Rec model.

    >>> import numpy as np, srm_core
    >>> memory = np.zeros((1, 8, 1))
    >>> levels = srm_core.hds_pool(memory, pool=2)
    >>> srm_core.hds_update_(memory, levels, np.array([[[4.0], [8.0]]]), 7, pool=2)
    >>> [a.ravel().tolist() for a in (memory, *levels)]
    [[8.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0], [4.0, 0.0, 0.0, 2.0], [2.0, 1.0]]
    """
    _operator.run(backend, memory, host_tuple(levels), new, index, pool)
