"""`attention` against torch, its edges, and the memory that the NumPy kernel takes."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from srm_backends.numpy import attention as kernel
from srm_backends.numpy import attention_tiles
from srm_conformance.tolerances import judge_forward, judge_vjp

import srm_core
from srm_core.ops import SPECS

SPEC = SPECS["attention"]
each_backend = pytest.mark.parametrize("backend", ["numpy", "reference"])
MASKS = (
    (7, 11), (1, 11), (7, 1), (1, 1), (4, 7, 11), (1, 7, 11), (4, 1, 11), (2, 4, 7, 11), (2, 1, 7, 11), (1, 4, 7, 11),
    (2, 1, 1, 11), (2, 4, 7, 1), (1, 1, 1, 1),
)  # fmt: skip


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, so that small arrays are cut along every axis."""
    if request.param == "many tiles":
        for name, value in {"SCORES": 32, "ROWS": 3, "KEYS": 4, "CAUSAL_ROWS": 3}.items():
            monkeypatch.setattr(attention_tiles, name, value)


def arrays(seed: int, b: int = 2, h: int = 4, t: int = 7, s: int = 11, d: int = 5, e: int = 6, g: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in ((b, h, t, d), (b, g or h, s, d), (b, g or h, s, e))]


def of_torch(args: list[Any], grad: np.ndarray, **options: Any) -> list[Any]:
    """(out, the gradients) of torch's attention; None for the gradient of a boolean mask."""
    torch = pytest.importorskip("torch")
    leaves = [None if a is None else torch.tensor(a) for a in args]
    for leaf in leaves:
        if leaf is not None and leaf.dtype != torch.bool:
            leaf.requires_grad_()
    query, key, value, mask = leaves
    if mask is not None and mask.ndim < 4:  # torch does not take every broadcast form at every rank
        mask = mask[(None,) * (4 - mask.ndim)]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, **options)
    out.backward(torch.tensor(grad))
    return [out.detach().numpy(), *(None if x is None or x.grad is None else x.grad.numpy() for x in leaves)]


def ours(args: list[Any], grad: np.ndarray, backend: str, **options: Any) -> list[Any]:
    out, pullback = srm_core.vjp("attention", *args, backend=backend, **options)
    return [out, *pullback(grad)]


def assert_is_torch(args: list[Any], backend: str, dtype: str, **options: Any) -> None:
    args = [a if a is None or a.dtype == bool else a.astype(dtype) for a in args]
    grad = np.random.default_rng(9).standard_normal((*args[0].shape[:3], args[2].shape[3])).astype(dtype)
    allowed = {"float64": 1e-12, "float32": 3e-6}[dtype]
    for got, expected in zip(ours(args, grad, backend, **options), of_torch(args, grad, **options), strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            np.testing.assert_allclose(
                got, expected, rtol=allowed, atol=allowed * (1 + np.abs(expected).max(initial=0))
            )


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "additive"])
@pytest.mark.parametrize("shape", MASKS, ids=str)
@each_backend
def test_masks_are_those_of_torch(shape: tuple[int, ...], boolean: bool, dtype: str, backend: str) -> None:
    rng = np.random.default_rng(1)
    attends = rng.random(shape) < 0.6
    attends[..., 0] = True  # a row of torch's without any is NaN
    mask = attends if boolean else np.where(attends, rng.standard_normal(shape), -np.inf)
    assert_is_torch([*arrays(0), mask], backend, dtype)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, {}), ({}, {"scale": 0.3}), ({}, {"scale": -1.5}), ({}, {"is_causal": True}),
        ({"t": 13, "s": 6}, {"is_causal": True}), ({"t": 9, "s": 9, "e": 2}, {"is_causal": True, "scale": 0.5}),
        ({"g": 2}, {"enable_gqa": True}), ({"g": 1, "t": 11}, {"enable_gqa": True, "is_causal": True}),
        ({"t": 1, "s": 40}, {}), ({"d": 1, "e": 1}, {}),
    ],
    ids=str,
)  # fmt: skip
@each_backend
def test_options_are_those_of_torch(sizes: Any, options: Any, dtype: str, backend: str) -> None:
    assert_is_torch([*arrays(2, **sizes), None], backend, dtype, **options)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", [(4, 7, 11), (2, 1, 1, 11), (2, 4, 1, 1)], ids=str)
