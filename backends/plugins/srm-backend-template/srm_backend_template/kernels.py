"""scan and mdi in NumPy: computed in float32, or in float64 where the arrays are, and rounded once at the end."""

import numpy as np

from srm_core.spec import Given, Reason

quiet = np.errstate(all="ignore")  # NaN and infinity are results like others: a kernel warns of none


def wide(x):
    return np.result_type(x.dtype, np.float32)


def result(ctx, values, dtype):
    out = ctx.empty(values.shape, dtype)
    out[...] = values
    return out


# scan: y[t] = g[t] * y[t-1] + x[t]. tokens (B, T, D), initial_state (B, D), gates (B, T or 1, D or 1) or (1, 1, D).


def scan_supports(view):
    """Every reason why these kernels cannot take the call. It sees declared features of the call, nothing else."""
    reasons = []
    if not view[Given("tokens")]:
        reasons.append(Reason("tokens", "needs tokens"))
    if view[Given("lengths")]:
        reasons.append(Reason("lengths", "takes no lengths"))
    return reasons


def begin(tokens, initial_state, reverse):
    """The order of the steps, and the state before the first, (B, D)."""
    B, T, D = tokens.shape
    state = np.zeros((B, D), wide(tokens)) if initial_state is None else initial_state.astype(wide(tokens))
    return range(T)[::-1] if reverse else range(T), state


@quiet
def scan(ctx, gates, tokens, initial_state, *, reverse, lengths):
    order, state = begin(tokens, initial_state, reverse)
    gates = np.broadcast_to(gates, tokens.shape)
    y = ctx.empty(tokens.shape, tokens.dtype)
    for t in order:
        y[:, t] = state = gates[:, t] * state + tokens[:, t]
    return y, result(ctx, state, state.dtype if initial_state is None else initial_state.dtype)


@quiet
def scan_backward(ctx, residuals, grad_y, grad_final):
    given, tokens, initial_state = residuals.args
    order, state = begin(tokens, initial_state, residuals.options["reverse"])
    gates = np.broadcast_to(given, tokens.shape)
    before = np.empty(tokens.shape, state.dtype)  # the state before each step
    for t in order:
        before[:, t] = state
        state = gates[:, t] * state + tokens[:, t]
    d_gates, d_tokens, d_state = np.empty_like(before), np.empty_like(before), grad_final.astype(before.dtype)
    for t in reversed(order):
        d_tokens[:, t] = d_state = d_state + grad_y[:, t]
        d_gates[:, t] = d_state * before[:, t]
        d_state = d_state * gates[:, t]
    shared = tuple(axis for axis in range(3) if given.shape[axis] == 1)  # where one gate served many
    return (
        result(ctx, d_gates.sum(shared, keepdims=True), given.dtype),
        result(ctx, d_tokens, tokens.dtype),
        None if initial_state is None else result(ctx, d_state, initial_state.dtype),
    )


# mdi: h_new = (1 - g) * h + g * z + gamma * h, gamma = clamp(d * m, eps, 1 - eps). All of one shape.


def sigmoids(*logits):
    return [1.0 if x is None else 1 / (1 + np.exp(-x.astype(wide(x)))) for x in logits]


@quiet
def mdi(ctx, z, h, *logits, eps):
    g, d, m = sigmoids(*logits)
    gamma = np.clip(d * m, eps, 1 - eps)
    return result(ctx, (1 - g) * h + g * z + gamma * h, h.dtype), result(ctx, gamma, z.dtype)


@quiet
def mdi_backward(ctx, residuals, grad_h, grad_gamma):
    (z, h, *logits), eps = residuals.args, residuals.options["eps"]
    g, d, m = sigmoids(*logits)
    a, product = grad_h.astype(wide(z)), d * m
    clamped = (product < eps) | (product > 1 - eps)  # passes no gradient on
    e = np.where(clamped, 0, grad_gamma + a * h) * product
    gamma = np.clip(product, eps, 1 - eps)
    gradients = a * g, a * (1 - g + gamma), a * (z - h) * g * (1 - g), e * (1 - d), e * (1 - m)
    pairs = zip(residuals.args, gradients, strict=True)
    return tuple(None if x is None else result(ctx, v, x.dtype) for x, v in pairs)
