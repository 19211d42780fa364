"""`mdi`, `mdi_recurrence` and `lstm` against implementations that were written without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.special import erf, expit
from srm_conformance.tolerances import judge_forward, judge_vjp

import srm_core
from srm_core.ops import SPECS
from srm_core.spec import FLOAT

ORACLE = Path(__file__).parent / "oracle"
each_backend = pytest.mark.parametrize("backend", ["numpy", "reference"])
# float32 is compared in units of a result's largest magnitude
PRECISIONS = [("float64", 1e-11), ("float32", 2e-5)]
each_precision = pytest.mark.parametrize(("dtype", "allowed"), PRECISIONS)


def assert_close(got: Any, expected: Any, allowed: float) -> None:
    assert got.shape == tuple(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=0, atol=allowed * max(1, np.abs(expected).max(initial=0)))


# mdi


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


@each_precision
@each_backend
def test_mdi_is_the_module_of_mmrec(backend: str, dtype: str, allowed: float) -> None:
    oracle = load_file(ORACLE / "mmrec_mdi_module.safetensors")

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ oracle[f"sd.{name}.weight"].T + oracle[f"sd.{name}.bias"]

    def perceptron(name: str, x: np.ndarray) -> np.ndarray:
        return linear(f"{name}.2", gelu(linear(f"{name}.0", x)))

    z, h = oracle["z"], oracle["h_prev"]
    logits = (
        linear("W_g", np.concatenate([z, h], -1)),
        perceptron("W_gamma", z),
        perceptron("W_context", oracle["context"]),
    )
    h_new, gamma = srm_core.mdi(*(a.astype(dtype) for a in (z, h, *logits)), backend=backend)
    assert_close(h_new, oracle["h_new"], allowed)
    assert_close(gamma, oracle["gamma"], allowed)


@each_backend
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.25])
def test_mdi_and_its_gradients_are_those_of_torch(backend: str, modulated: bool, eps: float) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((4, 50)) * s for s in (1, 1, 2, 2, 2)][: 4 + modulated]
    (h_new, gamma), pullback = srm_core.vjp("mdi", *arrays, eps=eps, backend=backend)
    grads = rng.standard_normal((2, 4, 50))
    gradients = [g for g in pullback(*grads) if g is not None]
    z, h, gate, *factors = leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    g = torch.sigmoid(gate)
    expected_gamma = torch.stack([torch.sigmoid(f) for f in factors]).prod(0).clamp(eps, 1 - eps)
    expected = (1 - g) * h + g * z + expected_gamma * h
    torch.autograd.backward([expected, expected_gamma], [torch.tensor(a) for a in grads])
    assert_close(h_new, expected.detach().numpy(), 1e-14)
    assert_close(gamma, expected_gamma.detach().numpy(), 1e-14)
    for leaf, gradient in zip(leaves, gradients, strict=True):
        assert_close(gradient, leaf.grad.numpy(), 1e-13)


@each_backend
@pytest.mark.parametrize("dtype", FLOAT)
def test_mdi_of_huge_and_odd_values(backend: str, dtype: str) -> None:
    """Logits that shut a gate, and values that are not finite, in every place."""
    odd = np.array([0, 1e4, -1e4, 88, -88, 745, -745, np.inf, -np.inf, np.nan])
    arrays = [a.reshape(-1) for a in np.meshgrid([2.0, np.inf], [-3.0, 0.0, np.nan], odd, odd)]
    args = [a.astype(dtype) for a in (*arrays, np.ones_like(arrays[0]))]
    outputs, pullback = srm_core.vjp("mdi", *args, backend=backend)
    spec = SPECS["mdi"]
    grads = [np.ones_like(o) for o in outputs]
    for judgement in (*judge_forward(spec, args, {}, outputs), *judge_vjp(spec, args, {}, grads, pullback(*grads))):
        assert judgement.ok, str(judgement)


@pytest.mark.parametrize(("dtype", "lowest", "allowed"), [("float64", -350, 1e-14), ("float32", -40, 2e-6)])
@each_backend
def test_faint_gammas_keep_their_digits(backend: str, dtype: str, lowest: int, allowed: float) -> None:
    """Without a clamp, to near the smallest number there is."""
    decay, modulation = np.linspace(lowest, 10, 1000).astype(dtype), np.linspace(lowest, -3, 1000).astype(dtype)
    one = np.ones_like(decay)
    _, gamma = srm_core.mdi(one, one, one, decay, modulation, eps=0, backend=backend)
    expected = expit(decay.astype("float64")) * expit(modulation.astype("float64"))
    np.testing.assert_allclose(gamma, expected, rtol=allowed)


@each_backend
def test_a_gradient_passes_at_the_bounds_of_the_clamp(backend: str) -> None:
    """As in torch.clamp: with eps = 1/2 both bounds are sigmoid(0)."""
    one = np.ones(3)
    (_, gamma), pullback = srm_core.vjp("mdi", one, one, one, np.array([-1.0, 0.0, 1.0]), eps=0.5, backend=backend)
    np.testing.assert_array_equal(gamma, 0.5)
    np.testing.assert_array_equal(pullback(None, one)[3], [0, 0.25, 0])


# mdi_recurrence


@each_precision
@each_backend
def test_the_recurrence_and_its_gradients_are_those_of_mmrec(backend: str, dtype: str, allowed: float) -> None:
    oracle = load_file(ORACLE / "mmrec_recurrence.safetensors")
    names = ("z", "gamma", "h0", "w_block", "b_block", "w_mdi", "b_mdi")
    values = {n: a[:, 0] if n in ("h0", "h_last", "grad.h0") else a for n, a in oracle.items()}
    args = [values[n].astype(dtype) for n in names]
    (h, h_last), pullback = srm_core.vjp("mdi_recurrence", *args, backend=backend)
    assert_close(h, values["h"], allowed)
    assert_close(h_last, values["h_last"], allowed)
    gradients = pullback(values["grad_out"].astype(dtype), None)
    for name, gradient in zip(names, gradients, strict=True):
        assert_close(gradient, values[f"grad.{name}"], 10 * allowed)


def test_the_recurrence_integrates_by_mdi() -> None:
    """With z's gate shut and mix = 1 a step is gamma * h + mdi(z, h), but for gamma's own logits."""
    rng = np.random.default_rng(1)
    z, h, w = rng.standard_normal((3, 1, 6)), rng.standard_normal((3, 6)), rng.standard_normal((6, 12))
    decay = rng.standard_normal((3, 6))
    shut, zero = np.full(6, -800.0), np.zeros(6)
    n, gamma = srm_core.mdi(z[:, 0], h, np.concatenate([z[:, 0], h], 1) @ w.T, decay)
    out, _ = srm_core.mdi_recurrence(z, gamma[:, None], h, np.zeros((6, 6)), shut, w, zero, mix=1)
    np.testing.assert_allclose(out[:, 0], gamma * h + n, rtol=1e-12)


@each_backend
@pytest.mark.parametrize("lengths", [[7, 7, 7], [7, 0, 3]], ids=["whole", "lengths"])
def test_the_recurrence_and_its_gradients_are_those_of_torch(backend: str, lengths: list[int]) -> None:
    """Each sequence alone, as long as it is, with another mix than the oracle's."""
    torch = pytest.importorskip("torch")
    linear, rng = torch.nn.functional.linear, np.random.default_rng(4)
    shapes = ((3, 7, 5), (3, 7, 5), (3, 5), (5, 5), (5,), (5, 10), (5,))
    arrays = [rng.standard_normal(s) / 2 for s in shapes]
    outputs, pullback = srm_core.vjp("mdi_recurrence", *arrays, mix=-0.7, lengths=np.array(lengths), backend=backend)
    grads = [rng.standard_normal(o.shape) for o in outputs]
    z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi = leaves = [torch.tensor(a, requires_grad=True) for a in arrays]
    rows, finals = [], []
    for b, n in enumerate(lengths):
        h, states = h0[b], []
        for z_t, gamma_t in zip(z[b, :n], gamma[b, :n], strict=True):
            g = torch.sigmoid(linear(torch.cat([z_t, h]), w_mdi, b_mdi))
            integrated = (1 - g) * h + g * z_t + gamma_t * h
            h = z_t * torch.sigmoid(linear(h, w_gate, b_gate)) + gamma_t * h - 0.7 * integrated
            states.append(h)
        rows.append(torch.stack([*states, *[torch.zeros_like(h)] * (7 - n)]))
        finals.append(h)
    expected = torch.stack(rows), torch.stack(finals)
    torch.autograd.backward(expected, [torch.tensor(g) for g in grads])
    for got, want in zip(outputs, expected, strict=True):
        assert_close(got, want.detach().numpy(), 1e-13)
    for leaf, gradient in zip(leaves, pullback(*grads), strict=True):
        assert_close(gradient, leaf.grad.numpy(), 1e-12)


