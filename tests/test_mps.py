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

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from srm_backends.mps import plugin, shaders  # noqa: E402
from srm_conformance.proof import watched  # noqa: E402
from srm_conformance.session import Ended, Options, Session  # noqa: E402
from srm_conformance.tolerances import judge_forward  # noqa: E402

import srm_core  # noqa: E402
from srm_core.arrays import LIBRARIES, numpy_to_torch, torch_to_numpy  # noqa: E402
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
            flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-o"]
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
            replace(kernel, platforms=("cpu",), supports=None) for kernel in plugin.KERNELS if kernel.op in OPS
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
        shaders.library.cache_clear()
        try:
            yield
        finally:
            shaders.library.cache_clear()


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
        ("b * plan.token_b + d", "b * plan.token_t + d"),
        ("token[t * plan.token_t]", "token[k * plan.token_t]"),
        ("gate[t * plan.gate_t]", "gate[(length - 1 - k) * plan.gate_t]"),
        ("if (plan.gate_t != 0)", "if (plan.gate_t == 0)"),
        ("length - 1 - k", "plan.steps - 1 - k"),
        ("b * plan.length_stride", "0"),
        ("k < length", "k + 1 < length"),
        ("t = length; t < plan.steps", "t = length; t + 1 < plan.steps"),
        ("b * plan.state_b + d * plan.state_d", "d * plan.state_b + b * plan.state_d"),
        ("? 0.0f : 1.0f", "? 0.0f : 0.0f"),
        ("s = g * s;", "s = float(X(g * s));"),
        ("long token_b, token_t, token_d;", "long token_t, token_b, token_d;"),
    ],
    "recurrent_step": [
        ("b * plan.index_stride", "0"),
        ("position < plan.positions", "position <= plan.positions"),
        ("position < plan.positions", "position + 1 < plan.positions"),
        ("h * plan.weight_h + position * plan.weight_l", "h * plan.weight_l + position * plan.weight_h"),
        ("decay[h * plan.decay_h]", "decay[0]"),
        ("h / 32", "h / 2"),
        ("h % 32", "(h + 1) % 32"),
        ("h * plan.state_h", "h * plan.state_d"),
        ("new_state[b * plan.new_b", "new_state[b * plan.new_h"),
        ("row ? after : weight_here * after", "row ? weight_here * after : after"),
        ("float weight_here = NAN, bias_here = NAN", "float weight_here = 0, bias_here = 0"),
        ("float(decay[h * plan.decay_h]) * before", "float(X(float(decay[h * plan.decay_h]) * before))"),
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
                shaders.library()  # or it does not compile, which proves nothing
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


@needs_compiler
@pytest.mark.parametrize("given", ["everything", "gates", "constant gates"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_scans_gradient_has_a_gradient(given: str, reverse: bool, folder: Path) -> None:
    """Of the Metal kernel, in float32, against torch's own operations in float64."""
    generator = torch.Generator().manual_seed(0)
    gates = torch.rand((2, 1 if given == "constant gates" else 9, 3), generator=generator, dtype=torch.float64)
    tokens, state = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(2, 9, 3), (2, 3)])
    arrays = [gates] if given == "gates" else [gates, tokens, state]

    def second(dtype: torch.dtype, backend: str) -> list[Any]:
        inputs = [a.to(dtype).requires_grad_() for a in arrays]
        y, last = srm_core.scan(*inputs, reverse=reverse, lengths=torch.tensor([9, 4]), backend=backend)
        first = torch.autograd.grad(y.square().sum() + last.sin().sum(), inputs, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]

    with compiled(folder), local_plugin("metal", OnCpu()):
        for got, expected in zip(second(torch.float32, "metal"), second(torch.float64, "torch"), strict=True):
            torch.testing.assert_close(
                got, expected.float(), rtol=1e-4, atol=1e-4 * float(expected.detach().abs().max())
            )


# Metal's dialect as far as clang knows it: address spaces, which g++ does not see, and half types of its own.
METAL_STDLIB = """
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2))) const
#define NAN __builtin_nanf("")
typedef _Float16 half;
typedef __bf16 bfloat;
namespace metal { typedef unsigned uint; struct uint3 { uint x, y, z; }; }
"""


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang")
@pytest.mark.parametrize(
    ("old", "new", "accepted"), [("", "", True), ("device const G* gate =", "const G* gate =", False)]
)
def test_clang_accepts_the_metal_side(old: str, new: str, accepted: bool, tmp_path: Path) -> None:
    (tmp_path / "metal_stdlib").write_text(METAL_STDLIB)
    source = _changed(shaders.source(), old, new).replace("[[host_name(#name)]] [[kernel]] ", "")
    (tmp_path / "kernels.cpp").write_text(source)
    flags = ["-std=c++17", "-nostdinc", "-D__METAL_VERSION__=310", f"-I{tmp_path}", "-Wno-unknown-attributes"]
    command = ["clang++", *flags, "-S", "-emit-llvm", "-o", tmp_path / "kernels.ll", tmp_path / "kernels.cpp"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode == 0) == accepted, done.stderr


# CPU tensors that say that they are on an Apple GPU.


@pytest.fixture
def on_mps(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[None]:
    monkeypatch.setattr(type(LIBRARIES["torch"]), "platform", lambda self, x: "mps")
    monkeypatch.setattr(plugin, "why_not", lambda platform: [])
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: True)
    srm_core.reload_config()
    with compiled(folder):
        yield
    monkeypatch.undo()
    srm_core.reload_config()


def sample(op: str, dtype: str = "float32", case: int = 0) -> tuple[list[Any], dict[str, Any], Any]:
    """A case of an operator as tensors; the same as NumPy arrays."""
    spec = registry().spec(op)
    arrays = spec.sample(spec.cases[case], dtype)
    return [tensors(a) for a in arrays[0]], {k: tensors(v) for k, v in arrays[1].items()}, arrays


def tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return numpy_to_torch(value.copy())
    return tuple(map(tensors, value)) if isinstance(value, tuple) else value


@needs_compiler
@pytest.mark.usefixtures("on_mps")
@pytest.mark.parametrize("op", [kernel.op for kernel in plugin.KERNELS])
def test_auto_takes_it_for_every_operator(op: str) -> None:
    args, options, (plain, named) = sample(op)
    assert srm_core.explain(op, *args, **options).chosen == "mps"
    outputs = registry().spec(op).unpack(srm_core.call(op, *args, **options))
    mutated = [array for name in registry().spec(op).mutates for array in _arrays(op, name, args, options)]
    judgements = judge_forward(
        registry().spec(op), plain, named, [torch_to_numpy(o) for o in outputs], [torch_to_numpy(m) for m in mutated]
    )
    assert judgements
    assert not [str(j) for j in judgements if not j.ok]


def _arrays(op: str, name: str, args: list[Any], options: dict[str, Any]) -> tuple[Any, ...]:
    bound = registry().spec(op).signature.bind(*args, **options).arguments[name]
    return bound if isinstance(bound, tuple) else (bound,)


def reasons(op: str, *args: Any, **options: Any) -> dict[str, str]:
    """Why `mps` does not take a call: code and text."""
    (candidate,) = srm_core.explain(op, *args, backend="mps", **options).candidates
    return {r.code: str(r) for r in candidate.reasons or ()}


@pytest.mark.usefixtures("on_mps")
def test_there_is_no_float64() -> None:
    args, options, _ = sample("scan", "float64")
    assert reasons("scan", *args, **options) == {
        "dtype": "takes float32, float16, bfloat16, not float64 (cast the arrays)"
    }
    with pytest.raises(srm_core.NoBackendError, match="mps: takes float32, float16, bfloat16, not float64"):
        srm_core.scan(*args, **options)


@pytest.mark.usefixtures("on_mps")
@pytest.mark.parametrize("op", [kernel.op for kernel in plugin.KERNELS])
def test_bfloat16_needs_macos_14(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options, _ = sample(op, "bfloat16")
    assert reasons(op, *args, **options) == {}
    srm_core.reload_config()
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: (major, minor) < (14, 0))
    assert "cast to float16" in reasons(op, *args, **options)["bfloat16"]


@pytest.mark.usefixtures("on_mps")
@pytest.mark.parametrize(
    ("op", "version", "code"),
    [
        ("attention", "2.12.1", "torch-version"),
        ("attention", "2.13.0+cpu", None),
        ("hds_query", "2.12.1", "torch-version"),
        ("hds_query", "2.13.0", None),
        ("scan", "2.4.0", None),
    ],
)
def test_what_an_old_torch_gets_wrong(op: str, version: str, code: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    args, options, _ = sample(op)
    monkeypatch.setattr(torch, "__version__", version)
    assert list(reasons(op, *args, **options)) == ([code] if code else [])


@pytest.mark.usefixtures("on_mps")
def test_slots_need_a_torch_that_copies_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    args, _, _ = sample("recurrent_step_")
    slots = torch.arange(args[0].shape[0])
    monkeypatch.setattr(torch, "__version__", "2.8.0")
    assert reasons("recurrent_step_", *args) == {}
    assert "torch>=2.9" in reasons("recurrent_step_", *args, slots=slots)["torch-version"]


@pytest.mark.usefixtures("on_mps")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_causal_attention_in_half_types_has_its_mask_spelt_out(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own is wrong there, and says nothing."""
    from srm_backends.torch import attention

    causal = []
    original = attention.scaled_dot_product_attention

    def seen(q: Any, k: Any, v: Any, mask: Any, dropout: float, is_causal: bool, **options: Any) -> Any:
        causal.append(is_causal)
        return original(q, k, v, mask, dropout, is_causal, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", seen)
    spec = registry().spec("attention")
    cases = [i for i, case in enumerate(spec.cases) if case.settings.get("is_causal") and "ci" in case.tags]
    assert cases
    for case in cases:
        args, options, arrays = sample("attention", dtype, case)
        out = srm_core.attention(*args, **options)
        assert not [str(j) for j in judge_forward(spec, *arrays, [torch_to_numpy(out)]) if not j.ok]
    assert set(causal) == {dtype == "float32"}


@pytest.mark.usefixtures("on_mps")
def test_without_compile_shader_the_torch_operations_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.mps, "compile_shader")
    for op in OPS:
        args, options, arrays = sample(op)
        outputs = srm_core.call(op, *args, backend="mps", **options)
        judgements = judge_forward(registry().spec(op), *arrays, [torch_to_numpy(o) for o in outputs])
        assert not [str(j) for j in judgements if not j.ok]


# Is it runnable here?


@pytest.mark.parametrize(
    ("platform", "built", "failure", "code"),
    [
        ("linux", True, "", "platform"),
        ("darwin", False, "", "not-built"),
        ("darwin", True, "MPS backend out of memory", "no-device"),
        ("darwin", True, "", None),
    ],
)
def test_the_probe_says_what_is_missing(
    platform: str, built: bool, failure: str, code: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ones(n: int, device: str) -> Any:
        assert device == "mps"
        if failure:
            raise RuntimeError(failure + ": 0 bytes allocated.\nUse another machine.")
        return torch.full((n,), 1.0)

    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: built)
    monkeypatch.setattr(torch, "ones", ones)
    assert [r.code for r in plugin.why_not(platform)] == ([code] if code else [])
    assert all(r.hint or r.required for r in plugin.why_not(platform))
    assert failure in "".join(map(str, plugin.why_not(platform)))


def test_torch_is_asked_in_another_process_unless_it_is_here() -> None:
    code = "import sys; from srm_backends.mps import plugin; print(*plugin.ask_torch(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    built, failure = plugin.ask_torch()
    assert built == torch.backends.mps.is_built()
    assert failure or torch.backends.mps.is_available()
    assert done.stdout.strip() == f"{built} {failure} False"


def test_the_sources_stand_beside_the_wrappers() -> None:
    """They are data of the package, which a wheel must hold; what is compiled includes nothing that is not Metal's."""
    source = shaders.source()
    assert [line for line in source.splitlines() if line.startswith("#include <metal")] == ["#include <metal_stdlib>"]
    assert '#include "' not in source
    for op in OPS:
        assert all(f"INSTANCE({op}_{x}_{g}_{s}, {op}, {x}, {g}, {s})" in source for x, g, s in instances())


def instances() -> Iterator[tuple[str, str, str]]:
    """Every mix of dtypes that the contract permits: parameters and states may be float32 beside half types."""
    for x in shaders.WORDS.values():
        for parameters in dict.fromkeys((x, "float")):
            for state in dict.fromkeys((x, "float")):
                yield x, parameters, state
