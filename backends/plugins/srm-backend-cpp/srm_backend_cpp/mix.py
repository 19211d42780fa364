"""`recurrent_mix`, and `recurrent_step` as the same over one step."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from srm_backend_cpp.arrays import Array, dense, filled, integers, like
from srm_backend_cpp.native import kernels
from srm_core.context import LaunchContext, Residuals


@lru_cache(maxsize=256)
def _row_heads(mode: tuple[str, ...]) -> Array:
    return np.array([m == "row" for m in mode], bool)


def _shared(x: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...], start: Any, lengths: Any) -> Any:
    """What forward and backward are given alike."""
    starts = integers(np.broadcast_to(start, (len(x),)))
    return *map(dense, (x, weight, bias, decay)), _row_heads(mode), starts, integers(lengths)


def forward(
    ctx: LaunchContext, x: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...],
    initial_state: Array | None = None, *, start: Any = 0, lengths: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    state = filled(ctx, _state_shape(x), x.dtype, 0 if initial_state is None else initial_state)
    y = like(ctx, x)
    states = ctx.scratch(x.shape, x.dtype) if ctx.wants_residuals else None
    kernels.mix(*_shared(x, weight, bias, decay, mode, start, lengths), state, y, states)
    ctx.keep("states", states)
    return y, state


def backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_final: Array) -> tuple[Any, ...]:
    x, *parameters, mode, initial_state = residuals.args
    shared = _shared(x, *parameters, mode, residuals.options["start"], residuals.options["lengths"])
    initial = np.zeros(_state_shape(x), x.dtype) if initial_state is None else dense(initial_state)
    d_state = filled(ctx, _state_shape(x), x.dtype, grad_final)
    gradients = tuple(like(ctx, a) for a in (x, *parameters))
    a = ctx.scratch(x.shape, x.dtype)
    kernels.mix_backward(*shared, initial, residuals.get("states"), dense(grad_y), d_state, a, *gradients)
    return *gradients, None if initial_state is None else d_state


def step_forward(
    ctx: LaunchContext, x: Array, state: Array, weight: Array, bias: Array, decay: Array, mode: tuple[str, ...],
    index: Any,
) -> tuple[Array, Array]:  # fmt: skip
    new = filled(ctx, state.shape, state.dtype, state)
    y = like(ctx, x)
    kernels.mix(*_shared(x[:, None], weight, bias, decay, mode, index, None), new, y[:, None], None)
    return y, new


def step_backward(ctx: LaunchContext, residuals: Residuals, grad_y: Array, grad_state: Array) -> tuple[Any, ...]:
    """The new state is computed again, which is cheaper than to keep it."""
    x, state, *parameters, mode, index = residuals.args
    shared = _shared(x[:, None], *parameters, mode, index, None)
    state = dense(state)
    new = filled(ctx, state.shape, state.dtype, state)
    kernels.mix(*shared, new, ctx.scratch(shared[0].shape, x.dtype), None)
    d_state = filled(ctx, state.shape, state.dtype, grad_state)
    d_x, *rest = (like(ctx, a) for a in (x, *parameters))
    a = ctx.scratch(shared[0].shape, x.dtype)
    kernels.mix_backward(*shared, state, new[:, None], dense(grad_y)[:, None], d_state, a, d_x[:, None], *rest)
    return d_x, d_state, *rest


def _state_shape(x: Array) -> tuple[int, ...]:
    return (x.shape[0], *x.shape[2:])
