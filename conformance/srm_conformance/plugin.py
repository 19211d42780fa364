"""The pytest plugin: `pytest --pyargs srm_conformance --srm-backend NAME`, and the subclass form.

The items are collected by this module and not by pytest's rules for Python tests, so that what the user has set for
those (names of files, classes and functions, warnings, asyncio) changes nothing. It is loaded into every pytest of an
environment in which the distribution is installed: until it is asked for, it imports nothing of the project.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from srm_conformance.items import Item
    from srm_conformance.session import Ended, Session

HERE = Path(__file__).resolve().parent
SUITE = HERE / "suite.py"
KEY = "srm"  # of what an item reports, in its user properties
STATE = pytest.StashKey["State"]()


class State:
    """What this plugin knows of a run. session: of the command line, None for the subclass form alone."""

    def __init__(self) -> None:
        self.session: Session | None = None
        self.sessions: list[Session] = []
        self.ended: list[Ended] = []
        self.watch: ExitStack | None = None
        self.notes: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("srm", "conformance of a backend of srm-core")
    group.addoption("--srm-backend", metavar="NAME", help="the backend to check, as srm-core backends calls it")
    group.addoption("--srm-op", metavar="OP", action="append", help="only this operator; may be given several times")
    group.addoption("--srm-device", metavar="DEVICE", default="cpu", help="cpu, cuda or mps (default: cpu)")
    group.addoption("--srm-arrays", metavar="LIBRARY", help="numpy, torch or cupy: whose arrays, if not the kernel's")
    group.addoption("--srm-xfails", metavar="FILE", type=Path, help="a TOML file of known failures")
    group.addoption("--srm-certificate", metavar="OUT", type=Path, help="write what was found to this JSON file")
    group.addoption("--srm-only", metavar="ID", default="", help="only items of this id; * stands for any text")
    group.addoption("--srm-profile", metavar="NAME", default="ci", help="ci, or wide: many more random calls")
    group.addoption("--srm-seed", metavar="N", type=int, default=0, help="of the random calls of the profile wide")
    group.addoption("--srm-large", action="store_true", help="also arrays of 2**31 elements: much memory, minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[STATE] = State()
    config.pluginmanager.register(_Collector(config.stash[STATE]), "srm-conformance-reports")
    _rewrite_nothing_else(config)
    if config.option.srm_backend is None:
        return
    from srm_conformance.session import Options, Session
    from srm_core.errors import SRMError

    o = config.option
    options = Options(
        o.srm_backend, o.srm_device, o.srm_arrays, tuple(o.srm_op or ()), o.srm_only, o.srm_xfails, o.srm_profile,
        o.srm_seed, o.srm_large,
    )  # fmt: skip
    try:
        if o.srm_certificate is not None and o.srm_only:
            raise pytest.UsageError("--srm-certificate and --srm-only: a certificate is for whole operators")
        state = config.stash[STATE]
        state.session = Session(options)
        state.sessions.append(state.session)
    except SRMError as error:
        raise pytest.UsageError(str(error)) from None


def _rewrite_nothing_else(config: pytest.Config) -> None:
    """pytest rewrites the assertions of every module of a distribution that has a plugin: here, of all kernels."""
    hook = config.pluginmanager.rewrite_hook
    marked = getattr(hook, "_must_rewrite", None)  # no public way leads there
    if isinstance(marked, set):
        marked -= {name for name in marked if name.partition(".")[0] in ("srm_core", "srm_backends", "srm_conformance")}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    inside = collection_path.is_relative_to(HERE) and collection_path not in (HERE, SUITE)
    return True if inside else None


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return Suite.from_parent(parent, path=file_path) if file_path == SUITE else None


class Suite(pytest.File):
    """The items of `--srm-backend`."""

    def collect(self) -> Iterator[pytest.Item]:
        session = self.config.stash[STATE].session
        if session is None:
            from srm_core.registry import registry

            known = ", ".join(registry().backends)
            raise self.CollectError(f"--srm-backend NAME is needed: which of {known} is to be checked?")
        for item in session.items:
            yield Conforms.from_parent(self, name=item.id, item=item, srm=session)


class Failed(Exception):
    """What an item that failed has to say, without a traceback through the suite."""


class Conforms(pytest.Item):
    """One item of the suite."""

    def __init__(self, *, item: Item, srm: Session, **more: Any) -> None:
        super().__init__(**more)
        self.srm_item, self.srm = item, srm

    def runtest(self) -> None:
        perform(self, self.srm, self.srm_item)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, Failed):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, self.name


def perform(node: pytest.Item, session: Session, item: Item) -> None:
    """Run an item as the test `node`."""
    state = node.config.stash[STATE]
    if state.watch is None:
        from srm_conformance.proof import watched

        state.watch = ExitStack()
        state.watch.enter_context(watched())
    ended = session.run(item)
    node.user_properties.append((KEY, ended.to_json()))
    match ended.verdict:
        case "failed":
            raise Failed(ended.message)
        case "not claimed":
            pytest.skip(f"not claimed: {ended.message}")
        case "xfailed":
            pytest.xfail(ended.message)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, Any, Any]:
    """Kernels are watched, and their memory is poisoned, in our own items alone."""
    result = yield
    state = item.config.stash[STATE]
    if state.watch is not None and not _is_ours(nextitem):
        state.watch.close()
        state.watch = None
    return result


def _is_ours(node: pytest.Item | None) -> bool:
    return isinstance(node, Conforms) or "srm_item" in getattr(node, "fixturenames", ())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a subclass of `Conformance` is run once for each item of its backend."""
    if "srm_item" not in metafunc.fixturenames or metafunc.cls is None:
        return
    from srm_core.errors import SRMError

    try:
        session: Session = metafunc.cls.session()
    except SRMError as error:
        raise pytest.UsageError(f"{metafunc.cls.__name__}: {error}") from None
    sessions = metafunc.config.stash[STATE].sessions
    if session not in sessions:
        sessions.append(session)
    metafunc.parametrize("srm_item", session.items, ids=[i.id for i in session.items])


