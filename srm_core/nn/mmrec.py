"""Modules of the MM-Rec model, under the parameter names of the original implementation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import srm_core
from srm_core.errors import ContractError
from srm_core.nn.memory import HierarchicalDataStructure, MemoryBank, MemoryState


def _perceptron(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class MemoryDecayIntegration(nn.Module):
    """The memory-decay integration with the maps that make its gates, through `srm_core.mdi`.

    Gate logits = W_g [z, h]; decay logits = W_gamma(z); modulation logits = W_context(context), the last two of two
    linear layers with a GELU between. model_dim E; inner_dim: the width between, by default E / 4. eps: what the decay
    is clamped by.
    """

    def __init__(self, model_dim: int, inner_dim: int | None = None, eps: float = 1e-6) -> None:
        super().__init__()
        inner = max(1, model_dim // 4) if inner_dim is None else inner_dim
        self.model_dim, self.eps = model_dim, eps
        self.W_g = nn.Linear(2 * model_dim, model_dim)
        self.W_gamma = _perceptron(model_dim, inner)
        self.W_context = _perceptron(model_dim, inner)

    def forward(self, z: Tensor, h_prev: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(h_new, gamma), each (..., E), of z, h_prev and context (..., E); no context: no modulation.

        Errors: `ContractError` for shapes that differ.
        """
        if z.shape != h_prev.shape or z.shape[-1] != self.model_dim:
            found = f"shape {tuple(h_prev.shape)} beside z {tuple(z.shape)}"
            raise ContractError("MemoryDecayIntegration", "h_prev", found, f"both alike, of {self.model_dim} channels")
        modulation = None if context is None else self.W_context(context)
        gates = (self.W_g(torch.cat([z, h_prev], -1)), self.W_gamma(z))
        h_new, gamma = srm_core.mdi(z, h_prev, *gates, modulation, eps=self.eps)
        return h_new, gamma

    def decay(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """gamma alone, (..., E), for which no state is needed. Half types are computed in float32."""
        logits = self.W_gamma(z)
        wide = torch.promote_types(logits.dtype, torch.float32)
        gamma = torch.sigmoid(logits.to(wide))
        if context is not None:
            gamma = gamma * torch.sigmoid(self.W_context(context).to(wide))
        return gamma.clamp(self.eps, 1 - self.eps).to(logits.dtype)


class MultiMemoryAttention(nn.Module):
    """Attention of several heads over one level of a hierarchical memory, through `srm_core.hds_query`.

    model_dim E, num_heads H: E / H channels each. num_levels, pool: of the hierarchy over the slots. level: which
    one is attended to; -1 is the top. W_q maps the query, W_o the result; keys and values are the memory's own.
    """

    def __init__(self, model_dim: int, num_heads: int, num_levels: int = 3, pool: int = 4, level: int = -1) -> None:
        super().__init__()
        if num_heads < 1 or model_dim % num_heads:
            raise ContractError("MultiMemoryAttention", "num_heads", f"{num_heads}", f"a divisor of {model_dim}")
        self.num_heads, self.level = num_heads, level
        self.hierarchy = HierarchicalDataStructure(num_levels, pool)
        self.W_q, self.W_o = nn.Linear(model_dim, model_dim), nn.Linear(model_dim, model_dim)

    def forward(self, query: Tensor, keys: Tensor | MemoryBank, values: Tensor | None = None) -> Tensor:
        """(B, T, E) of query (B, T, E), and keys and values (M, E) for all, or (B, M, E).

        A `MemoryBank` instead of both: its level is read as it is stored, and not pooled anew.
        Errors: `ContractError`, also where a level would be empty.
        """
        q = self._heads(self.W_q(query))
        if isinstance(keys, MemoryBank):
            out = self.hierarchy(q, keys, self.level)
        elif values is None:
            raise ContractError(
                "MultiMemoryAttention", "values", "None", "values beside keys, or a MemoryBank for both"
            )
        else:
            k, v = (self._heads(a if a.dim() == 3 else a[None]) for a in (keys, values))
            num_levels, pool = self.hierarchy.num_levels, self.hierarchy.pool
            out = srm_core.hds_query(q, k, v, level=self.level, num_levels=num_levels, pool=pool)
        return self.W_o(out.transpose(1, 2).flatten(2))

    def _heads(self, a: Tensor) -> Tensor:  # (B, T, E) -> (B, H, T, D)
        return a.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class MMRecBlock(nn.Module):
    """A residual block of MM-Rec: a recurrence whose decay depends on what a long-term memory says of each step.

    z = W_z(norm_in(x)); context = memory(z, the bank); gamma = mdi.decay(z, context); h = `srm_core.mdi_recurrence` of
    z and gamma from the state's h, with the weights of W_gate and mdi.W_g; y = x + W_out(norm_out(h + context));
    y + ffn(norm_ffn(y)). Then the steps' z and h are written into the bank, as keys and values.

    model_dim E; num_heads: of the memory's attention. slots M, num_levels, pool: of the bank. mix: as for
    `srm_core.mdi_recurrence`. inner_dim: of the decay's maps, by default E / 4. ffn_dim: by default 4 E.
    segment: how many steps read the memory before it is written; None: all of a call, whose recurrence is then one.

    The original gives the parts; how a block joins them, and when it writes, is decided here. A step sees the memory
    as it was when its segment began. So a sequence in chunks of whole segments equals the whole; with segment=None a
    call is a segment, and chunks read what the whole would not have written yet. With write=False any chunks are equal
    to the whole. A slot that was never written is zeros and takes part in the attention.

    No gradient passes through the bank: from one segment to the next it goes through h. A step multiplies h by up to
    gamma + mix * (1 - g + gamma), which exceeds 1 as gamma nears 1: a trained block can forget slowly, or grow.
    """

    def __init__(
        self, model_dim: int, num_heads: int = 4, slots: int = 256, num_levels: int = 3, pool: int = 4,
        mix: float = 0.1, inner_dim: int | None = None, ffn_dim: int | None = None, segment: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if segment is not None and segment < 1:
            raise ContractError("MMRecBlock", "segment", f"{segment}", "a positive integer, or None for whole calls")
        self.model_dim, self.slots, self.mix, self.segment = model_dim, slots, mix, segment
        inner = 4 * model_dim if ffn_dim is None else ffn_dim
        self.norm_in, self.norm_out, self.norm_ffn = (nn.LayerNorm(model_dim) for _ in range(3))
        self.W_z, self.W_gate, self.W_out = (nn.Linear(model_dim, model_dim) for _ in range(3))
        self.mdi = MemoryDecayIntegration(model_dim, inner_dim)
        self.memory = MultiMemoryAttention(model_dim, num_heads, num_levels, pool)
        self.memory.hierarchy.sizes(slots)
        self.ffn = _perceptron(model_dim, inner)

    def initial_state(
        self, batch: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MemoryState:
        """The state of sequences that have seen nothing: zeros; h is float32 for a half dtype."""
        like = self.W_z.weight
        device, dtype = device or like.device, dtype or like.dtype
        h = torch.zeros(batch, self.model_dim, device=device, dtype=torch.promote_types(dtype, torch.float32))
        bank = self.memory.hierarchy.empty(batch, self.slots, self.model_dim, device=device, dtype=dtype)
        return MemoryState(h, bank)

    def forward(
        self, x: Tensor, state: MemoryState | None = None, lengths: Tensor | None = None,
        *, write: bool = True, inplace: bool = False,
    ) -> tuple[Tensor, MemoryState]:  # fmt: skip
        """(y (B, T, E), the state after it) of x (B, T, E).

        state: from the call before; None: nothing was seen. lengths: (B,) integers, for sequences that end before T:
        y is 0 beyond, and neither h nor the bank sees those steps. write: False leaves the bank as it is. inplace:
        True writes into the bank of the given state, which is then that of the state returned; only without gradients.
        Otherwise the given state is not changed, at the price of a copy of the bank.
        Errors: `ContractError` for shapes that do not fit.
        """
        recording = torch.is_grad_enabled()
        self._check(x, state, inplace and recording)
        own = inplace or (state is None and not recording)
        h, bank = self.initial_state(x.shape[0], x.device, x.dtype) if state is None else state
        steps = x.shape[1]
        size = self.segment or max(steps, 1)
        outputs = []
        for start in range(0, max(steps, 1), size):
            part = x[:, start : start + size]
            ends = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
            y, keys, values, h = self._segment(part, h, bank, ends)
            outputs.append(y)
            if write:
                # Autograd has saved what the segment read: it is written to nowhere but in a copy.
                bank, own = bank if own else bank.clone(), not recording
                self.memory.hierarchy.write_(bank, keys, values, ends)
        return torch.cat(outputs, 1), MemoryState(h, bank)

    def _segment(
        self, x: Tensor, h: Tensor, bank: MemoryBank, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(y, what is to be written as keys and as values, the last h) of steps that read the same memory."""
        there = None
        if lengths is not None:
            there = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[:, :, None]
            x = torch.where(there, x, 0)  # whatever the padding holds, no gradient of a weight sees it
        z = self.W_z(self.norm_in(x))
        context = self.memory(z, bank)
        states, last = self.recur(z, self.mdi.decay(z, context), h, lengths)
        y = x + self.W_out(self.norm_out(states + context))
        y = y + self.ffn(self.norm_ffn(y))
        return y if there is None else torch.where(there, y, 0), z, states, last

    def recur(self, z: Tensor, gamma: Tensor, h: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`srm_core.mdi_recurrence` with the block's weights: (all states (B, T, E), the last (B, E))."""
        gate, integration = self.W_gate, self.mdi.W_g
        weights = (gate.weight, gate.bias, integration.weight, integration.bias)
        states, last = srm_core.mdi_recurrence(z, gamma, h, *weights, mix=self.mix, lengths=lengths)
        return states, last

    def _check(self, x: Tensor, state: MemoryState | None, written_under_autograd: bool) -> None:
        if x.dim() != 3 or x.shape[2] != self.model_dim:
            raise ContractError("MMRecBlock", "x", f"shape {tuple(x.shape)}", f"(B, T, {self.model_dim})")
        if written_under_autograd:
            raise ContractError("MMRecBlock", "inplace", "True with gradients enabled", "False, or torch.no_grad()")
        if state is not None:
            batch = (x.shape[0], state.bank.keys.shape[0])
            if tuple(state.h.shape) != (batch[0], self.model_dim) or batch[0] != batch[1]:
                found = f"h of shape {tuple(state.h.shape)} and a bank of {batch[1]} sequences"
                raise ContractError("MMRecBlock", "state", found, f"those of {batch[0]} sequences of {self.model_dim}")

    def extra_repr(self) -> str:
        return f"{self.model_dim}, slots={self.slots}, mix={self.mix}, segment={self.segment}"
