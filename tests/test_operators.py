"""The built-in kernels where they have forms of their own, beyond what the suite asks of any; and the judge itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from srm_conformance import tolerances
from srm_conformance.tolerances import Judgement, judge_forward, judge_invariant, judge_vjp

import srm_core
from srm_core.contract import arrays_of
from srm_core.ops import SPECS
from srm_core.spec import FLOAT, Case, OpSpec

BACKENDS = ("numpy", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", FLOAT)


class Run:
    """A call on a backend, with what the arguments were before it."""

    def __init__(self, spec: OpSpec, args: Any, options: Any, backend: str) -> None:
        self.spec, self.backend = spec, backend
        self.args, self.options = spec.bind(args, options)
        self.before = copies(self.args), dict(zip(self.options, copies(self.options.values()), strict=True))
        self.values = {**dict(zip((p.name for p in spec.parameters), self.args, strict=False)), **self.options}
        self.mutated = [array for n in spec.mutates for _, array in arrays_of(n, self.values[n])]

    def forward(self) -> tuple[np.ndarray, ...]:
        return self.spec.unpack(srm_core.call(self.spec.name, *self.args, backend=self.backend, **self.options))

    def judged_forward(self) -> list[Judgement]:
        outputs = self.forward()
        return judge_forward(self.spec, *self.before, outputs, self.mutated)

    def backward(self, seed: int = 0) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray | None, ...]]:
        outputs, pullback = srm_core.vjp(self.spec.name, *self.args, backend=self.backend, **self.options)
        rng = np.random.default_rng(seed)
        grads = tuple(rng.standard_normal(o.shape).astype(o.dtype) for o in self.spec.unpack(outputs))
        gradients = pullback(*(given := copies(grads)))
        assert all(a.tobytes() == b.tobytes() for a, b in zip(grads, given, strict=True)), "a gradient was written to"
        return given, gradients

    def judged_backward(self) -> list[Judgement]:
        grads, gradients = self.backward()
        return judge_vjp(self.spec, *self.before, grads, gradients)


def copies(values: Any) -> tuple[Any, ...]:
    """Copies of arrays, also within tuples; anything else as it is."""

    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return copies(value)
        return value.copy() if isinstance(value, np.ndarray) else value

    return tuple(map(one, values))


def case_of(spec: OpSpec, name: str) -> Case:
    return next(c for c in spec.cases if c.name == name)


def run(op: str, case: str, dtype: str, backend: str) -> Run:
    return Run(SPECS[op], *SPECS[op].sample(case_of(SPECS[op], case), dtype), backend)


def assert_right(judgements: list[Judgement]) -> None:
    wrong = [str(j) for j in judgements if not j.ok]
    assert not wrong, "\n".join(wrong)


def assert_wrong(judgements: list[Judgement]) -> None:
    assert any(not j.ok for j in judgements), "\n".join(map(str, judgements))


def test_no_heads_and_no_positions() -> None:
    """H = 0 gives empty results; L = 0 has no weight at any position of an array: NaN."""
    one = np.ones((2, 3, 4, 5), np.float32)
    w, d = np.ones((4, 8), np.float32), np.ones(4, np.float32)
    mode = ("row",) * 4
    for backend in BACKENDS:
        (y, _), pullback = srm_core.vjp("recurrent_mix", one[:, :, :0], w[:0], w[:0], d[:0], (), backend=backend)
        assert y.shape == (2, 3, 0, 5)
        assert [g.shape for g in pullback(None, None)[:4]] == [(2, 3, 0, 5), (0, 8), (0, 8), (0,)]
        y, _ = srm_core.recurrent_step(one[:, 0], one[:, 0], w[:, :0], w[:, :0], d, mode, np.array(0), backend=backend)
        assert np.isnan(y).all()


@pytest.mark.parametrize("strides", [(12, 12, 4), (24, 4, 4), (24, 12, 0)], ids=str)
def test_a_state_in_place_may_not_overlap(strides: tuple[int, ...]) -> None:
    x, w = np.ones((2, 2, 3), np.float32), np.ones((2, 8), np.float32)
    state = np.lib.stride_tricks.as_strided(np.zeros(60, np.float32), (2, 2, 3), strides)
    with pytest.raises(srm_core.ContractError, match="elements share memory"):
        srm_core.recurrent_step_(x, state, w, w, w[:, 0], ("row", "col"), 0)
    apart = np.zeros((3, 2, 6), np.float32)[::-1, :, ::2][:2]
    srm_core.recurrent_step_(x, apart, w, w, w[:, 0], ("row", "col"), 0)
    assert apart.any()


def test_a_step_in_place_writes_nothing_around_its_view() -> None:
    (x, state, *rest), options = SPECS["recurrent_step_"].sample(
        case_of(SPECS["recurrent_step_"], "slots"), "float32"
    )  # fmt: skip
    memory = np.full((*state.shape, 2), 7, np.float32)
    memory[..., 0] = state
    for backend in BACKENDS:
        view = memory.copy()[..., 0]
        srm_core.recurrent_step_(x, view, *rest, **options, backend=backend)
        assert (view.base[..., 1] == 7).all()
        assert not np.array_equal(view, state)


# Edges. `B * D <= 512` and `T >= 256` is where the NumPy backend takes its blocked form.


def gates_and_tokens(seed: int, low: float, high: float, shape: tuple[int, ...] = (2, 300, 4)) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.uniform(low, high, shape), rng.standard_normal(shape)


def with_zero_gates() -> Any:
    gates, tokens = gates_and_tokens(0, 0.9, 1.1)
    gates[np.random.default_rng(1).random(gates.shape) < 0.1] = 0
    return gates, tokens, np.ones((2, 4))


def with_negative_gates() -> Any:
    return *gates_and_tokens(2, -1.05, 1.05), None


def overflowing() -> Any:
    gates, tokens = gates_and_tokens(3, 1.5, 2.5)
    return gates, tokens, None


def overflowing_at_a_constant_gate() -> Any:
    _, tokens = gates_and_tokens(4, 0, 1)
    return np.full((1, 1, 4), 2.0), tokens, np.array([[0.0, 1, -1, 1e-30]] * 2)


def overflowing_then_cut_off() -> Any:
    gates, tokens, _ = overflowing()
    gates[:, 280] = 0
    return gates, tokens, None


def underflowing_product() -> Any:
    return np.full((2, 300, 4), 0.1), None, np.full((2, 4), 1e30)


def underflowing_product_at_default_state() -> Any:
    return np.full((2, 300, 4), 0.1), None, None


def product_that_comes_back() -> Any:
    gates = np.full((2, 300, 4), 0.05)
    gates[:, 150:] = 20
    return gates, None, None


def faint_gates_and_a_large_state() -> Any:
    gates, tokens = gates_and_tokens(5, 1e-12, 1e-10)
    return gates, tokens, np.full((2, 4), 1e30)


def faint_product_of_a_large_state() -> Any:
    return np.full((2, 300, 4), 1.1e-10), None, np.full((2, 4), 1e300)


def products_that_are_infinite_but_meet_zeros() -> Any:
    return np.full((2, 300, 4), 1e20), np.zeros((2, 300, 4)), np.zeros((2, 4))


def huge() -> Any:
    gates, tokens = gates_and_tokens(6, 0.5, 0.9)
    return gates, tokens * 3e4, np.full((2, 4), 6e4)


def tiny() -> Any:
    gates, tokens = gates_and_tokens(7, 0.5, 0.9)
    return gates, tokens * 1e-41, None


def nan_token() -> Any:
    gates, tokens = gates_and_tokens(8, 0.9, 1)
    tokens[1, 100, 2] = np.nan
    return gates, tokens, None


def infinite_tokens() -> Any:
    gates, tokens = gates_and_tokens(9, 0.9, 1)
    tokens[0, 10, 0], tokens[0, 20, 1], tokens[1, 30, 2], tokens[1, 200, 2] = np.inf, -np.inf, np.inf, -np.inf
    return gates, tokens, None


def infinite_gate() -> Any:
    gates, tokens = gates_and_tokens(10, 0.9, 1)
    gates[0, 150, 1], gates[1, 40, 2], gates[1, 41, 2] = np.inf, -np.inf, 0
    return gates, tokens, None


def infinity_times_zero() -> Any:
    gates, tokens = gates_and_tokens(11, 0.9, 1)
    tokens[0, 50, 3], gates[0, 60, 3] = np.inf, 0
    return gates, tokens, None


def nan_state() -> Any:
    gates, tokens = gates_and_tokens(12, 0.9, 1)
    return gates, tokens, np.array([[1, np.nan, np.inf, 0]] * 2)


def zeros_everywhere() -> Any:
    return np.zeros((2, 300, 4)), np.zeros((2, 300, 4)), np.zeros((2, 4))


EDGES = (
    with_zero_gates, with_negative_gates, overflowing, overflowing_at_a_constant_gate, overflowing_then_cut_off,
    underflowing_product, underflowing_product_at_default_state, product_that_comes_back,
    faint_gates_and_a_large_state, faint_product_of_a_large_state, products_that_are_infinite_but_meet_zeros,
    huge, tiny, nan_token,
    infinite_tokens, infinite_gate, infinity_times_zero, nan_state, zeros_everywhere,
)  # fmt: skip


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("edge", EDGES, ids=lambda f: f.__name__)
def test_scan_edges(edge: Any, dtype: str, reverse: bool) -> None:
    with np.errstate(all="ignore"):
        args = [None if a is None else a.astype(dtype) for a in edge()]
    one = Run(SPECS["scan"], args, {"reverse": reverse}, "numpy")
    assert_right(one.judged_forward())
    assert_right(one.judged_backward())


def test_the_blocked_form_equals_the_plain_loop_where_powers_of_two_make_both_exact() -> None:
    rng = np.random.default_rng(13)
    gates = 2.0 ** rng.integers(-2, 3, (2, 300, 4))
    y, final = srm_core.scan(gates.astype("float32"), backend="numpy")
    np.testing.assert_array_equal(y, np.cumprod(gates, axis=1).astype("float32"))
    np.testing.assert_array_equal(final, y[:, -1])


def poison_scan(values: dict[str, Any], lengths: np.ndarray, grads: list[np.ndarray]) -> None:
    for b, n in enumerate(lengths):
        for name in ("gates", "tokens"):
            if values[name] is not None and values[name].shape[1] > 1:
                values[name][b, n:] = np.nan
        grads[0][b, n:] = np.nan


def poison_mix(values: dict[str, Any], lengths: np.ndarray, grads: list[np.ndarray]) -> None:
    for b, n in enumerate(lengths):
        values["x"][b, n:] = np.nan
        grads[0][b, n:] = np.inf


@each_dtype
@pytest.mark.parametrize(
    ("op", "name", "poison"),
    [
        ("scan", "lengths", poison_scan), ("scan", "lengths_reverse", poison_scan),
        ("scan", "lengths_channel_gate", poison_scan), ("scan", "lengths_product", poison_scan),
        ("recurrent_mix", "lengths", poison_mix), ("recurrent_mix", "lengths_start_array", poison_mix),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
@each_backend
def test_garbage_beyond_lengths_does_not_leak(op: str, name: str, poison: Any, dtype: str, backend: str) -> None:
    clean, dirty = run(op, name, dtype, backend), run(op, name, dtype, backend)
    grads, expected = clean.backward()
    bad = list(copies(grads))
    poison(dirty.values, dirty.options["lengths"], bad)
    for a, b in zip(dirty.forward(), clean.forward(), strict=True):
        np.testing.assert_array_equal(a, b)
    _, pullback = srm_core.vjp(op, *dirty.args, backend=backend, **dirty.options)
    for a, b in zip(pullback(*bad), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@each_backend
def test_positions_beyond_lengths_need_no_weights(backend: str) -> None:
    """Each sequence ends at the model's last position, so what lies beyond is out of range."""
    one = run("recurrent_mix", "lengths_start_array", "float32", backend)
    start = 32 - one.options["lengths"]
    one = Run(one.spec, one.args, {**one.options, "start": start}, backend)
    assert_right(one.judged_forward())
    grads, gradients = one.backward()
    assert_right(judge_vjp(one.spec, *one.before, grads, gradients))
    assert all(np.isfinite(g).all() for g in gradients if g is not None)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38, 1e-42])
