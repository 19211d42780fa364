"""Mutants of the four operators over time: lengths, initial and final states, T = 0."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from srm_backends.numpy.common import result

from srm_conformance.mutants.common import SEQUENCES, beyond, each, is_half, put, stepwise, tampered
from srm_conformance.mutants.mutant import backward, forward

# Where x and the first state stand among the arguments, which is where their gradients stand as well, but for mix.
OVER_TIME = {"scan": (0, 1), "recurrent_mix": (0,), "mdi_recurrence": (0, 1), "lstm": (0,)}
STATES = {"scan": (2,), "recurrent_mix": (5,), "mdi_recurrence": (2,), "lstm": (5, 6)}
RECURRENCES: dict[str, Any] = {op: (OVER_TIME[op], STATES[op]) for op in SEQUENCES}


@each(forward, "lengths ignored", *SEQUENCES)
def lengths_ignored(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    return honest(ctx, *args, lengths=None, **options)


@each(forward, "lengths read as the first one", *SEQUENCES)
def first_length(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    if lengths is not None:
        lengths = np.full_like(lengths, lengths[0])
    return honest(ctx, *args, lengths=lengths, **options)


@each(forward, "lengths one too many", *SEQUENCES)
def lengths_off_by_one(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    if lengths is not None:
        lengths = np.minimum(lengths + 1, args[0].shape[1])
    return honest(ctx, *args, lengths=lengths, **options)


@each(forward, "the final state is that of T", *SEQUENCES)
def final_of_all(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    _, *last = honest(ctx, *args, lengths=None, **options)
    y, *_ = honest(ctx, *args, lengths=lengths, **options)
    return (y, *last)


@each(forward, "y beyond a length is the state", *SEQUENCES)
def state_beyond(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    y, *last = honest(ctx, *args, lengths=lengths, **options)
    if lengths is not None:
        where = beyond(lengths, y.shape[1])
        y[where] = np.broadcast_to(last[0][:, None], y.shape)[where]
    return (y, *last)


@each(forward, "initial state ignored", scan=2, recurrent_mix=5, mdi_recurrence=2)
def initial_ignored(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    zeros = None if args[at] is None else np.zeros_like(args[at])
    return honest(ctx, *put(args, at, zeros), **options)


forward("lstm", "h0 ignored")(partial(initial_ignored, at=5))
forward("lstm", "c0 ignored")(partial(initial_ignored, at=6))


@each(forward, "the first sequence's state for all", scan=2, recurrent_mix=5, mdi_recurrence=2, lstm=5)
def first_state(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if args[at] is not None:
        args = put(args, at, np.broadcast_to(args[at][:1], args[at].shape))
    return honest(ctx, *args, **options)


@each(forward, "without steps the final state is 0", scan=2, recurrent_mix=5, lstm=5)
def no_steps(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    y, *last = honest(ctx, *args, **options)
    if not y.shape[1]:
        last = [np.zeros_like(s) for s in last]
    return (y, *last)


@each(forward, "without steps y has one", "scan", "mdi_recurrence")
def one_step_too_many(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, *last = honest(ctx, *args, **options)
    if not y.shape[1]:
        y = ctx.zeros((len(y), 1, *y.shape[2:]), y.dtype)
    return (y, *last)


@each(forward, "every sequence gets the first one's result", "recurrent_mix", "lstm")
def first_sequence(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    outputs = honest(ctx, *args, **options)
    for output in outputs:
        output[1:] = output[:1]
    return outputs


@each(forward, "a half state comes back as float32", scan=2, recurrent_mix=5, mdi_recurrence=2, lstm=6)
def state_widened(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    y, *last = honest(ctx, *args, **options)
    return (y, *(result(ctx, s, np.float32) if is_half(s) else s for s in last))


@each(forward, "a float32 state comes back as half", *SEQUENCES)
def state_narrowed(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, *last = honest(ctx, *args, **options)
    return (y, *(result(ctx, s, y.dtype) if is_half(y) else s for s in last))


@each(forward, "the state is rounded to the type of x at every step", **RECURRENCES)
def rounded_every_step(honest: Any, ctx: Any, *args: Any, at: Any, **options: Any) -> Any:
    over_time, states = at
    x = next(args[i] for i in reversed(over_time) if args[i] is not None)
    if not is_half(x):
        return honest(ctx, *args, **options)
    between = lambda t, state: state.astype(x.dtype).astype(state.dtype)  # noqa: E731
    return stepwise(honest, ctx, args, options, over_time, states, between)


@each(forward, "the state is lost at step 64", **RECURRENCES)
def lost_at_an_edge(honest: Any, ctx: Any, *args: Any, at: Any, **options: Any) -> Any:
    over_time, states = at
    steps = max(args[i].shape[1] for i in over_time if args[i] is not None)
    if steps <= 64 or options.get("reverse"):
        return honest(ctx, *args, **options)
    between = lambda t, state: np.zeros_like(state) if t == 63 else state  # noqa: E731
    return stepwise(honest, ctx, args, options, over_time, states, between)


@each(backward, "the gradient of the final state ignored", *SEQUENCES)
def final_gradient_ignored(honest: Any, ctx: Any, residuals: Any, grad_y: Any, *grads: Any) -> Any:
    return honest(ctx, residuals, grad_y, *map(np.zeros_like, grads))


@each(backward, "the gradient of the initial state is 0", scan=2, recurrent_mix=4, mdi_recurrence=2, lstm=6)
def initial_gradient_zero(honest: Any, ctx: Any, residuals: Any, *grads: Any, at: int) -> Any:
    found = honest(ctx, residuals, *grads)
    return found if found[at] is None else put(found, at, np.zeros_like(found[at]))


@each(backward, "the gradient of the initial state ends at step 1", scan=2, recurrent_mix=4, mdi_recurrence=2, lstm=5)
def initial_gradient_late(honest: Any, ctx: Any, residuals: Any, grad_y: Any, *grads: Any, at: int) -> Any:
    found = honest(ctx, residuals, grad_y, *grads)
    if found[at] is None or residuals.options.get("reverse"):
        return found
    late = grad_y.copy()
    late[:, :1] = 0
    return put(found, at, honest(ctx, residuals, late, *grads)[at])


@each(backward, "the gradient beyond a length is that of y", scan=1, recurrent_mix=0, mdi_recurrence=0)
def gradient_beyond(honest: Any, ctx: Any, residuals: Any, grad_y: Any, *grads: Any, at: int) -> Any:
    found, lengths = honest(ctx, residuals, grad_y, *grads), residuals.options["lengths"]
    if lengths is not None and found[at] is not None:
        where = beyond(lengths, grad_y.shape[1])
        found[at][where] = grad_y[where]
    return found


@each(backward, "the gradient ignores the lengths", *SEQUENCES)
def gradient_without_lengths(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, tampered(residuals, options={"lengths": None}), *grads)
