"""Modules of the MM-Rec model, under the parameter names of the original implementation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import srm_core
from srm_core.errors import ContractError


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


class MultiMemoryAttention(nn.Module):
    """Attention of several heads over one level of a hierarchical memory, through `srm_core.hds_query`.

    model_dim E, num_heads H: E / H channels each. num_levels, pool: of the hierarchy over the slots. level: which
    one is attended to; -1 is the top. W_q maps the query, W_o the result; keys and values are the memory's own.
    """

    def __init__(self, model_dim: int, num_heads: int, num_levels: int = 3, pool: int = 4, level: int = -1) -> None:
        super().__init__()
        if num_heads < 1 or model_dim % num_heads:
            raise ContractError("MultiMemoryAttention", "num_heads", f"{num_heads}", f"a divisor of {model_dim}")
        self.num_heads, self.num_levels, self.pool, self.level = num_heads, num_levels, pool, level
        self.W_q, self.W_o = nn.Linear(model_dim, model_dim), nn.Linear(model_dim, model_dim)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(B, T, E) of query (B, T, E), and keys and values (M, E) for all, or (B, M, E).

        Errors: `ContractError`, also where a level would be empty.
        """
        q, k, v = (self._heads(a if a.dim() == 3 else a[None]) for a in (self.W_q(query), keys, values))
        out = srm_core.hds_query(q, k, v, level=self.level, num_levels=self.num_levels, pool=self.pool)
        return self.W_o(out.transpose(1, 2).flatten(2))

    def _heads(self, a: Tensor) -> Tensor:  # (B, T, E) -> (B, H, T, D)
        return a.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
