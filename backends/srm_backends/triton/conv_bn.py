"""`conv_bn` and `conv_bn_train` in Triton, on the kernels of `convolution` and `batch_norm`.

In inference batch norm and activation follow each tile of the convolution before it is written. In training each tile
gives its mean and spread, and one pass over the convolution normalises it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import channels_last
from srm_backends.triton.batch_norm import (
    gradient_of_convolution,
    gradient_sums,
    join_statistics,
    line_gradient,
    normalise,
    over_parts,
    over_tiles,
    parts_of,
)
from srm_backends.triton.common import state_dtype
from srm_backends.triton.convolution import After, Way, best_way, channels_dense, convolve, images, weight_gradient
from srm_backends.triton.launch import Config, blocks, launch
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.conv_bn.convolution import Geometry, geometry


def _dense(*vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v.contiguous() for v in vectors)


def _result(ctx: LaunchContext, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    p, q = g.extent((x.shape[2], x.shape[3]), (weight.shape[2], weight.shape[3]))
    return images(ctx, (len(x), len(weight), p, q), x.dtype, channels_last(x))


def forward(
    ctx: LaunchContext, x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, bn_weight: Tensor | None = None, bn_bias: Tensor | None = None, *, stride: Any,
    padding: Any, dilation: Any, groups: int, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    g = geometry(stride, padding, dilation, groups)
    y = _result(ctx, x, weight, g)
    if y.numel():
        mean, var, bias, gamma, beta = _dense(running_mean, running_var, bias, bn_weight, bn_bias)
        after = After(mean, var, bias, gamma, beta, eps, activation == "relu")
        weight = channels_dense(weight.to(x.dtype))

        def run(way: Way) -> None:
            convolve(ctx, way, x, weight, y, g, after)

        run(best_way(ctx, x, weight, y, g, run, "line"))
    if activation is not None:
        ctx.keep("y", y)
    return y


def backward(ctx: LaunchContext, residuals: Residuals, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mean, var, gamma, beta = residuals.args
    options = residuals.options
    g = geometry(options["stride"], options["padding"], options["dilation"], options["groups"])
    relu = options["activation"] is not None
    d_z = images(ctx, grad.shape, x.dtype, channels_last(x))
    parts, _, _ = parts_of(ctx, d_z)
    sums = ctx.scratch((parts, len(weight)), "float32")
    if grad.numel():
        y = residuals.get("y") if relu else d_z
        over_parts(ctx, line_gradient, (grad, y, d_z, sums), grad, d_z, relu=relu)
    d_shift = sums.sum(0)
    rate = torch.ones_like(d_shift) if var is None else torch.rsqrt(var.float() + options["eps"])
    scale = rate if gamma is None else rate * gamma.float()
    offset = torch.zeros_like(rate) if bias is None else bias.float()
    offset = offset if mean is None else offset - mean.float()
    of_weight = _weight_gradient(ctx, d_z, x, weight, g)
    d_scale = (of_weight * weight).sum((1, 2, 3)) + d_shift * offset
    folded = (weight * scale[:, None, None, None]).to(x.dtype)
    return (
        _input_gradient(ctx, d_z, x, folded, g) if residuals.wants("x") else None,
        (of_weight * scale[:, None, None, None]).to(weight.dtype),
        None if bias is None else (d_shift * scale).to(bias.dtype),
        None if gamma is None else (d_scale * rate).to(gamma.dtype),
        None if beta is None else d_shift.to(beta.dtype),
    )  # fmt: skip


def _weight_gradient(ctx: LaunchContext, grad: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    if not grad.numel():
        found: Tensor = ctx.zeros(weight.shape, "float32")
        return found
    return weight_gradient(ctx, grad, x, weight, g)


def _input_gradient(ctx: LaunchContext, grad: Tensor, x: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    d_x = images(ctx, x.shape, x.dtype, channels_last(x))
    if d_x.numel():
        weight = channels_dense(weight)

        def run(way: Way) -> None:
            convolve(ctx, way, grad, weight, d_x, g, None, back=True)

        run(best_way(ctx, grad, weight, d_x, g, run, "gradient"))
    return d_x


def forward_train(
    ctx: LaunchContext, x: Tensor, weight: Tensor, bias: Tensor | None = None, bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = geometry(stride, padding, dilation, groups)
    y = _result(ctx, x, weight, g)
    out, kind = len(weight), state_dtype(None, x)
    mean, var = ctx.empty((out,), kind), ctx.empty((out,), kind)
    bias, gamma, beta = _dense(bias, bn_weight, bn_bias)
    if not y.numel():
        return y, mean.fill_(torch.nan), var.fill_(torch.nan)
    c = images(ctx, y.shape, x.dtype, channels_last(x))
    folded, pixels = channels_dense(weight.to(x.dtype)), y.numel() // out

    def run(way: Way) -> tuple[Tensor, Tensor, Tensor]:
        means, spreads = ctx.scratch((2, way.tiles, out), "float32")
        statistics = means, spreads, ctx.scratch((way.tiles,), "float32")
        convolve(ctx, way, x, folded, c, g, None, statistics)
        return statistics

    way = best_way(ctx, x, folded, c, g, run, "statistics")
    means, spreads, counts = run(way)
    centre, rate = ctx.empty((out,), "float32"), ctx.empty((out,), "float32")

    def join() -> Config:
        return Config((blocks(out, 16),), (way.tiles, pixels, out), (eps, 128, 16))

    launch(ctx, join_statistics, (eps, way.tiles), (means, spreads, counts, bias, mean, var, centre, rate), join)
    over_tiles(ctx, normalise, (c, y, centre, rate, gamma, beta), c, y, relu=activation is not None)
    for name, array in (("convolution", c), ("mean", centre), ("rate", rate)):
        ctx.keep(name, array)
    return y, mean, var


def backward_train(
    ctx: LaunchContext, residuals: Residuals, grad: Tensor, grad_mean: Tensor, grad_var: Tensor
) -> tuple[Tensor | None, ...]:
    x, weight, bias, gamma, beta = residuals.args
    options = residuals.options
    g = geometry(options["stride"], options["padding"], options["dilation"], options["groups"])
    relu = options["activation"] is not None
    if not grad.numel():
        return tuple(None if a is None else torch.zeros_like(a) for a in residuals.args)
    c, centre, rate = (residuals.get(n) for n in ("convolution", "mean", "rate"))
    parts, _, _ = parts_of(ctx, c)
    sums = ctx.scratch((2, parts, len(weight)), "float32")
    given = (grad, c, centre, rate, *_dense(gamma, beta))
    over_parts(ctx, gradient_sums, (*given, sums[0], sums[1]), grad, c, relu=relu)
    d_beta, d_gamma = sums.sum(1)
    d_c = torch.empty_like(c)
    ends = (d_beta, d_gamma, *_dense(grad_mean, grad_var))
    over_tiles(ctx, gradient_of_convolution, (*given, *ends, d_c), grad, c, relu=relu)
    return (
        _input_gradient(ctx, d_c, x, weight.to(x.dtype), g) if residuals.wants("x") else None,
        weight_gradient(ctx, d_c, x, weight, g).to(weight.dtype),
        None if bias is None else d_c.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype),
        None if gamma is None else d_gamma.to(gamma.dtype),
        None if beta is None else d_beta.to(beta.dtype),
    )  # fmt: skip
