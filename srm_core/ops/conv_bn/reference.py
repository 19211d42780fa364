"""Convolution, batch norm with running statistics and activation in the dtype that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array, Rounding, exact
from srm_core.ops.conv_bn.convolution import (
    CONVOLUTION,
    CONVOLUTION_GRADIENT,
    FOLDED,
    by_channel,
    convolve,
    geometry,
    input_gradient,
    rectified,
    rectified_gradient,
    weight_gradient,
)


def reference(
    compute: Any, x: Array, weight: Array, bias: Array | None, running_mean: Array | None, running_var: Array | None,
    bn_weight: Array | None = None, bn_bias: Array | None = None, *, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, eps: float = 1e-5, activation: str | None = None, rounding: Rounding = exact,
) -> tuple[Array]:  # fmt: skip
    """y = act((conv(x, weight) + bias - running_mean) / sqrt(running_var + eps) * bn_weight + bn_bias),

    computed as act(conv(x, scale * weight) + shift), with scale = bn_weight / sqrt(running_var + eps) and
    shift = (bias - running_mean) * scale + bn_bias; without statistics, running_mean is 0 and the root 1. (S. Ioffe
    and C. Szegedy, "Batch normalization: accelerating deep network training by reducing internal covariate shift",
    2015, algorithm 2.)
    """
    w = weight.astype(compute)
    scale, _, offset, beta = _vectors(compute, len(weight), bias, running_mean, running_var, bn_weight, bn_bias, eps)
    folded = rounding(FOLDED, w * scale[:, None, None, None])
    z = convolve(rounding, x.astype(compute), folded, geometry(stride, padding, dilation, groups))
    return (rectified(z + by_channel(offset * scale + beta), activation),)


def vjp(
    compute: Any, grads: tuple[Array], x: Array, weight: Array, bias: Array | None, running_mean: Array | None,
    running_var: Array | None, bn_weight: Array | None = None, bn_bias: Array | None = None, *, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1, eps: float = 1e-5, activation: str | None = None,
    rounding: Rounding = exact,
) -> tuple[Array | None, ...]:  # fmt: skip
    """With dz the gradient before the activation, and sums over batch and pixels:

    dx = conv^T(dz, scale * weight); dweight = (scale * dz) against x; dbias = scale * sum(dz); dbn_bias = sum(dz);
    dbn_weight = sum(dz * (conv(x, weight) + bias - running_mean)) / sqrt(running_var + eps), where the first part,
    sum(dz * conv(x, weight)), is the sum of dz against x times the weight over each kernel. A backward may have the
    convolution itself instead, as it was stored.
    """
    g = geometry(stride, padding, dilation, groups)
    x, w, grad = x.astype(compute), weight.astype(compute), grads[0].astype(compute)
    scale, rate, offset, beta = _vectors(compute, len(weight), bias, running_mean, running_var, bn_weight, bn_bias, eps)
    folded = rounding(FOLDED, w * scale[:, None, None, None])
    if activation is not None:
        z = convolve(rounding, x, folded, g) + by_channel(offset * scale + beta)
        grad = rectified_gradient(grad, z, activation)
    d_convolution = rounding(CONVOLUTION_GRADIENT, grad * by_channel(scale))
    d_shift = grad.sum((0, 2, 3))
    d_scale = (weight_gradient(rounding, grad, x, w, g) * w).sum((1, 2, 3)) + d_shift * offset
    if rounding is not exact:
        c = convolve(rounding, x, w, g)
        d_scale += (grad * (rounding(CONVOLUTION, c) - c)).sum((0, 2, 3))
    return (
        input_gradient(rounding, grad, folded, x.shape[2:], g),
        weight_gradient(rounding, d_convolution, x, w, g),
        None if bias is None else d_shift * scale,
        None if bn_weight is None else d_scale * rate,
        None if bn_bias is None else d_shift,
    )


def _vectors(
    compute: Any, channels: int, bias: Array | None, mean: Array | None, var: Array | None, bn_weight: Array | None,
    bn_bias: Array | None, eps: float,
) -> tuple[Array, ...]:  # fmt: skip
    """(scale, 1 / sqrt(running_var + eps), bias - running_mean, bn_bias), each (O,)."""
    one, zero = np.ones(channels, compute), np.zeros(channels, compute)
    rate = one if var is None else 1 / np.sqrt(var.astype(compute) + compute(eps))
    scale = rate if bn_weight is None else bn_weight.astype(compute) * rate
    offset = (zero if bias is None else bias.astype(compute)) - (zero if mean is None else mean.astype(compute))
    return scale, rate, offset, np.zeros_like(rate) if bn_bias is None else bn_bias.astype(compute)
