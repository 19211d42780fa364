"""Mutants of the batch norm in `conv_bn` and `conv_bn_train`."""

from __future__ import annotations

from typing import Any

import numpy as np
from srm_backends.numpy.common import compute_dtype, quiet

from srm_conformance.mutants.common import is_half, put, tampered
from srm_conformance.mutants.mutant import backward, forward

# conv_bn: x, weight, bias, running_mean, running_var, bn_weight, bn_bias


def _convolved(honest: Any, ctx: Any, args: Any, options: Any) -> Any:
    """conv(x, weight) + bias, then the activation."""
    zeros = np.zeros_like(args[3])
    return honest(ctx, *args[:3], zeros, zeros + zeros.dtype.type(1), None, None, **{**options, "eps": 0.0})


def _vectors(args: Any, compute: Any) -> tuple[Any, ...]:
    """The running statistics, bn_weight and bn_bias, to compute with."""
    return tuple(None if a is None else a.astype(compute) for a in args[3:])


def _by_channel(vector: Any) -> Any:
    return vector[:, None, None]


@forward("conv_bn", "eps outside the root")
def eps_outside(honest: Any, ctx: Any, *args: Any, eps: float, **options: Any) -> Any:
    var = args[4]
    moved = ((np.sqrt(var.astype(np.float64)) + eps) ** 2).astype(var.dtype)
    return honest(ctx, *put(args, 4, moved), eps=0.0, **options)


