"""`conv_bn` and `conv_bn_train` against torch, and what is true of them beyond single calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from srm_conformance.tolerances import judge_forward, judge_vjp

import srm_core
from srm_core.ops import SPECS
from srm_core.spec import Case

CONV, TRAIN = SPECS["conv_bn"], SPECS["conv_bn_train"]
CI = [pytest.param(c, id=c.name) for c in CONV.cases if "ci" in c.tags]
each_case = pytest.mark.parametrize("case", CI)
each_backend = pytest.mark.parametrize("backend", ["numpy", "reference"])


def case_of(name: str) -> Case:
    return next(c for c in CONV.cases if c.name == name)


def torch_of(op: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[list[Any], tuple[Any, ...]]:
    """(tensors of the arguments, the outputs) by torch's own functions."""
    torch = pytest.importorskip("torch")
    geometry = {n: options[n] for n in ("stride", "padding", "dilation", "groups")}
    spec = SPECS[op]
    names = [p.name for p in spec.parameters][: len(args)]
    leaves = [None if a is None else torch.tensor(a) for a in args]
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None:
            leaf.requires_grad_(name in spec.differentiable)
    given = dict(zip(names, leaves, strict=True))
    c = torch.nn.functional.conv2d(given["x"], given["weight"], given["bias"], **geometry)
    if op == "conv_bn":
        mean, var, eps = given["running_mean"], given["running_var"], options["eps"]
        if mean is None:  # what torch has no word for: normalised already
            mean, var, eps = torch.zeros_like(c[0, :, 0, 0]), torch.ones_like(c[0, :, 0, 0]), 0.0
        y = torch.nn.functional.batch_norm(
            c, mean.detach(), var.detach(), given["bn_weight"], given["bn_bias"], eps=eps
        )
        outputs: tuple[Any, ...] = ()
    else:
        y = torch.nn.functional.batch_norm(
            c, None, None, given["bn_weight"], given["bn_bias"], training=True, eps=options["eps"]
        )
        outputs = (c.mean((0, 2, 3)), c.var((0, 2, 3), correction=0))
    return leaves, (torch.relu(y) if options["activation"] else y, *outputs)


def close(got: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max(initial=1))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 3e-5)])
@pytest.mark.parametrize("op", ["conv_bn", "conv_bn_train"])
@each_case
@each_backend
def test_it_is_that_of_torch(op: str, case: Case, dtype: str, tolerance: float, backend: str) -> None:
    """Values, and the gradients of all inputs through all outputs."""
    spec = SPECS[op]
    if not case.dims["B"] and op == "conv_bn_train":
        pytest.skip("the statistics of nothing")
    args, options = spec.bind(*spec.sample(case, dtype, seed=3))
    leaves, outputs = torch_of(op, args, options)
    rng = np.random.default_rng(0)
    grads = tuple(rng.standard_normal(tuple(o.shape)).astype(dtype) for o in outputs)
    results, pullback = srm_core.vjp(op, *args, backend=backend, **options)
    for got, expected in zip(spec.unpack(results), outputs, strict=True):
        close(got, expected.detach().numpy(), tolerance)
    torch = pytest.importorskip("torch")
    torch.autograd.backward(outputs, [torch.tensor(g) for g in grads])
    by_name = dict(zip((p.name for p in spec.parameters), leaves, strict=False))
    for name, got in zip(spec.differentiable, pullback(*grads), strict=True):
        if by_name[name] is None:
            assert got is None
        else:
            close(got, by_name[name].grad.numpy(), tolerance)


@pytest.mark.parametrize("name", ["padded", "pairs", "no_vectors", "depthwise_multiplier", "channels_last_groups"])
@each_backend
def test_inference_with_the_statistics_of_the_batch_is_training(name: str, backend: str) -> None:
    (x, weight, bias, gamma, beta), options = TRAIN.sample(case_of(name), "float64")
    y, mean, var = srm_core.conv_bn_train(x, weight, bias, gamma, beta, **options, backend=backend)
    again = srm_core.conv_bn(x, weight, bias, mean, var, gamma, beta, **options, backend=backend)
    np.testing.assert_allclose(again, y, rtol=1e-12, atol=1e-13)


def is_channels_last(a: np.ndarray) -> bool:
    return a.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["padded", "pointwise", "strided", "groups", "depthwise", "depthwise_multiplier"])
@pytest.mark.parametrize("op", ["conv_bn", "conv_bn_train"])
def test_results_have_the_memory_format_of_x(op: str, name: str, dtype: str) -> None:
    (x, *rest), options = SPECS[op].sample(case_of(name), dtype)
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    results = []
    for images in (x, last):
        outputs, pullback = srm_core.vjp(op, images, *rest, **options, backend="numpy")
        y, *statistics = SPECS[op].unpack(outputs)
        d_x, *others = pullback(y, *map(np.zeros_like, statistics))
        assert [is_channels_last(a) for a in (y, d_x)] == [images is last] * 2
        assert [a.flags.c_contiguous for a in (y, d_x)] == [images is x] * 2
        results.append((y, *statistics, d_x, *(a for a in others if a is not None)))
    for a, b in zip(*results, strict=True):
        close(a.astype("float64"), b.astype("float64"), 2e-3 if dtype == "float16" else 1e-5)


