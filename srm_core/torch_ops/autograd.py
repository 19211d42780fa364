"""Kernels and torch's autograd: a kernel with a backward of its own as a node of the graph, and the other way, the
backward of a kernel made of differentiable operations as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from srm_core.context import LaunchContext, Residuals
from srm_core.errors import KernelError
from srm_core.gradients import Recording
from srm_core.spec import OpSpec


class Tape:
    """A kernel of differentiable torch operations, as a forward and a backward."""

    def __init__(self, spec: OpSpec, kernel: Callable[..., Any]) -> None:
        self.spec, self.kernel = spec, kernel
        self.names = [p.name for p in spec.parameters]

    def forward(self, ctx: LaunchContext, *args: Any, **options: Any) -> Any:
        values = dict(zip(self.names, args, strict=False))
        leaves = {}
        for name in self.spec.differentiable:
            value = values.get(name, options.get(name))
            if value is not None and value.is_floating_point():
                leaves[name] = value.detach().requires_grad_()
        with torch.enable_grad():
            result = self.kernel(
                ctx, *(leaves.get(n, v) for n, v in values.items()), **{n: leaves.get(n, v) for n, v in options.items()}
            )
        outputs = self.spec.unpack(result)
        ctx.keep("leaves", leaves)
        ctx.keep("outputs", outputs)
        return self.spec.pack([o.detach() for o in outputs])

    def backward(self, ctx: LaunchContext, residuals: Residuals, *grads: Any) -> tuple[Any, ...]:
        leaves, outputs = residuals.get("leaves"), residuals.get("outputs")
        wanted = [n for n in leaves if residuals.wants(n)]
        ends = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        found: tuple[Any, ...] = (None,) * len(wanted)
        if ends and wanted:
            found = torch.autograd.grad(
                [o for o, _ in ends], [leaves[n] for n in wanted], [g for _, g in ends],
                retain_graph=True, allow_unused=True,
            )  # fmt: skip
        by_name: dict[str, Any] = {}
        taken = {g.untyped_storage().data_ptr() for g in grads}  # autograd hands on what it was given
        for name, gradient in zip(wanted, found, strict=True):
            own = torch.zeros_like(leaves[name]) if gradient is None else gradient
            by_name[name] = own = own.clone() if own.untyped_storage().data_ptr() in taken else own
            taken.add(own.untyped_storage().data_ptr())
        return tuple(by_name.get(n) for n in self.spec.differentiable)


class Pinned(torch.autograd.Function):
    """The node of a kernel with a backward of its own, whatever is selected when the backward comes."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, options: tuple[str, ...], *values: Any) -> Any:
        count = len(values) - len(options)
        result, kept = recording.run(values[:count], dict(zip(options, values[count:], strict=True)))
        ctx.recording, ctx.options = recording, options
        tensors = [v for v in values if isinstance(v, torch.Tensor)]
        residuals = {n: k for n, k in kept.items() if isinstance(k, torch.Tensor)}
        ctx.save_for_backward(*tensors, *residuals.values())
        ctx.values = tuple(None if isinstance(v, torch.Tensor) else (v,) for v in values)
        ctx.residuals = tuple(residuals)
        ctx.others = {n: k for n, k in kept.items() if n not in residuals}
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        values = [next(saved) if v is None else v[0] for v in ctx.values]
        kept = {**ctx.others, **dict(zip(ctx.residuals, saved, strict=True))}
        recording: Recording = ctx.recording
        spec, count = recording.spec, len(values) - len(ctx.options)
        needed = dict(zip((p.name for p in spec.parameters), ctx.needs_input_grad[2:], strict=True))
        options = dict(zip(ctx.options, values[count:], strict=True))
        wanted = tuple(n for n in needed if needed[n])
        with torch.no_grad():
            found = recording.pull(tuple(values[:count]), options, kept, grads, wanted)
        by_name = {n: g for n, g in zip(spec.differentiable, found, strict=True) if needed[n] and g is not None}
        if (
            torch.is_grad_enabled()
        ):  # they are to be differentiated again: not being recorded, they would pass as constants
            sources = [v for v in (*values, *grads) if isinstance(v, torch.Tensor) and v.requires_grad]
            by_name = {n: Last.apply(recording, g, *sources) for n, g in by_name.items()}
        return (None, None, *(by_name.get(n) for n in needed))


class Last(torch.autograd.Function):
    """A gradient that has no gradient: asking for one is an error, not 0."""

    @staticmethod
    def forward(ctx: Any, recording: Recording, gradient: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
        ctx.decision = recording.decision
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise KernelError(
            f"{ctx.decision.op}: the backward kernel of backend {ctx.decision.chosen!r} cannot be differentiated "
            "again; use the backend 'torch', whose gradients have gradients"
        )


def pinned(recording: Recording) -> Callable[..., Any]:
    """As a kernel: the forward that puts the recording's node into torch's graph."""

    def run(_: LaunchContext, *args: Any, **options: Any) -> Any:
        return Pinned.apply(recording, tuple(options), *args, *options.values())

    return run
