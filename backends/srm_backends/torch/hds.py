"""The three operators of the hierarchical memory on torch. Levels are pooled in the dtype of computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srm_backends.torch.attention import attend
from srm_backends.torch.common import compute_dtype, no_conflict
from srm_core.context import LaunchContext


def _above(level: Tensor, size: int) -> Tensor:
    """The level above, in the dtype of computation: means of whole windows of `size` slots. level (..., M, D)."""
    count = level.shape[-2] // size
    return level[..., : count * size, :].unflatten(-2, (count, size)).mean(-2, dtype=compute_dtype(level.dtype))


def pool(ctx: LaunchContext, memory: Tensor, *, num_levels: int, pool: int) -> tuple[Tensor, ...]:
    levels, level = [], memory
    for _ in range(1, num_levels):
        level = _above(level, pool)
        levels.append(level.to(memory.dtype) if level.dtype is not memory.dtype else level.contiguous())
    return tuple(levels)


def query(
    ctx: LaunchContext, query: Tensor, keys: Tensor, values: Tensor,
    *, level: int, num_levels: int, pool: int, scale: float | None,
) -> Tensor:  # fmt: skip
    if level % num_levels:
        keys, values = (_pooled(a, pool ** (level % num_levels)) for a in (keys, values))
    keys, values = (a.expand(query.shape[0], *a.shape[1:]) for a in (keys, values))
    return attend(ctx, query, keys, values, None, False, scale, False, ctx.precision)[0]


def _pooled(slots: Tensor, size: int) -> Tensor:
    """A level, whose slots are means of so many, in one go: what has no whole window above it drops out either way."""
    return _above(slots, size).to(slots.dtype)


@torch.no_grad()
def update_(
    ctx: LaunchContext, memory: Tensor, levels: tuple[Tensor, ...], new: Tensor, index: Any, *, pool: int
) -> None:
    """Writes new (..., S, D) and, level by level, the means above; no more slots than those are read or written."""
    slots, count = memory.shape[-2], new.shape[-2]
    if not count or memory.numel() == 0:
        return
    steps = torch.arange(count, device=memory.device)
    if isinstance(index, Tensor):
        first = index.to(torch.int64).reshape(-1, 1).expand(memory.shape[0], 1)
    else:
        first = torch.full((memory.shape[0], 1), int(index) % slots, device=memory.device)
    at = (first + steps) % slots  # (B, S)
    _write(memory, at, new)
    # One slot in each window, and the last one: the windows of neighbours are neighbours.
    at = torch.cat([at[:, ::pool], at[:, -1:]], 1)
    below = memory
    for level in levels:
        at = at // pool
        good = at < level.shape[-2]  # a remainder has nothing above it
        at = torch.where(good, at, 0)
        children = at[:, :, None] * pool + torch.arange(pool, device=at.device)  # (B, K, pool)
        read = _read(below, children.flatten(1)).unflatten(-2, (at.shape[1], pool))
        means = read.mean(-2, dtype=compute_dtype(level.dtype)).to(level.dtype)
        source = no_conflict(good)
        means = torch.where(_along(good, means), means, _read(level, at))
        _write(level, at.gather(1, source), _read(means, source))
        below, at = level, torch.where(good, at, slots)  # out of range, also further up
    return


def _along(at: Tensor, like: Tensor) -> Tensor:
    """(B, K) as (B, K, 1) or (B, 1, K, 1), to stand beside (B, K, D) or (B, H, K, D)."""
    return at[:, :, None] if like.dim() == 3 else at[:, None, :, None]


def _read(level: Tensor, at: Tensor) -> Tensor:
    """Slots at (B, K) of level (B, M, D) or (B, H, M, D)."""
    return level.take_along_dim(_along(at, level), -2)


def _write(level: Tensor, at: Tensor, values: Tensor) -> None:
    level.scatter_(-2, _along(at, level).expand(values.shape), values)