@pytest.mark.parametrize("name", ["x", "state", "weight", "bias", "decay"])
@pytest.mark.parametrize("op", ["recurrent_step", "recurrent_step_", "recurrent_mix"])
def test_mixer_edges(op: str, name: str, value: float) -> None:
    """One odd value in one argument."""
    name = "initial_state" if (op, name) == ("recurrent_mix", "state") else name
    one = run(op, "narrow" if op == "recurrent_mix" else "half", "float32", "numpy")
    one.values[name].flat[one.values[name].size // 2] = value
    one = Run(one.spec, one.args, one.options, "numpy")
    if one.spec.vjp is not None:
        assert_right(one.judged_backward())
    assert_right(one.judged_forward())


@each_backend
def test_a_row_of_nan_at_another_slot_stays_there(backend: str) -> None:
    one = run("recurrent_step_", "slots", "float32", backend)
    others = np.setdiff1d(np.arange(7), one.options["slots"])
    one.values["state"][others] = np.nan
    (y,) = one.forward()
    assert np.isfinite(y).all()
    assert np.isfinite(one.values["state"][one.options["slots"]]).all()
    assert np.isnan(one.values["state"][others]).all()


@each_backend
def test_half_types_overflow_to_infinity_without_a_warning(backend: str) -> None:
    """Also where the caller has asked NumPy to raise."""
    tokens = np.full((1, 300, 1), 6e4, "float16")
    with np.errstate(all="raise"):
        y, final = srm_core.scan(np.ones((1, 1, 1), "float16"), tokens, backend=backend)
    assert np.isfinite(y[0, 0, 0])
    assert np.isposinf(y[0, 1:, 0]).all()
    assert final[0, 0] == np.float32(6e4).astype("float16").astype("float32") * 300


@pytest.mark.parametrize("edge", [infinity_times_zero, overflowing], ids=lambda f: f.__name__)
@each_backend
def test_nan_and_infinity_are_results_like_others(edge: Any, backend: str) -> None:
    """Neither direction warns of them."""
    args = [None if a is None else a.astype("float32") for a in edge()]
    with np.errstate(all="raise"):
        (y, final), pullback = srm_core.vjp("scan", *args, backend=backend)
        pullback(np.full_like(y, np.inf), np.zeros_like(final))
    assert not np.isfinite(y).all()


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("steps", [0, 5, 300])
@pytest.mark.parametrize("batch", [0, 2])
@each_backend
def test_empty_arrays(batch: int, steps: int, width: int, backend: str) -> None:
    tokens = np.ones((batch, steps, width), np.float32)
    one = Run(SPECS["scan"], (tokens, tokens, np.ones((batch, width), np.float32)), {}, backend)
    assert_right(one.judged_forward())
    assert_right(one.judged_backward())
    x = np.ones((batch, steps, 2, width), np.float32)
    parameters = np.ones((2, 301), np.float32), np.ones((2, 301), np.float32), np.ones(2, np.float32)
    one = Run(SPECS["recurrent_mix"], (x, *parameters, ("row", "col")), {}, backend)
    assert_right(one.judged_forward())
    assert_right(one.judged_backward())


@st.composite
def scans(draw: st.DrawFn) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    dtype = draw(st.sampled_from(FLOAT))
    b, d = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    t = draw(st.one_of(st.integers(0, 40), st.integers(254, 330)))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    shape = draw(st.sampled_from([(b, t, d), (b, t, 1), (b, 1, d), (1, 1, d)]))
    tokens = rng.standard_normal((b, t, d)).astype(dtype)
    low = draw(st.sampled_from([-1.02, 0.0, 0.8]))
    if draw(st.booleans()) and shape == (b, t, d):
        tokens = None
    gates = rng.uniform(low, 1.02, shape).astype(dtype)
    state_dtype = draw(st.sampled_from([dtype, "float32"] if dtype in ("float16", "bfloat16") else [dtype]))
    state = rng.standard_normal((b, d)).astype(state_dtype) if draw(st.booleans()) else None
    lengths = rng.integers(0, t + 1, b) if draw(st.booleans()) else None
    return (gates, tokens, state), {"reverse": draw(st.booleans()), "lengths": lengths}


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(scans())
def test_any_numpy_scan_is_the_reference(call: Any) -> None:
    one = Run(SPECS["scan"], *call, "numpy")
    assert_right(one.judged_forward())
    assert_right(one.judged_backward())


# The judge: what it must see, and what it must let pass.


def rounding_scan(dtype: str) -> Any:
    """A scan that rounds its state to `dtype` at every step."""

    def scan(gates: Any, tokens: Any, state: Any, **_: Any) -> tuple[np.ndarray, ...]:
        y = np.zeros_like(tokens)
        s = (np.zeros_like(tokens[:, 0]) if state is None else state).astype(dtype)
        for t in range(tokens.shape[1]):
            s = (gates[:, t % gates.shape[1]].astype("float32") * s.astype("float32") + tokens[:, t]).astype(dtype)
            y[:, t] = s
        return y, s.astype("float32")

    return scan


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("gate", [0.9, 0.999])
def test_half_accumulation_is_seen(dtype: str, gate: float) -> None:
    tokens = np.random.default_rng(0).uniform(0, 1, (2, 300, 8)).astype(dtype)
    args = np.full((1, 1, 8), gate, "float32"), tokens, None
    spec = SPECS["scan"]
    assert_right(judge_forward(spec, args, {}, rounding_scan("float32")(*args)))
    wrong = judge_forward(spec, args, {}, rounding_scan(dtype)(*args))
    assert_wrong([j for j in wrong if j.what == "final_state"])
    if gate > 0.99:  # else few steps are remembered, and y cannot tell
        assert_wrong([j for j in wrong if j.what == "y"])


def swallow_nan(y: Any, state: Any) -> Any:
    return np.nan_to_num(y), state


# name: (operator, case, what it does to right results)
MUTANTS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "a step late": ("scan", "small", lambda y, s: (np.roll(y, 1, 1), s)),
    "one element": ("scan", "odd", lambda y, s: (y + 1e-4 * (np.arange(y.size) == 999).reshape(y.shape), s)),
    "a bias of eps": ("scan", "odd", lambda y, s: (y * (1 + 1e-5), s)),
    "the state at T": ("scan", "lengths", lambda y, s: (y, y[:, -1])),
    "garbage beyond": ("scan", "lengths", lambda y, s: (np.where(y == 0, 1e-20, y), s)),
    "flipped sign": ("scan", "small", lambda y, s: (-y, s)),
    "half": ("scan", "small", lambda y, s: (y.astype("float16"), s)),
    "wide": ("scan", "small", lambda y, s: (y.astype("float64"), s)),
    "squeezed": ("scan", "one_step", lambda y, s: (y[:, 0], s)),
    "one result": ("scan", "small", lambda y, s: (y,)),
    "three results": ("scan", "small", lambda y, s: (y, s, s)),
    "no array": ("scan", "small", lambda y, s: (y, None)),
    "nan": ("scan", "small", lambda y, s: (y, s * np.nan)),
    "swallowed nan": ("recurrent_step", "index_out_of_range", swallow_nan),
    "infinity of the other sign": ("recurrent_step", "row", lambda y, s: (-y, s)),
    "swapped modes": ("recurrent_mix", "half", lambda y, s: (y[:, :, ::-1], s)),
    "state of one step before": ("recurrent_mix", "row", lambda y, s: (y, s * 0.99)),
}  # fmt: skip


