"""`mdi_recurrence` on NumPy: z's product once for all steps, both products of the state as one, passes in place."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_backends.numpy.common import Array, compute_dtype, gradient, quiet, result, sigmoid_
from srm_backends.numpy.gated import StateProduct, batch_major, before, clear, project, rows, running, time_major
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.common import valid_steps


@quiet
def forward(
    ctx: LaunchContext, z: Array, gamma: Array, h0: Array, w_gate: Array, b_gate: Array, w_mdi: Array, b_mdi: Array,
    *, mix: float, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    (batch, steps, width), compute = z.shape, compute_dtype(z.dtype)
    valid = valid_steps(lengths, batch, steps)
    zs, gammas = time_major(z, valid, compute), time_major(gamma, valid, compute)
    weight, of_z = _weights(w_gate, w_mdi, compute)
    given = project(of_z, zs)  # (T, D, B)
    given += b_mdi.astype(compute)[:, None]
    multiply = StateProduct(weight, batch)
    bias, factor = b_gate.astype(compute)[:, None], compute(mix)
    gates, states = np.empty((steps, 2 * width, batch), compute), np.empty((steps, width, batch), compute)
    h = h0.T.astype(compute, order="C")  # (D, B)
    kept, term = np.empty_like(h), np.empty_like(h)
    for t in range(steps):
        gate, next_h, z_t = gates[t], states[t], zs[t]
        multiply(h, gate)
        u, g = gate[:width], gate[width:]
        u += bias
        g += given[t]
        sigmoid_(gate)
        # n = (1 - g) * h + g * z + gamma * h, then z * u + gamma * h + mix * n
        np.subtract(1, g, out=next_h)
        next_h *= h
        np.multiply(g, z_t, out=term)
        next_h += term
        np.multiply(gammas[t], h, out=kept)
        next_h += kept
        next_h *= factor
        next_h += kept
        np.multiply(z_t, u, out=term)
        next_h += term
        if valid is not None:
            np.copyto(next_h, h, where=~valid[:, t])
        h = next_h
    ctx.keep("gates", gates.transpose(2, 0, 1))
    ctx.keep("states", states.transpose(2, 0, 1))
    return batch_major(ctx, states, z.dtype, valid), result(ctx, h.T, h0.dtype)


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_out: Array, grad_last: Array) -> tuple[Any, ...]:
    """See the reference's vjp. What does not wait for a gradient is computed for all steps before the loop."""
    z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi = residuals.args
    (batch, steps, width), compute = z.shape, compute_dtype(z.dtype)
    valid, mix = valid_steps(residuals.options["lengths"], batch, steps), compute(residuals.options["mix"])
    gates, states = (residuals.get(n).transpose(1, 2, 0) for n in ("gates", "states"))
    zs, gammas = time_major(z, valid, compute), time_major(gamma, valid, compute)
    u, g, h = gates[:, :width], gates[:, width:], before(h0.T.astype(compute), states, valid)
    weight, of_z = _weights(w_gate, w_mdi, compute)
    of_h = gammas + mix * (1 - g + gammas)  # what a step's gradient gives to the state before, but for the products
    d_gates = np.empty(gates.shape, compute)  # the derivatives of the gates, then their gradients
    d_gates[:, :width] = zs * u * (1 - u)
    d_gates[:, width:] = mix * (zs - h) * g * (1 - g)
    clear(d_gates, valid)
    multiply = StateProduct(weight.T, batch)
    e = time_major(grad_out, valid, compute)  # the gradients of the states, in the end
    d_h, term = grad_last.T.astype(compute, order="C"), np.empty((width, batch), compute)
    for t in reversed(range(steps)):
        where, d_gate = running(valid, t), d_gates[t].reshape(2, width, batch)
        np.add(e[t], d_h, out=e[t], where=where)
        d_gate *= e[t]
        multiply(d_gates[t], term)
        np.multiply(e[t], of_h[t], out=d_h, where=where)
        np.add(d_h, term, out=d_h, where=where)
    d_z = project(of_z.T, d_gates[:, width:])
    d_z += e * (u + mix * g)
    d_gamma = (1 + mix) * e * h
    flat = rows(d_gates)  # (2D, T*B)
    d_weight, d_bias = flat @ rows(h).T, flat.sum(1)
    d_mdi = np.concatenate([flat[width:] @ rows(zs).T, d_weight[width:]], axis=1)
    return (
        batch_major(ctx, d_z, z.dtype, valid),
        batch_major(ctx, d_gamma, gamma.dtype, valid),
        gradient(ctx, d_h.T, h0),
        gradient(ctx, d_weight[:width], w_gate),
        gradient(ctx, d_bias[:width], b_gate),
        gradient(ctx, d_mdi, w_mdi),
        gradient(ctx, d_bias[width:], b_mdi),
    )


def _weights(w_gate: Array, w_mdi: Array, compute: Any) -> tuple[Array, Array]:
    """(what multiplies the state: w_gate over w_mdi's second half, (2D, D); what multiplies z, (D, D))."""
    width = len(w_gate)
    stacked = np.concatenate([w_gate, w_mdi[:, width:]]).astype(compute, copy=False)
    return stacked, w_mdi[:, :width].astype(compute, copy=False)
