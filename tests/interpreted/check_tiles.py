"""Triton's interpreter with small tiles and few multiprocessors, so that small sizes are shared among programs as large
ones are on a GPU. Run by tests/test_triton.py, in a process that interprets kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from srm_backends.triton import attention, attention_backward, attention_masks, convolution, sequence

import srm_core
from srm_core.registry import registry


def normal(*shape: int, dtype: str = "float32", scale: float = 1.0) -> Any:
    return (scale * np.random.default_rng(sum(shape)).standard_normal(shape)).astype(dtype)


def check(op: str, *args: Any, **options: Any) -> None:
    """Values and gradients beside the reference's."""
    spec = registry().spec(op)
    given = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in args]
    mine = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    outputs, pullback = srm_core.vjp(op, *given, backend="triton", **mine)
    truth = spec.reference(np.float64, *args, **options)
    truth = truth if isinstance(truth, tuple) else (truth,)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    rng = np.random.default_rng(1)
    grads = tuple(rng.standard_normal(t.shape).astype(str(o.dtype)[6:]) for o, t in zip(outputs, truth, strict=True))
    gradients = [g for g in spec.vjp(np.float64, grads, *args, **options) if g is not None]
    found = [g for g in pullback(*map(torch.from_numpy, grads)) if g is not None]
    for got, expected in zip((*outputs, *found), (*truth, *gradients), strict=True):
        largest = np.abs(expected).max(initial=1e-3)
        tolerance = 3e-3 if given[0].dtype is torch.float16 else 2e-5
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=tolerance * largest)


@pytest.fixture(params=["tiles", "pointers"])
def tiles(request: Any, monkeypatch: Any) -> None:
    """With the hardware's copies, which the interpreter has too, and without."""
    for module in (attention, convolution):
        monkeypatch.setattr(module, "available", lambda _: request.param == "tiles")


def _small_tiles(call: attention.Call, by_hardware: bool) -> list[attention.Tile]:
    plain = attention.Tile(False, 16, 16, 4, 1)
    return [plain._replace(tiled=True), plain] if by_hardware and call.query.dtype is torch.float16 else [plain]


@pytest.fixture
def small(monkeypatch: Any) -> None:
    by = attention.available(None)
    monkeypatch.setattr(attention, "_tiles", lambda _, call: _small_tiles(call, by))
    monkeypatch.setattr(attention_backward, "_tiles", lambda *_: [attention_backward.Tile(16, 16, 4, 1)])


@pytest.mark.usefixtures("tiles", "small")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_of_several_tiles(dtype: str, causal: bool) -> None:
    q, k, v = (normal(1, 2, n, 24, dtype=dtype) for n in (40, 50, 50))
    check("attention", q, k, v, is_causal=causal)


@pytest.mark.usefixtures("tiles", "small")
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_slots_are_shared_and_heads_packed(steps: int, causal: bool) -> None:
    q, k = normal(2, 8, steps, 16, dtype="float16"), normal(2, 2, 300, 16, dtype="float16")
    check("attention", q, k, k, is_causal=causal, enable_gqa=True)


@pytest.mark.usefixtures("small")
def test_masks_over_several_tiles() -> None:
    q, k = normal(1, 2, 40, 8), normal(1, 2, 50, 8)
    check("attention", q, k, k, np.random.default_rng(0).random((40, 50)) < 0.3)
    check("attention", q, k, k, normal(2, 40, 50))


@pytest.mark.usefixtures("tiles", "small")
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["documents", "padding", "additive", "nothing"])
def test_tiles_that_nothing_counts_in_are_passed_over(monkeypatch: Any, kind: str, dtype: str) -> None:
    seen = []
    monkeypatch.setattr(attention_masks, "LARGE", 0)
    monkeypatch.setattr(attention_masks, "READERS", 1)
    found = attention_masks.lists

    def lists(*args: Any) -> Any:
        seen.append(found(*args))
        return seen[-1]

    for module in (attention, attention_backward):
        monkeypatch.setattr(module, "lists", lists)
    q, k = normal(2, 4, 70, 24, dtype=dtype), normal(2, 4, 90, 24, dtype=dtype)
    t, s = np.arange(70)[:, None], np.arange(90)[None, :]
    mask: Any = t // 25 == s // 25
    if kind == "padding":
        mask = s < np.array([33, 64])[:, None, None, None]
    elif kind == "additive":
        mask = np.where(mask, t * 0.01, -np.inf).astype(dtype)
    elif kind == "nothing":
        mask = mask & (t > 30)
    check("attention", q, k, k, mask)
    listed = [int(each.counts.sum()) for each in seen if each.counts is not None]
    everything = [each.starts.numel() for each in seen if each.counts is not None]
    assert len(listed) == (2 if kind == "additive" else 3)
    assert all(0 < few < many for few, many in zip(listed, everything, strict=True))


WAYS = {
    "shared": {},
    "read_again": {"AT_ONCE": 0},
    "alone": {"ALONE": 1 << 20, "ON_CHIP": 1 << 30},
    "in_chunks": {"multiprocessors": lambda _: 3, "ON_CHIP": 1 << 14},
    "by_step": {"multiprocessors": lambda _: 1, "ON_CHIP": 0},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loops(monkeypatch: Any, way: str, dtype: str) -> None:
    for name, value in WAYS[way].items():
        monkeypatch.setattr(sequence, name, value)
    batch, steps, width = 19, 2, 37
    lengths = np.array([2, 0, 1] + [2] * 16)
    weights = [normal(4 * width, n, dtype=dtype, scale=0.2) for n in (5, width)]
    states = normal(batch, width, dtype=dtype), normal(batch, width, dtype=dtype)
    x, bias = normal(batch, steps, 5, dtype=dtype), normal(4 * width, dtype=dtype)
    check("lstm", x, *weights, bias, None, *states, lengths=lengths)
    z, b = normal(batch, steps, width, dtype=dtype), normal(width, dtype=dtype)
    w_gate, w_mdi = normal(width, width, dtype=dtype, scale=0.2), normal(width, 2 * width, dtype=dtype, scale=0.2)
    check("mdi_recurrence", z, z, states[0], w_gate, b, w_mdi, b, lengths=lengths)


def test_every_way_is_taken(monkeypatch: Any) -> None:
    """The plans that `test_loops` means to check are those that it gets."""
    from types import SimpleNamespace

    context: Any = SimpleNamespace(precision="ieee", device=None)
    found = {}
    for way, settings in WAYS.items():
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setattr(sequence, name, value)
            how = sequence.plan(context, 19, 37, 4, torch.float16, False)
            found[way] = how.held, how.alone, how.chunk < 19
    assert found == {
        "shared": (True, False, False), "read_again": (False, False, False), "alone": (True, True, False),
        "in_chunks": (True, False, True), "by_step": (False, False, False),
    }  # fmt: skip


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("op", ["conv_bn", "conv_bn_train"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions_of_several_boxes(op: str, kernel: int) -> None:
    x = normal(3, 9, 19, 8, dtype="float16").transpose(0, 3, 1, 2)
    weight = normal(24, kernel, kernel, 8, dtype="float16", scale=0.3).transpose(0, 3, 1, 2)
    o, var = normal(24, dtype="float16"), np.abs(normal(24, dtype="float16")) + np.float16(0.5)
    vectors = (o, o, var, o, o) if op == "conv_bn" else (None, o, o)
    check(op, x, weight, *vectors, padding=kernel // 2, activation=None)
