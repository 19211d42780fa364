"""s_t = g_t * s_{t-1} + x_t over (B, T, C), the loop that `scan` and `recurrent_mix` share.

Two forms. *Serial*: one row (B, C) a step, in chunks of time that are first made contiguous, because NumPy
works fast on contiguous rows only. *Blocked*, where a row is too short to pay for a NumPy call: time is cut
into N blocks that advance together, once to find what each block does to a state (its product of gates P
and its end from zero E), then, after the N states between the blocks are known, once more for the values.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import repeat

import numpy as np

from srm_backends.numpy.common import Array

logger = logging.getLogger(__name__)

CHUNK = 32  # steps made contiguous at once: 2 * 32 rows stay in the cache, and one copy serves many steps
BLOCK = 32  # steps in a block
ROW = 512  # rows of at most this many elements take the blocked form, if there are
STEPS = 256  # at least this many steps
FAINT = 1e-200  # a float64 product below this may have lost what a later large state would bring back


def linear_recurrence(gates: Array, tokens: Array | None, state: Array, out: Array) -> Array:
    """Write s_t into out (B, T, C) and return the last state (B, C) in the dtype of `state`.

    gates: (B or 1, T, C or 1), or (B or 1, 1, C or 1) if constant in time. tokens: (B, T, C), or None for 0.
    state: s_{-1}, (B, C), in the dtype to compute in. `out` may be `tokens`. Any strides.
    """
    batch, steps, width = out.shape
    if steps == 0 or out.size == 0:
        return state.copy()
    last = _blocked(gates, tokens, state, out) if batch * width <= ROW and steps >= STEPS else None
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("recurrence (B, T, C) = %s: %s", out.shape, "serial" if last is None else "blocked")
    return _serial(gates, tokens, state, out) if last is None else last


def _serial(gates: Array, tokens: Array | None, state: Array, out: Array) -> Array:
    batch, steps, width = out.shape
    constant = gates.shape[1] == 1
    fixed = repeat(gates[:, 0].astype(state.dtype))
    if batch == 1 and all(a is None or a.dtype == state.dtype for a in (gates, tokens, out)):
        # A step is one contiguous row already.
        factors = fixed if constant else gates.swapaxes(0, 1)
        return advance(factors, None if tokens is None else tokens.swapaxes(0, 1), state, out.swapaxes(0, 1)).copy()
    rows = np.empty((CHUNK, batch, width), state.dtype)  # a step's gates, then its states
    added = np.empty_like(rows)
    for t in range(0, steps, CHUNK):
        n = min(CHUNK, steps - t)
        if not constant:
            rows[:n] = gates[:, t : t + n].swapaxes(0, 1)
        if tokens is not None:
            added[:n] = tokens[:, t : t + n].swapaxes(0, 1)
        state = advance(fixed if constant else rows, None if tokens is None else added, state, rows[:n])
        out[:, t : t + n] = rows[:n].swapaxes(0, 1)
        state = state.copy()  # the next chunk writes over it
    return state


def advance(factors: Iterable[Array], added: Array | None, state: Array, rows: Array) -> Array:
    """rows[i] = factors[i] * state + added[i], each row the next one's state; `rows` may be either of the others."""
    if added is None:
        for factor, row in zip(factors, rows, strict=False):
            np.multiply(factor, state, row)
            state = row
        return state
    product = np.empty_like(state)
    for factor, term, row in zip(factors, added, rows, strict=False):
        np.multiply(factor, state, product)
        np.add(product, term, row)
        state = row
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

    # Products and ends in float64: for float32 that is range enough, and no rounding of their own. For float64
    # a product's error must not be the same one in every block, where it would add up instead of averaging out.
    alike = gates.shape[1] == 1 and state.dtype == np.float64
    product = g[0].astype(np.longdouble) ** BLOCK if alike else g[0].astype(np.float64)
    end = np.zeros((batch, blocks, width)) if x is None else x[0].astype(np.float64)
    for k in range(1, BLOCK):
        if not alike:
            product *= g[k]
        if x is not None:
            end *= g[k]
            end += x[k]
    if not (np.isfinite(product).all() and np.isfinite(end).all()):
        return None
    if state.dtype == np.float64 and (np.abs(product) < FAINT).any():
        return None

    between = np.empty((batch, blocks, width), product.dtype)  # the state before each block
    between[:, 0] = state
    per_block = product if gates.shape[1] == 1 else product[:, :-1]
    carry = _serial if alike else linear_recurrence
    carry(per_block, end[:, :-1], between[:, 0].copy(), between[:, 1:])
    if not (np.abs(between) <= np.finfo(state.dtype).max).all():
        return None

    rows = np.empty((BLOCK, batch, blocks, width), state.dtype)
    advance(g, x, between.astype(state.dtype), rows)
    out[:, :whole].reshape(batch, blocks, BLOCK, width)[...] = rows.transpose(1, 2, 0, 3)
    last = rows[-1, :, -1].copy()
    if whole == steps:
        return last
    rest = gates if gates.shape[1] == 1 else gates[:, whole:]
    return _serial(rest, None if tokens is None else tokens[:, whole:], last, out[:, whole:])