@each_backend
def test_masks_of_shared_heads(shape: tuple[int, ...], backend: str) -> None:
    mask = np.random.default_rng(3).standard_normal(shape)
    assert_is_torch([*arrays(4, g=2), mask], backend, "float64", enable_gqa=True)


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("scale", [0.125, 1.0], ids=["bounded", "unbounded"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_true_tiles_are_those_of_torch(is_causal: bool, scale: float, dtype: str) -> None:
    """More steps and slots than one tile holds."""
    args = arrays(5, b=1, h=1, t=1100, s=1100, d=64, e=64)
    assert_is_torch([*args, None], "numpy", dtype, is_causal=is_causal, scale=scale)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "additive"])
@each_backend
def test_a_step_with_nothing_to_attend_to(boolean: bool, backend: str) -> None:
    """gives zeros and takes no gradient; the others are as they would be without it."""
    args, attends = arrays(6), np.random.default_rng(7).random((2, 4, 7, 11)) < 0.5
    attends[..., 0] = True
    attends[1, 2, 3:] = False
    attends[0, :, 6] = False
    empty = ~attends.any(-1)
    grad = np.random.default_rng(8).standard_normal((2, 4, 7, 6))
    mask = attends if boolean else np.where(attends, 0, -np.inf)
    out, d_query, d_key, d_value, d_mask = ours([*args, mask], grad, backend)
    assert not out[empty].any()
    assert not d_query[empty].any()
    assert boolean or not d_mask[empty].any()
    some = attends | empty[..., None]
    silent = np.where(empty[..., None], 0, grad)
    expected = of_torch([*args, some if boolean else np.where(some, 0, -np.inf)], silent)
    np.testing.assert_allclose(out[~empty], expected[0][~empty], rtol=1e-12)
    for got, right in zip((d_query, d_key, d_value), expected[1:4], strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-11, atol=1e-13)


