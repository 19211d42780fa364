"""Mutants of `scan` and `recurrent_mix`."""

from __future__ import annotations

from typing import Any

import numpy as np
from srm_backends.numpy.common import quiet

from srm_conformance.mutants.common import put, tampered
from srm_conformance.mutants.mutant import backward, forward


@forward("scan", "reverse ignored")
def reverse_ignored(honest: Any, ctx: Any, *args: Any, reverse: Any, **options: Any) -> Any:
    return honest(ctx, *args, reverse=False, **options)


@forward("scan", "reverse flips the input alone")
def half_reversed(honest: Any, ctx: Any, *args: Any, reverse: Any, **options: Any) -> Any:
    y, last = honest(ctx, *args, reverse=reverse, **options)
    if reverse:
        y[...] = y[:, ::-1].copy()
    return y, last


@forward("scan", "gates one step late")
def gates_late(honest: Any, ctx: Any, gates: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, np.roll(gates, 1, axis=1), *args, **options)


@forward("scan", "the gate decays the new token as well")
def gate_on_the_token(honest: Any, ctx: Any, gates: Any, tokens: Any, *args: Any, **options: Any) -> Any:
    if tokens is not None:
        tokens = (gates.astype(np.float64) * tokens).astype(tokens.dtype)
    return honest(ctx, gates, tokens, *args, **options)


@forward("scan", "the initial state is not decayed")
def initial_not_decayed(honest: Any, ctx: Any, gates: Any, tokens: Any, state: Any, **options: Any) -> Any:
    if state is not None and gates.shape[1] > 1:
        gates = gates.copy()
        gates[:, -1 if options["reverse"] else 0] = 1
    return honest(ctx, gates, tokens, state, **options)


@forward("scan", "the state is lost at step 256")
def lost_between_blocks(honest: Any, ctx: Any, gates: Any, tokens: Any, state: Any, **options: Any) -> Any:
    if tokens is not None and tokens.shape[1] > 256:
        gates = np.broadcast_to(gates, tokens.shape).copy()
        gates[:, 256::256] = 0
    return honest(ctx, gates, tokens, state, **options)


@forward("scan", "the gate of a block's first step is that before")
def gate_at_the_edge(honest: Any, ctx: Any, gates: Any, *args: Any, **options: Any) -> Any:
    gates = gates.copy()
    gates[:, 32::32] = gates[:, 31:-1:32]
    return honest(ctx, gates, *args, **options)


