"""`conv_bn` and `conv_bn_train` on NumPy.

For inference the batch norm is folded into the weight and a shift, which costs next to nothing: what is left is a
convolution whose blocks are shifted and rectified as they are made. For training each block's own mean and sum of
squared deviations are taken as it is made, and put together in float64 (T. Chan, G. Golub and R. LeVeque,
"Algorithms for computing the sample variance", 1983): as exact as two passes, but in the cache. The bias is left
out of the convolution, where it would only be subtracted again, and added to the mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_backends.numpy.common import Array, compute_dtype, gradient, quiet, result
from srm_backends.numpy.convolution import (
    convolve,
    images_of,
    input_gradient,
    sum_rows,
    weight_gradient,
)
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.common import is_channels_last
from srm_core.ops.conv_bn.convolution import Geometry, geometry

CHUNK = 1 << 16  # numbers that are passed over several times while the cache holds them


@quiet
def forward(
    ctx: LaunchContext, x: Array, weight: Array, bias: Array | None, running_mean: Array | None,
    running_var: Array | None, bn_weight: Array | None = None, bn_bias: Array | None = None, *, stride: Any,
    padding: Any, dilation: Any, groups: int, eps: float, activation: str | None,
) -> Array:  # fmt: skip
    g, compute = geometry(stride, padding, dilation, groups), compute_dtype(x.dtype)
    rate, scale, offset = _folded(compute, len(weight), bias, running_mean, running_var, bn_weight, eps)
    shift = offset * scale if bn_bias is None else offset * scale + bn_bias.astype(compute)
    channels_last = is_channels_last(x)
    out, y = _allocate(ctx, x, weight, g)

    def finish(block: Array, channels: slice) -> None:
        block += shift[channels] if channels_last else shift[channels, None]
        if activation is not None:
            np.maximum(block, 0, out=block)

    convolve(x, weight.astype(compute) * scale[:, None, None, None], g, out, finish, channels_last)
    if activation is not None:
        ctx.keep("y", y)
    return y


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array) -> tuple[Any, ...]:
    """The gradient of the folded weight is that of the weight and of its scale: see the reference's vjp."""
    x, weight, bias, mean, var, bn_weight, bn_bias = residuals.args
    g, compute = _geometry(residuals), compute_dtype(x.dtype)
    rate, scale, offset = _folded(compute, len(weight), bias, mean, var, bn_weight, residuals.options["eps"])
    w, extent = weight.astype(compute), grad_y.shape[2:]
    grad = _pixels_last(grad_y, compute)  # (B, P*Q, O)
    if residuals.options["activation"] is not None:
        np.copyto(images_of(grad, extent, channels_last=True), 0, where=residuals.get("y") <= 0)
    d_shift = sum_rows(grad)
    d_folded = weight_gradient(x, grad, w, g)
    d_scale = (d_folded * w).sum((1, 2, 3)) + d_shift * offset
    by_channel = scale[:, None, None, None]
    d_x = _like(ctx, x)
    input_gradient(grad, w * by_channel, g, d_x, extent)
    return (
        d_x,
        gradient(ctx, d_folded * by_channel, weight),
        gradient(ctx, d_shift * scale, bias),
        gradient(ctx, d_scale * rate, bn_weight),
        gradient(ctx, d_shift, bn_bias),
    )


