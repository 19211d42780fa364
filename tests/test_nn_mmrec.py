"""The modules of MM-Rec against the original's outputs, and their gradients against plain torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
from safetensors.torch import load_file  # noqa: E402

from srm_core.nn import MemoryDecayIntegration, MultiMemoryAttention  # noqa: E402

ORACLE = Path(__file__).parent / "oracle"
each_dtype = pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
each_backend = pytest.mark.parametrize("backend", ["torch", "numpy"])


def oracle(name: str, dtype: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the state dict, the other tensors)."""
    tensors = {n: t.to(dtype) for n, t in load_file(ORACLE / f"{name}.safetensors").items()}
    state = {n.removeprefix("sd."): t for n, t in tensors.items() if n.startswith("sd.")}
    return state, {n: t for n, t in tensors.items() if not n.startswith("sd.")}


def close(got: Any, want: Any, tolerance: float) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def integration(dtype: Any) -> tuple[Any, dict[str, Any]]:
    state, tensors = oracle("mmrec_mdi_module", dtype)
    module = MemoryDecayIntegration(48, 12).to(dtype)
    module.load_state_dict(state)
    return module, tensors


def memory_attention(dtype: Any) -> tuple[Any, dict[str, Any]]:
    state, tensors = oracle("mmrec_hds_attention", dtype)
    module = MultiMemoryAttention(48, 6).to(dtype)
    module.load_state_dict(state)
    return module, tensors


@each_backend
@each_dtype
def test_the_integration_is_the_originals(dtype: Any, allowed: float, backend: str) -> None:
    module, tensors = integration(dtype)
    with srm_core.use_backend(backend):
        h_new, gamma = module(tensors["z"], tensors["h_prev"], tensors["context"])
    close(h_new, tensors["h_new"], allowed)
    close(gamma, tensors["gamma"], allowed)


@each_backend
@each_dtype
def test_the_attention_is_the_originals(dtype: Any, allowed: float, backend: str) -> None:
    module, tensors = memory_attention(dtype)
    with srm_core.use_backend(backend):
        close(module(tensors["query"], tensors["k_long"], tensors["v_long"]), tensors["output"], allowed)
    batch = tensors["query"].shape[0]
    each = (t.expand(batch, *t.shape) for t in (tensors["k_long"], tensors["v_long"]))
    close(module(tensors["query"], *each), tensors["output"], allowed)


def test_gradients() -> None:
    """Of arguments and parameters, against the formula in single operations."""
    module, t = integration(torch.float64)
    z, h, context = (t[n].requires_grad_() for n in ("z", "h_prev", "context"))
    g = torch.sigmoid(module.W_g(torch.cat([z, h], -1)))
    gamma = torch.sigmoid(module.W_gamma(z)) * torch.sigmoid(module.W_context(context))
    gamma = gamma.clamp(1e-6, 1 - 1e-6)
    wanted = ((1 - g) * h + g * z + gamma * h, gamma)
    leaves = [z, h, context, *module.parameters()]
    pairs = [torch.autograd.grad(a.square().sum() + b.sum(), leaves) for a, b in (module(z, h, context), wanted)]
    for got, want in zip(*pairs, strict=True):
        close(got, want, 1e-9)

    module, t = memory_attention(torch.float64)
    query, keys, values = (t[n].requires_grad_() for n in ("query", "k_long", "v_long"))
    pooled = [a.unflatten(0, (4, 16)).mean(1).unflatten(-1, (6, 8)).transpose(0, 1) for a in (keys, values)]
    q = module.W_q(query).unflatten(-1, (6, 8)).transpose(1, 2)
    weights = (q @ pooled[0].transpose(-1, -2) * 8**-0.5).softmax(-1)
    wanted = module.W_o((weights @ pooled[1]).transpose(1, 2).flatten(2))
    leaves = [query, keys, values, *module.parameters()]
    pairs = [torch.autograd.grad(a.square().sum(), leaves) for a in (module(query, keys, values), wanted)]
    for got, want in zip(*pairs, strict=True):
        close(got, want, 1e-9)


def test_compile() -> None:
    torch._dynamo.reset()
    module, t = integration(torch.float64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    close(compiled(t["z"], t["h_prev"], t["context"])[0], t["h_new"], 1e-11)
    attention, t = memory_attention(torch.float64)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    close(compiled(t["query"], t["k_long"], t["v_long"]), t["output"], 1e-11)


def test_without_a_context() -> None:
    """The decay is then that of z alone."""
    module, t = integration(torch.float64)
    _, gamma = module(t["z"], t["h_prev"])
    close(gamma, torch.sigmoid(module.W_gamma(t["z"])), 1e-12)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MemoryDecayIntegration(4)(torch.rand(2, 4), torch.rand(3, 4)), r"h_prev: found shape \(3, 4\)"),
        (lambda: MultiMemoryAttention(10, 4), "num_heads: found 4; required a divisor of 10"),
        (
            lambda: MultiMemoryAttention(8, 2)(torch.rand(1, 3, 8), torch.rand(9, 8), torch.rand(9, 8)),
            "num_levels: found 3 levels over 9 slots",
        ),
    ],
)
def test_errors(make: Any, said: str) -> None:
    with pytest.raises(srm_core.ContractError, match=said):
        make()