@forward("scan", "tokens of the last partial block left out")
def last_block(honest: Any, ctx: Any, gates: Any, tokens: Any, *args: Any, **options: Any) -> Any:
    if tokens is not None and tokens.shape[1] > 32:
        tokens = tokens.copy()
        tokens[:, tokens.shape[1] // 32 * 32 :] = 0
    return honest(ctx, gates, tokens, *args, **options)


@forward("scan", "the last step of an odd number left out")
def last_of_a_pair(honest: Any, ctx: Any, gates: Any, tokens: Any, *args: Any, **options: Any) -> Any:
    y, last = honest(ctx, gates, tokens, *args, **options)
    if y.shape[1] % 2 and y.shape[1] > 1:
        y[:, -1] = y[:, -2]
    return y, last


@forward("scan", "the product of gates begins with 1")
def exclusive_product(honest: Any, ctx: Any, gates: Any, tokens: Any, *args: Any, **options: Any) -> Any:
    if tokens is None and gates.shape[1]:
        gates = np.roll(gates, -1 if options["reverse"] else 1, axis=1)
        gates[:, -1 if options["reverse"] else 0] = 1
    return honest(ctx, gates, tokens, *args, **options)


@forward("scan", "divides by the product of the gates")
@quiet
def by_division(honest: Any, ctx: Any, gates: Any, tokens: Any, *args: Any, **options: Any) -> Any:
    y, last = honest(ctx, gates, tokens, *args, **options)
    if tokens is None or options["reverse"] or options["lengths"] is not None or args[0] is not None:
        return y, last
    compute = np.float64 if y.dtype == np.float64 else np.float32
    product = np.cumprod(np.broadcast_to(gates.astype(compute), y.shape), axis=1)
    states = product * np.cumsum(tokens.astype(compute) / product, axis=1)
    y[...] = states
    if y.shape[1]:
        last[...] = states[:, -1]
    return y, last


@forward("scan", "gates above 1 clamped")
def gates_clamped(honest: Any, ctx: Any, gates: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, np.minimum(gates, gates.dtype.type(1)), *args, **options)


@forward("scan", "negative gates clamped")
def gates_positive(honest: Any, ctx: Any, gates: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, np.maximum(gates, gates.dtype.type(0)), *args, **options)


@forward("scan", "float32 gates rounded to half beside half tokens")
def gates_rounded(honest: Any, ctx: Any, gates: Any, tokens: Any, *args: Any, **options: Any) -> Any:
    if tokens is not None:
        gates = gates.astype(tokens.dtype)
    return honest(ctx, gates, tokens, *args, **options)


@forward("scan", "the first sequence's gates for all")
def gates_of_the_first(honest: Any, ctx: Any, gates: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, np.broadcast_to(gates[:1], gates.shape), *args, **options)


@backward("scan", "the gradient ignores reverse")
def gradient_forwards(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, tampered(residuals, options={"reverse": False}), *grads)


@backward("scan", "the gradient of the gates lacks its first step")
def gates_gradient_short(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    gates, tokens, state = honest(ctx, residuals, *grads)
    if gates.shape[1] > 1:
        gates[:, -1 if residuals.options["reverse"] else 0] = 0
    return gates, tokens, state


@backward("scan", "the gradient of the gates takes y of the same step")
def gates_gradient_late(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    states = residuals.get("states")
    back = -1 if residuals.options["reverse"] else 1
    return honest(ctx, tampered(residuals, states=np.roll(states, -back, axis=1)), *grads)


@backward("scan", "the gradient of a constant gate is a mean over time")
def constant_gate_gradient(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_final: Any) -> Any:
    gates, tokens, state = honest(ctx, residuals, grad_y, grad_final)
    steps = grad_y.shape[1]
    if gates.shape[1] == 1 and steps > 1:
        gates[...] = gates / gates.dtype.type(steps)
    return gates, tokens, state


@backward("scan", "the gradient of a shared gate is the first sequence's")
def shared_gate_gradient(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_final: Any) -> Any:
    found = honest(ctx, residuals, grad_y, grad_final)
    if len(found[0]) == len(grad_y):
        return found
    one, last = grad_y.copy(), grad_final.copy()
    one[1:], last[1:] = 0, 0
    return put(found, 0, honest(ctx, residuals, one, last)[0])


@backward("scan", "the gradient of a gate for all channels is the first channel's")
def step_gate_gradient(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_final: Any) -> Any:
    found = honest(ctx, residuals, grad_y, grad_final)
    if found[0].shape[2] == grad_y.shape[2]:
        return found
    one, last = grad_y.copy(), grad_final.copy()
    one[..., 1:], last[..., 1:] = 0, 0
    return put(found, 0, honest(ctx, residuals, one, last)[0])


@backward("scan", "the state's gradient is lost at step 256")
def gradient_lost(honest: Any, ctx: Any, residuals: Any, grad_y: Any, *grads: Any) -> Any:
    gates, *rest = residuals.args
    if residuals.options["reverse"] or gates.shape[1] <= 256:
        return honest(ctx, residuals, grad_y, *grads)
    gates = gates.copy()
    gates[:, 256] = 0
    return honest(ctx, tampered(residuals, (gates, *rest)), grad_y, *grads)


# recurrent_mix: x, weight, bias, decay, mode, initial_state


@forward("recurrent_mix", "row and col swapped")
def modes_swapped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    swapped = tuple({"row": "col", "col": "row"}[m] for m in args[4])
    return honest(ctx, *put(args, 4, swapped), **options)


@forward("recurrent_mix", "the first head's mode for all")
def first_mode(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 4, args[4][:1] * len(args[4])), **options)


@forward("recurrent_mix", "bias dropped")
def bias_dropped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 2, np.zeros_like(args[2])), **options)


