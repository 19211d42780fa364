"""Convolution, batch norm and activation as one module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import srm_core
from srm_core.contract import host_tuple
from srm_core.errors import ContractError

NAME = "ConvBN2d"
OTHERS = "statistics over processes, as of SyncBatchNorm, and weights that are computed are not supported"


class ConvBN2d(nn.Module):
    """act(BatchNorm2d(Conv2d(x))) through `srm_core.conv_bn` and, in training, `srm_core.conv_bn_train`.

    in_channels I, out_channels O, kernel_size, stride, padding, dilation, groups, bias: as of `torch.nn.Conv2d`, with
    numbers for the padding, which is with zeros. eps, momentum: as of `torch.nn.BatchNorm2d`. activation: None
    or "relu".

    The parameters are those of `conv` and `bn`, a `Conv2d` and a `BatchNorm2d`, under their names: a state dict with
    "conv.weight", "bn.running_mean", ... of such a pair loads as it is; `from_torch` takes the pair itself.

    In training the batch's statistics normalise, and move the running ones as `BatchNorm2d` does. In evaluation the
    running ones do; without gradients the weight and bias that are folded with them are kept until one of the tensors
    that they are made of changes, or `train()` or `eval()` is called. torch does not tell of a write through `.data`:
    call `eval()` after one.

    >>> import torch
    >>> from srm_core.nn import ConvBN2d
    >>> layer = ConvBN2d(3, 8, 3, padding=1, activation="relu").eval()
    >>> layer(torch.rand(2, 3, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int], stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0, dilation: int | Sequence[int] = 1, groups: int = 1, bias: bool = False,
        eps: float = 1e-5, momentum: float | None = 0.1, activation: str | None = None, device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        geometry: dict[str, Any] = {
            "stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias,
        }  # fmt: skip
        size: Any = kernel_size
        conv = nn.Conv2d(in_channels, out_channels, size, **geometry, device=device, dtype=dtype)
        self._take(conv, nn.BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype), activation)

    def _take(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str | None) -> None:
        if activation not in (None, "relu"):
            raise ContractError(NAME, "activation", repr(activation), '"relu" or None')
        for name, module, required in (("conv", conv, nn.Conv2d), ("bn", bn, nn.BatchNorm2d)):
            if type(module) is not required:  # a subclass may compute anything else
                raise ContractError(NAME, name, type(module).__name__, f"torch.nn.{required.__name__} itself", OTHERS)
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            found = f"padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
            raise ContractError(NAME, "padding", found, "numbers, and zeros about the image")
        if conv.out_channels != bn.num_features:
            found = f"{bn.num_features} features after {conv.out_channels} channels"
            raise ContractError(NAME, "bn", found, f"{conv.out_channels}, as the convolution gives")
        if bn.running_mean is None:
            raise ContractError(NAME, "bn", "track_running_stats=False", "running statistics")
        self.conv, self.bn, self.activation = conv, bn, activation
        self._kept: tuple[Any, Any, Tensor, Tensor] | None = None

    @classmethod
    def from_torch(cls, conv: nn.Conv2d, bn: nn.BatchNorm2d, activation: str | None = None) -> ConvBN2d:
        """A module over the same parameters and statistics, which are shared, not copied.

        Errors: `ContractError` for another padding than zeros, batch norm without running statistics, and subclasses,
        such as those that `torch.nn.SyncBatchNorm` or a parametrization make.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._take(conv, bn, activation)
        made.training = bn.training
        return made

    def to_torch(self) -> nn.Sequential:
        """The same as torch's own modules over the same tensors: convolution, batch norm, and ReLU if there is one."""
        pair = nn.Sequential(self.conv, self.bn, *([nn.ReLU()] if self.activation else []))
        pair.training = self.training
        return pair

    def train(self, mode: bool = True) -> ConvBN2d:
        """As of every module; also forgets the fold."""
        self.forget()
        return super().train(mode)

    def forget(self) -> None:
        """Fold anew at the next call: for a write that torch does not tell of."""
        self._kept = None

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, H, W) -> (B, O, P, Q), of x's dtype and memory format; channels-last is the fast one."""
        conv: Any = self.conv
        bn: Any = self.bn
        options = {
            "stride": host_tuple(conv.stride), "padding": host_tuple(conv.padding),
            "dilation": host_tuple(conv.dilation), "groups": conv.groups, "activation": self.activation,
        }  # fmt: skip
        if bn.training:
            y, mean, var = srm_core.conv_bn_train(x, conv.weight, conv.bias, bn.weight, bn.bias, eps=bn.eps, **options)
            observe(bn.running_mean, bn.running_var, mean, var, y.numel() // y.shape[1], self._rate())
            return y
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and self._wants_gradient(x)):
            statistics = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
            return srm_core.conv_bn(x, conv.weight, conv.bias, *statistics, eps=bn.eps, **options)
        weight, bias = self._folded(x)
        return srm_core.conv_bn(x, weight, bias, None, None, **options)

    def _rate(self) -> Any:
        """The momentum of this batch, which is counted; without one the statistics are the mean of all batches."""
        bn: Any = self.bn
        bn.num_batches_tracked.add_(1)
        return 1 / bn.num_batches_tracked.to(bn.running_mean.dtype) if bn.momentum is None else bn.momentum

    def _wants_gradient(self, x: Tensor) -> bool:
        return x.requires_grad or any(p.requires_grad for p in self.parameters())

    def _folded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and bias that do both, in x's dtype and memory format."""
        conv, bn = self.conv, self.bn
        made_of = (conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.weight, bn.bias)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        key = (x.dtype, last, bn.eps, *(None if t is None else _state(t) for t in made_of))
        kept = self._kept
        if kept is None or kept[0] != key:
            with torch.no_grad():
                alive = tuple(None if t is None else (t, t.detach()) for t in made_of)
                kept = self._kept = (key, alive, *_fold(conv, bn, x.dtype, last))
        return kept[2], kept[3]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}  # identities mean nothing in another process, or copy

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


@torch.no_grad()
def observe(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, pixels: int, rate: Any) -> None:
    """Move running statistics by `rate` towards those of a batch: the variance by its unbiased estimate, of so many
    pixels."""
    if pixels < 2:
        found = f"{pixels} values a channel"
        raise ContractError(NAME, "x", found, "at least two in training, which a variance is made of")
    running_mean.lerp_(mean.detach().to(running_mean.dtype), rate)
    running_var.lerp_((var.detach() * (pixels / (pixels - 1))).to(running_var.dtype), rate)


def _state(t: Tensor) -> tuple[Any, ...]:
    """What changes when a tensor does: it was replaced, given other memory, or written to. Tensor and memory have to
    be kept alive, else another one may get their place."""
    return id(t), t.data_ptr(), 0 if t.is_inference() else t._version


def _fold(conv: nn.Conv2d, bn: Any, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    scale = torch.rsqrt(bn.running_var.to(wide) + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight.to(wide)
    shift = -bn.running_mean.to(wide) if conv.bias is None else conv.bias.to(wide) - bn.running_mean.to(wide)
    shift = shift * scale if bn.bias is None else shift * scale + bn.bias.to(wide)
    weight = (conv.weight.to(wide) * scale[:, None, None, None]).to(dtype)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return weight.contiguous(memory_format=layout), shift.to(dtype)
