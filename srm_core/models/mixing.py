"""Token mixing: every variant as one call of the same operator.

A layer spreads its (..., E) channels over heads, runs `recurrent_mix` or `recurrent_step` on all of them at
once, and gathers the heads again. The variants differ only in how they spread and gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from srm_core.models.checkpoint import Parameters
from srm_core.models.config import MixerConfig
from srm_core.ops.common import Array
from srm_core.ops.recurrent_mix import recurrent_mix
from srm_core.ops.recurrent_step import recurrent_step

Spread = Literal["split", "twice", "shift"]


@dataclass
class TokenMixing:
    """split: E channels into H heads. twice: each head as a row and as a col mixer, summed. shift: H copies of
    all channels, copy i reading channel e - (H-1-i), summed.

    weight, bias: (H', L). decay: (H',). proj_in, proj_out: (E, E) matrices applied as x @ m, and (E,) biases.
    """

    spread_as: Spread
    mode: tuple[str, ...]
    weight: Any
    bias: Any
    decay: Any
    proj_in: tuple[Any, Any] | None = None
    proj_out: tuple[Any, Any] | None = None

    def state_shape(self, batch: int, width: int) -> tuple[int, int, int]:
        """(B, H', D) of the recurrent state for `width` channels."""
        heads = len(self.mode)
        per_head = {"split": width // heads, "twice": 2 * width // heads, "shift": width}[self.spread_as]
        return batch, heads, per_head

    def _spread(self, xp: Any, x: Any) -> Any:  # (..., E) -> (..., H', D)
        if self.proj_in is not None:
            x = x @ self.proj_in[0] + self.proj_in[1]
        heads, lead, width = len(self.mode), x.shape[:-1], x.shape[-1]
        if self.spread_as == "split":
            return xp.reshape(x, (*lead, heads, width // heads))
        if self.spread_as == "twice":
            x = xp.reshape(x, (*lead, heads // 2, 2 * width // heads))
            return xp.concat([x, x], axis=-2)
        zeros = xp.zeros_like(x)
        taps = []
        for shift in range(heads - 1, -1, -1):
            shift = min(shift, width)
            taps.append(xp.concat([zeros[..., :shift], x[..., : width - shift]], axis=-1))
        return xp.stack(taps, axis=-2)

    def _gather(self, xp: Any, y: Any) -> Any:  # (..., H', D) -> (..., E)
        lead, heads, width = y.shape[:-2], y.shape[-2], y.shape[-1]
        if self.spread_as == "shift":
            y = xp.sum(y, axis=-2)
        elif self.spread_as == "twice":
            y = y[..., : heads // 2, :] + y[..., heads // 2 :, :]
            y = xp.reshape(y, (*lead, heads // 2 * width))
        else:
            y = xp.reshape(y, (*lead, heads * width))
        if self.proj_out is not None:
            y = y @ self.proj_out[0] + self.proj_out[1]
        return y

    def mix(self, xp: Any, x: Any, state: Any, start: Any, lengths: Any) -> tuple[Any, Any]:
        """x (B, T, E), state (B, H', D) or None -> y (B, T, E) and the state after each sequence."""
        spread = self._spread(xp, x)
        y, final = recurrent_mix(
            spread, self.weight, self.bias, self.decay, self.mode, state, start=start, lengths=lengths
        )
        return self._gather(xp, y), final

    def step(self, xp: Any, x: Any, state: Any, index: Any) -> tuple[Any, Any]:
        """x (B, E), state (B, H', D) -> y (B, E), new state."""
        spread = self._spread(xp, x)
        y, new = recurrent_step(spread, state, self.weight, self.bias, self.decay, self.mode, index)
        return self._gather(xp, y), new


def build(p: Parameters, prefix: str, config: MixerConfig) -> TokenMixing:
    """The token mixing under `prefix`, with NumPy float64 parameters."""
    length = config.seq_len

    def decay(name: str, count: int) -> Array:  # (count,)
        if not config.decay:
            return np.ones(count)
        shape = (1,) if count == 1 else (count, 1)
        return np.clip(p.take(name + "decay_value", *shape).ravel(), 0.9, 1.0) ** (1 / config.decay_constant)

    if config.heads is None:
        weight = p.take(prefix + "weight", config.kernel, length)
        bias = np.zeros_like(weight)
        bias[0] = p.take(prefix + "bias", length)
        if config.kernel == 1:
            return TokenMixing("split", ("row",), weight, bias, decay(prefix, 1))
        # Of the two decays that the original keeps, the col mixer's, the second, is in use.
        return TokenMixing(
            "shift", ("col",) * config.kernel, weight, bias, np.repeat(decay(prefix, 2)[1], config.kernel)
        )
    heads = config.heads
    if config.parallel_heads:
        half = ("col",) * (heads // 2) + ("row",) * (heads - heads // 2)
        mixer = prefix + "mixer_heads."
        layer = TokenMixing(
            "split", half, p.take(mixer + "weight", heads, length), p.take(mixer + "bias", heads, length),
            np.repeat(decay(mixer, 2)[1], heads),
        )  # fmt: skip
        if config.use_projections:
            layer.proj_in = _linear(p, prefix + "in_proj.", config.hidden_dim)
        else:
            p.drop(prefix + "in_proj.")
            p.drop(prefix + "out_proj.")
    else:
        layer = _separate_heads(p, prefix, config, decay)
        if config.use_projections:
            parts = [
                _linear(p, f"{prefix}proj_head.{h}.", config.hidden_dim, config.hidden_dim // heads)
                for h in range(heads)
            ]
            layer.proj_in = np.concatenate([m for m, _ in parts], axis=1), np.concatenate([b for _, b in parts])
    if config.use_projections:
        layer.proj_out = _linear(p, prefix + "out_proj.", config.hidden_dim)
    return layer


def _separate_heads(p: Parameters, prefix: str, config: MixerConfig, decay: Any) -> TokenMixing:
    """Heads that the original keeps as modules of their own."""
    assert config.heads is not None
    heads, length, count = config.heads, config.seq_len, 2 if config.combined_heads else 1
    names = [f"{prefix}mixer_heads.{h}." for h in range(heads)]
    weight = np.stack([p.take(n + "weight", count, length) for n in names], axis=1)  # (1 or 2, H, L)
    bias = np.stack([p.take(n + "bias", length) for n in names])
    decays = np.stack([decay(n, count) for n in names], axis=1)  # (1 or 2, H)
    if config.combined_heads:
        return TokenMixing(
            "twice", ("row",) * heads + ("col",) * heads, weight.reshape(2 * heads, length),
            np.concatenate([bias, np.zeros_like(bias)]), decays.reshape(2 * heads),
        )  # fmt: skip
    rows = heads - heads // 2 if config.mixed_heads else 0
    return TokenMixing("split", ("col",) * (heads - rows) + ("row",) * rows, weight[0], bias, decays[0])


def _linear(p: Parameters, prefix: str, width: int, out: int | None = None) -> tuple[Array, Array]:
    """(matrix, bias) of a linear layer, the matrix transposed so that x @ matrix applies it."""
    out = width if out is None else out
    return p.take(prefix + "weight", out, width).T, p.take(prefix + "bias", out)