def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    if report.when == "call" and report.skipped and not hasattr(report, "wasxfail"):
        ours = dict(report.user_properties).get(KEY)
        if isinstance(ours, dict) and ours["verdict"] == "not claimed":
            return "not claimed", "n", "NOT CLAIMED"
    return None


class _Collector:
    """Hears how the items ended, also those that ran in other processes."""

    def __init__(self, state: State) -> None:
        self.state = state

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        ours = dict(report.user_properties).get(KEY) if report.when == "call" else None
        if isinstance(ours, dict):
            from srm_conformance.session import Ended

            self.state.ended.append(Ended(**ours))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    state = session.config.stash[STATE]
    if not state.ended or hasattr(session.config, "workerinput"):
        return
    if not sum(e.launches for e in state.ended) and session.exitstatus in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    path: Path | None = session.config.option.srm_certificate
    if path is None:
        return
    from srm_conformance.certificate import write
    from srm_core.errors import ConfigError

    if len(state.sessions) != 1 or len(state.ended) < len(state.sessions[0].items):
        state.notes.append(f"{path}: not written: a certificate is for one backend, and for a run to its end")
        return
    try:
        write(state.sessions[0], state.ended, path)
        state.notes.append(f"certificate: {path}")
    except (ConfigError, OSError) as error:
        state.notes.append(f"{path}: not written: {error}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[STATE].ended:
        terminalreporter.section("conformance")
        for line in closing_lines(config, shutil.get_terminal_size().columns):
            terminalreporter.write_line(line)


def closing_lines(config: pytest.Config, width: int) -> list[str]:
    """What there is to say at the end of a run: the matrix of each backend, counts, where the certificate is."""
    from srm_conformance.subject import Subject
    from srm_conformance.summary import closing, matrix

    state = config.stash[STATE]
    lines: list[str] = []
    # Not by sessions: those of the subclass form are made in the processes that run them.
    for backend, device in dict.fromkeys((e.backend, e.device) for e in state.ended):
        ended = [e for e in state.ended if (e.backend, e.device) == (backend, device)]
        lines += [*matrix(ended, max(80, width)), "", *closing(Subject(backend, device), ended), ""]
    return lines + state.notes
