"""Checking a call against its specification, once, before any backend is asked."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from srm_core.arrays import LIBRARIES, library_of
from srm_core.axes import ANY_SHAPE, extents, match, shown
from srm_core.errors import ContractError
from srm_core.spec import FLOAT, HALF, INTEGER, OpSpec, OptionSpec, OutputSpec, TensorSpec


class Call:
    """A checked call: its values by name, the extent of every axis, and what features read.

    array_library, platform, device: of all its arrays. dtype: of the first tensor given in `shape_order`.
    dtypes: of every array by its name, which is "levels[0]" in a sequence of them.
    wanted: the arrays that torch's autograd wants gradients of. traced: they are arrays without values, of a trace.
    """

    traced: bool
    wanted: list[str]

    def __init__(self, spec: OpSpec, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self.spec = spec
        names = [p.name for p in spec.parameters]
        self.values: dict[str, Any] = {**dict(zip(names, args, strict=False)), **options}
        self.dims: dict[str, int] = {}
        self.dtypes: dict[str, str] = {}
        self.array_library = self.platform = self.dtype = ""
        self.traced, self.wanted = False, []
        self.device: Any = None
        self._check_libraries()
        self._check_dtypes()
        self._check_shapes()
        self._check_options()
        if spec.constrain is not None:
            spec.constrain(self)

    def error(self, param: str, found: str, required: str, hint: str = "") -> ContractError:
        return ContractError(self.spec.name, param, found, required, hint)

    def _given(self) -> list[tuple[str, TensorSpec | OptionSpec, Any]]:
        """The arrays of this call, with their names."""
        given: list[tuple[str, TensorSpec | OptionSpec, Any]] = []
        for p in self.spec.parameters:
            value = self.values[p.name]
            if isinstance(p, OptionSpec):
                if p.axes and library_of(value) is not None:
                    given.append((p.name, p, value))
            elif p.many:
                if not isinstance(value, tuple):
                    found = "None" if value is None else f"a {type(value).__name__}"
                    raise self.error(p.name, found, f"a sequence of arrays {shown(p.axes)}")
                given += ((name, p, one) for name, one in arrays_of(p.name, value))
            elif value is not None:
                given.append((p.name, p, value))
            elif not p.optional:
                raise self.error(p.name, "None", f"an array {shown(p.axes)}")
        return given

    def _check_libraries(self) -> None:
        first = ""
        for param, p, value in self._given():
            name = library_of(value)
            if name is None:
                raise self.error(
                    param, f"a {type(value).__name__}", "an array of NumPy, torch or CuPy",
                    "convert it first, for example with numpy.asarray",
                )  # fmt: skip
            library = LIBRARIES[name]
            why = library.refuse(value)
            if why:
                raise self.error(param, why, f"a plain array {shown(p.axes)}", "pass a plain dense array")
            if library.wants_gradient(value):
                self.wanted.append(param)
            self.traced |= library.is_traced(value)
            device = value.device
            if not first:
                first = param
                self.array_library, self.device, self.platform = name, device, library.platform(value)
            elif name != self.array_library:
                raise self.error(
                    param, f"an array of {name} beside {first} of {self.array_library}", "arrays of one library"
                )
            elif device != self.device:
                raise self.error(
                    param, f"an array on {device} beside {first} on {self.device}", "arrays on one device",
                    "move it there; no backend copies between devices by itself",
                )  # fmt: skip
            self.dtypes[param] = library.dtype_name(value.dtype)

    def _check_dtypes(self) -> None:
        primary = self._primary()
        self.dtype = self.dtypes[primary]
        for name, p, _ in self._given():
            allowed = self._allowed(name, p, primary)
            found = self.dtypes[name]
            if found not in allowed:
                beside = "" if name == primary or allowed == INTEGER else f" beside {primary} of {self.dtype}"
                raise self.error(name, f"dtype {found}", f"{' or '.join(allowed)}{beside}")

    def _primary(self) -> str:
        """The tensor whose dtype is the call's: the first given in `shape_order`, else the first at all."""
        given = [name for name, _, _ in self._given()]
        return next((n for n in self.spec.shape_order if n in given), given[0])

    def _allowed(self, name: str, p: TensorSpec | OptionSpec, primary: str) -> tuple[str, ...]:
        if isinstance(p, OptionSpec) or p.role == "integer":
            return INTEGER
        if name == primary or self.dtype not in FLOAT:
            return FLOAT
        floating: tuple[str, ...] = (self.dtype,)
        if p.role != "activation" and self.dtype in HALF:
            floating = (self.dtype, "float32")
        return ("bool", *floating) if p.role == "mask" else floating

    def output_names(self) -> tuple[str, ...]:
        """The name of each array that the call returns; those of a sequence are "levels[0]", "levels[1]", …"""
        return tuple(name for name, _ in self._outputs())

    def output_dtypes(self) -> tuple[str, ...]:
        """The dtype of each array that the call returns, by the rules of `OutputSpec`."""
        return tuple(self._output_dtype(o) for _, o in self._outputs())

    def output_shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each array that the call returns."""
        shapes: list[tuple[int, ...]] = []
        for o in self.spec.outputs:
            if o.many is not None:
                shapes += o.many(self.values)
            elif o.axes == ANY_SHAPE:
                shapes.append(next(tuple(self.values[p.name].shape) for p in self.spec.tensors if ANY_SHAPE in p.axes))
            else:
                shapes.append(extents(o.axes, self.dims))
        return tuple(shapes)

    def output_formats(self) -> tuple[str, ...]:
        """For each array that the call returns, the argument whose memory format it has, or ""."""
        return tuple(o.format for _, o in self._outputs())

    def _outputs(self) -> list[tuple[str, OutputSpec]]:
        outputs: list[tuple[str, OutputSpec]] = []
        for o in self.spec.outputs:
            shapes = None if o.many is None else o.many(self.values)
            outputs += [(o.name, o)] if shapes is None else [(f"{o.name}[{i}]", o) for i in range(len(shapes))]
        return outputs

    def mutated(self) -> list[tuple[str, Any]]:
        """The arrays that the call writes to, with their names."""
        return [pair for name in self.spec.mutates for pair in arrays_of(name, self.values[name])]

    def _output_dtype(self, output: OutputSpec) -> str:
        for name in output.like:
            if name in self.dtypes:
                return self.dtypes[name]
        return "float32" if output.state and self.dtype in HALF else self.dtype

    def _check_shapes(self) -> None:
        given = {name: (p, v) for name, p, v in self._given()}
        order = [n for n in self.spec.shape_order if n in given]
        whole: tuple[int, ...] | None = None
        for name in [*order, *(n for n in given if n not in order)]:
            p, value = given[name]
            shape = tuple(value.shape)
            if ANY_SHAPE in p.axes:
                whole = shape if whole is None else whole
                if shape != whole:
                    raise self.error(name, f"shape {shape}", f"{whole}, the shape of the first")
            for axes in p.axes:
                dims = match(axes, shape, self.dims)
                if dims is not None:
                    self.dims.update(dims)
                    break
            else:
                known = ", ".join(f"{k}={v}" for k, v in self.dims.items())
                raise self.error(name, f"shape {shape}", shown(p.axes) + (f" with {known}" if known else ""))

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


def arrays_of(name: str, value: Any) -> list[tuple[str, Any]]:
    """An argument's arrays by name: one, or each of a sequence, which a function made by `bind` may get as a list."""
    if isinstance(value, tuple | list):
        return [(f"{name}[{i}]", one) for i, one in enumerate(value)]
    return [(name, value)]


