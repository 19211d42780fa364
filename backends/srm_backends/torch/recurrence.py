"""y_t = g_t * y_{t-1} + x_t over (B, T, C), the loop that `scan` and `recurrent_mix` share.

Two forms. *Serial*: one operation a step. *Blocked*, where a step's work is not worth a launch: time is cut into N
blocks that advance together, K steps each: once to find what each block does to a state (its product of gates P and
its end from zero E), then, after the N states between the blocks are known, once more for the values. That is
2K + N launches instead of K * N, or less: the states between blocks are a recurrence themselves.

The gradient is the same recurrence against time: a_t = dy_t + g_{t+1} * a_{t+1}, with dx_t = a_t and
dg_t = a_t * y_{t-1}; written with itself it can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.common import wants_gradient
from srm_backends.torch.graphs import replayed

SHORT = 64  # fewer steps than this run one by one
BLOCK = 16  # steps: with more, there are more launches than the next level needs; with fewer, it is a longer one
ROW = 1024  # on a CPU a step of more elements is worth its launch, of twice as many with a constant gate
FEW, SMALL = 16, 1 << 25  # on CUDA: from so many steps on, of at most so many bytes, the launches are a graph's
FAINT = 1e-200  # a float64 product below this may have lost what a later large state would bring back


def recurrence(gates: Tensor, tokens: Tensor | None, state: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """(y (B, T, C), the last state (B, C)), all in one dtype, differentiable any number of times.

    gates: (B or 1, T, C or 1), or (B or 1, 1, C or 1) if constant in time. tokens: (B, T, C), or None for 0, then
    gates have T. state: y_{-1}, (B, C). reverse: t runs from the end to 0. Any strides.
    """
    if wants_gradient(gates, tokens, state):
        return Recurrence.apply(gates, tokens, state, reverse)
    y = _empty(gates, tokens, state)
    return y, _run(gates, tokens, state, y, reverse)


def _empty(gates: Tensor, tokens: Tensor | None, state: Tensor) -> Tensor:
    steps = gates.shape[1] if tokens is None else tokens.shape[1]
    return state.new_empty(state.shape[0], steps, state.shape[1])


class Recurrence(torch.autograd.Function):
    """`recurrence` with its gradient. It keeps the gates, the states and the first state."""

    @staticmethod
    def forward(gates: Tensor, tokens: Tensor | None, state: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        y = _empty(gates, tokens, state)
        return y, _run(gates, tokens, state, y, reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        gates, tokens, state, ctx.reverse = inputs
        ctx.save_for_backward(gates, state, output[0])
        ctx.has_tokens = tokens is not None

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Any, ...]:
        gates, state, y = ctx.saved_tensors
        if y.shape[1] == 0:
            return torch.zeros_like(gates), grad_y if ctx.has_tokens else None, grad_last, None
        a = _adjoint(gates, grad_y, grad_last, ctx.reverse)
        first, _, _ = _ends(y, ctx.reverse)
        needs_gates, needs_tokens, needs_state, _ = ctx.needs_input_grad
        d_gates = d_state = None
        if needs_gates:
            d_gates = _gate_gradient(a, y, state, gates, ctx.reverse)
        if needs_state:
            d_state = a[:, first] * gates[:, first if gates.shape[1] > 1 else 0]
        return d_gates, a if needs_tokens else None, d_state, None


def _ends(y: Tensor, reverse: bool) -> tuple[int, slice, slice]:
    """(the step that comes first, the steps that have one after them, the steps that have one before them)."""
    but_last, but_first = slice(None, -1), slice(1, None)
    return (y.shape[1] - 1, but_first, but_last) if reverse else (0, but_last, but_first)


def _gate_gradient(a: Tensor, y: Tensor, state: Tensor, gates: Tensor, reverse: bool) -> Tensor:
    """a_t * y_{t-1}, summed over what a gate stands for."""
    first, before, after = _ends(y, reverse)
    start = slice(first, first + 1)
    if gates.shape == y.shape and not wants_gradient(a, y, state):  # nothing of that size but the result
        d_gates = torch.empty_like(a)
        torch.mul(a[:, start], state[:, None], out=d_gates[:, start])
        torch.mul(a[:, after], y[:, before], out=d_gates[:, after])
        return d_gates
    one, rest = a[:, start] * state[:, None], a[:, after] * y[:, before]
    if gates.shape[1] == 1:
        return one.sum_to_size(gates.shape) + rest.sum_to_size(gates.shape)
    width = gates.shape[2]
    parts = [p.sum_to_size(*p.shape[:2], width) for p in ((rest, one) if reverse else (one, rest))]
    return torch.cat(parts, 1).sum_to_size(gates.shape)


def _adjoint(gates: Tensor, grad_y: Tensor, grad_last: Tensor, reverse: bool) -> Tensor:
    """a: the gradient of every state, through all that comes after it."""
    last, rest = (0, slice(1, None)) if reverse else (grad_y.shape[1] - 1, slice(None, -1))
    later = gates
    if gates.shape[1] > 1:
        later = gates[:, :-1] if reverse else gates[:, 1:]
    start = grad_y[:, last] + grad_last
    if wants_gradient(gates, grad_y, grad_last):
        earlier, _ = recurrence(later, grad_y[:, rest], start, not reverse)
        return torch.cat([start[:, None], earlier] if reverse else [earlier, start[:, None]], 1)
    a = torch.empty(grad_y.shape, dtype=grad_y.dtype, device=grad_y.device)
    a[:, last] = start
    _run(later, grad_y[:, rest], start, a[:, rest], not reverse)
    return a


def _run(gates: Tensor, tokens: Tensor | None, state: Tensor, out: Tensor, reverse: bool) -> Tensor:
    """Write y into out; returns the last state, in memory of its own."""
    with torch.no_grad():
        if out.is_cuda and out.shape[1] >= FEW and out.numel() * out.element_size() <= SMALL:
            last = torch.empty(state.shape, dtype=state.dtype, device=state.device)
            inputs = (gates, state) if tokens is None else (gates, state, tokens)
            replayed(_replay, (out, last), inputs, reverse, "")
            return last
        return _launch(gates, tokens, state, out, reverse)


def _replay(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], reverse: bool) -> None:
    gates, state, *tokens = inputs
    out, last = outputs
    last.copy_(_launch(gates, tokens[0] if tokens else None, state, out, reverse))


def _launch(gates: Tensor, tokens: Tensor | None, state: Tensor, out: Tensor, reverse: bool) -> Tensor:
    """One operation after the other."""
    if out.numel() == 0:
        return state.clone()
    steps, row = out.shape[1], out.shape[0] * out.shape[2]
    wide = row > (2 * ROW if gates.shape[1] == 1 else ROW)
    if steps < SHORT or (_on_host(out) and wide) or not _blocked(gates, tokens, state, out, reverse):
        return _serial(gates, tokens, state, out, reverse).clone()
    return out[:, 0 if reverse else -1].clone()


def _order(a: Tensor, axis: int, reverse: bool) -> list[Tensor]:
    """The steps of `a` in the order in which they are taken."""
    steps = list(a.unbind(axis))
    return steps[::-1] if reverse else steps


def _serial(gates: Tensor, tokens: Tensor | None, state: Tensor, out: Tensor, reverse: bool, axis: int = 1) -> Tensor:
    """One step after the other along `axis`."""
    rows = _order(out, axis, reverse)
    factors = _order(gates, axis, reverse)
    if len(factors) != len(rows):
        factors = factors * len(rows)
    if tokens is None:
        for factor, row in zip(factors, rows, strict=True):
            state = torch.mul(factor, state, out=row)
        return state
    for factor, term, row in zip(factors, _order(tokens, axis, reverse), rows, strict=True):
        state = torch.addcmul(term, factor, state, out=row)
    return state


def _blocked(gates: Tensor, tokens: Tensor | None, state: Tensor, out: Tensor, reverse: bool) -> bool:
    """The same in blocks; False, where that can be asked without waiting for a device, if the detour over products
    could differ from the plain loop."""
    steps = out.shape[1]
    count = steps // BLOCK
    whole = count * BLOCK
    # The rest, less than a block, comes last.
    main, rest = slice(0, whole), slice(whole, None)
    if reverse:
        main, rest = slice(steps - whole, None), slice(0, steps - whole)

    def cut(a: Tensor) -> Tensor:  # (B, T, C) -> (B, N, K, C)
        return a[:, main].unflatten(1, (count, BLOCK))

    constant = gates.shape[1] == 1
    g = gates[:, :, None] if constant else cut(gates)
    x = None if tokens is None else cut(tokens)

    # In float64 products have range enough for float32, and no rounding of their own. Apple's GPUs have none.
    wide = torch.float32 if out.device.type == "mps" else torch.float64
    factors = _order(g, 2, reverse) * (BLOCK if constant else 1)
    product = g[:, :, 0].to(wide) ** BLOCK if constant else g.prod(2, dtype=wide)  # (B, N, C)
    end = product.new_zeros(out.shape[0], count, out.shape[2])
    if x is not None:
        terms = _order(x, 2, reverse)
        end += terms[0]
        for factor, term in zip(factors[1:], terms[1:], strict=True):
            torch.addcmul(term, factor, end, out=end)
    if not _on_host(out):
        # An infinite gate makes a state of 0 NaN. The ends show it, but for a block's first step and without tokens.
        largest = factors[0] if x is not None else torch.linalg.vector_norm(g, torch.inf, 2)
        product = _bounded(product, largest)
    elif not _is_safe(product, end, out.dtype):
        return False

    between = product.new_empty(out.shape[0], count, out.shape[2])  # the state before each block
    first, others, done = (-1, slice(None, -1), slice(1, None)) if reverse else (0, slice(1, None), slice(None, -1))
    between[:, first] = state
    if count > 1:
        _launch(product if constant else product[:, done], end[:, done], between[:, first], between[:, others], reverse)
    _serial(g, x, between.to(out.dtype), cut(out), reverse, axis=2)
    if whole < steps:
        middle = out[:, steps - whole] if reverse else out[:, whole - 1]
        later = gates if constant else gates[:, rest]
        _serial(later, None if tokens is None else tokens[:, rest], middle, out[:, rest], reverse)
    return True


def _on_host(out: Tensor) -> bool:
    """May one look at values without waiting for a device?"""
    return out.device.type == "cpu"


def _bounded(product: Tensor, largest: Tensor) -> Tensor:
    """Where a product overflows, a state of 0 has no part in it and any other is beyond float32 anyway.

    Not so where the largest gate is infinite itself.
    """
    limit = torch.finfo(product.dtype).max
    return torch.where(largest.isinf(), product, product.clamp(-limit, limit))


def _is_safe(product: Tensor, end: Tensor, dtype: torch.dtype) -> bool:
    if not (product.sum() + end.sum()).isfinite():  # then all are
        return False
    return dtype is not torch.float64 or bool(product.abs().min() >= FAINT)
