"""Checking a call against its specification, once, before any backend is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from srm_core.arrays import LIBRARIES, library_of
from srm_core.errors import ContractError
from srm_core.spec import FLOAT, HALF, INTEGER, OpSpec, OptionSpec, OutputSpec, TensorSpec


class Call:
    """A checked call: its values by name, the extent of every axis, and what features read.

    array_library, platform, device: of all its arrays. dtype: of the first tensor given in `shape_order`.
    """

    def __init__(self, spec: OpSpec, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self.spec = spec
        names = [p.name for p in spec.parameters]
        self.values: dict[str, Any] = {**dict(zip(names, args, strict=False)), **options}
        self.dims: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}
        self.array_library = self.platform = self.dtype = ""
        self.device: Any = None
        self._check_libraries()
        self._check_dtypes()
        self._check_shapes()
        self._check_options()
        if spec.constrain is not None:
            spec.constrain(self)

    def error(self, param: str, found: str, required: str, hint: str = "") -> ContractError:
        return ContractError(self.spec.name, param, found, required, hint)

    def _given(self) -> list[tuple[TensorSpec | OptionSpec, Any]]:
        """The parameters that hold an array in this call."""
        given: list[tuple[TensorSpec | OptionSpec, Any]] = []
        for p in self.spec.parameters:
            value = self.values[p.name]
            if isinstance(p, TensorSpec):
                if value is not None:
                    given.append((p, value))
                elif not p.optional:
                    raise self.error(p.name, "None", f"an array {_axes(p.axes)}")
            elif p.axes and library_of(value) is not None:
                given.append((p, value))
        return given

    def _check_libraries(self) -> None:
        first = ""
        for p, value in self._given():
            name = library_of(value)
            if name is None:
                raise self.error(
                    p.name, f"a {type(value).__name__}", "an array of NumPy, torch or CuPy",
                    "convert it first, for example with numpy.asarray",
                )  # fmt: skip
            library = LIBRARIES[name]
            why = library.refuse(value)
            if why:
                hint = "pass a plain dense array"
                if "requires grad" in why:
                    hint = "call under torch.no_grad(), detach it, or use srm_core.vjp for gradients"
                raise self.error(p.name, why, f"a plain array {_axes(p.axes)}", hint)
            device = value.device
            if not first:
                first = p.name
                self.array_library, self.device, self.platform = name, device, library.platform(value)
            elif name != self.array_library:
                raise self.error(
                    p.name, f"an array of {name} beside {first} of {self.array_library}", "arrays of one library"
                )
            elif device != self.device:
                raise self.error(
                    p.name, f"an array on {device} beside {first} on {self.device}", "arrays on one device",
                    "move it there; no backend copies between devices by itself",
                )  # fmt: skip
            self.dtypes[p.name] = library.dtype_name(value.dtype)

    def _check_dtypes(self) -> None:
        primary = self._primary()
        self.dtype = self.dtypes[primary]
        for p, _ in self._given():
            allowed = self._allowed(p, primary)
            found = self.dtypes[p.name]
            if found not in allowed:
                beside = "" if p.name == primary or allowed == INTEGER else f" beside {primary} of {self.dtype}"
                raise self.error(p.name, f"dtype {found}", f"{' or '.join(allowed)}{beside}")

    def _primary(self) -> str:
        """The tensor whose dtype is the call's: the first given in `shape_order`, else the first at all."""
        given = [p.name for p, _ in self._given()]
        return next((n for n in self.spec.shape_order if n in given), given[0])

    def _allowed(self, p: TensorSpec | OptionSpec, primary: str) -> tuple[str, ...]:
        if isinstance(p, OptionSpec) or p.role == "integer":
            return INTEGER
        if p.name == primary or self.dtype not in FLOAT:
            return FLOAT
        if p.role != "activation" and self.dtype in HALF:
            return (self.dtype, "float32")
        return (self.dtype,)

    def output_dtypes(self) -> tuple[str, ...]:
        """The dtype of each output, by the rules of `OutputSpec`."""
        return tuple(self._output_dtype(o) for o in self.spec.outputs)

    def _output_dtype(self, output: OutputSpec) -> str:
        for name in output.like:
            if name in self.dtypes:
                return self.dtypes[name]
        return "float32" if output.state and self.dtype in HALF else self.dtype

    def _check_shapes(self) -> None:
        given = {p.name: (p, v) for p, v in self._given()}
        order = [n for n in self.spec.shape_order if n in given]
        for name in [*order, *(n for n in given if n not in order)]:
            p, value = given[name]
            shape = tuple(value.shape)
            for axes in p.axes:
                dims = self._match(axes.split(), shape)
                if dims is not None:
                    self.dims.update(dims)
                    break
            else:
                known = ", ".join(f"{k}={v}" for k, v in self.dims.items())
                raise self.error(name, f"shape {shape}", _axes(p.axes) + (f" with {known}" if known else ""))

    def _match(self, axes: list[str], shape: tuple[int, ...]) -> dict[str, int] | None:
        if len(axes) != len(shape):
            return None
        dims: dict[str, int] = {}
        for axis, extent in zip(axes, shape, strict=True):
            required = int(axis) if axis.isdigit() else self.dims.get(axis, dims.get(axis))
            if required is None:
                dims[axis] = extent
            elif required != extent:
                return None
        return dims

    def _check_options(self) -> None:
        for p in self.spec.parameters:
            if isinstance(p, OptionSpec) and p.check is not None and p.name not in self.dtypes:
                try:
                    p.check(p.name, self.values[p.name], self.dims)
                except ContractError:
                    raise
                except ValueError as error:
                    found, _, required = str(error).partition("; required ")
                    raise self.error(p.name, found, required) from None

    def is_contiguous(self, param: str) -> bool:
        value = self.values[param]
        if value is None or 0 in value.shape:
            return True
        expected = 1
        for extent, stride in zip(
            reversed(tuple(value.shape)), reversed(LIBRARIES[self.array_library].strides(value)), strict=True
        ):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True


