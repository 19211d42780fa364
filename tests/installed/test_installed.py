"""Installed plugins, each broken in its own way: a clear row in `srm-core backends`, and nothing else affected."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import pytest
from built_in import BUILT_IN

SCAN = """
import numpy as np, srm_core
gates, tokens = np.full((1, 1, 2), 0.5), np.ones((1, 3, 2))
y, _ = srm_core.scan(gates, tokens)
print(y[0, :, 0].tolist(), srm_core.explain("scan", gates, tokens).chosen)
"""


def unharmed(environment: Any, **environ: str) -> None:
    """NumPy runs a scan there, with the right result, and the program writes what it would write anyway."""
    done = environment.run("-c", SCAN, **environ)
    assert (done.returncode, done.stdout) == (0, "[1.0, 1.5, 1.75] numpy\n"), done.stderr


def shown(environment: Any, *arguments: str, **environ: str) -> list[str]:
    """The lines of `srm-core backends`, without the frame of its table."""
    done = environment.command("backends", *arguments, **environ)
    assert done.returncode == 0, done.stderr
    return [line.strip() for line in done.stdout.splitlines()]


def listed(environment: Any, **environ: str) -> Any:
    """What `srm-core backends --json` says."""
    done = environment.command("backends", "--json", **environ)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


QUARANTINED = {
    "boom": "RuntimeError: no driver here",
    "exits": "SystemExit: 0",
    "mute": "Mute: (its text cannot be had: RuntimeError)",
    "misspelt": (
        "PluginError: it implements srm_backend_inof, which is no hook; hooks: srm_backend_info, "
        "srm_conformance_profile, srm_on_decision, srm_ops, srm_probe"
    ),
    "future": (
        "PluginError: backend 'future' is written for API version 99; this srm-core has version 1; "
        "install a release of the plugin that matches"
    ),
    "eager": "PluginError: srm_core was called by a plugin that is only being loaded; call it later than at import",
}


@pytest.mark.parametrize("module", QUARANTINED)
def test_quarantined(environment: Any, module: str) -> None:
    """One that cannot be loaded is listed with its error; what it would have offered is not."""
    environment.install(module)
    assert f"quarantined: {module} (srm-{module}): {QUARANTINED[module]}" in shown(environment)
    unharmed(environment)


def test_all_at_once(environment: Any) -> None:
    """None hides another; the whole error of each is there if asked for."""
    environment.install(*QUARANTINED, "inventor", "claim_first")
    lines = shown(environment, "--traceback")
    for module, error in QUARANTINED.items():
        assert f"quarantined: {module} (srm-{module}): {error}" in lines
    assert "and a second line" in lines
    found = listed(environment)
    assert {lost["name"]: lost["error"] for lost in found["quarantined"]} == QUARANTINED
    for lost in found["quarantined"]:
        assert lost["distribution"] == f"srm-{lost['name']}"
        assert lost["traceback"].startswith("Traceback (most recent call last)")
    assert [b["name"] for b in found["backends"]] == [*BUILT_IN, "shared", "inventor"]
    unharmed(environment)


def test_two_claim_one_backend(environment: Any) -> None:
    """The same one always has it, whatever the order of installation; the other is told who."""
    environment.install("claim_second", "claim_first")
    error = (
        "PluginError: the name shared is already taken by plugin 'claim_first' (srm-claim-first); "
        "keep one of them, or block one with SRM_BLOCK"
    )
    assert f"quarantined: claim_second (srm-claim-second): {error}" in shown(environment)
    assert listed(environment, SRM_BLOCK="claim_first")["quarantined"] == []
    unharmed(environment)


def test_two_claim_one_entry_point(environment: Any) -> None:
    """SRM_BLOCK cannot tell them apart: one has to go."""
    environment.install("strange", entry="same")
    environment.install("lacks", entry="same")
    error = "PluginError: the entry point 'same' is already taken by srm-lacks; uninstall one of the two"
    assert f"quarantined: same (srm-strange): {error}" in shown(environment)
    assert [b["name"] for b in listed(environment)["backends"]] == [*BUILT_IN, "lacks"]
    unharmed(environment)


def test_half_uninstalled(environment: Any) -> None:
    """What is left of a distribution whose files are gone is a row like another."""
    environment.install("lacks", "claim_first", "strange")
    (environment.packages / "strange.py").unlink()
    for name in ("lacks", "claim_first"):
        (environment.packages / f"srm_{name}-1.0.dist-info" / "METADATA").unlink()
    (environment.packages / "srm_no_such_thing-2.0.dist-info").mkdir()  # that is what `lacks` requires
    lines = shown(environment)
    assert "quarantined: strange (srm-strange): ModuleNotFoundError: No module named 'strange'" in lines
    assert "lacks: srm-no-such-thing>=2 is not installed (pip install 'srm-no-such-thing>=2')" in lines
    assert [p["distribution"] for p in listed(environment)["plugins"]] == ["srm-core"] * len(BUILT_IN) + ["unknown"] * 2
    unharmed(environment)


def test_unknown_operator(environment: Any) -> None:
    environment.install("strange")
    lines = shown(environment)
    assert "strange: no operator is called 'scam'" in lines
    assert any(line.startswith("│ scan ") and line.endswith("│ forward │") for line in lines)
    (row,) = (b for b in listed(environment)["backends"] if b["name"] == "strange")
    assert row["reasons"] == ["no operator is called 'scam'"]
    unharmed(environment)


def test_missing_distribution(environment: Any) -> None:
    """Said once, not once an operator."""
    environment.install("lacks")
    reason = "srm-no-such-thing>=2 is not installed (pip install 'srm-no-such-thing>=2')"
    lines = shown(environment)
    assert [line for line in lines if "srm-no-such-thing" in line] == [f"lacks: {reason}"]
    (cell,) = (c for c in listed(environment)["operators"] if (c["op"], c["backend"]) == ("scan", "lacks"))
    assert (cell["provides"], cell["reasons"]) == ("no", [reason])
    unharmed(environment)


def test_probes(environment: Any) -> None:
    """Whatever a probe does but hang is an answer: no."""
    environment.install("unsure")
    lines = shown(environment)
    for row in (
        "raises: its probe raised OSError: driver too old",
        "exits: its probe raised SystemExit: no licence",
        "panics: its probe raised Panic: rust",
        "answers: its probe raised PluginError: found 'n'; required a list of srm_core.spec.Reason, empty for yes",
    ):
        assert row in lines
    for backend in listed(environment)["backends"][len(BUILT_IN) :]:
        assert [r.split(" raised")[0] for r in backend["reasons"]] == ["its probe"]
    unharmed(environment)


def test_operator_of_its_own(environment: Any) -> None:
    """It runs on its own kernel, and on `reference` without a further line."""
    environment.install("inventor")
    lines = shown(environment)
    assert any(line.startswith("│ running_max") and "│ forward " in line for line in lines)
    assert "inventor: from srm-inventor" in lines
    code = """
