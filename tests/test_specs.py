"""The specifications: every reference against something that was written without it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.signal import lfilter

import srm_core
from srm_core.axes import extents
from srm_core.contract import Call, arrays_of
from srm_core.ops import SPECS
from srm_core.spec import FLOAT, Case, OpSpec

ORACLE = Path(__file__).parent / "oracle"
SCAN, MIX, STEP, STEP_ = (SPECS[n] for n in ("scan", "recurrent_mix", "recurrent_step", "recurrent_step_"))
EVERY = [pytest.param(s, c, id=f"{s.name}-{c.name}") for s in SPECS.values() for c in s.cases]
CI = [p for p in EVERY if "ci" in p.values[1].tags]
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def case_of(spec: OpSpec, name: str) -> Case:
    return next(c for c in spec.cases if c.name == name)


def in_range(case: Case) -> bool:
    return "out" not in (case.settings.get("index"), case.settings.get("start"))


# scan


@pytest.mark.parametrize("reverse", [False, True])
def test_scan_with_constant_gates_is_a_filter(reverse: bool) -> None:
    rng = np.random.default_rng(0)
    gates, tokens, state = rng.uniform(0.5, 1, (1, 1, 3)), rng.normal(size=(2, 50, 3)), rng.normal(size=(2, 3))
    y, final = SCAN.reference(np.float64, gates, tokens, state, reverse=reverse)
    flip = slice(None, None, -1 if reverse else 1)
    for d in range(3):
        g = gates[0, 0, d]
        expected, _ = lfilter([1], [1, -g], tokens[:, flip, d], axis=1, zi=g * state[:, d : d + 1])
        np.testing.assert_allclose(y[:, flip, d], expected, rtol=1e-12)
        np.testing.assert_allclose(final[:, d], expected[:, -1], rtol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("gate_shape", [(2, 9, 3), (2, 9, 1), (2, 1, 3), (1, 1, 3)], ids=str)
def test_scan_is_its_closed_form(gate_shape: tuple[int, ...], reverse: bool) -> None:
    """y_t is the sum over s <= t of x_s times the gates between, from s+1 to t."""
    rng = np.random.default_rng(1)
    gates, tokens, state = rng.normal(size=gate_shape), rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 3))
    y, final = SCAN.reference(np.float64, gates, tokens, state, reverse=reverse)
    flip = slice(None, None, -1 if reverse else 1)
    g, x = np.broadcast_to(gates, tokens.shape)[:, flip], tokens[:, flip]
    for t in range(9):
        terms = [x[:, s] * g[:, s + 1 : t + 1].prod(1) for s in range(t + 1)]
        expected = sum(terms) + state * g[:, : t + 1].prod(1)
        np.testing.assert_allclose(y[:, flip][:, t], expected, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(final, y[:, flip][:, -1])


def test_scan_stops_at_lengths() -> None:
    """Each sequence gives what it gives alone, and zeros beyond."""
    (gates, tokens, state), options = SCAN.sample(case_of(SCAN, "lengths"), "float64")
    y, final = SCAN.reference(np.float64, gates, tokens, state, **options)
    for b, n in enumerate(options["lengths"]):
        alone = SCAN.reference(np.float64, gates[b : b + 1, :n], tokens[b : b + 1, :n], state[b : b + 1])
        np.testing.assert_array_equal(y[b, :n], alone[0][0])
        np.testing.assert_array_equal(final[b], alone[1][0])
        assert not y[b, n:].any()


def test_scan_without_tokens_is_the_cumulative_product() -> None:
    gates = np.random.default_rng(2).uniform(0.5, 1.5, (2, 30, 4))
    y, final = SCAN.reference(np.float64, gates)
    np.testing.assert_allclose(y, np.cumprod(gates, axis=1), rtol=1e-13)
    np.testing.assert_array_equal(final, y[:, -1])
    state = np.full((2, 4), -3.0)
    y, _ = SCAN.reference(np.float64, gates, None, state, reverse=True)
    np.testing.assert_allclose(y, -3 * np.cumprod(gates[:, ::-1], axis=1)[:, ::-1], rtol=1e-13)


@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_scan_is_the_exponential_product_of_mmrec(backend: str) -> None:
    """The oracle works in the logarithm, with its own clamps: hence the tolerance."""
    oracle = load_file(ORACLE / "mmrec_exponential_product.safetensors")
    gamma, product = (oracle[k].reshape(6, 200, 5) for k in ("gamma", "product"))
    y, _ = srm_core.scan(gamma, backend=backend)
    np.testing.assert_allclose(y, product, rtol=1e-4, atol=1e-4)


# recurrent_step, recurrent_mix


def lower_triangular(steps: int, decay: float, w: np.ndarray, mode: str) -> np.ndarray:
    """M[t, s] = d^(t-s) w[s] (row) or d^(t-s) w[t] (col), for s <= t."""
    t, s = np.indices((steps, steps))
    powers = np.where(s <= t, decay ** np.abs(t - s), 0)
    return powers * (w[None, :] if mode == "row" else w[:, None])


def test_mix_is_a_structured_matrix() -> None:
    (x, weight, bias, decay, mode, _), _ = MIX.sample(case_of(MIX, "half"), "float64")
    start = 7
    y, _ = MIX.reference(np.float64, x, weight, bias, decay, mode, start=start)
    at = slice(start, start + x.shape[1])
    for h, kind in enumerate(mode):
        matrix = lower_triangular(x.shape[1], decay[h], weight[h, at], kind)
        expected = np.einsum("ts,bsd->btd", matrix, x[:, :, h]) + bias[h, at, None]
        np.testing.assert_allclose(y[:, :, h], expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["row", "start", "start_array", "start_out_of_range"])
def test_mix_folds_steps(name: str) -> None:
    (x, weight, bias, decay, mode, state), options = MIX.sample(case_of(MIX, name), "float64")
    y, final = MIX.reference(np.float64, x, weight, bias, decay, mode, state, **options)
    state = np.zeros_like(x[:, 0]) if state is None else state
    for t in range(x.shape[1]):
        index = options["start"] + t
        y_t, state = STEP.reference(np.float64, x[:, t], state, weight, bias, decay, mode, index)
        np.testing.assert_array_equal(y[:, t], y_t)
    np.testing.assert_array_equal(final, state)


def test_step_is_its_formula() -> None:
    (x, s, weight, bias, decay, mode, index), _ = STEP.sample(case_of(STEP, "index_array"), "float64")
    y, new = STEP.reference(np.float64, x, s, weight, bias, decay, mode, index)
    for h, kind in enumerate(mode):
        w, b = weight[h, index][:, None], bias[h, index][:, None]
        s_h = decay[h] * s[:, h] + (w * x[:, h] if kind == "row" else x[:, h])
        np.testing.assert_allclose(new[:, h], s_h, rtol=1e-14)
        np.testing.assert_allclose(y[:, h], (s_h if kind == "row" else w * s_h) + b, rtol=1e-13, atol=1e-14)


def test_a_position_out_of_range_gives_nan_there_alone() -> None:
    args, _ = STEP.sample(case_of(STEP, "index_out_of_range"), "float64")
    y, _ = STEP.reference(np.float64, *args)
    assert np.isnan(y[:2]).all()
    assert np.isfinite(y[2:]).all()


def test_step_at_slots_changes_those_rows_alone() -> None:
    (x, state, *rest), options = STEP_.sample(case_of(STEP_, "slots"), "float64")
    rows = options["slots"]
    y, after = STEP_.reference(np.float64, x, state, *rest, **options)
    expected_y, expected = STEP.reference(np.float64, x, state[rows], *rest)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(after[rows], expected)
    others = np.setdiff1d(np.arange(len(state)), rows)
    np.testing.assert_array_equal(after[others], state[others])


def test_a_slot_out_of_range_names_no_state() -> None:
    (x, state, *rest), _ = STEP_.sample(case_of(STEP_, "slots"), "float64")
    y, after = STEP_.reference(np.float64, x, state, *rest, slots=np.array([2, 7, -1]))
    assert np.isnan(y[1:]).all()
    assert np.isfinite(y[0]).all()
    assert np.array_equal(np.delete(after, 2, 0), np.delete(state, 2, 0))


# gradients

DIFFERENTIABLE = [p for p in CI if p.values[0].vjp is not None and in_range(p.values[1])]


class Loss:
    """A random linear function of all outputs, its derivative along a direction, and its gradient by the vjp."""

    def __init__(self, spec: OpSpec, case: Case) -> None:
        self.spec, self.rng = spec, np.random.default_rng(5)
        self.args, self.options = spec.bind(*spec.sample(case, "float64"))
        outputs = spec.reference(np.float64, *self.args, **self.options)
        self.grads = tuple(self.rng.normal(size=o.shape) for o in outputs)
        self.gradients = spec.vjp(np.float64, self.grads, *self.args, **self.options)

    def given(self) -> list[tuple[str, int, np.ndarray]]:
        """(name, position, gradient) of every differentiable argument that there is."""
        names = [p.name for p in self.spec.parameters]
        found = [(n, names.index(n), g) for n, g in zip(self.spec.differentiable, self.gradients, strict=True)]
        for name, i, g in found:
            given = self.args[i] is not None and self.args[i].dtype != bool
            assert (g is not None) == given, name
        return [f for f in found if f[2] is not None]

    def along(self, i: int, direction: np.ndarray, h: float = 1e-8) -> Any:
        """The central difference, in extended precision so that a step can be small."""

        def at(step: Any) -> Any:
            moved = self.args[i].astype(np.longdouble) + step * direction
            results = self.spec.reference(np.longdouble, *self.args[:i], moved, *self.args[i + 1 :], **self.options)
            return sum((r * g).sum() for r, g in zip(results, self.grads, strict=True))

        step = np.longdouble(h)
        return (at(step) - at(-step)) / (2 * step)


@pytest.mark.parametrize(("spec", "case"), DIFFERENTIABLE)
def test_vjp_is_the_derivative(spec: OpSpec, case: Case) -> None:
    """Along random directions everywhere, and element by element where there are few."""
    loss = Loss(spec, case)
    for name, i, gradient in loss.given():
        assert gradient.shape == loss.args[i].shape
        directions = [loss.rng.normal(size=gradient.shape) for _ in range(3)]
        if np.prod(list(case.dims.values())) <= 500:
            directions += list(np.eye(gradient.size).reshape(gradient.size, *gradient.shape))
        for direction in directions:
            expected = loss.along(i, direction)
            scale = np.linalg.norm(gradient) * np.linalg.norm(direction)
            assert abs((gradient * direction).sum() - expected) <= 1e-6 * scale, name


@pytest.mark.parametrize("case", [c for c in SCAN.cases if "ci" in c.tags], ids=lambda c: c.name)
def test_scan_vjp_is_that_of_autograd(case: Case) -> None:
    torch = pytest.importorskip("torch")
    loss = Loss(SCAN, case)
    leaves = [None if a is None else torch.tensor(a, requires_grad=True) for a in loss.args]
    gates, tokens, state = leaves
    batch, steps, width = (gates if tokens is None else tokens).shape
    full = gates.expand(batch, steps, width)
    if state is None:
        state = torch.full((batch, width), float(tokens is None), dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for b in range(batch):
        n = int(loss.options["lengths"][b]) if loss.options["lengths"] is not None else steps
        s = state[b]
        for t in reversed(range(n)) if loss.options["reverse"] else range(n):
            s = full[b, t] * s if tokens is None else full[b, t] * s + tokens[b, t]
            total = total + (s * torch.tensor(loss.grads[0][b, t])).sum()
        total = total + (s * torch.tensor(loss.grads[1][b])).sum()
    if total.requires_grad:
        total.backward()
    for leaf, gradient in zip(leaves, loss.gradients, strict=True):
        if leaf is not None:
            expected = np.zeros(leaf.shape) if leaf.grad is None else leaf.grad.numpy()
            np.testing.assert_allclose(gradient, expected, rtol=1e-9, atol=1e-11 * (np.abs(expected).max(initial=1)))


def test_vjp_skips_positions_out_of_range() -> None:
    """They have no weight to give a gradient to, so what the others get is finite."""
    args, options = STEP.sample(case_of(STEP, "index_out_of_range"), "float64")
    grads = (np.ones_like(args[0]), np.ones_like(args[1]))
    _, _, d_weight, d_bias, _ = STEP.vjp(np.float64, grads, *args, **options)
    for gradient in (d_weight, d_bias):
        assert np.isfinite(gradient).all()
        assert not gradient[:, 1:-1].any()  # the good positions are the first and the last
        assert gradient[:, 0].all()


# what else a specification says


@each_spec
def test_cases_are_named_and_tagged(spec: OpSpec) -> None:
    names = [c.name for c in spec.cases]
    assert len(set(names)) == len(names)
    for case in spec.cases:
        assert case.tags
        assert case.tags <= {"ci", "bench", "edge", "seed"}
    assert {t for c in spec.cases for t in c.tags} >= {"ci", "bench", "edge"}


@each_spec
def test_names_are_identifiers_and_unique(spec: OpSpec) -> None:
    parameters, outputs = [p.name for p in spec.parameters], [o.name for o in spec.outputs]
    residuals = [r.name for r in spec.residuals]
    for names in (parameters, outputs, residuals):
        assert len(set(names)) == len(names)
        assert all(n.isidentifier() for n in names)
    assert set(spec.mutates) <= set(parameters)
    assert {n for o in spec.outputs for n in o.like} <= set(parameters)
    assert set(spec.shape_order) <= set(parameters)
    assert SPECS[spec.name] is spec


@pytest.mark.parametrize(("spec", "case"), [p for p in CI if p.values[0].residuals])
def test_what_a_forward_keeps_is_declared(spec: OpSpec, case: Case) -> None:
    from srm_core.config import CURRENT
    from srm_core.context import LaunchContext
    from srm_core.registry import registry, resolve

    kept: dict[str, Any] = {}
    args, options = spec.bind(*spec.sample(case, "float32"))
    forward = resolve(registry().kernels[spec.name]["numpy"].kernel.forward)
    forward(LaunchContext("numpy", "cpu", CURRENT.get(), kept), *args, **options)
    dims = Call(spec, args, options).dims
    declared = {r.name: extents(r.axes, dims) for r in spec.residuals}
    assert {n: a.shape for n, a in kept.items()}.items() <= declared.items()


@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize(("spec", "case"), CI)
def test_samples_are_the_same_each_time_and_valid(spec: OpSpec, case: Case, dtype: str) -> None:
    one, other, another = (spec.bind(*spec.sample(case, dtype, seed)) for seed in (0, 0, 1))
    call = Call(spec, *one)
    assert call.dtype == dtype
    assert {k: call.dims[k] for k in case.dims} == dict(case.dims)
    if spec.check_values is not None:
        spec.check_values(call.dims, *one[0], **one[1])
    pairs = [[p for v in (*a, *o.values()) for p in arrays_of("", v)] for a, o in (one, other, another)]
    arrays = [[v for _, v in p if isinstance(v, np.ndarray)] for p in pairs]
    assert all(np.array_equal(a, b) for a, b in zip(*arrays[:2], strict=True))
    assert arrays[0][0].size == 0 or not np.array_equal(arrays[0][0], arrays[2][0])


@each_spec
def test_error_samples_are_named_and_name_a_parameter(spec: OpSpec) -> None:
    names = [s.name for s in spec.error_samples]
    assert len(set(names)) == len(names)
    assert {s.param.partition("[")[0] for s in spec.error_samples} <= {p.name for p in spec.parameters}


@pytest.mark.parametrize(("spec", "case"), EVERY)
def test_work_grows_with_size(spec: OpSpec, case: Case) -> None:
    empty = 0 in case.dims.values()
    assert spec.flops(case) > 0 or empty
    sizes = [spec.bytes(case, d) for d in ("float16", "float32", "float64")]
    assert all(isinstance(n, int) for n in sizes)
    assert all(a < b for a, b in pairwise(sizes)) or empty


@each_spec
def test_a_reference_makes_the_permitted_roundings_and_no_others(spec: OpSpec) -> None:
    made: set[str] = set()

    def rounding(name: str, values: np.ndarray) -> np.ndarray:
        made.add(name)
        return values

    functions = [f for f in (spec.reference, spec.vjp) if f is not None]
    assert {"rounding" in inspect.signature(f).parameters for f in functions} == {bool(spec.permitted_roundings)}
    how = {"rounding": rounding} if spec.permitted_roundings else {}
    for case in (c for c in spec.cases if "ci" in c.tags):
        args, options = spec.bind(*spec.sample(case, "float32"))
        with np.errstate(all="ignore"):
            results = spec.reference(np.float32, *args, **options, **how)
            if spec.vjp is not None:
                spec.vjp(np.float32, results, *args, **options, **how)
    assert made == set(spec.permitted_roundings)
    assert len(spec.permitted_roundings) == len(made)


# (operator, case, operations, bytes in float32), counted by hand
COUNTS = [
    # small: 2*7*5 = 70 elements; gates, tokens and y, and a final state of 2*5
    ("scan", "small", 140, 4 * (3 * 70 + 10)),
    # 2*300*8 = 4800 elements: tokens and y; gates 2*8; two states of 2*8
    ("scan", "channel_gate", 9600, 4 * (2 * 4800 + 16 + 32)),
    # row: 2*3*5 = 30 elements: x, y and two states; weight, bias and decay of 3 heads
    ("recurrent_step", "row", 120, 4 * (4 * 30 + 9)),
    ("recurrent_step_", "row", 120, 4 * (4 * 30 + 9)),
    # row: 2*9*3*5 = 270 elements: x and y; weight and bias of 3*9, decay of 3; a final state of 30
    ("recurrent_mix", "row", 1080, 4 * (540 + 54 + 3 + 30)),
    # small: 30 elements; 8 operations, three sigmoids of 5, a product; 5 tensors in, 2 out
    ("mdi", "small", 30 * 24, 4 * 7 * 30),
    # small: 10 steps of 3 * 2 * 16 and 20 * 4; z, gamma and h; weights of 3 * 16 and 2 * 4; two states of 8
    ("mdi_recurrence", "small", 10 * (96 + 80), 4 * (3 * 40 + 48 + 8 + 16)),
    # small: 10 steps of 2 * 16 * (3 + 4) and 30 * 4; x and y; weights of 16 * 7, two biases of 16; two states of 8
    ("lstm", "small", 10 * (224 + 120), 4 * (10 * 7 + 112 + 32 + 16)),
    # small: 2*3 heads of 5*5 pairs, two products of 4; four tensors of 2*3*5*4
    ("attention", "small", 6 * 25 * 16, 4 * 4 * 120),
    # causal: 2*2 heads of 33*34/2 pairs, two products of 8
    ("attention", "causal", 4 * 561 * 32, 4 * 4 * 4 * 33 * 8),
    # small: y of 2*4*4*5 = 160 elements, each 3*9 products, shift and activation; x of 2*3*6*7, weight 4*27, 5 vectors
    ("conv_bn", "small", 160 * 56, 4 * (252 + 108 + 160 + 5 * 4)),
]


@pytest.mark.parametrize(("op", "name", "flops", "size"), COUNTS, ids=lambda v: str(v))
def test_work_is_what_a_hand_counts(op: str, name: str, flops: int, size: int) -> None:
    case = case_of(SPECS[op], name)
    assert SPECS[op].flops(case) == flops
    assert SPECS[op].bytes(case, "float32") == size


@each_spec
def test_the_public_function_has_the_specified_signature(spec: OpSpec) -> None:
    function: Callable[..., Any] = getattr(srm_core, spec.name)
    *parameters, backend = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert bare == list(spec.signature.parameters.values())
    assert (backend.name, backend.kind, backend.default) == ("backend", inspect.Parameter.KEYWORD_ONLY, None)
    assert spec.name in srm_core.__all__
    assert function.__doc__
