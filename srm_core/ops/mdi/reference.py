"""The memory-decay integration, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array, sigmoid


def reference(
    compute: Any, z: Array, h: Array, gate_logits: Array, decay_logits: Array, modulation_logits: Array | None = None,
    *, eps: float = 1e-6,
) -> tuple[Array, Array]:  # fmt: skip
    """g = sigmoid(gate), gamma = clamp(sigmoid(decay) * sigmoid(modulation), eps, 1 - eps),

    h_new = (1 - g) * h + g * z + gamma * h. (The memory decay integration of the MM-Rec block.)
    """
    g, decay, modulation = _gates(compute, gate_logits, decay_logits, modulation_logits)
    gamma = np.clip(decay * modulation, compute(eps), 1 - compute(eps))
    h = h.astype(compute)
    return (1 - g) * h + g * z.astype(compute) + gamma * h, gamma


def vjp(
    compute: Any, grads: tuple[Array, Array], z: Array, h: Array, gate_logits: Array, decay_logits: Array,
    modulation_logits: Array | None = None, *, eps: float = 1e-6,
) -> tuple[Array | None, ...]:  # fmt: skip
    """With a the gradient of h_new, and e that of gamma, e = dgamma + a * h where gamma is not clamped, else 0:

    dz = a * g; dh = a * (1 - g + gamma); dgate = a * (z - h) * g * (1 - g);
    ddecay = e * m * d * (1 - d) and dmodulation = e * d * m * (1 - m), with gamma = d * m.
    """
    a, d_gamma = (grad.astype(compute) for grad in grads)
    g, decay, modulation = _gates(compute, gate_logits, decay_logits, modulation_logits)
    z, h, product = z.astype(compute), h.astype(compute), decay * modulation
    low, high = compute(eps), 1 - compute(eps)
    gamma = np.clip(product, low, high)
    e = np.where((product < low) | (product > high), 0, d_gamma + a * h)
    return (
        a * g,
        a * (1 - g + gamma),
        a * (z - h) * g * (1 - g),
        e * product * (1 - decay),
        None if modulation_logits is None else e * product * (1 - modulation),
    )


def _gates(compute: Any, gate: Array, decay: Array, modulation: Array | None) -> tuple[Array, Array, Array]:
    """The sigmoids; without modulation that is 1."""
    d = sigmoid(decay.astype(compute))
    return (
        sigmoid(gate.astype(compute)),
        d,
        np.ones_like(d) if modulation is None else sigmoid(modulation.astype(compute)),
    )
