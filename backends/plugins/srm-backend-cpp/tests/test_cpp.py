"""What the conformance suite does not ask: threads, forks, levels of the instruction set, tensors without copies."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from srm_backend_cpp import _cpu, native, scan

import srm_core

LARGE = (2, 300, 700)  # enough work for several threads
DIGEST = """
import hashlib, numpy as np, srm_core
rng, digest = np.random.default_rng(0), hashlib.sha256()
normal = lambda *shape: rng.standard_normal(shape, np.float32)
def run(op, *args):
    outputs, pullback = srm_core.vjp(op, *args, backend="cpp")
    for array in (*outputs, *pullback(*map(np.ones_like, outputs))):
        digest.update(b"" if array is None else array.tobytes())
run("scan", normal(2, 300, 1), normal(2, 300, 700))
run("recurrent_mix", normal(2, 70, 6, 130), normal(6, 70), normal(6, 70), normal(6), ("row", "col") * 3)
run("mdi_recurrence", normal(5, 6, 200), normal(5, 6, 200), normal(5, 200), normal(200, 200), normal(200),
    normal(200, 400), normal(200))
run("lstm", normal(1, 6, 70), normal(1200, 70), normal(1200, 300))
print(digest.hexdigest())
"""


def python(code: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=300
    )
    return done.stdout.strip() or done.stderr.strip()


def large() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.uniform(0.5, 1, LARGE), rng.standard_normal(LARGE)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    digests = {python(DIGEST, OMP_NUM_THREADS=str(n), OMP_DYNAMIC="false") for n in (1, 2, 3, 7)}
    assert len(digests) == 1, digests
    assert len(digests.pop()) == 64


@pytest.mark.parametrize("level", [name for name, level in native.LEVELS.items() if level <= _cpu.level()])
def test_each_level_is_right(level: str) -> None:
    code = """if 1:
        import numpy as np, srm_core
        from srm_backend_cpp.native import kernels
        a = np.linspace(0.5, 1, 2 * 50 * 33).reshape(2, 50, 33)
        assert np.allclose(*(srm_core.scan(a, a, backend=b)[0] for b in ("cpp", "reference")), rtol=1e-12)
        print(kernels.__name__)"""
    assert python(code, SRM_CPP_LEVEL=level) == f"srm_backend_cpp._{level}"


def test_the_probe_says_what_is_wrong_with_a_level() -> None:
    code = "import srm_core; print(*srm_core.list_backends().cell('scan', 'cpp').reasons)"
    assert "SRM_CPP_LEVEL=v9: there are only v4, v3, base" in python(code, SRM_CPP_LEVEL="v9")


def test_the_environment_is_as_it_was() -> None:
    code = "import os; from srm_backend_cpp import native; print('GOMP_SPINCOUNT' in os.environ)"
    assert python(code) == "False"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_a_fork_works_after_threads_were_used() -> None:
    expected = srm_core.scan(*large(), backend="cpp")[0]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(srm_core.scan(*large(), backend="cpp")[0], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_tensors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    seen: list[int] = []

    class Watch:
        @staticmethod
        def scan(gates, tokens, lengths, reverse, state, y) -> None:  # type: ignore[no-untyped-def]
            seen.extend(a.__array_interface__["data"][0] for a in (gates, tokens, state, y))
            native.kernels.scan(gates, tokens, lengths, reverse, state, y)

    monkeypatch.setattr(scan, "kernels", Watch)
    gates, tokens = torch.rand(300, 2, 64).transpose(0, 1), torch.randn(2, 300, 64)
    y, state = srm_core.scan(gates, tokens, backend="cpp")
    assert seen == [a.data_ptr() for a in (gates, tokens, state, y)]
