"""Causal linear layers of one repeated weight: the token mixing of the recurrent mixer.

A head is a lower-triangular matrix over time, M[t, s] = d^(t-s) w[s] (row) or d^(t-s) w[t] (col), which is a linear
recurrence: `srm_core.recurrent_mix` over a whole sequence, `srm_core.recurrent_step` a position at a time. Every layer
here spreads its (..., E) channels over heads, runs all of them in one call, and gathers them. Parameters have the
names and shapes of the original implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_core.errors import ContractError
from srm_core.ops.recurrent_mix import recurrent_mix
from srm_core.ops.recurrent_step import recurrent_step
from srm_core.ops.recurrent_step_ import recurrent_step_

LOW, HIGH = 0.9, 1.0  # a decay is clipped to this
INITIAL_DECAY = 0.98


class Packed(NamedTuple):
    """The parameters of all heads of a layer, as the operators take them."""

    weight: Tensor  # (H', L)
    bias: Tensor  # (H', L)
    decay: Tensor  # (H',)
    proj_in: tuple[Tensor, Tensor] | None = None  # (E, E) and (E,), for F.linear


class _ClipDecay(torch.autograd.Function):
    """Clip to [LOW, HIGH]; outside, a gradient passes if a descent along it leads back."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clamp(LOW, HIGH)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (value,) = ctx.saved_tensors
        outward = ((value < LOW) & (grad > 0)) | ((value > HIGH) & (grad < 0))
        return grad.masked_fill(outward, 0.0)


def effective_decay(value: Tensor, constant: int) -> Tensor:
    """clip(value, 0.9, 1) ** (1 / constant), in float32 for half types, in which 0.999 would be 1.

    The derivative is the clip's inside [0.9, 1]. Outside, where it is 0 and a decay would be stuck, a gradient whose
    descent leads back passes unchanged, and one that leads further out does not.
    """
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    value = _ClipDecay.apply(value)
    return value if constant == 1 else value ** (1 / constant)


