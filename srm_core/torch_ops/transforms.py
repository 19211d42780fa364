"""torch.func: operators under vmap, and their gradients under grad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from srm_core.axes import ANY_SHAPE
from srm_core.spec import OpSpec, OptionSpec, Parameter
from srm_core.torch_ops import written

has_transforms: Callable[[], bool] = torch._C._are_functorch_transforms_active


def one_by_one(operator: Any) -> Callable[..., Any]:
    """The rule of vmap that always holds: a call for each example."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        calls = [
            operator(*(_example(a, d, i) for a, d in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        return _together(calls)

    return rule


def _example(value: Any, dim: Any, i: int) -> Any:
    if isinstance(value, list | tuple) and isinstance(dim, list | tuple):
        return [_example(v, d, i) for v, d in zip(value, dim, strict=True)]
    return value if dim is None else value.select(dim, i)


def _together(calls: list[Any]) -> tuple[Any, Any]:
    """(the results of the calls stacked, where their new axis is). A pin, the same for all, is not stacked."""
    first = calls[0]
    if isinstance(first, list | tuple):
        pairs = [_together([c[k] for c in calls]) for k in range(len(first))]
        kind = type(first)
        return kind(p for p, _ in pairs), kind(d for _, d in pairs)
    if first.dtype is torch.int64 and first.dim() == 0:
        return first, None
    return torch.stack(calls), 0


class Batching:
    """The rule of vmap of one operator: the new axis is folded into B where every sequence is for itself, and nothing
    else than sequences is batched; otherwise a call for each example."""

    def __init__(self, spec: OpSpec, operator: Any) -> None:
        self.operator, self.one_by_one = operator, one_by_one(operator)
        self.parameters: list[Parameter | None] = []
        for p in spec.parameters:
            value = [None] if isinstance(p, OptionSpec) and p.dynamic and p.axes else []
            self.parameters += [p, *value]
        self.apart = all(o.many is None and o.axes.startswith("B ") for o in spec.outputs)

    def forward(self, info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        folded = self._fold(info.batch_size, in_dims, arguments) if self.apart else None
        if folded is None:
            return self.one_by_one(info, in_dims, *arguments)
        *outputs, pin = self.operator(*folded)
        return (*(o.unflatten(0, (info.batch_size, -1)) for o in outputs), pin), (*(0 for _ in outputs), None)

    def _fold(self, count: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> list[Any] | None:
        folded: list[Any] = []
        # The number of sequences of one example; 1 may stand for all of them in an argument.
        sizes = {
            _shape(a, d)[0]
            for a, d, p in zip(arguments, in_dims, self.parameters, strict=False)
            if isinstance(a, torch.Tensor) and self._leads(p, _shape(a, d))
        }
        batch = max(sizes, default=0)
        if not batch:
            return None
        for i, (value, dim) in enumerate(zip(arguments, in_dims, strict=True)):
            p = self.parameters[i] if i < len(self.parameters) else None
            if not isinstance(value, torch.Tensor):
                folded.append(value)
                continue
            shape = _shape(value, dim)
            if not self._leads(p, shape):
                if dim is not None:
                    return None
                folded.append(value)
                continue
            if dim is None and shape[0] == 1 and batch > 1:
                folded.append(value)  # one for all sequences of all examples
                continue
            moved = value.expand(count, *shape) if dim is None else value.movedim(dim, 0)
            folded.append(moved.expand(count, batch, *shape[1:]).reshape(count * batch, *shape[1:]))
        return folded

    def _leads(self, p: Parameter | None, shape: tuple[int, ...]) -> bool:
        """Is the first axis of an argument of this shape that of the sequences, in whichever form it has?"""
        if p is None or not p.axes or ANY_SHAPE in p.axes:
            return False
        forms = [words.split() for words in p.axes if len(words.split()) == len(shape)]
        return bool(forms) and all(f and f[0] in ("B", "B?", "1") for f in forms)


def _shape(value: torch.Tensor, dim: int | None) -> tuple[int, ...]:
    """The shape of one example."""
    shape = list(value.shape)
    if dim is not None:
        del shape[dim]
    return tuple(shape)


def differentiable(operator: Any, rule: Batching) -> Callable[[str | None, tuple[Any, ...]], Any]:
    """The operator as a function that torch.func can differentiate: `transformed(backend, values)`.

    A library operator's own registration of autograd is not one that the transforms accept.
    """

    class Transformed(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            result = operator.overload(*arguments)
            return (*result[0], result[1]) if operator.many else result

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.mark_non_differentiable(output[-1])
            operator.keep(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return operator.backward(ctx, *([list(grads[:-1]), None] if operator.many else grads))

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
            result, dims = rule.forward(info, in_dims, *arguments)
            return ((*result[0], result[1]), (*dims[0], dims[1])) if operator.many else (result, dims)

    call = written.outward(operator.spec, Transformed.apply)

    def transformed(backend: str | None, values: tuple[Any, ...]) -> Any:
        *outputs, _ = call(backend, *values)
        return operator.spec.pack(outputs)

    return transformed
