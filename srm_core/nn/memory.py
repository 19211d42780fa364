"""The memory of MM-Rec: a ring of slots, the levels of means above it, and what a block carries between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import srm_core
from srm_core.errors import ContractError
from srm_core.ops.hds_pool.hierarchy import level_sizes


class MemoryBank(NamedTuple):
    """M slots of keys and values, a ring, with the levels above them. Made by `HierarchicalDataStructure`.

    keys: (B, M, D). values: (B, M, E). key_levels, value_levels: the levels 1, 2, ... of each, (B, M_l, D) and
    (B, M_l, E), means of means of the slots. pointer: (B,) int64, the slot that is written next.
    """

    keys: Tensor
    values: Tensor
    key_levels: tuple[Tensor, ...]
    value_levels: tuple[Tensor, ...]
    pointer: Tensor

    def clone(self) -> MemoryBank:
        """A copy, in memory of its own."""
        return _mapped(self, Tensor.clone)

    def level(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a level, with 0 the slots themselves and -1 the top."""
        return (self.keys, *self.key_levels)[index], (self.values, *self.value_levels)[index]


class MemoryState(NamedTuple):
    """What an `MMRecBlock` carries from a call to the next. A value: its methods give another, and change nothing.

    h: (B, E), the short-term memory, the last state of the recurrence. bank: the long-term memory.
    """

    h: Tensor
    bank: MemoryBank

    def clone(self) -> MemoryState:
        """A copy, in memory of its own, with the same gradients."""
        return _mapped(self, Tensor.clone)

    def detach(self) -> MemoryState:
        """The same tensors without their history: gradients end here. They are not copied."""
        return _mapped(self, Tensor.detach)

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> MemoryState:
        """On another device, of another floating-point dtype; None: as it is. The pointer stays int64."""

        def moved(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return _mapped(self, moved)

    def reset(self, rows: Tensor | None = None) -> MemoryState:
        """A copy that has seen nothing: zeros. rows: (B,) boolean, True for sequences that start anew; None: all."""
        return _mapped(self, lambda t: torch.zeros_like(t) if rows is None else t.masked_fill(_along(rows, t), 0))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples with each tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    parts = [_mapped(v, change) for v in value]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)


def _along(rows: Tensor, t: Tensor) -> Tensor:
    return rows.reshape(-1, *[1] * (t.dim() - 1))


