"""What an operator is (`OpSpec`), what a backend offers (`BackendInfo`, `Kernel`), and why not (`Reason`).

Everything here is data and needs NumPy at most; no backend and no array library is imported.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

API_VERSION = 1

HALF = ("float16", "bfloat16")
FLOAT = ("float32", "float64", *HALF)
INTEGER = ("int32", "int64")

Role = Literal["activation", "parameter", "state", "integer", "mask"]


@dataclass(frozen=True)
class Reason:
    """One reason why a kernel cannot take a call. `code` is stable; the other fields are for people."""

    code: str
    message: str
    param: str = ""
    found: str = ""
    required: str = ""
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass(frozen=True)
class TensorSpec:
    """A tensor parameter. `axes` are alternatives such as ("B T D", "B T 1"), in the words of `srm_core.axes`.

    The role fixes the dtypes: the first tensor given, in `shape_order`, sets the call's dtype; parameters and
    states may be float32 beside a half-precision activation; integers are int32 or int64; a mask is boolean, or
    has a parameter's dtype. doc: what it is, in a line. many: a sequence of arrays, which has no gradient.
    """

    name: str
    axes: tuple[str, ...]
    role: Role = "activation"
    optional: bool = False
    keyword: bool = False
    differentiable: bool = True
    storage: str = "dense"
    doc: str = ""
    many: bool = False

    dynamic = True


@dataclass(frozen=True)
class OptionSpec:
    """A parameter that is not (always) a tensor.

    A static option is part of the memo key by value. A dynamic one (an index that changes at every call) is
    in the key by type alone, and `OpSpec.check_values` looks at its value at each call. `axes` says that an
    integer array of these shapes may stand in its place. `schema` is its type in the operator that torch.compile
    sees ("bool", "int[2]", "float?"); "": any value that Python can read back from its repr.
    """

    name: str
    check: Callable[[str, Any, Mapping[str, int]], None] | None = None
    default: Any = inspect.Parameter.empty
    keyword: bool = False
    dynamic: bool = False
    axes: tuple[str, ...] = ()
    doc: str = ""
    schema: str = ""


Parameter = TensorSpec | OptionSpec


@dataclass(frozen=True)
class OutputSpec:
    """An output. Its dtype is that of the first given tensor in `like`; a state without one follows the rule
    for states: float32 beside half activations, else the activation's dtype. many: it is a tuple of arrays, of
    the shapes `many(values)`, of the values of the call by name. format: the argument whose memory format it has,
    channels-last where that is dense in that order, else row-major."""

    name: str
    axes: str
    like: tuple[str, ...] = ()
    state: bool = False
    doc: str = ""
    many: Callable[[Mapping[str, Any]], Sequence[tuple[int, ...]]] | None = None
    format: str = ""


@dataclass(frozen=True)
class ResidualSpec:
    """A tensor that a forward may keep for its backward; its shape depends on the arguments alone."""

    name: str
    axes: str


@dataclass(frozen=True)
class Case:
    """A named size, shared by tests and benchmarks. Tags: ci, bench, edge, seed."""

    name: str
    dims: Mapping[str, int]
    tags: frozenset[str] = frozenset({"ci"})
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ErrorSample:
    """A call that must raise `ContractError` naming `param`."""

    name: str
    param: str
    make: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Invariant:
    """A law between calls. `pairs(call, args, options)` yields (what, got, expected) arrays that must agree."""

    name: str
    pairs: Callable[..., Iterable[tuple[str, Any, Any]]]


@dataclass(frozen=True)
class Feature:
    """Something of a call that a predicate may look at. It must be a function of the memo key:
    types, shapes, dtypes, devices, static options, and strides where `layout` is set."""

    name: str
    read: Callable[[Any], Hashable] = field(compare=False, repr=False)
    layout: bool = False


def Multiple(dim: str, n: int) -> Feature:
    """Is the extent of axis `dim` a multiple of `n`?"""
    return Feature(f"{dim} % {n} == 0", lambda call: call.dims[dim] % n == 0)


def Bucket(dim: str) -> Feature:
    """The extent of axis `dim`, rounded up to a power of two."""
    return Feature(f"bucket({dim})", lambda call: 1 << max(0, call.dims[dim] - 1).bit_length())


def Given(param: str) -> Feature:
    """Was the optional parameter given?"""
    return Feature(f"given({param})", lambda call: call.values[param] is not None)


def Static(param: str) -> Feature:
    """The value of a static option."""
    return Feature(f"option({param})", lambda call: call.values[param])


def Contiguous(param: str) -> Feature:
    """Is the tensor dense in row-major order? (An absent tensor is.)"""
    return Feature(f"contiguous({param})", lambda call: call.is_contiguous(param), layout=True)


DTYPE = Feature("dtype", lambda call: call.dtype)
PLATFORM = Feature("platform", lambda call: call.platform)
ARRAY_LIBRARY = Feature("array_library", lambda call: call.array_library)
COMMON_FEATURES = (DTYPE, PLATFORM, ARRAY_LIBRARY)


@dataclass(frozen=True, eq=False)
class OpSpec:
    """The neutral truth about one operator; see docs/reference/specifications.md for each field.

    `reference(compute, *args, **options)` and `vjp(compute, grads, *args, **options)` are readable NumPy loops
    run in the dtype `compute`: float64 for the truth, float32 for the rounding model. Where roundings are
    permitted, both also take `rounding=`, a function (name, values) -> values, and call it at each of them.
    autocast: what torch's autocast means to it: "lower", as to matrix products, casts activations to autocast's
    dtype and leaves float32 parameters and states; "widest" brings activations to the widest dtype among them.
    formula, source: for people, as plain text.
    """

    name: str
    version: int
    summary: str
    parameters: tuple[Parameter, ...]
    outputs: tuple[OutputSpec, ...]
    reference: Callable[..., tuple[Any, ...]]
    vjp: Callable[..., tuple[Any, ...]] | None = None
    shape_order: tuple[str, ...] = ()
    constrain: Callable[[Any], None] | None = None
    check_values: Callable[..., None] | None = None
    mutates: tuple[str, ...] = ()
    residuals: tuple[ResidualSpec, ...] = ()
    permitted_roundings: tuple[str, ...] = ()
    features: tuple[Feature, ...] = COMMON_FEATURES
    cases: tuple[Case, ...] = ()
    sample: Callable[..., tuple[tuple[Any, ...], dict[str, Any]]] | None = None
    error_samples: tuple[ErrorSample, ...] = ()
    invariants: tuple[Invariant, ...] = ()
    flops: Callable[[Case], int] | None = None
    bytes: Callable[[Case, str], int] | None = None
    autocast: Literal["lower", "widest"] = "widest"
    formula: str = ""
    source: str = ""

    @cached_property
    def tensors(self) -> tuple[TensorSpec, ...]:
        return tuple(p for p in self.parameters if isinstance(p, TensorSpec))

    @cached_property
    def differentiable(self) -> tuple[str, ...]:
        """The inputs that have gradients, in the order in which a backward returns them."""
        return tuple(p.name for p in self.tensors if p.differentiable and p.role != "integer" and not p.many)

    @cached_property
    def signature(self) -> inspect.Signature:
        empty = inspect.Parameter.empty
        parameters: list[inspect.Parameter] = []
        required = False  # an optional tensor before a required one may be None, but must be given
        for p in reversed(self.parameters):
            kind = inspect.Parameter.KEYWORD_ONLY if p.keyword else inspect.Parameter.POSITIONAL_OR_KEYWORD
            if isinstance(p, OptionSpec):
                default = p.default
            else:
                default = None if p.optional and not (required and not p.keyword) else empty
            required |= default is empty and not p.keyword
            parameters.insert(0, inspect.Parameter(p.name, kind, default=default))
        return inspect.Signature(parameters)

    def pack(self, outputs: Sequence[Any]) -> Any:
        """What a call returns, of its output arrays: one as it is, several or a sequence as a tuple, or None."""
        if len(self.outputs) > 1 or any(o.many is not None for o in self.outputs):
            return tuple(outputs)
        return outputs[0] if outputs else None

    def unpack(self, result: Any) -> tuple[Any, ...]:
        """The output arrays of what a call returned."""
        return result if isinstance(result, tuple) else () if result is None else (result,)

    def bind(self, args: Sequence[Any], options: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The canonical form of a call: every positional parameter, every keyword-only one."""
        try:
            bound = self.signature.bind(*args, **options)
        except TypeError as error:
            raise TypeError(f"{self.name}{self.signature}: {error}") from None
        bound.apply_defaults()
        for p in self.parameters:
            # What is keyed by value must be hashable; a list of words means the same as a tuple of them.
            if (isinstance(p, OptionSpec) or p.many) and isinstance(bound.arguments[p.name], list):
                bound.arguments[p.name] = tuple(bound.arguments[p.name])
        return bound.args, bound.kwargs


