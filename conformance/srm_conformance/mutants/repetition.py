"""Mutants that are right the first time: caches, counters, memory that calls or threads share."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

from srm_conformance.mutants.common import each, map_arrays, put
from srm_conformance.mutants.mutant import backward, forward

_calls, _answers = itertools.count(), itertools.count()
_known: dict[Any, Any] = {}
_buffers: dict[Any, Any] = {}


def _shape(honest: Any, args: Any, options: Any) -> Any:
    """What stays the same in a call with other values."""
    seen = [
        (a.shape, a.strides, a.dtype.name) if isinstance(a, np.ndarray) else repr(a) for a in (*args, *options.values())
    ]
    return (honest, *seen)


def _kept(values: Any) -> Any:
    return map_arrays(lambda a: a.copy(order="K"), values)


def _nudged(array: Any) -> Any:
    """Its finite numbers moved by one unit in the last place towards 0."""
    finite = np.isfinite(array)
    array[finite] = np.nextafter(array[finite], array.dtype.type(0))
    return array


@each(forward, "results remembered by the arguments' shapes", "scan", "mdi", "attention", "hds_pool", "conv_bn")
def remembered(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    found = honest(ctx, *args, **options)
    return _kept(_known.setdefault(_shape(honest, args, options), _kept(found)))


@each(forward, "a parameter is remembered by its shape", conv_bn=1, recurrent_mix=3)
def parameter_remembered(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    """As a layer does that prepares its weights once."""
    weight = args[at]
    known = _known.setdefault((honest, at, weight.shape, weight.dtype.name), weight.copy())
    return honest(ctx, *put(args, at, known), **options)


@each(backward, "gradients remembered by the arguments' shapes", "attention", "lstm")
def gradients_remembered(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    return _kept(_known.setdefault(_shape(honest, grads, residuals.options), _kept(tuple(found))))


@each(forward, "every second call differs in the last bit", "scan", "hds_pool", "recurrent_step_")
def last_bit(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    """As of a sum whose order is left to threads."""
    found = honest(ctx, *args, **options)
    if next(_calls) % 2:
        map_arrays(_nudged, found)
    return found


@forward("attention", "every second call goes through the slots from the last")
def slots_backwards(honest: Any, ctx: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
    if next(_calls) % 2 and not options["is_causal"]:
        key, value = key[:, :, ::-1], value[:, :, ::-1]
        mask = mask if mask is None else mask[..., ::-1]
    return honest(ctx, query, key, value, mask, **options)


@each(backward, "every second gradient differs in the last bit", "scan", "conv_bn_train")
def last_bit_of_gradients(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    if next(_answers) % 2:
        _nudged(found[0])
    return found


@each(forward, "threads share a buffer", scan=1, recurrent_step_=0, mdi=0, attention=0, hds_update_=2, conv_bn_train=0)
def shared_buffer(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    x = args[at]
    if x is None or not x.size:
        return honest(ctx, *args, **options)
    buffer = _buffers.setdefault((honest, x.shape, x.strides, x.dtype.name), x.copy(order="K"))
    buffer[...] = x
    time.sleep(0.002)  # long enough for another thread to write its own
    return honest(ctx, *put(args, at, buffer), **options)


@each(backward, "threads share a buffer of the gradient", "lstm", "conv_bn")
def shared_gradient_buffer(honest: Any, ctx: Any, residuals: Any, grad: Any, *grads: Any) -> Any:
    if not grad.size:
        return honest(ctx, residuals, grad, *grads)
    buffer = _buffers.setdefault((honest, grad.shape, grad.dtype.name), np.empty(grad.shape, grad.dtype))
    buffer[...] = grad
    time.sleep(0.002)
    return honest(ctx, residuals, buffer, *grads)


@each(forward, "the memory of a result is used again", "mdi", "attention", "conv_bn")
def result_reused(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    """By the next call of the same shapes, as of a workspace that is handed out."""
    found = honest(ctx, *args, **options)
    workspace = _buffers.setdefault((_shape(honest, args, options), "result"), found)
    if workspace is found:
        return found
    pairs = zip(workspace, found, strict=True) if isinstance(found, tuple) else ((workspace, found),)
    for old, new in pairs:
        old[...] = new
    return workspace


@forward("scan", "wrong where it is asked to be deterministic")
def deterministic_path(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, final = honest(ctx, *args, **options)
    if ctx.deterministic:
        y *= y.dtype.type(1.5)
    return y, final


@forward("scan", "int32 lengths read as int64")
def narrow_lengths(honest: Any, ctx: Any, *args: Any, lengths: Any, **options: Any) -> Any:
    if lengths is not None and lengths.dtype == np.int32:
        lengths = np.resize(lengths[::2], lengths.shape)
    return honest(ctx, *args, lengths=lengths, **options)