@pytest.mark.parametrize(("op", "name", "change"), MUTANTS.values(), ids=MUTANTS)
def test_wrong_results_are_seen(op: str, name: str, change: Any) -> None:
    one = run(op, name, "float32", "numpy")
    outputs = one.forward()
    assert_right(judge_forward(one.spec, *one.before, outputs))
    assert_wrong(judge_forward(one.spec, *one.before, change(*outputs)))


@each_dtype
@pytest.mark.parametrize("op", ["recurrent_mix", "recurrent_step", "recurrent_step_"])
def test_a_dropped_bias_is_seen(op: str, dtype: str) -> None:
    one = run(op, "half", dtype, "numpy")
    without = run(op, "half", dtype, "numpy")
    without.values["bias"][...] = 0
    outputs = without.forward()
    assert_wrong(judge_forward(one.spec, *one.before, outputs, without.mutated))


def test_a_state_that_was_not_updated_is_seen() -> None:
    one = run("recurrent_step_", "slots", "float32", "numpy")
    outputs = one.forward()
    assert_right(judge_forward(one.spec, *one.before, outputs, one.mutated))
    assert_wrong(judge_forward(one.spec, *one.before, outputs, [one.before[0][1]]))
    assert_wrong(judge_forward(one.spec, *one.before, outputs))


