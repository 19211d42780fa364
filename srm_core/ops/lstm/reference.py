"""Long short-term memory, step by step."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import GATE_GRADIENTS, STATE, Array, Rounding, exact, product, sigmoid, steps_of


def reference(
    compute: Any, x: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None,
    h0: Array | None = None, c0: Array | None = None, *, lengths: Array | None = None, rounding: Rounding = exact,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """[i, f, g, o] = x_t @ w_ih.T + b_ih + h @ w_hh.T + b_hh;

    c = sigmoid(f) * c + sigmoid(i) * tanh(g); h = sigmoid(o) * tanh(c). (S. Hochreiter and
    J. Schmidhuber, "Long short-term memory", 1997, with the forget gate of F. Gers, J. Schmidhuber and F. Cummins,
    "Learning to forget", 2000.)
    """
    x, w_ih, w_hh, bias, h, c = _prepared(compute, x, w_ih, w_hh, b_ih, b_hh, h0, c0)
    y = np.zeros((*x.shape[:2], h.shape[1]), compute)
    for t, running in steps_of(x, lengths):
        i, f, g, o = _gates(rounding, x[:, t], h, w_ih, w_hh, bias)
        c = np.where(running, f * c + i * g, c)
        h = np.where(running, o * np.tanh(c), h)
        y[:, t] = np.where(running, h, 0)
    return y, h, c


def vjp(
    compute: Any, grads: tuple[Array, Array, Array], x: Array, w_ih: Array, w_hh: Array, b_ih: Array | None = None,
    b_hh: Array | None = None, h0: Array | None = None, c0: Array | None = None, *, lengths: Array | None = None,
    rounding: Rounding = exact,
) -> tuple[Array | None, ...]:  # fmt: skip
    """From the last step to the first, with u = tanh(c), and i, f, g, o after their sigmoids and tanh:

    dc += dh * o * (1 - u^2); do = dh * u * o * (1 - o); di = dc * g * i * (1 - i); df = dc * c_before * f * (1 - f);
    dg = dc * i * (1 - g^2); dc_before = dc * f; dh_before = [di, df, dg, do] @ w_hh; dx = [di, df, dg, do] @ w_ih.
    """
    grad, d_h, d_c = (a.astype(compute) for a in grads)
    x, w_ih, w_hh, bias, h, c = _prepared(compute, x, w_ih, w_hh, b_ih, b_hh, h0, c0)
    steps = steps_of(x, lengths)
    trace = []  # (h, c) before each step
    for t, running in steps:
        trace.append((h, c))
        i, f, g, o = _gates(rounding, x[:, t], h, w_ih, w_hh, bias)
        c = np.where(running, f * c + i * g, c)
        h = np.where(running, o * np.tanh(c), h)
    d_x, d_w_ih, d_w_hh, d_bias = (np.zeros(a.shape, compute) for a in (x, w_ih, w_hh, bias))
    for t, running in reversed(steps):
        x_t, before_h, before_c = (np.where(running, a, 0) for a in (x[:, t], *trace[t]))
        i, f, g, o = _gates(rounding, x_t, before_h, w_ih, w_hh, bias)
        u = np.tanh(f * before_c + i * g)
        through_h = np.where(running, d_h + grad[:, t], 0)
        through_c = np.where(running, d_c, 0) + through_h * o * (1 - u * u)
        d_gates = np.concatenate(
            [
                through_c * g * i * (1 - i), through_c * before_c * f * (1 - f),
                through_c * i * (1 - g * g), through_h * u * o * (1 - o),
            ],
            axis=1,
        )  # fmt: skip
        d_gates = rounding(GATE_GRADIENTS, np.where(running, d_gates, 0))
        d_x[:, t] = np.where(running, product(rounding, d_gates, w_ih), 0)
        d_w_ih += product(rounding, d_gates.T, x_t)
        d_w_hh += product(rounding, d_gates.T, rounding(STATE, before_h))
        d_bias += d_gates.sum(0)
        d_c = np.where(running, through_c * f, d_c)
        d_h = np.where(running, product(rounding, d_gates, w_hh), d_h)
    return (
        d_x, d_w_ih, d_w_hh, None if b_ih is None else d_bias, None if b_hh is None else d_bias.copy(),
        None if h0 is None else d_h, None if c0 is None else d_c,
    )  # fmt: skip


def _prepared(
    compute: Any, x: Array, w_ih: Array, w_hh: Array, b_ih: Array | None, b_hh: Array | None, h0: Array | None,
    c0: Array | None,
) -> tuple[Array, ...]:  # fmt: skip
    """(x, w_ih, w_hh, the sum of the biases, h0, c0) in the dtype `compute`, with zeros for what is None."""
    bias = np.zeros(len(w_ih), compute)
    for b in (b_ih, b_hh):
        if b is not None:
            bias += b.astype(compute)
    none = np.zeros((len(x), w_hh.shape[1]), compute)
    h, c = (none if s is None else s.astype(compute) for s in (h0, c0))
    return x.astype(compute), w_ih.astype(compute), w_hh.astype(compute), bias, h, c


def _gates(rounding: Rounding, x: Array, h: Array, w_ih: Array, w_hh: Array, bias: Array) -> tuple[Array, ...]:
    """i, f, g, o of a step, after their sigmoids and tanh."""
    before = product(rounding, x, w_ih.T) + product(rounding, rounding(STATE, h), w_hh.T) + bias
    i, f, g, o = np.split(before, 4, axis=1)
    return sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
