"""Plugins: what a broken one may not break, what a new one adds, and what none may change unasked."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import numpy as np
import pytest
from built_in import BUILT_IN

import srm_core
from srm_core.registry import registry

pytestmark = pytest.mark.usefixtures("environ")

SEVEN = "Kernel('scan', 'plug:seven')"


def info(fields: str) -> str:
    return f"@hookimpl\ndef srm_backend_info():\n    return BackendInfo({fields})\n"


def ops(value: str) -> str:
    return f"from srm_core.ops import SPECS\n@hookimpl\ndef srm_ops():\n    return {value}\n"


BROKEN = {
    "raises": ("raise RuntimeError('boom')", "RuntimeError: boom"),
    "exits": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "panics": ("class Panic(BaseException): pass\nraise Panic('rust')", "Panic: rust"),
    "no python": ("def (", "SyntaxError"),
    "lacks an import": ("import no_such_module_here", "No module named 'no_such_module_here'"),
    "misspelt hook": ("@hookimpl\ndef srm_backend_inof(): return []", "srm_backend_inof, which is no hook"),
    "hook arguments": ("@hookimpl\ndef srm_probe(device): return []", "srm_probe"),
    "info raises": ("@hookimpl\ndef srm_backend_info(): raise OSError('driver')", "OSError: driver"),
    "info is a dict": ("@hookimpl\ndef srm_backend_info(): return {'name': 'plug'}", "returned dict, not BackendInfo"),
    "info is None": ("@hookimpl\ndef srm_backend_info(): pass", "returned None, not BackendInfo"),
    "list of others": ("@hookimpl\ndef srm_backend_info(): return ['plug']", "returned str, not BackendInfo"),
    "other version": (info(f"'plug', 't', ({SEVEN},), api_version=99"), "API version 99; this srm-core has version 1"),
    "name auto": (info(f"'auto', 't', ({SEVEN},)"), "cannot be called 'auto'"),
    "name with comma": (info(f"'a,b', 't', ({SEVEN},)"), "cannot be called 'a,b'"),
    "kernel, no comma": (info(f"'plug', 't', ({SEVEN})"), "plug: kernels: found Kernel"),
    "kernel of strings": (info("'plug', 't', ('plug:seven',)"), "required a tuple of Kernel"),
    "arrays a string": (info("'plug', 't', (Kernel('scan', 'plug:seven', arrays='numpy'),)"), "plug: scan: arrays"),
    "requires a string": (info(f"'plug', 't', ({SEVEN},), requires='numpy'"), "plug: requires: found 'numpy'"),
    "requires nonsense": (info(f"'plug', 't', ({SEVEN},), requires=('numpy >> 2',)"), "InvalidRequirement"),
    "two for one": (info(f"'plug', 't', ({SEVEN}, {SEVEN})"), "two kernels for scan"),
    "ops of another type": (ops("[BackendInfo('plug', 't', ())]"), "srm_ops returned BackendInfo, not OpSpec"),
    "op not in a list": (ops("SPECS['scan']"), "TypeError"),
    "op of srm-core": (ops("[SPECS['scan']]"), "the operator scan is srm-core's own"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken(plugin: Any, arrays: Any, kind: str) -> None:
    """A broken plugin is listed with its error and traceback; everything else is as before."""
    source, error = BROKEN[kind]
    expected, _ = srm_core.scan(*arrays)
    plugin("plug", source)
    listing = srm_core.list_backends()
    (lost,) = listing.quarantined
    assert (lost["name"], lost["distribution"]) == ("plug", "srm-plug")
    assert error in lost["error"]
    assert "Traceback (most recent call last)" in lost["traceback"]
    assert lost["error"].split(":")[0] in lost["traceback"]
    assert [b["name"] for b in listing.backends] == BUILT_IN
    np.testing.assert_array_equal(srm_core.scan(*arrays)[0], expected)
    with pytest.raises(srm_core.UnknownNameError, match="its plugin is quarantined"):
        srm_core.use_backend("plug")


@pytest.mark.parametrize(("target", "error"), [("plug:nothing", "AttributeError"), ("gone", "ModuleNotFoundError")])
def test_broken_entry_point(plugin: Any, target: str, error: str) -> None:
    """So is an entry point that leads nowhere."""
    plugin("plug", "", target=target)
    (lost,) = srm_core.list_backends().quarantined
    assert lost["error"].startswith(error)


def test_interrupt_is_the_users(plugin: Any, arrays: Any) -> None:
    """Ctrl-C while plugins load is not a plugin's fault; the registry stays as it was."""
    before = registry()
    with pytest.raises(KeyboardInterrupt):
        plugin("plug", "raise KeyboardInterrupt")
    assert registry() is before


