"""Scaled dot-product attention, head by head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from srm_core.ops.common import Array, Rounding, exact, product, sum_to

PROBABILITIES, SCORE_GRADIENTS, OUT = "probabilities", "score gradients", "out"


def default_scale(scale: float | None, width: int) -> float:
    """None stands for 1 / sqrt(D); where D is 0 every score is 0, whatever the scale."""
    return max(width, 1) ** -0.5 if scale is None else scale


def reference(
    compute: Any, query: Array, key: Array, value: Array, attn_mask: Array | None = None,
    *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, rounding: Rounding = exact,
) -> tuple[Array]:  # fmt: skip
    """out = softmax(scale * query @ key^T + mask) @ value, the softmax over the slots that a step attends to.

    A step that attends to none gives 0. (A. Vaswani et al., "Attention is all you need", 2017, eq. 1.)
    """
    out = np.zeros((*query.shape[:3], value.shape[3]), compute)
    for b, h, g in _heads(query, key):
        q, k, v = (a.astype(compute) for a in (query[b, h], key[b, g], value[b, g]))
        mask = _mask(attn_mask, b, h, query, key)
        weights, total, _ = _softmax(rounding, q, k, mask, is_causal, default_scale(scale, query.shape[3]))
        out[b, h] = _average(rounding, weights, total, v)
    return (out,)


def vjp(
    compute: Any, grads: tuple[Array], query: Array, key: Array, value: Array, attn_mask: Array | None = None,
    *, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, rounding: Rounding = exact,
) -> tuple[Array, Array, Array, Array | None]:  # fmt: skip
    """With P the probabilities, S the scores and dP = dout @ value^T: dS = P * (dP - (dout * out summed over E)).

    dquery = scale * dS @ key; dkey = scale * dS^T @ query; dvalue = P^T @ dout; the mask's gradient is dS, summed to
    its shape.
    """
    grad_out = grads[0].astype(compute)
    scale = default_scale(scale, query.shape[3])
    d_query, d_key, d_value = (np.zeros(a.shape, compute) for a in (query, key, value))
    d_scores = np.zeros((*query.shape[:3], key.shape[2]), compute)
    for b, h, g in _heads(query, key):
        q, k, v = (a.astype(compute) for a in (query[b, h], key[b, g], value[b, g]))
        mask, d_out = _mask(attn_mask, b, h, query, key), grad_out[b, h]
        weights, total, attends = _softmax(rounding, q, k, mask, is_causal, scale)
        p, out = np.where(attends, weights / total, 0), _average(rounding, weights, total, v)
        delta = (d_out * rounding(OUT, out)).sum(1, keepdims=True)
        d_s = np.where(attends, p * (product(rounding, d_out, v.T) - delta), 0)
        d_scores[b, h] = d_s
        d_value[b, g] += product(rounding, rounding(PROBABILITIES, p).T, d_out)
        d_s = rounding(SCORE_GRADIENTS, d_s)
        d_query[b, h] = scale * product(rounding, d_s, k)
        d_key[b, g] += scale * product(rounding, d_s.T, q)
    additive = attn_mask is not None and attn_mask.dtype != bool
    return d_query, d_key, d_value, sum_to(d_scores, attn_mask.shape) if additive else None  # type: ignore[union-attr]


def _heads(query: Array, key: Array) -> Iterator[tuple[int, int, int]]:
    """(b, h, g): each head of each sequence, and the head of key and value that it attends to."""
    batch, heads = query.shape[:2]
    for b in range(batch):
        for h in range(heads):
            yield b, h, h // (heads // key.shape[1])


def _mask(attn_mask: Array | None, b: int, h: int, query: Array, key: Array) -> Array | None:
    """The mask of one head, (T, S)."""
    return None if attn_mask is None else np.broadcast_to(attn_mask, (*query.shape[:3], key.shape[2]))[b, h]


def _softmax(
    rounding: Rounding, q: Array, k: Array, mask: Array | None, is_causal: bool, scale: float
) -> tuple[Array, Array, Array]:
    """(weights (T, S), their total (T, 1), where a step attends (T, S)): the probabilities are weights / total.

    The largest weight of a row is 1, and the total of a row without any is given as 1.
    """
    scores = scale * product(rounding, q, k.T)
    attends = np.ones(scores.shape, bool)
    if is_causal:
        attends &= np.arange(len(q))[:, None] >= np.arange(len(k))
    if mask is not None and mask.dtype == bool:
        attends &= mask
    elif mask is not None:
        scores = scores + mask.astype(scores.dtype)
    scores = np.where(attends, scores, -np.inf)
    peak = scores.max(axis=1, keepdims=True, initial=-np.inf)
    attends &= peak != -np.inf
    weights = np.where(attends, np.exp(scores - np.where(peak == -np.inf, 0, peak)), 0)
    total = np.where(peak == -np.inf, 1, weights.sum(1, keepdims=True))
    return weights, total, attends


def _average(rounding: Rounding, weights: Array, total: Array, v: Array) -> Array:
    """The mean of the values (S, E) by their weights; 0 for a row without any."""
    mean = product(rounding, rounding(PROBABILITIES, weights), v) / total
    return np.where(weights.any(1, keepdims=True), mean, 0)
