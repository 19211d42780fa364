"""`mdi`: the memory-decay integration, element by element."""

from __future__ import annotations

from typing import Any

from srm_core.dispatch import define
from srm_core.ops.mdi.spec import SPEC

_operator = define(SPEC)


def mdi(
    z: Any, h: Any, gate_logits: Any, decay_logits: Any, modulation_logits: Any = None,
    *, eps: float = 1e-6, backend: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """h_new = (1 - g) * h + g * z + gamma * h, with g = sigmoid(gate_logits) and a decay gamma in [eps, 1 - eps].

    z: what comes in; any shape, which all others share.
    h: the state; z's dtype, or float32 beside half z.
    gate_logits: of g.
    decay_logits, modulation_logits: gamma = sigmoid(decay_logits) * sigmoid(modulation_logits), clamped; without
        modulation_logits gamma = sigmoid(decay_logits), clamped.
    eps: 0 <= eps <= 0.5; gamma is clamped before it is rounded to a half type, in which 1 - eps may be 1.
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns (h_new, gamma): h_new of h's dtype, gamma of z's. Half types are computed in float32. Where gamma is
    clamped, its logits get no gradient.

    Errors: `ContractError` for a shape, dtype or option that breaks the above; `NoBackendError` if no selected backend
    can run it. Source: the memory decay integration of the MM-Rec block.

    >>> import numpy as np, srm_core
    >>> zero = np.zeros(1)
    >>> h_new, gamma = srm_core.mdi(np.array([4.0]), np.array([2.0]), zero, zero, zero)
    >>> h_new.tolist(), gamma.tolist()
    ([3.5], [0.25])
    """
    result: tuple[Any, Any] = _operator.run(backend, z, h, gate_logits, decay_logits, modulation_logits, eps)
    return result