GRADIENT_MUTANTS: dict[str, Callable[[list[Any]], list[Any]]] = {
    "no gradient of decay": lambda g: [*g[:3], g[3] * 0, g[4]],
    "gradient of decay a step late": lambda g: [*g[:3], g[3] * 0.99, g[4]],
    "weight and bias swapped": lambda g: [g[0], g[2], g[1], *g[3:]],
    "None": lambda g: [*g[:4], None],
    "one too few": lambda g: g[:4],
    "nan": lambda g: [g[0] + np.nan, *g[1:]],
}


@pytest.mark.parametrize("change", GRADIENT_MUTANTS.values(), ids=GRADIENT_MUTANTS)
def test_wrong_gradients_are_seen(change: Any) -> None:
    one = run("recurrent_mix", "half", "float32", "numpy")
    grads, gradients = one.backward()
    assert_right(judge_vjp(one.spec, *one.before, grads, gradients))
    assert_wrong(judge_vjp(one.spec, *one.before, grads, change(list(gradients))))


def test_a_gradient_of_something_absent_is_seen() -> None:
    one = run("scan", "small", "float32", "numpy")
    grads, gradients = one.backward()
    assert gradients[2] is None
    assert_wrong(judge_vjp(one.spec, *one.before, grads, [*gradients[:2], np.zeros((2, 5), np.float32)]))