# Checks of options: each raises ValueError("what was found; required what").

LARGEST = sys.float_info.max
NUMBER = (int, float, np.integer, np.floating)


def check_bool(name: str, value: Any, dims: Mapping[str, int]) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{value!r}; required True or False")


def check_number(low: float, high: float) -> Callable[[str, Any, Mapping[str, int]], None]:
    """The check that an option is a number from low to high."""

    def check(name: str, value: Any, dims: Mapping[str, int]) -> None:
        if isinstance(value, bool) or not isinstance(value, NUMBER) or not low <= value <= high:
            most = f" to {high:g}" if high < LARGEST else " on"
            raise ValueError(f"{_brief(value)}; required a number from {low:g}{most}")

    return check


def check_count(low: int) -> Callable[[str, Any, Mapping[str, int]], None]:
    """The check that an option is an integer of at least `low`."""

    def check(name: str, value: Any, dims: Mapping[str, int]) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{value!r}; required an integer, at least {low}")

    return check


def check_finite(name: str, value: Any, dims: Mapping[str, int]) -> None:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, NUMBER) or not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{_brief(value)}; required a finite number")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_scale(name: str, value: Any, dims: Mapping[str, int]) -> None:
    """None, or a finite number."""
    if value is not None:
        check_finite(name, value, dims)


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


def lengths_check(op: str) -> Callable[..., None]:
    """The `check_values` of an operator over T whose only values to look at are `lengths`."""

    def check(dims: Mapping[str, int], *args: Any, lengths: Any, **options: Any) -> None:
        if lengths is not None:
            check_lengths(op, lengths, dims["T"])

    return check


def check_writable(op: str, param: str, value: Any) -> None:
    """An array that is updated in place must be writable, and no two of its elements the same memory."""
    library = LIBRARIES[library_of(value) or "numpy"]
    if library.name == "numpy" and not value.flags.writeable:
        raise ContractError(op, param, "a read-only array", "an array that can be updated in place")
    if library.name == "numpy" and value.flags.c_contiguous:  # the usual case, told in a moment
        return
    if 0 in value.shape:
        return
    reach = 0.0  # of the axes that lie closer together, in elements
    for stride, n in sorted((abs(s), n) for s, n in zip(library.strides(value), value.shape, strict=True) if n != 1):
        if stride <= reach:
            found = "an array in which elements share memory"
            raise ContractError(op, param, found, "an array whose elements are all memory of their own")
        reach += stride * (n - 1)
