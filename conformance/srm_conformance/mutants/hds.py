"""Mutants of `hds_pool`, `hds_update_` and `hds_query`."""

from __future__ import annotations

from typing import Any

import numpy as np
from srm_backends.numpy.common import compute_dtype, quiet, result

from srm_conformance.mutants.common import is_half, put, tampered
from srm_conformance.mutants.mutant import backward, forward
from srm_core.ops.hds_pool.hierarchy import level_sizes


def _windows(level: Any, pool: int) -> Any:
    """(..., M, D) as (..., M // pool, pool, D)."""
    *lead, slots, width = level.shape
    return level[..., : slots // pool * pool, :].reshape(*lead, slots // pool, pool, width)


@forward("hds_pool", "a remainder has a slot of its own")
def remainder_kept(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    levels: list[Any] = []
    for level in honest(ctx, memory, num_levels=num_levels, pool=pool):
        below = levels[-1] if levels else memory
        rest = below[..., below.shape[-2] // pool * pool :, :]
        if rest.shape[-2]:
            own = rest.astype(np.float32).mean(-2, keepdims=True).astype(level.dtype)
            level = result(ctx, np.concatenate([level, own], axis=-2), level.dtype)
        levels.append(level)
    return tuple(levels)


@forward("hds_pool", "a remainder is averaged into the last slot")
def remainder_averaged(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    levels = honest(ctx, memory, num_levels=num_levels, pool=pool)
    below = memory
    for level in levels:
        if level.shape[-2]:
            level[..., -1, :] = below[..., (level.shape[-2] - 1) * pool :, :].astype(np.float64).mean(-2)
        below = level
    return levels


@forward("hds_pool", "the first slots dropped, not the last")
def first_dropped(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    rest = memory.shape[-2] % pool
    shifted = np.concatenate([memory[..., rest:, :], memory[..., :rest, :]], axis=-2)
    return honest(ctx, shifted, num_levels=num_levels, pool=pool)


@forward("hds_pool", "pools of 4 always")
def pool_of_four(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    return honest(ctx, memory, num_levels=num_levels, pool=4)


@forward("hds_pool", "sums divided by 4 always")
def divided_by_four(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    levels = honest(ctx, memory, num_levels=num_levels, pool=pool)
    for level in levels:
        level[...] = level * level.dtype.type(pool / 4)
    return levels


@forward("hds_pool", "every level pooled from the memory")
def pooled_from_memory(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    levels = honest(ctx, memory, num_levels=num_levels, pool=pool)
    for level in levels[1:]:
        level[...] = levels[0][..., : level.shape[-2], :]
    return levels


@forward("hds_pool", "levels from the top")
def levels_reversed(honest: Any, ctx: Any, memory: Any, **options: Any) -> Any:
    return honest(ctx, memory, **options)[::-1]


@forward("hds_pool", "the memory among the levels")
def memory_returned(honest: Any, ctx: Any, memory: Any, **options: Any) -> Any:
    return (result(ctx, memory, memory.dtype), *honest(ctx, memory, **options))


@forward("hds_pool", "num_levels ignored")
def three_levels(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    return honest(ctx, memory, num_levels=3, pool=pool)


@forward("hds_pool", "half values added up in half")
@quiet
def added_in_half(honest: Any, ctx: Any, memory: Any, *, num_levels: int, pool: int) -> Any:
    levels = honest(ctx, memory, num_levels=num_levels, pool=pool)
    below = memory
    for level in levels:
        if is_half(memory):
            total = np.zeros_like(level)
            for i in range(pool):
                total = (total + _windows(below, pool)[..., i, :]).astype(level.dtype)
            level[...] = total / level.dtype.type(pool)
        below = level
    return levels


@forward("hds_pool", "levels in a list")
def levels_in_a_list(honest: Any, ctx: Any, memory: Any, **options: Any) -> Any:
    return list(honest(ctx, memory, **options))


@backward("hds_pool", "the gradient is not divided by the pool")
def not_divided(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    (d_memory,) = honest(ctx, residuals, *grads)
    d_memory[...] = d_memory * d_memory.dtype.type(residuals.options["pool"])
    return (d_memory,)


@backward("hds_pool", "the gradient of the levels above the first ignored")
def first_level_alone(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, residuals, *grads[:1], *map(np.zeros_like, grads[1:]))


@backward("hds_pool", "the remainder has a gradient")
def remainder_gradient(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    (d_memory,) = honest(ctx, residuals, *grads)
    pool = residuals.options["pool"]
    rest = d_memory.shape[-2] % pool
    if rest and grads:
        d_memory[..., -rest:, :] = grads[0][..., -1:, :] / grads[0].dtype.type(pool)
    return (d_memory,)


# hds_update_: memory, levels, new, index


@forward("hds_update_", "the ancestor of the first slot alone refreshed")
def first_ancestor(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    if np.ndim(index) or not new.shape[-2]:
        return honest(ctx, memory, levels, new, index, pool=pool)
    before = [level.copy() for level in levels]
    honest(ctx, memory, levels, new, index, pool=pool)
    slot = int(index) % memory.shape[-2]
    for level, old in zip(levels, before, strict=True):
        slot //= pool
        old[..., slot : slot + 1, :] = level[..., slot : slot + 1, :]
        level[...] = old
    return None


@forward("hds_update_", "the top level not refreshed")
def top_left(honest: Any, ctx: Any, memory: Any, levels: Any, *args: Any, pool: int) -> Any:
    return honest(ctx, memory, levels[:-1], *args, pool=pool)


@forward("hds_update_", "levels left as they were beside an index array")
def levels_left(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    return honest(ctx, memory, () if np.ndim(index) else levels, new, index, pool=pool)


@forward("hds_update_", "the ring is not closed")
def ring_open(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    if np.ndim(index) == 0 and memory.shape[-2]:
        new = new[..., : memory.shape[-2] - int(index) % memory.shape[-2], :]
    return honest(ctx, memory, levels, new, index, pool=pool)


@forward("hds_update_", "ancestors of what went round not refreshed")
def ancestors_not_round(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    slots = max(1, memory.shape[-2])
    fits = slots - int(index) % slots if np.ndim(index) == 0 else new.shape[-2]
    honest(ctx, memory, levels, new[..., :fits, :], index, pool=pool)
    honest(ctx, memory, (), new, index, pool=pool)


@forward("hds_update_", "an index past the memory clamped")
def index_clamped(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    return honest(ctx, memory, levels, new, np.clip(index, 0, max(0, memory.shape[-2] - 1)), pool=pool)


@forward("hds_update_", "pools of 4 always")
def update_pool_of_four(honest: Any, ctx: Any, *args: Any, pool: int) -> Any:
    return honest(ctx, *args, pool=4)


@forward("hds_update_", "index array read as its first element")
def first_index(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    return honest(ctx, memory, levels, new, index[0] if np.size(index) and np.ndim(index) else index, pool=pool)


@forward("hds_update_", "refreshed slots average the new ones alone")
def new_alone(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    """By zeros where the old slots were."""
    if np.ndim(index):
        return honest(ctx, memory, levels, new, index, pool=pool)
    honest(ctx, np.zeros_like(memory), levels, new, index, pool=pool)
    return honest(ctx, memory, (), new, index, pool=pool)


@forward("hds_update_", "the whole hierarchy refreshed")
def all_refreshed(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    honest(ctx, memory, levels, new, index, pool=pool)
    if levels and new.shape[-2] < memory.shape[-2]:
        honest(ctx, memory, levels, memory.copy(), 0, pool=pool)


@forward("hds_update_", "the last slot is not written where the ring closes")
def last_left(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    slots = memory.shape[-2]
    if np.ndim(index) == 0 and new.shape[-2] and int(index) % slots + new.shape[-2] > slots:
        new = new.copy()
        new[..., slots - int(index) % slots - 1, :] = memory[..., -1, :]
    return honest(ctx, memory, levels, new, index, pool=pool)


@forward("hds_update_", "the slot after the new ones is cleared")
def next_cleared(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    honest(ctx, memory, levels, new, index, pool=pool)
    if np.ndim(index) == 0 and 0 < new.shape[-2] < memory.shape[-2]:
        memory[..., (int(index) + new.shape[-2]) % memory.shape[-2], :] = 0


@forward("hds_update_", "new overwritten by what was there")
def exchanged(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, index: Any, *, pool: int) -> Any:
    kept = new.copy()
    if np.ndim(index) == 0 and new.size:
        at = (int(index) + np.arange(new.shape[-2])) % memory.shape[-2]
        new[...] = memory[..., at, :]
    return honest(ctx, memory, levels, kept, index, pool=pool)


@forward("hds_update_", "nothing new raises")
def nothing_new(honest: Any, ctx: Any, memory: Any, levels: Any, new: Any, *args: Any, pool: int) -> Any:
    if not new.shape[-2]:
        raise ValueError("zero-size array to reduction operation maximum which has no identity")
    return honest(ctx, memory, levels, new, *args, pool=pool)


# hds_query: query, keys, values


@forward("hds_query", "level counted from the top")
def level_from_the_top(honest: Any, ctx: Any, *args: Any, level: int, num_levels: int, **options: Any) -> Any:
    return honest(ctx, *args, level=num_levels - 1 - range(num_levels)[level], num_levels=num_levels, **options)


@forward("hds_query", "level ignored")
def level_ignored(honest: Any, ctx: Any, *args: Any, level: int, **options: Any) -> Any:
    return honest(ctx, *args, level=-1, **options)


@forward("hds_query", "a negative level is one too low")
def level_too_low(honest: Any, ctx: Any, *args: Any, level: int, num_levels: int, **options: Any) -> Any:
    level = max(0, num_levels + level - 1) if level < 0 else level
    return honest(ctx, *args, level=level, num_levels=num_levels, **options)


@forward("hds_query", "pools of 4 always")
def query_pool_of_four(honest: Any, ctx: Any, *args: Any, level: int, num_levels: int, pool: int, scale: Any) -> Any:
    fits = len(level_sizes(args[1].shape[2], num_levels, 4)) == num_levels
    return honest(ctx, *args, level=level, num_levels=num_levels, pool=4 if fits else pool, scale=scale)


@forward("hds_query", "remainder slots kept")
def remainder_attended(honest: Any, ctx: Any, query: Any, *memories: Any, **options: Any) -> Any:
    out = honest(ctx, query, *memories, **options)
    top, pool = range(options["num_levels"])[options["level"]], options["pool"]

    def kept(memory: Any) -> Any:
        for _ in range(top):
            starts = np.arange(0, memory.shape[2], pool)
            counts = np.diff([*starts, memory.shape[2]])[:, None]
            compute = compute_dtype(memory.dtype)
            memory = (np.add.reduceat(memory.astype(compute), starts, axis=2) / counts).astype(memory.dtype)
        return memory

    if top and memories[0].size:
        one = {"level": 0, "num_levels": 1, "pool": 1, "scale": options["scale"]}
        out[...] = honest(ctx, query, *map(kept, memories), **one)
    return out


@forward("hds_query", "values summed, not averaged")
def values_summed(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    out = honest(ctx, *args, **options)
    out[...] = out * out.dtype.type(options["pool"] ** range(options["num_levels"])[options["level"]])
    return out


@forward("hds_query", "values of level 0 beside pooled keys")
def values_not_pooled(honest: Any, ctx: Any, query: Any, keys: Any, values: Any, **options: Any) -> Any:
    window = options["pool"] ** range(options["num_levels"])[options["level"]]
    nearest = np.repeat(values[:, :, ::window], window, axis=2)[:, :, : values.shape[2]]
    return honest(ctx, query, keys, nearest, **options)


@forward("hds_query", "the first sequence's keys for all")
def first_keys(honest: Any, ctx: Any, query: Any, keys: Any, values: Any, **options: Any) -> Any:
    return honest(ctx, query, keys[:1] if len(keys) else keys, values, **options)


@backward("hds_query", "the gradient of shared keys is the first sequence's")
def shared_keys_gradient(honest: Any, ctx: Any, residuals: Any, grad_out: Any) -> Any:
    found = honest(ctx, residuals, grad_out)
    if len(found[1]) == len(grad_out):
        return found
    one = grad_out.copy()
    one[1:] = 0
    return put(found, 1, honest(ctx, residuals, one)[1])


@backward("hds_query", "the gradient of shared values is a mean")
def shared_values_gradient(honest: Any, ctx: Any, residuals: Any, grad_out: Any) -> Any:
    found = honest(ctx, residuals, grad_out)
    if 1 == len(found[2]) < len(grad_out):
        found[2][...] = found[2] / found[2].dtype.type(len(grad_out))
    return found


@backward("hds_query", "the gradient of the keys not divided by the pool")
def keys_gradient_undivided(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, options = honest(ctx, residuals, *grads), residuals.options
    window = options["pool"] ** range(options["num_levels"])[options["level"]]
    found[1][...] = found[1] * found[1].dtype.type(window)
    return found


@backward("hds_query", "the gradient goes to the first slot of a window")
def gradient_of_the_first_slot(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    found, options = honest(ctx, residuals, *grads), residuals.options
    window = options["pool"] ** range(options["num_levels"])[options["level"]]
    slots = np.arange(found[2].shape[2])
    found[2][...] = found[2] * (slots % window == 0)[:, None].astype(found[2].dtype) * found[2].dtype.type(window)
    return found


@backward("hds_query", "the gradient takes level 0")
@quiet
def gradient_of_level_0(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, tampered(residuals, options={"level": 0}), *grads)