@quiet
def forward_train(
    ctx: LaunchContext, x: Array, weight: Array, bias: Array | None = None, bn_weight: Array | None = None,
    bn_bias: Array | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int, eps: float,
    activation: str | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    g, compute = geometry(stride, padding, dilation, groups), compute_dtype(x.dtype)
    channels_last = is_channels_last(x)
    out, y = _allocate(ctx, x, weight, g)
    c = out  # the convolution without bias, which becomes y in its place unless a backward will want it
    if ctx.wants_residuals or out.dtype != compute:
        c = ctx.scratch(out.shape, compute)
    statistics = Statistics(len(weight), channels_last)
    convolve(x, weight.astype(compute), g, c, statistics.add, channels_last)
    var = statistics.variance().astype(compute)
    if bias is not None:
        var += 0 * bias.astype(compute)  # NaN from one that is not finite: as if it had been added and subtracted
    mean = statistics.mean.astype(compute)
    rate = 1 / np.sqrt(var + compute(eps))
    _normalise(c, out, mean, rate, bn_weight, bn_bias, activation, channels_last)
    ctx.keep("convolution", images_of(c, y.shape[2:], channels_last))
    ctx.keep("mean", mean)
    ctx.keep("rate", rate)
    batch_mean = mean if bias is None else statistics.mean + bias.astype("float64")
    return y, result(ctx, batch_mean, compute), result(ctx, var, compute)


@quiet
def backward_train(
    ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_mean: Array, grad_var: Array
) -> tuple[Any, ...]:
    """See the reference's vjp; n is the normalised convolution, N = B * P * Q."""
    x, weight, bias, bn_weight, bn_bias = residuals.args
    g, compute = _geometry(residuals), compute_dtype(x.dtype)
    w, extent = weight.astype(compute), grad_y.shape[2:]
    mean, rate = residuals.get("mean"), residuals.get("rate")
    grad = _pixels_last(grad_y, compute)  # (B, P*Q, O)
    normal = _pixels_last(residuals.get("convolution"), compute)
    gamma = np.ones(len(w), compute) if bn_weight is None else bn_weight.astype(compute)
    d_beta, d_gamma = np.zeros(len(w)), np.zeros(len(w))
    for dz, n in zip(_chunks(grad, True), _chunks(normal, True), strict=True):
        n -= mean
        n *= rate
        if residuals.options["activation"] is not None:
            z = n * gamma if bn_bias is None else n * gamma + bn_bias.astype(compute)
            dz[z <= 0] = 0
        d_beta += sum_rows(dz)
        d_gamma += sum_rows(dz * n)
    # dc = gamma * rate * dz + slope * n + constant
    count, d_mean, d_var = max(1, len(x) * extent[0] * extent[1]), grad_mean.astype("f8"), grad_var.astype("f8")
    scale = gamma * rate
    slope = ((2 * d_var / rate - scale * d_gamma) / count).astype(compute)
    constant = ((d_mean - scale * d_beta) / count).astype(compute)
    for dz, n in zip(_chunks(grad, True), _chunks(normal, True), strict=True):
        dz *= scale
        n *= slope
        dz += n
        dz += constant
    # The sum of dc is d_mean but for roundings; it is taken to pass NaN and infinity on, as 0 * x is NaN for both.
    d_bias = (d_mean if grad.size else 0) + 0 * sum_rows(grad)
    d_x = _like(ctx, x)
    input_gradient(grad, w, g, d_x, extent)
    return (
        d_x,
        gradient(ctx, weight_gradient(x, grad, w, g), weight),
        gradient(ctx, d_bias, bias),
        gradient(ctx, d_gamma, bn_weight),
        gradient(ctx, d_beta, bn_bias),
    )


class Statistics:
    """The mean and the variance of each channel, of blocks that come one by one."""

    def __init__(self, channels: int, channels_last: bool) -> None:
        self.channels_last = channels_last
        self.count, self.mean, self.squares = np.zeros((3, channels))  # squares: sums of squared deviations

    def add(self, block: Array, channels: slice) -> None:
        mean = self._sum(block) / self._pixels(block)
        deviation = block - (mean if self.channels_last else mean[:, None]).astype(block.dtype)
        deviation *= deviation
        n, before, by = self._pixels(block), self.count[channels], mean - self.mean[channels]
        self.mean[channels] += by * (n / (before + n))
        self.squares[channels] += self._sum(deviation) + by * by * (before * n / (before + n))
        self.count[channels] = before + n

    def variance(self) -> Array:
        """The biased variance. Without a single pixel it is NaN, as is the mean then."""
        self.mean[self.count == 0] = np.nan
        return self.squares / self.count

    def _pixels(self, block: Array) -> int:
        return len(block) * int(block.shape[1 if self.channels_last else 2])

    def _sum(self, block: Array) -> Array:
        """The sum of (images, pixels, O), or (images, O, pixels), for each channel."""
        return sum_rows(block) if self.channels_last else block.sum(2).sum(0, dtype="float64")


def _normalise(
    c: Array, out: Array, mean: Array, rate: Array, bn_weight: Array | None, bn_bias: Array | None,
    activation: str | None, channels_last: bool,
) -> None:  # fmt: skip
    """out = act((c - mean) * rate * bn_weight + bn_bias), which may lie where c does."""
    scale = rate if bn_weight is None else rate * bn_weight.astype(rate.dtype)
    vectors = [mean, scale, None if bn_bias is None else bn_bias.astype(rate.dtype)]
    mean, scale, shift = (v if v is None or channels_last else v[:, None] for v in vectors)  # type: ignore[assignment]
    for block, target in zip(_chunks(c, channels_last), _chunks(out, channels_last), strict=True):
        z = block if c is out else np.empty(block.shape, block.dtype)
        np.subtract(block, mean, out=z)
        z *= scale
        if shift is not None:
            z += shift
        if activation is not None:
            np.maximum(z, 0, out=z)
        if z is not target:
            target[...] = z


def _chunks(flat: Array, channels_last: bool) -> Iterator[Array]:
    """Views of some pixels each of (B, P*Q, O), or of (B, O, P*Q)."""
    pixel_axis = 0 if channels_last else 1
    step = max(1, CHUNK // max(1, flat.shape[2 - pixel_axis]))
    for image in flat:
        for i in range(0, image.shape[pixel_axis], step):
            yield image[i : i + step] if channels_last else image[:, i : i + step]


def _folded(
    compute: Any, channels: int, bias: Array | None, mean: Array | None, var: Array | None, bn_weight: Array | None,
    eps: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """(1 / sqrt(var + eps), that times bn_weight, bias - mean), each (O,)."""
    rate = np.ones(channels, compute) if var is None else 1 / np.sqrt(var.astype(compute) + compute(eps))
    scale = rate if bn_weight is None else rate * bn_weight.astype(compute)
    offset = np.zeros(channels, compute) if bias is None else bias.astype(compute)
    return rate, scale, offset if mean is None else offset - mean.astype(compute)


def _geometry(residuals: Residuals) -> Geometry:
    return geometry(*(residuals.options[n] for n in ("stride", "padding", "dilation", "groups")))


def _allocate(ctx: LaunchContext, x: Array, weight: Array, g: Geometry) -> tuple[Array, Array]:
    """y in the memory format of x: with one axis of pixels, and as (B, O, P, Q)."""
    extent = g.extent(x.shape[2:], weight.shape[2:])
    pixels, last = extent[0] * extent[1], is_channels_last(x)
    flat = ctx.empty((len(x), pixels, len(weight)) if last else (len(x), len(weight), pixels), x.dtype)
    return flat, images_of(flat, extent, last)


def _like(ctx: LaunchContext, x: Array) -> Array:
    """Memory for the gradient of x, in its memory format."""
    batch, channels, height, width = x.shape
    if is_channels_last(x):
        out: Array = ctx.empty((batch, height, width, channels), x.dtype).transpose(0, 3, 1, 2)
    else:
        out = ctx.empty(x.shape, x.dtype)
    return out


def _pixels_last(images: Array, compute: Any) -> Array:
    """A copy (B, P*Q, O) of (B, O, P, Q)."""
    batch, channels, p, q = images.shape
    copy = np.empty((batch, p, q, channels), compute)
    copy[...] = images.transpose(0, 2, 3, 1)
    return copy.reshape(batch, p * q, channels)
