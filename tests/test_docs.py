"""The documentation: its examples run, its links resolve, and it names everything that is public."""

from __future__ import annotations

import dataclasses
import doctest
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser
from sybil.parsers.rest import DocTestParser

import srm_core
from srm_core import cli, config, describe, spec
from srm_core.ops import SPECS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = [p for p in sorted((ROOT / "srm_core").rglob("*.py")) if ">>> " in p.read_text(encoding="utf-8")]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def page(path: str) -> str:
    return (ROOT / "docs" / path).read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An example may change the environment, the import path, the folder and the registry; the next sees none of it."""
    before, modules = dict(os.environ), set(sys.modules)
    for variable in [n for n in before if n.startswith("SRM_")]:
        del os.environ[variable]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    srm_core.reload_config()
    yield
    monkeypatch.undo()
    os.environ.clear()
    os.environ.update(before)
    for module in set(sys.modules) - modules:
        if str(getattr(sys.modules[module], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[module]
    srm_core.reload_config()


def run_console(example: Any) -> str | None:
    """Run a ```console block. Output lines are compared, `...` standing for anything; so is `$ echo $?`."""
    code = 0
    for part in re.split(r"^\$ ", str(example.parsed), flags=re.M)[1:]:
        command, _, expected = part.partition("\n")
        if command == "echo $?":
            output, code = f"{code}\n", 0
        elif code:
            break
        else:
            output, code = run(command)
        if expected.strip() and not doctest.OutputChecker().check_output(expected, output, FLAGS):
            return f"$ {command}\nexpected:\n{expected}\ngot:\n{output}"
    return f"a command has the exit code {code}; show it with: $ echo $?" if code else None


def run(command: str) -> tuple[str, int]:
    """What `NAME=VALUE ... srm-core ...` writes to both streams, and its exit code."""
    words = shlex.split(command, comments=True)
    at = words.index("srm-core")
    # How many threads somebody gives to the tests changes nothing of what the pages show.
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {"PYTHONUTF8": "1", "COLUMNS": "100", **dict(w.split("=", 1) for w in words[:at])}
    done = subprocess.run(
        [sys.executable, "-m", "srm_core", *words[at + 1 :]],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip
    return done.stdout, done.returncode


FILE = re.compile(r"# ([\w/]+\.\w+)\n")


def write(example: Any) -> None:
    """Write a block whose first line names a file, such as `# pyproject.toml`, to that file."""
    path = Path(FILE.findall(example.parsed)[0])
    path.parent.mkdir(exist_ok=True)
    path.write_text(example.parsed, encoding="utf-8")


def python(document: Any) -> Iterator[Any]:
    for region in PythonCodeBlockParser(doctest_optionflags=FLAGS)(document):
        if isinstance(region.parsed, str) and FILE.match(region.parsed):
            region.evaluator = write
        yield region


SYBIL = Sybil([python, CodeBlockParser("toml", write), CodeBlockParser("console", run_console)])


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_examples(path: Path) -> None:
    for example in SYBIL.parse(path):
        example.evaluate()


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_docstrings(path: Path) -> None:
    for example in Sybil([DocTestParser(FLAGS)]).parse(path):
        example.evaluate()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"https?://|mailto:", target):
            file, _, anchor = target.partition("#")
            linked = (path.parent / file) if file else path
            assert linked.exists(), f"{name(path)}: {target} does not exist"
            if anchor:
                titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.M)
                anchors = {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}
                assert anchor in anchors, f"{name(path)}: {target}: no such heading"


def test_everything_public_is_named() -> None:
    pages = "\n".join(p.read_text(encoding="utf-8") for p in PAGES)
    assert not [n for n in srm_core.__all__ if not re.search(rf"\b{n}\b", pages)]
    assert not [c for c in cli.app if not c.startswith("-") and f"## {c}" not in page("reference/command-line.md")]
    variables = (*config.VARIABLES, "SRM_BACKEND_<OP>")
    assert not [v for v in variables if f"`{v}`" not in page("reference/environment.md")]
    kinds = [v for v in vars(spec).values() if isinstance(v, type) and dataclasses.is_dataclass(v)]
    fields = [f.name for k in kinds for f in dataclasses.fields(k)]
    assert not [f for f in fields if f"`{f}" not in page("reference/specifications.md")]


OPERATOR_PAGES = runpy.run_path(str(ROOT / "docs/build_operator_pages.py"))


@pytest.mark.parametrize("folder", INDEXED := ["", "adr", "reference/operators"])
def test_every_page_is_in_the_index(folder: str) -> None:
    index = page(f"{folder}/README.md".lstrip("/"))
    folders = {p: p.parent.relative_to(ROOT / "docs").as_posix() for p in PAGES[1:] if p.name != "README.md"}
    pages = [p for p, of in folders.items() if of == folder or (not folder and of not in INDEXED)]
    assert not [p for p in pages if p.name not in index]