@forward("conv_bn", "divided by the variance, not its root")
def no_root(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    var = args[4].astype(np.float64)
    return honest(ctx, *put(args, 4, (var * var).astype(args[4].dtype)), **options)


@forward("conv_bn", "the running mean ignored")
def mean_ignored(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *put(args, 3, np.zeros_like(args[3])), **options)


@forward("conv_bn", "statistics of the batch")
def batch_statistics(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    c = _convolved(honest, ctx, args, {**options, "activation": None}).astype(np.float64)
    if c.size:
        mean, var = c.mean((0, 2, 3)), c.var((0, 2, 3))
        args = put(put(args, 3, mean.astype(args[3].dtype)), 4, var.astype(args[4].dtype))
    return honest(ctx, *args, **options)


@forward("conv_bn", "relu before the batch norm")
@quiet
def relu_first(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y = honest(ctx, *args, **options)
    if options["activation"] is None:
        return y
    compute = compute_dtype(y.dtype)
    mean, var, gamma, beta = _vectors(args, compute)
    normal = _convolved(honest, ctx, args, options).astype(compute) - _by_channel(mean)
    normal /= _by_channel(np.sqrt(var + compute(options["eps"])))
    if gamma is not None:
        normal *= _by_channel(gamma)
    y[...] = normal if beta is None else normal + _by_channel(beta)
    return y


@forward("conv_bn", "the convolution of half images rounded before the batch norm")
@quiet
def rounded_between(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y = honest(ctx, *args, **options)
    if options["activation"] is not None or not is_half(y):
        return y
    mean, var, gamma, beta = _vectors(args, np.float32)
    plain = _convolved(honest, ctx, args, options).astype(np.float32) - _by_channel(mean)
    scale = (1 if gamma is None else gamma) / np.sqrt(var + np.float32(options["eps"]))
    y[...] = plain * _by_channel(scale) + (0 if beta is None else _by_channel(beta))
    return y


@backward("conv_bn", "the gradient of x lacks the scale")
def x_gradient_unscaled(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    var = residuals.args[4].astype(np.float64)
    scale = np.sqrt(var + residuals.options["eps"]).astype(residuals.args[4].dtype)
    unscaled = honest(ctx, tampered(residuals, put(residuals.args, 5, scale)), *grads)
    return (unscaled[0], *honest(ctx, residuals, *grads)[1:])


@backward("conv_bn", "the gradient of the bias lacks the scale")
def bias_gradient_unscaled(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, bn_bias = honest(ctx, residuals, *grads), residuals.args[6]
    return found if found[2] is None or bn_bias is None else put(found, 2, found[4].copy())


@backward("conv_bn", "the gradient of bn_weight lacks the running mean")
def bn_weight_gradient_short(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    args = residuals.args
    short = honest(ctx, tampered(residuals, put(args, 3, np.zeros_like(args[3]))), *grads)
    return put(honest(ctx, residuals, *grads), 3, short[3])


@backward("conv_bn", "the gradient ignores the activation")
def relu_gradient_left_out(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, tampered(residuals, options={"activation": None}), *grads)


@backward("conv_bn", "bn_bias has the gradient of y, not of what relu saw")
def bn_bias_gradient_of_y(honest: Any, ctx: Any, residuals: Any, grad_y: Any) -> Any:
    found = honest(ctx, residuals, grad_y)
    if found[4] is not None:
        found[4][...] = grad_y.astype(np.float64).sum((0, 2, 3))
    return found


# conv_bn_train: x, weight, bias, bn_weight, bn_bias


def _count(y: Any) -> int:
    return int(y.size // max(1, y.shape[1]))


@forward("conv_bn_train", "batch_var is unbiased")
def unbiased(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, mean, var = honest(ctx, *args, **options)
    n = _count(y)
    var *= n / max(1, n - 1)
    return y, mean, var


def _with_rate(honest: Any, ctx: Any, args: Any, options: Any, rate: Any) -> Any:
    """As if what c - mean is multiplied by were rate(variance, pixels) times what it is."""
    y, mean, var = honest(ctx, *args, **options)
    wide = var.astype(np.float64)
    factor = rate(wide, _count(y)) * np.sqrt(wide + options["eps"])
    weight = factor if args[3] is None else args[3].astype(np.float64) * factor
    y, *_ = honest(ctx, *put(args, 3, weight.astype(args[1].dtype)), **options)
    return y, mean, var


@forward("conv_bn_train", "y is normalised by the unbiased variance")
@quiet
def normalised_unbiased(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    eps = options["eps"]
    return _with_rate(honest, ctx, args, options, lambda var, n: 1 / np.sqrt(var * n / max(1, n - 1) + eps))


@forward("conv_bn_train", "eps outside the root")
@quiet
def train_eps_outside(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return _with_rate(honest, ctx, args, options, lambda var, n: 1 / (np.sqrt(var) + options["eps"]))


@forward("conv_bn_train", "batch_var has eps in it")
def eps_in_variance(honest: Any, ctx: Any, *args: Any, eps: float, **options: Any) -> Any:
    y, mean, var = honest(ctx, *args, eps=eps, **options)
    var += eps
    return y, mean, var


@forward("conv_bn_train", "batch_var is the standard deviation")
def deviation(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, mean, var = honest(ctx, *args, **options)
    return y, mean, np.sqrt(var, out=var)


@forward("conv_bn_train", "batch_var is the mean of squares less the square of the mean")
@quiet
def variance_cancels(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, mean, var = honest(ctx, *args, **options)
    if is_half(y) or not y.size:
        return y, mean, var
    normal, *_ = honest(ctx, *args[:3], None, None, **{**options, "activation": None})
    c = normal * _by_channel(np.sqrt(var + var.dtype.type(options["eps"]))) + _by_channel(mean)
    centre = c.mean((0, 2, 3))
    honest(ctx, *args, **options)  # for the residuals
    return y, mean, (c * c).mean((0, 2, 3)) - centre * centre


@forward("conv_bn_train", "statistics in the type of x")
def statistics_in_half(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, mean, var = honest(ctx, *args, **options)
    return y, mean.astype(y.dtype).astype(mean.dtype), var.astype(y.dtype).astype(var.dtype)


@forward("conv_bn_train", "statistics returned in the type of x")
def statistics_narrowed(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    y, mean, var = honest(ctx, *args, **options)
    return y, mean.astype(y.dtype), var.astype(y.dtype)


@forward("conv_bn_train", "statistics of the first image")
def statistics_of_one(honest: Any, ctx: Any, x: Any, *args: Any, **options: Any) -> Any:
    _, mean, var = honest(ctx, x[:1], *args, **options)
    y, *_ = honest(ctx, x, *args, **options)
    return y, mean, var


@forward("conv_bn_train", "batch_mean lacks the bias")
def mean_without_bias(honest: Any, ctx: Any, x: Any, weight: Any, bias: Any, *args: Any, **options: Any) -> Any:
    y, mean, var = honest(ctx, x, weight, bias, *args, **options)
    if bias is not None:
        mean -= bias.astype(mean.dtype)
    return y, mean, var


@backward("conv_bn_train", "the gradient of batch_mean ignored")
def mean_gradient_ignored(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_mean: Any, grad_var: Any) -> Any:
    return honest(ctx, residuals, grad_y, np.zeros_like(grad_mean), grad_var)


@backward("conv_bn_train", "the gradient of batch_var ignored")
def var_gradient_ignored(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_mean: Any, grad_var: Any) -> Any:
    return honest(ctx, residuals, grad_y, grad_mean, np.zeros_like(grad_var))


@backward("conv_bn_train", "the gradient of batch_var lacks its factor of 2")
def var_gradient_halved(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_mean: Any, grad_var: Any) -> Any:
    return honest(ctx, residuals, grad_y, grad_mean, grad_var / 2)


@backward("conv_bn_train", "the gradient of batch_var is that of the unbiased one")
def var_gradient_unbiased(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_mean: Any, grad_var: Any) -> Any:
    n = _count(grad_y)
    return honest(ctx, residuals, grad_y, grad_mean, grad_var * grad_var.dtype.type(n / max(1, n - 1)))


@backward("conv_bn_train", "the gradient ignores the activation")
def train_relu_gradient_left_out(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, tampered(residuals, options={"activation": None}), *grads)


@backward("conv_bn_train", "the gradient of the bias is that of the shift")
def bias_gradient_as_without_norm(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    return found if found[2] is None or found[4] is None else put(found, 2, found[4].copy())


@backward("conv_bn_train", "the gradient of x takes the batch's mean for a constant")
@quiet
def mean_taken_as_constant(honest: Any, ctx: Any, residuals: Any, grad_y: Any, grad_mean: Any, grad_var: Any) -> Any:
    found, gamma, rate = honest(ctx, residuals, grad_y, grad_mean, grad_var), residuals.args[3], residuals.get("rate")
    if residuals.options["activation"] is not None:
        return found
    shift = grad_y.astype(rate.dtype).sum((0, 2, 3)) * rate * (1 if gamma is None else gamma.astype(rate.dtype))
    constant = (grad_mean + shift).astype(grad_mean.dtype)
    return (honest(ctx, residuals, grad_y, constant, grad_var)[0], *found[1:])
