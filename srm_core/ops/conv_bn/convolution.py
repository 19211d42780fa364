"""What `conv_bn` and `conv_bn_train` share: their options, their geometry, and the convolution with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from srm_core.contract import LARGEST, check_number
from srm_core.ops.common import Array, Rounding, product
from srm_core.spec import OptionSpec, TensorSpec

Pair = tuple[int, int]
FOLDED, CONVOLUTION, CONVOLUTION_GRADIENT = "folded weight", "convolution", "convolution gradient"


class Geometry(NamedTuple):
    """Where the taps of a convolution fall. Pairs are (along H, along W)."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int

    def extent(self, image: Pair, kernel: Pair) -> Pair:
        """(P, Q) of the result; 0 or less where the kernel does not fit."""
        p, q = (
            (n + 2 * pad - dilation * (k - 1) - 1) // stride + 1
            for n, k, stride, pad, dilation in zip(image, kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        return p, q


def geometry(stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry:
    """The geometry that the options say, an integer standing for a pair of it."""
    h, p, d = ((v, v) if isinstance(v, int) else v for v in (stride, padding, dilation))
    return Geometry(h, p, d, groups)


# The options and tensors that both operators have.


def _check_pair(low: int) -> Callable[[str, Any, Mapping[str, int]], None]:
    def check(name: str, value: Any, dims: Mapping[str, int]) -> None:
        numbers = value if isinstance(value, tuple) and len(value) == 2 else (value,)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= low for n in numbers):
            raise ValueError(f"{value!r}; required an integer or a pair of integers, each at least {low}")

    return check


def _check_groups(name: str, value: Any, dims: Mapping[str, int]) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r}; required an integer, at least 1")
    if dims["I"] % value or dims["O"] % value:
        raise ValueError(f"{value}; required a divisor of I={dims['I']} and of O={dims['O']}")


def _check_activation(name: str, value: Any, dims: Mapping[str, int]) -> None:
    if value is not None and value != "relu":
        raise ValueError(f'{value!r}; required "relu" or None')


IMAGE = TensorSpec("x", ("B I H W",), doc="the images; dense in channels-last order they give y in that order")
WEIGHT = TensorSpec("weight", ("O J R S",), role="parameter", doc="the kernels, J = I / groups input channels each")


def vector(name: str, doc: str, *, optional: bool = True, differentiable: bool = True) -> TensorSpec:
    """A parameter of one number for each output channel."""
    return TensorSpec(name, ("O",), "parameter", optional=optional, differentiable=differentiable, doc=doc)


BIAS = vector("bias", "added to the convolution; None adds nothing")
BN_WEIGHT = vector("bn_weight", "gamma, the scale after normalisation; None is 1")
BN_BIAS = vector("bn_bias", "beta, the shift after normalisation; None is 0")

OPTIONS = (
    OptionSpec(
        "stride",
        _check_pair(1),
        1,
        keyword=True,
        schema="int[2]",
        doc="step of the kernel; an integer or a pair (H, W)",
    ),
    OptionSpec(
        "padding",
        _check_pair(0),
        0,
        keyword=True,
        schema="int[2]",
        doc="zeros at each side; an integer or a pair (H, W)",
    ),
    OptionSpec(
        "dilation",
        _check_pair(1),
        1,
        keyword=True,
        schema="int[2]",
        doc="step between taps; an integer or a pair (H, W)",
    ),
    OptionSpec(
        "groups", _check_groups, 1, keyword=True, schema="int", doc="parts of the channels that do not see each other"
    ),
    OptionSpec("eps", check_number(0, LARGEST), 1e-5, keyword=True, schema="float", doc="added to the variance"),
    OptionSpec(
        "activation", _check_activation, None, keyword=True, schema="str?", doc='applied at the end; None or "relu"'
    ),
)


def constrain(call: Any) -> None:
    """The rules of shape beyond the axes; adds P and Q, the extent of the result."""
    d, v = call.dims, call.values
    g = geometry(v["stride"], v["padding"], v["dilation"], v["groups"])
    if not d["I"] or not d["H"] or not d["W"]:
        found = f"images of {d['I']} channels, {d['H']} x {d['W']}"
        raise call.error("x", found, "at least one channel, one row and one column")
    if d["J"] * g.groups != d["I"]:
        raise call.error(
            "weight",
            f"kernels of {d['J']} input channels",
            f"I / groups = {d['I']} / {g.groups} = {d['I'] // g.groups}",
        )
    if not d["O"] or not d["R"] or not d["S"]:
        found = f"{d['O']} kernels of {d['R']} x {d['S']}"
        raise call.error("weight", found, "at least one kernel, of at least one row and one column")
    d["P"], d["Q"] = g.extent((d["H"], d["W"]), (d["R"], d["S"]))
    if d["P"] <= 0 or d["Q"] <= 0:
        spans = tuple((d[k] - 1) * step + 1 for k, step in zip("RS", g.dilation, strict=True))
        room = tuple(d[k] + 2 * pad for k, pad in zip("HW", g.padding, strict=True))
        raise call.error(
            "weight", f"kernels that span {spans[0]} x {spans[1]}",
            f"at most {room[0]} x {room[1]}, the image with its padding", "a larger padding makes room",
        )  # fmt: skip


# The convolution, and its gradients. G groups; x (B, I, H, W), weight (O, J, R, S), y (B, O, P, Q).
#
# Each number is one sum over all that it depends on, not a sum of sums over taps or images: the float32 rounding
# error of a sum of sums would be several times below that of the kernels whose tolerance it makes.


def convolve(rounding: Rounding, x: Array, weight: Array, g: Geometry) -> Array:
    """y[b,o,p,q] = sum over j, r, s of weight[o,j,r,s] * x[b, i, p*sh + r*dh - ph, q*sw + s*dw - pw],

    with i = (o // (O/G)) * J + j, strides sh and sw, dilations dh and dw, and zeros for x in the padding ph and pw.
    """
    batch, out = len(x), len(weight)
    p, q = g.extent(x.shape[2:], weight.shape[2:])
    padded, (rows, columns) = _pad(x, g), _positions(weight, g, (p, q))
    kernels = weight.reshape(g.groups, out // g.groups, weight[0].size)  # (G, O/G, J*R*S)
    y = np.zeros((batch, g.groups, out // g.groups, p * q), x.dtype)
    for b in range(batch):
        seen = padded[b][:, rows[:, None, :, None], columns[:, None]]  # (I, R, S, P, Q)
        y[b] = product(rounding, kernels, seen.reshape(g.groups, kernels.shape[2], p * q))
    return y.reshape(batch, out, p, q)


def weight_gradient(rounding: Rounding, grad: Array, x: Array, like: Array, g: Geometry) -> Array:
    """The gradient of the weight, like `like`: for each tap the sum over batch and pixels of what it saw times
    what became of it."""
    d_weight = np.zeros(like.shape, grad.dtype)
    padded, (rows, columns) = _pad(x, g), _positions(like, g, grad.shape[2:])
    became = _by_group(grad, g)
    for r, s in np.ndindex(*like.shape[2:]):
        saw = _by_group(padded[:, :, rows[r][:, None], columns[s]], g)
        d_weight[:, :, r, s] = product(rounding, became.swapaxes(1, 2), saw).reshape(like.shape[:2])
    return d_weight


def input_gradient(rounding: Rounding, grad: Array, weight: Array, image: Pair, g: Geometry) -> Array:
    """The gradient of x (B, I, *image): each tap gives the gradients of its pixels, times its weights, back to where
    it took them."""
    (out, inner, *kernel), (batch, _, p, q) = weight.shape, grad.shape
    (top, left), (height, width) = g.padding, image
    rows, columns = _positions(weight, g, (p, q))
    padded = np.zeros((batch, g.groups * inner, height + 2 * top, width + 2 * left), grad.dtype)
    pixels = _by_group(grad, g)  # (G, B*P*Q, O/G)
    by_group = weight.reshape(g.groups, out // g.groups, inner, *kernel)
    for r, s in np.ndindex(*kernel):
        given = product(rounding, pixels, by_group[..., r, s]).reshape(g.groups, batch, p, q, inner)
        given = given.transpose(1, 0, 4, 2, 3).reshape(batch, g.groups * inner, p, q)
        padded[:, :, rows[r][:, None], columns[s]] += given
    return padded[:, :, top : top + height, left : left + width]


def _pad(x: Array, g: Geometry) -> Array:
    (top, left) = g.padding
    return np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))


def _positions(weight: Array, g: Geometry, extent: Pair) -> tuple[Array, Array]:
    """Where in the padded image each tap of each pixel falls: rows (R, P) and columns (S, Q)."""
    rows, columns = (
        dilation * np.arange(k)[:, None] + stride * np.arange(n)
        for k, n, stride, dilation in zip(weight.shape[2:], extent, g.stride, g.dilation, strict=True)
    )
    return rows, columns


def _by_group(images: Array, g: Geometry) -> Array:
    """(B, C, P, Q) as (G, B*P*Q, C/G), dense: so that products sum pixel by pixel."""
    batch, channels, p, q = images.shape
    grouped = images.reshape(batch, g.groups, channels // g.groups, p, q).transpose(1, 0, 3, 4, 2)
    return np.ascontiguousarray(grouped).reshape(g.groups, batch * p * q, channels // g.groups)


def rectified(z: Array, activation: str | None) -> Array:
    """The activation of z; NaN stays NaN."""
    return np.maximum(z, 0) if activation == "relu" else z


def rectified_gradient(grad: Array, z: Array, activation: str | None) -> Array:
    """The gradient of z, which is 0 where z is 0."""
    return np.where(z <= 0, 0, grad) if activation == "relu" else grad


def by_channel(vector: Array) -> Array:
    """(O,) as (O, 1, 1), to stand beside (B, O, P, Q)."""
    return vector[:, None, None]
