"""The conformance suite: what it reports, what it refuses, and that it cannot pass without having run a kernel."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from srm_conformance import certificate
from srm_conformance.layouts import LAYOUTS, PLAIN, Placed, extent, overlap
from srm_conformance.outcome import Report, Wrong
from srm_conformance.profile import Looser, Profile
from srm_conformance.proof import PoisonedContext, recording, watched
from srm_conformance.session import Ended, Options, Session
from srm_conformance.summary import closing, matrix
from srm_conformance.tolerances import Judge
from srm_conformance.xfails import Xfail, matching, read, unmatched

import srm_core
from srm_core import certificates
from srm_core.config import CURRENT
from srm_core.context import LaunchContext
from srm_core.hookspecs import hookimpl
from srm_core.ops import SPECS
from srm_core.registry import local_plugin, registry
from srm_core.spec import BackendInfo, Given, Kernel, Reason

HERE = "test_conformance"
TOMORROW = date(2999, 1, 1)


class Plugin:
    """A backend `mine` of one kernel for `mdi`, whose functions are those of this module."""

    def __init__(self, profile: Any = None, **fields: Any) -> None:
        self.profile = profile
        self.kernel = Kernel("mdi", f"{HERE}:right", f"{HERE}:right_backward")
        self.kernel = replace(self.kernel, **fields)

    @hookimpl
    def srm_backend_info(self) -> BackendInfo:
        return BackendInfo("mine", tech="numpy", kernels=(self.kernel,))

    @hookimpl
    def srm_conformance_profile(self, backend: str) -> Any:
        return self.profile


def right(ctx: Any, *args: Any, **options: Any) -> Any:
    from srm_backends.numpy import mdi

    return mdi.forward(ctx, *args, **options)


def right_backward(ctx: Any, residuals: Any, *grads: Any) -> Any:
    from srm_backends.numpy import mdi

    return mdi.backward(ctx, residuals, *grads)


def off(ctx: Any, *args: Any, **options: Any) -> Any:
    h_new, gamma = right(ctx, *args, **options)
    h_new += np.ones((), h_new.dtype) * (np.arange(h_new.size).reshape(h_new.shape) == h_new.size - 1)
    return h_new, gamma


def elsewhere(ctx: Any, *args: Any, **options: Any) -> Any:
    return srm_core.mdi(*args, backend="reference", **options)


def raises(ctx: Any, *args: Any, **options: Any) -> Any:
    raise OSError("the device has gone")


def lists(ctx: Any, *args: Any, **options: Any) -> Any:
    return list(right(ctx, *args, **options))


def writes_beside(ctx: Any, z: Any, *args: Any, **options: Any) -> Any:
    if z.size:
        beside = np.ndarray((1,), z.dtype, z.base, z.nbytes if z.base is not None else 0)
        beside[...] = 0
    return right(ctx, z, *args, **options)


MODULATION = Given("modulation_logits")


def without_modulation(view: Any) -> list[Reason]:
    return [Reason("modulation", "takes no modulation")] if view[MODULATION] else []


def never(view: Any) -> list[Reason]:
    return [Reason("no", "not today")]


def undeclared(view: Any) -> list[Reason]:
    return [Reason("no", "no")] if view[Given("nothing")] else []


def mumbling(view: Any) -> list[Reason]:
    return [Reason("no", " ")] if view[MODULATION] else []


@contextmanager
def session(profile: Any = None, options: dict[str, Any] | None = None, **fields: Any) -> Iterator[Session]:
    with local_plugin("mine", Plugin(profile, **fields)):
        yield Session(Options("mine", **{"ops": ("mdi",), **(options or {})}))


def ends(only: str = "", profile: Any = None, **fields: Any) -> dict[str, Ended]:
    """How the items of a backend end, by id."""
    with session(profile, {"only": only}, **fields) as one, watched():
        return {i.id: one.run(i) for i in one.items}


def end(only: str, **fields: Any) -> Ended:
    (one,) = ends(only, **fields).values()
    return one


def test_a_right_kernel_passes_every_check() -> None:
    found = ends(dtypes=("float32", "float16"))
    assert {e.verdict for e in found.values()} == {"passed"}
    assert {e.check for e in found.values()} >= {"values", "gradients", "layouts", "threads", "random", "self-test"}
    assert all(0 < e.worst <= 1 for e in found.values() if e.check == "values" and "no" not in e.id)
    assert found["mdi/values/small/float32"].launches == 1


def test_a_failure_says_what_where_how_it_was_derived_and_how_to_see_it_again() -> None:
    one = end("mdi/values/small/float32", forward=f"{HERE}:off")
    assert one.verdict == "failed"
    about, *lines, command = one.message.splitlines()
    assert about == "mdi on mine (cpu), values: small, float32"
    pattern = (
        r"h_new: row error \S+ > \S+ = .*(eps of float32|rounding model); worst at \[\d.*\]: got \S+, expected \S+"
    )
    assert any(re.fullmatch(pattern, line) for line in lines), lines
    assert (
        command == "reproduce: pytest --pyargs srm_conformance --srm-backend mine --srm-only mdi/values/small/float32"
    )


@pytest.mark.parametrize(
    ("forward", "only", "message"),
    [
        ("elsewhere", "mdi/values/small/float32", "ran; required test_conformance:elsewhere, once"),
        ("raises", "mdi/values/small/float32", "it said yes, and raised OSError: the device has gone"),
        ("lists", "mdi/values/small/float32", "it returned a list; required a tuple"),
        ("writes_beside", "mdi/values/small/float32", "it wrote to z: memory beside it"),
    ],
)
def test_what_a_kernel_may_not_do(forward: str, only: str, message: str) -> None:
    one = end(only, forward=f"{HERE}:{forward}")
    assert (one.verdict, message in one.message) == ("failed", True), one.message


def test_what_is_not_declared_is_not_claimed() -> None:
    found = ends("mdi/[vgd]*", backward=None, deterministic=False, supports=f"{HERE}:without_modulation",
                 features=(MODULATION,), dtypes=("float32",))  # fmt: skip
    assert found["mdi/gradients/small/float32"].verdict == "not claimed"
    assert found["mdi/gradients/small/float32"].message == "has no backward"
    assert found["mdi/determinism/small/float32"].message == "is not declared deterministic"
    by_case = {e.verdict for i, e in found.items() if i.startswith("mdi/values")}
    assert by_case == {"passed", "not claimed"}
    assert "mdi/values/small/bfloat16" not in found


@pytest.mark.parametrize(
    ("supports", "message"),
    [
        ("never", "it declares float32, and takes none of"),
        ("undeclared", "the predicate reads 'given(nothing)', which is not declared"),
        ("mumbling", "a no must have reasons that people understand"),
        ("nothing", "a no must have reasons, but its predicate raised"),
    ],
)
def test_predicates_that_lie(supports: str, message: str) -> None:
    one = end("mdi/predicates/float32", supports=f"{HERE}:{supports}", features=(MODULATION,))
    assert one.verdict == "failed"
    assert message in one.message


def test_a_backend_without_the_operator_claims_nothing() -> None:
    with session(options={"ops": ("scan",)}) as one:
        (item,) = one.items
        assert one.run(item).message == "it has no kernel for it"


def test_a_kernel_for_another_device_claims_nothing() -> None:
    one = end("mdi/*", platforms=("cuda",))
    assert one.verdict == "not claimed"
    assert "on cuda; none of these libraries is installed and sees cpu" in one.message


def test_the_self_test_sees_a_suite_that_cannot_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Judge, "forward", lambda *_: [])
    one = end("mdi/self-test/damaged")
    assert "one element was damaged, and the suite did not notice" in one.message


def test_each_self_test_damages_every_operator() -> None:
    with watched():
        for op in SPECS:
            one = Session(Options("numpy", only=f"{op}/self-test/damaged"))
            ended = one.run(one.items[0])
            assert (ended.verdict, ended.launches) == ("passed", 1), ended


def test_poison_and_recording() -> None:
    context: Any = PoisonedContext(LaunchContext("numpy", "cpu", CURRENT.get()))
    assert np.isnan(context.empty((3,), "float32")).all()
    assert np.isnan(context.scratch((3,), "bfloat16").astype("float32")).all()
    assert (context.empty((3,), "int32") == 2**31 - 1).all()
    assert (context.zeros((3,), "float32") == 0).all()
    assert context.empty((2,), "bool").all()
    x = np.ones((1, 1, 1), np.float32)
    with watched():
        with recording() as launches:
            srm_core.scan(x, x)
            thread = threading.Thread(target=lambda: srm_core.scan(x, x))  # records for itself
            thread.start()
            thread.join()
        assert launches == ["srm_backends.numpy.scan:forward"]
    with recording() as launches:
        srm_core.scan(x, x)
    assert not launches


# Known failures.


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


ENTRY = '[[xfail]]\nid = "{}"\nreason = "rounds twice"\nexpires = {}\n'


def test_known_failures_are_strict(tmp_path: Path) -> None:
    """One that fails is expected; one that passes is a failure; one that matches nothing, or has expired, an error."""
    file = write(tmp_path / "known.toml", ENTRY.format("mdi/values/small/*", TOMORROW))
    options = {"xfails": file, "only": "mdi/values/small/float32"}
    for forward, verdict, text in (("off", "xfailed", "rounds twice"), ("right", "failed", "expected to fail")):
        with session(None, options, forward=f"{HERE}:{forward}") as one, watched():
            ended = one.run(one.items[0])
            assert (ended.verdict, text in ended.message) == (verdict, True)
    write(file, ENTRY.format("mdi/values/smal/*", TOMORROW))
    with pytest.raises(srm_core.ConfigError, match=r"mdi/values/smal/\* matches no item of backend 'mine'"):
        session(None, options).__enter__()
    write(file, ENTRY.format("mdi/values/small/*", "2020-01-01"))
    with pytest.raises(srm_core.ConfigError, match="expired on 2020-01-01; look whether it still fails"):
        read(file, "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id = 3", "found id; required \\[\\[xfail\\]\\] entries alone"),
        ("[[xfail", "cannot be read as TOML"),
        ('[[xfail]]\nid = "a"\nreason = "b"', "entry 1: expires: found None; required a day such as"),
        ('[[xfail]]\nid = "a"\nreason = " "\nexpires = 2999-01-01', "entry 1: reason: found ' '; required a text"),
        ('[[xfail]]\nid = "a"\nreason = "b"\nexpires = "never"', "expires: found 'never'"),
        ('[[xfail]]\nid = "a"\nreason = "b"\nexpires = 2999-01-01\nuntil = 1', "required id, reason, expires"),
    ],
)
def test_what_is_no_list_of_known_failures(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(srm_core.ConfigError, match=message):
        read(write(tmp_path / "known.toml", text), "cpu")


def test_known_failures_of_another_device_are_left_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "known.toml", ENTRY.format("scan/*", TOMORROW) + 'device = "cuda"\n')
    assert read(file, "cpu") == []
    assert read(file, "cuda") == [Xfail("scan/*", "rounds twice", TOMORROW, "cuda")]
    assert matching(read(file, "cuda"), "scan/values/small/float32") is not None
    assert matching(read(file, "cuda"), "mdi/values/small/float32") is None
    assert unmatched(read(file, "cuda"), ["mdi/values"]) == read(file, "cuda")


# Options, profiles.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "mime"}, "no backend is called 'mime'.*did you mean 'mine'"),
        ({"ops": ("scam",)}, "--srm-op: no operator is called 'scam'.*did you mean 'scan'"),
        ({"device": "tpu"}, "--srm-device: found 'tpu'; required one of cpu, cuda, mps"),
        ({"device": "mps"}, "--srm-device mps: no array library that is installed sees such a device"),
        ({"arrays": "cupy"}, "--srm-arrays: found 'cupy'; required one of numpy, torch"),
        ({"profile": "long"}, "--srm-profile: found 'long'; required one of ci, wide"),
        ({"only": "mdi/nothing/*"}, "--srm-only 'mdi/nothing/\\*': no item of backend 'mine' is called so"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with (
        local_plugin("mine", Plugin()),
        pytest.raises((srm_core.ConfigError, srm_core.UnknownNameError), match=message),
    ):
        Session(Options(**{"backend": "mine", **options}))


def test_a_looser_operator_says_why() -> None:
    profile = Profile({"mdi": Looser(1e9, "the device has no float32")})
    with session(profile, {"only": "mdi/values/small/float32"}, forward=f"{HERE}:off") as one, watched():
        ended = one.run(one.items[0])
        assert ended.verdict == "passed"
        text = "mdi: may be wrong by 1e+09 times what is allowed: the device has no float32"
        assert text in closing(one.subject, [ended])
    for wrong in ((0.5, "why"), (2, " ")):
        with pytest.raises(ValueError, match="required a factor above 1 and a reason"):
            Looser(*wrong)
    with pytest.raises(srm_core.ConfigError, match="srm_conformance_profile returned int"):
        session(7).__enter__()


# What is shown, and kept.


def ended(op: str, check: str, verdict: Any, launches: int = 1, dtype: str = "float32", worst: float = 0.5) -> Ended:
    return Ended("mine", "cpu", f"{op}/{check}/x", op, check, dtype, verdict, "", worst, "y", launches)


def test_the_matrix() -> None:
    found = [
        ended("scan", "values", "passed"), ended("scan", "values", "failed"), ended("mdi", "values", "xfailed"),
        ended("mdi", "gradients", "not claimed", 0),
    ]  # fmt: skip
    assert [line.split() for line in matrix(found)[:3]] == [
        ["operator", "values", "gradients", "verdict"],
        ["scan", "1+1F", "-", "failed"],
        ["mdi", "1x", "1n", "known", "failures"],
    ]
    narrow = matrix(found, 20)
    assert [line.split()[1:] for line in narrow if line.startswith("operator")] == [
        ["values"],
        ["gradients", "verdict"],
    ]


def test_the_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it holds, that damage to it is seen, and what `explain` makes of it."""
    monkeypatch.setenv("SRM_CACHE_DIR", str(tmp_path))
    entry = registry().kernels["mdi"]["numpy"]
    assert certificates.verdict(entry, "cpu") == "not checked"
    one = Session(Options("numpy", ops=("mdi",)))
    path = certificates.path_of("numpy", "cpu")
    found = [ended("mdi", "values", "passed", worst=0.25), ended("mdi", "layouts", "not claimed", 0, worst=0)]
    certificate.write(one, found, path)
    body = certificates.read(path)
    assert (body["backend"], body["distribution"], body["device"], body["launches"]) == ("numpy", "srm-core", "cpu", 1)
    assert body["suite"] == {"version": srm_core.__version__, "digest": certificate.suite_digest()}
    mdi = body["operators"]["mdi"]
    assert (mdi["verdict"], mdi["run"], mdi["passed"], mdi["not_claimed"]) == ("passed", 1, 1, 1)
    assert mdi["dtypes"]["float32"]["worst"] == 0.25
    assert certificates.verdict(entry, "cpu") == f"passed (1 of 1 checks, {body['created'][:10]})"
    assert certificates.verdict(registry().kernels["scan"]["numpy"], "cpu") == "not checked"
    candidate, *_ = srm_core.explain("mdi", *(np.ones(2),) * 4).candidates
    assert candidate.conformance.startswith("passed")
    path.write_text(path.read_text().replace('"passed": 1', '"passed": 2'))
    with pytest.raises(srm_core.ConfigError, match="does not fit its digest"):
        certificates.read(path)
    assert certificates.verdict(entry, "cpu") == "its certificate cannot be read"
    body["version"] = "0.0.1"
    del body["digest"]
    path.write_text(json.dumps({**body, "digest": certificates.digest(body)}))
    assert certificates.verdict(entry, "cpu") == "checked as srm-core 0.0.1, not as it is installed"
    with pytest.raises(srm_core.ConfigError, match="a certificate is for whole operators"):
        certificate.certificate(Session(Options("numpy", only="mdi/values/*")), found)