def test_one_broken_of_three(plugin: Any, arrays: Any) -> None:
    """The plugins after a broken one are loaded, too."""
    plugin.write("aaa", "raise RuntimeError('boom')")
    plugin.write("ccc", "raise RuntimeError('bang')")
    plugin.backend("Kernel('scan', 'bbb:seven')", name="bbb")
    assert {q["name"]: q["error"] for q in srm_core.list_backends().quarantined} == {
        "aaa": "RuntimeError: boom", "ccc": "RuntimeError: bang",
    }  # fmt: skip
    assert (srm_core.scan(*arrays, backend="bbb")[0] == 7).all()


def test_fixed_after_reload(plugin: Any, arrays: Any) -> None:
    """A plugin that is repaired comes back at reload_config."""
    plugin("plug", "import os\nif 'PLUG_OK' not in os.environ: raise RuntimeError\n" + info(f"'plug', 't', ({SEVEN},)"))
    assert srm_core.list_backends().quarantined
    plugin.environ(PLUG_OK="1")
    assert not srm_core.list_backends().quarantined
    assert (srm_core.scan(*arrays, backend="plug")[0] == 7).all()


def test_two_claim_one_name(plugin: Any, arrays: Any) -> None:
    """The first keeps the name; the second is quarantined and told who has it."""
    plugin.write("first", info("'shared', 't', (Kernel('scan', 'first:seven'),)"))
    plugin("second", "eight = constant(8)\n" + info("'shared', 't', (Kernel('scan', 'second:eight'),)"))
    (lost,) = srm_core.list_backends().quarantined
    assert lost["name"] == "second"
    assert "shared is already taken by plugin 'first' (srm-first)" in lost["error"]
    assert (srm_core.scan(*arrays, backend="shared")[0] == 7).all()


@pytest.mark.parametrize("entry", ["aaa", "numpy"])
def test_built_in_names_are_safe(plugin: Any, arrays: Any, entry: str) -> None:
    """Neither a backend nor an entry point called numpy replaces the built-in one."""
    plugin("plug", info(f"'numpy', 't', ({SEVEN},)"), entry=entry)
    (lost,) = srm_core.list_backends().quarantined
    assert lost["distribution"] == "srm-plug"
    assert not (srm_core.scan(*arrays, backend="numpy")[0] == 7).any()


def test_same_entry_point_keeps_hooks(plugin: Any) -> None:
    """A second entry point of the same name does not take the first one's hooks away."""
    for name in ("red", "blue"):
        probe = f"@hookimpl\ndef srm_probe(backend): return [Reason('no-device', '{name} says no')]\n"
        plugin.write(name, probe + info(f"'{name}', 't', (Kernel('scan', '{name}:seven'),)"), entry="same")
    srm_core.reload_config()
    listing = srm_core.list_backends()
    (kept,) = (b for b in listing.backends if not b["built_in"])
    (lost,) = listing.quarantined
    assert {kept["distribution"], lost["distribution"]} == {"srm-red", "srm-blue"}
    assert kept["reasons"] == [f"{kept['name']} says no"]


