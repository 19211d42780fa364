"""`mdi_recurrence` in Triton: one launch for the whole sequence. See `sequence` for how programs share it.

    u = sigmoid(h @ w_gate.T + b_gate); g = sigmoid([z[t], h] @ w_mdi.T + b_mdi)
    n = (1 - g) h + g z[t] + gamma[t] h; h = z[t] u + gamma[t] h + mix n

The products of z are one large matrix product before the loop; those of h have the weights of both gates one above the
other. The backward is built as that of `lstm` is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.common import sigmoid
from srm_backends.triton.products import gradient_of_weights, multiply
from srm_backends.triton.sequence import (
    begin,
    columns_of,
    dense,
    first_state,
    held_order,
    hold,
    new_words,
    place,
    plan,
    run,
    slot_of,
    times,
    told,
    two_apart,
    two_together,
    within,
    word,
)
from srm_core.context import LaunchContext, Residuals


@triton.jit
def _inputs(z, gamma, of_z, t, row, n, T, H, zb, zt, zd, cb, ct, cd, length, there):
    """What a step reads: z and gamma within the lengths, and the products of z."""
    now, far = row * 0 + t, n.to(tl.int64)[None, :]
    inside = there & (t < length)[:, None]
    x = tl.load(z + (row * zb + now * zt)[:, None] + far * zd, inside, other=0)
    decay = tl.load(gamma + (row * cb + now * ct)[:, None] + far * cd, inside, other=0)
    g = tl.load(of_z + (row * T + t)[:, None] * H + n[None, :], there, other=0)
    return x.to(tl.float32), decay.to(tl.float32), g


@triton.jit(do_not_specialize=["first", "last", "row0", "mix"])
def mdi_recurrence_forward(
    z, gamma, of_z, weight, b_gate, b_mdi, lengths, words, h_state, y, states, first, last, row0, mix,
    tiles, B, T, H, wn, wk, zb, zt, zd, cb, ct, cd,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, HELD: tl.constexpr, ALONE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Steps first ... last - 1. of_z (B, T, H): the products of z. h_state (B, H): the state, in float32, read and
    written. y (B, T, H). With KEEP states (B, T, H) are those before each step."""
    DTYPE: tl.constexpr = weight.dtype.element_ty
    row, n, of_n, there, at, length = place(tl.program_id(0), lengths, row0, tiles, B, T, H, ROWS, UNITS)
    h = tl.load(h_state + at, there, other=0)
    bias_u = tl.load(b_gate + n, of_n, other=0).to(tl.float32)[None, :]
    bias_g = tl.load(b_mdi + n, of_n, other=0).to(tl.float32)[None, :]
    column, of_column = columns_of(tl.program_id(0) % tiles, H, 2 * UNITS, 2, SPLIT == 0)
    held = 0
    if HELD:
        held = hold(weight, tl.arange(0, BLOCK_K), column, of_column, wk, wn, H, BLOCK_K, SPLIT)
    ahead = _inputs(
        z, gamma, of_z, first, row, n, T, H, zb, zt, zd, cb, ct, cd, length, there & (first < last)
    )  # fmt: skip
    for t in range(first, last):
        step = (row * T + t)[:, None] * H + n[None, :]
        running = (t < length)[:, None]
        x, decay, g = ahead
        # Read a step ahead: whatever comes from far off is there when it is needed.
        ahead = _inputs(
            z, gamma, of_z, t + 1, row, n, T, H, zb, zt, zd, cb, ct, cd, length, there & (t + 1 < last)
        )  # fmt: skip
        if ALONE:
            sums = times(h.to(DTYPE), held, ROWS, BLOCK_K, SPLIT, PRECISION)
        else:
            sums = told(
                words, row, B, t, held, weight, column, of_column, wk, wn, H,
                ROWS, BLOCK_K, SPLIT, HELD, TOGETHER, PRECISION,
            )  # fmt: skip
        of_u, of_g = two_apart(sums, ROWS, UNITS, SPLIT == 0)
        u, g = sigmoid(of_u + bias_u), sigmoid(g + of_g + bias_g)
        if KEEP:
            tl.store(states + step, tl.where(running, h, 0).to(states.dtype.element_ty), there)
        mixed = (1 - g) * h + g * x + decay * h
        # Outside it stays 0, whatever its products are.
        h = tl.where(running & there, x * u + decay * h + mix * mixed, h)
        tl.store(y + step, tl.where(running, h, 0).to(y.dtype.element_ty), there)
        if not ALONE:
            slot = slot_of(words, t + 1, B, H)
            tl.store(slot + at, word(h.to(DTYPE), t + 1, DTYPE == tl.float32), there)
    tl.store(h_state + at, h, there)


