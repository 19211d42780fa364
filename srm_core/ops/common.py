"""What several specifications share: drawing samples, sizes in bytes, sums over broadcast axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from srm_core.spec import Case

Array = npt.NDArray[Any]
Rounding = Callable[[str, Array], Array]
STATE, GATE_GRADIENTS = "h", "gate gradients"  # operands of the products of lstm and mdi_recurrence
finfo: Callable[[str], Any] = ml_dtypes.finfo  # NumPy's knows no bfloat16
TF32 = "tf32 products"  # the operands of matrix products, under srm_core.precision("tf32") alone


def exact(name: str, values: Array) -> Array:
    """The `rounding` of a reference that makes none."""
    return values


def product(rounding: Rounding, a: Array, b: Array) -> Array:
    """The matrix product a @ b, which may be one of rounded operands."""
    result: Array = rounding(TF32, a) @ rounding(TF32, b)
    return result


def itemsize(dtype: str) -> int:
    return np.dtype(dtype).itemsize


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> Array:
    return np.asarray(scale * rng.standard_normal(shape)).astype(dtype)


def uniform(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, low: float, high: float) -> Array:
    return rng.uniform(low, high, shape).astype(dtype)


def sample_lengths(rng: np.random.Generator, batch: int, longest: int) -> Array:
    """Lengths that always hold 0 and T where there is room for both."""
    lengths = rng.integers(0, longest + 1, batch)
    lengths[:1] = longest
    if batch > 1:
        lengths[1] = 0
    return lengths


def generator(case: Case, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, *case.name.encode()])


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), which is 0 where exp overflows."""
    result: Array = 1 / (1 + np.exp(-x))
    return result


def is_channels_last(images: Array) -> bool:
    """Are they (B, C, H, W) dense in channels-last order, and not in their own as well?"""
    return bool(images.transpose(0, 2, 3, 1).flags.c_contiguous and not images.flags.c_contiguous)


def sum_to(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which an argument of `shape` was broadcast, or that it lacks in front."""
    gradient = gradient.sum(axis=tuple(range(gradient.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and gradient.shape[i] != 1)
    return gradient.sum(axis=axes, keepdims=True) if axes else gradient


def valid_steps(lengths: Array | None, batch: int, longest: int) -> Array | None:
    """Which of the (B, T) steps lie within their sequence; None if all do."""
    return None if lengths is None else np.arange(longest) < np.asarray(lengths)[:, None]


def steps_of(x: Array, lengths: Array | None) -> list[tuple[int, Array]]:
    """Each step t of (B, T, ...), and which sequences run at it, (B, 1)."""
    batch, steps = x.shape[:2]
    valid = valid_steps(lengths, batch, steps)
    if valid is None:
        valid = np.ones((batch, steps), bool)
    return [(t, valid[:, t, None]) for t in range(steps)]
