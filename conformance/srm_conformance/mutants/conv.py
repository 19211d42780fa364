"""Mutants of `conv_bn` and `conv_bn_train`: the convolution, and what both share."""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_conformance.measures import tf32
from srm_conformance.mutants.common import each, put
from srm_conformance.mutants.mutant import backward, forward
from srm_core.ops.common import is_channels_last

CONVOLUTIONS = ("conv_bn", "conv_bn_train")


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _in_format(values: Any, x: Any) -> Any:
    """The values in the memory format of x."""
    if is_channels_last(x):
        return np.ascontiguousarray(values.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(values)


@each(forward, "padding at one side alone", *CONVOLUTIONS)
def padded_before(honest: Any, ctx: Any, x: Any, *args: Any, padding: Any, **options: Any) -> Any:
    h, w = _pair(padding)
    x = _in_format(np.pad(x, ((0, 0), (0, 0), (2 * h, 0), (2 * w, 0))), x)
    return honest(ctx, x, *args, padding=0, **options)


@each(forward, "padded with the edge", *CONVOLUTIONS)
def padded_with_the_edge(honest: Any, ctx: Any, x: Any, *args: Any, padding: Any, **options: Any) -> Any:
    h, w = _pair(padding)
    x = _in_format(np.pad(x, ((0, 0), (0, 0), (h, h), (w, w)), mode="edge"), x)
    return honest(ctx, x, *args, padding=0, **options)


@each(forward, "strides along H and W swapped", *CONVOLUTIONS)
def stride_swapped(honest: Any, ctx: Any, *args: Any, stride: Any, **options: Any) -> Any:
    return honest(ctx, *args, stride=_pair(stride)[::-1], **options)


@each(forward, "paddings along H and W swapped", "conv_bn")
def padding_swapped(honest: Any, ctx: Any, *args: Any, padding: Any, **options: Any) -> Any:
    return honest(ctx, *args, padding=_pair(padding)[::-1], **options)


@each(forward, "stride begins at its last pixel", "conv_bn")
def stride_late(honest: Any, ctx: Any, x: Any, *args: Any, stride: Any, **options: Any) -> Any:
    h, w = (s - 1 for s in _pair(stride))
    late = np.zeros_like(x)
    late[:, :, : x.shape[2] - h, : x.shape[3] - w] = x[:, :, h:, w:]
    return honest(ctx, late, *args, stride=stride, **options)


@each(forward, "dilation ignored", *CONVOLUTIONS)
def dilation_ignored(honest: Any, ctx: Any, x: Any, weight: Any, *args: Any, dilation: Any, **options: Any) -> Any:
    """Of the taps' places, not of the extent."""
    spans = [d * (k - 1) + 1 for d, k in zip(_pair(dilation), weight.shape[2:], strict=True)]
    wide = np.zeros((*weight.shape[:2], *spans), weight.dtype)
    wide[:, :, : weight.shape[2], : weight.shape[3]] = weight
    return honest(ctx, x, wide, *args, dilation=1, **options)


@each(forward, "groups take channels in turn", *CONVOLUTIONS)
def groups_in_turn(honest: Any, ctx: Any, x: Any, *args: Any, groups: int, **options: Any) -> Any:
    order = np.arange(x.shape[1]).reshape(-1, groups).T.ravel()
    return honest(ctx, _in_format(x[:, order], x), *args, groups=groups, **options)


@each(forward, "every group sees the first one's channels", *CONVOLUTIONS)
def first_group(honest: Any, ctx: Any, x: Any, *args: Any, groups: int, **options: Any) -> Any:
    seen = np.tile(x[:, : x.shape[1] // groups], (1, groups, 1, 1))
    return honest(ctx, _in_format(seen, x), *args, groups=groups, **options)


@each(forward, "the kernel turned round", *CONVOLUTIONS)
def kernel_turned(honest: Any, ctx: Any, x: Any, weight: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, x, weight[..., ::-1, ::-1], *args, **options)


@each(forward, "rows and columns of a square kernel swapped", *CONVOLUTIONS)
def kernel_transposed(honest: Any, ctx: Any, x: Any, weight: Any, *args: Any, **options: Any) -> Any:
    weight = weight.swapaxes(2, 3) if weight.shape[2] == weight.shape[3] else weight
    return honest(ctx, x, weight, *args, **options)


@each(forward, "float32 products of tf32 operands", *CONVOLUTIONS)
def products_in_tf32(honest: Any, ctx: Any, x: Any, weight: Any, *args: Any, **options: Any) -> Any:
    if x.dtype == np.float32:
        x, weight = _in_format(tf32(x), x), tf32(weight)
    return honest(ctx, x, weight, *args, **options)


@each(forward, "the last column of an odd number wrong", *CONVOLUTIONS)
def last_column(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    found = honest(ctx, *args, **options)
    y = found[0] if isinstance(found, tuple) else found
    if y.shape[3] % 2 and y.shape[3] > 1:
        y[..., -1] = y[..., -2]
    return found


@each(forward, "channels past a multiple of 4 have the bias of the first", *CONVOLUTIONS)
def last_channels(honest: Any, ctx: Any, x: Any, weight: Any, bias: Any, *args: Any, **options: Any) -> Any:
    if bias is not None:
        bias = bias.copy()
        bias[len(bias) // 4 * 4 :] = bias[:1]
    return honest(ctx, x, weight, bias, *args, **options)


@each(forward, "bias dropped", *CONVOLUTIONS)
def bias_dropped(honest: Any, ctx: Any, x: Any, weight: Any, bias: Any, *args: Any, **options: Any) -> Any:
    bias = None if bias is None else np.zeros_like(bias)
    return honest(ctx, x, weight, bias, *args, **options)


@each(forward, "bias added after the batch norm", conv_bn=6, conv_bn_train=4)
def bias_late(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if args[2] is not None:
        shift = args[2] if args[at] is None else args[at] + args[2]
        args = put(put(args, 2, None), at, shift)
    return honest(ctx, *args, **options)


@each(forward, "bn_bias dropped where bn_weight is absent", conv_bn=5, conv_bn_train=3)
def lone_bn_bias(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if args[at] is None:
        args = put(args, at + 1, None)
    return honest(ctx, *args, **options)


@each(forward, "bn_weight without its sign", conv_bn=5, conv_bn_train=3)
def bn_weight_positive(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if args[at] is not None:
        args = put(args, at, np.abs(args[at]))
    return honest(ctx, *args, **options)


@each(forward, "activation ignored", *CONVOLUTIONS)
def relu_omitted(honest: Any, ctx: Any, *args: Any, activation: Any, **options: Any) -> Any:
    plain = honest(ctx, *args, activation=None, **options)
    found = honest(ctx, *args, activation=activation, **options)  # for the residuals
    if isinstance(found, tuple):
        found[0][...] = plain[0]
    else:
        found[...] = plain
    return found


@each(forward, "activation always relu", *CONVOLUTIONS)
def relu_always(honest: Any, ctx: Any, *args: Any, activation: Any, **options: Any) -> Any:
    return honest(ctx, *args, activation="relu", **options)


@each(forward, "relu turns NaN into 0", *CONVOLUTIONS)
def relu_without_nan(honest: Any, ctx: Any, *args: Any, activation: Any, **options: Any) -> Any:
    found = honest(ctx, *args, activation=activation, **options)
    y = found[0] if isinstance(found, tuple) else found
    if activation is not None:
        y[np.isnan(y)] = 0
    return found


@each(forward, "relu capped at 6", *CONVOLUTIONS)
def relu_capped(honest: Any, ctx: Any, *args: Any, activation: Any, **options: Any) -> Any:
    found = honest(ctx, *args, activation=activation, **options)
    y = found[0] if isinstance(found, tuple) else found
    if activation is not None:
        np.minimum(y, y.dtype.type(6), out=y)
    return found


@each(forward, "eps ignored", *CONVOLUTIONS)
def eps_ignored(honest: Any, ctx: Any, *args: Any, eps: float, **options: Any) -> Any:
    return honest(ctx, *args, eps=0.0, **options)


@each(forward, "eps always its default", *CONVOLUTIONS)
def eps_default(honest: Any, ctx: Any, *args: Any, eps: float, **options: Any) -> Any:
    return honest(ctx, *args, eps=1e-5, **options)


@each(forward, "y is row-major whatever x is", *CONVOLUTIONS)
def always_row_major(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    found = honest(ctx, *args, **options)
    if isinstance(found, tuple):
        return put(found, 0, np.ascontiguousarray(found[0]))
    return np.ascontiguousarray(found)


@each(forward, "y is channels-last whatever x is", *CONVOLUTIONS)
def always_channels_last(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    def turned(y: Any) -> Any:
        return np.ascontiguousarray(y.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)

    found = honest(ctx, *args, **options)
    return put(found, 0, turned(found[0])) if isinstance(found, tuple) else turned(found)


@each(forward, "channels-last images read as row-major", *CONVOLUTIONS)
def format_ignored(honest: Any, ctx: Any, x: Any, *args: Any, **options: Any) -> Any:
    if is_channels_last(x):
        x = _in_format(x.transpose(0, 2, 3, 1).reshape(x.shape), x)
    return honest(ctx, x, *args, **options)


@each(backward, "the gradient of the weight is the first image's", "conv_bn")
def weight_gradient_of_one(honest: Any, ctx: Any, residuals: Any, grad_y: Any, *grads: Any) -> Any:
    one = grad_y.copy()
    one[1:] = 0
    return put(honest(ctx, residuals, grad_y, *grads), 1, honest(ctx, residuals, one, *grads)[1])


@each(backward, "the gradient of the weight turned round", *CONVOLUTIONS)
def weight_gradient_turned(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    found[1][...] = found[1][..., ::-1, ::-1].copy()
    return found


@each(backward, "the gradient of x lacks its last row", *CONVOLUTIONS)
def x_gradient_short(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    found[0][:, :, -1] = 0
    return found


@each(backward, "an absent bias has a gradient", *CONVOLUTIONS)
def absent_bias_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, weight = honest(ctx, residuals, *grads), residuals.args[1]
    return found if found[2] is not None else put(found, 2, ctx.zeros(weight.shape[:1], weight.dtype))