@triton.jit
def _results(of_h, states, grad_y, t, row, n, T, H, length, there):
    """What the backward reads of a step beside: the products of h, for u and g, h itself, the gradient of y."""
    at = (row * T + t)[:, None]
    inside = there & (t < length)[:, None]
    u = tl.load(of_h + at * 2 * H + n[None, :], there, other=0)
    g = tl.load(of_h + at * 2 * H + H + n[None, :], there, other=0)
    before = tl.load(states + at * H + n[None, :], inside, other=0)
    grad = tl.load(grad_y + at * H + n[None, :], inside, other=0)
    return u, g, before, grad.to(tl.float32)


@triton.jit(do_not_specialize=["first", "last", "row0", "mix"])
def mdi_recurrence_backward(
    z, gamma, of_z, of_h, weight, b_gate, b_mdi, lengths, words, states, grad_y, d_h_state, d_z, d_gamma, d_gates,
    first, last, row0, mix, tiles, B, T, H, wn, wk, zb, zt, zd, cb, ct, cd,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, HELD: tl.constexpr, ALONE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Steps T - 1 - first, ... down to T - last. of_h (B, T, 2H): the products of the states. d_h_state (B, H): the
    gradient of the state, read and written. d_z (B, T, H): but for its part through the gate g. d_gates (B, T, 2H):
    of u and g before their sigmoids."""
    DTYPE: tl.constexpr = weight.dtype.element_ty
    WIDE: tl.constexpr = DTYPE == tl.float32
    row, n, of_n, there, at, length = place(tl.program_id(0), lengths, row0, tiles, B, T, H, ROWS, UNITS)
    d_h = tl.load(d_h_state + at, there, other=0)
    bias_u = tl.load(b_gate + n, of_n, other=0).to(tl.float32)[None, :]
    bias_g = tl.load(b_mdi + n, of_n, other=0).to(tl.float32)[None, :]
    held = 0
    if HELD:
        if ALONE:
            depth, of_depth = columns_of(0, H, BLOCK_K, 2, False)
            depth = tl.where(of_depth, depth, 2 * H)
        else:
            depth = tl.arange(0, BLOCK_K)
        held = hold(weight, depth, n, of_n, wn, wk, 2 * H, BLOCK_K, SPLIT)
    t = T - 1 - first
    some = there & (first < last)
    ahead = _inputs(z, gamma, of_z, t, row, n, T, H, zb, zt, zd, cb, ct, cd, length, some)
    after = _results(of_h, states, grad_y, t, row, n, T, H, length, some)
    for back in range(first, last):
        t = T - 1 - back
        step = (row * T + t)[:, None] * H + n[None, :]
        of_gates = (row * T + t)[:, None] * 2 * H + n[None, :]
        running = (t < length)[:, None]
        inside = there & running
        x, decay, g = ahead
        u, of_g, before, grad = after
        some = there & (back + 1 < last)
        ahead = _inputs(z, gamma, of_z, t - 1, row, n, T, H, zb, zt, zd, cb, ct, cd, length, some)
        after = _results(of_h, states, grad_y, t - 1, row, n, T, H, length, some)
        u, g = sigmoid(u + bias_u), sigmoid(g + of_g + bias_g)
        if not ALONE:
            if back > 0:
                sums = told(
                    words, row, B, back - 1, held, weight, n, of_n, wn, wk, 2 * H,
                    ROWS, BLOCK_K, SPLIT, HELD, TOGETHER, PRECISION,
                )  # fmt: skip
                d_h = tl.where((t + 1 < length)[:, None], d_h + sums, d_h)
        e = d_h + grad
        d_n = mix * e
        d_u = tl.where(inside, e * x * u * (1 - u), 0).to(DTYPE)
        d_g = tl.where(inside, d_n * (x - before) * g * (1 - g), 0).to(DTYPE)
        if not ALONE:
            slot = slot_of(words, back, B, 2 * H) + row[:, None] * 2 * H + n[None, :]
            tl.store(slot, word(d_u, back, WIDE), there)
            tl.store(slot + H, word(d_g, back, WIDE), there)
        direct = e * decay + d_n * (1 - g + decay)
        if ALONE:
            direct += times(two_together(d_u, d_g, ROWS, UNITS), held, ROWS, BLOCK_K, SPLIT, PRECISION)
        d_h = tl.where(running, direct, d_h)
        tl.store(d_gates + of_gates, d_u, there)
        tl.store(d_gates + of_gates + H, d_g, there)
        tl.store(d_z + step, tl.where(running, e * u + d_n * g, 0), there)
        tl.store(d_gamma + step, tl.where(running, (e + d_n) * before, 0).to(d_gamma.dtype.element_ty), there)
    if not ALONE:
        if TOGETHER or first == T:
            sums = told(
                words, row, B, T - 1, held, weight, n, of_n, wn, wk, 2 * H,
                ROWS, BLOCK_K, SPLIT, HELD, TOGETHER, PRECISION,
            )  # fmt: skip
            d_h = tl.where((length > 0)[:, None], d_h + sums, d_h)
    tl.store(d_h_state + at, d_h, there)


def _weights(w_gate: Tensor, w_mdi: Tensor) -> tuple[Tensor, Tensor]:
    """(what multiplies the state: w_gate over w_mdi's second half, (2D, D); what multiplies z, (D, D))."""
    width = len(w_gate)
    return torch.cat([w_gate, w_mdi[:, width:]]), w_mdi[:, :width]


def forward(
    ctx: LaunchContext, z: Tensor, gamma: Tensor, h0: Tensor, w_gate: Tensor, b_gate: Tensor, w_mdi: Tensor,
    b_mdi: Tensor, *, mix: float, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, steps, width = z.shape
    h = first_state(ctx, h0, (batch, width))
    y = ctx.empty(z.shape, z.dtype)
    states = ctx.empty(z.shape, "float32") if ctx.wants_residuals else None
    ctx.keep("states", states)
    if y.numel():
        weight, of_z = _weights(w_gate, w_mdi)
        how = plan(ctx, batch, width, 2, weight.dtype, False)
        weight = held_order(how, weight, 2)
        words = new_words(ctx, how, h.shape, weight.dtype)
        begin(ctx, words, h, weight)
        tensors = (z, gamma, multiply(ctx, z, of_z.T), weight, *dense(b_gate, b_mdi, lengths), words, h, y, states)
        strides = (*weight.stride(), *z.stride(), *gamma.stride())
        keep = (states is not None,)
        run(ctx, mdi_recurrence_forward, how, strides, tensors, batch, steps, width, strides, keep, scalars=(mix,))
    return y, h.to(h0.dtype)


def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Tensor, grad_h: Tensor) -> tuple[Tensor | None, ...]:
    z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi = residuals.args
    lengths, mix, states = residuals.options["lengths"], residuals.options["mix"], residuals.get("states")
    batch, steps, width = z.shape
    weight, of_z = _weights(w_gate, w_mdi)
    d_h = first_state(ctx, grad_h, (batch, width))
    d_z, d_gamma = ctx.scratch(z.shape, "float32"), ctx.empty(gamma.shape, gamma.dtype)
    d_gates = ctx.scratch((batch, steps, 2 * width), weight.dtype)
    if z.numel():
        products = multiply(ctx, z, of_z.T), multiply(ctx, states.to(weight.dtype), weight.T)
        how = plan(ctx, batch, width, 2, weight.dtype, True)
        words = new_words(ctx, how, (batch, 2 * width), weight.dtype)
        given = (z, gamma, *products, weight, *dense(b_gate, b_mdi, lengths), words, states, grad_y.contiguous())
        tensors = (*given, d_h, d_z, d_gamma, d_gates)
        strides = (*weight.stride(), *z.stride(), *gamma.stride())
        run(
            ctx, mdi_recurrence_backward, how, strides, tensors, batch, steps, width, strides, scalars=(mix,), end=1
        )  # fmt: skip
    of_g = d_gates[:, :, width:]
    d_weight = gradient_of_weights(ctx, d_gates, states.to(weight.dtype), weight)
    d_mdi = torch.cat([gradient_of_weights(ctx, of_g, within(z, lengths), w_mdi), d_weight[width:].to(w_mdi.dtype)], 1)
    d_bias = d_gates.sum((0, 1), dtype=torch.float32)
    return (
        within(d_z.add_(multiply(ctx, of_g, of_z)).to(z.dtype), lengths), d_gamma, d_h.to(h0.dtype),
        d_weight[:width].to(w_gate.dtype), d_bias[:width].to(b_gate.dtype), d_mdi, d_bias[width:].to(b_mdi.dtype),
    )  # fmt: skip