class CausalMixing(nn.Module):
    """What the layers of this module have in common: E channels into H' heads, one operator call, and back.

    mode: "row" or "col" for each of the H' heads. decay_constant: the root of the clipped decay that is taken.
    """

    mode: tuple[str, ...]
    decay_constant: int

    def pack(self) -> Packed:
        """The parameters as the operators take them, differentiable. Worth keeping over many steps of decoding."""
        raise NotImplementedError

    def _spread(self, x: Tensor) -> Tensor:  # (..., E) -> (..., H', D)
        return x.unflatten(-1, (len(self.mode), -1))

    def _gather(self, y: Tensor) -> Tensor:  # (..., H', D) -> (..., E)
        return y.flatten(-2)

    def _heads(self, x: Tensor, packed: Packed) -> Tensor:
        return self._spread(x if packed.proj_in is None else F.linear(x, *packed.proj_in))

    def state_shape(self, batch: int, width: int) -> tuple[int, int, int]:
        """(B, H', D) of the recurrent state for E = `width` channels."""
        return batch, len(self.mode), width // len(self.mode)

    def forward(self, x: Tensor) -> Tensor:
        """y (B, T, E) of x (B, T, E), T <= seq_len, from position 0 and no past."""
        return self.mix(x)[0]

    def mix(
        self, x: Tensor, state: Tensor | None = None, *, start: Any = 0, lengths: Tensor | None = None,
        packed: Packed | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y (B, T, E) of x (B, T, E), and the state (B, H', D) after it.

        start: the position of x[:, 0], an int or (B,) integers. lengths: (B,) integers; beyond them y means nothing.
        Errors: `ContractError`, from `srm_core.recurrent_mix`.
        """
        p = packed or self.pack()
        y, final = recurrent_mix(
            self._heads(x, p), p.weight, p.bias, p.decay, self.mode, state, start=start, lengths=lengths
        )
        return self._gather(y), final

    def step(self, x: Tensor, state: Tensor, index: Any, *, packed: Packed | None = None) -> tuple[Tensor, Tensor]:
        """y (B, E) of x (B, E) at position index, an int or (B,) integers, and the new state (B, H', D)."""
        p = packed or self.pack()
        y, new = recurrent_step(self._heads(x, p), state, p.weight, p.bias, p.decay, self.mode, index)
        return self._gather(y), new

    def step_(
        self, x: Tensor, state: Tensor, index: Any, *, slots: Tensor | None = None, packed: Packed | None = None
    ) -> Tensor:
        """As `step`, on the rows `slots` of state (N, H', D), in place. It has no gradient."""
        p = packed or self.pack()
        y = recurrent_step_(self._heads(x, p), state, p.weight, p.bias, p.decay, self.mode, index, slots=slots)
        return self._gather(y)


class _OwnWeights(CausalMixing):
    """A layer with weight, bias and, if learnable, decay_value of its own. decay_count: how many of the latter."""

    decay_value: Tensor | None

    def _create(
        self, weights: int, bias: tuple[int, ...], decays: tuple[int, ...] | None, initial_decay: float, per_step: int,
        decay_constant: int | None,
    ) -> None:  # fmt: skip
        length = bias[-1]
        self.decay_constant = max(1, length // per_step) if decay_constant is None else decay_constant
        # Averages of the past, weighted by d; sums would grow with the text where d is 1. A row head cannot know how
        # long the past will be, so it counts with L. Heads that share a bias are summed.
        d = 1.0 if decays is None else min(max(initial_decay, LOW), HIGH) ** (1 / self.decay_constant)
        mean = torch.full((length,), d, dtype=torch.float64).cumprod(0).div(d).cumsum(0).reciprocal()
        begin = torch.stack([mean if mode == "col" else mean[-1].expand(length) for mode in self.mode])
        self.weight = nn.Parameter((begin if len(bias) > 1 else begin / weights).to(torch.get_default_dtype()))
        self.bias = nn.Parameter(torch.zeros(bias))
        value = None if decays is None else nn.Parameter(torch.full(decays, initial_decay))
        self.register_parameter("decay_value", value)

    def _decay(self, count: int, at: int | None = None) -> Tensor:
        """(count,): each head's own, or entry `at` for all."""
        if self.decay_value is None:
            return self.weight.new_ones(count)
        decay = effective_decay(self.decay_value.flatten(), self.decay_constant)
        return decay if at is None else decay[at].repeat(count)

    def extra_repr(self) -> str:
        return f"seq_len={self.weight.shape[-1]}, heads={len(self.mode)}, decay={self.decay_value is not None}"


class ColRepeatCausalLinear(_OwnWeights):
    """One col head over all channels: y[t] = w[t] s[t] + b[t] with s[t] = x[t] + d s[t-1].

    weight (1, L), bias (L,), and with `decay` decay_value (1,), which enters as clip(decay_value, 0.9, 1) **
    (1 / decay_constant); without, d = 1. decay_constant: by default L // 512, at least 1.

    >>> import torch
    >>> layer = ColRepeatCausalLinear(8, decay=True)
    >>> layer(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 3])
    """

    mode = ("col",)

    def __init__(
        self, seq_len: int, *, decay: bool = False, initial_decay: float = INITIAL_DECAY,
        decay_constant: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._create(1, (seq_len,), (1,) if decay else None, initial_decay, 512, decay_constant)

    def pack(self) -> Packed:
        return Packed(self.weight, self.bias[None], self._decay(1))


class RowRepeatCausalLinear(ColRepeatCausalLinear):
    """One row head over all channels: y[t] = s[t] + b[t] with s[t] = w[t] x[t] + d s[t-1]. Else as the col layer."""

    mode = ("row",)


class CombinedRepeatCausalLinear(_OwnWeights):
    """A row and a col head over the same channels, summed.

    weight (2, L): row, col. bias (L,). decay_value (2, 1): row, col; without `decay`, both are 1.
    """

    mode = ("row", "col")

    def __init__(
        self, seq_len: int, *, decay: bool = False, initial_decay: float = INITIAL_DECAY,
        decay_constant: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._create(2, (seq_len,), (2, 1) if decay else None, initial_decay, 512, decay_constant)

    def pack(self) -> Packed:
        return Packed(self.weight, _first_of(self.bias, 2), self._decay(2))

    def state_shape(self, batch: int, width: int) -> tuple[int, int, int]:
        return batch, 2, width

    def _spread(self, x: Tensor) -> Tensor:
        return torch.stack([x, x], dim=-2)

    def _gather(self, y: Tensor) -> Tensor:
        return y.sum(-2)


class KernelRepeatLinear(_OwnWeights):
    """The sum of `kernel` col heads, head i on channels shifted by kernel - 1 - i: channel e of it reads e - shift.

    weight (K, L), bias (L,). decay_value (2, 1), of which the second is in use, for all heads, as in the original.
    decay_constant: by default L // 256, at least 1.
    """

    def __init__(
        self, seq_len: int, kernel: int, *, decay: bool = False, initial_decay: float = INITIAL_DECAY,
        decay_constant: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if kernel < 1:
            raise ContractError("KernelRepeatLinear", "kernel", f"{kernel}", "a positive integer")
        self.mode = ("col",) * kernel
        self._create(kernel, (seq_len,), (2, 1) if decay else None, initial_decay, 256, decay_constant)

    def pack(self) -> Packed:
        taps = len(self.mode)
        return Packed(self.weight, _first_of(self.bias, taps), self._decay(taps, at=1))

    def state_shape(self, batch: int, width: int) -> tuple[int, int, int]:
        return batch, len(self.mode), width

    def _spread(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        shifts = range(len(self.mode) - 1, -1, -1)
        return torch.stack([F.pad(x, (shift, 0))[..., :width] for shift in shifts], dim=-2)

    def _gather(self, y: Tensor) -> Tensor:
        return y.sum(-2)


class HeadedRepeatCausalLinear(_OwnWeights):
    """`heads` heads, each on its share of the channels: the first half col, the second row.

    weight, bias (H, L). decay_value (2, 1), of which the second is in use, for all heads, as in the original.
    """

    def __init__(
        self, seq_len: int, heads: int, *, decay: bool = False, initial_decay: float = INITIAL_DECAY,
        decay_constant: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.mode = _half(heads)
        self._create(heads, (heads, seq_len), (2, 1) if decay else None, initial_decay, 512, decay_constant)

    def pack(self) -> Packed:
        return Packed(self.weight, self.bias, self._decay(len(self.mode), at=1))


class ParallelRepeatHeads(CausalMixing):
    """A `HeadedRepeatCausalLinear` between two (E, E) projections.

    With use_projections=False, in_proj and out_proj are there, as the original's state dict has them, and unused.
    """

    def __init__(
        self, hidden_dim: int, seq_len: int, heads: int, *, decay: bool = False, use_projections: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_heads("ParallelRepeatHeads", hidden_dim, heads)
        self.use_projections = use_projections
        self.in_proj = nn.Linear(hidden_dim, hidden_dim)
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        self.mixer_heads = HeadedRepeatCausalLinear(seq_len, heads, decay=decay)
        self.mode = self.mixer_heads.mode

    def pack(self) -> Packed:
        proj_in = (self.in_proj.weight, self.in_proj.bias) if self.use_projections else None
        return self.mixer_heads.pack()._replace(proj_in=proj_in)

    def _gather(self, y: Tensor) -> Tensor:
        return self.out_proj(y.flatten(-2)) if self.use_projections else y.flatten(-2)


class _SeparateHeads(CausalMixing):
    """Heads that are modules of their own, each with a projection (E, E/H) before it."""

    def __init__(
        self, hidden_dim: int, mixers: Sequence[ColRepeatCausalLinear | CombinedRepeatCausalLinear],
        use_projections: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        heads = len(mixers)
        self.mode = tuple(m.mode[i] for i in range(len(mixers[0].mode)) for m in mixers)
        self.mixer_heads: Any = nn.ModuleList(mixers)
        self.use_projections = use_projections
        if use_projections:
            self.proj_head: Any = nn.ModuleList(nn.Linear(hidden_dim, hidden_dim // heads) for _ in range(heads))
            self.out_proj = nn.Linear(hidden_dim, hidden_dim)

    def pack(self) -> Packed:
        mixers = list(self.mixer_heads)
        # Side by side, then laid end to end: all rows of combined heads before all cols.
        weight = torch.stack([m.weight for m in mixers], dim=1).flatten(0, 1)
        bias = _first_of(torch.stack([m.bias for m in mixers]), len(self.mode) // len(mixers))
        if mixers[0].decay_value is None:
            decay = weight.new_ones(len(weight))
        else:
            values = torch.stack([m.decay_value.flatten() for m in mixers], dim=1).flatten()
            decay = effective_decay(values, mixers[0].decay_constant)
        if not self.use_projections:
            return Packed(weight, bias.flatten(0, -2), decay)
        proj_in = torch.cat([p.weight for p in self.proj_head]), torch.cat([p.bias for p in self.proj_head])
        return Packed(weight, bias.flatten(0, -2), decay, proj_in)

    def _gather(self, y: Tensor) -> Tensor:
        y = y.flatten(-2)
        return self.out_proj(y) if self.use_projections else y


class MixedRepeatHeads(_SeparateHeads):
    """Heads on projections of the channels, the first half col, the second row, then a projection of all.

    Decays begin evenly spread over [0.9, 1] in each half. hidden_dim must be a multiple of heads.
    """

    def __init__(
        self, hidden_dim: int, seq_len: int, heads: int, *, decay: bool = False, use_projections: bool = True
    ) -> None:
        _check_heads("MixedRepeatHeads", hidden_dim, heads)
        cols = heads // 2
        begin = _evenly(cols) + _evenly(heads - cols)
        kinds = [ColRepeatCausalLinear] * cols + [RowRepeatCausalLinear] * (heads - cols)
        mixers = [kind(seq_len, decay=decay, initial_decay=d) for kind, d in zip(kinds, begin, strict=True)]
        super().__init__(hidden_dim, mixers, use_projections)


class RepeatHeads(_SeparateHeads):
    """Heads on projections of the channels, col, or with `combined` a row and a col each; then a projection of all.

    Decays begin evenly spread over [0.9, 1]. hidden_dim must be a multiple of heads.
    """

    def __init__(
        self, hidden_dim: int, seq_len: int, heads: int, *, combined: bool = False, decay: bool = False,
        use_projections: bool = True,
    ) -> None:  # fmt: skip
        _check_heads("RepeatHeads", hidden_dim, heads)
        kind = CombinedRepeatCausalLinear if combined else ColRepeatCausalLinear
        super().__init__(
            hidden_dim, [kind(seq_len, decay=decay, initial_decay=d) for d in _evenly(heads)], use_projections
        )
        self.combined = combined

    def state_shape(self, batch: int, width: int) -> tuple[int, int, int]:
        return batch, len(self.mode), width // len(self.mixer_heads)

    def _spread(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (len(self.mixer_heads), -1))
        return torch.cat([x, x], dim=-2) if self.combined else x

    def _gather(self, y: Tensor) -> Tensor:
        if self.combined:
            y = y.unflatten(-2, (2, -1)).sum(-3)
        return super()._gather(y)


def _first_of(bias: Tensor, count: int) -> Tensor:
    """(count, *bias.shape): the bias, then zeros; heads that are summed have one bias between them."""
    return bias[None] if count == 1 else torch.stack([bias] + [torch.zeros_like(bias)] * (count - 1))


def _half(heads: int) -> tuple[str, ...]:
    return ("col",) * (heads // 2) + ("row",) * (heads - heads // 2)


def _evenly(count: int) -> list[float]:
    return torch.linspace(LOW, HIGH, count, dtype=torch.float64).tolist()


def _check_heads(layer: str, width: int, heads: int) -> None:
    if heads < 1 or width % heads:
        raise ContractError(layer, "heads", f"{heads}", f"a positive divisor of hidden_dim {width}")
