"""What `srm-core conformance` does: the suite in this process, with settings of its own, a bar, and the matrix."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from srm_conformance import plugin
from srm_conformance.session import Options, Session
from srm_core import certificates

FAILURES_SHOWN = 20


class _Shown:
    """A pytest plugin that shows a bar in place of pytest's own terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True,
        )  # fmt: skip
        self.task = self.progress.add_task("collecting", total=None)
        self.failures: list[str] = []
        self.config: Any = None

    def pytest_configure(self, config: Any) -> None:
        self.config = config

    def pytest_collection_finish(self, session: Any) -> None:
        self._total(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._total(len(ids))

    def _total(self, count: int) -> None:
        self.progress.update(self.task, total=count or None)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(str(report.longrepr))
        if report.when == "call":
            self.progress.update(self.task, advance=1, description=report.nodeid.rpartition("::")[2][:40].ljust(40))


def run(options: Options, certificate: Path | None, processes: int) -> int:
    """Run the suite and print what it found; the exit code. Errors: `ConfigError`, `UnknownNameError`."""
    Session(options)  # says what is wrong with them, before pytest says it its way
    words = _words(options)
    if certificate is None and not options.only:
        certificate = certificates.path_of(options.backend, options.device)
    if certificate is not None:
        words.append(f"--srm-certificate={certificate}")
    words += [f"-n{processes}", "-p", "xdist"] if processes > 1 else []
    # None of the user's: neither settings, nor plugins, nor options in the environment.
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    fixed = ["-p", plugin.__name__, "-c", str(plugin.HERE / "pytest.ini"), "--rootdir", str(plugin.HERE)]
    fixed += ["-p", "no:terminal", "-p", "no:cacheprovider", "--assert=plain", str(plugin.SUITE)]
    shown = _Shown(Console(stderr=True))
    with shown.progress:
        code = pytest.main([*fixed, *words], plugins=[shown])
    for failure in shown.failures[:FAILURES_SHOWN]:
        print(failure, end="\n\n")
    if len(shown.failures) > FAILURES_SHOWN:
        print(f"and {len(shown.failures) - FAILURES_SHOWN} failures more\n")
    width = Console().width if sys.stdout.isatty() else 100
    for line in plugin.closing_lines(shown.config, width):
        print(line)
    return 0 if code == pytest.ExitCode.OK else 1


def _words(options: Options) -> list[str]:
    named = {
        "backend": options.backend, "device": options.device, "arrays": options.arrays, "xfails": options.xfails,
        "only": options.only, "profile": options.profile, "seed": options.seed,
    }  # fmt: skip
    words = [f"--srm-{name}={value}" for name, value in named.items() if value not in (None, "")]
    return words + [f"--srm-op={op}" for op in options.ops] + ["--srm-large"] * options.large
