"""`conv_bn` and `conv_bn_train` on torch's convolutions: oneDNN on a CPU, cuDNN on CUDA, channels-last where x is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm, conv2d

from srm_backends.torch.common import as_dtype, channels_last, compute_dtype, wants_gradient
from srm_backends.torch.policy import under_policy
from srm_core.context import LaunchContext
from srm_core.ops.conv_bn.convolution import geometry

HALF = (torch.float16, torch.bfloat16)
NOTHING = 1e-30  # beside 1, in batch norm's eps, which must be above 0


def forward(
    ctx: LaunchContext, x: Tensor, weight: Tensor, bias: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, bn_weight: Tensor | None = None, bn_bias: Tensor | None = None, *, stride: Any,
    padding: Any, dilation: Any, groups: int, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    vectors = (bias, running_mean, running_var, bn_weight, bn_bias)
    return _normalised(ctx, x, weight, *vectors, geometry(stride, padding, dilation, groups), eps, activation)[0]


@under_policy("conv")
def _normalised(
    x: Tensor, weight: Tensor, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, g: Any, eps: float, activation: str | None,
) -> tuple[Tensor]:  # fmt: skip
    scale, shift = _line(compute_dtype(x.dtype), bias, mean, var, bn_weight, bn_bias, eps)
    if wants_gradient(x, weight, scale, shift):
        # As torch would have it: folded, the gradients of the vectors were sums in the dtype of x.
        y = _exactly_summed(conv2d(x, _as(x, weight.to(x.dtype)), None, *g))
        if scale is not None or shift is not None:
            like = y.new_zeros(y.shape[1], dtype=compute_dtype(x.dtype))
            # It reads a strided one as if it were dense.
            gamma, beta = (None if p is None else p.to(like.dtype).contiguous() for p in (scale, shift))
            gamma = torch.ones_like(like) if gamma is None else gamma  # else its backward on CUDA fails
            y = batch_norm(y, like, torch.ones_like(like), gamma, beta, eps=NOTHING)
        return (_as(x, _activated(y.to(x.dtype), activation)),)
    if scale is not None:
        weight = weight.to(scale.dtype) * scale[:, None, None, None]
    weight = _as(x, as_dtype(weight, x.dtype))
    shift = None if shift is None else as_dtype(shift, x.dtype)
    if activation and x.is_cuda and x.numel() and x.dtype is not torch.float64:  # which has none for float64
        return (_as(x, torch.cudnn_convolution_relu(x, weight, shift, g.stride, g.padding, g.dilation, g.groups)),)
    return (_as(x, _activated(conv2d(x, weight, shift, *g), activation)),)


def _line(
    compute: torch.dtype, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, bn_weight: Tensor | None,
    bn_bias: Tensor | None, eps: float,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(scale, shift) of a channel: what follows the convolution is scale * c + shift. None: 1, and 0."""
    if mean is None and var is None and bn_weight is None and bn_bias is None:
        return None, bias  # as a module keeps it, in the dtype of x: not cast to and fro
    scale = None if bn_weight is None else bn_weight.to(compute)
    if var is not None:
        rate = torch.rsqrt(var.to(compute) + eps)
        scale = rate if scale is None else scale * rate
    shift = None if bias is None else bias.to(compute)
    if mean is not None:
        shift = -mean.to(compute) if shift is None else shift - mean.to(compute)
    if scale is not None and shift is not None:
        shift = shift * scale
    if bn_bias is not None:
        shift = bn_bias.to(compute) if shift is None else shift + bn_bias.to(compute)
    return scale, shift


def _as(x: Tensor, y: Tensor) -> Tensor:
    """y in the memory format of x."""
    return y.contiguous(memory_format=torch.channels_last if channels_last(x) else torch.contiguous_format)


def _exactly_summed(c: Tensor) -> Tensor:
    """c, or c in float32 where torch's batch norm would add the gradients of a channel in a half type."""
    return c.float() if c.is_cuda and c.dtype in HALF and not channels_last(c) else c


def _activated(y: Tensor, activation: str | None) -> Tensor:
    return torch.relu(y) if activation == "relu" else y


