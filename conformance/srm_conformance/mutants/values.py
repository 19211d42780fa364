"""Mutants that are wrong about odd values and about dtypes, whatever the operator."""

from __future__ import annotations

from typing import Any

import numpy as np
from srm_backends.numpy.common import quiet, result

from srm_conformance.mutants.common import each, is_half, map_arrays, put
from srm_conformance.mutants.mutant import backward, forward
from srm_core.ops.common import finfo


@each(forward, "NaN read as 0", scan=1, mdi=0, mdi_recurrence=0, attention=0, hds_query=2, conv_bn=0)
def nan_swallowed(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    x = args[at]
    if x is not None:
        x = x.copy(order="K")
        x[np.isnan(x)] = 0
    return honest(ctx, *put(args, at, x), **options)


@each(
    forward,
    "infinity clipped to the largest number",
    "recurrent_mix",
    "recurrent_step",
    "attention",
    "hds_pool",
    "conv_bn",
)
def infinity_clipped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    def clipped(array: Any) -> Any:
        largest = array.dtype.type(finfo(array.dtype.name).max)
        array[...] = np.clip(array, -largest, largest)
        return array

    return map_arrays(clipped, honest(ctx, *args, **options))


@each(forward, "tiny values flushed to 0", scan=1, hds_pool=0)
def flushed(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    x = args[at]
    if x is not None:
        x = x.copy(order="K")
        x[np.abs(x) < x.dtype.type(finfo(x.dtype.name).smallest_normal)] = 0
    return honest(ctx, *put(args, at, x), **options)


@each(forward, "half values come back as float32", "scan", "recurrent_step_", "mdi_recurrence", "hds_query", "conv_bn")
def half_widened(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    widened = lambda a: result(ctx, a, np.float32) if is_half(a) else a  # noqa: E731
    return map_arrays(widened, honest(ctx, *args, **options))


@each(forward, "float32 values come back as float64", "mdi", "attention", "conv_bn_train")
def float32_widened(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    widened = lambda a: result(ctx, a, np.float64) if a.dtype == np.float32 else a  # noqa: E731
    return map_arrays(widened, honest(ctx, *args, **options))


@each(forward, "float64 computed in float32", scan=0, recurrent_step=1, mdi=0, lstm=0, attention=0, conv_bn=0)
@quiet
def float64_narrowed(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    x = args[at]
    if x.dtype == np.float64:
        x = x.astype(np.float32, order="K").astype(np.float64, order="K")
    return honest(ctx, *put(args, at, x), **options)


@each(forward, "numbers below 1e-3 lost", "mdi", "recurrent_mix")
def small_lost(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    def lost(array: Any) -> Any:
        array[np.abs(array) < 1e-3] = 0
        return array

    return map_arrays(lost, honest(ctx, *args, **options))


@each(backward, "gradients of half types come back as float32", "scan", "attention", "hds_pool")
def gradient_widened(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    widened = lambda a: result(ctx, a, np.float32) if is_half(a) else a  # noqa: E731
    return map_arrays(widened, tuple(honest(ctx, residuals, *grads)))


@each(backward, "all gradients have the dtype of y", "recurrent_mix", "recurrent_step", "mdi_recurrence")
def gradient_like_y(honest: Any, ctx: Any, residuals: Any, grad: Any, *grads: Any) -> Any:
    found = tuple(honest(ctx, residuals, grad, *grads))
    return map_arrays(lambda a: result(ctx, a, grad.dtype), found)


@each(backward, "NaN in the gradient of y read as 0", "scan", "conv_bn_train")
def gradient_nan_swallowed(honest: Any, ctx: Any, residuals: Any, grad: Any, *grads: Any) -> Any:
    grad = grad.copy(order="K")
    grad[np.isnan(grad)] = 0
    return honest(ctx, residuals, grad, *grads)


@each(backward, "gradients twice as large", "scan", "mdi", "hds_query", "attention", "mdi_recurrence", "conv_bn_train")
def gradient_twice(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    found[0][...] *= found[0].dtype.type(2)
    return found
