"""The triton backend on a GPU, beside what the suite checks there: the same bits at every run, sizes that are large and
prime, masks with empty tiles, measured choices.

Every kernel once, for compute-sanitizer: `compute-sanitizer python -m pytest tests/test_triton_gpu.py -k primes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
from srm_backends.triton import autotune  # noqa: E402

RUNS = 100
EPS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
Call = tuple[str, tuple[Any, ...], dict[str, Any]]
both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def calls(dtype: Any, scale: int = 1) -> list[Call]:
    """Every operator with a backward, in sizes that are prime and that many programs share; smaller by `scale`."""
    made = torch.Generator(device="cuda").manual_seed(0)

    def t(*shape: int, among: float = 1.0) -> Any:
        return (torch.randn(shape, device="cuda", generator=made) * among).to(dtype)

    def gates(*shape: int) -> Any:
        return torch.rand(shape, device="cuda", generator=made).mul(0.2).add(0.8).to(dtype)

    steps, width, mixed = 4001 // scale, 61, ("row", "col", "row")
    o = t(37)
    images = t(3, 29, 31, 53).contiguous(memory_format=torch.channels_last)
    weight = t(37, 29, 3, 3, among=0.1).contiguous(memory_format=torch.channels_last)
    q, k = t(2, 6, 521 // scale, width), t(2, 2, 1031 // scale, width)
    return [
        ("scan", (gates(3, steps, 331), t(3, steps, 331)), {}),
        ("scan", (gates(1, 40009 // scale, 67), t(1, 40009 // scale, 67)), {}),
        ("recurrent_step", (t(13, 3, width), t(13, 3, width), t(3, 97), t(3, 97), gates(3), mixed, 5), {}),
        ("recurrent_mix", (t(3, 1009, 3, width), t(3, 1009), t(3, 1009), gates(3), mixed), {}),
        ("mdi", tuple(t(7, 1009, width) for _ in range(5)), {}),
        ("mdi_recurrence", (t(5, 37, 131), gates(5, 37, 131), t(5, 131), t(131, 131, among=0.1), t(131),
                            t(131, 262, among=0.1), t(131)), {}),
        ("lstm", (t(11, 37, 59), t(4 * 139, 59, among=0.1), t(4 * 139, 139, among=0.1), t(4 * 139), t(4 * 139)), {}),
        ("lstm", (t(11, 37, 59), t(4 * 31, 59, among=0.1), t(4 * 31, 31, among=0.1), t(4 * 31), t(4 * 31)), {}),
        ("hds_pool", (t(2, 3, 4096 // scale, width),), {"num_levels": 3, "pool": 4}),
        ("hds_query", (t(2, 3, 7, width), t(2, 3, 4096 // scale, width), t(2, 3, 4096 // scale, width)),
         {"level": 1, "num_levels": 3, "pool": 4}),
        ("attention", (q, k, k), {"enable_gqa": True}),
        ("attention", (q, q, q), {"is_causal": True}),
        ("conv_bn", (images, weight, o, o, o.abs() + 1, o, o), {"padding": 1}),
        ("conv_bn_train", (images, weight, None, o, o), {"padding": 1}),
    ]  # fmt: skip


def pulled(op: str, args: Any, options: Any, backend: str) -> list[Any]:
    """Outputs, and gradients for random gradients: those of ones cancel in a batch norm."""
    made = torch.Generator(device="cuda").manual_seed(1)
    outputs, pullback = srm_core.vjp(op, *args, backend=backend, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = pullback(*(torch.randn(o.shape, device="cuda", generator=made).to(o.dtype) for o in outputs))
    return [*outputs, *(g for g in gradients if g is not None)]


@both_types
@pytest.mark.parametrize("number", range(14))
def test_primes(number: int, dtype: Any) -> None:
    """Beside the torch backend on float32 tensors of the same values."""
    op, args, options = calls(dtype)[number]
    wide = [a.float() if isinstance(a, torch.Tensor) else a for a in args]
    for got, expected in zip(pulled(op, args, options, "triton"), pulled(op, wide, options, "torch"), strict=True):
        largest = float(expected.abs().max())
        assert (got.float() - expected).abs().max() <= 8 * EPS[dtype] * max(largest, 1e-3)


@both_types
@pytest.mark.parametrize("number", range(14))
def test_the_same_bits_at_every_run(number: int, dtype: Any) -> None:
    op, args, options = calls(dtype, scale=4)[number]
    first = pulled(op, args, options, "triton")
    for _ in range(RUNS - 1):
        for got, expected in zip(pulled(op, args, options, "triton"), first, strict=True):
            assert torch.equal(got, expected)


@both_types
@pytest.mark.parametrize("width", [33, 64, 100, 256])
@pytest.mark.parametrize("op", ["lstm", "mdi_recurrence"])
def test_few_sequences_of_few_channels(op: str, width: int, dtype: Any) -> None:
    """Programs that wait for fewer words than they have threads, if they were let."""
    made = torch.Generator(device="cuda").manual_seed(0)

    def t(*shape: int) -> Any:
        return (torch.randn(shape, device="cuda", generator=made) * shape[-1] ** -0.5).to(dtype)

    x = torch.randn(1, 500, width, device="cuda", generator=made).to(dtype)
    args: tuple[Any, ...] = (x, t(4 * width, width), t(4 * width, width), t(4 * width), t(4 * width))
    if op == "mdi_recurrence":
        args = x, x.sigmoid() * 0.5, t(1, width), t(width, width), t(width), t(width, 2 * width), t(width)
    for got, expected in zip(
        pulled(op, args, {}, "triton"), pulled(op, [a.float() for a in args], {}, "torch"), strict=True
    ):  # fmt: skip
        assert (got.float() - expected).abs().max() <= 8 * EPS[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("kind", ["documents", "padding", "window", "additive"])
def test_masks_with_tiles_in_which_nothing_counts(kind: str) -> None:
    steps = 2048
    t, s = torch.arange(steps, device="cuda")[:, None], torch.arange(steps, device="cuda")[None, :]
    mask: Any = t // 300 == s // 300
    if kind == "padding":
        mask = s < torch.tensor([700, 2048], device="cuda")[:, None, None, None]
    elif kind == "window":
        mask = (t >= s) & (t - s < 256)
    elif kind == "additive":
        mask = torch.where(mask, 0.01 * (t - s) % 1, float("-inf")).to(torch.bfloat16)
    q, k, v = (torch.randn(2, 16, steps, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    got = pulled("attention", (q, k, v, mask), {}, "triton")
    wide = mask.float() if kind == "additive" else mask
    expected = pulled("attention", (q.float(), k.float(), v.float(), wide), {}, "torch")
    for a, b in zip(got, expected, strict=False):
        assert (a.float() - b).abs().max() <= 8 * EPS[torch.bfloat16] * float(b.abs().max())


def large_calls() -> list[Call]:
    def t(*shape: int, dtype: Any = torch.bfloat16) -> Any:
        return torch.randn(shape, device="cuda", dtype=dtype)

    x, o = t(16, 64, 64, 128).permute(0, 3, 1, 2), t(256).abs() + 1
    weight = t(256, 3, 3, 128).permute(0, 3, 1, 2) * 0.03
    tokens = t(8, 4096, 1024)
    by_time = t(8, 1024, 4096).transpose(1, 2)
    mixed = ("row",) * 3 + ("col",) * 3
    return [
        ("scan", (torch.rand_like(tokens), tokens), {}),
        ("scan", (torch.rand_like(by_time), by_time), {}),
        ("scan", (t(1, 65536, 512).sigmoid(), t(1, 65536, 512)), {}),
        ("recurrent_mix", (t(8, 4096, 6, 256), t(6, 4096), t(6, 4096), t(6).sigmoid(), mixed), {}),
        ("attention", tuple(t(4, 8, 2048, 128) for _ in range(3)), {"is_causal": True}),
        ("conv_bn", (x, weight, o, o, o, o, o), {"padding": 1}),
        ("conv_bn_train", (x, weight, None, o, o), {"padding": 1}),
    ]


@pytest.mark.parametrize("number", range(7))
def test_every_choice_gives_the_same_result(number: int, monkeypatch: Any) -> None:
    op, args, options = large_calls()[number]
    tried: dict[str, int] = {}

    def choose(ctx: Any, name: str, key: Any, ask: Callable[[], Any], run: Any) -> Any:
        choices = ask().choices
        tried[name] = max(tried.get(name, 0), len(choices))
        return choices[at % len(choices)]

    at = 0
    for module in ("attention", "attention_backward", "convolution", "recurrent_mix", "scan"):
        monkeypatch.setattr(f"srm_backends.triton.{module}.choose", choose)
    first = pulled(op, args, options, "triton")
    for turn in range(1, max(tried.values())):
        at = turn
        for got, expected in zip(pulled(op, args, options, "triton"), first, strict=True):
            largest = float(expected.float().abs().max())
            assert (got.float() - expected.float()).abs().max() <= 2 * EPS[torch.bfloat16] * largest


def test_what_is_measured_is_kept(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("SRM_CACHE_DIR", str(tmp_path))
    autotune._table.cache_clear()
    srm_core.reload_config()
    gates, tokens = torch.rand(8, 2048, 2048, device="cuda"), torch.randn(8, 2048, 2048, device="cuda")
    y, _ = srm_core.scan(gates, tokens, backend="triton")
    (kept,) = (tmp_path / "triton").iterdir()
    assert '"scan float32' in kept.read_text()
    assert torch.equal(srm_core.scan(gates, tokens, backend="triton")[0], y)
    autotune._table.cache_clear()