def test_a_broken_law_is_seen() -> None:
    spec = SPECS["scan"]
    batch_permutes = next(i for i in spec.invariants if i.name == "batch permutation")

    def leaky(*args: Any, **options: Any) -> Any:
        y, final = srm_core.scan(*args, **options)
        y[0] *= np.float32(1.001)
        return y, final

    assert_wrong(judge_invariant(spec, batch_permutes, leaky, *spec.sample(case_of(spec, "odd"), "float32")))


def test_infinity_of_the_other_sign_is_out_of_place() -> None:
    tokens = np.array([[[6e4], [6e4]]], "float16")
    args = np.ones((1, 1, 1), "float16"), tokens
    final = np.array([[120000]], "float32")
    good, bad = (np.array([[[6e4], [v]]], "float16") for v in (np.inf, -np.inf))
    assert_right(judge_forward(SPECS["scan"], args, {}, (good, final)))
    (wrong,) = (j for j in judge_forward(SPECS["scan"], args, {}, (bad, final)) if not j.ok)
    assert str(wrong) == (
        "y: 1 elements with NaN or infinity out of place; worst at [0, 1, 0]: got -inf, expected inf"
    )  # fmt: skip


def test_a_judgement_says_what_where_and_why() -> None:
    one = run("scan", "small", "float16", "numpy")
    y, final = one.forward()
    y[1, 3, 2] += 1
    (_, row, _) = (j for j in judge_forward(one.spec, *one.before, (y, final)) if not j.ok)
    assert (row.what, row.measure, row.index) == ("y", "row", (1, 3, 2))
    assert row.got == str(y[1, 3, 2])
    assert row.ratio == row.error / row.allowed > 100
    assert row.derived == "4 eps of float16"
    assert str(row).startswith("y: row error ")
    assert " > 0.00391 = 4 eps of float16; worst at [1, 3, 2]: got " in str(row)