@dataclass(frozen=True)
class Kernel:
    """One operator of one backend. Targets are "package.module:function", imported on first selection.

    arrays: libraries whose arrays it takes natively; others on the same device reach it as views, without a copy.
    backward: a target too; "autograd" for a kernel of differentiable torch operations.
    dtypes: of the activations. platforms: cpu, cuda, mps. rank: `auto` prefers the higher one.
    features: what `supports(view) -> list[Reason]` reads beyond what the operator declares.
    """

    op: str
    forward: str
    backward: str | None = None
    arrays: tuple[str, ...] = ("numpy",)
    dtypes: tuple[str, ...] = FLOAT
    platforms: tuple[str, ...] = ("cpu",)
    deterministic: bool = True
    graph_safe: bool = False  # for the conformance suite, which captures such kernels
    rank: int = 0
    features: tuple[Feature, ...] = ()
    supports: str | None = None

    @property
    def pulls_back(self) -> bool:
        """Has it a backward, its own or, with "autograd", that of the torch operations it is made of?"""
        return self.backward is not None


@dataclass(frozen=True)
class BackendInfo:
    """A backend: its name, the technology it is written in, and its kernels.

    requires: distributions that must be installed, as "torch>=2.4"; looked up without importing them.
    """

    name: str
    tech: str
    kernels: tuple[Kernel, ...]
    platforms: tuple[str, ...] = ("cpu",)
    requires: tuple[str, ...] = ()
    api_version: int = API_VERSION