def test_operator_pages_are_those_of_the_specifications(capsys: pytest.CaptureFixture[str]) -> None:
    stale = OPERATOR_PAGES["main"](["--check"])
    assert not stale, capsys.readouterr().out


def test_stale_operator_pages_are_named_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("images", "examples"))
    operators = tmp_path / "docs/reference/operators"
    (operators / "scan.md").write_text("# scan\n", encoding="utf-8")
    (operators / "gone.md").touch()
    (operators / "recurrent_mix.md").unlink()
    build = OPERATOR_PAGES["main"]
    assert build(["--check"], tmp_path) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if "python docs/build_operator_pages.py" in line]
    for stale in ("scan", "gone", "recurrent_mix"):
        assert any(f"docs/reference/operators/{stale}.md: stale" in line for line in lines)
    assert build([], tmp_path) == 0
    assert build(["--check"], tmp_path) == 0
    assert not (operators / "gone.md").exists()


@pytest.mark.parametrize("op", SPECS)
def test_an_operator_says_all_that_its_page_needs(op: str) -> None:
    known = SPECS[op]
    assert known.formula
    assert known.source
    silent = [v.name for v in (*known.parameters, *known.outputs) if not v.doc]
    assert not silent, f"{op}: no doc: {', '.join(silent)}"
    unclean = [v.name for v in (*known.parameters, *known.outputs) if v.doc.endswith(".") or "\n" in v.doc]
    assert not unclean, f"{op}: the doc of {', '.join(unclean)} is no line without a stop"
    laws = [law.name for law in known.invariants if not law.pairs.__doc__]
    assert not laws, f"{op}: no docstring: {', '.join(laws)}"
    assert ">>> " in str(getattr(srm_core, op).__doc__), f"{op}: its docstring has no example"


def test_every_permitted_rounding_has_its_reason() -> None:
    section = page("explanation/tolerances.md").partition("| name |")[2].partition("\n\n")[0]
    reasons = re.findall(r"^\| `([^`]+)` \|", section, flags=re.M)
    assert len(set(reasons)) == len(reasons)
    assert set(reasons) == {name for known in SPECS.values() for name in known.permitted_roundings}


def test_a_page_holds_what_a_specification_can_say() -> None:
    """Beyond what the operators of today say, and plain text that could be taken for markup."""
    toy = spec.OpSpec(
        "toy", 1, "a|b * c",
        parameters=(
            spec.TensorSpec("x", ("B T", "B 2T"), doc="a * b"),
            spec.TensorSpec("mask", ("B? *",), role="mask", optional=True),
            spec.TensorSpec("levels", ("...",), many=True),
            spec.OptionSpec("eps", default=1e-6, keyword=True),
        ),
        outputs=(), reference=lambda: (), mutates=("levels",), permitted_roundings=("h", "tf32 products"),
    )  # fmt: skip
    text = describe.page(toy, {}, "Nothing.\n\n>>> a = 1\n>>> a\n1\n")
    for part in (
        "# toy\n\nA\\|b \\* c.\n",
        '    srm_core.call("toy", x, mask, levels, *, eps=1e-6) -> None\n',
        "```python\na = 1\n```\n\n```python\n>>> a\n1\n```\n",
        "| `x` | (B, T) or (B, 2T) | activation |  | a \\* b |",
        "| `mask` | (B?, \\*) | mask | may be None |",
        "| `levels` | a sequence of one shape |",
        '2T is 2 times T, an extent with "?" may be 1 instead, \\* is any extent',
        "It returns None. It updates `levels` in place",
        "It has no gradient.",
        "may be rounded to a half type: `h`.",
        'precision("tf32")',
    ):
        assert part in text, part


def test_figures_are_those_of_the_recorded_run() -> None:
    recorded = json.loads((ROOT / "asv_bench/results/cpu_targets.json").read_text(encoding="utf-8"))["rows"]
    pages = "".join(page(f"explanation/{n}.md") for n in ("dispatch", "blocked-scan", "numpy-kernels"))
    lines = pages.splitlines()
    for row in recorded:
        ours, other, ratio = row["ours"], row["other"].removeprefix("plain loop ").removeprefix("torch "), row["ratio"]
        if "scan (" in row["what"] or "torch" in row["other"]:
            start = f"| {row['what'].removeprefix('scan ')} |"
            assert any(n.startswith(start) and f"| {ours} | {other} | {ratio:.2f} |" in n for n in lines), row
        else:
            assert f"| {ours} |" in pages, row
