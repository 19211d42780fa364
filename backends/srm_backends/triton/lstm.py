"""`lstm` in Triton: one launch for the whole sequence. See `sequence` for how programs share it.

    [i, f, g, o] = x[t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh
    c = sigmoid(f) c + sigmoid(i) tanh(g); h = sigmoid(o) tanh(c)

The products of x are one large matrix product before the loop. The backward has the gates of all steps from another
one, of the states that the forward kept, goes through the steps for the gradients of the gates, and ends with large
products for those of the weights.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.common import sigmoid, state_dtype, tanh
from srm_backends.triton.products import gradient_of_weights, multiply
from srm_backends.triton.sequence import (
    begin,
    columns_of,
    dense,
    first_state,
    four_apart,
    four_together,
    held_order,
    hold,
    new_words,
    place,
    plan,
    run,
    slot_of,
    times,
    told,
    within,
    word,
)
from srm_core.context import LaunchContext, Residuals


@triton.jit
def _bias(one, other, gate, n, H, there):
    """The sum of both biases, of a gate's units n; either may be None."""
    bias = tl.zeros(n.shape, tl.float32)
    if one is not None:
        bias += tl.load(one + gate * H + n, there, other=0).to(tl.float32)
    if other is not None:
        bias += tl.load(other + gate * H + n, there, other=0).to(tl.float32)
    return bias[None, :]


@triton.jit
def _four(products, at, H, there):
    """The products of a step, (rows, units) for each of the gates."""
    i = tl.load(products + at, there, other=0)
    f = tl.load(products + at + H, there, other=0)
    g = tl.load(products + at + 2 * H, there, other=0)
    o = tl.load(products + at + 3 * H, there, other=0)
    return i, f, g, o


