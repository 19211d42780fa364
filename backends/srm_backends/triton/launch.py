"""Launching kernels. The only module that knows how Triton starts what it has compiled.

`kernel[grid](...)` looks at every argument anew to find out which variant to start; that takes longer than many a
kernel runs. Here a call of a kind that has been seen hands pointers to the variant that it had the last time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

from srm_core.context import LaunchContext
from srm_core.errors import KernelError

_knobs = triton.knobs.runtime
INTERPRETED = bool(_knobs.interpret)  # TRITON_INTERPRET=1, when this process started
KINDS = 256  # that are remembered for a kind of call; strides are among what tells them apart
ALIGNMENT = 16  # bytes: what lets a thread read or write so many at once
if INTERPRETED:
    from srm_backends.triton import interpreter

    interpreter.install()
_interpreter = threading.Lock()  # while it runs a kernel it has its own functions in the place of Triton's


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled and started. sizes: integers that it is given; constants: what it is compiled for."""

    grid: tuple[int, ...]
    sizes: tuple[Any, ...] = ()
    constants: tuple[Any, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def compiled_with(self) -> dict[str, Any]:
        """Triton's options. Products and sums are fused, whatever its default is."""
        return {
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True, **self.options,
        }  # fmt: skip


def launch(
    ctx: LaunchContext, kernel: Any, key: Hashable, tensors: tuple[Tensor | None, ...],
    configure: Callable[[], Config], scalars: tuple[Any, ...] = (),
) -> None:  # fmt: skip
    """Run `kernel` on the caller's current stream.

    kernel: a function of `triton.jit` whose parameters are a pointer for each of `tensors`, then the `scalars`, on
    which it does not specialise, then the sizes and constants of `configure()`. key: whatever `configure` looks at
    beside what all calls of this kind have in common (`LaunchContext.memo`): strides, mostly.
    Errors: `KernelError` with the kernel's name and configuration if it cannot be compiled or started.
    """
    if INTERPRETED:
        config = configure()
        known = ctx.memo.setdefault((id(kernel), key), config)
        if known != config:  # a call would start the wrong variant where kernels are compiled
            raise KernelError(f"{kernel.fn.__name__}: the key {key} stands for both {known} and {config}")
        with _interpreter, np.errstate(all="ignore"):
            kernel[config.grid](*tensors, *scalars, *config.sizes, *config.constants)
        return
    device = ctx.device.index
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            _launch(ctx, kernel, key, tensors, configure, scalars)
    else:
        _launch(ctx, kernel, key, tensors, configure, scalars)


def _launch(
    ctx: LaunchContext, kernel: Any, key: Hashable, tensors: tuple[Tensor | None, ...],
    configure: Callable[[], Config], scalars: tuple[Any, ...],
) -> None:  # fmt: skip
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    odd = 0
    for pointer in pointers:
        if pointer is not None:
            odd |= pointer
    aligned = None if odd % ALIGNMENT == 0 else tuple(p is None or p % ALIGNMENT == 0 for p in pointers)
    kind = id(kernel), key, aligned  # its own hash is that of its source
    variant = ctx.memo.get(kind)
    if variant is not None and not _knobs.launch_enter_hook.calls:
        start, grid, fixed, _ = variant
        start(*grid, _stream(ctx.device.index), *fixed[0], *pointers, *scalars, *fixed[1])
        return
    config = configure()  # a profiler's hooks see the launches that go Triton's own way
    compiled = _first(kernel, config, tensors, scalars)
    if len(ctx.memo) >= KINDS:
        ctx.memo.clear()
    grid = (*config.grid, 1, 1)[:3]
    fixed = (compiled.function, compiled.packed_metadata, None, None, None), (*config.sizes, *config.constants)
    ctx.memo[kind] = compiled.run, grid, fixed, compiled  # which unloads its code when nobody holds it


def _first(kernel: Any, config: Config, tensors: tuple[Tensor | None, ...], scalars: tuple[Any, ...]) -> Any:
    """Compile, or find in Triton's cache, and run."""
    try:
        values = *tensors, *scalars, *config.sizes, *config.constants
        return kernel[config.grid](*values, **config.compiled_with)
    except Exception as error:
        names = kernel.arg_names[len(kernel.arg_names) - len(config.constants) :]
        constants = ", ".join(f"{n}={c}" for n, c in zip(names, config.constants, strict=True))
        raise KernelError(
            f"the Triton kernel {kernel.fn.__name__}[{constants}, num_warps={config.num_warps}, "
            f"num_stages={config.num_stages}] could not be compiled or started: {type(error).__name__}: {error}"
        ) from error


def _stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def multiprocessors(ctx: LaunchContext) -> int:
    """How many the device has; where kernels are interpreted, as many as an H100."""
    return 132 if INTERPRETED or ctx.device is None else _multiprocessors(ctx.device.index)


def blocks(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def power_of_2(size: int, least: int, most: int) -> int:
    """The power of two that covers `size`, within bounds that are powers of two."""
    return min(most, max(least, 1 << max(0, size - 1).bit_length()))