class HierarchicalDataStructure(nn.Module):
    """The levels over a `MemoryBank`: `srm_core.hds_pool` makes them, `srm_core.hds_update_` keeps them when slots are
    written, `srm_core.hds_query` reads one. It has no parameters.

    num_levels: with the slots as level 0. pool: how many slots are averaged into one above.

    >>> import torch
    >>> from srm_core.nn import HierarchicalDataStructure
    >>> hierarchy = HierarchicalDataStructure(num_levels=2, pool=2)
    >>> bank = hierarchy.empty(1, 4, 1)
    >>> hierarchy.write_(bank, torch.ones(1, 1, 1), torch.tensor([[[6.0]]]))
    >>> [a.ravel().tolist() for a in (bank.values, *bank.value_levels, bank.pointer)]
    [[6.0, 0.0, 0.0, 0.0], [3.0, 0.0], [1]]
    """

    def __init__(self, num_levels: int = 3, pool: int = 4) -> None:
        super().__init__()
        for name, count in (("num_levels", num_levels), ("pool", pool)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ContractError("HierarchicalDataStructure", name, f"{count!r}", "a positive integer")
        self.num_levels, self.pool = num_levels, pool

    def sizes(self, slots: int) -> list[int]:
        """The number of slots of each level. Errors: `ContractError` where one would be empty."""
        sizes = level_sizes(slots, self.num_levels, self.pool)
        if len(sizes) < self.num_levels or slots < 1:
            found = f"{slots} for {self.num_levels} levels in pools of {self.pool}"
            needed = f"at least {self.pool ** (self.num_levels - 1)}, so that no level is empty"
            raise ContractError("HierarchicalDataStructure", "slots", found, needed)
        return sizes

    def empty(
        self, batch: int, slots: int, width: int, *, value_width: int | None = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> MemoryBank:  # fmt: skip
        """A bank of zeros, (batch, slots, width). value_width: of the values; None: width."""
        form: dict[str, Any] = {"device": device, "dtype": dtype}
        widths = (width, width if value_width is None else value_width)
        (keys, *key_levels), (values, *value_levels) = (
            [torch.zeros(batch, size, w, **form) for size in self.sizes(slots)] for w in widths
        )
        pointer = torch.zeros(batch, dtype=torch.int64, device=device)
        return MemoryBank(keys, values, tuple(key_levels), tuple(value_levels), pointer)

    def over(self, keys: Tensor, values: Tensor) -> MemoryBank:
        """The bank whose slots are keys (B, M, D) and values (B, M, E), not copies; written from slot 0 on."""
        if keys.dim() != 3 or values.dim() != 3 or keys.shape[:2] != values.shape[:2]:
            found = f"shape {tuple(values.shape)} beside keys {tuple(keys.shape)}"
            raise ContractError("HierarchicalDataStructure", "values", found, "(B, M, E) beside (B, M, D)")
        self.sizes(keys.shape[1])
        levels = [tuple(srm_core.hds_pool(a, num_levels=self.num_levels, pool=self.pool)) for a in (keys, values)]
        pointer = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        return MemoryBank(keys, values, levels[0], levels[1], pointer)

    @torch.no_grad()
    def write_(self, bank: MemoryBank, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> None:
        """Writes keys (B, S, D) and values (B, S, E) at each sequence's pointer, and moves it on, all in place.

        Of more than M steps the last M are kept, in the slots that they would have had one by one. lengths: (B,)
        integers, how many of the steps of each sequence are written; None: all S. No gradient passes: a memory is a
        constant to what reads it, and what autograd has saved of this bank may not be written to before the backward.
        """
        slots, steps = bank.keys.shape[1], keys.shape[1]
        count = min(slots, steps)
        taken: tuple[Tensor, Tensor] | None = None
        if lengths is None:
            first, total = bank.pointer + (steps - count), torch.full_like(bank.pointer, steps)
        else:
            total = lengths.to(bank.pointer)
            start = (total - count).clamp(min=0)
            first, ahead = bank.pointer + start, torch.arange(count, device=keys.device)
            taken = (start[:, None] + ahead, (first[:, None] + ahead) % slots)
        for level_0, levels, new in (
            (bank.keys, bank.key_levels, keys), (bank.values, bank.value_levels, values),
        ):  # fmt: skip
            if taken is None:
                written = new[:, steps - count :]
            else:  # a slot past the length is written with what it holds
                step, slot = taken
                there, here = (
                    a.take_along_dim(i[:, :, None], 1) for a, i in ((level_0, slot), (new, step.clamp(max=steps - 1)))
                )
                written = torch.where((step < total[:, None])[:, :, None], here.to(there.dtype), there)
            srm_core.hds_update_(level_0, levels, written.to(level_0.dtype), first % slots, pool=self.pool)
        bank.pointer.add_(total).remainder_(slots)

    def forward(self, query: Tensor, bank: MemoryBank, level: int = -1) -> Tensor:
        """(B, H, T, E / H): attention of query (B, H, T, D / H) over a level of the bank, as it is stored.

        A slot that was never written is zeros, and takes part.
        """
        if not -self.num_levels <= level < self.num_levels or len(bank.key_levels) != self.num_levels - 1:
            found = f"level {level} of a bank of {1 + len(bank.key_levels)} levels"
            needed = f"a level of {self.num_levels}, and as many in the bank"
            raise ContractError("HierarchicalDataStructure", "level", found, needed)
        heads = (a.unflatten(-1, (query.shape[1], -1)).transpose(1, 2).to(query.dtype) for a in bank.level(level))
        out: Tensor = srm_core.hds_query(query, *heads, level=0, num_levels=1, pool=self.pool)
        return out

    def extra_repr(self) -> str:
        return f"num_levels={self.num_levels}, pool={self.pool}"
