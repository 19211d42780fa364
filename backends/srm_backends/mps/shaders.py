"""The Metal kernels: compiled from source when the first one is wanted, and launched on tensors.

torch.mps.compile_shader gives an object with one function for each kernel. It takes tensors as buffers, integers as
`long` and a sequence of them as a buffer of longs, which the kernels read as a struct.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor

PARTS = ("shim.h", "integers.h", "scan.metal", "recurrent_step.metal")
WORDS = {torch.float32: "float", torch.float16: "half", torch.bfloat16: "bfloat"}
GROUP = 256  # threads that are launched together
RECENT = Version(torch.__version__).release >= (2, 7)


def source() -> str:
    """Every kernel in one text, which has nothing to include but Metal's own library."""
    texts = [files(__package__).joinpath(name).read_text() for name in PARTS]
    return "\n".join(text.replace("#pragma once\n", "") for text in texts)


def available() -> bool:
    """Can this torch compile Metal source, and hand it sequences of integers? Before, torch operations stand in."""
    return RECENT and hasattr(torch.mps, "compile_shader")


@cache
def library() -> Any:
    """The kernels, compiled on the first call."""
    return torch.mps.compile_shader(source())


def launch(name: str, dtypes: Sequence[torch.dtype], arguments: Sequence[Any], grid: tuple[int, ...]) -> None:
    """Run the instance of kernel `name` for `dtypes`. grid: how many threads along x, y, z; none of them 0."""
    kernel = getattr(library(), "_".join([name, *(WORDS[dtype] for dtype in dtypes)]))
    kernel(*arguments, threads=grid, group_size=(min(grid[0], GROUP), *(1,) * (len(grid) - 1)))


def strides(a: Tensor) -> list[int]:
    """In elements; 0 along an axis of extent 1, which so may stand for any extent."""
    return [step if extent > 1 else 0 for extent, step in zip(a.shape, a.stride(), strict=True)]


def integers(a: Tensor | None) -> tuple[int, int]:
    """(bytes, stride) of an array of integers for each sequence, or of one for all; (0, 0) without."""
    return (0, 0) if a is None else (a.element_size(), a.stride(0) if a.dim() and a.shape[0] > 1 else 0)
