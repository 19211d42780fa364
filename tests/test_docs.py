"""The documentation: its examples run, its links resolve, and it names everything that is public."""

from __future__ import annotations

import dataclasses
import doctest
import json
import os
import re
import shlex
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
from srm_core import cli, config, spec

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
    env = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "100", **dict(w.split("=", 1) for w in words[:at])}
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


@pytest.mark.parametrize("folder", ["", "adr"])
def test_every_page_is_in_the_index(folder: str) -> None:
    index = page(f"{folder}/README.md".lstrip("/"))
    pages = [p for p in PAGES[1:] if p.name != "README.md" and (p.parent.name == "adr") == bool(folder)]
    assert not [p for p in pages if p.name not in index]


def test_figures_are_those_of_the_recorded_run() -> None:
    recorded = json.loads((ROOT / "asv_bench/results/cpu_targets.json").read_text(encoding="utf-8"))["rows"]
    pages = page("explanation/dispatch.md") + page("explanation/blocked-scan.md")
    assert not [row["what"] for row in recorded if f"| {row['ours']} |" not in pages]
    assert not [row["what"] for row in recorded if "scan (" in row["what"] and f"| {row['ratio']:.2f} |" not in pages]