def test_unknown_operator(plugin: Any, arrays: Any) -> None:
    """A kernel for an operator that nobody specifies is shown, and the others work."""
    plugin.backend(f"Kernel('scam', 'plug:seven'), {SEVEN}")
    listing = srm_core.list_backends()
    (row,) = [b for b in listing.backends if b["name"] == "plug"]
    assert row["reasons"] == ["no operator is called 'scam'"]
    assert listing.cell("scan", "plug").provides == "forward"
    assert "scam" not in listing.ops
    assert (srm_core.scan(*arrays, backend="plug")[0] == 7).all()


def test_blocked(plugin: Any, arrays: Any) -> None:
    """A blocked plugin is not imported, and the listing says that it is there."""
    plugin.environ.set(SRM_BLOCK="plug")
    assert plugin("plug", "raise SystemExit") is None
    listing = srm_core.list_backends()
    assert (listing.blocked, listing.quarantined) == (("plug",), ())
    with pytest.raises(srm_core.UnknownNameError, match="blocked by SRM_BLOCK"):
        srm_core.scan(*arrays, backend="plug")


def test_blocking_a_built_in(plugin: Any, arrays: Any) -> None:
    """Without `numpy` the reference answers."""
    plugin.environ(SRM_BLOCK="numpy")
    assert srm_core.explain("scan", *arrays).chosen == "reference"


# What a probe says.

PROBE = f"""
asked = []
@hookimpl
def srm_probe(backend):
    asked.append(backend)
    {{}}
@hookimpl
def srm_backend_info():
    return BackendInfo("plug", "test", ({SEVEN},))
"""


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("return [Reason('no-device', 'has no device', hint='plug it in')]", "no-device", "has no device (plug it in)"),
        ("raise OSError('driver too old')", "probe-failed", "OSError: driver too old"),
        ("raise SystemExit(2)", "probe-failed", "SystemExit: 2"),
        ("return 'no device'", "probe-failed", "required a list of srm_core.spec.Reason"),
        ("return ['no device']", "probe-failed", "required a list of srm_core.spec.Reason"),
        ("return Reason('no-device', 'has no device')", "probe-failed", "TypeError"),
    ],
)
def test_probe_says_no(plugin: Any, arrays: Any, body: str, code: str, text: str) -> None:
    """A backend that cannot run here says why, in listings and errors, and is asked once."""
    module = plugin("plug", PROBE.format(body))
    listing = srm_core.list_backends()
    cell = listing.cell("scan", "plug")
    assert cell.provides == "no"
    assert text in cell.reasons[0]
    with pytest.raises(srm_core.NoBackendError) as caught:
        srm_core.scan(*arrays, backend="plug")
    assert text in str(caught.value)
    (candidate,) = caught.value.decision.candidates
    assert [r.code for r in candidate.reasons] == [code]
    assert not (srm_core.scan(*arrays, backend="plug,auto")[0] == 7).any()
    assert module.asked == ["plug"]


def test_probe_says_yes(plugin: Any, arrays: Any) -> None:
    """An empty list is a yes; each plugin's probe is asked of its own backends only."""
    other = plugin("other", PROBE.format("return []").replace("plug", "other"))
    module = plugin("plug", PROBE.format("return []"))
    for steps in (1, 2, 3):
        assert (srm_core.scan(*(a[:, :steps] for a in arrays), backend="plug")[0] == 7).all()
    assert (module.asked, other.asked) == (["plug"], [])


def test_probe_is_asked_late(plugin: Any, arrays: Any) -> None:
    """A backend that is no candidate is not probed."""
    module = plugin("plug", PROBE.format("return []"))
    srm_core.scan(*arrays)
    assert module.asked == []


