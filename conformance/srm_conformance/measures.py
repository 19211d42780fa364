"""How wrong an array is: three measures, and the kinds of its elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from srm_core.ops.common import finfo

Array = npt.NDArray[Any]
Worst = tuple[float, tuple[int, ...]]  # an error, and the index of the element that is to blame


NAN = 2  # of `kinds_of`


def frobenius_error(got: Array, truth: Array, floor: float = 0.0) -> Worst:
    """The norm of got - truth over the norm of truth, and where they differ most.

    floor: the least root mean square that truth is taken to have, so that zeros can be judged. 0 for an empty
    array. Elements that are not finite on one side count as 0.
    """
    difference, size = finite_parts(got, truth)
    if not difference.size:
        return 0.0, ()
    peak = max(difference.max(), size.max(), floor)  # keeps squares in range
    if not peak:
        return 0.0, (0,) * difference.ndim
    norm = np.sqrt(((size / peak) ** 2).sum())
    error = np.sqrt(((difference / peak) ** 2).sum())
    return float(error / max(norm, floor / peak * np.sqrt(difference.size))), where_largest(difference)


def row_error(got: Array, truth: Array, floor: Any = 0.0) -> Worst:
    """The largest |got - truth| over the largest |truth| in its last-axis row, and where.

    floor: the least magnitude that all rows, or each, are taken to have, so that a row of zeros can be judged. A scalar
    is a row of one. 0 for an empty array. Elements that are not finite on one side count as 0.
    """
    difference, size = finite_parts(got, truth)
    if not difference.size:
        return 0.0, ()
    rows = np.maximum(size.max(axis=-1, keepdims=True), floor)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(difference == 0, 0, difference / rows)
    where = where_largest(scaled)
    return float(scaled[where]), where


def peak_error(got: Array, truth: Array, floor: float = 0.0) -> Worst:
    """The largest |got - truth| over the largest |truth| of the whole array, at least `floor`, and where.

    0 for an empty array. Elements that are not finite on one side count as 0.
    """
    difference, size = finite_parts(got, truth)
    if not difference.size:
        return 0.0, ()
    where = where_largest(difference)
    largest = max(float(size.max()), floor)
    return (float(difference[where] / largest) if difference[where] else 0.0), where


def finite_parts(got: Array, truth: Array) -> tuple[Array, Array]:
    """(|got - truth|, |truth|), 0 where they are not finite."""
    got, truth = np.atleast_1d(got).astype(truth.dtype), np.atleast_1d(truth)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = np.where(np.isfinite(got) & np.isfinite(truth), np.abs(got - truth), 0)
    return difference, np.where(np.isfinite(truth), np.abs(truth), 0)


def where_largest(values: Array) -> tuple[int, ...]:
    values = np.atleast_1d(values)
    if not values.size:
        return ()
    return tuple(int(i) for i in np.unravel_index(int(values.argmax()), values.shape))


def kinds_of(values: Array) -> Array:
    """0 finite, 1 infinity, -1 minus infinity, 2 NaN."""
    if np.isfinite(values).all():
        return np.zeros(np.shape(values), np.int8)
    wide = values.astype(np.longdouble)
    return np.where(np.isnan(wide), NAN, np.where(np.isinf(wide), np.sign(wide), 0))


def rounded_to(values: Array, dtype: Any) -> Array:
    with np.errstate(all="ignore"):
        return np.asarray(values).astype(dtype)  # a result without axes may be a scalar


def tf32(values: Array) -> Array:
    """float32 rounded to the nearest with 10 bits of mantissa, ties to even; NaN and infinity as they are."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + 0xFFF + ((bits >> 13) & 1)) & 0xFFFFE000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def eps_of(dtype: str) -> float:
    return float(finfo(dtype).eps)
