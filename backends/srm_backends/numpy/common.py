"""What the kernels of this backend share: the dtype of computation, silence about infinities, results of a dtype."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from srm_core.context import LaunchContext

Array = npt.NDArray[Any]

# NaN and infinity are results like others: a kernel warns of none, whatever the caller's own error state is.
quiet = np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")


def compute_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for everything else."""
    return np.float64 if dtype == np.float64 else np.float32


def sigmoid_(x: Array) -> Array:
    """1 / (1 + exp(-x)) in place."""
    np.negative(x, out=x)
    np.exp(x, out=x)
    np.add(x, 1, out=x)
    return np.reciprocal(x, out=x)


def result(ctx: LaunchContext, values: Array, dtype: Any) -> Array:
    """An output or gradient: `values` in memory of the caller's, rounded to `dtype`."""
    out: Array = ctx.empty(values.shape, dtype)
    out[...] = values
    return out


def gradient(ctx: LaunchContext, values: Array, like: Array | None) -> Array | None:
    """The gradient of an argument, in its dtype; None for one that was not given."""
    return None if like is None else result(ctx, values, like.dtype)