@pytest.mark.parametrize(
    ("requires", "hint"),
    [
        (("srm-no-such-thing>=2",), "pip install 'srm-no-such-thing>=2'"),
        (("numpy>=999",), "pip install 'numpy>=999'"),
        (("srm-no-a | srm-no-b",), "pip install 'srm-no-a' or pip install 'srm-no-b'"),
    ],
)
def test_requirement_missing(plugin: Any, arrays: Any, requires: tuple[str, ...], hint: str) -> None:
    """A distribution that is missing, or too old, comes with the command that helps; the probe is not asked."""
    plugin.backend(SEVEN, "@hookimpl\ndef srm_probe(backend): raise AssertionError", requires=requires)
    cell = srm_core.list_backends().cell("scan", "plug")
    assert (cell.provides, cell.reasons) == ("no", (f"{requires[0]} is not installed ({hint})",))
    with pytest.raises(srm_core.NoBackendError, match="is not installed"):
        srm_core.scan(*arrays, backend="plug")


@pytest.mark.parametrize("requires", [("numpy>=2",), ("srm-no-such-thing | numpy",), ("numpy", "pluggy>=1")])
def test_requirement_met(plugin: Any, arrays: Any, requires: tuple[str, ...]) -> None:
    """Any of the alternatives will do."""
    plugin.backend(SEVEN, requires=requires)
    assert (srm_core.scan(*arrays, backend="plug")[0] == 7).all()


@pytest.mark.parametrize(
    ("target", "cause"),
    [
        ("srm_no_such_module:scan", ModuleNotFoundError),
        ("plug:nothing", AttributeError),
        ("plug", AttributeError),
        ("dies:scan", SystemExit),
    ],
)
def test_target_that_cannot_be_loaded(plugin: Any, arrays: Any, target: str, cause: type) -> None:
    """It is an error when it is selected, not before, and takes nothing else with it."""
    plugin.write("dies", "raise SystemExit(1)", target="plug")
    plugin.environ.set(SRM_BLOCK="dies")
    plugin.backend(f"Kernel('scan', {target!r}), Kernel('recurrent_mix', 'plug:seven')")
    assert srm_core.list_backends().cell("scan", "plug").provides == "forward"
    for _ in range(2):
        with pytest.raises(srm_core.PluginError, match=f"the target '{target}' cannot be loaded") as caught:
            srm_core.scan(*arrays, backend="plug")
        assert isinstance(caught.value.__cause__, cause)
    assert srm_core.explain("scan", *arrays).chosen == "numpy"
    srm_core.scan(*arrays)


# What a plugin adds.

DOUBLE = """
def reference(compute, x, *, times=2):
    return (times * x.astype(compute),)

def vjp(compute, grads, x, *, times=2):
    return (times * grads[0].astype(compute),)

@hookimpl
def srm_ops():
    return [OpSpec(
        "double", 1, "y = times * x",
        (TensorSpec("x", ("B D",)), OptionSpec("times", default=2, keyword=True)),
        (OutputSpec("y", "B D", like=("x",)),), reference, vjp,
    )]

calls = []

def forward(ctx, x, *, times):
    calls.append("forward")
    y = ctx.empty(x.shape, x.dtype)
    np.multiply(x, times, out=y)
    return y

def backward(ctx, residuals, grad):
    calls.append("backward")
    return (grad * residuals.options["times"],)
"""
OWN = "Kernel('double', 'plug:forward', 'plug:backward')"


def test_operator_of_a_plugin(plugin: Any) -> None:
    """A new operator runs on `reference` by itself, and on its own kernel when that is named."""
    module = plugin.backend(OWN, DOUBLE)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    for backend, called in ((None, []), ("reference", []), ("plug", ["forward"])):
        module.calls.clear()
        y = srm_core.call("double", x, times=3, backend=backend)
        np.testing.assert_array_equal(y, 3 * x)
        assert y.dtype == np.float32
        assert module.calls == called
    assert srm_core.explain("double", x).chosen == "reference"
    listing = srm_core.list_backends()
    assert listing.cell("double", "reference").provides == "forward+backward"
    assert listing.cell("double", "plug").provides == "forward+backward"
    assert listing.cell("double", "numpy").provides == "no"


