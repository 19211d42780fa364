"""Kernels and torch's autograd: a kernel with a backward of its own as a node of the graph, and the other way, the
backward of a kernel made of differentiable operations as a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


class Layout:
    """Where in the values of a recording's calls, arguments and then options, the tensors are. It is the same in each
    of them, and asked for at each: so it is found out once."""

    def __init__(self, recording: Recording, values: tuple[Any, ...], options: tuple[str, ...]) -> None:
        self.recording, self.options, self.count = recording, options, len(values) - len(options)
        self.tensors = tuple(i for i, v in enumerate(values) if isinstance(v, torch.Tensor))
        self.names = [p.name for p in recording.spec.parameters]
        self.sources = tuple(self.names.index(n) for n in recording.spec.differentiable)

        self._wanted: dict[tuple[bool, ...], tuple[str, ...]] = {}

    def split(self, values: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(arguments, options)."""
        if not self.options:
            return tuple(values), {}
        return tuple(values[: self.count]), dict(zip(self.options, values[self.count :], strict=True))

    def wanted(self, needed: tuple[bool, ...]) -> tuple[str, ...]:
        """The names of the values that need gradients."""
        found = self._wanted.get(needed)
        if found is None:
            found = self._wanted[needed] = tuple(n for n, needs in zip(self.names, needed, strict=True) if needs)
        return found


class Pinned(torch.autograd.Function):
    """The node of a kernel with a backward of its own, whatever is selected when the backward comes."""

    @staticmethod
    def forward(ctx: Any, layout: Layout, *values: Any) -> Any:
        result, kept = layout.recording.run(*layout.split(values))
        rest = list(values)
        tensors = []
        for i in layout.tensors:
            tensors.append(rest[i])
            rest[i] = None
        names: tuple[str, ...] = ()
        if kept:
            names = tuple(n for n, k in kept.items() if isinstance(k, torch.Tensor))
            tensors += [kept.pop(n) for n in names]
        ctx.save_for_backward(*tensors)
        ctx.rest = layout, rest, names, kept
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        layout, rest, names, kept = ctx.rest
        saved, values, needed = ctx.saved_tensors, rest.copy(), ctx.needs_input_grad[1:]
        for i, tensor in zip(layout.tensors, saved, strict=False):
            values[i] = tensor
        if names:
            kept = {**kept, **dict(zip(names, saved[len(layout.tensors) :], strict=True))}
        recording: Recording = layout.recording
        args, options = layout.split(values)
        if torch.is_grad_enabled():  # they are to be differentiated again: not being recorded, they would be constants
            with torch.no_grad():
                found = recording.pull(args, options, kept, grads, layout.wanted(needed))
            sources = [v for v in (*values, *grads) if isinstance(v, torch.Tensor) and v.requires_grad]
            found = tuple(None if g is None else Last.apply(recording, g, *sources) for g in found)
        else:
            found = recording.pull(args, options, kept, grads, layout.wanted(needed))
        results: list[Any] = [None] * (1 + len(values))
        for i, gradient in zip(layout.sources, found, strict=True):
            if needed[i]:
                results[1 + i] = gradient
        return tuple(results)


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
    layout: Layout | None = None

    def run(_: LaunchContext, *args: Any, **options: Any) -> Any:
        nonlocal layout
        values = (*args, *options.values())
        if layout is None:
            layout = Layout(recording, values, tuple(options))
        return Pinned.apply(layout, *values)

    return run
