"""Attention, an LSTM and a convolution with batch norm as thin modules that hold their parameters and call an operator.

Each has `backend`, a selection for its calls: None for the one that is in force, "torch" for what torch itself does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import srm_core
from srm_core.errors import ContractError
from srm_core.nn.conv_bn import observe

M = TypeVar("M", bound=nn.Module)


class TritonAttention(nn.Module):
    """Self-attention of n_heads heads: softmax(q k^T / sqrt(head_dim)) v of q, k, v = x @ w_q, x @ w_k, x @ w_v, then
    @ w_o.

    w_q, w_k, w_v, w_o: (model_dim, model_dim), of which a head has the columns head_dim * h and the following.
    feature_manager: kept under its name, for the caller's use.

    Errors: `ContractError` if n_heads does not divide model_dim.
    """

    w_q: nn.Parameter
    w_k: nn.Parameter
    w_v: nn.Parameter
    w_o: nn.Parameter

    def __init__(self, model_dim: int, n_heads: int, feature_manager: Any = None) -> None:
        super().__init__()
        if n_heads < 1 or model_dim % n_heads:
            raise ContractError("TritonAttention", "n_heads", str(n_heads), f"a divisor of model_dim={model_dim}")
        self.model_dim, self.n_heads, self.head_dim = model_dim, n_heads, model_dim // n_heads
        self.feature_manager = feature_manager
        self.backend: str | None = None
        for name in ("w_q", "w_k", "w_v", "w_o"):
            setattr(self, name, nn.Parameter(nn.init.xavier_uniform_(torch.empty(model_dim, model_dim))))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, model_dim) -> (B, T, model_dim). mask: boolean, True where a step must not look; it broadcasts to
        (B, H, T, T). A step that may look nowhere gives zeros."""
        if mask is not None and mask.dtype is not torch.bool:
            raise ContractError("TritonAttention", "mask", str(mask.dtype), "torch.bool, True where masked out")
        batch, steps, _ = x.shape
        heads = (batch, steps, self.n_heads, self.head_dim)
        q, k, v = ((x @ w).view(heads).transpose(1, 2) for w in (self.w_q, self.w_k, self.w_v))
        out = srm_core.attention(q, k, v, None if mask is None else ~mask, backend=self.backend)  # (B, H, T, head_dim)
        return out.transpose(1, 2).reshape(x.shape) @ self.w_o


