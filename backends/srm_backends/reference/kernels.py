"""`kernels.scan` runs the reference of `scan`, `kernels.scan.vjp` its vector-Jacobian product; so for every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from srm_core.context import LaunchContext, Residuals
from srm_core.contract import Call
from srm_core.ops.common import is_channels_last
from srm_core.registry import registry
from srm_core.spec import OpSpec

# NaN and infinity are results like others, also float64 past the range of a half type: none is warned of.
quiet = np.errstate(over="ignore", invalid="ignore", under="ignore", divide="ignore")


class ReferenceKernel:
    """Computes in float64 and rounds once, to the dtypes that the specification gives the outputs."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec

    @quiet
    def __call__(self, ctx: LaunchContext, *args: Any, **options: Any) -> Any:
        call = Call(self.spec, args, options)
        results = self.spec.reference(np.float64, *args, **options)
        dtypes = call.output_dtypes()
        outputs = [
            _rounded(ctx, r, d, bool(f) and is_channels_last(call.values[f]))
            for r, d, f in zip(results[: len(dtypes)], dtypes, call.output_formats(), strict=True)
        ]
        for (_, value), after in zip(call.mutated(), results[len(dtypes) :], strict=True):
            value[...] = after
        return self.spec.pack(outputs)

    @quiet
    def vjp(self, ctx: LaunchContext, residuals: Residuals, *grads: Any) -> tuple[Any, ...]:
        if self.spec.vjp is None:
            raise NotImplementedError(f"{self.spec.name} has no vector-Jacobian product")
        call = Call(self.spec, residuals.args, residuals.options)
        results = self.spec.vjp(np.float64, grads, *residuals.args, **residuals.options)
        names = self.spec.differentiable
        return tuple(
            None if r is None else _rounded(ctx, r, call.dtypes[n]) for n, r in zip(names, results, strict=True)
        )


def _rounded(ctx: LaunchContext, result: Any, dtype: str, channels_last: bool = False) -> Any:
    if channels_last:
        batch, channels, height, width = result.shape
        out = ctx.empty((batch, height, width, channels), dtype).transpose(0, 3, 1, 2)
    else:
        out = ctx.empty(result.shape, dtype)
    out[...] = result
    return out


def __getattr__(name: str) -> Callable[..., Any]:
    spec = registry().specs.get(name)
    if spec is None:
        raise AttributeError(f"no operator is called {name!r}")
    return ReferenceKernel(spec)
