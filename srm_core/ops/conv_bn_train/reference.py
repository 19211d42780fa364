"""Convolution, batch norm with the statistics of the batch, and activation."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_core.ops.common import Array, Rounding, exact
from srm_core.ops.conv_bn.convolution import (
    CONVOLUTION,
    CONVOLUTION_GRADIENT,
    Geometry,
    by_channel,
    convolve,
    geometry,
    input_gradient,
    rectified,
    rectified_gradient,
    weight_gradient,
)

PIXELS = (0, 2, 3)  # of (B, O, P, Q): the axes over which a channel has its statistics


def reference(
    compute: Any, x: Array, weight: Array, bias: Array | None = None, bn_weight: Array | None = None,
    bn_bias: Array | None = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    eps: float = 1e-5, activation: str | None = None, rounding: Rounding = exact,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """With c = conv(x, weight) + bias, and the mean and the biased variance of c over batch and pixels:

    y = act(bn_weight * (c - mean) / sqrt(var + eps) + bn_bias). (S. Ioffe and C. Szegedy, "Batch normalization:
    accelerating deep network training by reducing internal covariate shift", 2015, algorithm 1.)
    Statistics are of the convolution as it is stored: where c is rounded, of the rounded c.
    """
    g = geometry(stride, padding, dilation, groups)
    c, mean, var = _statistics(compute, x, weight, bias, g, rounding)
    z = (c - by_channel(mean)) * by_channel(1 / np.sqrt(var + compute(eps)))
    if bn_weight is not None:
        z *= by_channel(bn_weight.astype(compute))
    if bn_bias is not None:
        z += by_channel(bn_bias.astype(compute))
    return rectified(z, activation), mean, var


def vjp(
    compute: Any, grads: tuple[Array, Array, Array], x: Array, weight: Array, bias: Array | None = None,
    bn_weight: Array | None = None, bn_bias: Array | None = None, *, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1, eps: float = 1e-5, activation: str | None = None, rounding: Rounding = exact,
) -> tuple[Array | None, ...]:  # fmt: skip
    """With dz the gradient before the activation, n = (c - mean) / sqrt(var + eps), N pixels a channel:

    dbn_bias = sum(dz); dbn_weight = sum(dz * n);
    dc = bn_weight / sqrt(var + eps) * (dz - (sum(dz) + n * sum(dz * n)) / N) + (dmean + 2 * (c - mean) * dvar) / N;
    dx = conv^T(dc, weight); dweight = dc against x; dbias = sum(dc).

    dbias is dmean, since neither y nor the variance sees a bias. The sum is kept because it is what a backward
    has, and its rounding is what the tolerance of dbias has to allow.
    """
    g = geometry(stride, padding, dilation, groups)
    grad, d_mean, d_var = (a.astype(compute) for a in grads)
    c, mean, var = _statistics(compute, x, weight, bias, g, rounding)
    rate = 1 / np.sqrt(var + compute(eps))
    centred = c - by_channel(mean)
    normal = centred * by_channel(rate)
    gamma = np.ones_like(rate) if bn_weight is None else bn_weight.astype(compute)
    beta = np.zeros_like(rate) if bn_bias is None else bn_bias.astype(compute)
    grad = rectified_gradient(grad, normal * by_channel(gamma) + by_channel(beta), activation)
    d_gamma, d_beta = (grad * normal).sum(PIXELS), grad.sum(PIXELS)
    count = compute(max(1, c.size // max(1, len(mean))))  # N
    d_c = by_channel(gamma * rate) * (grad - (by_channel(d_beta) + normal * by_channel(d_gamma)) / count)
    d_c += (by_channel(d_mean) + 2 * centred * by_channel(d_var)) / count
    d_c = rounding(CONVOLUTION_GRADIENT, d_c)
    w = weight.astype(compute)
    return (
        input_gradient(rounding, d_c, w, x.shape[2:], g),
        weight_gradient(rounding, d_c, x.astype(compute), w, g),
        None if bias is None else d_c.sum(PIXELS),
        None if bn_weight is None else d_gamma,
        None if bn_bias is None else d_beta,
    )


def _statistics(
    compute: Any, x: Array, weight: Array, bias: Array | None, g: Geometry, rounding: Rounding
) -> tuple[Array, Array, Array]:
    """(c, its mean, its biased variance) over batch and pixels; NaN where there are none."""
    c = convolve(rounding, x.astype(compute), weight.astype(compute), g)
    if bias is not None:
        c += by_channel(bias.astype(compute))
    c = rounding(CONVOLUTION, c)
    if not c.size:
        return c, np.full(len(weight), compute(np.nan)), np.full(len(weight), compute(np.nan))
    count = compute(c.size // len(weight))
    mean = c.sum(PIXELS) / count
    return c, mean, ((c - by_channel(mean)) ** 2).sum(PIXELS) / count
