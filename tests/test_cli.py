"""The command line as a person meets it: a process with output, errors and an exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from built_in import BUILT_IN

from srm_core.describe import describe
from srm_core.ops import SPECS


def srm(*arguments: str, stdin: str | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("SRM_")} | environ
    command = [sys.executable, "-m", "srm_core", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, input=stdin, timeout=120, check=False)


def refused(run: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds these parts."""
    assert run.returncode == 2, run
    assert run.stdout == ""
    assert run.stderr.startswith("srm-core: error: ")
    assert len(run.stderr.splitlines()) == 1, run.stderr
    for part in parts:
        assert part in run.stderr


def test_generate():
    run = srm("generate", "--tokens", "60", "--seed", "7", "--prompt", "ROMEO.")
    assert run.returncode == 0
    assert run.stdout.startswith("ROMEO.")
    assert len(run.stdout) == len("ROMEO.") + 60 + 1
    assert run.stderr.startswith("[backend numpy: auto")
    assert "60 tokens in" in run.stderr
    assert srm("generate", "--tokens", "60", "--seed", "7", "--prompt", "ROMEO.").stdout == run.stdout


def test_generate_past_the_window():
    run = srm("generate", "--tokens", "700", "--prompt", "The king")
    assert run.returncode == 0
    assert len(run.stdout) == 8 + 700 + 1


def test_generate_batch_begins_like_the_single_text():
    one = srm("generate", "--tokens", "30", "--prompt", "A")
    many = srm("generate", "--tokens", "30", "--prompt", "A", "--prompt", "O, ", "--batch", "2")
    assert many.stdout.count("---\n") == 4
    assert one.stdout.strip() in many.stdout
    assert "120 tokens" in many.stderr


def test_backend_by_argument_and_environment():
    run = srm("generate", "--tokens", "3", "--backend", "reference")
    assert "[backend reference: named by use_backend" in run.stderr
    run = srm("generate", "--tokens", "3", SRM_BACKEND="reference")
    assert "[backend reference: named by SRM_BACKEND" in run.stderr


def test_unknown_backend():
    known = f"known: {', '.join(['auto', *BUILT_IN])}; did you mean 'numpy'?"
    refused(srm("generate", SRM_BACKEND="nunpy"), "SRM_BACKEND=nunpy: no backend is called 'nunpy'", known)
    refused(srm("generate", "--backend", "nunpy"), "no backend is called 'nunpy'", known)
    refused(srm("backends", SRM_BACKEND_SCNA="numpy"), "no operator is called 'scna'", "did you mean 'scan'?")
    refused(srm("report", SRM_BACKENDS="numpy"), "SRM_BACKENDS", "did you mean 'SRM_BACKEND'?")
    refused(srm("generate", SRM_BACKEND="numpy,,auto"), "an empty name in 'numpy,,auto'")
    refused(srm("generate", SRM_BLOK="numpy"), "SRM_BLOK", "did you mean 'SRM_BLOCK'?")
    refused(srm("generate", SRM_TRACE="/nowhere/at/all"), "SRM_TRACE=/nowhere/at/all: cannot be written")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt", ""], ["an empty text"]),
        (["--prompt", "naïve"], ["'ï'", "not in the vocabulary"]),
        (["--tokens", "0"], ["--tokens: found 0"]),
        (["--tokens", "many"], ["--tokens", "many"]),
        (["--batch", "-1"], ["--batch"]),
        (["--batch", "1000000000"], ["--batch: found 1000000000; required 1 to 65536"]),
        (["--device", "cpu:"], ["--device: found 'cpu:'"]),
        (["--device", "cuda:²"], ["--device: found 'cuda:²'"]),
        (["--temperature", "-1"], ["temperature: found -1"]),
        (["--top-k", "0"], ["top_k: found 0"]),
        (["--seed", "-3"], ["seed: found -3"]),
        (["--device", "gpu"], ["--device: found 'gpu'; required cpu, cuda, or cuda:N"]),
        (["--model", "no-such-file"], ["no-such-file: cannot be read: No such file"]),
        (["--colour"], ["--colour"]),
    ],
    ids=lambda v: " ".join(v) if v and v[0].startswith("--") else "",
)
def test_generate_refuses(arguments, parts):
    refused(srm("generate", *arguments), *parts)


