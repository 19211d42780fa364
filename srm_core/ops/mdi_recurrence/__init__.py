"""`mdi_recurrence`: the sequential loop of the MM-Rec block."""

from __future__ import annotations

from typing import Any

from srm_core.dispatch import define
from srm_core.ops.mdi_recurrence.spec import SPEC

_operator = define(SPEC)


def mdi_recurrence(
    z: Any, gamma: Any, h0: Any, w_gate: Any, b_gate: Any, w_mdi: Any, b_mdi: Any,
    *, mix: float = 0.1, lengths: Any = None, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The recurrence of the MM-Rec block, with a memory-decay integration at each step.

    g = sigmoid([z_t, h] @ w_mdi.T + b_mdi); n = (1 - g) * h + g * z_t + gamma_t * h;
    h = z_t * sigmoid(h @ w_gate.T + b_gate) + gamma_t * h + mix * n.

    z, gamma: (B, T, D), of one dtype; gamma is a factor, not a logit.
    h0: (B, D), the initial state; z's dtype, or float32 beside half z.
    w_gate, b_gate: (D, D), (D,). w_mdi, b_mdi: (D, 2D), (D,). Parameters: z's dtype, or float32 beside half z.
    mix: a finite number.
    lengths: (B,) integers, 0 <= length <= T: beyond a sequence's length h is 0, and its last state is the one there.
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns (h, h_last): h (B, T, D) of z's dtype, all states; h_last (B, D) of h0's dtype. T = 0 and B = 0 are valid.
    Half types are computed in float32; the h that is multiplied by weights may be rounded to them.

    Errors: `ContractError` for a shape, dtype or value that breaks the above; `NoBackendError` if no selected backend
    can run it. Source: the loop of the MM-Rec block.

    >>> import numpy as np, srm_core
    >>> z, gamma, zero = np.ones((1, 2, 1)), np.full((1, 2, 1), 0.5), np.zeros((1, 1))
    >>> h, h_last = srm_core.mdi_recurrence(z, gamma, zero, zero, zero[0], np.zeros((1, 2)), zero[0], mix=0)
    >>> h.ravel().tolist(), h_last.tolist()
    ([0.5, 0.75], [[0.75]])
    """
    result: tuple[Any, Any] = _operator.run(backend, z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi, mix, lengths)
    return result