@pytest.mark.parametrize("mix", [3, 1e31, -1e200])
@each_backend
def test_mix_is_any_finite_number(backend: str, mix: float) -> None:
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    _, last = srm_core.mdi_recurrence(
        one[None], zero[None], zero, zero, zero[0], np.zeros((1, 2)), zero[0], mix=mix, backend=backend
    )
    np.testing.assert_allclose(last, 0.5 + mix * 0.5, rtol=1e-15)


# lstm


def torch_lstm(torch: Any, args: dict[str, Any], lengths: Any) -> tuple[Any, dict[str, Any]]:
    """(y, h_n, c_n) of torch's module, and its leaves by our names."""
    batch, width, inputs = len(args["x"]), args["w_hh"].shape[1], args["x"].shape[2]
    module = torch.nn.LSTM(inputs, width, batch_first=True, dtype=torch.float64)
    own = {"w_ih": "weight_ih_l0", "w_hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0"}
    leaves = {"x": torch.tensor(args["x"], requires_grad=True)}
    for name, theirs in own.items():
        leaf = leaves[name] = getattr(module, theirs)
        with torch.no_grad():
            leaf.copy_(torch.zeros_like(leaf) if args[name] is None else torch.tensor(args[name]))
    for name in ("h0", "c0"):
        value = np.zeros((batch, width)) if args[name] is None else args[name]
        leaves[name] = torch.tensor(value[None], requires_grad=True)
    x = leaves["x"]
    if lengths is not None:
        x = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), True, enforce_sorted=False)
    y, (h_n, c_n) = module(x, (leaves["h0"], leaves["c0"]))
    if lengths is not None:
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, True, total_length=args["x"].shape[1])
    return (y, h_n[0], c_n[0]), leaves


