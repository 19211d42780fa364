"""The environment grammar, precedence, and when it is read."""

from __future__ import annotations

import os
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from built_in import BUILT_IN

import srm_core
from srm_core.config import Config, parse_selection

pytestmark = pytest.mark.usefixtures("environ")

FOUR = """
a, b, c, d = constant(1), constant(2), constant(3), constant(4)

@hookimpl
def srm_backend_info():
    return [BackendInfo(n, "test", (Kernel("scan", f"four:{n}"),)) for n in "abcd"]
"""


def chosen(arrays: Any, **options: Any) -> tuple[str | None, str]:
    decision = srm_core.explain("scan", *arrays, **options)
    return decision.chosen, decision.source


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("numpy", ("numpy",)),
        ("reference,numpy", ("reference", "numpy")),
        (" reference , auto ", ("reference", "auto")),
        ("auto", ("auto",)),
    ],
)
def test_names_in_order(text: str, names: tuple[str, ...]) -> None:
    """A selection is a comma list; spaces do not count."""
    selection = parse_selection(text, "x")
    assert selection.names == names
    assert selection.strict == ("auto" not in names)


@pytest.mark.parametrize("text", [",", "numpy,", ",numpy", "numpy,,auto", "numpy, ,auto"])
def test_empty_name(environ: Any, text: str) -> None:
    """An empty name is an error wherever a selection is said, and the message says where."""
    with pytest.raises(srm_core.ConfigError, match="SRM_BACKEND_SCAN: an empty name in"):
        environ(SRM_BACKEND_SCAN=text)
    with pytest.raises(srm_core.ConfigError, match="use_backend: an empty name"):
        srm_core.use_backend(text)


def test_empty_selection(arrays: Any) -> None:
    """In code an empty selection is a mistake; only an empty variable counts as unset."""
    with pytest.raises(srm_core.ConfigError, match="empty name"):
        srm_core.use_backend("")
    with pytest.raises(srm_core.ConfigError, match="backend=: an empty name"):
        srm_core.scan(*arrays, backend="")


@pytest.mark.parametrize("text", ["numpy,numpy", "auto,numpy,auto"])
def test_repeated_name(environ: Any, text: str) -> None:
    """A name twice is an error."""
    with pytest.raises(srm_core.ConfigError, match="SRM_BACKEND: a name stands twice"):
        environ(SRM_BACKEND=text)


@pytest.mark.parametrize("value", [3, None, ["numpy"], b"numpy"])
def test_selection_of_another_type(arrays: Any, value: Any) -> None:
    """Only a string is a selection; None for `backend=` means none was given."""
    with pytest.raises(srm_core.ConfigError, match="required a comma list"):
        srm_core.use_backend(value)
    if value is not None:
        with pytest.raises(srm_core.ConfigError, match="required a comma list"):
            srm_core.scan(*arrays, backend=value)


def _by_environ(environ: Any, arrays: Any, name: str) -> None:
    environ(SRM_BACKEND=name)


def _by_context(environ: Any, arrays: Any, name: str) -> None:
    srm_core.use_backend(name)


def _by_argument(environ: Any, arrays: Any, name: str) -> None:
    srm_core.scan(*arrays, backend=name)


@pytest.mark.parametrize(
    ("say", "source"),
    [(_by_environ, "SRM_BACKEND=numpi"), (_by_context, "use_backend"), (_by_argument, "backend=")],
)
def test_unknown_backend(environ: Any, arrays: Any, say: Any, source: str) -> None:
    """The message names the place, the known names and the closest."""
    with pytest.raises(srm_core.UnknownNameError) as caught:
        say(environ, arrays, "numpi")
    message = str(caught.value)
    assert message.startswith(f"{source}: no backend is called 'numpi'")
    assert f"known: {', '.join(['auto', *BUILT_IN])}" in message
    assert "did you mean 'numpy'?" in message


