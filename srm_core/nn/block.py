"""A block of the recurrent mixer: an MLP over channels, then a mixing over time."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from srm_core.models.config import MixerConfig
from srm_core.nn.repeat import (
    CausalMixing,
    KernelRepeatLinear,
    MixedRepeatHeads,
    Packed,
    ParallelRepeatHeads,
    RepeatHeads,
    RowRepeatCausalLinear,
)


def _mixing(c: MixerConfig) -> CausalMixing:
    """The token mixing that a config means."""
    if c.heads is None:
        if c.kernel == 1:
            return RowRepeatCausalLinear(c.seq_len, decay=c.decay)
        return KernelRepeatLinear(c.seq_len, c.kernel, decay=c.decay)
    if c.combined_heads:
        return RepeatHeads(
            c.hidden_dim, c.seq_len, c.heads, combined=True, decay=c.decay, use_projections=c.use_projections
        )
    kind = ParallelRepeatHeads if c.parallel_heads else MixedRepeatHeads if c.mixed_heads else RepeatHeads
    return kind(c.hidden_dim, c.seq_len, c.heads, decay=c.decay, use_projections=c.use_projections)


class MixerBlock(nn.Module):
    """x + MLP(LN(x)), then x + mix(LN(x)), for x (B, T, E), T <= seq_len.

    The arguments are those of `RecurrentMLPMixer` that concern a block; variant: mixed_heads, combined_heads,
    parallel_heads, decay, use_projections.
    """

    def __init__(
        self, hidden_dim: int, seq_len: int, heads: int | None = None, kernel: int = 1, *, dropout: float = 0.0,
        **variant: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        config = MixerConfig(1, hidden_dim, seq_len, 1, heads, kernel, **variant)
        self.dropout = nn.Dropout(dropout)
        self.channel_norm = nn.LayerNorm(hidden_dim)
        self.channel_mixing_layer = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.SiLU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.token_norm = nn.LayerNorm(hidden_dim)
        self.token_mixing_layer = _mixing(config)

    def channels(self, x: Tensor) -> Tensor:
        """x + MLP(LN(x)): the half of a block that sees one position at a time."""
        return x + self.dropout(self.channel_mixing_layer(self.channel_norm(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels(x)
        return x + self.dropout(self.token_mixing_layer(self.token_norm(x)))

    def mix(self, x: Tensor, state: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """(y, state) of a chunk, x and y (B, T, E); the options are those of the token mixing's `mix`."""
        x = self.channels(x)
        y, after = self.token_mixing_layer.mix(self.token_norm(x), state, **options)
        return x + self.dropout(y), after

    def step(self, x: Tensor, state: Tensor, index: Any, packed: Packed) -> tuple[Tensor, Tensor]:
        """(y, state) of a position, x and y (B, E)."""
        x = self.channels(x)
        y, after = self.token_mixing_layer.step(self.token_norm(x), state, index, packed=packed)
        return x + self.dropout(y), after

    def step_(self, x: Tensor, state: Tensor, index: Any, slots: Tensor, packed: Packed) -> Tensor:
        """y of a position; the rows `slots` of state are updated in place."""
        x = self.channels(x)
        return x + self.dropout(
            self.token_mixing_layer.step_(self.token_norm(x), state, index, slots=slots, packed=packed)
        )
