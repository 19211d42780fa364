"""What recurrences with products of weights and states share.

Inside, time comes first and the batch last, (T, C, B): a step is then contiguous, its gates are blocks of rows, and
`weight @ state` is the form of a thin product in which BLAS is fastest, for a batch of 4 to 16. Everything that does
not wait for the state is one large product over all steps, before the loop or after it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from srm_backends.numpy.common import Array
from srm_core.context import LaunchContext

COLUMNS, LARGE = 4, 8 << 20  # of a thin product by columns: at most so many, of at least so many bytes; measured


def time_major(values: Array, valid: Array | None, compute: Any) -> Array:
    """A copy (T, C, B) of (B, T, C), with zeros beyond the lengths: what lies there may be NaN."""
    batch, steps, width = values.shape
    copy = np.empty((steps, width, batch), compute)
    copy[...] = values.transpose(1, 2, 0)
    return clear(copy, valid)


def clear(values: Array, valid: Array | None) -> Array:
    """values (T, C, B) with zeros beyond the lengths, in place."""
    if valid is not None:
        values.swapaxes(1, 2)[~valid.T] = 0
    return values


def running(valid: Array | None, t: int) -> Any:
    """Which sequences run at step t, (B,), as `where` of a ufunc; True if all do, which costs nothing."""
    return True if valid is None else valid[:, t]


def batch_major(ctx: LaunchContext, values: Array, dtype: Any, valid: Array | None = None) -> Array:
    """An output (B, T, C) of (T, C, B), with zeros beyond the lengths."""
    steps, width, batch = values.shape
    out: Array = ctx.empty((batch, steps, width), dtype)
    out[...] = values.transpose(2, 0, 1)
    if valid is not None:
        out[~valid] = 0
    return out


def rows(values: Array) -> Array:
    """(T, C, B) as a matrix (C, T*B)."""
    steps, width, batch = values.shape
    return np.ascontiguousarray(values.swapaxes(0, 1)).reshape(width, steps * batch)


def project(weight: Array, values: Array) -> Array:
    """weight (O, C) times each step of values (T, C, B): (T, O, B), by one product."""
    steps, _, batch = values.shape
    product = (weight @ rows(values)).reshape(len(weight), steps, batch)
    return np.ascontiguousarray(product.swapaxes(0, 1))


class StateProduct:
    """`weight @ state`, again and again, into memory that is there. weight: (O, C). state: (C, B).

    BLAS copies the matrix of a product into its own order, which a few columns do not repay where the matrix is larger
    than the cache. Then it is multiplied by one column after the other.
    """

    def __init__(self, weight: Array, batch: int) -> None:
        self.weight = weight
        self.by_columns = batch <= COLUMNS and weight.nbytes >= LARGE
        self.columns = np.empty((batch, weight.shape[1]), weight.dtype)
        self.results = np.empty((batch, weight.shape[0]), weight.dtype)

    def __call__(self, state: Array, out: Array) -> None:
        if not self.by_columns:
            np.matmul(self.weight, state, out=out)
            return
        self.columns[...] = state.T
        for column, result in zip(self.columns, self.results, strict=True):
            np.matmul(self.weight, column, out=result)
        out[...] = self.results.T


def before(start: Array, states: Array, valid: Array | None) -> Array:
    """The state that each step begins with: start (C, B), then states (T, C, B) but the last. 0 for no step."""
    joined: Array = np.concatenate([start[None], states])
    return clear(joined[:-1], valid)
