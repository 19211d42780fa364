"""Samples, wrong calls and laws of `conv_bn_train`, shared by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from srm_core.ops.conv_bn import samples
from srm_core.spec import Case

# The statistics of nothing are NaN, of which the checks of every ci case can make nothing.
CASES = tuple(replace(c, tags=c.tags - {"ci"}) if c.name == "no_batch" else c for c in samples.CASES)


def sample(case: Case, dtype: str, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """NumPy arguments for a case: values of about 1 all along."""
    _, given = samples.arrays(case, dtype, seed)
    if samples.kinked(case):
        c = samples.convolved(case, given)
        mean, var = (f(c, (0, 2, 3), keepdims=True) for f in (np.mean, np.var))
        normal = (c - mean) / np.sqrt(var + case.settings.get("eps", 1e-5))
        gamma = 1 if given["bn_weight"] is None else given["bn_weight"].astype("float64")[:, None, None]
        given["bn_bias"] = -samples.away_from_values(normal * gamma, dtype).astype(given["weight"].dtype)
    names = ("x", "weight", "bias", "bn_weight", "bn_bias")
    return tuple(given[n] for n in names), samples.options(case)


def flops(case: Case) -> int:
    """Two operations a product of the convolution; for each element of y the mean (1), the variance (3), the
    normalisation (2) and the activation (1)."""
    b, _, o, p, q = samples.result(case)
    return 2 * samples.products(case) + 7 * b * o * p * q


def bytes_moved(case: Case, dtype: str) -> int:
    """x, weight and the vectors read once; y and the statistics written once."""
    return samples.bytes_of(case, dtype, samples.given_vectors(case) + 2)


def _arguments(x: Any, weight: Any, **vectors: Any) -> tuple[Any, ...]:
    ones = np.ones(6, np.float32)
    return (x, weight, *(vectors.get(n, ones) for n in ("bias", "bn_weight", "bn_bias")))


ERROR_SAMPLES = samples.error_samples(_arguments)

NAMES = ("y", "batch_mean", "batch_var")


def batch_permutes(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Statistics do not see the order of the batch."""
    order = np.arange(len(args[0]))[::-1].copy()
    y, *statistics = call(*args, **options)
    y_permuted, *of_permuted = call(args[0][order], *args[1:], **options)
    yield from zip(NAMES, (y_permuted, *of_permuted), (y[order], *statistics), strict=True)


def channels_permute(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Output channels of a group may change places."""
    order = samples.channel_order(args, options.get("groups", 1))
    y, mean, var = call(*args, **options)
    permuted = call(*samples.at_channels(args, order), **options)
    yield from zip(NAMES, permuted, (y[:, order], mean[order], var[order]), strict=True)


def groups_are_apart(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Each group of channels gives what it gives in a call of its own."""
    groups = options.get("groups", 1)
    if groups == 1:
        return
    y, mean, var = call(*args, **options)
    outer, inner = len(args[1]) // groups, args[0].shape[1] // groups
    for i in range(groups):
        at = slice(i * outer, (i + 1) * outer)
        part = samples.at_channels(args, at, slice(i * inner, (i + 1) * inner))
        results = call(*part, **{**options, "groups": 1})
        names = (f"{n} of group {i}" for n in NAMES)
        yield from zip(names, results, (y[:, at], mean[at], var[at]), strict=True)


def bias_shifts_the_mean(call: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """A bias shifts the mean, and neither y nor the variance sees it."""
    x, weight, bias, *rest = args
    with_bias, without = call(*args, **options), call(x, weight, None, *rest, **options)
    y, mean, var = without
    moved = mean if bias is None else mean + bias.astype(mean.dtype)
    yield from zip(NAMES, with_bias, (y, moved, var), strict=True)
