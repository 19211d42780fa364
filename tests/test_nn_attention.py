"""`srm_core.nn.Attention` against the composition of torch's own functions."""

from __future__ import annotations

from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
from torch.nn.functional import scaled_dot_product_attention  # noqa: E402

from srm_core.nn import Attention  # noqa: E402


def composed(m: Any, x: Any, memory: Any = None, mask: Any = None) -> Any:
    seen = x if memory is None else memory
    heads = [(m.q_proj(x), m.n_heads), (m.k_proj(seen), m.n_kv_heads), (m.v_proj(seen), m.n_kv_heads)]
    query, key, value = (a.view(*a.shape[:2], n, -1).transpose(1, 2) for a, n in heads)
    key, value = (a.repeat_interleave(m.n_heads // m.n_kv_heads, 1) for a in (key, value))
    out = scaled_dot_product_attention(query, key, value, mask, is_causal=m.is_causal)
    return m.out_proj(out.transpose(1, 2).reshape(*x.shape))


def made(**form: Any) -> Any:
    torch.manual_seed(0)
    return Attention(12, 4, **form, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("form", [{}, {"is_causal": True}, {"n_kv_heads": 2, "bias": False}], ids=str)
def test_gradients(form: dict[str, Any], cross: bool, backend: str) -> None:
    m, x = made(**form)
    memory = torch.randn(2, 7, 12, dtype=torch.float64) if cross else None
    with srm_core.use_backend(backend):
        y = m(x, memory)
    want = composed(m, x, memory)
    close(y, want)
    leaves = [x, *m.parameters()]
    for got, expected in zip(*(torch.autograd.grad(a.square().sum(), leaves) for a in (y, want)), strict=True):
        close(got, expected, 1e-8)


@pytest.mark.parametrize("boolean", [True, False])
def test_masks(boolean: bool) -> None:
    m, x = made()
    mask = torch.rand(5, 5) < 0.7
    mask[:, 0] = True
    mask = mask if boolean else torch.where(mask, 0.0, -torch.inf).double()
    close(m(x, attn_mask=mask), composed(m, x, mask=mask))


@pytest.mark.parametrize("groups", [None, 1, 2])
def test_steps(groups: int | None) -> None:
    """Decoding with a cache is the causal whole, and leaves the cache as it was."""
    m, x = made(n_kv_heads=groups, is_causal=True)
    cache, steps = None, []
    for t in range(5):
        before = None if cache is None else [c.clone() for c in cache]
        y, after = m.step(x[:, t : t + 1], cache)
        if cache is not None:
            close(list(cache), before)
        cache = after
        steps.append(y)
    close(torch.cat(steps, 1), m(x))


def test_compile_and_autocast() -> None:
    torch._dynamo.reset()
    m, x = made(is_causal=True)
    close(torch.compile(m, fullgraph=True, backend="aot_eager")(x), m(x))
    m, x = m.float(), x.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = m(x)
    assert y.dtype is torch.bfloat16
    close(y.float(), m(x), 0.05)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Attention(10, 4), "n_heads: found 4; required a divisor of model_dim=10"),
        (lambda: Attention(12, 4, 3), "n_kv_heads: found 3"),
        (lambda: Attention(12, 4).step(torch.rand(2, 3, 12)), r"x: found shape \(2, 3, 12\)"),
        (lambda: Attention(12, 4, is_causal=True)(torch.rand(2, 3, 12), attn_mask=torch.ones(3, 3) > 0), "attn_mask"),
    ],
)
def test_errors(make: Any, said: str) -> None:
    with pytest.raises(srm_core.ContractError, match=said):
        make()