def _axes(alternatives: tuple[str, ...]) -> str:
    def one(axes: str) -> str:
        names = axes.split()
        return f"({', '.join(names)}{',' if len(names) == 1 else ''})"

    return " or ".join(one(a) for a in alternatives)


# Checks of options: each raises ValueError("what was found; required what").


def check_bool(name: str, value: Any, dims: Mapping[str, int]) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r}; required True or False")


def check_modes(name: str, value: Any, dims: Mapping[str, int]) -> None:
    """A host tuple of H words, each "row" or "col"."""
    required = f'; required a sequence of {dims["H"]} words, each "row" or "col"'
    if not isinstance(value, tuple):
        raise ValueError(f"{value!r}{required}")
    if len(value) != dims["H"]:
        raise ValueError(f"{len(value)} modes{required}")
    for word in value:
        if word not in ("row", "col"):
            raise ValueError(f"the mode {word!r}{required}")


def host_tuple(value: Any) -> Any:
    """A list as a tuple, which the memo can hold; anything else as it is, for the contract to refuse."""
    return tuple(value) if isinstance(value, list) else value


def as_index(op: str, param: str, value: Any) -> int:
    """A host integer; bool and float are refused."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ContractError(op, param, f"{value!r}", "an integer, or an array of integers")
    return int(value)


def check_lengths(op: str, lengths: Any, longest: int) -> None:
    """0 <= lengths <= T, where the values can be read on the host; on a device the kernel clamps them."""
    if LIBRARIES[library_of(lengths) or "numpy"].platform(lengths) != "cpu" or lengths.shape[0] == 0:
        return
    low, high = int(lengths.min()), int(lengths.max())
    if low < 0 or high > longest:
        bad = low if low < 0 else high
        raise ContractError(op, "lengths", f"the length {bad}", f"0 <= length <= T = {longest}")


def check_writable(op: str, param: str, value: Any) -> None:
    """An array that is updated in place must be writable, and no two of its elements the same memory."""
    library = LIBRARIES[library_of(value) or "numpy"]
    if library.name == "numpy" and not value.flags.writeable:
        raise ContractError(op, param, "a read-only array", "an array that can be updated in place")
    if library.name == "numpy" and value.flags.c_contiguous:  # the usual case, told in a moment
        return
    reach = 0.0  # of the axes that lie closer together, in elements
    for stride, n in sorted((abs(s), n) for s, n in zip(library.strides(value), value.shape, strict=True) if n != 1):
        if n and stride <= reach:
            found = "an array in which elements share memory"
            raise ContractError(op, param, found, "an array whose elements are all memory of their own")
        reach += stride * (n - 1)
