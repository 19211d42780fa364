"""Attention of several heads, with its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import srm_core
from srm_core.errors import ContractError

NAME = "Attention"
Cache = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """out_proj(attention(q_proj(x), k_proj(memory), v_proj(memory))) over heads, through `srm_core.attention`.

    model_dim E: of what comes in and goes out. n_heads H: each of E / H channels. n_kv_heads G: heads of keys and
    values, a divisor of H; None: H. bias: of the projections. is_causal: a step attends to itself and what came before.

    >>> import torch
    >>> from srm_core.nn import Attention
    >>> Attention(16, 4)(torch.rand(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(
        self, model_dim: int, n_heads: int, n_kv_heads: int | None = None, bias: bool = True, is_causal: bool = False,
        device: Any = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        groups = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or model_dim % n_heads:
            raise ContractError(NAME, "n_heads", f"{n_heads}", f"a divisor of model_dim={model_dim}")
        if groups < 1 or n_heads % groups:
            raise ContractError(NAME, "n_kv_heads", f"{groups}", f"a divisor of n_heads={n_heads}")
        self.model_dim, self.n_heads, self.n_kv_heads, self.is_causal = model_dim, n_heads, groups, is_causal
        self.head_dim = model_dim // n_heads
        form: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(model_dim, model_dim, **form)
        self.k_proj = nn.Linear(model_dim, groups * self.head_dim, **form)
        self.v_proj = nn.Linear(model_dim, groups * self.head_dim, **form)
        self.out_proj = nn.Linear(model_dim, model_dim, **form)

    def forward(self, x: Tensor, memory: Tensor | None = None, attn_mask: Tensor | None = None) -> Tensor:
        """x (B, T, E) -> (B, T, E).

        memory: (B, S, E), what is attended to; None: x. attn_mask: boolean, True where a step attends, or added to the
        scores; broadcastable to (B, H, T, S); not together with is_causal.
        Errors: `ContractError` for shapes that do not fit.
        """
        seen = x if memory is None else memory
        return self._attend(x, *self._keys_and_values(seen), attn_mask, self.is_causal)

    def step(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """(y (B, 1, E), the cache for the next step) of x (B, 1, E), which attends to itself and the cached steps.

        cache: keys and values (B, G, S, E / H) of the steps before; None: there are none. It is not written to.
        """
        if x.dim() != 3 or x.shape[1] != 1:
            raise ContractError(NAME, "x", f"shape {tuple(x.shape)}", "(B, 1, E): one step")
        key, value = self._keys_and_values(x)
        if cache is not None:
            key, value = torch.cat([cache[0], key], 2), torch.cat([cache[1], value], 2)
        return self._attend(x, key, value, None, False), (key, value)

    def _keys_and_values(self, x: Tensor) -> Cache:
        return self._heads(self.k_proj(x), self.n_kv_heads), self._heads(self.v_proj(x), self.n_kv_heads)

    def _heads(self, x: Tensor, count: int) -> Tensor:  # (B, T, H * D) -> (B, H, T, D)
        return x.unflatten(-1, (count, self.head_dim)).transpose(1, 2)

    def _attend(self, x: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        query, shared = self._heads(self.q_proj(x), self.n_heads), self.n_kv_heads != self.n_heads
        out = srm_core.attention(query, key, value, attn_mask, is_causal=is_causal, enable_gqa=shared)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"{self.model_dim}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, is_causal={self.is_causal}"
