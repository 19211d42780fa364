"""How arrays reach the extension: aligned, and contiguous where a kernel takes no strides; copied if they must be."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from srm_core.context import LaunchContext

Array = npt.NDArray[Any]


def dense(array: Array) -> Array:
    """Contiguous and aligned."""
    flags = array.flags
    return array if flags.c_contiguous and flags.aligned else np.require(array, requirements=["C", "A"])


def dense_or_none(array: Array | None) -> Array | None:
    return None if array is None else dense(array)


def rows(array: Array) -> Array:
    """(B, T, C) aligned, of any strides along B and T: those along C are 1, or 0 for an extent that is 1."""
    if array.flags.c_contiguous and array.flags.aligned:
        return array
    item = array.itemsize
    whole = array.flags.aligned and all(s % item == 0 for s in array.strides)
    return array if whole and (array.strides[2] == item or array.shape[2] == 1) else dense(array)


def integers(array: Any) -> Array | None:
    """Lengths or positions as the extension reads them."""
    return None if array is None else np.require(array, np.int64, ["C", "A"])


def filled(ctx: LaunchContext, shape: tuple[int, ...], dtype: Any, values: Any) -> Array:
    """An output that begins as `values`."""
    out: Array = ctx.empty(shape, dtype)
    out[...] = values
    return out


def like(ctx: LaunchContext, array: Array | None) -> Any:
    """Memory for the gradient of an argument; None for one that was not given."""
    return None if array is None else ctx.empty(array.shape, array.dtype)
