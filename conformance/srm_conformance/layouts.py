"""The same values, differently laid out: NumPy arrays put into memory of any library, with guards around them.

The memory that an array does not cover is filled with ones, bit by bit: NaN, or -1. So what is read beside the array
is seen in the result, and what is written beside it is seen afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from srm_core.arrays import LIBRARIES, library_of, numpy_to_torch, torch_to_numpy

Shape = tuple[int, ...]
Plan = tuple[int, Shape]  # the offset of the first element, and the strides, in elements
GUARD = 16  # elements after the array
HOST, DEVICES = ("numpy",), ("numpy", "torch", "cupy")


@dataclass(frozen=True)
class Layout:
    """How an array of a shape lies in memory.

    shift: bytes by which it misses its alignment. repeats: the axis with stride 0, along which values are equal.
    other_integers: int32 where a sample has int64, and the reverse.
    """

    name: str
    plan: Callable[[Shape], Plan]
    libraries: tuple[str, ...] = DEVICES
    shift: int = 0
    writeable: bool = True
    repeats: int | None = None
    other_integers: bool = False

    def of(self, values: Any) -> Any:
        """The values that this layout can hold."""
        if self.other_integers and values.dtype.kind == "i":
            return values.astype(np.int32 if values.dtype == np.int64 else np.int64)
        if self.repeats is None or not values.ndim or not values.size or values.dtype.kind in "iub":
            return values
        return np.broadcast_to(values.take([0], self.repeats), values.shape).copy()


def _strides(shape: Shape) -> Shape:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _in_order(order: Callable[[int], tuple[int, ...]]) -> Callable[[Shape], Plan]:
    """Dense, with the axes in another order in memory."""

    def plan(shape: Shape) -> Plan:
        axes = order(len(shape))
        strides = dict(zip(axes, _strides(tuple(shape[a] for a in axes)), strict=True))
        return 0, tuple(strides[a] for a in range(len(shape)))

    return plan


def _row_major(n: int) -> tuple[int, ...]:
    return tuple(range(n))


def _time_major(n: int) -> tuple[int, ...]:
    return (1, 0, *range(2, n)) if n > 1 else _row_major(n)


def _channels_last(n: int) -> tuple[int, ...]:
    return (0, *range(2, n), 1) if n > 2 else _row_major(n)


def _every_second(shape: Shape) -> Plan:
    return 0, tuple(2 * s for s in _strides(shape))


def _backwards(shape: Shape) -> Plan:
    strides = tuple(-s for s in _strides(shape))
    return sum((n - 1) * -s for n, s in zip(shape, strides, strict=True) if n), strides


def _offset(shape: Shape) -> Plan:
    return 3, _strides(shape)


def _repeated(axis: int) -> Callable[[Shape], Plan]:
    def plan(shape: Shape) -> Plan:
        strides = list(_strides(shape))
        if shape:
            strides[axis] = 0
        return 0, tuple(strides)

    return plan


PLAIN = Layout("plain", _in_order(_row_major))
LAYOUTS = (
    Layout("strided", _every_second),
    Layout("fortran", _in_order(lambda n: tuple(reversed(range(n))))),
    Layout("time_major", _in_order(_time_major)),
    Layout("channels_last", _in_order(_channels_last)),
    Layout("offset", _offset),
    Layout("reversed", _backwards, ("numpy", "cupy")),
    Layout("misaligned", _in_order(_row_major), HOST, shift=1),
    Layout("other_integers", _in_order(_row_major), other_integers=True),
    Layout("read_only", _in_order(_row_major), HOST, writeable=False),
    Layout("stride_0_first", _repeated(0), repeats=0),
    Layout("stride_0_last", _repeated(-1), repeats=-1),
)


class Placed:
    """Values in memory of a library: `view` is the array that a kernel is given."""

    def __init__(self, values: Any, layout: Layout, library: str, device: Any) -> None:
        repeated = layout.repeats is not None and values.dtype.kind not in "iub"
        layout = PLAIN if layout.repeats is not None and not repeated else layout
        self._offset, self._strides = layout.plan(values.shape)
        ends = [(n - 1) * s for n, s in zip(values.shape, self._strides, strict=True) if n and s > 0]
        self._shape, self._dtype, self._shift = values.shape, values.dtype, layout.shift
        count = self._offset + sum(ends) + 1 + GUARD
        host = np.full(count * values.itemsize + layout.shift, 0xFF, np.uint8)
        self._in(host)[...] = values
        self._before = host.copy()
        self._memory = _moved(host, library, device)
        self.view = _viewed(self._memory, self._in, self._dtype, self._shape, self._offset, self._strides)
        if not layout.writeable:
            self.view.flags.writeable = False

    def _in(self, host: Any) -> Any:
        """The array in a copy of its memory on the host."""
        size = self._dtype.itemsize
        strides = tuple(s * size for s in self._strides)
        return np.ndarray(self._shape, self._dtype, host, self._shift + self._offset * size, strides)

    def value(self) -> Any:
        """What the array holds now."""
        return self._in(_bytes(self._memory)).copy()

    def touched(self, within: bool) -> str:
        """What was written to: "" if nothing was. within: also the array itself must be as it was."""
        before, after = self._before.copy(), _bytes(self._memory)
        if within and self._in(before).tobytes() != self._in(after).tobytes():
            return "its elements"
        self._in(before)[...] = self._in(after)
        return "memory beside it" if before.tobytes() != after.tobytes() else ""


def _moved(host: Any, library: str, device: Any) -> Any:
    if library == "numpy":
        return host
    if library == "torch":
        return numpy_to_torch(host).to(device, copy=True)
    with device:
        return sys.modules["cupy"].asarray(host)


def _bytes(memory: Any) -> Any:
    return to_numpy(memory).copy()


def _viewed(memory: Any, on_host: Any, dtype: Any, shape: Shape, offset: int, strides: Shape) -> Any:
    library = library_of(memory)
    if library == "numpy":
        return on_host(memory)
    if library == "torch":
        torch = sys.modules["torch"]
        return torch.as_strided(memory.view(getattr(torch, dtype.name)), shape, strides, offset)
    cupy = sys.modules["cupy"]
    flat = memory.view(dtype)[offset:]
    return cupy.lib.stride_tricks.as_strided(flat, shape, tuple(s * dtype.itemsize for s in strides))


def to_numpy(array: Any) -> Any:
    """The values of an array of any library, on the host."""
    library = library_of(array)
    if library == "torch":
        return torch_to_numpy(array.cpu())
    return array.get() if library == "cupy" else array


def extent(array: Any) -> tuple[int, int]:
    """The addresses between which an array lies; (0, 0) for an empty one."""
    library = LIBRARIES[library_of(array) or "numpy"]
    if 0 in array.shape:
        return 0, 0
    size = array.dtype.itemsize
    if library.name == "torch":
        start = array.data_ptr()
    else:
        start = array.data.ptr if library.name == "cupy" else array.__array_interface__["data"][0]
    reach = [int(s * size) * (n - 1) for s, n in zip(library.strides(array), array.shape, strict=True)]
    return start + sum(r for r in reach if r < 0), start + sum(r for r in reach if r > 0) + size


def overlap(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Have two extents an address in common?"""
    return a[0] < b[1] and b[0] < a[1]
