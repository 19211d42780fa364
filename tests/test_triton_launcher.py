"""The way around Triton's own launch, beside that launch: what a driver is given is the same.

Nothing here needs a GPU, and it runs with the newest Triton as well as with the one that the constraints name.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest

if find_spec("triton") is None or find_spec("torch") is None:
    pytest.skip("needs triton", allow_module_level=True)

import torch
import triton
import triton.language as tl
from srm_backends.triton import launch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

STREAM, FUNCTION = 77, 99


@triton.jit(do_not_specialize=["scale"])
def line(x, y, nothing, scale, tiles, n, stride, BLOCK: tl.constexpr, TILED: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if nothing is not None:
        at = at + tl.load(nothing)
    found = tl.reshape(tiles.load([0, 0]), (BLOCK,)) if TILED else tl.load(x + at * stride, at < n)
    tl.store(y + at, found * scale, at < n)


class Driver:
    """An H100 that runs nothing and remembers how kernels were started."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ...]] = []
        self.unloaded: list[int] = []
        outer = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None: ...

            def __call__(self, *arguments: Any) -> None:
                outer.started.append(arguments)

        self.launcher_cls = Launcher
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": 232448},
            load_binary=lambda *_: (1, FUNCTION, 32, 0, 1024),
            unload_module=self.unloaded.append,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def gpu(monkeypatch: Any, tmp_path: Any) -> Iterator[Driver]:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_stream", lambda _: STREAM)
    before, fake = driver._active, Driver()
    driver.set_active(fake)
    yield fake
    line.device_caches.clear()
    gc.collect()  # newer versions unload what nobody holds
    driver._active = before


def numbers(arguments: tuple[Any, ...]) -> list[Any]:
    """Tensors as what a launcher makes of them."""
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in arguments]


def run(ctx: Any, x: torch.Tensor, y: torch.Tensor, tiled: bool, stride: int = 1) -> None:
    tiles = TensorDescriptor(x, [1, 4096], [4096, 1], [1, 128]) if tiled else None

    def configure() -> launch.Config:
        return launch.Config((32,), (4096, stride), (128, tiled), num_warps=2)

    launch.launch(ctx, line, (tiled, stride), (x, y, None), configure, (0.5, tiles))


@pytest.mark.parametrize("tiled", [False, True])
def test_what_was_seen_is_started_as_triton_starts_it(gpu: Driver, tiled: bool) -> None:
    ctx = SimpleNamespace(memo={}, device=SimpleNamespace(index=0))
    x, y = torch.zeros(4096), torch.zeros(4096)
    run(ctx, x, y, tiled)
    run(ctx, x, y, tiled)
    run(ctx, y, x, tiled)
    theirs, ours, turned = gpu.started
    assert theirs[:5] == ours[:5] == (32, 1, 1, STREAM, FUNCTION)
    assert theirs[5] == ours[5]  # the packed metadata: what follows are hooks, which nobody has set
    first = len(theirs) - len(line.arg_names)
    mine, others, last = (numbers(a[first:]) for a in (ours, theirs, turned))
    assert mine[:4] == others[:4] == [x.data_ptr(), y.data_ptr(), None, 0.5]
    assert last[:4] == [y.data_ptr(), x.data_ptr(), None, 0.5]
    assert mine[5:] == others[5:] == [4096, 1, 128, tiled]
    if tiled:
        assert mine[4].base is x
        assert last[4].base is y


def test_another_alignment_is_another_variant(gpu: Driver) -> None:
    ctx = SimpleNamespace(memo={}, device=SimpleNamespace(index=0))
    x, y = torch.zeros(4100), torch.zeros(4100)
    for a, b in ((x, y), (x[1:], y), (x, y[1:]), (x[1:], y)):
        run(ctx, a, b, False)
    assert len(ctx.memo) == 3
    assert len({id(kept[0]) for kept in ctx.memo.values()}) == 3
    assert [numbers(s[-9:-6])[0] for s in gpu.started] == [t.data_ptr() for t in (x, x[1:], x, x[1:])]


def test_what_is_remembered_is_not_unloaded(gpu: Driver) -> None:
    ctx = SimpleNamespace(memo={}, device=SimpleNamespace(index=0))
    x, y = torch.zeros(4096), torch.zeros(4096)
    run(ctx, x, y, False)
    line.device_caches.clear()
    gc.collect()
    run(ctx, x, y, False)
    assert len(gpu.started) == 2
    assert not gpu.unloaded


def test_a_profiler_sees_every_launch(gpu: Driver) -> None:
    seen = []
    ctx = SimpleNamespace(memo={}, device=SimpleNamespace(index=0))
    x, y = torch.zeros(4096), torch.zeros(4096)
    run(ctx, x, y, False)

    def hook(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        run(ctx, x, y, False)
        metadata, enter = gpu.started[1][6:8]
        enter(metadata)  # as a real launcher does
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["line"]
    assert gpu.started[0][6:8] != gpu.started[1][6:8]
