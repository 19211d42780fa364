"""The thin components against torch's own functions, and what their names promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
# ruff: noqa: E402

import torch.nn.functional as F
from torch import nn

from srm_core.nn.neural_components import (
    TritonAttention,
    TritonConvBN,
    TritonLSTM,
    benchmark_neural_components,
    create_triton_attention,
    create_triton_conv_bn,
    create_triton_lstm,
)

either = pytest.mark.parametrize("use_triton", [True, False])


def wide(*shape: int, seed: int = 1) -> Any:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def same_gradients(got: Any, want: Any, leaves: dict[str, Any], others: dict[str, Any]) -> None:
    """Both outputs and the gradients of their squares; ours arrive in `.grad` of the leaves."""
    close(got, want)
    got.square().sum().backward()
    found = torch.autograd.grad(want.square().sum(), list(others.values()))
    for name, gradient in zip(others, found, strict=True):
        assert leaves[name].is_leaf, name
        close(leaves[name].grad, gradient, 1e-8)


def twins(module: Any) -> dict[str, Any]:
    return {n: p.detach().clone().requires_grad_() for n, p in module.named_parameters()}


MASKS = {
    "none": None,
    "steps": torch.ones(5, 5, dtype=torch.bool).triu(1),
    "batch": torch.rand(3, 1, 1, 5, generator=torch.Generator().manual_seed(0)) < 0.4,
    "whole": (torch.rand(3, 2, 5, 5, generator=torch.Generator().manual_seed(0)) < 0.4) & ~torch.eye(5).bool(),
}


@either
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention(mask: Any, use_triton: bool) -> None:
    torch.manual_seed(0)
    manager = object()
    module = create_triton_attention(8, 2, manager, use_triton=use_triton).double()
    assert (module.head_dim, module.n_heads, module.model_dim) == (4, 2, 8)
    assert module.feature_manager is manager
    p = twins(module)
    assert {n: tuple(v.shape) for n, v in p.items()} == dict.fromkeys(("w_q", "w_k", "w_v", "w_o"), (8, 8))
    x = wide(3, 5, 8)
    q, k, v = ((x @ p[n]).view(3, 5, 2, 4).transpose(1, 2) for n in ("w_q", "w_k", "w_v"))
    scores = q @ k.mT / 2
    if mask is not None:
        scores = scores.masked_fill(mask, -torch.inf)
    weights = scores.softmax(-1)
    want = (weights @ v).transpose(1, 2).reshape(3, 5, 8) @ p["w_o"]
    same_gradients(module.forward(x, mask), want, dict(module.named_parameters()), p)


def test_attention_that_sees_nothing() -> None:
    module = TritonAttention(8, 2)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., 2, :] = True
    y = module.forward(torch.randn(2, 4, 8), mask)
    assert not y[:, 2].any()
    assert y[:, 1].any()
    y.sum().backward()
    assert module.w_q.grad.isfinite().all()


@either
@pytest.mark.parametrize("given", [False, True])
def test_lstm(given: bool, use_triton: bool) -> None:
    torch.manual_seed(0)
    module = create_triton_lstm(3, 4, use_triton=use_triton).double()
    twin = nn.LSTM(3, 4, batch_first=True, dtype=torch.float64)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    assert [tuple(getattr(module, n).shape) for n in names] == [(16, 3), (16, 4), (16,), (16,)]
    twin.load_state_dict({f"{n}_l0": getattr(module, n) for n in names})
    h0, c0 = (wide(2, 4, seed=s) if given else None for s in (2, 3))
    out, (h, c) = module.forward(wide(2, 6, 3), h0, c0)
    want, (h_n, c_n) = twin(wide(2, 6, 3), (h0[None], c0[None]) if given else None)
    assert h.shape == c.shape == (2, 4)
    close((h, c), (h_n[0], c_n[0]))
    same_gradients(out, want, dict(module.named_parameters()), {n: getattr(twin, f"{n}_l0") for n in names})


@either
@pytest.mark.parametrize("training", [False, True])
def test_conv_bn(training: bool, use_triton: bool) -> None:
    torch.manual_seed(0)
    module = create_triton_conv_bn(3, 5, 3, stride=2, padding=1, use_triton=use_triton).double()
    assert not module.training
    sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
    assert sizes == (3, 5, 3, 2, 1)
    nn.init.normal_(module.bn_gamma), nn.init.normal_(module.bn_beta), nn.init.normal_(module.bn_running_mean)
    nn.init.uniform_(module.bn_running_var, 0.5, 2)
    module.train(training)
    p = twins(module)
    mean, var = module.bn_running_mean.clone(), module.bn_running_var.clone()
    y = module.forward(wide(2, 3, 8, 7))
    assert y.is_contiguous()
    c = F.conv2d(wide(2, 3, 8, 7), p["weight"], p["bias"], 2, 1)
    want = F.batch_norm(c, mean, var, p["bn_gamma"], p["bn_beta"], training)
    same_gradients(y, want, dict(module.named_parameters()), p)
    close((module.bn_running_mean, module.bn_running_var), (mean, var))
    last = wide(2, 3, 8, 7).to(memory_format=torch.channels_last)
    assert module.eval()(last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("module", "x"),
    [(TritonAttention(8, 2), torch.rand(2, 3, 8)), (TritonLSTM(8, 4), torch.rand(2, 3, 8)),
     (TritonConvBN(3, 4, 3).train(), torch.rand(2, 3, 5, 5))],
    ids=["attention", "lstm", "conv_bn"],
)  # fmt: skip
def test_compile(module: Any, x: Any) -> None:
    """One graph; and state dicts of the names above."""

    def first(result: Any) -> Any:
        return result[0] if isinstance(result, tuple) else result

    twin = copy.deepcopy(module)
    close(first(torch.compile(module, fullgraph=True, backend="aot_eager")(x)), first(twin(x)), 1e-5)
    twin.load_state_dict(module.state_dict())
    close(first(module.eval()(x)), first(twin.eval()(x)), 1e-5)


def test_without_triton_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """use_triton=False is a strict selection of torch, whatever else is selected."""
    asked = []
    real = srm_core.lstm
    monkeypatch.setattr(srm_core, "lstm", lambda *a, **k: asked.append(k["backend"]) or real(*a, **k))
    for use_triton in (True, False):
        create_triton_lstm(3, 4, use_triton=use_triton)(torch.rand(1, 2, 3))
    assert asked == [None, "torch"]


def test_benchmark() -> None:
    found = benchmark_neural_components(repeats=1, steps=4, model_dim=8, n_heads=2, image=6)
    assert list(found) == ["attention", "attention_torch", "lstm", "lstm_torch", "conv_bn", "conv_bn_torch"]
    assert all(isinstance(s, float) and 0 < s < 60 for s in found.values())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: TritonAttention(8, 3), "n_heads: found 3; required a divisor of model_dim=8"),
        (lambda: TritonAttention(8, 2)(torch.rand(1, 2, 8), torch.zeros(2, 2)), "mask: found torch.float32"),
        (lambda: TritonLSTM(3, 4)(torch.rand(1, 2, 5)), "lstm: "),
        (lambda: TritonConvBN(3, 4, 3).train()(torch.rand(1, 3, 3, 3)), "x: found 1 values a channel"),
    ],
)
def test_errors(make: Any, said: str) -> None:
    with pytest.raises(srm_core.ContractError, match=said):
        make()
