"""Sizes, arrays, laws and wrong calls that `conv_bn` and `conv_bn_train` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from srm_core.ops.common import Array, exact, finfo, generator, itemsize, normal, uniform
from srm_core.ops.conv_bn.convolution import convolve, geometry
from srm_core.spec import HALF, Case, ErrorSample

GEOMETRY = ("stride", "padding", "dilation", "groups")


def case(name: str, x: tuple[int, ...], weight: tuple[int, ...], *tags: str, **settings: Any) -> Case:
    """x is (B, I, H, W), weight (O, R, S)."""
    return Case(name, dict(zip("BIHWORS", (*x, *weight), strict=True)), frozenset(tags or ("ci",)), settings)


# offset: what is added to bias, and to the mean that it is normalised by.
CASES = (
    case("small", (2, 3, 6, 7), (4, 3, 3)),
    case("padded", (2, 3, 5, 20), (4, 3, 3), padding=1, activation="relu"),
    case("strided", (2, 4, 7, 40), (5, 3, 3), stride=2, padding=1, activation="relu"),
    case("dilated", (2, 3, 9, 12), (4, 3, 3), dilation=2, padding=2),
    case("pairs", (2, 3, 9, 20), (4, 3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 3), activation="relu"),
    case("stride_past_kernel", (2, 3, 8, 40), (4, 2, 2), stride=(3, 4), padding=(0, 1)),
    case("pointwise", (2, 8, 5, 20), (6, 1, 1), activation="relu"),
    case("pointwise_strided", (2, 4, 5, 24), (6, 1, 1), stride=2),
    case("pointwise_padded", (2, 4, 3, 12), (3, 1, 1), padding=(1, 0)),
    case("groups", (2, 6, 6, 20), (4, 3, 3), groups=2, padding=1, activation="relu"),
    case("groups_pointwise", (2, 6, 5, 12), (9, 1, 1), groups=3),
    case("depthwise", (2, 5, 7, 20), (5, 3, 3), groups=5, padding=1, activation="relu"),
    case("depthwise_multiplier", (2, 3, 7, 24), (6, 3, 2), groups=3, stride=2, dilation=(2, 1)),
    case("large_kernel", (2, 3, 6, 20), (4, 7, 5), padding=(3, 2), activation="relu"),
    case("kernel_is_image", (9, 3, 4, 5), (4, 4, 5), activation="relu"),
    case("one_channel", (2, 1, 6, 12), (3, 3, 3), padding=1),
    case("bias_alone", (2, 3, 6, 12), (4, 3, 3), bn_weight=False, bn_bias=False),
    case("no_vectors", (2, 3, 6, 12), (4, 3, 3), bias=False, bn_weight=False, bn_bias=False),
    case("bn_bias_alone", (2, 3, 6, 20), (4, 3, 3), bias=False, bn_weight=False, eps=0.1, activation="relu"),
    case("channels_last", (2, 8, 6, 20), (4, 3, 3), padding=1, channels_last=True, activation="relu"),
    case("channels_last_strided", (2, 4, 7, 24), (6, 3, 3), stride=2, padding=1, channels_last=True),
    case("channels_last_pairs", (2, 3, 9, 12), (4, 3, 2), padding=(0, 2), dilation=(1, 3), channels_last=True),
    case("channels_last_groups", (2, 6, 6, 20), (4, 3, 3), groups=2, channels_last=True, activation="relu"),
    case("channels_last_depthwise", (2, 5, 7, 12), (5, 3, 3), groups=5, padding=1, channels_last=True),
    case("channels_last_pointwise", (2, 8, 5, 12), (6, 1, 1), channels_last=True),
    case("float32_parameters", (2, 4, 6, 20), (3, 3, 3), padding=1, wide_parameters=True, activation="relu"),
    case("offset", (2, 3, 6, 20), (4, 3, 3), padding=1, offset=50),
    case("primes", (3, 5, 7, 19), (7, 3, 5), padding=(1, 2), activation="relu"),
    case("one_image", (1, 3, 5, 12), (4, 3, 3), "ci", "edge", padding=1),
    case("no_batch", (0, 3, 5, 4), (4, 3, 3), "ci", "edge", padding=1, activation="relu"),
    case("seed_64_128", (8, 64, 32, 32), (128, 3, 3), "seed", padding=1, channels_last=True, activation="relu"),
    case("seed_128_256", (4, 128, 64, 64), (256, 3, 3), "seed", padding=1, channels_last=True, activation="relu"),
    case("seed_256_512", (1, 256, 128, 128), (512, 3, 3), "seed", padding=1, channels_last=True, activation="relu"),
    case("cpu_64", (8, 64, 56, 56), (64, 3, 3), "bench", padding=1, channels_last=True, activation="relu"),
    case("stage_64", (32, 64, 56, 56), (64, 3, 3), "bench", padding=1, channels_last=True, activation="relu"),
    case("stage_256", (16, 128, 64, 64), (256, 3, 3), "bench", padding=1, channels_last=True, activation="relu"),
    case("stage_512", (16, 256, 128, 128), (512, 3, 3), "bench", padding=1, channels_last=True, activation="relu"),
    case("pointwise_256", (32, 64, 56, 56), (256, 1, 1), "bench", channels_last=True, activation="relu"),
)


def arrays(case: Case, dtype: str, seed: int) -> tuple[np.random.Generator, dict[str, Any]]:
    """The arguments that both operators take, by name, and the generator to go on with."""
    rng, s, d = generator(case, seed), case.settings, case.dims
    wide = "float32" if s.get("wide_parameters") and dtype in HALF else dtype
    inner = d["I"] // s.get("groups", 1)
    if s.get("channels_last"):
        x = normal(rng, (d["B"], d["H"], d["W"], d["I"]), dtype).transpose(0, 3, 1, 2)
    else:
        x = normal(rng, (d["B"], d["I"], d["H"], d["W"]), dtype)
    weight = normal(rng, (d["O"], inner, d["R"], d["S"]), wide, (inner * d["R"] * d["S"]) ** -0.5)
    bias, beta = normal(rng, (d["O"],), wide), normal(rng, (d["O"],), wide)
    bias += bias.dtype.type(s.get("offset", 0))
    gamma = uniform(rng, (d["O"],), wide, 0.5, 1.5)
    gamma[1::3] *= -1
    vectors = {"bias": bias, "bn_weight": gamma, "bn_bias": beta}
    return rng, {"x": x, "weight": weight, **{n: v if s.get(n, True) else None for n, v in vectors.items()}}


def options(case: Case) -> dict[str, Any]:
    return {n: case.settings[n] for n in (*GEOMETRY, "eps", "activation") if n in case.settings}


def convolved(case: Case, given: dict[str, Any]) -> Array:
    """conv(x, weight) + bias in float64."""
    s = case.settings
    g = geometry(*(s.get(n, default) for n, default in zip(GEOMETRY, (1, 0, 1, 1), strict=True)))
    c = convolve(exact, given["x"].astype("float64"), given["weight"].astype("float64"), g)
    return c if given["bias"] is None else c + given["bias"].astype("float64")[:, None, None]


def kinked(case: Case) -> bool:
    """Should zeros of the activation be kept apart from the values? Where a value lies at the kink of ReLU a
    rounding decides whether it has a gradient. Large cases, where this costs, are not for judging."""
    return case.settings.get("activation") == "relu" and "ci" in case.tags and case.dims["B"] > 0


def away_from_values(values: Array, dtype: str) -> Array:
    """A number for each channel of (B, O, P, Q) that is not near a value.

    It is the middle of the widest gap among the inner half of the values, or lies below all of them where that gap
    is within reach of the rounding of `dtype`.
    """
    ordered = np.sort(values.swapaxes(0, 1).reshape(values.shape[1], -1))
    quarter = ordered.shape[1] // 4
    inner = ordered[:, quarter : ordered.shape[1] - quarter]
    at = np.diff(inner).argmax(1)[:, None]
    low, high = (np.take_along_axis(inner, at + i, 1)[:, 0] for i in (0, 1))
    reach = 8 * float(finfo(dtype).eps) * ordered.std(1)
    found: Array = np.where(high - low > 2 * reach, (low + high) / 2, ordered[:, 0] - reach)
    return found


def products(case: Case) -> int:
    """Multiplications of the convolution."""
    b, _, _, p, q = result(case)
    return b * p * q * _weights(case)


def result(case: Case) -> tuple[int, int, int, int, int]:
    """(B, I, O, P, Q)."""
    d, s = case.dims, case.settings
    g = geometry(*(s.get(n, default) for n, default in zip(GEOMETRY, (1, 0, 1, 1), strict=True)))
    return d["B"], d["I"], d["O"], *g.extent((d["H"], d["W"]), (d["R"], d["S"]))


def bytes_of(case: Case, dtype: str, vectors: int) -> int:
    """x and weight read once, y written once, and so many vectors (O,)."""
    b, i, o, p, q = result(case)
    image = case.dims["H"] * case.dims["W"]
    return itemsize(dtype) * (b * i * image + _weights(case) + b * o * p * q + vectors * o)


def _weights(case: Case) -> int:
    inner: int = case.dims["I"] // case.settings.get("groups", 1)
    return case.dims["O"] * inner * case.dims["R"] * case.dims["S"]


def given_vectors(case: Case) -> int:
    return sum(case.settings.get(n, True) for n in ("bias", "bn_weight", "bn_bias"))


# Laws: what happens to the arguments that have output channels, by their position.


def at_channels(args: tuple[Any, ...], channels: Any, inputs: Any = slice(None)) -> tuple[Any, ...]:
    """The call for some output channels, and some input channels of x."""
    x, *rest = args
    return (x[:, inputs], *(None if a is None else a[channels] for a in rest))


def channel_order(args: tuple[Any, ...], groups: int) -> Array:
    """The output channels, backwards within each group."""
    order: Array = np.arange(len(args[1])).reshape(groups, -1)[:, ::-1].reshape(-1)
    return order


# Wrong calls. `call(x, weight)` makes the arguments with vectors of weight's channels.


def _f32(*shape: int) -> Any:
    return np.ones(shape, np.float32)


Make = Callable[..., tuple[Any, ...]]


def error_samples(make: Make) -> tuple[ErrorSample, ...]:
    """make(x, weight, **vectors): the positional arguments, vectors of ones where none is named."""
    x, w = _f32(2, 4, 5, 6), _f32(6, 4, 3, 3)

    def sample(name: str, param: str, args: tuple[Any, ...] = (x, w), **rest: Any) -> ErrorSample:
        return ErrorSample(name, param, lambda: (make(*args), rest))

    def bad_vector(name: str, param: str, value: Any) -> ErrorSample:
        return ErrorSample(name, param, lambda: (make(x, w, **{param: value}), {}))

    return (
        sample("x of rank 3", "x", (x[0], w)),
        sample("x of integers", "x", (x.astype(int), w)),
        sample("x missing", "x", (None, w)),
        sample("images without channels", "x", (x[:, :0], w[:, :0])),
        sample("images without rows", "x", (x[:, :, :0], w), padding=2),
        sample("weight of rank 3", "weight", (x, w[0])),
        sample("weight of another dtype", "weight", (x, w.astype("float64"))),
        sample("weight of other input channels", "weight", (x, w[:, :3])),
        sample("weight of all input channels in groups", "weight", (x, w), groups=2),
        sample("kernels without columns", "weight", (x, w[..., :0])),
        sample("a kernel larger than the image", "weight", (x, _f32(6, 4, 7, 3))),
        sample("a kernel dilated past the padded image", "weight", padding=1, dilation=(3, 4)),
        bad_vector("bias of another extent", "bias", _f32(5)),
        bad_vector("bias of half dtype", "bias", np.ones(6, np.float16)),
        bad_vector("bn_weight of rank 2", "bn_weight", _f32(6, 1)),
        bad_vector("bn_bias a list", "bn_bias", [1.0] * 6),
        sample("no stride", "stride", stride=0),
        sample("a fractional stride", "stride", stride=1.5),
        sample("three strides", "stride", stride=(1, 1, 1)),
        sample("negative padding", "padding", padding=(1, -1)),
        sample("padding in words", "padding", padding="same"),
        sample("dilation of 0", "dilation", dilation=[1, 0]),
        sample("dilation a bool", "dilation", dilation=True),
        sample("no groups", "groups", groups=0),
        sample("groups that do not divide I", "groups", groups=3),
        sample("groups that do not divide O", "groups", (x, _f32(6, 1, 3, 3)), groups=4),
        sample("negative eps", "eps", eps=-1e-5),
        sample("infinite eps", "eps", eps=float("inf")),
        sample("eps in words", "eps", eps="small"),
        sample("another activation", "activation", activation="gelu"),
        sample("an activation that is a function", "activation", activation=np.tanh),
    )
