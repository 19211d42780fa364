"""s_t = g_t * s_{t-1} + x_t over (B, T, C), the loop that `scan` and `recurrent_mix` share.

Two forms. *Serial*: one row (B, C) a step, in chunks of time that are first made contiguous, because NumPy
works fast on contiguous rows only. *Blocked*, where a row is too short to pay for a NumPy call: time is cut
into N blocks that advance together, once to find what each block does to a state (its product of gates P
and its end from zero E), then, after the N states between the blocks are known, once more for the values.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

CHUNK = 32  # steps made contiguous at once: 2 * 32 rows stay in the cache, and one copy serves many steps
BLOCK = 32  # steps in a block
ROW = 512  # rows of at most this many elements take the blocked form, if there are
STEPS = 256  # at least this many steps
FAINT = 1e-200  # a float64 product below this may have lost what a later large state would bring back


def compute_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for everything else."""
    return np.float64 if dtype == np.float64 else np.float32


def linear_recurrence(gates: Array, tokens: Array | None, state: Array, out: Array) -> Array:
    """Write s_t into out (B, T, C) and return the last state (B, C) in the dtype of `state`.

    gates: (B or 1, T, C or 1), or (B or 1, 1, C or 1) if constant in time. tokens: (B, T, C), or None for 0.
    state: s_{-1}, (B, C), in the dtype to compute in. `out` may be `tokens`. Any strides.
    """
    batch, steps, width = out.shape
    if steps == 0 or out.size == 0:
        return state.copy()
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if batch * width <= ROW and steps >= STEPS:
            last = _blocked(gates, tokens, state, out)
            if last is not None:
                return last
        return _serial(gates, tokens, state, out)


def _serial(gates: Array, tokens: Array | None, state: Array, out: Array) -> Array:
    batch, steps, width = out.shape
    constant = gates.shape[1] == 1
    rows = np.empty((CHUNK, batch, width), state.dtype)
    fixed = gates[:, 0].astype(state.dtype)
    varying = np.empty((CHUNK, batch, width), state.dtype)
    tokens_c = np.empty_like(rows)
    for t in range(0, steps, CHUNK):
        n = min(CHUNK, steps - t)
        if not constant:
            varying[:n] = gates[:, t : t + n].swapaxes(0, 1)
        if tokens is not None:
            tokens_c[:n] = tokens[:, t : t + n].swapaxes(0, 1)
        for i in range(n):
            np.multiply(fixed if constant else varying[i], state, rows[i])
            if tokens is not None:
                np.add(rows[i], tokens_c[i], rows[i])
            state = rows[i]
        out[:, t : t + n] = rows[:n].swapaxes(0, 1)
        state = state.copy()  # the next chunk writes over it
    return state


def _blocked(gates: Array, tokens: Array | None, state: Array, out: Array) -> Array | None:
    """The same, or None where the detour over products could differ from the plain loop."""
    batch, steps, width = out.shape
    blocks = steps // BLOCK
    whole = blocks * BLOCK

    def cut(a: Array) -> Array:  # (B, T, C) -> (K, B, N, C), contiguous
        parts = a[:, :whole].reshape(a.shape[0], blocks, BLOCK, a.shape[2]).transpose(2, 0, 1, 3)
        return np.ascontiguousarray(parts, state.dtype)

    if gates.shape[1] == 1:
        g = np.broadcast_to(gates[:, 0].astype(state.dtype)[None, :, None], (BLOCK, gates.shape[0], 1, gates.shape[2]))
    else:
        g = cut(gates)
    x = None if tokens is None else cut(tokens)

    # Products and ends in float64: for float32 that is range enough, and no rounding of their own.
    product = g[0].astype(np.float64)
    end = np.zeros((batch, blocks, width)) if x is None else x[0].astype(np.float64)
    for k in range(1, BLOCK):
        product *= g[k]
        if x is not None:
            end *= g[k]
            end += x[k]
    if not (np.isfinite(product).all() and np.isfinite(end).all()):
        return None
    if state.dtype == np.float64 and (np.abs(product) < FAINT).any():
        return None

    between = np.empty((batch, blocks, width))  # the state before each block
    between[:, 0] = state
    per_block = product if gates.shape[1] == 1 else product[:, :-1]
    linear_recurrence(per_block, end[:, :-1], between[:, 0].copy(), between[:, 1:])
    if not (np.abs(between) <= np.finfo(state.dtype).max).all():
        return None

    s = between.astype(state.dtype)
    rows = np.empty((BLOCK, batch, blocks, width), state.dtype)
    for k in range(BLOCK):
        np.multiply(g[k], s, rows[k])
        if x is not None:
            np.add(rows[k], x[k], rows[k])
        s = rows[k]
    out[:, :whole].reshape(batch, blocks, BLOCK, width)[...] = rows.transpose(1, 2, 0, 3)
    last = rows[-1, :, -1].copy()
    if whole == steps:
        return last
    rest = gates if gates.shape[1] == 1 else gates[:, whole:]
    return _serial(rest, None if tokens is None else tokens[:, whole:], last, out[:, whole:])