@pytest.mark.parametrize("op", ["conv_bn", "conv_bn_train"])
@each_backend
def test_torch_tensors_keep_their_memory_format(op: str, backend: str) -> None:
    torch = pytest.importorskip("torch")
    (x, *rest), options = SPECS[op].sample(case_of("padded"), "float32")
    rest = [None if a is None else torch.from_numpy(a) for a in rest]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        images = torch.from_numpy(x).contiguous(memory_format=memory_format)
        y = SPECS[op].unpack(getattr(srm_core, op)(images, *rest, **options, backend=backend))[0]
        assert type(y) is torch.Tensor
        assert y.is_contiguous(memory_format=memory_format)


def test_a_list_means_the_pair() -> None:
    args, _ = CONV.sample(case_of("pairs"), "float64")
    lists = {"stride": [2, 1], "padding": [0, 2], "dilation": [1, 3]}
    pairs: Any = {n: tuple(v) for n, v in lists.items()}
    np.testing.assert_array_equal(srm_core.conv_bn(*args, **lists), srm_core.conv_bn(*args, **pairs))
    np.testing.assert_array_equal(srm_core.conv_bn(*args, padding=[1, 1]), srm_core.conv_bn(*args, padding=1))
    train, _ = TRAIN.sample(case_of("pairs"), "float64")
    for got, expected in zip(
        srm_core.conv_bn_train(*train, **lists), srm_core.conv_bn_train(*train, **pairs), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("block", [1, 700, 5000])
@pytest.mark.parametrize("op", ["conv_bn", "conv_bn_train"])
@each_case
def test_any_block_gives_the_same(op: str, case: Case, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks an image, several images a block, and rows that are a block each."""
    from srm_backends.numpy import conv_bn, convolution

    monkeypatch.setattr(convolution, "BLOCK", block)
    monkeypatch.setattr(convolution, "TAP_BLOCK", block)
    monkeypatch.setattr(conv_bn, "CHUNK", block // 4 + 1)
    args, options = SPECS[op].bind(*SPECS[op].sample(case, "float32"))
    outputs, pullback = srm_core.vjp(op, *args, **options, backend="numpy")
    outputs = SPECS[op].unpack(outputs)
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(o.shape).astype("float32") for o in outputs]
    found = judge_forward(SPECS[op], args, options, outputs)
    found += judge_vjp(SPECS[op], args, options, grads, pullback(*grads))
    assert not [str(j) for j in found if j.ratio > 2]  # each block has its own order of sums


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@each_backend
def test_no_batch_has_no_statistics(dtype: str, backend: str) -> None:
    """They are NaN, without a warning, and the gradients of the parameters are zeros."""
    args, options = TRAIN.sample(case_of("no_batch"), dtype)
    (y, mean, var), pullback = srm_core.vjp("conv_bn_train", *args, **options, backend=backend)
    assert y.shape == (0, 4, 5, 4)
    assert np.isnan(mean).all()
    assert np.isnan(var).all()
    assert mean.dtype == ("float32" if dtype == "bfloat16" else dtype)
    d_x, *gradients = pullback(y, np.zeros_like(mean), np.zeros_like(var))
    assert d_x.shape == args[0].shape
    assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("groups", [1, 2, 4])
@each_backend
def test_nan_stays_where_it_is_seen(value: float, groups: int, backend: str) -> None:
    """Also through ReLU, and not into other groups, other images or pixels that do not see it."""
    x, weight, ones = np.ones((2, 4, 6, 7)), np.ones((4, 4 // groups, 3, 3)), np.ones(4)
    x[0, 0, 0, 0] = value
    y = srm_core.conv_bn(x, weight, None, ones, ones, groups=groups, padding=1, activation="relu", backend=backend)
    seen = np.zeros(y.shape, bool)
    seen[0, : 4 // groups, :2, :2] = True
    np.testing.assert_array_equal(~np.isfinite(y), seen)
    assert (np.isnan(y) if np.isnan(value) else np.isposinf(y))[seen].all()


@each_backend
def test_relu_has_no_gradient_at_zero(backend: str) -> None:
    x, ones = np.array([-1.0, 0, 1, np.nan]).reshape(4, 1, 1, 1), np.ones(1)
    y, pullback = srm_core.vjp(
        "conv_bn", x, np.ones((1, 1, 1, 1)), None, 0 * ones, ones, eps=0.0, activation="relu", backend=backend
    )
    np.testing.assert_array_equal(y.ravel(), [0, 0, 1, np.nan])
    np.testing.assert_array_equal(pullback(np.ones_like(y))[0].ravel(), [0, 0, 1, 1])


@each_backend
def test_a_mean_far_from_zero_keeps_its_variance(backend: str) -> None:
    """One pass with squares would lose it in float32."""
    rng = np.random.default_rng(0)
    x = (1000 + rng.standard_normal((4, 3, 40, 40))).astype("float32")
    weight = np.ones((2, 3, 1, 1), np.float32)
    _, mean, var = srm_core.conv_bn_train(x, weight, backend=backend)
    c = x.astype("float64").sum(1)
    np.testing.assert_allclose(mean, [c.mean()] * 2, rtol=1e-6)
    np.testing.assert_allclose(var, [c.var()] * 2, rtol=1e-4)


@each_backend
def test_the_gradient_of_a_bias_is_that_of_the_mean(backend: str) -> None:
    """Neither y nor the variance sees a bias."""
    args, options = TRAIN.sample(case_of("padded"), "float32")
    outputs, pullback = srm_core.vjp("conv_bn_train", *args, **options, backend=backend)
    rng = np.random.default_rng(0)
    grads = [rng.standard_normal(o.shape).astype("float32") for o in outputs]
    np.testing.assert_allclose(pullback(*grads)[2], grads[1], rtol=1e-6)
