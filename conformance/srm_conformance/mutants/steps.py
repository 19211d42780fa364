"""Mutants of `recurrent_step` and `recurrent_step_`: x, state, weight, bias, decay, mode, index."""

from __future__ import annotations

from typing import Any

import numpy as np
from srm_backends.numpy.common import quiet

from srm_conformance.mutants.common import each, is_half, put
from srm_conformance.mutants.mutant import backward, forward

BOTH = ("recurrent_step", "recurrent_step_")


@each(forward, "row and col swapped", *BOTH)
def modes_swapped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    swapped = tuple({"row": "col", "col": "row"}[m] for m in args[5])
    return honest(ctx, *put(args, 5, swapped), **options)


@each(forward, "modes in the order of the heads from the last", *BOTH)
def modes_backwards(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 5, args[5][::-1]), **options)


@each(forward, "bias dropped", *BOTH)
def bias_dropped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 3, np.zeros_like(args[3])), **options)


@each(forward, "index one too small", *BOTH)
def index_before(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    weight, bias = (np.roll(a, 1, axis=1) for a in args[2:4])
    return honest(ctx, *args[:2], weight, bias, *args[4:], **options)


@each(forward, "index array read as its first element", *BOTH)
def index_of_the_first(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    index = args[6]
    if np.ndim(index) and len(index):
        index = np.full_like(index, index[0])
    return honest(ctx, *args[:6], index, **options)


@each(forward, "index out of range clamped", *BOTH)
def index_clamped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    index = args[6] if isinstance(args[6], int) else np.clip(args[6], 0, args[2].shape[1] - 1)
    return honest(ctx, *args[:6], index, **options)


@each(forward, "a negative index counts from the end", *BOTH)
def index_from_the_end(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    index = args[6]
    if not isinstance(index, int):
        index = np.where(index < 0, index + args[2].shape[1], index)
    return honest(ctx, *args[:6], index, **options)


@each(forward, "decay applied to the new input as well", *BOTH)
def decay_after(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    x = args[0]
    decayed = (x * args[4].astype(np.float64)[:, None]).astype(x.dtype)
    return honest(ctx, decayed, *args[1:], **options)


@each(forward, "the first head's decay for all", *BOTH)
def first_decay(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 4, np.broadcast_to(args[4][:1], args[4].shape)), **options)


@forward("recurrent_step", "a float32 state is rounded to half on the way")
def state_rounded(honest: Any, ctx: Any, x: Any, state: Any, *args: Any, **options: Any) -> Any:
    y, new = honest(ctx, x, state, *args, **options)
    if is_half(x):
        new[...] = new.astype(x.dtype)
    return y, new


@forward("recurrent_step", "float32 parameters are rounded to half")
def parameters_rounded(honest: Any, ctx: Any, x: Any, state: Any, *args: Any, **options: Any) -> Any:
    parameters = (a.astype(x.dtype) for a in args[:3])
    return honest(ctx, x, state, *parameters, *args[3:], **options)


@forward("recurrent_step", "the new state is y less the bias, over the weight")
@quiet
def state_from_y(honest: Any, ctx: Any, x: Any, state: Any, weight: Any, bias: Any, *args: Any, **options: Any) -> Any:
    y, new = honest(ctx, x, state, weight, bias, *args, **options)
    _, mode, index = args
    if not np.ndim(index):
        w, b = (a[:, int(index)].astype(new.dtype)[:, None] for a in (weight, bias))
        row = np.array([m == "row" for m in mode])[:, None]
        new[...] = (y.astype(new.dtype) - b) / np.where(row, 1, w)
    return y, new


@forward("recurrent_step", "y is that of the state before in row heads")
def old_state_read(honest: Any, ctx: Any, x: Any, state: Any, weight: Any, bias: Any, *args: Any) -> Any:
    y, new = honest(ctx, x, state, weight, bias, *args)
    index = args[2]
    if not np.ndim(index):
        row = np.array([m == "row" for m in args[1]])
        y[:, row] = (state + bias[:, int(index)].astype(state.dtype)[:, None])[:, row]
    return y, new


@forward("recurrent_step", "every sequence gets the first one's result")
def first_sequence(honest: Any, ctx: Any, *args: Any) -> Any:
    y, new = honest(ctx, *args)
    y[1:] = y[:1]
    return y, new


@forward("recurrent_step", "only the first head is right")
def first_head(honest: Any, ctx: Any, *args: Any) -> Any:
    y, new = honest(ctx, *args)
    y[:, 1:] = y[:, :1]
    return y, new


@forward("recurrent_step", "without sequences it raises")
def no_batch(honest: Any, ctx: Any, x: Any, *args: Any) -> Any:
    if not len(x):
        raise ValueError("zero-size array to reduction operation")
    return honest(ctx, x, *args)


@backward("recurrent_step", "the gradient of the decay is the first sequence's")
def decay_gradient_of_the_first(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_state: Any) -> Any:
    one, new = grad_y.copy(), grad_state.copy()
    one[1:], new[1:] = 0, 0
    return put(honest(ctx, residuals, grad_y, grad_state), 4, honest(ctx, residuals, one, new)[4])


@backward("recurrent_step", "the gradient of the state is not decayed")
def state_gradient_not_decayed(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, decay = honest(ctx, residuals, *grads), residuals.args[4].astype(np.float64)[:, None]
    found[1][...] = found[1] / decay
    return found


@backward("recurrent_step", "the gradient of the weights at every position")
def weight_gradient_everywhere(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    if not np.ndim(residuals.args[6]):
        found[2][...] = found[2][:, [int(residuals.args[6])]]
    return found


@backward("recurrent_step", "equal positions of two sequences count once")
def scattered_once(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_state: Any) -> Any:
    found = honest(ctx, residuals, grad_y, grad_state)
    index = residuals.args[6]
    if np.ndim(index) == 0:
        return found
    one = grad_y.copy()
    for b, position in enumerate(index):  # as into[:, index] += values does
        if (index[b + 1 :] == position).any():
            one[b] = 0
    return put(found, 3, honest(ctx, residuals, one, grad_state)[3])


@backward("recurrent_step", "the gradient of the new state ignored")
def state_gradient_ignored(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_state: Any) -> Any:
    return honest(ctx, residuals, grad_y, np.zeros_like(grad_state))


# recurrent_step_: what happens to the rows of the state


@forward("recurrent_step_", "slots ignored")
def slots_ignored(honest: Any, ctx: Any, x: Any, *args: Any, slots: Any) -> Any:
    slots = None if slots is None else np.arange(len(slots))
    return honest(ctx, x, *args, slots=slots)


@forward("recurrent_step_", "slots in rising order")
def slots_sorted(honest: Any, ctx: Any, x: Any, *args: Any, slots: Any) -> Any:
    return honest(ctx, x, *args, slots=None if slots is None else np.sort(slots))


@forward("recurrent_step_", "other slots are decayed")
def others_decayed(honest: Any, ctx: Any, x: Any, state: Any, *args: Any, slots: Any) -> Any:
    y = honest(ctx, x, state, *args, slots=slots)
    if slots is not None:
        others = np.setdiff1d(np.arange(len(state)), slots)
        state[others] *= args[2].astype(state.dtype)[:, None]
    return y


@forward("recurrent_step_", "written to the slots, read from the first rows")
def read_from_the_first(honest: Any, ctx: Any, x: Any, state: Any, *args: Any, slots: Any) -> Any:
    if slots is None:
        return honest(ctx, x, state, *args, slots=None)
    rows = state[: len(x)].copy()
    y = honest(ctx, x, rows, *args, slots=None)
    state[slots] = rows
    return y


@forward("recurrent_step_", "the state is left as it was")
def state_left(honest: Any, ctx: Any, x: Any, state: Any, *args: Any, slots: Any) -> Any:
    return honest(ctx, x, state.copy(), *args, slots=slots)


@forward("recurrent_step_", "a state that is not contiguous is updated in a copy")
def updated_in_a_copy(honest: Any, ctx: Any, x: Any, state: Any, *args: Any, slots: Any) -> Any:
    return honest(ctx, x, np.ascontiguousarray(state), *args, slots=slots)


@forward("recurrent_step_", "a step twice")
def step_twice(honest: Any, ctx: Any, *args: Any, slots: Any) -> Any:
    y = honest(ctx, *args, slots=slots)
    honest(ctx, *args, slots=slots)
    return y
