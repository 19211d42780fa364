"""Which array library is this, and how does an array of one become a view in another.

No library is imported to ask whether an array is its own: whoever holds a torch tensor has imported torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Library(Protocol):
    """What the registry needs to know of an array library."""

    name: str

    def refuse(self, x: Any) -> str:
        """Why this object of the library cannot be a tensor argument; empty if it can."""

    def wants_gradient(self, x: Any) -> bool:
        """Does the library's own automatic differentiation want a gradient of `x`?"""

    def is_traced(self, x: Any) -> bool:
        """Has `x` no values, because it stands for an array in a trace?"""

    def dtype_name(self, dtype: Any) -> str: ...

    def platform(self, x: Any) -> str: ...

    def device_key(self) -> Callable[[Any], Any]:
        """A function that gives something that can be hashed and tells the device of an array from the library's
        others."""

    def strides(self, x: Any) -> tuple[float, ...]:
        """Strides in elements: fractions for a field of records, whose items lie apart by another size."""

    def empty(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any: ...

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any: ...

    def stream(self, device: Any) -> int | None:
        """The handle of the current stream; None where there are no streams."""


class _NumPy:
    name = "numpy"

    def refuse(self, x: Any) -> str:
        if type(x) not in (np.ndarray, np.memmap):
            return f"a {type(x).__name__}, whose meaning differs from a plain array's"
        if not x.dtype.isnative:
            return f"dtype {x.dtype.str} in the other byte order"
        return ""

    def wants_gradient(self, x: Any) -> bool:
        return False

    def is_traced(self, x: Any) -> bool:
        return False

    def dtype_name(self, dtype: Any) -> str:
        return str(np.dtype(dtype).name)

    def platform(self, x: Any) -> str:
        return "cpu"

    def device_key(self) -> Callable[[Any], Any]:
        return _nowhere

    def strides(self, x: Any) -> tuple[float, ...]:
        return tuple(s / x.itemsize for s in x.strides)

    def empty(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        return np.empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        return np.zeros(shape, dtype)

    def stream(self, device: Any) -> int | None:
        return None


class _Torch:
    name = "torch"

    def refuse(self, x: Any) -> str:
        torch = sys.modules["torch"]
        if type(x) not in (torch.Tensor, torch.nn.Parameter) and not self.is_traced(x):
            return f"a {type(x).__name__}"
        if x.layout is not torch.strided or x.is_quantized:
            return "a sparse or quantised tensor"
        if x.is_conj() or x.is_neg():
            return "a lazily negated tensor"
        return ""

    def wants_gradient(self, x: Any) -> bool:
        return bool(x.requires_grad and sys.modules["torch"].is_grad_enabled())

    def is_traced(self, x: Any) -> bool:
        return type(x).__module__.startswith("torch._subclasses.")  # FakeTensor, FunctionalTensor

    def dtype_name(self, dtype: Any) -> str:
        return str(dtype).removeprefix("torch.")

    def platform(self, x: Any) -> str:
        return str(x.device.type)

    def device_key(self) -> Callable[[Any], Any]:
        is_grad_enabled = sys.modules["torch"].is_grad_enabled

        def key(x: Any) -> Any:
            # What `refuse` looks at is part of the key, so that a hit cannot accept what a miss refuses. True for the
            # CPU, as a device takes its time to be hashed and compared.
            device = x.is_cpu or x.device
            return device, x.requires_grad and is_grad_enabled(), x.layout, x.is_conj(), x.is_neg()

        return key

    def strides(self, x: Any) -> tuple[float, ...]:
        return tuple(x.stride())

    def _dtype(self, dtype: Any) -> Any:
        return getattr(sys.modules["torch"], dtype) if isinstance(dtype, str) else dtype

    def empty(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        return sys.modules["torch"].empty(shape, dtype=self._dtype(dtype), device=device)

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        return sys.modules["torch"].zeros(shape, dtype=self._dtype(dtype), device=device)

    def stream(self, device: Any) -> int | None:
        if device.type != "cuda":
            return None
        return int(sys.modules["torch"].cuda.current_stream(device).cuda_stream)


class _CuPy:
    name = "cupy"

    def refuse(self, x: Any) -> str:
        return "" if type(x) is sys.modules["cupy"].ndarray else f"a {type(x).__name__}"

    def wants_gradient(self, x: Any) -> bool:
        return False

    def is_traced(self, x: Any) -> bool:
        return False

    def dtype_name(self, dtype: Any) -> str:
        return str(np.dtype(dtype).name)

    def platform(self, x: Any) -> str:
        return "cuda"

    def device_key(self) -> Callable[[Any], Any]:
        return lambda x: x.device.id  # a Device of CuPy cannot be hashed

    def strides(self, x: Any) -> tuple[float, ...]:
        return tuple(s / x.itemsize for s in x.strides)

    def empty(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        with device:
            return sys.modules["cupy"].empty(shape, dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any, device: Any) -> Any:
        with device:
            return sys.modules["cupy"].zeros(shape, dtype)

    def stream(self, device: Any) -> int | None:
        return int(sys.modules["cupy"].cuda.get_current_stream(device.id).ptr)


LIBRARIES: dict[str, Library] = {"numpy": _NumPy(), "torch": _Torch(), "cupy": _CuPy()}


def library_of(x: Any) -> str | None:
    """The name of the library that `x` is an array of; None if it is no array known here."""
    return _library_of_type(x.__class__)


@lru_cache(maxsize=1024)
def _library_of_type(kind: type) -> str | None:
    for base in kind.__mro__:
        root = base.__module__.partition(".")[0]
        # numpy scalars (np.float32(1)) live in numpy, too, but are no arrays.
        if root in LIBRARIES and base.__name__ in ("ndarray", "Tensor"):
            return root
    return None


class DeviceKeys(dict[type, Callable[[Any], Any]]):
    """By type, what a call's key has of an array beside type, shape and dtype: where it is, and whatever else decides
    how it may be used. It is asked for each array of each call."""

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        library = _library_of_type(kind)
        # NumPy's scalars are on no device.
        self[kind] = found = LIBRARIES[library].device_key() if library else _nowhere
        return found


def _nowhere(x: Any) -> Any:
    return None


def torch_to_numpy(x: Any) -> Any:
    """A view of a CPU tensor. bfloat16, which torch cannot hand to NumPy, goes as 16-bit integers."""
    x = x.detach()
    torch = sys.modules["torch"]
    if x.dtype is torch.bfloat16:
        return x.view(torch.int16).numpy().view(BFLOAT16)
    return x.numpy()


def numpy_to_torch(x: Any) -> Any:
    """A view of an array; a copy only where torch has none: read-only memory, negative or odd strides."""
    import torch

    if not x.flags.writeable or any(s < 0 or s % x.itemsize for s in x.strides):
        x = x.copy()
    if x.dtype == BFLOAT16:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x)


def host_device(library: str) -> Any:
    """Host memory, as arrays of the library name it."""
    if library != "torch":
        return "cpu"
    import torch

    return torch.device("cpu")


# (from, to) on the same device; a pair that is not here cannot be converted without a copy.
VIEWS: dict[tuple[str, str, str], Callable[[Any], Any]] = {
    ("torch", "numpy", "cpu"): torch_to_numpy,
    ("numpy", "torch", "cpu"): numpy_to_torch,
}
