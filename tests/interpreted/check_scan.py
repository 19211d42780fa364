"""`scan` in Triton's interpreter with small tiles, so that small sizes have many: chained ones, groups of them, and
those that are done again step by step. Run by tests/test_triton.py, in a process that interprets kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from srm_backends.triton import scan

import srm_core
from srm_core.ops.scan.reference import reference, vjp

SHAPES = {"full": "BTD", "channel": "B1D", "shared": "11D", "step": "BT1"}


def sample(batch: int, steps: int, width: int, gates: str = "full") -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(steps)
    extent = {"B": batch, "T": steps, "D": width, "1": 1}
    shape = [extent[a] for a in SHAPES[gates]]
    return (
        rng.uniform(0.8, 1.02, shape).astype(np.float32),
        rng.standard_normal((batch, steps, width)).astype(np.float32),
        rng.standard_normal((batch, width)).astype(np.float32),
    )


def agree(got: Any, truth: Any) -> None:
    """NaN and infinity in the same places, the rest close."""
    with np.errstate(over="ignore"):
        expected = np.asarray(truth).astype(np.float32)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=1e-30)
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-5 * largest)


def check(
    monkeypatch: Any, chained: bool, gates: Any, tokens: Any, state: Any, view: Any = None,
    of_grad: Any = torch.as_tensor, **options: Any,
) -> None:  # fmt: skip
    """Values and gradients beside the reference's. view, of_grad: how gates and tokens, or the gradient of y, lie in
    memory."""
    plan = scan.Plan(chained, 4, 4, 8, 4)
    monkeypatch.setattr(scan, "plans", lambda *_: [plan])
    given = [None if a is None else torch.from_numpy(a) for a in (gates, tokens, state)]
    if view is not None:
        given[:2] = [view(a) for a in given[:2]]
    lengths = options.get("lengths")
    mine = {**options, **({} if lengths is None else {"lengths": torch.from_numpy(lengths)})}
    outputs, pullback = srm_core.vjp("scan", *given, backend="triton", **mine)
    with np.errstate(all="ignore"):
        truth = reference(np.float64, gates, tokens, state, **options)
        rng = np.random.default_rng(0)
        grads = tuple(rng.standard_normal(t.shape).astype(np.float32) for t in truth)
        gradients = vjp(np.float64, grads, gates, tokens, state, **options)
    for got, expected in zip(outputs, truth, strict=True):
        agree(got, expected)
    of_y, of_last = map(torch.from_numpy, grads)
    for got, expected in zip(pullback(of_grad(of_y), of_last), gradients, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            agree(got, expected)


chained = pytest.mark.parametrize("chained", [True, False], ids=["chained", "tiles"])


@chained
@pytest.mark.parametrize("gates", SHAPES)
@pytest.mark.parametrize("reverse", [False, True])
def test_gates(monkeypatch: Any, chained: bool, gates: str, reverse: bool) -> None:
    g, x, s = sample(2, 150, 11, gates)
    check(monkeypatch, chained, g, x, s, reverse=reverse)
    g, x, _ = sample(3, 70, 5, gates)
    check(monkeypatch, chained, g, x, None, reverse=reverse, lengths=np.array([70, 0, 37]))


@chained
def test_more_tiles_than_a_group(monkeypatch: Any, chained: bool) -> None:
    g, x, s = sample(1, 2 * 16 * 16 + 21, 3)  # tiles of 16 steps, groups of 16
    check(monkeypatch, chained, g, x, s)


@chained
@pytest.mark.parametrize("reverse", [False, True])
def test_products(monkeypatch: Any, chained: bool, reverse: bool) -> None:
    g, _, s = sample(2, 100, 3)
    check(monkeypatch, chained, g, None, s, reverse=reverse)
    check(monkeypatch, chained, g, None, None, reverse=reverse)


@chained
@pytest.mark.parametrize("word", [np.inf, -np.inf, np.nan])
def test_a_gate_that_is_not_finite_gives_what_the_plain_loop_gives(
    monkeypatch: Any, chained: bool, word: float
) -> None:
    g, x, s = sample(2, 100, 3)
    g[1, 50, 1] = word
    check(monkeypatch, chained, g, x, None)
    check(monkeypatch, chained, g, x, s, reverse=True)


@chained
def test_a_product_that_overflows_beside_a_state_of_zero(monkeypatch: Any, chained: bool) -> None:
    monkeypatch.setattr(scan, "plans", lambda *_: [scan.Plan(chained, 4, 4, 8, 4)])
    g, x, _ = sample(1, 100, 3)
    g[:, :40], x[:, :40] = 1e3, 0
    y, last = srm_core.scan(torch.from_numpy(g), torch.from_numpy(x), backend="triton")
    truth = reference(np.float64, g, x)
    agree(y, truth[0])
    agree(last, truth[1])


def by_time(a: Any) -> Any:
    return a.transpose(1, 2).contiguous().transpose(1, 2)


@chained
@pytest.mark.parametrize("of_grad", [torch.as_tensor, by_time])
@pytest.mark.parametrize("view", [None, by_time])
def test_contiguous_in_time(monkeypatch: Any, chained: bool, view: Any, of_grad: Any) -> None:
    g, x, s = sample(2, 70, 9)
    check(monkeypatch, chained, g, x, s, view=view, of_grad=of_grad)


@chained
def test_windows_of_a_signal(monkeypatch: Any, chained: bool) -> None:
    """Strides of 1 along time and along channels."""
    monkeypatch.setattr(scan, "plans", lambda *_: [scan.Plan(chained, 4, 4, 8, 4)])
    g, _, _ = sample(1, 60, 5)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)).unfold(1, 5, 1)
    y, last = srm_core.scan(torch.from_numpy(g), x, backend="triton")
    truth = reference(np.float64, g, x.numpy())
    agree(y, truth[0])
    agree(last, truth[1])


@pytest.mark.parametrize("back", [False, True])
def test_lengths_that_nobody_has_looked_at(monkeypatch: Any, back: bool) -> None:
    """On a device they are not: a kernel takes them as lengths within 0 and T."""
    from srm_core import contract

    monkeypatch.setattr(contract, "check_lengths", lambda *_: None)
    g, x, _ = sample(2, 20, 3)
    lengths = torch.tensor([27, -3])
    y, last = srm_core.scan(*map(torch.from_numpy, (g, x)), lengths=lengths, reverse=back, backend="triton")
    truth = reference(np.float64, g, x, None, lengths=np.array([20, 0]), reverse=back)
    agree(y, truth[0])
    agree(last, truth[1])
