"""The triton backend where there is no GPU: in Triton's interpreter, and what it says of such a machine."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from srm_backends.triton import plugin

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None or find_spec("torch") is None, reason="needs triton")


def interpreted(folder: Path, *arguments: Any) -> str:
    """The output of a pytest run in which kernels are interpreted; its failure is one.

    The interpreter's products are NumPy's. OpenBLAS sums them, for newer cores, in an order that depends on the shapes:
    a backward would not find its forward's scores again, as it does on a GPU.
    """
    quiet = "-W", "ignore::DeprecationWarning"  # of NumPy's, for what the interpreter does with sizes
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *quiet, *map(str, arguments)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OPENBLAS_CORETYPE": "Nehalem", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize(
    "items", ["*/values/*", "*/tf32/*", "[a-l]*/[gp]r[ea]di*[et]s/*", "[m-z]*/[gp]r[ea]di*[et]s/*"]
)
def test_the_suite_in_the_interpreter(items: str, tmp_path: Path) -> None:
    """Values, gradients, predicates, TF32, in float32 and float16; its bfloat16 is wrong, and not claimed."""
    out = interpreted(tmp_path, "--pyargs", "srm_conformance", "--srm-backend", "triton", "--srm-only", items)
    assert " 0 failed, 0 failed as expected" in out
    assert "bfloat16" not in out


@needs_triton
@pytest.mark.parametrize("checks", ["check_scan.py", "check_tiles.py"])
def test_small_tiles(checks: str, tmp_path: Path) -> None:
    interpreted(tmp_path, HERE / "interpreted" / checks)


def test_a_machine_without_a_gpu_says_so() -> None:
    (reason,) = plugin.why_not("this torch is built for the CPU alone", None)
    assert reason.code == "no-device"
    assert "built for the CPU alone" in reason.message
    assert reason.hint


def test_an_old_gpu_is_named() -> None:
    (reason,) = plugin.why_not("Tesla T4", (7, 5))
    assert (reason.code, reason.found, reason.required) == ("device-too-old", "7.5", "8.0")
    assert "Tesla T4" in reason.message


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0), (0, 0)])
def test_newer_gpus_and_those_of_other_makers_may_try(capability: tuple[int, int]) -> None:
    assert plugin.why_not("a GPU", capability) == []


@needs_triton
def test_a_kernel_that_cannot_be_compiled_is_named_with_its_configuration() -> None:
    from srm_backends.triton import launch

    from srm_core.errors import KernelError

    class Kernel:
        arg_names = ("x", "BLOCK")

        def fn(self) -> None: ...

        def __getitem__(self, grid: Any) -> Any:
            def run(*arguments: Any, **options: Any) -> None:
                raise RuntimeError("out of resource: shared memory")

            return run

    config = launch.Config((1,), (), (4096,), num_warps=8)
    with pytest.raises(KernelError, match=r"fn\[BLOCK=4096, num_warps=8, num_stages=3\].*out of resource"):
        launch._first(Kernel(), config, (None,), ())


@needs_triton
def test_blocks_and_powers_of_two() -> None:
    from srm_backends.triton.launch import blocks, power_of_2

    assert [blocks(n, 32) for n in (0, 1, 32, 33)] == [0, 1, 1, 2]
    assert [power_of_2(n, 4, 64) for n in (0, 1, 5, 64, 65)] == [4, 4, 8, 64, 64]
