"""The structured recurrent mixer over a whole sequence as loops."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array
from srm_core.ops.recurrent_step.reference import position_weights, step


def reference(
    compute: Any, x: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...],
    initial_state: Array | None = None, *, start: Any = 0, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Folds `recurrent_step` over positions start ... start+T-1, from the initial state or 0."""
    batch, steps, heads, width = x.shape
    x, decay = x.astype(compute), decay.astype(compute)
    y = np.zeros_like(x)
    state = np.zeros((batch, heads, width), compute) if initial_state is None else initial_state.astype(compute)
    first = np.broadcast_to(start, (batch,))
    for i in range(batch):
        for t in range(steps if lengths is None else int(lengths[i])):
            for h in range(heads):
                w, b = position_weights(compute, weight, bias, h, int(first[i]) + t)
                y[i, t, h], state[i, h] = step(x[i, t, h], state[i, h], w, b, decay[h], mode[h])
    return y, state


def vjp(
    compute: Any, grads: tuple[Array, Array], x: Array, weight: Array, bias: Array, decay: Array,
    mode: tuple[str, ...], initial_state: Array | None = None, *, start: Any = 0, lengths: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array | None]:  # fmt: skip
    """`recurrent_step`'s, folded backwards: with a the gradient of s_t, a_t = (dy or w dy) + d a_{t+1}."""
    batch, steps, heads, width = x.shape
    grad_y, d_state = grads[0].astype(compute), grads[1].astype(compute)
    x_c, decay_c = x.astype(compute), decay.astype(compute)
    d_x = np.zeros_like(x_c)
    d_weight, d_bias = np.zeros(weight.shape, compute), np.zeros(bias.shape, compute)
    d_decay = np.zeros(decay.shape, compute)
    first = np.broadcast_to(start, (batch,))
    for i in range(batch):
        n = steps if lengths is None else int(lengths[i])
        for h in range(heads):
            state = np.zeros(width, compute) if initial_state is None else initial_state[i, h].astype(compute)
            states = [state]
            for t in range(n):
                w, b = position_weights(compute, weight, bias, h, int(first[i]) + t)
                states.append(step(x_c[i, t, h], states[-1], w, b, decay_c[h], mode[h])[1])
            for t in reversed(range(n)):
                p = int(first[i]) + t
                w, _ = position_weights(compute, weight, bias, h, p)
                dy = grad_y[i, t, h]
                if mode[h] == "row":
                    a = dy + d_state[i, h]
                    d_x[i, t, h], d_w = w * a, (a * x_c[i, t, h]).sum()
                else:
                    a = w * dy + d_state[i, h]
                    d_x[i, t, h], d_w = a, (dy * states[t + 1]).sum()
                d_decay[h] += (a * states[t]).sum()
                d_state[i, h] = decay_c[h] * a
                if 0 <= p < weight.shape[1]:
                    d_weight[h, p] += d_w
                    d_bias[h, p] += dy.sum()
    return d_x, d_weight, d_bias, d_decay, None if initial_state is None else d_state
