"""Code written out for one operator: between its own parameters and those of its operator in torch.library.

torch.compile follows this code at every compilation and guards what it reads; with the parameters written out there is
nothing to read but the arguments. A schema knows fewer types than Python: an option that may be an integer or a tensor
is two arguments of it, a pair goes as a list, and an option of no type it knows as its repr.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from srm_core.spec import OpSpec, OptionSpec, Parameter, TensorSpec
from srm_core.torch_ops import amp

TAKEN = ("self", "mode", "args", "kwargs")  # names that functions of torch take besides an operator's arguments
VALUE = "_value"  # after the name of an option that is no tensor where it may be one
MINE = "str? srm_backend, bool srm_wants"  # the selection; will a backward follow?


def _name(p: Parameter) -> str:
    return f"{p.name}_" if p.name in TAKEN else p.name


def arguments(spec: OpSpec) -> str:
    """The parameters in the words of a schema of torch."""
    words = []
    for i, p in enumerate(spec.parameters):
        n = _name(p)
        if isinstance(p, OptionSpec):
            if p.dynamic and p.axes:
                words += [f"Tensor? {n}", f"{p.schema or 'SymInt'} {n}{VALUE}"]
            else:
                words.append(f"{p.schema or 'str'} {n}")
        else:
            alias = f"(a{i}!)" if p.name in spec.mutates else ""
            words.append(f"Tensor{alias}{'[]' if p.many else '?' if p.optional else ''} {n}")
    return ", ".join(words)


def returned(spec: OpSpec) -> list[str]:
    """The types of the outputs."""
    return ["Tensor[]" if o.many is not None else "Tensor" for o in spec.outputs]


def _names(p: Parameter) -> list[str]:
    n = _name(p)
    return [n, n + VALUE] if isinstance(p, OptionSpec) and p.dynamic and p.axes else [n]


def _outward(p: Parameter) -> list[str]:
    """Expressions for the arguments of the schema, of the parameter."""
    n = p.name
    if isinstance(p, TensorSpec):
        return [f"list({n})" if p.many else n]
    if p.dynamic and p.axes:
        return [f"{n} if _isinstance({n}, _Tensor) else None", f"0 if _isinstance({n}, _Tensor) else {n}"]
    if p.schema == "int[2]":
        return [f"_list({n}) if _isinstance({n}, _tuple) else [{n}, {n}]"]
    return [f"_list({n})" if p.schema == "str[]" else n if p.schema else f"_repr({n})"]


def _inward(p: Parameter) -> str:
    """An expression for the parameter, of the arguments of the schema."""
    n = _name(p)
    if isinstance(p, TensorSpec):
        return f"_tuple({n})" if p.many else n
    if p.dynamic and p.axes:
        return f"{n}{VALUE} if {n} is None else {n}"
    return f"_tuple({n})" if p.schema.endswith("]") else n if p.schema else f"_literal({n})"


SCOPE: dict[str, Any] = {
    "_isinstance": isinstance, "_Tensor": torch.Tensor, "_tuple": tuple, "_list": list, "_repr": repr,
    "_literal": cache(ast.literal_eval), "_compiling": torch.compiler.is_dynamo_compiling,
    "_recording": torch.is_grad_enabled, "_autocast": torch.is_autocast_enabled, "_lower": torch.get_autocast_dtype,
    "_cast": amp.cast,
}  # fmt: skip

THROUGH = """
def through(_backend, {parameters}):
    if _autocast({first}.device.type):
        ({parameters},) = _cast(_lower({first}.device.type){lower}, {roles}, ({parameters},))
    if not _compiling():
        return _eagerly(_backend, ({parameters},))
    _result = _operator({outward}, _backend, _recording() and ({wants}))
    return {result}
"""
OUTWARD = """
def outward(_backend, {parameters}):
    return _operator({outward}, _backend, _recording() and ({wants}))
"""
TRACED = """
def traced({parameters}):
    _result = _operator({outward}, None, _recording() and ({wants}))
    return {result}
"""
INWARD = """
def inward({arguments}):
    return ({values},)
"""


def _written(source: str, name: str, spec: OpSpec, **more: Any) -> Callable[..., Any]:
    scope = {**SCOPE, **more}
    exec(compile(source, f"<{name} of {spec.name}>", "exec"), scope)
    function: Callable[..., Any] = scope[name]
    return function


def _pieces(spec: OpSpec) -> dict[str, str]:
    gradients = [p for p in spec.tensors if p.name in spec.differentiable]
    wants = [f"({p.name} is not None and {p.name}.requires_grad)" for p in gradients if p.optional]
    wants = [f"{p.name}.requires_grad" for p in gradients if not p.optional] + wants
    if spec.mutates:
        result = "_result"
    else:  # without the pin, which comes last
        many = len(spec.outputs) == 1 and spec.outputs[0].many is not None
        result = "_tuple(_result[0])" if many else "_result[0]" if len(spec.outputs) == 1 else "_result[:-1]"
    return {
        "parameters": ", ".join(p.name for p in spec.parameters),
        "outward": ", ".join(e for p in spec.parameters for e in _outward(p)),
        "wants": " or ".join(wants) or "False",
        "result": result,
    }


def through(spec: OpSpec, operator: Any) -> Callable[..., Any]:
    """`through(backend, *every parameter in order)`: casts as autocast says, then calls what there is to call."""
    roles = tuple("" if isinstance(p, OptionSpec) or p.many else p.role for p in spec.parameters)
    first = next(p.name for p in spec.tensors if not p.optional and not p.many)
    source = THROUGH.format(
        first=first, roles=roles, lower="" if spec.autocast == "lower" else " and None", **_pieces(spec)
    )
    return _written(source, "through", spec, _operator=operator.overload, _eagerly=operator.eagerly)


def outward(spec: OpSpec, operator: Any) -> Callable[..., Any]:
    """`outward(backend, *every parameter in order)`: calls `operator` with the arguments of the schema."""
    return _written(OUTWARD.format(**_pieces(spec)), "outward", spec, _operator=operator)


def traced(spec: OpSpec, overload: Any) -> Callable[..., Any]:
    """`traced(*every parameter in order)`: the operator of torch.library, called as ours is."""
    return _written(TRACED.format(**_pieces(spec)), "traced", spec, _operator=overload)


def inward(spec: OpSpec) -> Callable[..., tuple[Any, ...]]:
    """The function from a schema's arguments to the values of our parameters in order."""
    names = [n for p in spec.parameters for n in _names(p)]
    source = INWARD.format(arguments=", ".join(names), values=", ".join(_inward(p) for p in spec.parameters))
    return _written(source, "inward", spec)


def positions(spec: OpSpec) -> dict[str, int]:
    """Where each parameter stands among the arguments of the schema."""
    names = [n for p in spec.parameters for n in _names(p)]
    return {p.name: names.index(_name(p)) for p in spec.parameters}
