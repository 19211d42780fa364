"""Samples, wrong calls and laws of `conv_bn`, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import normal, uniform
from srm_core.ops.conv_bn import samples
from srm_core.spec import Case, ErrorSample

CASES = (
    *samples.CASES,
    samples.case("folded", (2, 3, 6, 20), (4, 3, 3), padding=1, folded=True, bn_weight=False, bn_bias=False),
    samples.case("folded_but_scaled", (2, 4, 6, 12), (6, 3, 3), groups=2, folded=True, channels_last=True),
)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: values of about 1 all along."""
    rng, given = samples.arrays(case, dtype, seed)
    wide = given["weight"].dtype.name
    mean, var = normal(rng, (case.dims["O"],), wide), uniform(rng, (case.dims["O"],), wide, 0.5, 2)
    mean += mean.dtype.type(case.settings.get("offset", 0))
    bn_weight, bn_bias = given["bn_weight"], given["bn_bias"]
    if samples.kinked(case):
        middles = samples.away_from_values(samples.convolved(case, given), dtype)
        rate = (1 if bn_weight is None else bn_weight.astype("float64")) / np.sqrt(var.astype("float64"))
        mean = (middles + (0 if bn_bias is None else bn_bias.astype("float64") / rate)).astype(wide)
    statistics = (None, None) if case.settings.get("folded") else (mean, var)
    return (given["x"], given["weight"], given["bias"], *statistics, bn_weight, bn_bias), samples.options(case)


def flops(case: Case) -> int:
    """Two operations a product of the convolution; shift and activation of each element of y."""
    b, _, o, p, q = samples.result(case)
    return 2 * samples.products(case) + 2 * b * o * p * q


def bytes_moved(case: Case, dtype: str) -> int:
    """x, weight and the vectors read once, y written once."""
    return samples.bytes_of(case, dtype, samples.given_vectors(case) + 2)


def _arguments(x: Any, weight: Any, **vectors: Any) -> tuple[Any, ...]:
    ones = np.ones(6, np.float32)
    names = ("bias", "running_mean", "running_var", "bn_weight", "bn_bias")
    return (x, weight, *(vectors.get(n, ones) for n in names))


ERROR_SAMPLES = (
    *samples.error_samples(_arguments),
    ErrorSample(
        "running_mean missing", "running_mean",
        lambda: (_arguments(np.ones((2, 4, 5, 6), "f4"), np.ones((6, 4, 3, 3), "f4"), running_mean=None), {}),
    ),
    ErrorSample(
        "running_var of one channel", "running_var",
        lambda: (
            _arguments(
                np.ones((2, 4, 5, 6), "f4"), np.ones((6, 4, 3, 3), "f4"), running_var=np.ones(1, np.float32)
            ),
            {},
        ),
    ),
)  # fmt: skip


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Images do not see each other."""
    order = np.arange(len(args[0]))[::-1].copy()
    yield "y", call(args[0][order], *args[1:], **options), call(*args, **options)[order]


def channels_permute(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Output channels of a group may change places."""
    order = samples.channel_order(args, options.get("groups", 1))
    yield "y", call(*samples.at_channels(args, order), **options), call(*args, **options)[:, order]


def groups_are_apart(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each group of channels gives what it gives in a call of its own."""
    groups = options.get("groups", 1)
    if groups == 1:
        return
    y = call(*args, **options)
    outer, inner = len(args[1]) // groups, args[0].shape[1] // groups
    for i in range(groups):
        channels = slice(i * outer, (i + 1) * outer)
        part = samples.at_channels(args, channels, slice(i * inner, (i + 1) * inner))
        yield f"group {i}", call(*part, **{**options, "groups": 1}), y[:, channels]


def mean_shifts_with_bias(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The bias and the running mean may both be one larger."""
    x, weight, bias, mean, *rest = args
    if mean is None:
        return
    one = mean.dtype.type(1)
    shifted = np.ones_like(mean) if bias is None else bias + one
    yield "y", call(x, weight, shifted, mean + one, *rest, **options), call(*args, **options)