@each_backend
def test_without_slots_there_are_zeros(backend: str) -> None:
    args = arrays(10, s=0)
    out, *gradients = ours([*args, np.zeros((7, 1))], np.ones((2, 4, 7, 6)), backend)
    assert out.shape == (2, 4, 7, 6)
    assert not out.any()
    assert [g.shape for g in gradients] == [(2, 4, 7, 5), (2, 4, 0, 5), (2, 4, 0, 6), (7, 1)]
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("sizes", [{"t": 0}, {"d": 0}, {"e": 0}, {"b": 0}, {"h": 0}, {"h": 0, "t": 0, "s": 0}], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@each_backend
def test_empty_axes(sizes: dict[str, int], is_causal: bool, backend: str) -> None:
    args = arrays(11, **sizes)
    out, *gradients = ours([*args, None], np.ones((*args[0].shape[:3], args[2].shape[3])), backend, is_causal=is_causal)
    assert [g.shape for g in gradients[:3]] == [a.shape for a in args]
    if sizes == {"d": 0}:  # all scores are 0: the mean of the values so far
        first = np.cumsum(args[2], 2)[:, :, :7] / np.arange(1, 8)[:, None]
        mean = np.broadcast_to(args[2].mean(2, keepdims=True), out.shape)
        np.testing.assert_allclose(out, first if is_causal else mean, rtol=1e-12)


def judged(args: list[Any], **options: Any) -> list[str]:
    """What the judge finds wrong with the NumPy kernel."""
    grad = np.random.default_rng(12).standard_normal((*args[0].shape[:3], args[2].shape[3])).astype(args[0].dtype)
    out, *gradients = ours(args, grad, "numpy", **options)
    judgements = judge_forward(SPEC, args, options, [out]) + judge_vjp(SPEC, args, options, [grad], gradients)
    return [str(j) for j in judgements if not j.ok]


def single(seed: int, **sizes: int) -> list[Any]:
    return [a.astype("float32") for a in arrays(seed, **sizes)]


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("factor", [1e-30, 1e-3, 3.0, 30.0, 100.0])
def test_scores_of_any_size(factor: float) -> None:
    """100 makes scores of 1e4. A step then attends to one slot, up to ties, of which there are none here."""
    query, key, value = single(13)
    with np.errstate(all="ignore"):
        assert not judged([np.float32(factor) * query, np.float32(factor) * key, value, None])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("factor", [1e-42, 1e-37, 1e-30, 1e9, 1e30])
def test_values_of_any_size(factor: float) -> None:
    query, key, value = single(14)
    with np.errstate(all="ignore"):
        value = (value * factor).astype("float32")
    out = srm_core.attention(query, key, value, backend="numpy")
    assert all(j.ok for j in judge_forward(SPEC, [query, key, value, None], {}, [out]))
    low = srm_core.attention(3 * query, 3 * key, value, backend="numpy")
    assert all(j.ok for j in judge_forward(SPEC, [3 * query, 3 * key, value, None], {}, [low]))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_odd_numbers_stand_where_the_formula_has_them(which: int, odd: float, is_causal: bool) -> None:
    args = single(15, t=11)
    at = (
        (10 if which == 0 else 0) if is_causal else 3
    )  # the step that attends to all slots, the slot that all attend to
    args[which][0, 1, at, 2] = odd
    assert not judged([*args, None], is_causal=is_causal)


@pytest.mark.usefixtures("tiles")
@each_backend
def test_nan_stays_in_its_row(backend: str) -> None:
    """In a query it affects that step alone; in a mask it is a score."""
    args = arrays(16)
    expected = srm_core.attention(*args, backend=backend)
    args[0][1, 2, 3, 4] = np.nan
    mask = np.zeros((2, 4, 7, 11))
    mask[0, 1, 2, 3], mask[0, 0, 5, 1] = np.nan, np.inf
    out = srm_core.attention(*args, mask, backend=backend)
    odd = np.zeros((2, 4, 7), bool)
    odd[1, 2, 3] = odd[0, 1, 2] = odd[0, 0, 5] = True
    assert np.isnan(out[odd]).all()
    np.testing.assert_allclose(out[~odd], expected[~odd], rtol=1e-12)


@pytest.mark.parametrize("boolean", [True, False], ids=["boolean", "additive"])
def test_what_no_step_attends_to_is_not_looked_at(boolean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole tiles beyond a mask, or the diagonal, take no work: NaN there is never met."""
    monkeypatch.setattr(attention_tiles, "KEYS", 4)
    query, key, value = arrays(17)
    attends = np.arange(11) < 4
    mask = attends[None] if boolean else np.where(attends, 0.0, -np.inf)[None]
    key[:, :, 4:] = value[:, :, 4:] = np.nan
    grad = np.ones((2, 4, 7, 6))
    assert all(np.isfinite(a).all() for a in ours([query, key, value, mask], grad, "numpy") if a is not None)
    monkeypatch.setattr(attention_tiles, "CAUSAL_ROWS", 4)
    out = srm_core.attention(query, key, value, is_causal=True, backend="numpy")
    assert np.isfinite(out[:, :, :4]).all()


@pytest.mark.usefixtures("tiles")
def test_keys_of_one_sequence_for_all() -> None:
    """`attend` takes keys and values with stride 0 along B, as `hds_query` gives them."""
    query, key, value = arrays(18)
    key, value = (np.broadcast_to(a[:1], a.shape) for a in (key, value))
    results = []
    for k, v in ((key, value), (key.copy(), value.copy())):
        out = np.empty((2, 4, 7, 6))
        lse = kernel.attend(query, k, v, 0.5, out)
        results.append((out, lse, *kernel.attend_backward(query, k, v, 0.5, out, lse, out)[:3]))
    for got, expected in zip(*results, strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("case", [c for c in SPEC.cases if "ci" in c.tags], ids=lambda c: c.name)
def test_work_is_that_of_the_pairs_attended_to(case: Any) -> None:
    d = case.dims
    pairs = np.tri(d["T"], d["S"]) if case.settings.get("is_causal") else np.ones((d["T"], d["S"]))
    assert SPEC.flops(case) == d["B"] * d["H"] * int(pairs.sum()) * (2 * d["D"] + 2 * d["E"])


@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_memory_grows_as_the_steps(is_causal: bool) -> None:
    """8192 x 8192 scores would take 256 MiB a head."""
    rng = np.random.default_rng(19)
    args = [rng.standard_normal((1, 1, 8192, 64)).astype("float32") for _ in range(3)]
    size = args[0].nbytes  # 2 MiB, as much as a tile of scores
    tracemalloc.start()
    try:
        out, pullback = srm_core.vjp("attention", *args, is_causal=is_causal, backend="numpy")
        forward = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        pullback(out)
        backward = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert forward < 6 * size
    assert backward < 16 * size
