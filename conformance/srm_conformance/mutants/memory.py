"""Mutants that are wrong about memory: strides, offsets, aliases, what is written to, and what was never written."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds
from numpy.lib.stride_tricks import as_strided
from srm_backends.numpy.common import quiet

from srm_conformance.mutants.common import beyond, each, map_arrays, put
from srm_conformance.mutants.mutant import backward, forward


def _memory(array: Any) -> Any:
    """All that lies between the first and the last byte of an array, in order: memory that is its own."""
    forwards = array[tuple(slice(None, None, -1 if s < 0 else None) for s in array.strides)]
    low, high = byte_bounds(array)
    return as_strided(forwards, ((high - low) // array.itemsize,), (array.itemsize,))


def _owner(array: Any) -> Any:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


@each(forward, "strides taken for contiguous ones", scan=1, mdi=1, lstm=0, attention=1, hds_pool=0, conv_bn=1)
def strides_ignored(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    array = args[at]
    if array is not None and array.size and not array.flags.c_contiguous:
        args = put(args, at, np.resize(_memory(array), array.shape))
    return honest(ctx, *args, **options)


@each(
    forward,
    "weights' strides taken for contiguous ones",
    recurrent_mix=1,
    recurrent_step=2,
    mdi_recurrence=3,
    conv_bn_train=2,
)
def weight_strides_ignored(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    return strides_ignored(honest, ctx, *args, at=at, **options)


@each(forward, "elements with stride 0 are there once", scan=1, attention=2, conv_bn_train=0)
def stride_0_ignored(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    array = args[at]
    if (
        array is not None
        and array.size
        and any(s == 0 and n > 1 for s, n in zip(array.strides, array.shape, strict=True))
    ):
        once = np.zeros_like(array, subok=False, order="C")
        first = tuple(slice(1 if s == 0 else None) for s in array.strides)
        once[first] = array[first]
        args = put(args, at, once)
    return honest(ctx, *args, **options)


@each(forward, "storage offset ignored", scan=1, hds_query=1, conv_bn=0)
def offset_ignored(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    array = args[at]
    if array is not None and array.size and array.flags.c_contiguous and array.flags.aligned:
        owner = _owner(array)
        (start, _), (low, high) = byte_bounds(array), byte_bounds(owner)
        if owner.flags.c_contiguous and low < start and low % array.itemsize == 0 and high - low >= array.nbytes:
            args = put(
                args, at, owner.reshape(-1).view(np.uint8)[: array.nbytes].view(array.dtype).reshape(array.shape)
            )
    return honest(ctx, *args, **options)


@each(forward, "time taken to be innermost but one", "scan", "lstm")
def time_major_ignored(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    """Where (T, B, D) lies in memory, it is read as (B, T, D)."""
    at = 1 if args[1] is not None and args[1].ndim == 3 else 0
    x = args[at]
    if x.ndim == 3 and x.size and x.swapaxes(0, 1).flags.c_contiguous and not x.flags.c_contiguous:
        args = put(args, at, x.swapaxes(0, 1).reshape(x.shape))
    return honest(ctx, *args, **options)


@each(forward, "read-only memory refused", lstm=1, hds_pool=0)
def read_only_refused(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if args[at] is not None and not args[at].flags.writeable:
        raise ValueError("buffer source array is read-only")
    return honest(ctx, *args, **options)


@each(forward, "misaligned memory refused", mdi=0, attention=0)
def misaligned_refused(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if args[at] is not None and not args[at].flags.aligned:
        raise ValueError("ndarray is not aligned")
    return honest(ctx, *args, **options)


@each(forward, "negative strides refused", recurrent_mix=0, hds_query=0)
def negative_refused(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if min(args[at].strides) < 0:
        raise ValueError("at least one stride is negative")
    return honest(ctx, *args, **options)


@each(backward, "the gradient of y taken for contiguous", "scan", "attention", "conv_bn")
def gradient_strides_ignored(honest: Any, ctx: Any, residuals: Any, grad: Any, *grads: Any) -> Any:
    if grad.size and not grad.flags.c_contiguous:
        grad = np.resize(_memory(grad), grad.shape)
    return honest(ctx, residuals, grad, *grads)


# Aliases


@each(forward, "without steps the final state is the initial one", scan=2, recurrent_mix=5, mdi_recurrence=2, lstm=5)
def initial_returned(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    y, *last = honest(ctx, *args, **options)
    if not y.shape[1] and args[at] is not None:
        last[0] = args[at]
    return (y, *last)


@each(forward, "the final state is a view of y", "scan", "mdi_recurrence", "lstm")
def final_is_a_view(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, last, *rest = honest(ctx, *args, **options)
    if y.shape[1] and options["lengths"] is None and y.dtype == last.dtype:
        last = y[:, 0 if options.get("reverse") else -1]
    return (y, last, *rest)


@forward("lstm", "h_n and c_n are one array where both are 0")
def one_zero_for_both(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, h_n, c_n = honest(ctx, *args, **options)
    return y, h_n, h_n if not y.shape[1] and args[5] is args[6] is None else c_n


@forward("recurrent_step", "the new state is the state's memory")
def updated_in_place(honest: Any, ctx: Any, x: Any, state: Any, *args: Any) -> Any:
    y, new = honest(ctx, x, state, *args)
    state[...] = new
    return y, state


@forward("scan", "y is written over the tokens")
def over_the_tokens(honest: Any, ctx: Any, gates: Any, tokens: Any, *args: Any, **options: Any) -> Any:
    y, last = honest(ctx, gates, tokens, *args, **options)
    if tokens is not None:
        tokens[...] = y
        y = tokens
    return y, last


@forward("hds_pool", "pools of one give the memory itself")
def memory_itself(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    levels = honest(ctx, memory, num_levels=num_levels, pool=pool)
    return tuple(memory for _ in levels) if pool == 1 else levels


@forward("hds_pool", "levels of one size are one array")
def levels_share(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    levels = honest(ctx, memory, num_levels=num_levels, pool=pool)
    return tuple(levels[0] for _ in levels) if pool == 1 else levels


@forward("mdi", "gamma is the memory of the decay logits")
def gamma_over_the_logits(honest: Any, ctx: Any, *args: Any, eps: float) -> Any:
    h_new, gamma = honest(ctx, *args, eps=eps)
    args[3][...] = gamma
    return h_new, args[3]


@forward("conv_bn_train", "batch_mean and batch_var share their memory")
def statistics_overlap(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, mean, var = honest(ctx, *args, **options)
    both = ctx.empty((2 * len(mean),), mean.dtype)
    both[::2], both[1::2] = mean, var
    return y, both[::2], both[1::2]


# What is written to


@forward("scan", "gates clamped in place")
def gates_clamped_in_place(honest: Any, ctx: Any, gates: Any, *args: Any, **options: Any) -> Any:
    found = honest(ctx, gates, *args, **options)
    np.minimum(gates, gates.dtype.type(1), out=gates)
    return found


@each(forward, "lengths sorted in place", "recurrent_mix", "lstm")
def lengths_sorted(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    found = honest(ctx, *args, lengths=lengths, **options)
    if lengths is not None:
        lengths[::-1].sort()
    return found


@each(forward, "the input is scaled and scaled back", attention=0, recurrent_mix=0)
@quiet
def scaled_and_back(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    """Which leaves other last bits, and other values to a thread that reads them meanwhile."""
    found, x = honest(ctx, *args, **options), args[at]
    x *= x.dtype.type(0.3)
    x /= x.dtype.type(0.3)
    return found


@each(forward, "the mask is changed in place", attention=3)
def mask_changed(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    found, mask = honest(ctx, *args, **options), args[at]
    if mask is not None and mask.dtype != bool:
        mask[np.isneginf(mask)] = -1e4
    return found


@forward("conv_bn", "the weight is folded in place")
def folded_in_place(honest: Any, ctx: Any, x: Any, weight: Any, *args: Any, **options: Any) -> Any:
    y = honest(ctx, x, weight, *args, **options)
    weight *= 2
    return y


@forward("recurrent_step_", "x is scaled in place")
def x_scaled(honest: Any, ctx: Any, x: Any, *args: Any, slots: Any) -> Any:
    y = honest(ctx, x, *args, slots=slots)
    x *= 2
    return y


@each(forward, "writes past the end", scan=1, hds_pool=0, conv_bn=0)
def past_the_end(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    """The element after an argument, where it is memory of the same owner."""
    found, array = honest(ctx, *args, **options), args[at]
    if array is not None and array.size and array.flags.c_contiguous:
        owner = _owner(array)
        if owner.flags.c_contiguous and owner.flags.writeable:
            end = byte_bounds(array)[1] - byte_bounds(owner)[0]
            owner.reshape(-1).view(np.uint8)[end : end + array.itemsize] = 0
    return found


@each(backward, "the gradient of y is written to", "scan", "mdi", "conv_bn_train")
def gradient_written(honest: Any, ctx: Any, residuals: Any, grad: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, grad, *grads)
    grad *= 2
    return found


@each(backward, "what was kept is overwritten", lstm="gates", recurrent_mix="states", attention="out")
def residual_written(honest: Any, ctx: Any, residuals: Any, *grads: Any, at: str) -> Any:
    """So the second pullback is wrong."""
    found = honest(ctx, residuals, *grads)
    residuals.get(at)[...] = 0
    return found


@each(backward, "an argument is written to", mdi=2, hds_query=1, conv_bn=1)
def argument_written(honest: Any, ctx: Any, residuals: Any, *grads: Any, at: int) -> Any:
    found = honest(ctx, residuals, *grads)
    residuals.args[at][...] = 0
    return found


# What was never written


def _unwritten(ctx: Any, array: Any, where: Any) -> Any:
    """The same in memory of its own, but for some elements."""
    fresh = ctx.empty(array.shape, array.dtype)
    fresh[~where] = array[~where]
    return fresh


def _last(array: Any) -> Any:
    where = np.zeros(array.shape, bool)
    where.reshape(-1)[-1:] = True
    return where


@each(forward, "the last element is not written", "scan", "recurrent_mix", "mdi", "lstm", "attention", "hds_query")
def last_unwritten(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return map_arrays(lambda a: _unwritten(ctx, a, _last(a)), honest(ctx, *args, **options))


@each(forward, "steps beyond a length are not written", "scan", "recurrent_mix", "mdi_recurrence", "lstm")
def padding_unwritten(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    y, *last = honest(ctx, *args, lengths=lengths, **options)
    if lengths is not None:
        y = _unwritten(ctx, y, beyond(lengths, y.shape[1]))
    return (y, *last)


@forward("attention", "rows without slots are not written")
def empty_rows_unwritten(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    return _unwritten(ctx, out, ~out.any(-1))


@each(forward, "adds to memory that it takes for zeros", "conv_bn_train", "mdi", "hds_query")
@quiet
def added_to_nothing(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    def added(array: Any) -> Any:
        fresh = ctx.empty(array.shape, array.dtype)
        fresh += array
        return fresh

    found = honest(ctx, *args, **options)
    return put(found, 1, added(found[1])) if isinstance(found, tuple) else added(found)


@each(backward, "gradients beyond a length are not written", scan=1, lstm=0)
def padding_gradient_unwritten(honest: Any, ctx: Any, residuals: Any, *grads: Any, at: int) -> Any:
    found, lengths = honest(ctx, residuals, *grads), residuals.options["lengths"]
    if lengths is None or found[at] is None:
        return found
    return put(found, at, _unwritten(ctx, found[at], beyond(lengths, found[at].shape[1])))


@each(backward, "gradients without a share are not written", hds_pool=0, hds_query=1)
def remainder_gradient_unwritten(honest: Any, ctx: Any, residuals: Any, *grads: Any, at: int) -> Any:
    found = honest(ctx, residuals, *grads)
    return put(found, at, _unwritten(ctx, found[at], found[at] == 0))