import numpy as np, srm_core
x = np.array([[1.0, 3.0, 2.0]])
for backend in ("inventor", "reference", None):
    print(srm_core.call("running_max", x, backend=backend).tolist(), srm_core.explain("running_max", x).chosen)
"""
    assert environment.run("-c", code).stdout == "[[1.0, 3.0, 3.0]] reference\n" * 3
    unharmed(environment)


def test_observer_that_exits(environment: Any) -> None:
    """It is logged, and the program goes on."""
    environment.install("watcher")
    (plugin,) = (p for p in listed(environment)["plugins"] if p["name"] == "watcher")
    assert (plugin["distribution"], plugin["backends"], plugin["operators"]) == ("srm-watcher", [], [])
    assert "watcher: from srm-watcher, which has no backend" in shown(environment)
    done = environment.run("-c", SCAN)
    assert (done.returncode, done.stdout) == (0, "[1.0, 1.5, 1.75] numpy\n")
    assert "plugin 'watcher': srm_on_decision raised" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="has no echo, and another C library")
def test_noise(environment: Any) -> None:
    """What it writes goes to stderr, and what it wrote at import is said; stdout holds results alone."""
    environment.install("noisy")
    note = "wrote to stdout while it loaded, which went to stderr: 'noisy: print at import'"
    assert f"noisy: {note}" in shown(environment)
    done = environment.command("backends", "--json")
    (plugin,) = (p for p in json.loads(done.stdout)["plugins"] if p["name"] == "noisy")
    assert plugin["notes"] == [note]
    for when in ("at import", "in its probe"):
        for what in ("print", "stderr", "descriptor 1", "child"):
            assert f"noisy: {what} {when}" in done.stderr
    assert done.stderr.count("noisy: printf") == 2
    done = environment.run("-c", SCAN)  # a library cannot turn descriptors aside: other threads use them
    assert "[1.0, 1.5, 1.75] numpy" in done.stdout
    assert "noisy: print at" not in done.stdout
    assert "noisy: print at import" in done.stderr


def test_slow(environment: Any) -> None:
    environment.install("slow")
    (line,) = (line for line in shown(environment) if line.startswith("slow: took"))
    assert line.endswith(" s to load; import what is heavy in the modules of its kernels")
    plugins = {p["name"]: p for p in listed(environment)["plugins"]}
    assert plugins["slow"]["seconds"] >= 1
    assert plugins["numpy"]["seconds"] < plugins["slow"]["seconds"]
    unharmed(environment)


def test_meddling(environment: Any) -> None:
    """The SRM_ variables, NumPy's error state and sys.stdout are put back; other variables are named."""
    environment.install("meddler")
    lines = shown(environment, SRM_TRACE="trace.jsonl")
    for note in (
        "changed SRM_BACKEND, SRM_TRACE while it loaded, which is undone: they are the user's",
        "changed the environment while it loaded: MEDDLER_THREADS",
        "changed NumPy's error state while it loaded, which is undone",
        "replaced sys.stdout while it loaded, which is undone",
    ):
        assert f"meddler: {note}" in lines
    code = SCAN + (
        "import os, sys\nsrm_core.reload_config()\n"
        "print([os.environ.get(n) for n in ('SRM_BACKEND', 'SRM_TRACE')], np.geterr()['divide'], "
        "srm_core.explain('scan', gates, tokens).chosen)\n"
    )
    done = environment.run("-c", code, SRM_TRACE="trace.jsonl")
    assert done.stdout.splitlines()[1] == "[None, 'trace.jsonl'] warn numpy", done.stderr
    unharmed(environment)


def test_import_that_hangs(environment: Any) -> None:
    """Nothing can be listed then; an interrupt tells whose import it was, and SRM_BLOCK passes it by."""
    environment.install("sleepy")
    # Whoever starts the tests in the background may have had interrupts ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from srm_core.cli import main\nmain(['backends', '--json'])"
    )
    with environment.start(code) as process:
        assert process.stderr.readline() == "sleepy: goes to sleep\n"
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "interrupted while plugin 'sleepy' (srm-sleepy) was loading; SRM_BLOCK=sleepy leaves it out" in error
    assert "sleepy: blocked by SRM_BLOCK, not loaded" in shown(environment, SRM_BLOCK="sleepy")
    assert listed(environment, SRM_BLOCK="sleepy")["blocked"] == ["sleepy"]
    unharmed(environment, SRM_BLOCK="sleepy")