@triton.jit(do_not_specialize=["first", "last", "row0"])
def lstm_forward(
    given, weight, b_ih, b_hh, lengths, words, h_state, c_state, y, states, cells, first, last, row0,
    tiles, B, T, H, wn, wk,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, HELD: tl.constexpr, ALONE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Steps first ... last - 1. given (B, T, 4H): the products of x. h_state, c_state (B, H): the state, in float32,
    read and written. y (B, T, H). With KEEP states and cells (B, T, H) are those before each step."""
    DTYPE: tl.constexpr = weight.dtype.element_ty
    row, n, of_n, there, at, length = place(tl.program_id(0), lengths, row0, tiles, B, T, H, ROWS, UNITS)
    h = tl.load(h_state + at, there, other=0)
    c = tl.load(c_state + at, there, other=0)
    bias_i, bias_f = _bias(b_ih, b_hh, 0, n, H, of_n), _bias(b_ih, b_hh, 1, n, H, of_n)
    bias_g, bias_o = _bias(b_ih, b_hh, 2, n, H, of_n), _bias(b_ih, b_hh, 3, n, H, of_n)
    column, of_column = columns_of(tl.program_id(0) % tiles, H, 4 * UNITS, 4, SPLIT == 0)
    held = 0
    if HELD:
        held = hold(weight, tl.arange(0, BLOCK_K), column, of_column, wk, wn, H, BLOCK_K, SPLIT)
    i, f, g, o = _four(given, (row * T + first)[:, None] * 4 * H + n[None, :], H, there & (first < last))
    for t in range(first, last):
        step = (row * T + t)[:, None] * H + n[None, :]
        # Read a step ahead: whatever comes from far off is there when it is needed.
        ahead = _four(given, (row * T + t + 1)[:, None] * 4 * H + n[None, :], H, there & (t + 1 < last))
        if ALONE:
            sums = times(h.to(DTYPE), held, ROWS, BLOCK_K, SPLIT, PRECISION)
        else:
            sums = told(
                words, row, B, t, held, weight, column, of_column, wk, wn, H,
                ROWS, BLOCK_K, SPLIT, HELD, TOGETHER, PRECISION,
            )  # fmt: skip
        of_i, of_f, of_g, of_o = four_apart(sums, ROWS, UNITS, SPLIT == 0)
        running = (t < length)[:, None]
        if KEEP:
            tl.store(states + step, tl.where(running, h, 0).to(states.dtype.element_ty), there)
            tl.store(cells + step, tl.where(running, c, 0), there)
        new = sigmoid(f + of_f + bias_f) * c + sigmoid(i + of_i + bias_i) * tanh(g + of_g + bias_g)
        c = tl.where(running & there, new, c)  # outside it stays 0, whatever its products are
        h = tl.where(running & there, sigmoid(o + of_o + bias_o) * tanh(c), h)
        tl.store(y + step, tl.where(running, h, 0).to(y.dtype.element_ty), there)
        if not ALONE:
            slot = slot_of(words, t + 1, B, H)
            tl.store(slot + at, word(h.to(DTYPE), t + 1, DTYPE == tl.float32), there)
        i, f, g, o = ahead
    tl.store(h_state + at, h, there)
    tl.store(c_state + at, c, there)


@triton.jit
def _back_step(products, cells, grad_y, t, row, n, T, H, length, there):
    """What the backward reads of a step: the products, the cell before it, the gradient of y."""
    at = (row * T + t)[:, None]
    inside = there & (t < length)[:, None]
    i, f, g, o = _four(products, at * 4 * H + n[None, :], H, there)
    before = tl.load(cells + at * H + n[None, :], inside, other=0)
    grad = tl.load(grad_y + at * H + n[None, :], inside, other=0)
    return i, f, g, o, before, grad.to(tl.float32)


@triton.jit(do_not_specialize=["first", "last", "row0"])
def lstm_backward(
    products, weight, b_ih, b_hh, lengths, words, cells, grad_y, d_h_state, d_c_state, d_gates, first, last, row0,
    tiles, B, T, H, wn, wk,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, HELD: tl.constexpr, ALONE: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Steps T - 1 - first, ... down to T - last. products (B, T, 4H): of x and h together. d_h_state, d_c_state (B, H):
    the gradients of the state, read and written. d_gates (B, T, 4H): before the sigmoids and tanh."""
    DTYPE: tl.constexpr = weight.dtype.element_ty
    row, n, of_n, there, at, length = place(tl.program_id(0), lengths, row0, tiles, B, T, H, ROWS, UNITS)
    d_h = tl.load(d_h_state + at, there, other=0)
    d_c = tl.load(d_c_state + at, there, other=0)
    bias_i, bias_f = _bias(b_ih, b_hh, 0, n, H, of_n), _bias(b_ih, b_hh, 1, n, H, of_n)
    bias_g, bias_o = _bias(b_ih, b_hh, 2, n, H, of_n), _bias(b_ih, b_hh, 3, n, H, of_n)
    held = 0
    if HELD:
        if ALONE:
            depth, of_depth = columns_of(0, H, BLOCK_K, 4, False)
            depth = tl.where(of_depth, depth, 4 * H)
        else:
            depth = tl.arange(0, BLOCK_K)
        held = hold(weight, depth, n, of_n, wn, wk, 4 * H, BLOCK_K, SPLIT)
    ahead = _back_step(products, cells, grad_y, T - 1 - first, row, n, T, H, length, there & (first < last))
    for back in range(first, last):
        t = T - 1 - back
        of_gates = (row * T + t)[:, None] * 4 * H + n[None, :]
        running = (t < length)[:, None]
        inside = there & running
        i, f, g, o, before, grad = ahead
        ahead = _back_step(products, cells, grad_y, t - 1, row, n, T, H, length, there & (back + 1 < last))
        if not ALONE:
            if back > 0:
                sums = told(
                    words, row, B, back - 1, held, weight, n, of_n, wn, wk, 4 * H,
                    ROWS, BLOCK_K, SPLIT, HELD, TOGETHER, PRECISION,
                )  # fmt: skip
                d_h = tl.where((t + 1 < length)[:, None], sums, d_h)
        i, f, g, o = sigmoid(i + bias_i), sigmoid(f + bias_f), tanh(g + bias_g), sigmoid(o + bias_o)
        u = tanh(f * before + i * g)
        through_h = d_h + grad
        through_c = d_c + through_h * o * (1 - u * u)
        d_i = tl.where(inside, through_c * g * i * (1 - i), 0).to(DTYPE)
        d_f = tl.where(inside, through_c * before * f * (1 - f), 0).to(DTYPE)
        d_g = tl.where(inside, through_c * i * (1 - g * g), 0).to(DTYPE)
        d_o = tl.where(inside, through_h * u * o * (1 - o), 0).to(DTYPE)
        if ALONE:
            gates = four_together(d_i, d_f, d_g, d_o, ROWS, UNITS)
            sums = times(gates, held, ROWS, BLOCK_K, SPLIT, PRECISION)
        else:
            slot = slot_of(words, back, B, 4 * H) + row[:, None] * 4 * H + n[None, :]
            WIDE: tl.constexpr = DTYPE == tl.float32
            tl.store(slot, word(d_i, back, WIDE), there)
            tl.store(slot + H, word(d_f, back, WIDE), there)
            tl.store(slot + 2 * H, word(d_g, back, WIDE), there)
            tl.store(slot + 3 * H, word(d_o, back, WIDE), there)
        tl.store(d_gates + of_gates, d_i, there)
        tl.store(d_gates + of_gates + H, d_f, there)
        tl.store(d_gates + of_gates + 2 * H, d_g, there)
        tl.store(d_gates + of_gates + 3 * H, d_o, there)
        d_c = tl.where(running, through_c * f, d_c)
        if ALONE:
            d_h = tl.where(running, sums, d_h)
    if not ALONE:
        if TOGETHER or first == T:
            sums = told(
                words, row, B, T - 1, held, weight, n, of_n, wn, wk, 4 * H,
                ROWS, BLOCK_K, SPLIT, HELD, TOGETHER, PRECISION,
            )  # fmt: skip
            d_h = tl.where((length > 0)[:, None], sums, d_h)
    tl.store(d_h_state + at, d_h, there)
    tl.store(d_c_state + at, d_c, there)


def forward(
    ctx: LaunchContext, x: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None,
    h0: Tensor | None = None, c0: Tensor | None = None, *, lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    (batch, steps, _), width = x.shape, w_hh.shape[1]
    h, c = (first_state(ctx, s, (batch, width)) for s in (h0, c0))
    y = ctx.empty((batch, steps, width), x.dtype)
    states = cells = None
    if ctx.wants_residuals:
        states, cells = ctx.empty(y.shape, w_hh.dtype), ctx.empty(y.shape, "float32")
        ctx.keep("states", states)
        ctx.keep("cells", cells)
    if y.numel():
        given = multiply(ctx, x, w_ih.T)
        how = plan(ctx, batch, width, 4, w_hh.dtype, False)
        words = new_words(ctx, how, (batch, width), w_hh.dtype)
        begin(ctx, words, h, w_hh)
        weight = held_order(how, w_hh, 4)
        tensors = (given, weight, *dense(b_ih, b_hh, lengths), words, h, c, y, states, cells)
        strides = weight.stride()
        run(ctx, lstm_forward, how, strides, tensors, batch, steps, width, strides, (states is not None,))
    return y, h.to(state_dtype(h0, x)), c.to(state_dtype(c0, x))


def backward(
    ctx: LaunchContext, residuals: Residuals, grad_y: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor | None, ...]:
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = residuals.args
    lengths, states, cells = residuals.options["lengths"], residuals.get("states"), residuals.get("cells")
    (batch, steps, _), width = x.shape, w_hh.shape[1]
    d_h, d_c = (first_state(ctx, g, (batch, width)) for g in (grad_h, grad_c))
    d_gates = ctx.scratch((batch, steps, 4 * width), w_hh.dtype)
    if d_gates.numel():
        products = multiply(ctx, x, w_ih.T).add_(multiply(ctx, states, w_hh.T))
        how = plan(ctx, batch, width, 4, w_hh.dtype, True)
        words = new_words(ctx, how, (batch, 4 * width), w_hh.dtype)
        tensors = (products, w_hh, *dense(b_ih, b_hh, lengths), words, cells, grad_y.contiguous(), d_h, d_c, d_gates)
        run(ctx, lstm_backward, how, w_hh.stride(), tensors, batch, steps, width, w_hh.stride(), end=1)
    d_bias = d_gates.sum((0, 1), dtype=torch.float32)
    return (
        within(multiply(ctx, d_gates, w_ih).to(x.dtype), lengths),
        gradient_of_weights(ctx, d_gates, within(x, lengths), w_ih),
        gradient_of_weights(ctx, d_gates, states, w_hh),
        *(None if b is None else d_bias.to(b.dtype, copy=True) for b in (b_ih, b_hh)),
        *(None if s is None else d.to(s.dtype) for s, d in ((h0, d_h), (c0, d_c))),
    )
