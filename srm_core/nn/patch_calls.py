"""What a patched module calls: forwards that are set on instances of torch's modules, which stay where they are.

A pair of `Conv2d` and `BatchNorm2d` is one call only within the forward that was traced, its scope: there the
convolution gives what both make, and the batch norm hands it on. Called from elsewhere, both do what they always did.
All of it is methods of objects that hold the modules, so that a deep copy or a pickle of a model holds its own.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import srm_core
from srm_core.nn.conv_bn import ConvBN2d
from srm_core.nn.lstm import LSTM

# Of this thread: .open, the scopes whose forward it is in; .ours, is it in an operator of ours that calls torch's?
_LOCAL = threading.local()


class Scope:
    """The forward of a module; with `attends`, its calls of scaled_dot_product_attention are ours, unless compiled."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.attends = module, False

    def is_open(self) -> bool:
        return self in getattr(_LOCAL, "open", ())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        before = getattr(_LOCAL, "open", ())
        _LOCAL.open = (*before, self)
        try:
            # Dynamo does not follow every method of a tensor through a mode: what compiles without must compile with.
            if not self.attends or torch.compiler.is_compiling():
                return type(self.module).forward(self.module, *args, **kwargs)
            with Attend():
                return type(self.module).forward(self.module, *args, **kwargs)
        finally:
            _LOCAL.open = before


class Pair:
    """A convolution and its batch norm, and the ReLU behind them where `fused` has one."""

    def __init__(self, scope: Scope, fused: ConvBN2d, relu: nn.ReLU | None) -> None:
        self.scope, self.fused, self.relu = scope, fused, relu

    def conv_forward(self, input: Tensor) -> Tensor:
        return self.fused.forward(input) if self.scope.is_open() else nn.Conv2d.forward(self.fused.conv, input)

    def bn_forward(self, input: Tensor) -> Tensor:
        return input if self.scope.is_open() else nn.BatchNorm2d.forward(self.fused.bn, input)

    def relu_forward(self, input: Tensor) -> Tensor:
        assert self.relu is not None
        return input if self.scope.is_open() else nn.ReLU.forward(self.relu, input)

    def train(self, mode: bool = True) -> nn.Module:
        """The batch norm's; the fold is forgotten, as by `ConvBN2d.train`."""
        self.fused.forget()
        return nn.BatchNorm2d.train(self.fused.bn, mode)


class Recurrence:
    """The forward of an `nn.LSTM`: that of our `LSTM` over the same table of parameters."""

    def __init__(self, module: nn.LSTM) -> None:
        self.module = module
        view = self.view = LSTM.__new__(LSTM)
        nn.Module.__init__(view)
        for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"):
            setattr(view, name, getattr(module, name))
        view._parameters = module._parameters

    def forward(self, input: Any, hx: Any = None) -> Any:
        if self.view.training is not self.module.training:
            self.view.training = self.module.training
        return self.view.forward(input, hx)


class Heads:
    """The forward of an `nn.MultiheadAttention`; calls that want weights, drop out or have no batch stay torch's."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        self.module = module

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        m = self.module
        torchs = need_weights or (m.dropout and m.training) or (is_causal and attn_mask is None)
        if torchs or query.dim() != 3 or query.is_nested:
            return nn.MultiheadAttention.forward(
                m, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = (self._heads(x) for x in self._projected(query, key, value))  # (B, H, T, D)
        mask = _mask(q, k, attn_mask, key_padding_mask)
        _LOCAL.ours = True  # a patched module around this one must not swap what the operator itself calls
        try:
            out = srm_core.attention(q, k, v, mask)
        finally:
            _LOCAL.ours = False
        y = F.linear(out.transpose(1, 2).flatten(2), m.out_proj.weight, m.out_proj.bias)
        return (y if m.batch_first else y.transpose(0, 1)), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> Any:
        m: Any = self.module
        if m.in_proj_weight is None:
            weights = (m.q_proj_weight, m.k_proj_weight, m.v_proj_weight)
        elif query is key and key is value:
            return F.linear(query, m.in_proj_weight, m.in_proj_bias).chunk(3, -1)
        else:
            weights = m.in_proj_weight.chunk(3)
        biases = (None,) * 3 if m.in_proj_bias is None else m.in_proj_bias.chunk(3)
        return [F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        x = x if self.module.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.module.num_heads, self.module.head_dim)).transpose(1, 2)


def _mask(q: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """What `srm_core.attention` takes for the masks of `nn.MultiheadAttention`, which are True where masked out."""
    masks = []
    if attn_mask is not None:
        shape = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        masks.append(attn_mask.view(shape) if attn_mask.dim() == 3 else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None])
    if not masks:
        return None
    if all(m.dtype is torch.bool for m in masks):
        return ~(masks[0] | masks[-1])
    zero = q.new_zeros(())
    added = [zero.masked_fill(m, -torch.inf) if m.dtype is torch.bool else m.to(q.dtype) for m in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


class Seen(TorchFunctionMode):
    """Notes in `owners` in whose forward scaled_dot_product_attention is called, also where the call is behind a table
    of functions: the innermost of `modules` that is `self` in a frame on the way to it."""

    def __init__(self, modules: Container[nn.Module]) -> None:
        super().__init__()
        self.modules, self.owners = modules, dict[nn.Module, None]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1) if func is F.scaled_dot_product_attention else None
        while frame is not None:
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and owner in self.modules:
                if not isinstance(owner, nn.MultiheadAttention):  # which is swapped as a whole
                    self.owners[owner] = None
                break
            frame = frame.f_back
        return func(*args, **(kwargs or {}))


class Attend(TorchFunctionMode):
    """Calls of scaled_dot_product_attention go to `srm_core.attention`, where it takes them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_attention = func is F.scaled_dot_product_attention and not getattr(_LOCAL, "ours", False)
        return (_attention if is_attention else func)(*args, **(kwargs or {}))


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    mask, is_flat = attn_mask, query.dim() == 3
    if dropout_p or not _takes(query, key, value, mask, is_causal, enable_gqa):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_flat:  # (B, T, D): one head
        query, key, value = (x[:, None] for x in (query, key, value))
        mask = mask[:, None] if mask is not None and mask.dim() == 3 else mask
    out = srm_core.attention(query, key, value, mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
    return out[:, 0] if is_flat else out


def _takes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, enable_gqa: bool) -> bool:
    """Is it a call that the operator defines? torch's own also broadcasts batches, and takes more axes."""
    tensors = (query, key, value)
    axes = query.dim()
    if axes not in (3, 4) or any(t.dim() != axes or t.is_nested or t.dtype is not query.dtype for t in tensors):
        return False
    if not query.is_floating_point() or (mask is not None and is_causal):
        return False
    heads, others = query.shape[:-2], key.shape[:-2]
    grouped = enable_gqa and axes == 4 and heads[0] == others[0] and others[1] and heads[1] % others[1] == 0
    if not (grouped or heads == others) or key.shape[:-1] != value.shape[:-1] or key.shape[-1] != query.shape[-1]:
        return False
    if mask is None:
        return True
    if mask.dtype not in (torch.bool, query.dtype, torch.float32) or not 2 <= mask.dim() <= axes:
        return False
    if mask.dtype is torch.float32 and query.dtype is torch.float64:
        return False
    full = (*heads, query.shape[-2], key.shape[-2])
    return all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False))
