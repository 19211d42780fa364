"""torch's side of the operators: what torch.compile, torch.func, autocast and autograd need. Needs torch.

A call that autocast, a transform of torch.func or torch.compile has a say in does not go straight to a kernel:
`THROUGH` has, for each operator, the function that it goes through, which leads to an operator of torch.library
(`torch.ops.srm.scan`) or, with autocast alone, back to the call path with the arguments cast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from srm_core.ops import SPECS
from srm_core.spec import OpSpec
from srm_core.torch_ops.library import LibraryOperator, is_strict
from srm_core.torch_ops.transforms import has_transforms
from srm_core.torch_ops.written import outward, through

__all__ = ["THROUGH", "call_path", "define", "is_special", "outward", "trace_through"]

is_compiling = torch.compiler.is_dynamo_compiling
is_autocasting: Callable[[], bool] = torch._C._is_any_autocast_enabled

THROUGH: dict[str, Callable[..., Any]] = {}
_OPERATORS: dict[str, LibraryOperator] = {}


def is_special() -> bool:
    """Must calls go through an operator of torch.library, be cast, or be deterministic, at this moment?"""
    return is_compiling() or has_transforms() or is_autocasting() or is_strict()


def define(spec: OpSpec) -> LibraryOperator:
    """The operator of torch.library for `spec`, made at its first use; made anew for another spec of that name."""
    found = _OPERATORS.get(spec.name)
    if found is None or found.spec is not spec:
        if found is not None:
            found.remove()
        found = _OPERATORS[spec.name] = LibraryOperator(spec)
        THROUGH[spec.name] = through(spec, found)
    return found


def call_path(spec: OpSpec) -> dict[str, Any]:
    """What the call path of an operator asks at each call, and where it goes if the answer is yes."""
    define(spec)
    return {
        "_compiling": is_compiling, "_transforms": has_transforms, "_autocasts": is_autocasting,
        "_strict": is_strict, "_through": THROUGH[spec.name],
    }  # fmt: skip


def trace_through(spec: OpSpec) -> Callable[..., Any]:
    """As a kernel: the operator of torch.library, for tensors without values."""
    operator = define(spec)

    def run(_: Any, *args: Any, **options: Any) -> Any:
        return operator.traced(*args, *options.values())

    return run


for _spec in SPECS.values():
    define(_spec)