@each_precision
@each_backend
@pytest.mark.parametrize(
    "given", [(), ("b_ih",), ("b_ih", "b_hh"), ("h0", "c0"), ("b_ih", "b_hh", "h0", "c0")], ids="-".join
)
@pytest.mark.parametrize("lengths", [None, [9, 1, 5]], ids=["whole", "lengths"])
def test_lstm_and_its_gradients_are_those_of_torch(
    backend: str, given: tuple[str, ...], lengths: list[int] | None, dtype: str, allowed: float
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    shapes = {
        "x": (3, 9, 4), "w_ih": (20, 4), "w_hh": (20, 5), "b_ih": (20,), "b_hh": (20,), "h0": (3, 5), "c0": (3, 5),
    }  # fmt: skip
    optional = ("b_ih", "b_hh", "h0", "c0")
    args = {n: rng.standard_normal(s) if n in given or n not in optional else None for n, s in shapes.items()}
    options = {} if lengths is None else {"lengths": np.array(lengths)}
    ours = {n: None if a is None else a.astype(dtype) for n, a in args.items()}
    outputs, pullback = srm_core.vjp("lstm", *ours.values(), **options, backend=backend)
    expected, leaves = torch_lstm(torch, args, lengths)
    grads = [rng.standard_normal(o.shape) for o in outputs]
    torch.autograd.backward(expected, [torch.tensor(g) for g in grads])
    for got, want in zip(outputs, expected, strict=True):
        assert_close(got, want.detach().numpy(), allowed)
    for name, gradient in zip(shapes, pullback(*(g.astype(dtype) for g in grads)), strict=True):
        if args[name] is None:
            assert gradient is None
        else:
            assert_close(gradient, leaves[name].grad.numpy().reshape(shapes[name]), 10 * allowed)


# both


@pytest.mark.parametrize("op", ["lstm", "mdi_recurrence"])
def test_products_by_columns(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for weights larger than the cache."""
    monkeypatch.setattr("srm_backends.numpy.gated.LARGE", 0)
    spec = SPECS[op]
    args, options = spec.sample(next(c for c in spec.cases if c.name == "odd"), "float32")
    outputs, pullback = srm_core.vjp(op, *args, **options, backend="numpy")
    judged = (
        *judge_forward(spec, args, options, outputs),
        *judge_vjp(spec, args, options, outputs, pullback(*outputs)),
    )
    assert not [str(j) for j in judged if not j.ok]


@each_backend
@pytest.mark.parametrize("dtype", FLOAT)
@pytest.mark.parametrize(("op", "names"), [("lstm", ("x",)), ("mdi_recurrence", ("z", "gamma"))])
def test_garbage_beyond_lengths_does_not_leak(op: str, names: tuple[str, ...], dtype: str, backend: str) -> None:
    spec = SPECS[op]
    case = next(c for c in spec.cases if c.name == "lengths")
    args, options = spec.bind(*spec.sample(case, dtype))
    outputs, pullback = srm_core.vjp(op, *args, **options, backend=backend)
    grads = [np.random.default_rng(3).standard_normal(o.shape).astype(o.dtype) for o in outputs]
    expected = pullback(*grads)
    dirty = [None if a is None else a.copy() for a in args]
    for b, n in enumerate(options["lengths"]):
        grads[0][b, n:] = np.inf
        for p, value in zip(spec.parameters, dirty, strict=False):
            if p.name in names:
                value[b, n:] = np.nan
    got, pullback = srm_core.vjp(op, *dirty, **options, backend=backend)
    for a, b in zip((*got, *pullback(*grads)), (*outputs, *expected), strict=True):
        np.testing.assert_array_equal(a, b)


@each_backend
@pytest.mark.parametrize(("op", "name"), [("lstm", "lengths_states"), ("mdi_recurrence", "lengths")])
def test_a_step_that_is_not_run_gives_nothing(op: str, name: str, backend: str) -> None:
    """What an empty sequence begins with reaches its last state alone; NaN within a sequence is not in its padding."""
    spec = SPECS[op]
    args, options = spec.bind(*spec.sample(next(c for c in spec.cases if c.name == name), "float32"))
    lengths = options["lengths"]
    empty, longer = (int(np.flatnonzero(w)[0]) for w in (lengths == 0, (lengths > 0) & (lengths < args[0].shape[1])))
    outputs, pullback = srm_core.vjp(op, *args, **options, backend=backend)
    grads = [np.random.default_rng(5).standard_normal(o.shape).astype(o.dtype) for o in outputs]
    expected = pullback(*grads)
    values = {p.name: None if a is None else a.copy() for p, a in zip(spec.parameters, args, strict=False)}
    for array in (*(a for n, a in values.items() if n in ("h0", "c0") and a is not None), *grads[1:]):
        array[empty] = np.nan
    _, pullback = srm_core.vjp(op, *values.values(), **options, backend=backend)
    for n, got, clean in zip(spec.differentiable, pullback(*grads), expected, strict=True):
        if n in ("h0", "c0"):
            assert np.isnan(got[empty]).all()
            got, clean = np.delete(got, empty, 0), np.delete(clean, empty, 0)
        np.testing.assert_array_equal(got, clean)
    args[0][longer, 0, 0] = np.nan
    _, pullback = srm_core.vjp(op, *args, **options, backend=backend)
    d_x = pullback(*map(np.ones_like, outputs))[0]
    assert np.isnan(d_x[longer, : lengths[longer]]).any()
    assert not d_x[longer, lengths[longer] :].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 1e4, -1e4, 1e-42])
@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize(
    ("op", "name"),
    [("lstm", "states"), ("lstm", "lengths_states"), ("mdi_recurrence", "mix"), ("mdi_recurrence", "lengths")],
)
def test_one_odd_value(op: str, name: str, position: int, value: float) -> None:
    """NaN and infinity go where the formula takes them, in results and gradients."""
    spec = SPECS[op]
    case = next(c for c in spec.cases if c.name == name)
    args, options = spec.sample(case, "float32")
    args[position].flat[args[position].size // 2] = value
    outputs, pullback = srm_core.vjp(op, *args, **options, backend="numpy")
    grads = [np.ones_like(o) for o in outputs]
    judged = (*judge_forward(spec, args, options, outputs), *judge_vjp(spec, args, options, grads, pullback(*grads)))
    assert not [str(j) for j in judged if not j.ok]