def forward_train(
    ctx: LaunchContext, x: Tensor, weight: Tensor, bias: Tensor | None = None, bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None, *, stride: Any, padding: Any, dilation: Any, groups: int, eps: float,
    activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    g = geometry(stride, padding, dilation, groups)
    return _trained(ctx, x, weight, bias, bn_weight, bn_bias, g, eps, activation)  # type: ignore[return-value]


@under_policy("conv")
def _trained(
    x: Tensor, weight: Tensor, bias: Tensor | None, bn_weight: Tensor | None, bn_bias: Tensor | None, g: Any,
    eps: float, activation: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    compute = compute_dtype(x.dtype)
    # torch's fused batch norm reads a strided weight as if it were dense.
    scale, shift = (None if p is None else p.to(compute).contiguous() for p in (bn_weight, bn_bias))
    # Neither y nor the variance sees a bias, but where it is no number: so a large one costs no digits.
    void = None if bias is None else (bias - bias).to(x.dtype)
    c = _as(x, conv2d(x, _as(x, weight.to(x.dtype)), void, *g))
    if scale is None and shift is not None:
        scale = torch.ones_like(shift)  # else torch's backward on CUDA fails
    # torch's fused sums run one after the other, which in float32 are float64 inside; of one pixel there is no
    # unbiased variance, which is what torch gives.
    fused = compute is torch.float32 and c.numel() // max(1, c.shape[1]) > 1
    y, mean, var = BatchNorm.apply(c, scale, shift, eps) if fused else _composed(c, scale, shift, eps)
    if bias is not None and c.numel():
        mean = torch.where(bias.isfinite(), mean + bias, bias.to(mean.dtype))
    return _as(x, _activated(y, activation)), mean, var


def _composed(c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm of single operations, each of which can be differentiated twice."""
    wide = c.to(compute_dtype(c.dtype))
    if wide.numel():
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    else:
        mean = wide.mean((0, 2, 3))
        var = mean.clone()
    y = (wide - mean[:, None, None]) * torch.rsqrt(var + eps)[:, None, None]
    y = y if weight is None else y * weight[:, None, None]
    y = y if bias is None else y + bias[:, None, None]
    return y.to(c.dtype), mean, var


class BatchNorm(torch.autograd.Function):
    """torch's fused batch norm, which gives gradients of y alone, with those of the statistics. It keeps c, the weight
    and two numbers a channel."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Any:
        var = c.new_zeros(c.shape[1], dtype=compute_dtype(c.dtype))
        # With this momentum a running variance, which is unbiased, becomes the variance of the batch.
        pixels = c.numel() // c.shape[1]
        y, mean, save_rate = torch.native_batch_norm(
            c, weight, bias, torch.empty_like(var), var, True, (pixels - 1) / pixels, eps
        )
        ctx.save_for_backward(c, weight, bias, mean, save_rate)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return y, mean, var

    @staticmethod
    def backward(ctx: Any, grad_y: Any, grad_mean: Any, grad_var: Any) -> Any:
        c, weight, bias, save_mean, save_rate = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (*_again((c, weight, bias), ctx.eps, (grad_y, grad_mean, grad_var)), None)
        d_c = d_weight = d_bias = None
        if grad_y is not None:
            mask = [True, weight is not None, bias is not None]
            wide, grad = _exactly_summed(c), _as(c, grad_y)
            d_c, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                grad.to(wide.dtype), wide, weight, None, None, save_mean, save_rate, True, ctx.eps, mask
            )
            d_c = d_c.to(c.dtype)
        pixels = c.numel() // c.shape[1]
        if grad_mean is not None or grad_var is not None:
            of_c = c.new_zeros((), dtype=save_mean.dtype)
            if grad_mean is not None:
                of_c = of_c + grad_mean[:, None, None]
            if grad_var is not None:
                of_c = of_c + 2 * (c - save_mean[:, None, None]) * grad_var[:, None, None]
            of_c = of_c / pixels
            d_c = of_c.expand(c.shape).to(c.dtype) if d_c is None else (d_c + of_c).to(c.dtype)
        return d_c, d_weight if weight is not None else None, d_bias if bias is not None else None, None


def _again(tensors: Any, eps: float, grads: tuple[Any, ...]) -> list[Any]:
    """The gradients as something that can be differentiated."""
    c, weight, bias = tensors
    ends = [(o, g) for o, g in zip(_composed(c, weight, bias, eps), grads, strict=True) if g is not None]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(
        torch.autograd.grad([o for o, _ in ends], wanted, [g for _, g in ends], create_graph=True, allow_unused=True)
    )
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]
