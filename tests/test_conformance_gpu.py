"""The suite on a GPU: what it checks there, with kernels that are right and kernels that are wrong in one way."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
from srm_conformance.proof import watched
from srm_conformance.session import Ended, Options, Session

from srm_core.hookspecs import hookimpl
from srm_core.registry import local_plugin
from srm_core.spec import BackendInfo, Kernel

HERE = "test_conformance_gpu"
LIBRARIES = ("torch", "cupy")


class Plugin:
    """A backend `gpu` of one kernel for `mdi`, in plain array code for torch and CuPy."""

    def __init__(self, forward: str, **fields: Any) -> None:
        self.kernel = Kernel(
            "mdi", f"{HERE}:{forward}", f"{HERE}:backward", arrays=LIBRARIES, platforms=("cuda",),
            **{"graph_safe": True, **fields},
        )  # fmt: skip

    @hookimpl
    def srm_backend_info(self) -> BackendInfo:
        return BackendInfo("gpu", tech="array-api", kernels=(self.kernel,), platforms=("cuda",))


def _wide(x: Any) -> Any:
    """In float32, or in float64 where it is that."""
    module = importlib.import_module(type(x).__module__.partition(".")[0])
    if module.__name__ == "torch":
        return x if x.dtype is module.float64 else x.float()
    return x if x.dtype == "float64" else x.astype("float32")


def _narrow(x: Any, dtype: Any) -> Any:
    return x.to(dtype) if hasattr(x, "to") else x.astype(dtype)


def _sigmoid(x: Any) -> Any:
    module = importlib.import_module(type(x).__module__.partition(".")[0])
    return 1 / (1 + module.exp(-x))


def _parts(args: Any, eps: float) -> Any:
    z, h, gate, decay, modulation = (None if a is None else _wide(a) for a in args)
    g = _sigmoid(gate)
    raw = _sigmoid(decay) if modulation is None else _sigmoid(decay) * _sigmoid(modulation)
    return z, h, g, raw, raw.clip(eps, 1 - eps)


def _on_its_device(kernel: Any) -> Any:
    """A kernel of CuPy runs on the current device, which need not be that of its arrays."""

    def run(ctx: Any, *args: Any, **options: Any) -> Any:
        with ctx.device if ctx.array_library == "cupy" else nullcontext():
            return kernel(ctx, *args, **options)

    return run


@_on_its_device
def right(ctx: Any, *args: Any, eps: float) -> Any:
    z, h, g, _, gamma = _parts(args, eps)
    out, kept = ctx.empty(args[0].shape, args[1].dtype), ctx.empty(args[0].shape, args[0].dtype)
    out[...] = _narrow((1 - g) * h + g * z + gamma * h, args[1].dtype)
    kept[...] = _narrow(gamma, args[0].dtype)
    return out, kept


@_on_its_device
def backward(ctx: Any, residuals: Any, d_out: Any, d_gamma: Any) -> Any:
    args, eps = residuals.args, residuals.options["eps"]
    z, h, g, raw, gamma = _parts(args, eps)
    d, d_raw = _wide(d_out), _wide(d_out) * h + _wide(d_gamma)
    d_raw = d_raw * ((raw >= eps) & (raw <= 1 - eps))
    decay = _sigmoid(_wide(args[3]))
    other = 1 if args[4] is None else _sigmoid(_wide(args[4]))
    gradients = [
        g * d, (1 - g + gamma) * d, (z - h) * g * (1 - g) * d, d_raw * other * decay * (1 - decay),
        None if args[4] is None else d_raw * decay * other * (1 - other),
    ]  # fmt: skip
    return tuple(None if a is None else _narrow(v, a.dtype) for v, a in zip(gradients, args, strict=True))


def on_the_default_stream(ctx: Any, *args: Any, eps: float) -> Any:
    module = importlib.import_module(ctx.array_library)
    stream = module.cuda.Stream.null if ctx.array_library == "cupy" else module.cuda.default_stream()
    with stream if ctx.array_library == "cupy" else module.cuda.stream(stream):
        result = right(ctx, *args, eps=eps)
    stream.synchronize()
    return result


_seen: list[Any] = []


def looks_at_values(ctx: Any, *args: Any, eps: float) -> Any:
    """Brings a value to the host, which a graph cannot capture."""
    if args[0].shape and 0 not in args[0].shape:
        _seen.append(float(_wide(args[0]).sum()))
    return right(ctx, *args, eps=eps)


def remembers(ctx: Any, *args: Any, eps: float) -> Any:
    """A copy of the first values stays in use: a replay does not see the new ones."""
    key = (tuple(args[0].shape), str(args[0].dtype), ctx.array_library, str(ctx.device))
    known = dict(_seen)
    if key not in known:
        _seen.append((key, args[0] + 0))
    return right(ctx, dict(_seen)[key], *args[1:], eps=eps)


@contextmanager
def session(library: str, forward: str, only: str, **fields: Any) -> Iterator[Session]:
    module = pytest.importorskip(library)
    if not module.cuda.is_available():
        pytest.skip("no CUDA device")
    _seen.clear()
    with local_plugin("gpu", Plugin(forward, **fields)):
        yield Session(Options("gpu", "cuda", library, ("mdi",), only))


def ends(library: str, forward: str, only: str = "", **fields: Any) -> dict[str, Ended]:
    with session(library, forward, only, **fields) as one, watched():
        return {i.id: one.run(i) for i in one.items}


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_right_kernel_passes(library: str) -> None:
    found = ends(library, "right")
    bad = [e.message for e in found.values() if e.verdict == "failed"]
    assert not bad, f"{len(bad)} of {len(found)}\n" + "\n".join(bad[:5])
    checks = {e.check for e in found.values() if e.verdict == "passed"}
    assert checks >= {"values", "gradients", "layouts", "threads", "determinism", "streams", "graphs", "random"}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("forward", "only"),
    [
        ("on_the_default_stream", "mdi/streams/small/float32"), ("looks_at_values", "mdi/graphs/small/float32"),
        ("remembers", "mdi/graphs/small/float32"),
    ],
)  # fmt: skip
def test_a_wrong_kernel_is_found(library: str, forward: str, only: str) -> None:
    (one,) = ends(library, forward, only).values()
    assert one.verdict == "failed", one


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_not_graph_safe_is_not_captured(library: str) -> None:
    (one,) = ends(library, "looks_at_values", "mdi/graphs/small/float32", graph_safe=False).values()
    assert (one.verdict, one.message) == ("not claimed", "is not declared graph_safe")


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_second_device(library: str) -> None:
    found = ends(library, "right", "mdi/second-device/*")
    module = importlib.import_module(library)
    count = module.cuda.device_count() if library == "torch" else module.cuda.runtime.getDeviceCount()
    assert {e.verdict for e in found.values()} == {"passed" if count > 1 else "not claimed"}