def test_measures() -> None:
    truth, one = np.array([[3.0, 4.0], [0.0, 0.0]]), np.eye(4).reshape(4, 2, 2)
    assert tolerances.frobenius_error(truth + one[1], truth) == (0.2, (0, 1))
    assert tolerances.row_error(truth + one[0], truth) == (0.25, (0, 0))
    assert tolerances.row_error(truth + 1e-9 * one[3], truth)[0] == np.inf
    assert tolerances.row_error(truth + 1e-9 * one[3], truth, floor=1e-6)[0] == pytest.approx(1e-3)
    assert tolerances.frobenius_error(truth * 0, truth * 0) == (0, (0, 0))
    assert tolerances.row_error(np.float64(3.0), np.float64(2.0)) == (0.5, (0,))
    for measure in (tolerances.frobenius_error, tolerances.row_error):
        assert measure(np.zeros((0, 3)), np.zeros((0, 3))) == (0, ())
        assert measure(truth * 1e300, truth * 1e300)[0] == 0
        assert measure(np.array([np.nan, 1.0]), np.array([np.nan, 1.0]))[0] == 0


@pytest.mark.parametrize("case", ["state", "channel_gate", "lengths_reverse"])
def test_float64_is_judged_where_nothing_is_wider(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There the loss of float32 stands for that of float64."""
    monkeypatch.setattr(tolerances, "EXTENDED", False)
    one = run("scan", case, "float64", "numpy")
    assert_right(one.judged_forward())
    assert_right(one.judged_backward())
    y, final = one.forward()
    assert_wrong(judge_forward(one.spec, *one.before, (y.astype("float32").astype("float64"), final)))
