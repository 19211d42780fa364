"""Long short-term memory of several layers and both directions, with torch's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import srm_core
from srm_core.errors import ContractError

NAME = "LSTM"
State = tuple[Tensor, Tensor]


class LSTM(nn.Module):
    """`torch.nn.LSTM` over `srm_core.lstm`: the same arguments, parameter names, shapes and results.

    input_size I, hidden_size H, num_layers, bias, batch_first, dropout (between layers, in training) and bidirectional
    are as torch's. proj_size is not supported. State dicts of `torch.nn.LSTM` load as they are.

    >>> import torch
    >>> from srm_core.nn import LSTM
    >>> y, (h, c) = LSTM(3, 5, num_layers=2, batch_first=True)(torch.rand(4, 7, 3))
    >>> y.shape, h.shape
    (torch.Size([4, 7, 5]), torch.Size([2, 4, 5]))
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if proj_size:
            raise ContractError(NAME, "proj_size", f"{proj_size}", "0; take a linear layer after the LSTM")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ContractError(NAME, name, f"{size!r}", "a positive integer")
        if not 0 <= dropout <= 1:
            raise ContractError(NAME, "dropout", f"{dropout!r}", "a probability, 0 to 1")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.dropout, self.bidirectional = bias, batch_first, dropout, bidirectional
        for layer, suffix in self._parts():
            width = input_size if not layer else hidden_size * self.directions
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (4 * hidden_size, width), "weight_hh": (4 * hidden_size, hidden_size),
            }  # fmt: skip
            if bias:
                shapes |= {"bias_ih": (4 * hidden_size,), "bias_hh": (4 * hidden_size,)}
            for name, shape in shapes.items():
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                self.register_parameter(f"{name}_{suffix}", parameter)
        self.reset_parameters()

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _parts(self) -> Iterator[tuple[int, str]]:
        """(layer, the end of its parameters' names) of every layer and direction, in the order of h_n."""
        for layer in range(self.num_layers):
            for end in ("", "_reverse")[: self.directions]:
                yield layer, f"l{layer}{end}"

    def reset_parameters(self) -> None:
        """Uniform in +-1 / sqrt(hidden_size), as torch's."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, input: Any, hx: State | None = None, lengths: Tensor | None = None) -> tuple[Any, State]:
        """(output, (h_n, c_n)).

        input: (T, B, I), with batch_first (B, T, I), without a batch (T, I), or a `PackedSequence`. hx: (h_0, c_0),
        each (num_layers * directions, B, H); None: zeros. lengths: (B,) integers, another way than packing to say that
        sequences end before T; the output is 0 beyond. Output: of input's form, with H * directions features.
        Errors: `ContractError` for shapes that do not fit.
        """
        if isinstance(input, PackedSequence):
            x, counts = pad_packed_sequence(input, batch_first=True)
            y, state = self._run(x, hx, counts.to(x.device))
            return pack_padded_sequence(y, counts, True, enforce_sorted=input.sorted_indices is None), state
        if input.dim() == 2:
            y, (h, c) = self._run(input[None], None if hx is None else (hx[0][:, None], hx[1][:, None]), lengths)
            return y[0], (h[:, 0], c[:, 0])
        if input.dim() != 3:
            raise ContractError(NAME, "input", f"shape {tuple(input.shape)}", "(T, B, I), (B, T, I) or (T, I)")
        y, state = self._run(input if self.batch_first else input.transpose(0, 1), hx, lengths)
        return y if self.batch_first else y.transpose(0, 1), state

    def _run(self, x: Tensor, hx: State | None, lengths: Tensor | None) -> tuple[Tensor, State]:
        """The same of x (B, T, I)."""
        self._check(x, hx)
        ends: list[State] = []
        outputs: list[Tensor] = []
        below = x
        for i, (layer, suffix) in enumerate(self._parts()):
            backwards = suffix.endswith("_reverse")
            if not backwards and layer:
                below, outputs = torch.cat(outputs, 2), []
                if self.dropout and self.training:
                    below = nn.functional.dropout(below, self.dropout)
            weights = [getattr(self, f"{n}_{suffix}", None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            start = self._zeros(x) if hx is None else (hx[0][i], hx[1][i])
            given: Any = (_reversed(below, lengths) if backwards else below, *weights, *start)
            y, h, c = srm_core.lstm(*given, lengths=lengths)
            outputs.append(_reversed(y, lengths) if backwards else y)
            ends.append((h, c))
        return torch.cat(outputs, 2), (torch.stack([h for h, _ in ends]), torch.stack([c for _, c in ends]))

    def _zeros(self, x: Tensor) -> tuple[Any, Any]:
        """The state to begin with, if none is given: of a half dtype, where None would mean a float32 one."""
        if x.dtype in (torch.float32, torch.float64):
            return None, None
        zeros = x.new_zeros(x.shape[0], self.hidden_size)
        return zeros, zeros

    def _check(self, x: Tensor, hx: State | None) -> None:
        if x.shape[2] != self.input_size:
            raise ContractError(NAME, "input", f"{x.shape[2]} features", f"input_size={self.input_size}")
        expected = (self.num_layers * self.directions, x.shape[0], self.hidden_size)
        for name, state in zip(("h_0", "c_0"), hx or (), strict=False):
            if tuple(state.shape) != expected:
                raise ContractError(NAME, name, f"shape {tuple(state.shape)}", f"{expected}")

    def extra_repr(self) -> str:
        words = [f"{self.input_size}, {self.hidden_size}", f"num_layers={self.num_layers}"]
        words += [f"{n}=True" for n in ("batch_first", "bidirectional") if getattr(self, n)]
        return ", ".join(words)


def _reversed(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (B, T, D) with the steps of each sequence the other way round; what is past its length stays."""
    if lengths is None:
        return x.flip(1)
    steps = torch.arange(x.shape[1], device=x.device)
    mirrored = lengths[:, None] - 1 - steps
    return x.take_along_dim(torch.where(mirrored >= 0, mirrored, steps)[:, :, None], 1)
