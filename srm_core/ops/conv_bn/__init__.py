"""`conv_bn`: convolution, batch norm with running statistics, activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from srm_core.contract import host_tuple
from srm_core.dispatch import define
from srm_core.ops.conv_bn.spec import SPEC

_operator = define(SPEC)


def conv_bn(
    x: Any, weight: Any, bias: Any = None, running_mean: Any = None, running_var: Any = None, bn_weight: Any = None,
    bn_bias: Any = None, *, stride: int | Sequence[int] = 1, padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1, groups: int = 1, eps: float = 1e-5, activation: str | None = None,
    backend: str | None = None,
) -> Any:  # fmt: skip
    """act((conv(x, weight) + bias - running_mean) / sqrt(running_var + eps) * bn_weight + bn_bias), for inference.

    x: images, (B, I, H, W). If they are dense in channels-last order, so is y; that order is the fast one.
    weight: (O, J, R, S) with J = I / groups; a parameter: of x's dtype, or float32 beside half x. So are all others.
    bias: (O,), or None for 0.
    running_mean, running_var: (O,); they have no gradients. None for both: what comes out of the convolution is
        normalised already, as with a weight and a bias that a module keeps folded; eps is not used.
    bn_weight, bn_bias: (O,), or None for 1 and 0.
    stride, padding, dilation: an integer, or a pair along H and W; padding is with zeros, at each side.
    groups: must divide I and O; output channels o // (O / groups) see the input channels of that group alone.
    eps: at least 0.
    activation: None or "relu", whose gradient is 0 at 0.
    backend: a selection for this call, such as "numpy" or "triton,auto".

    Returns y (B, O, P, Q) of x's dtype, P = (H + 2 * padding - dilation * (R - 1) - 1) // stride + 1, and Q likewise.
    B = 0 is valid. Half types accumulate in float32; the weight times its channel's scale may be rounded to them.

    Errors: `ContractError` for a shape, dtype or option that breaks the above, and for a kernel that does not fit
    into the padded image; `NoBackendError` if no selected backend can run it. Source: Ioffe and Szegedy 2015,
    algorithm 2.

    >>> import numpy as np, srm_core
    >>> x, weight = np.arange(9.0).reshape(1, 1, 3, 3), np.ones((1, 1, 2, 2))
    >>> srm_core.conv_bn(x, weight, None, np.array([12.0]), np.array([4.0]), eps=0, activation="relu")[0, 0].tolist()
    [[0.0, 0.0], [4.0, 6.0]]
    """
    return _operator.run(
        backend, x, weight, bias, running_mean, running_var, bn_weight, bn_bias,
        host_tuple(stride), host_tuple(padding), host_tuple(dilation), groups, eps, activation,
    )  # fmt: skip
