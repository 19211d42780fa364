"""The recurrence of the MM-Rec block, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import GATE_GRADIENTS, STATE, Array, Rounding, exact, product, sigmoid, steps_of


def reference(
    compute: Any, z: Array, gamma: Array, h0: Array, w_gate: Array, b_gate: Array, w_mdi: Array, b_mdi: Array,
    *, mix: float = 0.1, lengths: Array | None = None, rounding: Rounding = exact,
) -> tuple[Array, Array]:  # fmt: skip
    """g = sigmoid([z_t, h] @ w_mdi.T + b_mdi); n = (1 - g) * h + g * z_t + gamma_t * h;

    h = z_t * sigmoid(h @ w_gate.T + b_gate) + gamma_t * h + mix * n. (The sequential loop of the MM-Rec block.)
    """
    z, gamma, h, w_gate, b_gate, w_mdi, b_mdi = (
        a.astype(compute) for a in (z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi)
    )
    out = np.zeros(z.shape, compute)
    for t, running in steps_of(z, lengths):
        u, g, _ = _gates(rounding, z[:, t], h, w_gate, b_gate, w_mdi, b_mdi)
        n = (1 - g) * h + g * z[:, t] + gamma[:, t] * h
        h = np.where(running, z[:, t] * u + gamma[:, t] * h + compute(mix) * n, h)
        out[:, t] = np.where(running, h, 0)
    return out, h


def vjp(
    compute: Any, grads: tuple[Array, Array], z: Array, gamma: Array, h0: Array, w_gate: Array, b_gate: Array,
    w_mdi: Array, b_mdi: Array, *, mix: float = 0.1, lengths: Array | None = None, rounding: Rounding = exact,
) -> tuple[Array, ...]:  # fmt: skip
    """From the last step to the first, with e the gradient of the new h, and u, g the two gates:

    dn = mix * e; du = e * z * u * (1 - u) and dg = dn * (z - h) * g * (1 - g) before the sigmoids;
    dz = e * u + dn * g + its part of dg @ w_mdi; dgamma = (e + dn) * h;
    dh = e * gamma + dn * (1 - g + gamma) + du @ w_gate + its part of dg @ w_mdi.
    """
    grad, d_h = (a.astype(compute) for a in grads)
    z, gamma, h, w_gate, b_gate, w_mdi, b_mdi = (
        a.astype(compute) for a in (z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi)
    )
    states, _ = reference(
        compute, z, gamma, h, w_gate, b_gate, w_mdi, b_mdi, mix=mix, lengths=lengths, rounding=rounding
    )
    width = z.shape[2]
    d_z, d_gamma = np.zeros(z.shape, compute), np.zeros(z.shape, compute)
    d_w_gate, d_b_gate, d_w_mdi, d_b_mdi = (np.zeros(a.shape, compute) for a in (w_gate, b_gate, w_mdi, b_mdi))
    for t, running in reversed(steps_of(z, lengths)):
        before = states[:, t - 1] if t else h
        z_t, gamma_t, state = (np.where(running, a, 0) for a in (z[:, t], gamma[:, t], before))
        u, g, both = _gates(rounding, z_t, state, w_gate, b_gate, w_mdi, b_mdi)
        e = np.where(running, d_h + grad[:, t], 0)
        d_n = compute(mix) * e
        d_u = rounding(GATE_GRADIENTS, np.where(running, e * z_t * u * (1 - u), 0))
        d_g = rounding(GATE_GRADIENTS, np.where(running, d_n * (z_t - state) * g * (1 - g), 0))
        d_both = product(rounding, d_g, w_mdi)
        d_z[:, t] = np.where(running, e * u + d_n * g + d_both[:, :width], 0)
        d_gamma[:, t] = (e + d_n) * state
        d_state = e * gamma_t + d_n * (1 - g + gamma_t) + d_both[:, width:] + product(rounding, d_u, w_gate)
        d_h = np.where(running, d_state, d_h)
        d_w_gate += product(rounding, d_u.T, both[:, width:])
        d_w_mdi += product(rounding, d_g.T, both)
        d_b_gate += d_u.sum(0)
        d_b_mdi += d_g.sum(0)
    return d_z, d_gamma, d_h, d_w_gate, d_b_gate, d_w_mdi, d_b_mdi


def _gates(
    rounding: Rounding, z: Array, h: Array, w_gate: Array, b_gate: Array, w_mdi: Array, b_mdi: Array
) -> tuple[Array, Array, Array]:
    """(the gate of z, the gate of the integration, [z, h] as the products see them) of a step."""
    both = np.concatenate([z, rounding(STATE, h)], axis=1)
    u = sigmoid(product(rounding, both[:, z.shape[1] :], w_gate.T) + b_gate)
    g = sigmoid(product(rounding, both, w_mdi.T) + b_mdi)
    return u, g, both
