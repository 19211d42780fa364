"""The command line: `srm-core`, also `python -m srm_core`. Errors are one line on stderr, and exit code 2."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.table import Table

import srm_core
from srm_core.errors import SRMError
from srm_core.guards import results_only


class _Console(Console):
    """Rich ends the program in silence when the output is closed; `main` says so instead."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


app = App(
    name="srm-core",
    console=_Console(highlight=False),
    help="Recurrent kernels behind one registry. SRM_BACKEND=NAME chooses who computes.",
    version=lambda: srm_core.__version__,
)


def main(argv: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 a check failed, 2 bad input or a closed pipe, 130 interrupted."""
    if sys.stdout is None:
        _fail("standard output is closed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII only
    try:
        code = app(argv, print_error=False, exit_on_error=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would write to the closed pipe once more at exit; give it somewhere to write to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _fail("the reader of the output has closed it")
    except CycloptsError as error:
        _fail(" ".join(str(error).split()).rstrip(".") + "; see srm-core --help")
    except (SRMError, OSError) as error:
        _fail(str(error))
    except MemoryError:
        _fail("not enough memory; ask for less")
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"srm-core: error: {message}", file=sys.stderr)
    sys.exit(2)


@app.command
def generate(
    *,
    prompt: Annotated[list[str] | None, Parameter(negative="")] = None,
    tokens: int = 400,
    batch: int = 1,
    seed: int = 0,
    temperature: float = 0.7,
    top_k: int | None = None,
    backend: str | None = None,
    device: str = "cpu",
    model: Path | None = None,
) -> None:
    """Write text with the model that ships, and tell which backend computed it, why, and how fast.

    The model knows a fixed number of positions (512). Where a text grows past them, it reads its last half
    window anew and goes on from there.

    Parameters
    ----------
    prompt
        What the text begins with; given several times, the prompts are continued together.
    tokens
        How many characters to write.
    batch
        How many texts to write from each prompt.
    seed
        The same seed writes the same text, whatever else is in the batch.
    temperature
        0 takes the likeliest character; higher is more daring.
    top_k
        Choose among the k likeliest characters only.
    backend
        A list such as numpy or triton,auto; default: SRM_BACKEND, else auto.
    device
        cpu (NumPy), or cuda or cuda:1 (CuPy, or else torch).
    model
        A safetensors file with a config and a vocabulary; default: the model that ships.
    """
    from srm_core.commands.generate import START, run

    run([START] if prompt is None else prompt, tokens, batch, seed, temperature, top_k, backend, device, model)


@app.command
def perplexity(
    file: Path, /, *, model: Path | None = None, backend: str | None = None, skip_unknown: bool = False
) -> int:
    """Bits per character of a text, in parallel form and in steps, which must agree (else exit code 1).

    The text is cut into windows of the model's positions; all but each window's first character are predicted.

    Parameters
    ----------
    file
        A UTF-8 text.
    model
        A safetensors file with a config and a vocabulary; default: the model that ships.
    backend
        A list such as numpy or triton,auto; default: SRM_BACKEND, else auto.
    skip_unknown
        Leave out characters that are not in the vocabulary, instead of refusing the text.
    """
    from srm_core.commands.perplexity import run

    return run(file, model, backend, skip_unknown)


@app.command
def convert(
    weights: Path, out: Path, /, *, config: Path | None = None, check: bool = False, force: bool = False
) -> int:
    """Write a torch checkpoint of a recurrent mixer as safetensors with its config, which --model reads.

    Nothing that is in the checkpoint is run. It is a state dict under the original's names, bare, or under
    'state_dict' or 'model_state_dict' beside the model's arguments, 'config'; names may have the prefixes that torch's
    wrappers add. Where the arguments are missing, they are taken from shapes.

    Parameters
    ----------
    weights
        What torch.save has written.
    out
        The file to write, whole or not at all.
    config
        A JSON file of the model's arguments; instead of the checkpoint's own.
    check
        Compare the logits of the torch module and of the file's model on random texts; exit code 1 if they differ.
    force
        Replace OUT if it exists.
    """
    from srm_core.commands.convert import run

    return run(weights, out, config, check, force)


@app.command
def backends(*, json: bool = False, traceback: bool = False) -> None:
    """Operators by backends, with the reason for every gap, and the plugins that could not be used.

    Parameters
    ----------
    json
        Machine-readable.
    traceback
        Show the whole traceback of each plugin that could not be used.
    """
    from srm_core.commands.backends import run

    with results_only():  # what plugins print is no part of the listing
        listing = srm_core.list_backends()
    if json:
        _print_json(
            {
                "backends": listing.backends, "plugins": listing.plugins, "blocked": listing.blocked,
                "quarantined": listing.quarantined, "operators": [vars(c) for c in listing.cells],
            }
        )  # fmt: skip
    else:
        run(listing, traceback, _Console(highlight=False))


@app.command
def explain(
    op: str,
    /,
    *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)],
    backend: str | None = None,
    library: str = "numpy",
    gradients: bool = False,
    json: bool = False,
) -> int:
    """Which backend would run a call, and why each of the others would not. Runs nothing.

    Arguments are arrays such as 'f32[2,1024,64]' (f16, bf16, f32, f64, i32, i64), None, numbers, words such as
    row,col, and options such as reverse=True: srm-core explain scan 'f32[2,1024,64]' 'f32[2,1024,64]'

    Parameters
    ----------
    op
        The operator.
    arguments
        Its arguments in order; NAME=VALUE for options.
    backend
        The selection to explain; default: what the environment says.
    library
        numpy or torch: whose arrays.
    gradients
        Ask for a backward, too.
    json
        Machine-readable.
    """
    from srm_core.commands.explain import parse

    args, options = parse(op, arguments, library)
    decision = srm_core.explain(op, *args, backend=backend, gradients=gradients, **options)
    if json:
        _print_json(
            {
                "op": decision.op, "call": decision.call, "chosen": decision.chosen, "why": decision.why,
                "selection": decision.selection, "source": decision.source,
                "candidates": [
                    {
                        "backend": c.backend, "reasons": [vars(r) for r in c.reasons or ()],
                        "conformance": c.conformance,
                    }
                    for c in decision.candidates
                ],
            }
        )  # fmt: skip
    else:
        console = _Console(highlight=False)
        console.print(decision.call, markup=False, soft_wrap=True)
        console.print(f"chosen: {decision.chosen or 'none'} ({decision.why})", markup=False, soft_wrap=True)
        table = Table("backend", "what it said", "conformance")
        for (name, said), candidate in zip(decision.rows(), decision.candidates, strict=True):
            table.add_row(name, said, candidate.conformance)
        console.print(table)
    return 0 if decision.chosen else 1


@app.command
def conformance(
    name: str,
    /,
    *,
    op: Annotated[list[str] | None, Parameter(negative="")] = None,
    device: str = "cpu",
    arrays: str | None = None,
    xfails: Path | None = None,
    certificate: Path | None = None,
    only: str = "",
    profile: str = "ci",
    seed: int = 0,
    large: bool = False,
    processes: int = 1,
) -> int:
    """Check whether an installed backend is right, and keep its certificate for explain. Exit code 1 if it is not.

    Parameters
    ----------
    name
        The backend, as srm-core backends calls it.
    op
        Only this operator; may be given several times.
    device
        cpu, cuda or mps.
    arrays
        numpy, torch or cupy: whose arrays it is given, if not those that its kernels take natively.
    xfails
        A TOML file of known failures.
    certificate
        Write the certificate here, and not where explain looks for it.
    only
        Only items of this id; * stands for any text. Earns no certificate.
    profile
        ci, or wide: many more random calls.
    seed
        Of the random calls of the profile wide.
    large
        Also arrays of 2**31 elements, which take much memory and minutes.
    processes
        How many to run at once; more than one needs pytest-xdist.
    """
    from srm_core.commands.conformance import check_installed

    check_installed(processes)
    from srm_conformance.command import run
    from srm_conformance.session import Options

    options = Options(name, device, arrays, tuple(op or ()), only, xfails, profile, seed, large)
    return run(options, certificate, processes)


@app.command
def describe(op: str, /, *, markdown: bool = False) -> None:
    """The page of an operator: its formula, arguments, results, errors, and which built-in backends have it.

    Parameters
    ----------
    op
        The operator.
    markdown
        As Markdown, also on a terminal.
    """
    from srm_core.commands.describe import run

    run(op, markdown, _Console(highlight=False))


@app.command
def report(*, json: bool = False) -> None:
    """Versions, devices and the environment variables in force; paste it into a bug report.

    Parameters
    ----------
    json
        Machine-readable.
    """
    facts = srm_core.report(look_for_devices=True)
    if json:
        _print_json(facts)
        return
    table = Table(show_header=False, title="srm-core report")
    for key, value in facts.items():
        rows = value.items() if isinstance(value, dict) else [("", v) for v in value] if isinstance(value, list) else ()
        if not rows:
            table.add_row(key, "none" if value in ({}, []) else str(value))
        for name, item in rows:
            table.add_row(key, f"{name} {'not installed' if item is None else item}".strip())
    _Console(highlight=False).print(table)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))