@pytest.mark.parametrize(("backend", "called"), [(None, []), ("plug", ["forward", "backward"])])
def test_gradient_of_a_plugins_operator(plugin: Any, backend: str | None, called: list[str]) -> None:
    """vjp runs the reference's, or the kernel's own."""
    module = plugin.backend(OWN, DOUBLE)
    x = np.ones((2, 3), np.float32)
    y, pullback = srm_core.vjp("double", x, times=5, backend=backend)
    (grad,) = pullback(np.full_like(y, 2))
    np.testing.assert_array_equal(grad, np.full_like(x, 10))
    assert module.calls == called


def test_contract_of_a_plugins_operator(plugin: Any) -> None:
    """Its specification is checked like any other, its variable is known, and it goes with the plugin."""
    plugin.backend(OWN, DOUBLE)
    with pytest.raises(srm_core.ContractError, match=r"double: x: found shape \(3,\); required \(B, D\)"):
        srm_core.call("double", np.ones(3))
    plugin.environ(SRM_BACKEND_DOUBLE="plug")
    assert srm_core.explain("double", np.ones((1, 1))).source == "SRM_BACKEND_DOUBLE"
    plugin.environ.patch.delenv("SRM_BACKEND_DOUBLE")
    plugin.environ(SRM_BLOCK="plug")
    with pytest.raises(srm_core.UnknownNameError, match="no operator is called 'double'"):
        srm_core.call("double", np.ones((1, 1)))


def test_operator_taken(plugin: Any) -> None:
    """Two plugins may not bring one operator."""
    plugin.write("first", DOUBLE)
    plugin("second", DOUBLE)
    (lost,) = srm_core.list_backends().quarantined
    assert "double is already taken by plugin 'first'" in lost["error"]
    assert srm_core.call("double", np.ones((1, 1))) == 2


def test_kernel_for_another_plugins_operator(plugin: Any) -> None:
    """The order in which plugins load does not matter."""
    plugin.write("zzz", DOUBLE)
    plugin.backend("Kernel('double', 'plug:forward')", "def forward(ctx, x, *, times): return x + 100")
    assert srm_core.call("double", np.ones((1, 1)), backend="plug") == 101


# What no plugin changes.


def test_auto_never_picks_an_outsider(plugin: Any, arrays: Any) -> None:
    """Installing a plugin changes no result, whatever rank it gives itself; naming it does."""
    expected, _ = srm_core.scan(*arrays)
    plugin.backend("Kernel('scan', 'plug:seven', rank=1000)")
    np.testing.assert_array_equal(srm_core.scan(*arrays)[0], expected)
    candidates = [c.backend for c in srm_core.explain("scan", *arrays).candidates]
    assert (candidates[0], sorted(candidates)) == ("numpy", BUILT_IN)
    for said in ("plug", "plug,auto", "plug,numpy"):
        assert (srm_core.scan(*arrays, backend=said)[0] == 7).all()
    np.testing.assert_array_equal(srm_core.scan(*arrays, backend="auto,plug")[0], expected)


def test_strict_or_not(plugin: Any, arrays: Any) -> None:
    """A named backend that cannot run the call is an error, unless `auto` or another follows."""
    plugin.backend("Kernel('scan', 'plug:seven', dtypes=('float64',))")
    expected, _ = srm_core.scan(*arrays)
    with pytest.raises(srm_core.NoBackendError, match="takes float64, not float32"):
        srm_core.scan(*arrays, backend="plug")
    for said in ("plug,auto", "plug,numpy"):
        np.testing.assert_array_equal(srm_core.scan(*arrays, backend=said)[0], expected)
    assert (srm_core.scan(*(a.astype(np.float64) for a in arrays), backend="plug")[0] == 7).all()


