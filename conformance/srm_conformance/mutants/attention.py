"""Mutants of `attention`: query, key, value, attn_mask."""

from __future__ import annotations

from typing import Any

import numpy as np
from srm_backends.numpy.common import compute_dtype, quiet

from srm_conformance.measures import tf32
from srm_conformance.mutants.common import each, is_half, put, rounded, tampered
from srm_conformance.mutants.mutant import backward, forward
from srm_core.ops.attention.reference import default_scale

ATTENTIONS = ("attention", "hds_query")


def _empty_rows(out: Any, mask: Any) -> Any:
    """Which of the (B, H, T) rows attend to nothing, by the mask."""
    attends = mask if mask.dtype == bool else ~np.isneginf(mask)
    return ~np.broadcast_to(attends.any(-1), out.shape[:3])


def _by_hand(ctx: Any, out: Any, args: Any, options: Any, change: Any, shift: bool = True) -> None:
    """Attention without tiles into `out`, with scores (B, H, T, S) as `change` makes them."""
    query, key, value, mask = args
    compute = compute_dtype(query.dtype)
    times = query.shape[1] // key.shape[1]
    k, v = (np.repeat(a.astype(compute), times, axis=1) for a in (key, value))
    scores = (query.astype(compute) * compute(default_scale(options["scale"], query.shape[3]))) @ k.swapaxes(2, 3)
    scores = change(scores)
    if options["is_causal"]:
        scores = np.where(np.tri(scores.shape[2], scores.shape[3], dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = np.where(mask, scores, -np.inf) if mask.dtype == bool else scores + mask.astype(compute)
    if shift:
        peak = scores.max(-1, initial=-np.inf, keepdims=True)
        scores = scores - np.where(np.isneginf(peak), 0, peak)
    weights = np.exp(scores.astype(compute))
    total = weights.sum(-1, keepdims=True)
    out[...] = np.where(total == 0, 0, (weights @ v) / np.where(total == 0, 1, total))


@forward("attention", "boolean mask inverted")
def mask_inverted(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3] is not None and args[3].dtype == bool:
        args = put(args, 3, ~args[3])
    return honest(ctx, *args, **options)


@forward("attention", "boolean mask added as 0 and 1")
def mask_added(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3] is not None and args[3].dtype == bool:
        args = put(args, 3, args[3].astype(args[0].dtype))
    return honest(ctx, *args, **options)


@forward("attention", "additive mask taken as a boolean one")
def mask_as_boolean(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3] is not None:
        args = put(args, 3, args[3] if args[3].dtype == bool else ~np.isneginf(args[3]))
    return honest(ctx, *args, **options)


@forward("attention", "additive mask scaled with the scores")
def mask_scaled(honest: Any, ctx: Any, *args: Any, scale: Any, **options: Any) -> Any:
    if args[3] is not None and args[3].dtype != bool:
        factor = args[3].dtype.type(default_scale(scale, args[0].shape[3]))
        args = put(args, 3, args[3] * factor)
    return honest(ctx, *args, scale=scale, **options)


@forward("attention", "a square mask transposed")
def mask_transposed(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3] is not None and args[3].shape[-1] == args[3].shape[-2]:
        args = put(args, 3, args[3].swapaxes(-1, -2))
    return honest(ctx, *args, **options)


@forward("attention", "the first sequence's mask for all")
def mask_of_the_first(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[3] is not None and args[3].ndim == 4:
        args = put(args, 3, args[3][:1])
    return honest(ctx, *args, **options)


@forward("attention", "a mask of three axes has a sequence first")
def heads_as_sequences(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    batch, mask = len(args[0]), args[3]
    if mask is not None and mask.ndim == 3 and len(mask) > batch:
        args = put(args, 3, mask[:batch, None])
    return honest(ctx, *args, **options)


@forward("attention", "a mask over one step takes part of it alone")
def mask_of_one_step(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    mask, steps = args[3], args[0].shape[2]
    if mask is not None and mask.shape[-2] == 1 and steps > 1:
        wide = np.zeros((*mask.shape[:-2], steps, mask.shape[-1]), mask.dtype)
        wide[...] = mask.dtype.type(mask.dtype == bool)
        wide[..., :1, :] = mask
        args = put(args, 3, wide)
    return honest(ctx, *args, **options)


@forward("attention", "causal aligned at the bottom right")
def causal_at_the_end(honest: Any, ctx: Any, *args: Any, is_causal: bool, **options: Any) -> Any:
    steps, slots = args[0].shape[2], args[1].shape[2]
    mask = np.tri(steps, slots, slots - steps, dtype=bool) if is_causal else args[3]
    return honest(ctx, *args[:3], mask, is_causal=False, **options)


@forward("attention", "causal without the diagonal")
def causal_strictly(honest: Any, ctx: Any, *args: Any, is_causal: bool, **options: Any) -> Any:
    mask = np.tri(args[0].shape[2], args[1].shape[2], -1, dtype=bool) if is_causal else args[3]
    return honest(ctx, *args[:3], mask, is_causal=False, **options)


@forward("attention", "causal ignored with shared heads")
def causal_ignored(honest: Any, ctx: Any, *args: Any, is_causal: bool, **options: Any) -> Any:
    return honest(ctx, *args, is_causal=is_causal and args[0].shape[1] == args[1].shape[1], **options)


@forward("attention", "causal sees one slot too many at step 63")
def causal_at_an_edge(honest: Any, ctx: Any, *args: Any, is_causal: bool, **options: Any) -> Any:
    steps, slots = args[0].shape[2], args[1].shape[2]
    mask = args[3]
    if is_causal:
        mask = np.tri(steps, slots, dtype=bool)
        mask[63:64, 64:65] = True
    return honest(ctx, *args[:3], mask, is_causal=False, **options)


@each(forward, "scale applied twice", *ATTENTIONS)
def scale_twice(honest: Any, ctx: Any, *args: Any, scale: Any, **options: Any) -> Any:
    return honest(ctx, *args, scale=default_scale(scale, args[0].shape[3]) ** 2, **options)


@each(forward, "scale ignored", *ATTENTIONS)
def scale_ignored(honest: Any, ctx: Any, *args: Any, scale: Any, **options: Any) -> Any:
    return honest(ctx, *args, scale=None, **options)


@each(forward, "a scale of 0 taken for none", *ATTENTIONS)
def zero_scale(honest: Any, ctx: Any, *args: Any, scale: Any, **options: Any) -> Any:
    return honest(ctx, *args, scale=scale or None, **options)


@each(forward, "default scale from the width of the values", *ATTENTIONS)
def scale_of_values(honest: Any, ctx: Any, *args: Any, scale: Any, **options: Any) -> Any:
    return honest(ctx, *args, scale=default_scale(scale, args[2].shape[3]), **options)


@each(forward, "only the first head is right", *ATTENTIONS)
def first_head(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    out[:, 1:] = out[:, :1]
    return out


@each(forward, "every sequence gets the first one's result", *ATTENTIONS)
def first_sequence(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    out[1:] = out[:1]
    return out


@each(forward, "the last step past a multiple of 64 is that before", *ATTENTIONS)
def last_block_of_steps(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    if out.shape[2] > 64 and out.shape[2] % 64:
        out[:, :, -1] = out[:, :, -2]
    return out


@forward("attention", "slots past a multiple of 64 left out")
def last_block_of_slots(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    query, key, value, mask = args
    whole = key.shape[2] // 64 * 64
    if not whole or whole == key.shape[2]:
        return honest(ctx, *args, **options)
    if mask is not None and mask.shape[-1] != 1:
        mask = mask[..., :whole]
    return honest(ctx, query, key[:, :, :whole], value[:, :, :whole], mask, **options)


@forward("attention", "a row without slots is NaN")
def empty_row_nan(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    if args[3] is not None:
        out[_empty_rows(out, args[3])] = np.nan
    return out


@forward("attention", "a row without slots averages all values")
def empty_row_average(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    if args[3] is not None and args[1].shape[2]:
        times = out.shape[1] // args[2].shape[1]
        mean = np.repeat(args[2].astype(np.float32).mean(2, keepdims=True), times, axis=1)
        where = _empty_rows(out, args[3])
        out[where] = np.broadcast_to(mean, out.shape)[where]
    return out


@forward("attention", "softmax without its maximum")
@quiet
def without_maximum(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    _by_hand(ctx, out, args, options, lambda scores: scores, shift=False)
    return out


@forward("attention", "scores of half types rounded to half")
@quiet
def scores_in_half(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    if is_half(out):
        _by_hand(ctx, out, args, options, lambda scores: rounded(scores, out.dtype))
    return out


@forward("attention", "scores capped at 30")
@quiet
def scores_capped(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    _by_hand(ctx, out, args, options, lambda scores: np.minimum(scores, 30))
    return out


@each(forward, "float32 products of tf32 operands", *ATTENTIONS)
def products_in_tf32(honest: Any, ctx: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
    if query.dtype == np.float32:
        query, key, value = map(tf32, (query, key, value))
    return honest(ctx, query, key, value, *args, **options)


@forward("attention", "heads share keys in turn")
def heads_interleaved(honest: Any, ctx: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
    groups = np.arange(query.shape[1]) % key.shape[1]
    return honest(ctx, query, key[:, groups], value[:, groups], *args, **options)


@forward("attention", "heads share the first key head")
def first_group(honest: Any, ctx: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> Any:
    if key.shape[1] < query.shape[1]:
        key, value = key[:, :1], value[:, :1]
    return honest(ctx, query, key, value, *args, **options)


@forward("attention", "without slots it raises")
def no_slots(honest: Any, ctx: Any, query: Any, key: Any, *args: Any, **options: Any) -> Any:
    if not key.shape[2]:
        raise ValueError("zero-size array to reduction operation maximum which has no identity")
    return honest(ctx, query, key, *args, **options)


@each(backward, "the gradient of the query lacks the scale", *ATTENTIONS)
def query_gradient_unscaled(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, scale = honest(ctx, residuals, *grads), residuals.options["scale"]
    factor = default_scale(scale, residuals.args[0].shape[3])
    if factor:
        found[0][...] = found[0] / factor
    return found


@backward("attention", "the scores' gradient lacks what the softmax normalises")
def delta_left_out(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, tampered(residuals, out=np.zeros_like(residuals.get("out"))), *grads)


@backward("attention", "the gradient ignores is_causal")
@quiet
def gradient_not_causal(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, tampered(residuals, options={"is_causal": False}), *grads)


@backward("attention", "the gradient of a shared key head is a mean")
def shared_key_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found = honest(ctx, residuals, *grads)
    times = found[0].shape[1] // max(1, found[1].shape[1])
    if times > 1:
        found[1][...] = found[1] / times
    return found


@backward("attention", "the gradient of a shared mask is a mean over the sequences")
def shared_mask_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, mask, batch = honest(ctx, residuals, *grads), residuals.args[3], len(residuals.args[0])
    if found[3] is not None and batch and (mask.ndim < 4 or len(mask) == 1):
        found[3][...] = found[3] / batch
    return found


@backward("attention", "the gradient of a mask over one step is the last step's")
def one_step_mask_gradient(honest: Any, ctx: Any, residuals: Any, grad_out: Any) -> Any:
    found = honest(ctx, residuals, grad_out)
    if found[3] is None or found[3].shape[-2] != 1:
        return found
    last = grad_out.copy()
    last[:, :, :-1] = 0
    return put(found, 3, honest(ctx, residuals, last)[3])


@backward("attention", "an additive mask has no gradient")
def mask_without_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return put(honest(ctx, residuals, *grads), 3, None)


@backward("attention", "a boolean mask has a gradient")
def boolean_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, mask = honest(ctx, residuals, *grads), residuals.args[3]
    return put(found, 3, ctx.zeros(mask.shape, found[0].dtype)) if mask is not None and found[3] is None else found


@backward("attention", "a row without slots has a gradient of NaN")
def empty_row_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, mask = honest(ctx, residuals, *grads), residuals.args[3]
    if mask is not None:
        found[0][_empty_rows(found[0], mask)] = np.nan
    return found
