"""Mutants of `mdi`, `mdi_recurrence` and `lstm`."""

from __future__ import annotations

from typing import Any

import numpy as np
from srm_backends.numpy.common import compute_dtype, quiet, result

from srm_conformance.measures import tf32
from srm_conformance.mutants.common import is_half, put, stepwise, tampered
from srm_conformance.mutants.mutant import backward, forward


def _integrated(args: Any, gamma: Any, g: Any) -> Any:
    """h_new of `mdi`, of its gates, in their dtype."""
    z, h = (a.astype(gamma.dtype) for a in args[:2])
    return (1 - g) * h + g * z + gamma * h


@forward("mdi", "z and h swapped at the gate")
def gate_inverted(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    return honest(ctx, *put(args, 2, -args[2]), eps=eps)


@forward("mdi", "modulation ignored")
def modulation_ignored(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    return honest(ctx, *args[:4], None, eps=eps)


@forward("mdi", "eps ignored")
def eps_ignored(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    return honest(ctx, *args, eps=0.0)


@forward("mdi", "eps always its default")
def eps_default(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    return honest(ctx, *args, eps=1e-6)


@forward("mdi", "clamped from below alone")
@quiet
def clamped_below(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    _, free = honest(ctx, *args, eps=0.0)
    high = free > 1 - eps
    gamma[high] = free[high]
    return h_new, gamma


@forward("mdi", "h_new takes gamma before the clamp")
def clamped_late(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    _, gamma = honest(ctx, *args, eps=eps)
    h_new, _ = honest(ctx, *args, eps=0.0)
    return h_new, gamma


@forward("mdi", "the sigmoid is exp(x) / (1 + exp(x))")
@quiet
def sigmoid_overflows(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    e = np.exp(args[2].astype(compute_dtype(args[0].dtype)))
    h_new[np.isnan(e / (1 + e))] = np.nan
    return h_new, gamma


@forward("mdi", "the sigmoid of the decay is (1 + tanh(x / 2)) / 2")
@quiet
def sigmoid_of_tanh(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    compute = compute_dtype(args[0].dtype)
    if args[4] is None:
        gamma[...] = np.clip((1 + np.tanh(args[3].astype(compute) / 2)) / 2, compute(eps), 1 - compute(eps))
    else:
        d, m = ((1 + np.tanh(a.astype(compute) / 2)) / 2 for a in args[3:5])
        gamma[...] = np.clip(d * m, compute(eps), 1 - compute(eps))
    return h_new, gamma


@forward("mdi", "the modulation of the last partial block left out")
def last_block(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    whole = gamma.size // 1024 * 1024
    if args[4] is not None and whole:
        h_plain, plain = honest(ctx, *args[:4], None, eps=eps)
        h_new.reshape(-1)[whole:], gamma.reshape(-1)[whole:] = h_plain.reshape(-1)[whole:], plain.reshape(-1)[whole:]
    return h_new, gamma


@forward("mdi", "the element at 8192 wrong")
def block_edge(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    h_new.reshape(-1)[8192::8192] = h_new.reshape(-1)[8191:-1:8192]
    return h_new, gamma


@forward("mdi", "h_new has the dtype of z")
def dtype_of_z(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    return result(ctx, h_new, args[0].dtype), gamma


@forward("mdi", "a scalar comes back as a number")
def scalar_unwrapped(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    return tuple(a[()] for a in honest(ctx, *args, eps=eps))


@forward("mdi", "half values added up in half")
@quiet
def added_in_half(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    if is_half(h_new):
        g = (1 / (1 + np.exp(-args[2].astype(np.float32)))).astype(h_new.dtype)
        h_new[...] = _integrated(args, gamma.astype(h_new.dtype), g)
    return h_new, gamma


@backward("mdi", "the gradient of gamma ignored")
def gamma_gradient_ignored(honest: Any, ctx: Any, residuals: Any, grad_h: Any, grad_gamma: Any) -> Any:
    return honest(ctx, residuals, grad_h, np.zeros_like(grad_gamma))


@backward("mdi", "gamma has a gradient where it is clamped")
def clamp_ignored(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    free = honest(ctx, tampered(residuals, options={"eps": 0.0}), *grads)
    return (*honest(ctx, residuals, *grads)[:3], *free[3:])


@backward("mdi", "the gradient of h lacks the decay")
def h_gradient_short(honest: Any, ctx: Any, residuals: Any, grad_h: Any, grad_gamma: Any) -> Any:
    found = honest(ctx, residuals, grad_h, grad_gamma)
    found[1][...] = grad_h.astype(np.float64) - found[0]  # a * (1 - g)
    return found


@backward("mdi", "the gradient of h_new does not reach the decay")
def decay_gradient_short(honest: Any, ctx: Any, residuals: Any, grad_h: Any, grad_gamma: Any) -> Any:
    short = honest(ctx, residuals, np.zeros_like(grad_h), grad_gamma)
    return (*honest(ctx, residuals, grad_h, grad_gamma)[:3], *short[3:])


@backward("mdi", "the gradients of decay and modulation swapped")
def gradients_swapped(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    return found if found[4] is None else (*found[:3], found[4], found[3])


# mdi_recurrence: z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi


@forward("mdi_recurrence", "w_mdi takes the state before z")
def halves_swapped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    width = args[5].shape[0]
    return honest(ctx, *put(args, 5, np.roll(args[5], width, axis=1)), **options)


@forward("mdi_recurrence", "mix ignored")
def mix_ignored(honest: Any, ctx: Any, *args: Any, mix: float, **options: Any) -> Any:
    return honest(ctx, *args, mix=0.1, **options)


@forward("mdi_recurrence", "b_gate dropped")
def b_gate_dropped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 4, np.zeros_like(args[4])), **options)


@forward("mdi_recurrence", "the biases swapped")
def biases_swapped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(put(args, 4, args[6]), 6, args[4]), **options)


@forward("mdi_recurrence", "w_gate transposed")
def w_gate_transposed(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 3, args[3].T), **options)


@forward("mdi_recurrence", "gamma one step late")
def gamma_late(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 1, np.roll(args[1], 1, axis=1)), **options)


@forward("mdi_recurrence", "float32 products of tf32 operands")
def products_in_tf32(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3].dtype == np.float32:
        args = put(put(args, 3, tf32(args[3])), 5, tf32(args[5]))
    return honest(ctx, *args, **options)


@forward("mdi_recurrence", "channels past a multiple of 16 lack their products")
def last_channels(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    width = args[3].shape[0]
    if width > 16:
        w = args[3].copy()
        w[:, width // 16 * 16 :] = 0
        args = put(args, 3, w)
    return honest(ctx, *args, **options)


@backward("mdi_recurrence", "the gradients of the biases swapped")
def bias_gradients_swapped(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    return put(put(found, 4, found[6]), 6, found[4])


@backward("mdi_recurrence", "the gradient of gamma lacks mix")
def gamma_gradient_short(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    found[1][...] = found[1] / (1 + residuals.options["mix"])
    return found


@backward("mdi_recurrence", "the gradient of w_mdi lacks the state's half")
def w_mdi_gradient_short(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    found[5][:, found[5].shape[0] :] = 0
    return found


@backward("mdi_recurrence", "the gradient of w_gate transposed")
def w_gate_gradient_transposed(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    found[3][...] = found[3].T.copy()
    return found


# lstm: x, w_ih, w_hh, b_ih, b_hh, h0, c0


def _gates_in_order(args: Any, order: tuple[int, ...]) -> Any:
    def ordered(weights: Any) -> Any:
        if weights is None:
            return None
        parts = (
            weights.reshape(4, -1, *weights.shape[1:]) if weights.size else weights.reshape(4, 0, *weights.shape[1:])
        )
        return parts[list(order)].reshape(weights.shape)

    return (args[0], *map(ordered, args[1:5]), *args[5:])


@forward("lstm", "gates in the order i, f, o, g")
def order_ifog(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *_gates_in_order(args, (0, 1, 3, 2)), **options)


@forward("lstm", "gates in the order i, o, f, g")
def order_iofg(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *_gates_in_order(args, (0, 2, 3, 1)), **options)


@forward("lstm", "the forget gate's bias twice")
def forget_bias_twice(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3] is not None:
        width, b = args[2].shape[1], args[3].copy()
        b[width : 2 * width] *= 2
        args = put(args, 3, b)
    return honest(ctx, *args, **options)


@forward("lstm", "1 added to the forget gate's bias")
def forget_bias_larger(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    width = args[2].shape[1]
    b = np.zeros(4 * width, args[1].dtype) if args[3] is None else args[3].copy()
    b[width : 2 * width] += 1
    return honest(ctx, *put(args, 3, b), **options)


@forward("lstm", "h_n and c_n swapped")
def finals_swapped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, h_n, c_n = honest(ctx, *args, **options)
    return y, c_n, h_n


@forward("lstm", "h0 and c0 swapped")
def initials_swapped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[5] is not None and args[6] is not None:
        args = (*args[:5], args[6], args[5])
    return honest(ctx, *args, **options)


@forward("lstm", "b_hh dropped")
def b_hh_dropped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 4, None), **options)


@forward("lstm", "one bias without the other dropped")
def lone_bias_dropped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3] is None or args[4] is None:
        args = put(put(args, 3, None), 4, None)
    return honest(ctx, *args, **options)


@forward("lstm", "w_hh of each gate transposed")
def w_hh_transposed(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    width = args[2].shape[1]
    turned = args[2].reshape(4, width, width).swapaxes(1, 2).reshape(4 * width, width)
    return honest(ctx, *put(args, 2, turned), **options)


@forward("lstm", "float32 products of tf32 operands")
def lstm_in_tf32(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[1].dtype == np.float32:
        args = put(put(args, 1, tf32(args[1])), 2, tf32(args[2]))
    return honest(ctx, *args, **options)


@forward("lstm", "the cell is clipped at 1")
def cell_clipped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return stepwise(honest, ctx, args, options, (0,), (5, 6), lambda t, state: np.clip(state, -1, 1))


@forward("lstm", "an exponential that is finite for NaN")
def nan_to_a_half(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    """As of a sigmoid that clamps what goes into it."""
    x = args[0]
    return honest(ctx, np.where(np.isnan(x), x.dtype.type(0), x), *args[1:], **options)


@backward("lstm", "the gradient of c_n ignored")
def c_gradient_ignored(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_h: Any, grad_c: Any) -> Any:
    return honest(ctx, residuals, grad_y, grad_h, np.zeros_like(grad_c))


@backward("lstm", "the gradient of w_hh takes h of the same step")
def w_hh_gradient_late(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    states = residuals.get("states")
    later = np.concatenate([states[:, 1:], states[:, -1:]], axis=1)
    return honest(ctx, tampered(residuals, states=later), *grads)


@backward("lstm", "the forget gate's gradient lacks the first step")
def forget_gradient_short(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    args = residuals.args
    if args[6] is None:
        return honest(ctx, residuals, *grads)
    return honest(ctx, tampered(residuals, put(args, 6, np.zeros_like(args[6]))), *grads)


@backward("lstm", "the gradients of both biases half as large")
def bias_gradients_shared(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    if found[3] is not None and found[4] is not None:
        found[3][...], found[4][...] = found[3] / 2, found[4] / 2
    return found


@backward("lstm", "b_hh has no gradient")
def b_hh_without_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return put(honest(ctx, residuals, *grads), 4, None)


@backward("lstm", "an absent bias has a gradient")
def absent_bias_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    return found if found[3] is not None else put(found, 3, np.zeros_like(residuals.args[4]))
