"""`recurrent_step_`: one decode step that updates the states in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srm_core.contract import host_tuple
from srm_core.dispatch import define
from srm_core.ops.recurrent_step_.spec import SPEC

_operator = define(SPEC)


def recurrent_step_(
    x: Any, state: Any, weight: Any, bias: Any, decay: Any, mode: Sequence[str], index: Any,
    *, slots: Any = None, backend: str | None = None,
) -> Any:  # fmt: skip
    """The serving form of `recurrent_step`: state is updated in place, and only y is returned.

    x: (B, H, D). state: (N, H, D); row slots[i] belongs to sequence i, and no other row is touched.
    slots: (B,) distinct integers, 0 <= slot < N; None: row i for sequence i, and N must be B.
    Everything else as in `recurrent_step`. Slots in host memory are checked; one out of range in device
    memory gives NaN in y and changes no state.

    Returns y, (B, H, D), of x's dtype. There is no gradient: the old state is gone.

    Errors: `ContractError`, `NoBackendError`; state is then as it was.

    >>> import numpy as np, srm_core
    >>> state = np.zeros((4, 1, 2))  # room for four sequences
    >>> x, weight, bias = np.ones((1, 1, 2)), np.ones((1, 8)), np.zeros((1, 8))
    >>> y = srm_core.recurrent_step_(x, state, weight, bias, np.array([0.5]), ("row",), 0, slots=np.array([2]))
    >>> state[:, 0].tolist()
    [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """
    return _operator.run(backend, x, state, weight, bias, decay, host_tuple(mode), index, slots)