def test_backend_without_the_operator(plugin: Any, arrays: Any) -> None:
    """That a backend has no kernel for an operator is a reason like any other."""
    plugin.backend("Kernel('recurrent_mix', 'plug:seven')")
    with pytest.raises(srm_core.NoBackendError, match="plug: has no kernel for scan"):
        srm_core.scan(*arrays, backend="plug")
    assert srm_core.explain("scan", *arrays, backend="plug,auto").chosen == "numpy"


# Observers.

OBSERVER = """
seen = []
@hookimpl
def srm_on_decision(decision):
    seen.append(decision)
"""


def test_observer(plugin: Any, arrays: Any) -> None:
    """An observer hears of each new kind of call once, and never of a memo hit."""
    module = plugin("watch", OBSERVER)
    for _ in range(3):
        srm_core.scan(*arrays)
    (decision,) = module.seen
    assert (decision.op, decision.chosen, decision.source) == ("scan", "numpy", "default")
    srm_core.scan(*(a[:1] for a in arrays))
    assert len(module.seen) == 2
    srm_core.scan(*arrays)
    assert len(module.seen) == 2


def test_observer_that_raises(plugin: Any, arrays: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged; the call and the other observers go on."""
    before = plugin("aaa", OBSERVER)
    plugin("bbb", "@hookimpl\ndef srm_on_decision(decision): raise RuntimeError('tired')")
    after = plugin("ccc", OBSERVER)
    expected, _ = srm_core.scan(*arrays, backend="reference")
    np.testing.assert_allclose(srm_core.scan(*arrays)[0], expected, rtol=1e-5)
    assert len(before.seen) == len(after.seen) == 2
    (record, _) = caplog.records
    assert "'bbb': srm_on_decision raised" in record.getMessage()
    assert "tired" in record.exc_text


def test_observer_that_calls(plugin: Any, arrays: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An observer may itself make the call that it hears of."""
    body = "    srm_core.scan(np.ones((2, 3, 4), np.float32), np.ones((2, 3, 4), np.float32))\n"
    module = plugin("watch", OBSERVER + body)
    srm_core.scan(*arrays)
    assert len(module.seen) == 1
    assert not caplog.records


# Predicates.


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ("return [Reason('odd', 'wants pairs'), Reason('big', 'too big')]", "odd", "wants pairs; too big"),
        ("raise KeyError('D')", "predicate-failed", "its predicate raised KeyError"),
        ("return None", "predicate-failed", "TypeError"),
        ("return ['wants pairs']", "predicate-failed", "required a list of srm_core.spec.Reason"),
    ],
)
def test_predicate_says_no(plugin: Any, arrays: Any, body: str, code: str, text: str) -> None:
    """All of a predicate's reasons are shown; one that fails is a no."""
    plugin.backend("Kernel('scan', 'plug:seven', supports='plug:supports')", f"def supports(view):\n    {body}\n")
    with pytest.raises(srm_core.NoBackendError, match=text.replace("(", r"\(")) as caught:
        srm_core.scan(*arrays, backend="plug")
    assert caught.value.decision.candidates[0].reasons[0].code == code
    assert srm_core.explain("scan", *arrays, backend="plug,auto").chosen == "numpy"


def test_predicate_that_cannot_be_loaded(plugin: Any, arrays: Any) -> None:
    """So is one that is not there."""
    plugin.backend("Kernel('scan', 'plug:seven', supports='plug:nothing')")
    decision = srm_core.explain("scan", *arrays, backend="plug")
    assert decision.candidates[0].reasons[0].code == "predicate-failed"


def test_plugin_module_is_not_needed_twice(plugin: Any) -> None:
    """A reload takes the module that is imported already, so that its state survives."""
    module = plugin("watch", OBSERVER)
    srm_core.reload_config()
    assert sys.modules["watch"] is module is importlib.import_module("watch")
    srm_core.call("scan", np.ones((1, 1, 1)), np.ones((1, 1, 1)))
    assert len(module.seen) == 1
