"""`conv_bn_train`: convolution, batch norm with the statistics of the batch, activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srm_core.contract import host_tuple
from srm_core.dispatch import define
from srm_core.ops.conv_bn_train.spec import SPEC

_operator = define(SPEC)


def conv_bn_train(
    x: Any, weight: Any, bias: Any = None, bn_weight: Any = None, bn_bias: Any = None, *,
    stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1,
    groups: int = 1, eps: float = 1e-5, activation: str | None = None, backend: str | None = None,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """With c = conv(x, weight) + bias: act((c - mean) / sqrt(var + eps) * bn_weight + bn_bias), for training.

    mean and var are c's own, over batch and pixels, and are differentiated through. Nothing is updated: running
    statistics are the caller's, made of those returned.

    x: images, (B, I, H, W). If they are dense in channels-last order, so is y; that order is the fast one.
    weight: (O, J, R, S) with J = I / groups; a parameter: of x's dtype, or float32 beside half x. So are all others.
    bias: (O,), or None for 0; it shifts batch_mean and nothing else.
    bn_weight, bn_bias: (O,), or None for 1 and 0.
    stride, padding, dilation, groups, eps, activation, backend: as in `conv_bn`.

    Returns (y, batch_mean, batch_var): y (B, O, P, Q) of x's dtype, as in `conv_bn`; batch_mean and batch_var (O,)
    of x's dtype, float32 for half x. The variance is biased: the sum of squares divided by N = B * P * Q; what
    torch keeps as running variance is batch_var * N / (N - 1). B = 0 is valid, and its statistics are NaN.
    Half types accumulate in float32; c may be rounded to them, and then the statistics are of the rounded c.

    Errors: `ContractError` for a shape, dtype or option that breaks the above, and for a kernel that does not fit
    into the padded image; `NoBackendError` if no selected backend can run it. Source: Ioffe and Szegedy 2015,
    algorithm 1.

    >>> import numpy as np, srm_core
    >>> x = np.array([1.0, 3.0, 5.0, 7.0]).reshape(4, 1, 1, 1)
    >>> y, mean, var = srm_core.conv_bn_train(x, np.ones((1, 1, 1, 1)), eps=4)
    >>> y.ravel().tolist(), mean.tolist(), var.tolist()
    ([-1.0, -0.3333333333333333, 0.3333333333333333, 1.0], [4.0], [5.0])
    """
    result: tuple[Any, Any, Any] = _operator.run(
        backend, x, weight, bias, bn_weight, bn_bias,
        host_tuple(stride), host_tuple(padding), host_tuple(dilation), groups, eps, activation,
    )  # fmt: skip
    return result
