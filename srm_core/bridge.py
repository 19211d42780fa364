"""Running a kernel of one array library on arrays of another, without copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from srm_core.arrays import LIBRARIES, VIEWS, library_of
from srm_core.config import State
from srm_core.context import ForeignContext, LaunchContext
from srm_core.contract import Call, arrays_of
from srm_core.errors import ContractError


def view_library(call: Call, arrays: tuple[str, ...]) -> str | None:
    """The library as which the kernel can see the call's arrays without a copy."""
    if call.array_library in arrays:
        return call.array_library
    return next((a for a in arrays if (call.array_library, a, call.platform) in VIEWS), None)


class Bridge:
    """Runs a kernel of one library on arrays of another, which it sees as views; results go the way back."""

    def __init__(self, call: Call, arrays: tuple[str, ...], state: State) -> None:
        target = view_library(call, arrays)
        assert target is not None  # the decision was made by the same function
        self.caller, self.target = call.array_library, target
        self.device, self.state = call.device, state
        self.memo: dict[Any, Any] = {}
        self.view = VIEWS[call.array_library, target, call.platform]
        self.back = VIEWS[target, call.array_library, call.platform]
        self.op = call.spec.name
        self.mutates = call.spec.mutates
        self.names = tuple(p.name for p in call.spec.parameters)
        self.many = {p.name for p in call.spec.tensors if p.many}

    def context(self, kept: dict[str, Any] | None = None) -> ForeignContext:
        return ForeignContext(self.target, self.caller, self.device, self.state, self.view, self.back, kept, self.memo)

    def inward(self, name: str, value: Any) -> Any:
        if name in self.many:
            return tuple(self.inward(f"{name}[{i}]", one) for i, one in enumerate(value))
        if library_of(value) != self.caller:
            return value
        why = LIBRARIES[self.caller].refuse(value)  # gradients given to a pullback have not been through `Call`
        if why:
            raise ContractError(self.op, name, why, "a plain array", "pass a plain dense array")
        return self.view(value)

    def all_inward(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(self.inward(n, a) for n, a in zip(self.names, args, strict=False)),
            {k: self.inward(k, v) for k, v in options.items()},
        )

    def outward(self, context: ForeignContext, result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(self.outward(context, r) for r in result)
        return None if result is None else context.to_caller(result)

    def forward(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(_: LaunchContext, *args: Any, **options: Any) -> Any:
            context = self.context()
            seen, named = self.all_inward(args, options)
            result = kernel(context, *seen, **named)
            if self.mutates:
                self._write_back(
                    {**dict(zip(self.names, args, strict=False)), **options},
                    {**dict(zip(self.names, seen, strict=False)), **named},
                )
            return self.outward(context, result)

        return run

    def _write_back(self, values: dict[str, Any], views: dict[str, Any]) -> None:
        """What the kernel changed, where the array could not be seen without a copy (only NumPy's: VIEWS)."""
        for name in self.mutates:
            for (_, value), (_, view) in zip(arrays_of(name, values[name]), arrays_of(name, views[name]), strict=True):
                after = self.back(view)
                if self.caller == "numpy" and not np.may_share_memory(value, after):
                    value[...] = after