def test_unknown_operator(environ: Any) -> None:
    """SRM_BACKEND_<OP> must name an operator."""
    with pytest.raises(srm_core.UnknownNameError, match=r"SRM_BACKEND_SCAM: no operator .*did you mean 'scan'"):
        environ(SRM_BACKEND_SCAM="numpy")


@pytest.mark.parametrize("name", ["SRM_BACKENDS", "SRM_BACKEND1", "SRM_BACKENDSCAN"])
def test_misspelt_variable(environ: Any, name: str) -> None:
    """A variable that only looks like ours is not silently ignored."""
    with pytest.raises(srm_core.UnknownNameError, match=f"'{name}'.*did you mean 'SRM_BACKEND'"):
        environ(**{name: "numpy"})


@pytest.mark.parametrize("variable", ["SRM_BACKEND", "SRM_BACKEND_SCAN"])
def test_lost_backend(environ: Any, plugin: Any, variable: str) -> None:
    """Naming a plugin that is blocked or broken says so, instead of only calling it unknown."""
    plugin.write("plug", "raise RuntimeError('boom')")
    with pytest.raises(srm_core.UnknownNameError, match="its plugin is quarantined: RuntimeError: boom"):
        environ(**{variable: "plug"})
    with pytest.raises(srm_core.UnknownNameError, match="it is blocked by SRM_BLOCK"):
        environ(SRM_BLOCK="plug")


@pytest.mark.parametrize(
    ("first", "name", "source"),
    [
        (0, "a", "backend="),
        (1, "b", "use_backend"),
        (2, "c", "SRM_BACKEND_SCAN"),
        (3, "d", "SRM_BACKEND"),
        (4, "numpy", "default"),
    ],
)
def test_precedence(environ: Any, plugin: Any, arrays: Any, first: int, name: str, source: str) -> None:
    """argument > context > SRM_BACKEND_<OP> > SRM_BACKEND > auto; level `first` and all below it are said."""
    plugin("four", FOUR)
    if first <= 3:
        environ(SRM_BACKEND="d")
    if first <= 2:
        environ(SRM_BACKEND_SCAN="c")
    options = {"backend": "a"} if first == 0 else {}
    with srm_core.use_backend("b") if first <= 1 else nullcontext():
        assert chosen(arrays, **options) == (name, source)
        y, _ = srm_core.scan(*arrays, **options)
    assert (y == {"a": 1, "b": 2, "c": 3, "d": 4}.get(name, y)).all()


def test_per_operator(environ: Any, arrays: Any) -> None:
    """SRM_BACKEND_SCAN is for scan alone."""
    environ(SRM_BACKEND_SCAN="reference")
    assert chosen(arrays) == ("reference", "SRM_BACKEND_SCAN")
    one = np.ones((3, 8), np.float32)
    other = srm_core.explain("recurrent_mix", arrays[0][:, :, None].repeat(3, 2), one, one, one[:, 0], ("row",) * 3)
    assert (other.chosen, other.source) == ("numpy", "default")


def test_operator_with_underscore(environ: Any) -> None:
    """The operator whose name ends in _ has a variable of its own."""
    environ(SRM_BACKEND_RECURRENT_STEP_="reference")
    config = Config.from_environ()
    assert set(config.per_op) == {"recurrent_step_"}


def test_read_once(environ: Any, arrays: Any) -> None:
    """The environment counts as it was read, on a memo hit and on a miss, until reload_config."""
    srm_core.scan(*arrays)
    environ.set(SRM_BACKEND="reference")
    assert chosen(arrays) == ("numpy", "default")
    srm_core.reload_config()
    assert chosen(arrays) == ("reference", "SRM_BACKEND")


def test_reload_forgets_decisions(environ: Any, plugin: Any, arrays: Any) -> None:
    """A call that is remembered is decided anew after reload_config."""
    plugin("four", FOUR)
    environ(SRM_BACKEND="a")
    assert (srm_core.scan(*arrays)[0] == 1).all()
    environ(SRM_BACKEND="b")
    assert (srm_core.scan(*arrays)[0] == 2).all()


