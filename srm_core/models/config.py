"""The shape of a recurrent mixer, under the argument names of the original implementation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from srm_core.errors import CheckpointError

# Arguments of the original that change how it trains or where it keeps its state, not what it computes.
IGNORED = ("use_shared_cache", "dropout")


@dataclass(frozen=True)
class MixerConfig:
    """vocab_size V, hidden_dim E, seq_len L (positions the model knows), num_blocks, and the mixing variant.

    heads None: one mixer over all channels, a row mixer, or with kernel > 1 that many col mixers on shifted
    channels. With heads H, each of E/H channels: col mixers; with mixed_heads half col, half row; with
    combined_heads a row and a col mixer each; with parallel_heads half col, half row, with one decay for all.
    decay: learnable. use_projections: linear maps before and after the heads.
    """

    vocab_size: int
    hidden_dim: int
    seq_len: int
    num_blocks: int
    heads: int | None = None
    kernel: int = 1
    mixed_heads: bool = False
    combined_heads: bool = False
    parallel_heads: bool = False
    decay: bool = False
    use_projections: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_dim", "seq_len", "num_blocks", "kernel", "heads"):
            value = getattr(self, name)
            if name == "heads" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(f"config: {name}: found {value!r}; required a positive integer")
        if self.heads is not None and self.hidden_dim % self.heads:
            raise CheckpointError(
                f"config: heads: found {self.heads}; required a divisor of hidden_dim {self.hidden_dim}"
            )
        if sum((self.mixed_heads, self.combined_heads, self.parallel_heads)) > 1:
            raise CheckpointError("config: at most one of mixed_heads, combined_heads, parallel_heads can be set")
        if self.heads is None and (self.mixed_heads or self.combined_heads or self.parallel_heads):
            raise CheckpointError("config: heads: found None; required a number for a variant with heads")

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> MixerConfig:
        """From the original's arguments. Errors: `CheckpointError` for an unknown or missing one."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(config) - known - set(IGNORED))
        if unknown:
            raise CheckpointError(f"config: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        missing = sorted({"vocab_size", "hidden_dim", "seq_len", "num_blocks"} - set(config))
        if missing:
            raise CheckpointError(f"config: {', '.join(missing)} missing")
        return cls(**{k: v for k, v in config.items() if k in known})

    @property
    def decay_constant(self) -> int:
        """A decay enters as clip(decay_value, 0.9, 1) ** (1 / decay_constant): long models forget more slowly."""
        per_step = 256 if self.heads is None and self.kernel > 1 else 512
        return max(1, self.seq_len // per_step)