class TritonLSTM(nn.Module):
    """One LSTM layer, gates in the order i, f, g, o: weight_ih (4H, I), weight_hh (4H, H), bias_ih, bias_hh (4H,)."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.backend: str | None = None
        bound = 1 / math.sqrt(hidden_size)
        rows = 4 * hidden_size
        shapes = {
            "weight_ih": (rows, input_size), "weight_hh": (rows, hidden_size), "bias_ih": (rows,), "bias_hh": (rows,),
        }  # fmt: skip
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(nn.init.uniform_(torch.empty(shape), -bound, bound)))

    def forward(
        self, seq: Tensor, h0: Tensor | None = None, c0: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """seq (B, T, I), h0 and c0 (B, H) or None for 0 -> (out (B, T, H), (h, c)), h and c (B, H)."""
        weights = (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh)
        out, h, c = srm_core.lstm(seq, *weights, h0, c0, backend=self.backend)
        return out, (h, c)


class TritonConvBN(nn.Module):
    """Convolution and batch norm of square kernels: weight (O, I, K, K), and of (O,) bias, bn_gamma, bn_beta and the
    running statistics bn_running_mean and bn_running_var.

    It normalises with the running statistics, and begins in evaluation; after `train()` with those of the batch, which
    then also move the running ones, as `torch.nn.BatchNorm2d` does. eps is 1e-5, momentum 0.1.
    """

    bn_running_mean: Tensor
    bn_running_var: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.stride, self.padding, self.eps, self.momentum = stride, padding, 1e-5, 0.1
        self.backend: str | None = None
        bound = 1 / math.sqrt(in_channels * kernel_size**2)
        shape = (out_channels, in_channels, kernel_size, kernel_size)
        self.weight = nn.Parameter(nn.init.uniform_(torch.empty(shape), -bound, bound))
        self.bias = nn.Parameter(nn.init.uniform_(torch.empty(out_channels), -bound, bound))
        self.bn_gamma = nn.Parameter(torch.ones(out_channels))
        self.bn_beta = nn.Parameter(torch.zeros(out_channels))
        self.register_buffer("bn_running_mean", torch.zeros(out_channels))
        self.register_buffer("bn_running_var", torch.ones(out_channels))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """x (B, I, H, W) -> (B, O, P, Q), in the memory format of x."""
        vectors, backend = (self.bn_gamma, self.bn_beta), self.backend
        options: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "eps": self.eps, "backend": backend}
        mean, var = self.bn_running_mean, self.bn_running_var
        if not self.training:
            return srm_core.conv_bn(x, self.weight, self.bias, mean, var, *vectors, **options)
        y, of_batch, var_of_batch = srm_core.conv_bn_train(x, self.weight, self.bias, *vectors, **options)
        observe(mean, var, of_batch, var_of_batch, y.numel() // y.shape[1], self.momentum)
        return y


def create_triton_attention(
    model_dim: int, n_heads: int, feature_manager: Any = None, use_triton: bool = True
) -> TritonAttention:
    """A `TritonAttention`. use_triton: on the best backend that is here; False: on what torch itself does."""
    return _on(TritonAttention(model_dim, n_heads, feature_manager), use_triton)


def create_triton_lstm(input_size: int, hidden_size: int, use_triton: bool = True) -> TritonLSTM:
    """A `TritonLSTM`; use_triton as in `create_triton_attention`."""
    return _on(TritonLSTM(input_size, hidden_size), use_triton)


def create_triton_conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0, use_triton: bool = True
) -> TritonConvBN:
    """A `TritonConvBN`; use_triton as in `create_triton_attention`."""
    return _on(TritonConvBN(in_channels, out_channels, kernel_size, stride, padding), use_triton)


def _on(module: M, use_triton: bool) -> M:
    module.backend = None if use_triton else "torch"  # type: ignore[assignment]
    return module


def benchmark_neural_components(
    device: str = "cpu", repeats: int = 5, batch: int = 2, steps: int = 32, model_dim: int = 64, n_heads: int = 4,
    image: int = 16,
) -> dict[str, float]:  # fmt: skip
    """The median seconds of a forward without gradients, of the components and of torch itself.

    device, repeats: where, and how many calls the median is of, after one that is not counted. batch, steps, model_dim,
    n_heads: of the attention and, with model_dim for input_size and hidden_size, of the LSTM; the convolution maps
    batch images of image x image pixels and 16 channels to 32, by kernels of 3 x 3.

    Keys: "attention", "lstm", "conv_bn", and "attention_torch", "lstm_torch", "conv_bn_torch" for torch's own modules
    and functions on the same parameters.
    """
    attention = create_triton_attention(model_dim, n_heads).to(device)
    lstm = create_triton_lstm(model_dim, model_dim).to(device)
    conv_bn = create_triton_conv_bn(16, 32, 3, padding=1).to(device)
    text = torch.randn(batch, steps, model_dim, device=device)
    images = torch.randn(batch, 16, image, image, device=device)
    own_lstm = nn.LSTM(model_dim, model_dim, batch_first=True).to(device)
    own_lstm.load_state_dict({f"{name}_l0": value for name, value in lstm.state_dict().items()})

    def own_attention(x: Tensor) -> Tensor:
        heads = (*x.shape[:2], n_heads, attention.head_dim)
        q, k, v = ((x @ w).view(heads).transpose(1, 2) for w in (attention.w_q, attention.w_k, attention.w_v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape) @ attention.w_o

    def own_conv_bn(x: Tensor) -> Tensor:
        c = conv_bn
        y = F.conv2d(x, c.weight, c.bias, c.stride, c.padding)
        return F.batch_norm(y, c.bn_running_mean, c.bn_running_var, c.bn_gamma, c.bn_beta, eps=c.eps)

    calls: dict[str, tuple[Callable[[Tensor], Any], Tensor]] = {
        "attention": (attention, text), "attention_torch": (own_attention, text),
        "lstm": (lstm, text), "lstm_torch": (own_lstm, text),
        "conv_bn": (conv_bn, images), "conv_bn_torch": (own_conv_bn, images),
    }  # fmt: skip
    return {name: _median_seconds(call, x, repeats) for name, (call, x) in calls.items()}


@torch.no_grad()
def _median_seconds(call: Callable[[Tensor], Any], x: Tensor, repeats: int) -> float:
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    seconds = []
    for _ in range(repeats + 1):
        wait()
        begin = perf_counter()
        call(x)
        wait()
        seconds.append(perf_counter() - begin)
    return median(seconds[1:])
