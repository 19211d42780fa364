"""The call path: what is decided, what is remembered, what is refused, and what comes back."""

from __future__ import annotations

import enum
import json
import logging
import sys
import timeit
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import srm_core
from srm_core import dispatch
from srm_core.arrays import BFLOAT16
from srm_core.contract import arrays_of
from srm_core.ops import SPECS

pytestmark = pytest.mark.usefixtures("environ")

SEVEN = "Kernel('scan', 'plug:seven')"
WATCH = """
seen = []
@hookimpl
def srm_on_decision(decision):
    seen.append(decision)
"""


@pytest.fixture
def decisions(plugin: Any) -> list[Any]:
    """Every decision that is made; a memo hit makes none."""
    return plugin("watch", WATCH).seen


def step_arguments(dtype: Any = np.float32, index: Any = 1) -> list[Any]:
    rng = np.random.default_rng(1)
    x, state, weight, bias, decay = (rng.standard_normal(s) for s in ((2, 3, 4), (2, 3, 4), (3, 5), (3, 5), 3))
    return [*(a.astype(dtype) for a in (x, state, weight, bias, decay)), ("row", "col", "row"), index]


# What is remembered, and under which key.


def test_hit_decides_nothing(arrays: Any, decisions: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call of a kind looks nothing up and checks nothing."""
    expected, _ = srm_core.scan(*arrays)

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("decided again")

    for name in ("decide", "Call", "registry", "resolve", "trace"):
        monkeypatch.setattr(dispatch, name, fail)
    y, _ = srm_core.scan(*(a.copy() for a in arrays))
    np.testing.assert_array_equal(y, expected)
    assert len(decisions) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda g, x: ((g[:1], x[:1]), {}),
        lambda g, x: ((g.astype(np.float64), x.astype(np.float64)), {}),
        lambda g, x: ((g, x, np.ones((2, 4), np.float32)), {}),
        lambda g, x: ((g,), {}),
        lambda g, x: ((g, x), {"reverse": True}),
        lambda g, x: ((g, x), {"lengths": np.array([1, 2])}),
        lambda g, x: ((g, x), {"backend": "numpy"}),
    ],
    ids=["shape", "dtype", "state", "no tokens", "reverse", "lengths", "backend"],
)
def test_key_holds(arrays: Any, decisions: list[Any], change: Any) -> None:
    """Whatever a check or predicate may look at makes another kind of call."""
    srm_core.scan(*arrays)
    args, options = change(*arrays)
    for _ in range(2):
        srm_core.scan(*args, **options)
    assert len(decisions) == 2


@pytest.mark.parametrize("policy", [srm_core.deterministic, lambda: srm_core.precision("tf32")])
def test_key_holds_policies(arrays: Any, decisions: list[Any], policy: Any) -> None:
    """So do the policies; leaving the block finds the first answer again."""
    for _ in range(2):
        srm_core.scan(*arrays)
        with policy():
            srm_core.scan(*arrays)
    assert len(decisions) == 2


def test_index_by_type(decisions: list[Any]) -> None:
    """An index that grows at every step is one kind of call, and each value is checked and used."""
    args = step_arguments()
    ys = [srm_core.recurrent_step(*args[:-1], i)[0] for i in range(5)]
    assert len(decisions) == 1
    for i, y in enumerate(ys):
        np.testing.assert_array_equal(y, srm_core.recurrent_step(*args[:-1], np.array(i))[0])
    assert len({y.tobytes() for y in ys}) == 5
    with pytest.raises(srm_core.ContractError, match=r"index: found 5; required 0 <= index <= 4"):
        srm_core.recurrent_step(*args[:-1], 5)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_numpy_scalar_index(kind: Any) -> None:
    """NumPy's integers are integers, checked at each call."""
    args = step_arguments()
    expected, _ = srm_core.recurrent_step(*args[:-1], 3)
    for _ in range(2):
        np.testing.assert_array_equal(srm_core.recurrent_step(*args[:-1], kind(3))[0], expected)
        with pytest.raises(srm_core.ContractError, match="index: found 9"):
            srm_core.recurrent_step(*args[:-1], kind(9))


class Position(enum.IntEnum):
    THIRD = 3


def test_index_without_key() -> None:
    """A subclass of int is an integer too, at the first call and the second."""
    args = step_arguments()
    expected, _ = srm_core.recurrent_step(*args[:-1], 3)
    for _ in range(2):
        np.testing.assert_array_equal(srm_core.recurrent_step(*args[:-1], Position.THIRD)[0], expected)


@pytest.mark.parametrize("index", [True, 1.0, np.float32(1), np.bool_(True), "1", None, [1, 1]])
def test_not_an_index(index: Any) -> None:
    """What only resembles an integer is refused, also after a call that was remembered."""
    args = step_arguments()
    for _ in range(2):
        with pytest.raises(srm_core.ContractError, match="recurrent_step: index: found"):
            srm_core.recurrent_step(*args[:-1], index)
        srm_core.recurrent_step(*args)


def test_equal_is_not_the_same(arrays: Any) -> None:
    """1 == True, but a refusal does not depend on what was called before."""
    for _ in range(2):
        with pytest.raises(srm_core.ContractError, match="reverse: found 1; required True or False"):
            srm_core.scan(*arrays, reverse=1)
        srm_core.scan(*arrays, reverse=True)


def test_static_option_by_value(plugin: Any, arrays: Any) -> None:
    """A predicate that looks at a static option answers for each value."""
    source = """
        def supports(view):
            return [Reason("backwards", "runs forwards only")] if view[Static("reverse")] else []
    """
    plugin.backend("Kernel('scan', 'plug:seven', features=(Static('reverse'),), supports='plug:supports')", source)
    for _ in range(2):
        assert (srm_core.scan(*arrays, backend="plug,auto")[0] == 7).all()
        assert not (srm_core.scan(*arrays, reverse=True, backend="plug,auto")[0] == 7).any()


DENSE = """
def supports(view):
    return [] if view[Contiguous("tokens")] else [Reason("strided", "takes dense arrays only")]
"""
DENSE_KERNEL = "Kernel('scan', 'plug:seven', features=(Contiguous('tokens'),), supports='plug:supports')"


def _strided(a: Any) -> Any:
    return np.ascontiguousarray(a.swapaxes(0, 2)).swapaxes(0, 2)


def _every_second(a: Any) -> Any:
    return np.repeat(a, 2, axis=2)[:, :, ::2]


def _field(a: Any) -> Any:
    records = np.zeros(a.shape, [("value", a.dtype), ("rest", "u1")])
    records["value"] = a
    return records["value"]


def _backwards(a: Any) -> Any:
    return a[:, ::-1].copy()[:, ::-1]


@pytest.mark.parametrize("dense_first", [True, False])
@pytest.mark.parametrize("other", [_strided, _every_second, _field, _backwards])
def test_strides_in_the_key(plugin: Any, arrays: Any, other: Any, dense_first: bool) -> None:
    """A layout feature makes strides part of the key: one shape, two layouts, two answers."""
    gates, tokens = arrays
    expected, _ = srm_core.scan(gates, tokens)
    plugin.backend(DENSE_KERNEL, DENSE)
    odd = other(tokens)
    np.testing.assert_array_equal(odd, tokens)
    with srm_core.use_backend("plug,auto"):
        for is_dense in (dense_first, not dense_first) * 2:
            y, _ = srm_core.scan(gates, tokens if is_dense else odd)
            np.testing.assert_array_equal(y, np.full_like(y, 7) if is_dense else expected)


def test_strides_of_records(plugin: Any) -> None:
    """Items that lie five bytes apart are not dense, though four bytes fit into five once."""
    tokens = np.ones((1, 1, 3), np.float32)
    plugin.backend(DENSE_KERNEL, DENSE)
    with srm_core.use_backend("plug,auto"):
        assert (srm_core.scan(tokens, tokens)[0] == 7).all()
        assert (srm_core.scan(tokens, _field(tokens))[0] == 1).all()


@pytest.mark.parametrize("index", [3, np.int64(3), np.array(3), np.array([3, 3])])
def test_strides_of_what_has_none(plugin: Any, index: Any) -> None:
    """With strides in the key an index may still be anything that it may be without."""
    expected, _ = srm_core.recurrent_step(*step_arguments(index=index))
    source = "from srm_backends.numpy.recurrent_step import forward\n"
    plugin.backend("Kernel('recurrent_step', 'plug:forward', features=(Contiguous('x'),))", source)
    for _ in range(2):
        y, _ = srm_core.recurrent_step(*step_arguments(index=index), backend="plug")
        np.testing.assert_array_equal(y, expected)


def test_memo_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ever new shapes do not fill the memory, and every answer stays right."""
    monkeypatch.setattr(dispatch, "MEMO_LIMIT", 8)
    path = dispatch.operator("scan")
    for steps in range(1, 40):
        y, _ = srm_core.scan(np.ones((1, steps, 1)), np.ones((1, steps, 1)))
        assert y[0, -1, 0] == steps
        assert len(path.memo) <= 8


def test_memo_keeps_no_arrays(arrays: Any) -> None:
    """A remembered call does not keep its arrays alive."""
    tokens = arrays[1].copy()
    before = sys.getrefcount(tokens)
    srm_core.scan(arrays[0], tokens)
    srm_core.bind("scan", arrays[0], tokens)
    assert sys.getrefcount(tokens) == before


NAMES = """
@hookimpl
def srm_ops():
    def reference(compute, query, key, plan, *, memo, backwards=None):
        return ((query + key + plan) * memo,)
    return [OpSpec(
        "awkward", 1, "", (
            TensorSpec("query", ("N",)), TensorSpec("key", ("N",)), TensorSpec("plan", ("N",)),
            OptionSpec("memo", keyword=True, dynamic=True), OptionSpec("backwards", default=None, keyword=True),
        ), (OutputSpec("out", "N"),), reference,
    )]
"""


@pytest.mark.parametrize("memo", [2, 2.0, np.float64(2)])
def test_names_of_parameters(plugin: Any, decisions: list[Any], memo: Any) -> None:
    """An operator may call its parameters what the call path might call its own, and change a float at each call."""
    plugin("names", NAMES)
    one = np.ones(3)
    for factor in range(1, 4):
        out = srm_core.call("awkward", one, 10 * one, 100 * one, memo=type(memo)(factor))
        np.testing.assert_array_equal(out, 111 * factor * one)
    assert len(decisions) == 1
    np.testing.assert_array_equal(srm_core.bind("awkward", one, one, one, memo=memo)(one, one, one, memo=3), 9 * one)


# Reasons and errors.


@pytest.mark.parametrize("read", ["view.dims", "view.values", "view[Multiple('D', 16)]", "view[Contiguous('gates')]"])
def test_undeclared_feature(plugin: Any, arrays: Any, read: str) -> None:
    """A predicate that looks at what is not in the key is a bug of its backend, and is told so."""
    plugin.backend(
        "Kernel('scan', 'plug:seven', features=(Multiple('D', 8),), supports='plug:supports')",
        f"def supports(view):\n    return [] if {read} else []\n",
    )
    with pytest.raises(srm_core.UndeclaredFeature, match="scan: the predicate reads"):
        srm_core.scan(*arrays, backend="plug,auto")


def test_declared_features(plugin: Any, arrays: Any) -> None:
    """What is declared can be read, and so can dtype, platform and library."""
    source = """
        FEATURES = (Multiple("D", 4), Bucket("T"), Given("initial_state"), Static("reverse"))
        read = []
        def supports(view):
            read.append([view.dtype, view.platform, view.array_library, *(view[f] for f in FEATURES)])
            return []
    """
    module = plugin.backend("Kernel('scan', 'plug:seven', features=FEATURES, supports='plug:supports')", source)
    srm_core.scan(*arrays, backend="plug")
    assert module.read == [["float32", "cpu", "numpy", True, 4, False, False]]


def test_all_reasons_at_once(plugin: Any, arrays: Any) -> None:
    """Every reason of every candidate, in the message and in the decision."""
    plugin.backend(
        "Kernel('scan', 'plug:seven', platforms=('cuda',), dtypes=('float64',), deterministic=False)",
        requires=("srm-no-such-thing",),
    )
    plugin.backend("Kernel('scan', 'other:seven', arrays=('cupy',))", name="other")
    with srm_core.deterministic(), pytest.raises(srm_core.NoBackendError) as caught:
        srm_core.scan(*arrays, backend="plug,other")
    plug, other = caught.value.decision.candidates
    assert {r.code for r in plug.reasons} == {"platform", "dtype", "nondeterministic", "not-installed"}
    assert {r.code for r in other.reasons} == {"library"}
    message = str(caught.value)
    for reason in (*plug.reasons, *other.reasons):
        assert reason.message in message
    assert "scan(gates=float32[2,3,4], tokens=float32[2,3,4], reverse=False) on numpy/cpu" in message
    assert "'plug,other' (backend=)" in message
    assert caught.value.decision.chosen is None


def test_kernel_error(plugin: Any, arrays: Any) -> None:
    """An exception in a kernel is no reason to run another one."""
    plugin.backend("Kernel('scan', 'plug:fail')", "def fail(*args, **options): raise ZeroDivisionError('oh')")
    for _ in range(2):
        with pytest.raises(
            srm_core.KernelError, match=r"scan: the forward kernel of backend 'plug' raised ZeroDivisionError: oh; call"
        ) as caught:
            srm_core.scan(*arrays, backend="plug,auto")
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        srm_core.bind("scan", *arrays, backend="plug")(*arrays)


def test_interrupt_in_a_kernel(plugin: Any, arrays: Any) -> None:
    """Ctrl-C is not an error of the kernel."""
    plugin.backend("Kernel('scan', 'plug:fail')", "def fail(*args, **options): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        srm_core.scan(*arrays, backend="plug")


@pytest.mark.parametrize("call", [srm_core.scan, lambda *a, **k: srm_core.vjp("scan", *a, **k)])
def test_errors_that_pass(plugin: Any, arrays: Any, call: Any) -> None:
    """A kernel's ContractError is the caller's, and has no cause but its own."""
    source = """
        def refuse(*args, **options):
            raise srm_core.ContractError("scan", "lengths", "2", "1")
    """
    plugin.backend("Kernel('scan', 'plug:refuse', 'plug:refuse')", source)
    with pytest.raises(srm_core.ContractError, match="lengths: found 2; required 1") as caught:
        call(*arrays, backend="plug")
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("args", "options", "param"),
    [
        ((None,), {}, "gates"),
        (([[1.0]],), {}, "gates"),
        ((1.0,), {}, "gates"),
        ((np.ones((2, 3, 4)), np.ones((2, 3, 5))), {}, "gates"),
        ((np.ones((2, 3, 4)), np.ones((2, 3, 4), np.float32)), {}, "gates"),
        ((np.ones((2, 3, 4), int), np.ones((2, 3, 4), int)), {}, "gates"),
        ((np.ones((2, 3, 4)), np.ones((2, 3, 4))), {"reverse": "yes"}, "reverse"),
        ((np.ones((2, 3, 4)), np.ones((2, 3, 4))), {"reverse": [True]}, "reverse"),
        ((np.ones((2, 3, 4)), np.ones((2, 3, 4))), {"lengths": np.array([1, 4])}, "lengths"),
        ((np.ones((2, 3, 4)), np.ones((2, 3, 4))), {"lengths": [1, 2]}, "lengths"),
        ((np.ma.ones((2, 3, 4)),), {}, "gates"),
        ((np.ones((2, 3, 4), ">f8"),), {}, "gates"),
    ],
)
def test_contract_error(args: Any, options: Any, param: str) -> None:
    """A wrong argument is a ContractError that names it, whatever it is and however it is called."""
    for call in (srm_core.scan, lambda *a, **k: srm_core.explain("scan", *a, **k)):
        for _ in range(2):
            with pytest.raises(srm_core.ContractError) as caught:
                call(*args, **options)
            error = caught.value
            assert (error.op, error.param) == ("scan", param)
            assert str(error).startswith(f"scan: {param}: found {error.found}; required {error.required}")
    assert issubclass(srm_core.ContractError, ValueError)


@pytest.mark.parametrize(
    ("args", "options"),
    [((), {}), ((1, 2, 3, 4), {}), ((1,), {"revers": True}), ((1,), {"gates": 1})],
)
def test_type_error(args: Any, options: Any) -> None:
    """A call that does not fit the signature is a TypeError that names the operator, as for any function."""
    with pytest.raises(TypeError, match="scan"):
        srm_core.scan(*args, **options)
    with pytest.raises(TypeError, match=r"scan\(gates, tokens=None, initial_state=None, \*, reverse=False"):
        srm_core.call("scan", *args, **options)


# explain, trace, log.


def test_explain(plugin: Any, arrays: Any) -> None:
    """The table has the call, the choice and its grounds, and every candidate's answer."""
    plugin.backend("Kernel('scan', 'plug:seven', dtypes=('float16',))")
    decision = srm_core.explain(srm_core.scan, *arrays, backend="plug,auto")
    assert decision.chosen == "numpy"
    rows = dict(decision.rows())
    assert rows.pop("triton").startswith("runs on cuda; the arrays are on cpu (move the arrays there); needs ")
    assert rows == {
        "plug": "takes float16, not float32 (cast the arrays)", "numpy": "runs it", "reference": "could run it",
        "torch": "could run it",
        "mps": "runs on mps; the arrays are on cpu (move the arrays there); needs macOS and an Apple GPU",
    }  # fmt: skip
    first, second, *table = str(decision).splitlines()
    assert first == "scan(gates=float32[2,3,4], tokens=float32[2,3,4], reverse=False) on numpy/cpu"
    assert second == "chosen: numpy (auto: takes numpy arrays natively, rank 0)"
    assert [row.split()[0] for row in table if row] == ["plug", "numpy", "reference", "triton", "torch", "mps"]


def test_explain_runs_nothing(plugin: Any, arrays: Any, decisions: list[Any]) -> None:
    """It tells what a call would do, and leaves no trace of its own."""
    plugin.backend("Kernel('scan', 'plug:fail')", "def fail(*args, **options): raise AssertionError")
    assert srm_core.explain("scan", *arrays, backend="plug").chosen == "plug"
    assert decisions == []


def test_explain_without_a_backend(plugin: Any, arrays: Any) -> None:
    """That nobody can is an answer; the call itself raises, with the same decision."""
    plugin.backend("Kernel('scan', 'plug:seven', dtypes=('float16',))")
    with srm_core.use_backend("plug"):
        decision = srm_core.explain("scan", *arrays)
        assert decision.chosen is None
        assert "chosen: none (use_backend selects plug)" in str(decision)
        with pytest.raises(srm_core.NoBackendError) as caught:
            srm_core.scan(*arrays)
    assert caught.value.decision == decision
    gradients = srm_core.explain("recurrent_step_", *step_arguments(), gradients=True)
    assert gradients.chosen is None
    assert all("no-backward" in [r.code for r in c.reasons] for c in gradients.candidates)


def test_explain_agrees(arrays: Any) -> None:
    """The one that runs is the one that explain names, with the same grounds."""
    with srm_core.use_backend("reference,numpy"):
        decision = srm_core.explain("scan", *arrays)
    assert (decision.chosen, decision.why) == ("reference", "named by use_backend")


def test_trace(environ: Any, arrays: Any, tmp_path: Path) -> None:
    """One JSON line for each decision, also for one that found nobody; none for a hit."""
    path = tmp_path / "trace.jsonl"
    environ(SRM_TRACE=str(path))
    for _ in range(3):
        srm_core.scan(*arrays)
    srm_core.vjp("scan", *arrays, backend="reference")
    with pytest.raises(srm_core.NoBackendError):
        srm_core.vjp("recurrent_step_", *step_arguments(), backend="numpy")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [(r["op"], r["chosen"], r["source"]) for r in rows] == [
        ("scan", "numpy", "default"), ("scan", "reference", "backend="), ("recurrent_step_", None, "backend="),
    ]  # fmt: skip
    assert rows[0]["candidates"] == [
        {"backend": "numpy", "reasons": []},
        *({"backend": b, "reasons": None} for b in ("reference", "triton", "torch", "mps")),
    ]  # fmt: skip
    assert rows[2]["candidates"] == [{"backend": "numpy", "reasons": ["no-backward"]}]
    assert rows[0]["call"] == srm_core.explain("scan", *arrays).call
    environ(SRM_TRACE="")
    srm_core.scan(*arrays)
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_trace_of_a_failure(environ: Any, plugin: Any, arrays: Any, tmp_path: Path) -> None:
    """The decision that most needs to be looked up is there."""
    path = tmp_path / "trace.jsonl"
    plugin.backend("Kernel('scan', 'plug:seven', dtypes=('float16',))")
    environ(SRM_TRACE=str(path), SRM_BACKEND="plug")
    with pytest.raises(srm_core.NoBackendError):
        srm_core.scan(*arrays)
    (row,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert (row["chosen"], row["selection"], row["candidates"][0]["reasons"]) == (None, "plug", ["dtype"])


def test_log(arrays: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A selection is logged at DEBUG, once."""
    with caplog.at_level(logging.DEBUG, logger="srm_core.dispatch"):
        for _ in range(3):
            srm_core.scan(*arrays)
    (record,) = (r for r in caplog.records if " -> " in r.getMessage())
    assert record.levelno == logging.DEBUG
    assert "-> numpy (auto" in record.getMessage()
    assert "srm_backends.numpy.scan:forward" in record.getMessage()


# Policies.

POLICY = """
contexts = []
def watch(ctx, *args, **options):
    contexts.append((ctx.precision, ctx.deterministic, ctx.wants_residuals, ctx.array_library, ctx.stream))
    return seven(ctx, *args, **options)
def backward(ctx, residuals, *grads):
    contexts.append((ctx.precision, ctx.deterministic))
    return residuals.args
"""


def test_policies_reach_the_kernel(plugin: Any, arrays: Any) -> None:
    """ctx says what is in force at the call; the pullback has what was in force at its forward."""
    module = plugin.backend("Kernel('scan', 'plug:watch', 'plug:backward')", POLICY)
    with srm_core.use_backend("plug"):
        srm_core.scan(*arrays)
        with srm_core.precision("tf32"):
            srm_core.scan(*arrays)
            with srm_core.deterministic():
                _, pullback = srm_core.vjp("scan", *arrays)
            with srm_core.precision("ieee"):
                srm_core.scan(*arrays)
    pullback(None, None)
    assert module.contexts == [
        ("ieee", False, False, "numpy", None), ("tf32", False, False, "numpy", None),
        ("tf32", True, True, "numpy", None), ("ieee", False, False, "numpy", None), ("tf32", True),
    ]  # fmt: skip


def test_deterministic(plugin: Any, arrays: Any) -> None:
    """Inside the block a kernel that is not deterministic does not run, remembered or not."""
    plugin.backend("Kernel('scan', 'plug:seven', deterministic=False)")
    with srm_core.use_backend("plug,auto"):
        for _ in range(2):
            assert (srm_core.scan(*arrays)[0] == 7).all()
            with srm_core.deterministic():
                assert not (srm_core.scan(*arrays)[0] == 7).any()
                with srm_core.deterministic(False):
                    assert (srm_core.scan(*arrays)[0] == 7).all()


# bind.


@pytest.mark.parametrize("backend", ["numpy", "reference", None])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"lengths": np.array([1, 3])}])
def test_bind(arrays: Any, backend: str | None, options: dict[str, Any]) -> None:
    """The bound function gives what the call gives, for other values of the same kind."""
    run = srm_core.bind(srm_core.scan, *arrays, backend=backend, **options)
    other = [a[::-1].copy() for a in arrays]
    for got, expected in zip(run(*other, **options), srm_core.scan(*other, backend=backend, **options), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_bind_keeps_static_options(arrays: Any) -> None:
    """An option that is left out has the value for which the kernel was chosen."""
    run = srm_core.bind("scan", *arrays, reverse=True)
    np.testing.assert_array_equal(run(*arrays)[0], srm_core.scan(*arrays, reverse=True)[0])
    with pytest.raises(TypeError):
        run(*arrays, revers=False)


def test_bind_to_a_kernel_without_defaults(plugin: Any, arrays: Any) -> None:
    """A kernel is called with every argument, so that it needs no defaults."""
    plugin.backend(SEVEN)
    assert (srm_core.bind("scan", *arrays, backend="plug")(*arrays)[0] == 7).all()


def test_bind_checks_once(plugin: Any, arrays: Any) -> None:
    """The example is checked; what comes later is not, nor are later selections seen."""
    with pytest.raises(srm_core.ContractError):
        srm_core.bind("recurrent_step", *step_arguments(index=99))
    plugin.backend("Kernel('scan', 'plug:seven', dtypes=())")
    with pytest.raises(srm_core.NoBackendError):
        srm_core.bind("scan", *arrays, backend="plug")
    run = srm_core.bind("recurrent_step", *step_arguments())
    with pytest.raises(IndexError):
        run(*step_arguments(index=99))
    with srm_core.use_backend("plug"):
        run(*step_arguments())


def test_bind_is_cheap(plugin: Any, arrays: Any) -> None:
    """It costs less than the call path, which costs less than a decision."""
    plugin.backend("Kernel('scan', 'plug:nothing')", "def nothing(ctx, *args, **options): pass")
    run = srm_core.bind("scan", *arrays, backend="plug")

    def cost(call: Any, n: int) -> float:
        return min(timeit.repeat(call, number=n, repeat=5)) / n

    with srm_core.use_backend("plug"):
        hit = cost(lambda: srm_core.scan(*arrays), 2000)
    miss = cost(lambda: srm_core.explain("scan", *arrays, backend="plug"), 100)
    assert cost(lambda: run(*arrays), 2000) < hit < miss


# Gradients without torch.


def test_vjp(arrays: Any) -> None:
    """The pullback's gradients are those of differences, in the order of the signature."""
    gates, tokens = (a.astype(np.float64) for a in arrays)
    (y, final), pullback = srm_core.vjp("scan", gates, tokens)
    rng = np.random.default_rng(2)
    dy, d_final = rng.standard_normal(y.shape), rng.standard_normal(final.shape)
    d_gates, d_tokens, d_state = pullback(dy, d_final)
    assert d_state is None
    along = rng.standard_normal(gates.shape), rng.standard_normal(tokens.shape)

    def at(step: float) -> float:
        y, final = srm_core.scan(gates + step * along[0], tokens + step * along[1])
        return float((y * dy).sum() + (final * d_final).sum())

    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    assert slope == pytest.approx((d_gates * along[0]).sum() + (d_tokens * along[1]).sum(), rel=1e-6)


@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_missing_gradients_are_zero(arrays: Any, backend: str) -> None:
    """None stands for zeros."""
    (y, final), pullback = srm_core.vjp("scan", *arrays, backend=backend)
    one = np.ones_like(y)
    for given, filled in (((one, None), (one, np.zeros_like(final))), ((None, None), (0 * one, 0 * final))):
        for got, expected in zip(pullback(*given), pullback(*filled), strict=True):
            np.testing.assert_array_equal(got, expected)
    assert not any(np.any(g) for g in pullback(None, None) if g is not None)


@pytest.mark.parametrize(
    ("grads", "param"),
    [
        (lambda y, s: (y[:1], s), "gradient of y"),
        (lambda y, s: (y, s.T), "gradient of final_state"),
        (lambda y, s: (y.astype(np.float64), s), "gradient of y"),
        (lambda y, s: (y.tolist(), s), "gradient of y"),
        (lambda y, s: (1.0, s), "gradient of y"),
        (lambda y, s: (y,), "pullback"),
        (lambda y, s: (y, s, s), "pullback"),
    ],
)
def test_wrong_gradients(arrays: Any, grads: Any, param: str) -> None:
    """A gradient is an array of its output's shape and dtype."""
    outputs, pullback = srm_core.vjp("scan", *arrays)
    with pytest.raises(srm_core.ContractError) as caught:
        pullback(*grads(*outputs))
    assert caught.value.param == param


def test_no_backward(plugin: Any, arrays: Any) -> None:
    """Without a backward there is no candidate; one that has a backward is asked next."""
    with pytest.raises(srm_core.NoBackendError, match=r"numpy: has no backward \| reference: has no backward"):
        srm_core.vjp("recurrent_step_", *step_arguments())
    plugin.backend(SEVEN)
    with pytest.raises(srm_core.NoBackendError, match="plug: has no backward"):
        srm_core.vjp("scan", *arrays, backend="plug")
    (y, _), _ = srm_core.vjp("scan", *arrays, backend="plug,auto")
    assert not (y == 7).any()


def test_backward_that_raises(plugin: Any, arrays: Any) -> None:
    """The message says which direction failed."""
    plugin.backend("Kernel('scan', 'plug:seven', 'plug:fail')", "def fail(*args): raise OSError('gone')")
    _, pullback = srm_core.vjp("scan", *arrays, backend="plug")
    with pytest.raises(srm_core.KernelError, match="the backward kernel of backend 'plug' raised OSError: gone"):
        pullback(None, None)


# What comes back.

SMALL = [
    pytest.param(spec, case, id=f"{spec.name}-{case.name}")
    for spec in SPECS.values()
    for case in spec.cases
    if "ci" in case.tags and np.prod(list(case.dims.values())) <= 2000
]


@pytest.mark.parametrize("backend", ["numpy", "reference"])
@pytest.mark.parametrize(("spec", "case"), SMALL)
def test_purity(spec: Any, case: Any, backend: str) -> None:
    """No input changes but what the spec mutates; no output shares memory with an input or another output."""
    args, options = spec.sample(case, "float32")
    args, options = spec.bind(args, options)
    values = {**dict(zip((p.name for p in spec.parameters), args, strict=False)), **options}
    inputs = {k: v for n, value in values.items() for k, v in arrays_of(n, value) if isinstance(v, np.ndarray)}
    before = {k: v.copy() for k, v in inputs.items()}
    outputs = spec.unpack(srm_core.call(spec.name, *args, backend=backend, **options))
    for name, value in inputs.items():
        if name.partition("[")[0] not in spec.mutates:
            np.testing.assert_array_equal(value, before[name], err_msg=name)
    for i, output in enumerate(outputs):
        assert type(output) is np.ndarray
        for name, value in inputs.items():
            assert not np.shares_memory(output, value), (i, name)
        assert not any(np.shares_memory(output, other) for other in outputs[:i])


@pytest.mark.parametrize("backend", ["numpy", "reference"])
@pytest.mark.parametrize("reverse", [False, True])
def test_no_time(backend: str, reverse: bool) -> None:
    """At T = 0 the final state is a copy of the first, one that may be written to."""
    empty, state = np.ones((2, 0, 4), np.float32), np.full((2, 4), 3, np.float32)
    y, final = srm_core.scan(empty, empty, state, reverse=reverse, backend=backend)
    assert y.shape == (2, 0, 4)
    assert not np.shares_memory(final, state)
    final += 1
    np.testing.assert_array_equal(state, np.full((2, 4), 3))


def test_mutates_in_place() -> None:
    """The serving form writes into the caller's state, at its slots only."""
    x, state, *rest = step_arguments()
    big = np.zeros((5, 3, 4), np.float32)
    big[[3, 1]] = state
    y = srm_core.recurrent_step_(x, big, *rest, slots=np.array([3, 1]))
    expected_y, expected_state = srm_core.recurrent_step(x, state, *rest)
    np.testing.assert_array_equal(y, expected_y)
    np.testing.assert_array_equal(big[[3, 1]], expected_state)
    assert not big[[0, 2, 4]].any()


# torch tensors on the NumPy backend, and the other way.


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


def to_torch(torch: Any, a: Any) -> Any:
    if a.dtype == BFLOAT16:
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def bits(a: Any) -> Any:
    """An array or tensor as NumPy's, bfloat16 included."""
    if isinstance(a, np.ndarray):
        return a
    return a.view(sys.modules["torch"].int16).numpy().view(BFLOAT16) if str(a.dtype) == "torch.bfloat16" else a.numpy()


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_torch_on_numpy(torch: Any, dtype: str) -> None:
    """Tensors go through as views and come back as tensors of the right dtype, with NumPy's own values."""
    args, options = SPECS["scan"].sample(SPECS["scan"].cases[0], dtype)
    expected = srm_core.scan(*args, **options)
    tensors = [None if a is None else to_torch(torch, a) for a in args]
    for got, want in zip(srm_core.scan(*tensors, backend="numpy", **options), expected, strict=True):
        assert type(got) is torch.Tensor
        assert str(got.dtype) == f"torch.{want.dtype.name}"
        np.testing.assert_array_equal(bits(got), want)


@pytest.mark.parametrize("backend", ["numpy", "reference"])
def test_torch_layouts(torch: Any, arrays: Any, backend: str) -> None:
    """Transposed, sliced and expanded tensors are seen as they are."""
    gates, tokens = (torch.from_numpy(a) for a in arrays)
    expected, _ = srm_core.scan(*arrays, backend=backend)
    wide = torch.zeros(2, 3, 8)
    wide[:, :, ::2] = tokens
    for odd in (tokens.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[:, :, ::2]):
        assert not odd.is_contiguous()
        np.testing.assert_array_equal(srm_core.scan(gates, odd, backend=backend)[0].numpy(), expected)
    stretched = torch.tensor([[[0.5]]]).expand(2, 3, 4)
    y, _ = srm_core.scan(stretched, tokens, backend=backend)
    np.testing.assert_array_equal(y, srm_core.scan(stretched.contiguous(), tokens, backend=backend)[0])


def test_numpy_negative_strides(arrays: Any) -> None:
    """A flipped array is seen as it is."""
    gates, tokens = arrays
    y, _ = srm_core.scan(gates[:, ::-1], tokens[:, ::-1])
    np.testing.assert_array_equal(y[:, ::-1], srm_core.scan(gates, tokens, reverse=True)[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slots", [None, [3, 1]])
def test_torch_state_in_place(torch: Any, dtype: str, slots: Any) -> None:
    """The state that is updated is the caller's tensor, non-contiguous or not."""
    x, state, *rest = (to_torch(torch, a) if isinstance(a, np.ndarray) else a for a in step_arguments(dtype))
    expected_y, expected_state = srm_core.recurrent_step(x, state, *rest, backend="numpy")
    storage = torch.zeros(4, 5, 3, dtype=state.dtype).permute(1, 2, 0)  # (N, H, D), D outermost in memory
    rows = storage[:2] if slots is None else storage
    where = slice(None) if slots is None else slots
    rows[where] = state
    y = srm_core.recurrent_step_(x, rows, *rest, slots=None if slots is None else torch.tensor(slots), backend="numpy")
    assert torch.equal(y, expected_y)
    assert torch.equal(rows[where], expected_state)


def test_outputs_are_the_callers(torch: Any, arrays: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a NumPy kernel gets from ctx.empty is a tensor of the caller's allocator, which comes back itself."""
    made = []
    empty = torch.empty

    def watch(*args: Any, **options: Any) -> Any:
        made.append(empty(*args, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", watch)
    outputs = srm_core.scan(*(torch.from_numpy(a) for a in arrays), backend="numpy")
    assert len(made) == 2
    assert all(any(output is m for m in made) for output in outputs)


def test_results_that_the_kernel_made(torch: Any, plugin: Any, arrays: Any) -> None:
    """A kernel that returns arrays of its own, or views of what ctx made, is understood, too."""
    source = """
        def own(ctx, gates, tokens, initial_state, *, reverse, lengths):
            buffer = ctx.empty((2 * tokens.size,), tokens.dtype)
            buffer[...] = 7
            return buffer[::-2].reshape(tokens.shape), np.full((tokens.shape[0], tokens.shape[2]), 7, tokens.dtype)
    """
    plugin.backend("Kernel('scan', 'plug:own')", source)
    y, final = srm_core.scan(*(torch.from_numpy(a).bfloat16() for a in arrays), backend="plug")
    assert (y.dtype, y.shape, final.dtype) == (torch.bfloat16, (2, 3, 4), torch.bfloat16)
    assert (y == 7).all()
    assert (final == 7).all()


def test_requires_grad(torch: Any) -> None:
    """What is updated in place has no gradient: a tensor that wants one is refused, also when remembered."""
    x, *rest = (torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in step_arguments())
    wants = x.clone().requires_grad_()
    for _ in range(2):
        with pytest.raises(srm_core.ContractError, match=r"x: found a tensor that requires grad.*no_grad"):
            srm_core.recurrent_step_(wants, *rest, backend="numpy")
        srm_core.recurrent_step_(x, *rest, backend="numpy")
    with torch.no_grad():
        srm_core.recurrent_step_(wants, *rest, backend="numpy")
        srm_core.recurrent_step_(torch.nn.Parameter(x), *rest, backend="numpy")
    srm_core.recurrent_step_(wants.detach(), *rest, backend="numpy")


def test_other_tensors(torch: Any, arrays: Any) -> None:
    """Sparse, conjugated and meta tensors have no view; the refusal says what was found."""
    gates, tokens = (torch.from_numpy(a) for a in arrays)
    srm_core.scan(gates, tokens)
    with pytest.raises(srm_core.ContractError, match="sparse"):
        srm_core.scan(gates, tokens.to_sparse())
    with pytest.raises(srm_core.ContractError, match="negated"):
        srm_core.scan(gates, torch._neg_view(tokens))
    with pytest.raises(srm_core.ContractError, match="found an array on meta beside gates on cpu"):
        srm_core.scan(gates, tokens.to("meta"))
    with pytest.raises(srm_core.NoBackendError, match="runs on cpu; the arrays are on meta"):
        srm_core.scan(gates.to("meta"), tokens.to("meta"))


@pytest.mark.parametrize("first", ["numpy", "torch"])
def test_mixed_libraries(torch: Any, arrays: Any, first: str) -> None:
    """One call, one library; NumPy's integers are no arrays."""
    gates, tokens = arrays
    mixed = (gates, torch.from_numpy(tokens)) if first == "numpy" else (torch.from_numpy(gates), tokens)
    with pytest.raises(srm_core.ContractError, match=r"arrays of one library"):
        srm_core.scan(*mixed)
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in step_arguments(index=np.int64(2))]
    expected, _ = srm_core.recurrent_step(*step_arguments(index=2))
    np.testing.assert_array_equal(srm_core.recurrent_step(*tensors, backend="numpy")[0], expected)
    with pytest.raises(srm_core.ContractError, match="index: found an array of numpy beside x of torch"):
        srm_core.recurrent_step(*tensors[:-1], np.array(2))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_vjp(torch: Any, dtype: str) -> None:
    """The pullback takes and gives tensors, with NumPy's values."""
    args = [a.astype(dtype) for a in step_arguments("float32")[:5]]
    rest = (("row", "col", "row"), 2)
    (y, new), pullback = srm_core.vjp("recurrent_step", *args, *rest)
    expected = pullback(np.ones_like(y), None)
    tensors = [to_torch(torch, a) for a in args]
    (y_t, new_t), pullback_t = srm_core.vjp("recurrent_step", *tensors, *rest, backend="numpy")
    np.testing.assert_array_equal(bits(y_t), y)
    np.testing.assert_array_equal(bits(new_t), new)
    for got, want in zip(pullback_t(torch.ones_like(y_t), None), expected, strict=True):
        assert type(got) is torch.Tensor
        np.testing.assert_array_equal(bits(got), want)
    with pytest.raises(srm_core.ContractError, match="gradient of y: found ndarray; required torch"):
        pullback_t(np.ones_like(y), None)
    with pytest.raises(srm_core.ContractError, match=r"gradient of y: found .* on meta; required .* on cpu"):
        pullback_t(torch.ones_like(y_t, device="meta"), None)
    with pytest.raises(srm_core.ContractError, match="requires grad"):
        pullback_t(torch.ones_like(y_t).requires_grad_(), None)


TORCH = """
contexts = []
def step(ctx, x, state, weight, bias, decay, mode, index, *, slots):
    contexts.append((ctx.array_library, ctx.device.type, ctx.stream))
    ctx.scratch((2, 2), "float32").fill_(0)
    state += 1
    y = ctx.empty(tuple(x.shape), x.dtype)
    return y.copy_(x)
"""


def _plain(a: Any) -> Any:
    return a.copy()


@pytest.mark.parametrize("layout", [_plain, _backwards, _strided, _field])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numpy_on_torch(torch: Any, plugin: Any, dtype: str, layout: Any) -> None:
    """A torch kernel sees NumPy's arrays; what it changes is changed there, also where torch needed a copy."""
    module = plugin.backend("Kernel('recurrent_step_', 'plug:step', arrays=('torch',))", TORCH)
    x, state, *rest = step_arguments(dtype)
    state = layout(state)
    before = state.copy()
    y = srm_core.recurrent_step_(layout(x), state, *rest, backend="plug")
    assert (type(y), y.dtype) == (np.ndarray, x.dtype)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(state, before + np.ones((), dtype))
    assert module.contexts == [("torch", "cpu", None)]


def test_read_only_state(torch: Any, plugin: Any) -> None:
    """A state that cannot be written to is an error on every backend, not an update that is lost."""
    plugin.backend("Kernel('recurrent_step_', 'plug:step', arrays=('torch',))", TORCH)
    x, state, *rest = step_arguments()
    state.setflags(write=False)
    for backend in ("plug", "numpy", "reference"):
        with pytest.raises(srm_core.SRMError, match="read-only"):
            srm_core.recurrent_step_(x, state, *rest, backend=backend)


def test_auto_prefers_the_library(torch: Any, plugin: Any, arrays: Any) -> None:
    """Named together, order decides; NumPy arrays do not go to torch by themselves."""
    plugin.backend("Kernel('scan', 'plug:seven', arrays=('torch',))")
    tensors = [torch.from_numpy(a) for a in arrays]
    assert srm_core.explain("scan", *tensors).chosen == "torch"
    assert (srm_core.scan(*tensors, backend="plug")[0] == 7).all()
    assert srm_core.explain("scan", *arrays, backend="numpy,plug").chosen == "numpy"
