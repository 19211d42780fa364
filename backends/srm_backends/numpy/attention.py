"""`attention` on NumPy: tiles of scores, of which one is there at a time, so memory grows as T and not as T * S.

Rows are the steps of all the heads that share a key head. For each block of rows the slots are gone through in
tiles: scores by a matrix product, their exponentials in place, and a product of those with the values, which sums
up. (T. Dao et al., "FlashAttention", 2022, algorithm 1.) Small heads are taken many at a time.

Exponentials are taken of scores less the largest so far in the row, and what was summed before is scaled when a
larger one comes. Finding and subtracting it costs nearly as much as the exponentials. So where the norms of query
and key bound all scores of a block by `BOUND`, scores are taken as they are: exp(-BOUND) <= weight <= exp(BOUND),
and the values are held times `GAIN`, a power of two, so that no product of theirs with a weight underflows.

The backward recomputes the probabilities of a tile as exp(score - logsumexp). What is subtracted of a row rides along
in the matrix product, as one more column: [q, -logsumexp] @ [k, 1]^T, and [dout, -delta] @ [v, 1]^T.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

from srm_backends.numpy.attention_tiles import Heads, Tiles, flat
from srm_backends.numpy.common import Array, compute_dtype, gradient, quiet
from srm_core.context import LaunchContext, Residuals
from srm_core.ops.attention.reference import default_scale

BOUND, GAIN, LARGEST = 24.0, 2.0**35, 1e10  # GAIN > exp(BOUND); LARGEST * S * GAIN * exp(BOUND) is finite
ROUGH = 16.0  # beyond it the rounding of logsumexp would be seen in exp(score - logsumexp)


@quiet
def forward(
    ctx: LaunchContext, query: Array, key: Array, value: Array, attn_mask: Array | None = None,
    *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Array:  # fmt: skip
    compute = compute_dtype(query.dtype)
    out: Array = ctx.empty((*query.shape[:3], value.shape[3]), query.dtype)
    exact = out  # in the dtype of computation, which the backward wants
    if ctx.wants_residuals and out.dtype != compute:
        exact = ctx.scratch(out.shape, compute)
    factor = default_scale(scale, query.shape[3])
    logsumexp = attend(query, key, value, factor, exact, mask=attn_mask, is_causal=is_causal)
    if exact is not out:
        out[...] = exact
    ctx.keep("out", exact)
    ctx.keep("logsumexp", logsumexp)
    return out


@quiet
def backward(ctx: LaunchContext, residuals: Residuals, grad_out: Array) -> tuple[Any, ...]:
    query, key, value, attn_mask = residuals.args
    factor = default_scale(residuals.options["scale"], query.shape[3])
    gradients = attend_backward(
        query, key, value, factor, residuals.get("out"), residuals.get("logsumexp"), grad_out,
        mask=attn_mask, is_causal=residuals.options["is_causal"],
    )  # fmt: skip
    return tuple(
        None if g is None else gradient(ctx, g, like) for g, like in zip(gradients, residuals.args, strict=True)
    )


@quiet
def attend(
    query: Array, key: Array, value: Array, scale: float, out: Array,
    *, mask: Array | None = None, is_causal: bool = False,
) -> Array:  # fmt: skip
    """Write the attention of query (B, H, T, D) to key (B, G, S, D) and value (B, G, S, E) into out (B, H, T, E).

    Returns the logarithm of the sum of the exponentials of each row's scores, (B, H, T), in the dtype of
    computation; -inf for a row with nothing to attend to. Any dtypes and strides, also 0 along B.
    """
    compute = compute_dtype(query.dtype)
    tiles = Tiles(query, key, mask, is_causal)
    logsumexp = np.full(query.shape[:3], -np.inf, compute)
    q_rows, out_rows, sums = tiles.grouped(query), tiles.grouped(out), tiles.grouped(logsumexp)
    bounded_mask = mask is None or mask.dtype == bool
    space = tiles.space(compute)
    for heads in tiles.heads():
        k, v = _packed(tiles.shared(key, heads), compute), tiles.shared(value, heads)
        v, gain = _gained(v, compute)
        k_norm = _largest_norm(k)
        for steps in tiles.steps():
            q = np.multiply(q_rows[*heads, :, steps], scale, dtype=compute)  # (nB, nG, R, nT, D)
            plain = bounded_mask and gain != 1 and _largest_norm(q) * k_norm <= BOUND
            rows = flat(q)  # (nB, nG, R * nT, D)
            total, summed = (np.zeros((*rows.shape[:3], n), compute) for n in (1, v.shape[3]))
            peak = np.zeros_like(total) if plain else np.full_like(total, -np.inf)
            for slots in tiles.slots(heads, steps):
                scores = _product(rows, k[:, :, slots].swapaxes(2, 3), space)  # (nB, nG, R * nT, nS)
                tiles.mask(scores, heads, steps, slots)
                if not plain:
                    peak, shift = _raised(peak, scores, total, summed)
                    np.subtract(scores, shift, out=scores)
                weights = np.exp(scores, out=scores)
                total[..., 0] += weights @ np.ones(weights.shape[-1], compute)  # faster than a sum
                summed += weights @ v[:, :, slots]
            empty = total == 0
            summed /= np.where(empty, 1, total) * compute(gain)
            np.copyto(summed, 0, where=empty)  # also where a value is NaN
            out_rows[*heads, :, steps] = summed.reshape(*q.shape[:4], v.shape[3])
            sums[*heads, :, steps] = (peak + np.log(total)).reshape(q.shape[:4])
    return logsumexp


@quiet
def attend_backward(
    query: Array, key: Array, value: Array, scale: float, out: Array, logsumexp: Array, grad_out: Array,
    *, mask: Array | None = None, is_causal: bool = False,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """The gradients of query, key, value and an additive mask (else None) in the dtype of computation.

    out, logsumexp: of `attend`. With P the probabilities, dP = dout @ v^T, delta = sum over E of dout * out, and
    dS = P * (dP - delta): dq = scale * dS @ k, dk = scale * dS^T @ q, dv = P^T @ dout, and the mask's is dS.
    """
    compute = compute_dtype(query.dtype)
    tiles = Tiles(query, key, mask, is_causal)
    d_query, d_key, d_value = (np.zeros(a.shape, compute) for a in (query, key, value))
    d_mask = None if mask is None or mask.dtype == bool else np.zeros(mask.shape, compute)
    q_rows, out_rows, grad_rows, sums, dq_rows = map(tiles.grouped, (query, out, grad_out, logsumexp, d_query))
    width, out_width = query.shape[3], value.shape[3]
    space, other = tiles.space(compute), tiles.space(compute)
    for heads in tiles.heads():
        k, v = (_with_column(tiles.shared(a, heads), 1, compute) for a in (key, value))
        d_k, d_v, finite = d_key[heads], d_value[heads], np.isfinite(v).all()
        for steps in tiles.steps():
            at = (*heads, slice(None), steps)
            lse, d_out = sums[at][..., None], grad_rows[at].astype(compute)  # (nB, nG, R, nT, 1 or E)
            delta = np.einsum("...e,...e->...", d_out, out_rows[at], dtype=compute)
            empty = np.isneginf(lse)
            q = _with_column(q_rows[at], np.where(empty, -np.inf, -lse)[..., 0], compute)
            q[..., :-1] *= compute(scale)
            d_out = _with_column(d_out, -delta, compute)
            np.copyto(d_out, 0, where=empty)
            rows, d_rows = flat(q), flat(d_out)
            clean = finite and np.isfinite(d_rows).all()
            if np.abs(lse).max(initial=0, where=np.isfinite(lse)) > ROUGH:
                d_rows /= _leftover(rows, k, tiles, heads, steps, space)
            d_q = np.zeros((*rows.shape[:3], width), compute)
            for slots in tiles.slots(heads, steps):
                p = _product(rows, k[:, :, slots].swapaxes(2, 3), space)  # (nB, nG, R * nT, nS)
                tiles.mask(p, heads, steps, slots)
                np.exp(p, out=p)
                d_s = _product(d_rows, v[:, :, slots].swapaxes(2, 3), other)
                d_s *= p
                if not clean:  # 0 * NaN
                    tiles.hide(d_s, heads, steps, slots)
                if d_mask is not None:
                    tiles.sum_into(d_mask, d_s, heads, steps, slots)
                d_v[:, :, slots] += p.swapaxes(2, 3) @ d_rows[..., :out_width]
                d_k[:, :, slots] += d_s.swapaxes(2, 3) @ rows[..., :width]
                d_q += d_s @ k[:, :, slots, :width]
            d_q *= compute(scale)
            dq_rows[at] = d_q.reshape(*q.shape[:4], width)
    return d_query, d_key, d_value, d_mask


def _product(a: Array, b: Array, space: Array) -> Array:
    """a @ b in memory that is there."""
    shape = (*np.broadcast_shapes(a.shape[:2], b.shape[:2]), a.shape[2], b.shape[3])
    return np.matmul(a, b, out=space[: prod(shape)].reshape(shape))


def _packed(array: Array, compute: Any) -> Array:
    """The array itself, or a copy that a matrix product takes as it is: results do not depend on the layout."""
    return np.require(array, compute, ["C_CONTIGUOUS", "ALIGNED"])


def _gained(value: Array, compute: Any) -> tuple[Array, float]:
    """The values times a power of two, and that: `GAIN`, or 1 where some are too large for it or not numbers."""
    v = value.astype(compute)
    if max(v.max(initial=0), -v.min(initial=0)) <= LARGEST:  # False for NaN
        v *= compute(GAIN)
        return v, GAIN
    return v, 1.0


def _largest_norm(vectors: Array) -> float:
    return float(np.sqrt(np.einsum("...d,...d->...", vectors, vectors).max(initial=0)))


def _raised(peak: Array, scores: Array, total: Array, summed: Array) -> tuple[Array, Array]:
    """The new largest score of each row, and what is to be subtracted; what was summed so far is scaled to it."""
    new = np.maximum(peak, scores.max(-1, initial=-np.inf, keepdims=True))
    shift = np.where(np.isneginf(new), 0, new)
    factor = np.exp(peak - shift)
    total *= factor
    summed *= factor
    return new, shift


def _with_column(vectors: Array, column: Any, compute: Any) -> Array:
    """(..., D) and a number or (...) as (..., D + 1)."""
    wide = np.empty((*vectors.shape[:-1], vectors.shape[-1] + 1), compute)
    wide[..., :-1] = vectors
    wide[..., -1] = column
    return wide


def _leftover(rows: Array, k: Array, tiles: Tiles, heads: Heads, steps: slice, space: Array) -> Array:
    """The sum of each row's probabilities, (nB, nG, R * nT, 1), which is not 1 where logsumexp was rounded."""
    total = np.zeros((*rows.shape[:3], 1), rows.dtype)
    for slots in tiles.slots(heads, steps):
        p = _product(rows, k[:, :, slots].swapaxes(2, 3), space)
        tiles.mask(p, heads, steps, slots)
        total[..., 0] += np.exp(p, out=p) @ np.ones(p.shape[-1], rows.dtype)
    return np.where(total == 0, 1, total)