def test_model_file_is_damaged(tmp_path: Path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    refused(srm("generate", "--model", str(path)), "is no whole safetensors file")
    refused(srm("perplexity", str(path), "--model", str(path)), "m.safetensors", "is no whole safetensors file")


def test_closed_pipe():
    """`srm-core generate | head -c 10`: one line on stderr, exit code 2, no traceback."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("SRM_")}
    command = [sys.executable, "-m", "srm_core", "generate", "--tokens", "2000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stderr is not None  # noqa: PT018
        process.stdout.read(10)
        process.stdout.close()
        message = process.stderr.read()
        assert process.wait(60) == 2
    assert message == "srm-core: error: the reader of the output has closed it\n"


@pytest.mark.parametrize(
    "arguments",
    [["backends"], ["report"], ["explain", "scan", "f32[1,2,3]"], ["describe", "scan"], ["--help"]],
    ids=str,
)
def test_closed_pipe_of_a_table(arguments):
    """What Rich prints, too."""
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-m", "srm_core", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (2, "srm-core: error: the reader of the output has closed it\n")


def test_closed_output():
    command = f"exec {sys.executable} -m srm_core generate --tokens 3 >&-"
    run = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (run.returncode, run.stderr) == (2, "srm-core: error: standard output is closed\n")


def test_output_that_knows_ascii_only():
    run = srm("backends", PYTHONIOENCODING="ascii")
    assert run.returncode == 0
    assert run.stdout.isascii()


def test_prompt_is_shown_as_it_is():
    assert srm("generate", "--tokens", "2", "--prompt", "\nROMEO.").stdout.startswith("\nROMEO.")


def test_tiny_temperature_warns_of_nothing():
    assert len(srm("generate", "--tokens", "3", "--temperature", "1e-320").stderr.splitlines()) == 1


def test_perplexity(tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n" * 9)
    run = srm("perplexity", str(text))
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].endswith("765 characters, 763 predicted")
    parallel, steps = (float(line.split(":")[1].split()[0]) for line in lines[1:3])
    assert 0 < parallel < 4
    assert abs(parallel - steps) < 1e-4
    assert lines[3] == "they agree"


def test_perplexity_refuses(tmp_path: Path):
    refused(srm("perplexity", str(tmp_path / "none.txt")), "none.txt")
    refused(srm("perplexity", str(tmp_path)), str(tmp_path))
    for content, part in ((b"", "0 characters"), (b"A", "1 characters"), (b"\xff\xfe", "is no UTF-8 text")):
        (tmp_path / "bad.txt").write_bytes(content)
        refused(srm("perplexity", str(tmp_path / "bad.txt")), "bad.txt", part)
    (tmp_path / "bad.txt").write_text("naïve Romeo")
    refused(srm("perplexity", str(tmp_path / "bad.txt")), "'ï'", "--skip-unknown")
    run = srm("perplexity", str(tmp_path / "bad.txt"), "--skip-unknown")
    assert run.returncode == 0
    assert "10 characters, 1 left out" in run.stdout


def test_backends():
    run = srm("backends")
    assert run.returncode == 0
    for word in ("scan", "recurrent_mix", "numpy", "reference", "forward+backward", "so it has no gradient"):
        assert word in run.stdout
    table = json.loads(srm("backends", "--json").stdout)
    assert {b["name"] for b in table["backends"]} == set(BUILT_IN)
    assert {c["op"] for c in table["operators"]} == set(SPECS)


def test_describe():
    run = srm("describe", "recurrent_mix")
    assert run.returncode == 0
    assert run.stdout == srm("describe", "recurrent_mix", "--markdown").stdout
    assert run.stdout == describe("recurrent_mix")
    refused(srm("describe", "recurent_mix"), "no operator is called 'recurent_mix'", "did you mean 'recurrent_mix'?")


def test_describe_on_a_terminal(monkeypatch, capsys):
    from rich.console import Console

    from srm_core.commands.describe import run

    run("scan", False, Console(force_terminal=True, width=100))
    shown = capsys.readouterr().out
    assert "\x1b" in shown
    assert "](" not in shown
    run("scan", True, Console(force_terminal=True))
    assert "](README.md)" in capsys.readouterr().out


def test_explain():
    run = srm("explain", "scan", "f32[2,1024,64]", "f32[2,1024,64]", "None", "reverse=True")
    assert run.returncode == 0
    assert "chosen: numpy" in run.stdout
    assert "reverse=True" in run.stdout
    found = json.loads(srm("explain", "scan", "bf16[1,8,4]", "--json", SRM_BACKEND="reference").stdout)
    assert found["chosen"] == "reference"
    args = ["f32[2,3,4]", "f32[2,3,4]", "f32[3,8]", "f32[3,8]", "f32[3]", "row,col,row", "5"]
    assert srm("explain", "recurrent_step", *args).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["scna", "f32[1]"], ["no operator is called 'scna'", "did you mean 'scan'?"]),
        (["scan", "f32[2,3]"], ["scan: gates: found shape (2, 3)"]),
        (["scan", "f33[2,3,4]"], ["found the dtype 'f33'"]),
        (["scan", "f32[2,3,4]", "backwards=True"], ["has no parameter 'backwards'"]),
        (["scan", "f32[2,3,4]", "reverse=1"], ["reverse: found 1; required True or False"]),
        (["scan"], ["missing a required argument: 'gates'"]),
        (["scan", "%&"], ["'%&'"]),
        (["scan", "{[]: 1}"], ["required an array such as"]),
        (["scan", "f32[1000000000000000000000000,2,3]"], ["cannot be made"]),
        (["scan", "f32[100000000000,1000,30]"], ["cannot be made"]),
        (["scan", "f32[1,1,1]", "--library", "jax"], ["--library: found 'jax'"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_explain_refuses(arguments, parts):
    refused(srm("explain", *arguments), *parts)


def test_report():
    run = srm("report", SRM_BACKEND="numpy")
    assert "SRM_BACKEND numpy" in run.stdout
    facts = json.loads(srm("report", "--json", SRM_BACKEND="numpy").stdout)
    assert facts["environment"] == {"SRM_BACKEND": "numpy"}
    assert facts["versions"]["numpy"]


def test_help_says_what_happens_at_the_window():
    assert "last half window" in " ".join(srm("generate", "--help").stdout.replace("│", "").split())


def test_plain_text_when_not_a_terminal():
    assert "\x1b" not in srm("backends").stdout + srm("report").stdout


@pytest.mark.parametrize(
    "command", [["backends"], ["describe", "scan"], ["generate", "--tokens", "2"]], ids=lambda c: c[0]
)
def test_imports_no_other_array_library(command):
    """Neither listing nor writing text on NumPy loads torch, triton or cupy, installed or not."""
    code = (
        "import sys\nfrom srm_core.cli import main\n"
        f"try: main({command})\nexcept SystemExit as end: assert not end.code, end\n"
        "print('heavy:', sorted({'torch', 'triton', 'cupy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "heavy: []"