@forward("recurrent_mix", "start ignored")
def start_ignored(honest: Any, ctx: Any, *args: Any, start: Any, **options: Any) -> Any:
    return honest(ctx, *args, start=start * 0, **options)


@forward("recurrent_mix", "start read as its first element")
def start_of_the_first(honest: Any, ctx: Any, *args: Any, start: Any, **options: Any) -> Any:
    start = np.full_like(start, start[0]) if np.ndim(start) else start
    return honest(ctx, *args, start=start, **options)


@forward("recurrent_mix", "positions out of range read the last one")
def positions_clamped(honest: Any, ctx: Any, *args: Any, start: Any, **options: Any) -> Any:
    _, weight, bias, *_ = args
    first, reach = int(np.min(start, initial=0)), int(np.max(start, initial=0)) + args[0].shape[1]
    over = max(0, reach - weight.shape[1])
    wide = ((0, 0), (max(0, -first), over))
    padded = (np.pad(a, wide, mode="edge") if weight.shape[1] else a for a in (weight, bias))
    weight, bias = padded
    return honest(ctx, args[0], weight, bias, *args[3:], start=start + max(0, -first), **options)


@forward("recurrent_mix", "weights one position late")
def weights_late(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 1, np.roll(args[1], 1, axis=1)), **options)


@forward("recurrent_mix", "the bias of position 64 is that before")
def bias_at_the_edge(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    bias = args[2].copy()
    bias[:, 64:65] = bias[:, 63:64]
    return honest(ctx, *put(args, 2, bias), **options)


@forward("recurrent_mix", "the first head's decay for all")
def first_decay(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 3, np.broadcast_to(args[3][:1], args[3].shape)), **options)


@forward("recurrent_mix", "the initial state is not decayed")
def mix_initial_not_decayed(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[5] is not None:
        decay = args[3].astype(np.float64)[:, None]
        args = put(args, 5, (args[5] / decay).astype(args[5].dtype))
    return honest(ctx, *args, **options)


@forward("recurrent_mix", "channels past a multiple of 4 are those before")
def odd_channels(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, last = honest(ctx, *args, **options)
    width = y.shape[-1]
    if width > 4 and width % 4:
        y[..., width // 4 * 4 :] = y[..., width // 4 * 4 - 1 :][..., :1]
    return y, last


@forward("recurrent_mix", "the final state is y less the bias")
@quiet
def state_from_y(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, last = honest(ctx, *args, **options)
    x, weight, bias, _, mode, _ = args
    row = np.array([m == "row" for m in mode])
    end = x.shape[1] - 1
    if options["lengths"] is not None or np.ndim(options["start"]) or end < 0:
        return y, last
    w, b = (a[:, options["start"] + end].astype(last.dtype)[:, None] for a in (weight, bias))
    last[...] = (y[:, -1].astype(last.dtype) - b) / np.where(row[:, None], 1, w)
    return y, last


@backward("recurrent_mix", "the gradient of the weights ignores start")
def weight_gradient_at_0(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, start = honest(ctx, residuals, *grads), residuals.options["start"]
    return found if np.ndim(start) else put(found, 1, np.roll(found[1], -start, axis=1))


@backward("recurrent_mix", "the gradient of the bias is the first sequence's")
def bias_gradient_of_the_first(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_final: Any) -> Any:
    one = grad_y.copy()
    one[1:] = 0
    return put(honest(ctx, residuals, grad_y, grad_final), 2, honest(ctx, residuals, one, grad_final)[2])


@backward("recurrent_mix", "the gradient of the decay lacks the initial state")
def decay_gradient_short(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, args = honest(ctx, residuals, *grads), residuals.args
    if args[5] is None:
        return found
    without = tampered(residuals, put(args, 5, np.zeros_like(args[5])))
    return put(found, 3, honest(ctx, without, *grads)[3])


@backward("recurrent_mix", "the gradient of the weights twice as large in col heads")
def weight_gradient_twice(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    found[1][[m == "col" for m in residuals.args[4]]] *= 2
    return found
