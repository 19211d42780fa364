"""`hds_query` in Triton: attention over pooled slots, which are made where they are read.

A call with few steps reads each slot once, so the mean of a window is made as its tile is loaded, and the level is
never in memory. With many steps every tile of steps would pool again; the level is made first.
"""

from __future__ import annotations

from torch import Tensor

from srm_backends.triton import hds
from srm_backends.triton.attention import Call, attend, prepare
from srm_backends.triton.attention_backward import pull
from srm_core.context import LaunchContext, Residuals

ONCE = 64  # steps that share a tile
WIDEST_WINDOW = 256  # beyond it too few programs share the memory


def _window(level: int, num_levels: int, pool: int) -> int:
    """How many slots a slot of the level stands for."""
    return int(pool ** (level % num_levels))


def _at_level(ctx: LaunchContext, slots: Tensor, window: int) -> Tensor:
    if window == 1:
        return slots
    batch, heads, count, width = slots.shape
    out: Tensor = ctx.scratch((batch, heads, count // window, width), slots.dtype)
    if out.numel():
        hds.pooled(ctx, slots, window, (out,))
    return out


def _call(ctx: LaunchContext, query: Tensor, keys: Tensor, values: Tensor, window: int, scale: float | None) -> Call:
    """Attention over the level."""
    batch = len(query)
    k, v = (_at_level(ctx, a, window).expand(batch, -1, -1, -1) for a in (keys, values))
    return prepare(query, k, v, None, False, scale, ctx.precision)


def forward(
    ctx: LaunchContext, query: Tensor, keys: Tensor, values: Tensor,
    *, level: int, num_levels: int, pool: int, scale: float | None,
) -> Tensor:  # fmt: skip
    window = _window(level, num_levels, pool)
    if query.shape[2] <= ONCE and 1 < window <= WIDEST_WINDOW:
        k, v = (a.expand(len(query), -1, -1, -1) for a in (keys, values))
        call = prepare(query, k, v, None, False, scale, ctx.precision)._replace(window=window)
    else:
        call = _call(ctx, query, keys, values, window, scale)
    out, *kept = attend(ctx, call, ctx.wants_residuals)
    for name, array in zip(("out", "peak", "total"), (out, *kept), strict=True):
        ctx.keep(name, array)
    return out


def backward(ctx: LaunchContext, residuals: Residuals, grad_out: Tensor) -> tuple[Tensor, ...]:
    (query, keys, values), options = residuals.args, residuals.options
    window = _window(options["level"], options["num_levels"], options["pool"])
    call = _call(ctx, query, keys, values, window, options["scale"])
    kept = tuple(residuals.get(name) for name in ("out", "peak", "total"))
    shared = len(keys) == len(values) == 1 != len(query)
    d_query, *pooled, _ = pull(ctx, call, kept, grad_out, shared, False)
    return d_query, *(_spread(ctx, d, like, window) for d, like in zip(pooled, (keys, values), strict=True))


def _spread(ctx: LaunchContext, grad: Tensor, like: Tensor, window: int) -> Tensor:
    """The gradient of the memory from that of its level, summed over the sequences that share it."""
    if len(grad) != len(like):
        grad = grad.sum(0, keepdim=True) if len(like) else grad[:0]
    d = ctx.empty(like.shape, like.dtype)
    if window == 1:
        return d.copy_(grad)
    if not grad.numel():
        return d.zero_()
    hds.spread(ctx, d, window, grad)
    return d