def test_failed_reload(environ: Any, arrays: Any) -> None:
    """After a reload that fails the old configuration is in force."""
    environ(SRM_BACKEND="reference")
    with pytest.raises(srm_core.ConfigError):
        environ(SRM_BACKEND="nobody")
    assert chosen(arrays) == ("reference", "SRM_BACKEND")
    with pytest.raises(srm_core.ConfigError):
        environ(SRM_BACKEND="numpy", SRM_BACKEND_SCAN=",")
    assert chosen(arrays) == ("reference", "SRM_BACKEND")


@pytest.mark.parametrize("empty", ["", "  "])
def test_empty_is_unset(environ: Any, arrays: Any, empty: str) -> None:
    """An empty variable is none, even under a name that would be an error."""
    environ(SRM_BACKEND=empty, SRM_BACKEND_SCAN=empty, SRM_BLOCK=empty, SRM_TRACE=empty, SRM_BACKENDS=empty)
    assert chosen(arrays) == ("numpy", "default")
    assert srm_core.list_backends().blocked == ()


def test_block_list(environ: Any, arrays: Any) -> None:
    """SRM_BLOCK takes a comma list and forgives empty names."""
    environ(SRM_BLOCK=" numpy ,, ")
    assert srm_core.list_backends().blocked == ("numpy",)
    assert chosen(arrays) == ("reference", "default")


def test_block_of_nobody(environ: Any) -> None:
    """A misspelt name would leave the plugin in that was to be kept out."""
    with pytest.raises(srm_core.UnknownNameError, match=r"SRM_BLOCK: no plugin is called 'nunpy'.*mean 'numpy'"):
        environ(SRM_BLOCK="nunpy")


def test_trace_must_be_writable(environ: Any, tmp_path: Path) -> None:
    """A trace that cannot be written is told at once, not at the first call."""
    with pytest.raises(srm_core.ConfigError, match=r"SRM_TRACE=.*cannot be written"):
        environ(SRM_TRACE=str(tmp_path / "missing" / "trace.jsonl"))
    with pytest.raises(srm_core.ConfigError, match=r"SRM_TRACE=.*cannot be written"):
        environ(SRM_TRACE=str(tmp_path))


def test_blocks_nest(arrays: Any) -> None:
    """The innermost use_backend holds, and leaving restores the outer, also by an exception."""
    with srm_core.use_backend("reference"):
        with suppress(KeyError), srm_core.use_backend("numpy"):
            assert chosen(arrays) == ("numpy", "use_backend")
            raise KeyError
        assert chosen(arrays) == ("reference", "use_backend")
        with srm_core.precision("tf32"), srm_core.deterministic():
            assert chosen(arrays) == ("reference", "use_backend")
    assert chosen(arrays) == ("numpy", "default")


def test_context_over_variable(environ: Any, arrays: Any) -> None:
    """`use_backend("auto")` undoes what a variable says."""
    environ(SRM_BACKEND_SCAN="reference", SRM_BACKEND="reference")
    with srm_core.use_backend("auto"):
        assert chosen(arrays) == ("numpy", "use_backend")


@pytest.mark.parametrize(
    ("policy", "value"),
    [(srm_core.precision, "fp32"), (srm_core.precision, None), (srm_core.deterministic, 1)],
)
def test_unknown_policy(policy: Any, value: Any) -> None:
    """A policy that does not exist is refused before the block is entered."""
    with pytest.raises(srm_core.ConfigError, match="required"):
        policy(value)


def test_variable_of_others(environ: Any) -> None:
    """Variables that do not begin with SRM_BACKEND are none of ours."""
    environ(SRM_HOME="numpi", OTHER_SRM_BACKEND="numpi")
    assert Config.from_environ(dict(os.environ)).per_op == {}
