"""`scan`: gates and tokens are read where they are, whatever their strides along sequences and time."""

from __future__ import annotations

from typing import Any

from srm_backend_cpp.arrays import Array, filled, integers, like, rows
from srm_backend_cpp.native import kernels
from srm_core.context import LaunchContext, Residuals


def forward(
    ctx: LaunchContext, gates: Array, tokens: Array | None = None, initial_state: Array | None = None,
    *, reverse: bool = False, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    shape = (gates if tokens is None else tokens).shape
    state = filled(ctx, (shape[0], shape[2]), gates.dtype, _start(tokens, initial_state))
    y: Array = ctx.empty(shape, gates.dtype)
    kernels.scan(rows(gates), None if tokens is None else rows(tokens), integers(lengths), reverse, state, y)
    ctx.keep("states", y)
    return y, state


def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_final: Array) -> tuple[Any, ...]:
    """A gate that several steps or channels share gets the sum of what each would get."""
    gates, tokens, initial_state = residuals.args
    batch, steps, width = grad_y.shape
    start = filled(ctx, (batch, width), gates.dtype, _start(tokens, initial_state))
    d_state = filled(ctx, (batch, width), gates.dtype, grad_final)
    d_gates = like(ctx, gates)
    each = d_gates if gates.shape == grad_y.shape else ctx.scratch(grad_y.shape, gates.dtype)
    d_tokens = ctx.empty(grad_y.shape, gates.dtype) if tokens is not None else ctx.scratch(grad_y.shape, gates.dtype)
    kernels.scan_backward(
        rows(gates), start, residuals.get("states"), rows(grad_y), integers(residuals.options["lengths"]),
        residuals.options["reverse"], d_state, each, d_tokens,
    )  # fmt: skip
    if each is not d_gates:
        _sum(each, d_gates)
    return d_gates, None if tokens is None else d_tokens, None if initial_state is None else d_state


def _start(tokens: Array | None, initial_state: Array | None) -> Any:
    return (1 if tokens is None else 0) if initial_state is None else initial_state


def _sum(each: Array, into: Array) -> None:
    """(B, T, D) summed to (B, T, 1), (B, 1, D) or (1, 1, D)."""
    batch, steps, width = each.shape
    if into.shape[2] != width:
        kernels.sums(each.reshape(batch * steps, width), None, into.reshape(-1))
        return
    rows_each = batch * steps // max(1, len(into))
    for part, total in zip(each.reshape(len(into), rows_each, width), into, strict=True):
        kernels.sums(part, total.reshape(-1), None)
