"""`mdi` in Triton: one pass, element by element.

    g = sigmoid(gate), gamma = clamp(sigmoid(decay) * sigmoid(modulation), eps, 1 - eps)
    h_new = (1 - g) * h + g * z + gamma * h

A program takes BLOCK elements of dense memory. The backward computes the sigmoids again.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from srm_backends.triton.common import sigmoid
from srm_backends.triton.launch import Config, blocks, launch, power_of_2
from srm_core.context import LaunchContext, Residuals

BLOCK = 1024


@triton.jit
def _gates(gate_logits, decay_logits, modulation_logits, at, inside, MODULATED: tl.constexpr):
    """The three sigmoids in float32; that of the modulation is 1 without one."""
    g = sigmoid(tl.load(gate_logits + at, inside, other=0).to(tl.float32))
    decay = sigmoid(tl.load(decay_logits + at, inside, other=0).to(tl.float32))
    modulation = tl.full(g.shape, 1, tl.float32)
    if MODULATED:
        modulation = sigmoid(tl.load(modulation_logits + at, inside, other=0).to(tl.float32))
    return g, decay, modulation


@triton.jit
def mdi_forward(
    z, h, gate_logits, decay_logits, modulation_logits, new, gammas,
    low, high, count, MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g, decay, modulation = _gates(gate_logits, decay_logits, modulation_logits, at, inside, MODULATED)
    product = decay * modulation
    gamma = tl.where(product < low, low, tl.where(product > high, high, product))  # NaN stays NaN
    before = tl.load(h + at, inside, other=0).to(tl.float32)
    given = tl.load(z + at, inside, other=0).to(tl.float32)
    after = (1 - g) * before + g * given + gamma * before
    tl.store(new + at, after.to(new.dtype.element_ty), inside)
    tl.store(gammas + at, gamma.to(gammas.dtype.element_ty), inside)


@triton.jit
def mdi_backward(
    grad_new, grad_gamma, z, h, gate_logits, decay_logits, modulation_logits, d_z, d_h, d_gate, d_decay, d_modulation,
    low, high, count, MODULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With a the gradient of h_new and e that of gamma, 0 where it is clamped; see the vjp of the reference."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g, decay, modulation = _gates(gate_logits, decay_logits, modulation_logits, at, inside, MODULATED)
    product = decay * modulation
    clamped = (product < low) | (product > high)
    gamma = tl.where(product < low, low, tl.where(product > high, high, product))
    a = tl.load(grad_new + at, inside, other=0).to(tl.float32)
    before = tl.load(h + at, inside, other=0).to(tl.float32)
    given = tl.load(z + at, inside, other=0).to(tl.float32)
    e = tl.where(clamped, 0, tl.load(grad_gamma + at, inside, other=0).to(tl.float32) + a * before) * product
    tl.store(d_z + at, (a * g).to(d_z.dtype.element_ty), inside)
    tl.store(d_h + at, (a * (1 - g + gamma)).to(d_h.dtype.element_ty), inside)
    tl.store(d_gate + at, (a * (given - before) * g * (1 - g)).to(d_gate.dtype.element_ty), inside)
    tl.store(d_decay + at, (e * (1 - decay)).to(d_decay.dtype.element_ty), inside)
    if MODULATED:
        tl.store(d_modulation + at, (e * (1 - modulation)).to(d_modulation.dtype.element_ty), inside)


def _config(z: Tensor, modulated: bool, eps: float) -> Config:
    count = z.numel()
    block = power_of_2(count, 128, BLOCK)
    return Config((blocks(count, block),), (eps, 1 - eps, count), (modulated, block))


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def forward(
    ctx: LaunchContext, z: Tensor, h: Tensor, gate_logits: Tensor, decay_logits: Tensor,
    modulation_logits: Tensor | None = None, *, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    new, gamma = ctx.empty(z.shape, h.dtype), ctx.empty(z.shape, z.dtype)
    if z.numel():
        given = _dense(z, h, gate_logits, decay_logits, modulation_logits)
        modulated = modulation_logits is not None
        launch(ctx, mdi_forward, None, (*given, new, gamma), lambda: _config(z, modulated, eps))
    return new, gamma


def backward(ctx: LaunchContext, residuals: Residuals, grad_new: Tensor, grad_gamma: Tensor) -> tuple[Any, ...]:
    given, eps = residuals.args, residuals.options["eps"]
    d = tuple(None if t is None else ctx.empty(t.shape, t.dtype) for t in given)
    z, modulated = given[0], given[4] is not None
    if z.numel():
        tensors = (*_dense(grad_new, grad_gamma, *given), *d)
        launch(ctx, mdi_backward, None, tensors, lambda: _config(z, modulated, eps))
    return d
