"""The backend for Apple GPUs without one: predicates, dispatch, and its Metal kernels compiled as C++.

The source that torch.mps.compile_shader would be given goes to g++, and its threads run one after the other on CPU
tensors. So the arithmetic, the indices and what the wrappers pass are those of the device; what Apple's compiler and
driver make of them is not tested here.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from srm_conformance.proof import watched  # noqa: E402
from srm_conformance.session import Ended, Options, Session  # noqa: E402

import srm_core  # noqa: E402
from srm_backends.mps import plugin, shaders  # noqa: E402
from srm_core.arrays import LIBRARIES  # noqa: E402
from srm_core.hookspecs import hookimpl  # noqa: E402
from srm_core.registry import local_plugin, registry  # noqa: E402
from srm_core.spec import BackendInfo  # noqa: E402

OPS = ("scan", "recurrent_step")
COMPILER = shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


class AsCpp:
    """What torch.mps.compile_shader returns, of the same source compiled as C++."""

    def __init__(self, source: str, folder: Path) -> None:
        name = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
        library = name.with_suffix(".so")
        if not library.exists():
            name.with_suffix(".cpp").write_text(source)
            flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-o"]
            subprocess.run([COMPILER, *flags, library, name.with_suffix(".cpp")], check=True)
        self._library = ctypes.CDLL(str(library))

    def __getattr__(self, name: str) -> Callable[..., None]:
        function = getattr(self._library, name)

        def kernel(*arguments: Any, threads: tuple[int, ...], group_size: tuple[int, ...]) -> None:
            # What Metal and torch's binding ask for.
            assert len(threads) == len(group_size) <= 3
            assert min(threads) > 0
            assert 0 < torch.tensor(group_size).prod() <= 256
            assert len(arguments) <= 31
            held, pointers = [], []
            for a in arguments:
                if isinstance(a, list):
                    assert a
                    assert all(type(n) is int for n in a)
                    assert 8 * len(a) <= 4096
                    held.append((ctypes.c_int64 * len(a))(*a))
                    pointers.append(ctypes.addressof(held[-1]))
                else:
                    assert a.numel()
                    pointers.append(a.data_ptr())
            grid = (ctypes.c_uint32(n) for n in (*threads, 1, 1)[:3])
            function((ctypes.c_void_p * len(pointers))(*pointers), *grid)

        return kernel


class OnCpu:
    """A plugin `metal`: the two Metal kernels as a backend for CPU tensors."""

    @hookimpl
    def srm_backend_info(self) -> BackendInfo:
        kernels = tuple(
            replace(kernel, platforms=("cpu",), supports=None)
            for kernel in plugin.KERNELS
            if kernel.op in OPS
        )
        return BackendInfo("metal", tech="torch", kernels=kernels)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("metal")


@contextmanager
def compiled(folder: Path, change: Callable[[str], str] = lambda source: source) -> Iterator[None]:
    """Within it, shaders are compiled as C++, after a `change` of their source."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.mps, "compile_shader", lambda source: AsCpp(change(source), folder), raising=False)
        shaders._library.cache_clear()
        try:
            yield
        finally:
            shaders._library.cache_clear()


def ends(only: str, op: str) -> Iterator[Ended]:
    """How the items of the conformance suite end on the kernels as C++."""
    with local_plugin("metal", OnCpu()), watched():
        session = Session(Options("metal", ops=(op,), only=only))
        for item in session.items:
            yield session.run(item)


@needs_compiler
@pytest.mark.parametrize("op", OPS)
def test_the_shaders_arithmetic_conforms(op: str, folder: Path) -> None:
    with compiled(folder):
        found = list(ends("", op))
    assert not [e.message for e in found if e.verdict == "failed"]
    passed = {e.check for e in found if e.verdict == "passed"}
    assert passed >= {"values", "gradients", "layouts", "edges", "threads", "random", "self-test", "invariants"}
    assert {e.dtype for e in found if e.check == "values"} == {"float32", "float16", "bfloat16"}


# Each is one slip in index arithmetic, order or rounding; the suite must see every one of them.
MUTATIONS = {
    "scan": [
        ("b * plan.gate_b", "b * plan.gate_d"),
        ("d * plan.gate_d", "d * plan.gate_t"),
        ("b * plan.token_b + d", "b * plan.token_t + d"),
        ("token[t * plan.token_t]", "token[k * plan.token_t]"),
        ("gate[t * plan.gate_t]", "gate[(length - 1 - k) * plan.gate_t]"),
        ("if (plan.gate_t != 0)", "if (plan.gate_t == 0)"),
        ("length - 1 - k", "plan.steps - 1 - k"),
        ("b * plan.length_stride", "0"),
        ("given > plan.steps", "given >= plan.steps"),
        ("t = length; t < plan.steps", "t = length; t + 1 < plan.steps"),
        ("b * plan.state_b + d * plan.state_d", "d * plan.state_b + b * plan.state_d"),
        ("b * plan.last_b", "0 * plan.last_b"),
        ("? 0.0f : 1.0f", "? 0.0f : 0.0f"),
        ("s = g * s;", "s = float(X(g * s));"),
        ("long token_b, token_t, token_d;", "long token_t, token_b, token_d;"),
        ("bytes == 4", "bytes != 4"),
    ],
    "recurrent_step": [
        ("b * plan.index_stride", "0"),
        ("position >= 0 &&", ""),
        ("position < plan.positions", "position <= plan.positions"),
        ("position < plan.positions", "position + 1 < plan.positions"),
        ("h * plan.weight_h + position * plan.weight_l", "h * plan.weight_l + position * plan.weight_h"),
        ("position * plan.bias_l", "plan.bias_l"),
        ("decay[h * plan.decay_h]", "decay[0]"),
        ("h / 32", "h / 2"),
        ("h % 32", "(h + 1) % 32"),
        ("h * plan.state_h", "h * plan.state_d"),
        ("b * plan.x_b", "b * plan.x_h"),
        ("new_state[b * plan.new_b", "new_state[b * plan.new_h"),
        ("row ? after : weight_here * after", "row ? weight_here * after : after"),
        ("float weight_here = NAN, bias_here = NAN", "float weight_here = 0, bias_here = 0"),
        ("const float after", "const X after"),
        ("long x_b, x_h, x_d;", "long x_h, x_b, x_d;"),
    ],
}


def survivors(op: str, folder: Path) -> list[str]:
    """The mutations that the suite does not see. Each runs in a fork: a stray write may end the process."""
    alive = []
    for old, new in MUTATIONS[op]:
        child = os.fork()
        if child == 0:
            with suppress(BaseException), compiled(folder, lambda source: _changed(source, old, new)):  # noqa: B023
                os._exit(any(e.verdict == "failed" for e in ends(f"{op}/[vl][a]*", op)))
            os._exit(2)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 1:
            alive.append(f"{old} -> {new}" + (" could not be tried" if os.WEXITSTATUS(status) else ""))
    return alive


def _changed(source: str, old: str, new: str) -> str:
    assert old in source, "the source has changed: mend the mutation"
    return source.replace(old, new)


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
@pytest.mark.parametrize("op", OPS)
def test_a_slip_in_a_shader_is_seen(op: str, folder: Path) -> None:
    code = f"from pathlib import Path; import test_mps; print(test_mps.survivors({op!r}, Path({str(folder)!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-2000:]