@pytest.mark.parametrize(
    ("verdicts", "verdict"),
    [
        (["passed", "not claimed"], "passed"), (["passed", "failed", "xfailed"], "failed"),
        (["passed", "xfailed"], "known failures"), (["not claimed"], "not claimed"),
    ],
)  # fmt: skip
def test_verdicts(verdicts: list[Any], verdict: str) -> None:
    found = [ended("mdi", "values", v, launches=v != "not claimed") for v in verdicts]
    assert certificate.verdict_of(found) == verdict


# Layouts.


@pytest.mark.parametrize("layout", [PLAIN, *LAYOUTS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4), (2, 3, 4, 5), (0, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64", "bool"])
def test_layouts_hold_values_and_see_writes(layout: Any, library: str, shape: tuple[int, ...], dtype: str) -> None:
    if library not in layout.libraries:
        pytest.skip(f"{library} has no such arrays")
    torch = pytest.importorskip("torch") if library == "torch" else None
    values = layout.of(np.arange(np.prod(shape)).reshape(shape).astype(dtype))
    placed = Placed(values, layout, library, torch.device("cpu") if torch else "cpu")
    assert tuple(placed.view.shape) == shape
    assert placed.value().tobytes() == values.tobytes()
    assert placed.touched(within=True) == ""
    other = Placed(values, layout, library, torch.device("cpu") if torch else "cpu")
    assert not overlap(extent(placed.view), extent(other.view))
    if not values.size or not layout.writeable:
        return
    assert overlap(extent(placed.view), extent(placed.view))
    placed.view[(0,) * len(shape)] = 0 if dtype == "bool" and values.flat[0] else 1
    assert (placed.touched(within=True), placed.touched(within=False)) == ("its elements", "")


def test_layouts_are_what_they_are_called() -> None:
    values = np.zeros((2, 3, 4, 5), np.float32)
    views = {x.name: Placed(x.of(values), x, "numpy", "cpu").view for x in LAYOUTS}
    assert views["fortran"].flags.f_contiguous
    assert views["channels_last"].transpose(0, 2, 3, 1).flags.c_contiguous
    assert views["time_major"].transpose(1, 0, 2, 3).flags.c_contiguous
    assert views["strided"].strides == (480, 160, 40, 8)
    assert not views["misaligned"].flags.aligned
    assert not views["read_only"].flags.writeable
    assert views["reversed"].strides == (-240, -80, -20, -4)
    assert (views["stride_0_first"].strides[0], views["stride_0_last"].strides[-1]) == (0, 0)


# The judge.


def test_a_row_that_cancels_does_not_hide_the_others() -> None:
    """float32 causal attention: a gradient of the first step is 0 but for rounding, and its row error enormous."""
    spec = SPECS["attention"]
    case = next(c for c in spec.cases if c.settings.get("is_causal") and c.dims["T"] > 8)
    args, options = spec.sample(case, "float32")
    out, pullback = srm_core.vjp("attention", *args, **options)
    grad = np.random.default_rng(0).standard_normal(out.shape).astype(out.dtype)
    judge, gradients = Judge(spec, args, options), list(pullback(grad))
    assert all(j.ok for j in judge.backward([grad], gradients))
    gradients[0] = gradients[0].copy()
    gradients[0][0, 0, -1, 0] += 1e-3
    wrong = [j for j in judge.backward([grad], gradients) if not j.ok]
    assert "peak" in {j.measure for j in wrong}


def test_a_report_keeps_the_worst() -> None:
    spec = SPECS["scan"]
    args, options = spec.sample(spec.cases[0], "float32")
    judge, report = Judge(spec, args, options), Report()
    outputs = srm_core.scan(*args, **options)
    report.judge(judge.forward(outputs))
    assert 0 < report.worst <= 1
    with pytest.raises(Wrong, match="thread 3: y: "):
        report.judge(judge.forward((outputs[0] + 1, outputs[1])), "thread 3")


# As a user runs it.

MODULE = """
from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel, Reason

@hookimpl
def srm_backend_info():
    kernel = Kernel("mdi", "theirs:{forward}", dtypes=("float32",))
    return BackendInfo("theirs", tech="numpy", kernels=(kernel,))

def right(ctx, *args, **options):
    from srm_backends.numpy import mdi
    return mdi.forward(ctx, *args, **options)

def wrong(ctx, *args, **options):
    h_new, gamma = right(ctx, *args, **options)
    h_new *= 2
    return h_new, gamma

@hookimpl
def srm_probe(backend):
    return [{probe}]
"""
HOSTILE = """
[pytest]
python_files = check_*.py
python_classes = Check
python_functions = check_*
addopts = --strict-markers --strict-config -x --import-mode=importlib -p no:cacheprovider
filterwarnings = error
xfail_strict = true
"""


@pytest.fixture
def outside(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`outside(*words)` runs a program where the backend `theirs` is installed, with settings of its own."""

    def run(*words: str, forward: str = "right", probe: str = "") -> subprocess.CompletedProcess[str]:
        info = tmp_path / "site" / "theirs-1.0.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        write(info / "METADATA", "Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
        write(info / "entry_points.txt", "[srm_core.backends]\ntheirs = theirs\n")
        write(info.parent / "theirs.py", MODULE.format(forward=forward, probe=probe))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SRM_", "PYTEST_"))}
        environment = {"PYTHONPATH": str(info.parent), "SRM_CACHE_DIR": str(tmp_path / "cache")}
        return subprocess.run(
            [sys.executable, "-m", *words], env={**inherited, **environment}, cwd=tmp_path, capture_output=True,
            text=True, timeout=120, check=False,
        )  # fmt: skip

    return run


SUITE = ("pytest", "--pyargs", "srm_conformance", "--srm-backend", "theirs", "--srm-op", "mdi")


def test_pytest_under_settings_of_ones_own(outside: Any, tmp_path: Path) -> None:
    write(tmp_path / "pytest.ini", HOSTILE)
    done = outside(*SUITE, "--srm-certificate", "out.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed" in done.stdout
    assert "gradients" in done.stdout
    found = certificates.read(tmp_path / "out.json")
    assert (found["distribution"], found["version"]) == ("theirs", "1.0")
    assert found["operators"]["mdi"]["verdict"] == "passed"
    done = outside(*SUITE, "-v", "--srm-only", "mdi/*/small/float32", forward="wrong")
    assert done.returncode == 1
    assert "h_new: Frobenius error" in done.stdout
    reproduce = next(line for line in done.stdout.splitlines() if line.startswith("reproduce: ")).split()[1:]
    again = outside(*(w.strip("'") for w in reproduce), forward="wrong")
    assert (again.returncode, "1 failed" in again.stdout) == (1, True), again.stdout


def test_nothing_ran_is_a_failure(outside: Any) -> None:
    done = outside(*SUITE, probe="Reason('none', 'no device')")
    assert done.returncode == 1
    assert "no kernel ran, so nothing is proved" in done.stdout
    assert "NOT CLAIMED" not in done.stdout
    assert "1 not claimed" in done.stdout
    assert "no backend is called 'thers'" in outside(*SUITE[:-4], "--srm-backend", "thers").stderr
    assert "--srm-backend NAME is needed" in outside(*SUITE[:3]).stdout


def test_the_subclass_form(outside: Any, tmp_path: Path) -> None:
    """Beside other tests, whose kernels are neither watched nor poisoned."""
    write(tmp_path / "test_theirs.py", """
import numpy as np, srm_core
from srm_conformance import Conformance

class TestTheirs(Conformance):
    backend = "theirs"
    ops = ("mdi",)

def test_another():
    seen = []
    assert "poison" not in type(srm_core.bind("mdi", *(np.ones(2),) * 4)).__name__
    from srm_core import registry
    assert registry._wrap is None
""")  # fmt: skip
    done = outside("pytest", "-q")
    assert done.returncode == 0, done.stdout
    assert "mdi" in done.stdout
    done = outside("pytest", "-q", "-k", "values and small", forward="wrong")
    assert "h_new: Frobenius error" in done.stdout
    assert done.returncode == 1


def test_the_command(outside: Any, tmp_path: Path) -> None:
    done = outside("srm_core", "conformance", "theirs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "certificate: " in done.stdout
    explained = outside("srm_core", "explain", "mdi", *("f32[2]",) * 4, "--backend", "theirs")
    assert "passed (" in explained.stdout
    write(tmp_path / "pytest.ini", "[pytest]\naddopts = --no-such-option\n")
    done = outside("srm_core", "conformance", "theirs", "--op", "mdi", forward="wrong")
    assert (done.returncode, "h_new: Frobenius error" in done.stdout) == (1, True), done.stderr
    done = outside("srm_core", "conformance", "theirs", "--only", "nix")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("srm-core: error: --srm-only 'nix'")


def test_assertions_of_kernels_are_not_rewritten(outside: Any, tmp_path: Path) -> None:
    write(tmp_path / "test_loaders.py", """
import srm_core.dispatch, srm_backends.numpy.scan
def test_loaders():
    for module in (srm_core.dispatch, srm_backends.numpy.scan):
        assert "Assertion" not in type(module.__loader__).__name__
""")  # fmt: skip
    done = outside("pytest", "-q")
    assert done.returncode == 0, done.stdout


def test_the_plugin_imports_nothing_until_it_is_asked(outside: Any, tmp_path: Path) -> None:
    write(tmp_path / "test_modules.py", """
import sys
def test_modules():
    assert not {"srm_core", "numpy", "hypothesis.strategies"} & set(sys.modules)
""")  # fmt: skip
    done = outside("pytest", "-q", "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout
