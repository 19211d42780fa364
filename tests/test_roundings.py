"""The judge and the permitted roundings: what a kernel in a half type may round, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401  (registers the dtype name "bfloat16" with NumPy)
import numpy as np
import pytest
from srm_conformance.tolerances import Judgement, judge_forward, judge_vjp

from srm_core.contract import Call
from srm_core.ops import SPECS
from srm_core.ops.common import TF32
from srm_core.spec import HALF, Case, OpSpec

Rounding = Callable[[str, np.ndarray], np.ndarray]
PERMITTING = [
    pytest.param(s, c, id=f"{s.name}-{c.name}")
    for s in SPECS.values()
    for c in [c for c in s.cases if "ci" in c.tags and "edge" not in c.tags][::4]
    if s.permitted_roundings
]


def to(dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    return lambda a: a.astype(dtype).astype(a.dtype)


def only(names: tuple[str, ...], change: Callable[[np.ndarray], np.ndarray]) -> Rounding:
    return lambda name, values: change(values) if name in names else values


def to_tf32(a: np.ndarray) -> np.ndarray:
    """Ten bits of mantissa, by arithmetic where the judge does it by bits."""
    fraction, exponent = np.frexp(a)
    return np.ldexp(np.round(fraction * 2**11) / 2**11, exponent).astype(a.dtype)


def judged(spec: OpSpec, args: Any, options: Any, rounding: Rounding, **judge: Any) -> list[Judgement]:
    """A float32 kernel that makes some roundings, forward and backward."""
    args, options = spec.bind(args, options)
    call = Call(spec, args, options)
    with np.errstate(all="ignore"):
        results = spec.reference(np.float32, *args, **options, rounding=rounding)
        names = [*call.output_dtypes(), *(call.dtypes[n] for n, _ in call.mutated())]
        results = [r.astype(d) for r, d in zip(results, names, strict=True)]
        outputs = results[: len(call.output_dtypes())]
        judgements = judge_forward(spec, args, options, outputs, results[len(outputs) :], **judge)
        if spec.vjp is None:
            return judgements
        rng = np.random.default_rng(3)
        grads = [rng.standard_normal(o.shape).astype(o.dtype) for o in outputs]
        gradients = spec.vjp(np.float32, tuple(grads), *args, **options, rounding=rounding)
        dtypes = [call.dtypes.get(n, "float32") for n in spec.differentiable]
        gradients = [None if g is None else g.astype(d) for g, d in zip(gradients, dtypes, strict=True)]
        return judgements + judge_vjp(spec, args, options, grads, gradients, **judge)


def wrong(judgements: list[Judgement]) -> list[str]:
    return [str(j) for j in judgements if not j.ok]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("spec", "case"), PERMITTING)
def test_permitted_roundings_pass_together_and_one_by_one(spec: OpSpec, case: Case, dtype: str) -> None:
    half = tuple(n for n in spec.permitted_roundings if n != TF32)
    for names in ((), half, *((n,) for n in half if len(half) > 1)):
        assert not wrong(judged(spec, *spec.sample(case, dtype), only(names, to(dtype)))), names


@pytest.mark.parametrize(("spec", "case"), PERMITTING)
def test_nothing_may_be_rounded_beside_float32(spec: OpSpec, case: Case) -> None:
    names = tuple(n for n in spec.permitted_roundings if n != TF32)
    assert wrong(judged(spec, *spec.sample(case, "float32"), only(names, to("bfloat16"))))


@pytest.mark.parametrize(("spec", "case"), [p for p in PERMITTING if TF32 in p.values[0].permitted_roundings])
def test_tf32_is_right_where_it_is_asked_for(spec: OpSpec, case: Case) -> None:
    sample = spec.sample(case, "float32")
    in_tf32 = only((TF32,), to_tf32)
    assert not wrong(judged(spec, *sample, in_tf32, precision="tf32"))
    assert wrong(judged(spec, *sample, in_tf32))
    assert wrong(judged(spec, *sample, only((TF32,), to("bfloat16")), precision="tf32"))


# Kernels that round what is not permitted.


def attention_of_rounded_scores(dtype: str, query: Any, key: Any, value: Any) -> np.ndarray:
    q, k, v = (a.astype("float32") for a in (query, key, value))
    scores = to(dtype)(q @ k.swapaxes(2, 3) / np.float32(np.sqrt(q.shape[3])))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: np.ndarray = weights @ v / weights.sum(-1, keepdims=True)
    return out


def attention_summed_in_half(dtype: str, query: Any, key: Any, value: Any) -> np.ndarray:
    q, k, v = (a.astype("float32") for a in (query, key, value))
    scores = q @ k.swapaxes(2, 3) / np.float32(np.sqrt(q.shape[3]))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out = np.zeros(q.shape, "float32")
    for s in range(k.shape[2]):
        out = to(dtype)(out + weights[..., s, None] * v[:, :, None, s])
    return out / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kernel", [attention_of_rounded_scores, attention_summed_in_half])
def test_wrong_attention_is_seen(kernel: Any, dtype: str) -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 2, 130, 16)) for _ in range(3))
    query[..., 0] = key[..., 0] = 20  # adds 100 to every score, which the softmax does not see
    args = [a.astype(dtype) for a in (query, key, value + 2)]
    spec = SPECS["attention"]
    right = spec.reference(np.float32, *args)[0].astype(dtype)
    assert not wrong(judge_forward(spec, args, {}, [right]))
    assert wrong(judge_forward(spec, args, {}, [kernel(dtype, *args).astype(dtype)]))


@pytest.mark.parametrize("dtype", HALF)
def test_an_lstm_whose_cells_are_half_is_seen(dtype: str) -> None:
    """Rounded h is permitted, a rounded cell is not: it is summed over time."""
    rng = np.random.default_rng(0)
    x, w_ih = rng.standard_normal((2, 200, 8)), rng.standard_normal((32, 8)) / 8
    w_hh, b = rng.standard_normal((32, 8)) / 8, np.repeat([0.0, 4.0, 0.0, 0.0], 8)  # f is almost 1
    args = [a.astype(dtype) for a in (x, w_ih, w_hh, b)]
    spec = SPECS["lstm"]

    def lstm(round_cell: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
        x, w_ih, w_hh, b = (a.astype("float32") for a in args)
        h, c, hs = np.zeros((2, 8), "float32"), np.zeros((2, 8), "float32"), []
        for t in range(x.shape[1]):
            i, f, g, o = np.split(x[:, t] @ w_ih.T + b + to(dtype)(h) @ w_hh.T, 4, 1)
            c = round_cell(c / (1 + np.exp(-f)) + np.tanh(g) / (1 + np.exp(-i)))
            h = np.tanh(c) / (1 + np.exp(-o))
            hs.append(h)
        return [np.stack(hs, 1).astype(dtype), h, c]

    assert not wrong(judge_forward(spec, args, {}, lstm(lambda c: c)))
    assert wrong(judge_forward(spec, args, {}, lstm(to(dtype))))


@pytest.mark.parametrize("dtype", HALF)
def test_a_convolution_summed_in_half_is_seen(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.uniform(0, 1, (2, 48, 6, 6)).astype(dtype), rng.uniform(0, 1, (3, 48, 3, 3)).astype(dtype)
    zero, one = np.zeros(3, dtype), np.ones(3, dtype)
    spec = SPECS["conv_bn"]

    def convolution(round_sum: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        y = np.zeros((2, 3, 4, 4), "float32")
        for r, s in np.ndindex(3, 3):
            for c in range(48):
                window = x[:, None, c, r : r + 4, s : s + 4].astype("float32")
                y = round_sum(y + window * weight[:, c, r, s].astype("float32")[:, None, None])
        return (y / np.sqrt(np.float32(1 + 1e-5))).astype(dtype)

    args = (x, weight, None, zero, one)
    assert not wrong(judge_forward(spec, args, {}, [convolution(lambda y: y)]))
    assert wrong(judge_forward(spec, args, {}, [convolution(to(dtype))]))


@pytest.mark.parametrize("dtype", HALF)
def test_a_gradient_that_cancels_may_be_what_float32_leaves_of_it(dtype: str) -> None:
    """The first step of causal attention has one slot: its scores have no gradient, but for rounding."""
    spec = SPECS["attention"]
    args, options = spec.bind(*spec.sample(next(c for c in spec.cases if c.name == "causal"), dtype))
    grads = (np.ones(args[2].shape, dtype),)
    d_query, *others = spec.vjp(np.float32, grads, *args, **options)
    d_query[:, :, 0] = 0
    rest = [None if g is None else g.astype(dtype) for g in others]
    for left, right in ((0, True), (1e-7, True), (1e-2, False)):
        d_query[:, :, 0, 0] = left * np.abs(d_query).max()
        judgements = judge_vjp(spec, args, options, grads, [d_query.astype(dtype), *rest])
        assert (not wrong(judgements)) is right, left


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["pairs", "depthwise", "primes", "padded"])
@pytest.mark.parametrize("op", ["conv_bn", "conv_bn_train"])
def test_wrong_gradients_behind_a_relu_are_seen(op: str, name: str, dtype: str) -> None:
    """No rounding decides in a sample whether an element has a gradient: that would allow anything."""
    spec = SPECS[op]
    args, options = spec.bind(*spec.sample(next(c for c in spec.cases if c.name == name), dtype))
    assert options["activation"] == "relu"
    outputs = spec.reference(np.float32, *args, **options)
    grads = [np.random.default_rng(5).standard_normal(o.shape).astype(dtype) for o in outputs[:1]]
    grads += [np.zeros(o.shape, "float32") for o in outputs[1:]]
    gradients = [g if g is None else g.astype(dtype) for g in spec.vjp(np.float32, tuple(grads), *args, **options)]
    assert not wrong(judge_vjp(spec, args, options, grads, gradients))
    for i in (0, 1, spec.differentiable.index("bn_weight")):
        bad = [g * np.float32(1.2) if k == i else g for k, g in enumerate(gradients)]
        assert wrong(judge_vjp(spec, args, options, grads, [None if g is None else g.astype(dtype) for g in bad])), i
