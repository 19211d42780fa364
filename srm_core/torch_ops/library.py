"""One operator of torch.library for each operator of ours: what torch.compile, opcheck and export see.

The kernel is chosen when it runs, by the selection around the call. Its outputs are followed by a pin, a number that
says which backend ran and under which policies; the backward, an operator of its own, runs that backend again. It keeps
nothing but the arguments: the forward is run once more there, as what a kernel would keep has no shape that a trace
could know (docs/adr/0023).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from srm_core import dispatch
from srm_core.config import CURRENT, State, deterministic
from srm_core.contract import Call
from srm_core.decision import PASSED, kernel_error
from srm_core.spec import OpSpec
from srm_core.torch_ops import transforms, written

NAMESPACE = "srm"
_PINS: list[tuple[str, State]] = []  # (backend, policies); as many as there are combinations of them


def _pin(backend: str, state: State) -> int:
    pin = (backend, state)
    if pin not in _PINS:
        _PINS.append(pin)
    return _PINS.index(pin)


class LibraryOperator:
    """`torch.ops.srm.<name>` and, for an operator with gradients, `torch.ops.srm.<name>_backward`."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.library = torch.library.Library(NAMESPACE, "FRAGMENT")
        self.positional = sum(not p.keyword for p in spec.parameters)
        self.options = [p.name for p in spec.parameters if p.keyword]
        self.inward, self.positions = written.inward(spec), written.positions(spec)
        self.many = len(spec.outputs) == 1 and spec.outputs[0].many is not None
        arguments, outputs = written.arguments(spec), written.returned(spec)
        if not spec.mutates:
            outputs.append("Tensor")
        self.overload = self._define(
            spec.name, f"({arguments}, {written.MINE}) -> ({', '.join(outputs)})", self.run, self.shapes
        )
        if not spec.mutates:
            self.backward_overload = self._define(
                f"{spec.name}_backward", f"(Tensor?[] grads, {arguments}, Tensor pin, bool[] wanted) -> Tensor[]",
                self.run_backward, self.backward_shapes,
            )  # fmt: skip
            name = f"{NAMESPACE}::{spec.name}"
            torch.library.register_autograd(name, self.backward, setup_context=self.keep, lib=self.library)
            rule = transforms.Batching(spec, self.overload)
            torch.library.register_vmap(name, rule.forward, lib=self.library)
            torch.library.register_vmap(
                f"{name}_backward", transforms.one_by_one(self.backward_overload), lib=self.library
            )
            self.transformed = transforms.differentiable(self, rule)
        self.traced = written.traced(spec, self.overload)

    def _define(self, name: str, schema: str, run: Any, shapes: Any) -> Any:
        self.library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=self.library)
        return getattr(getattr(torch.ops, NAMESPACE), name).default

    def remove(self) -> None:
        """Take it out of torch.ops."""
        self.library._destroy()

    def _call(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return values[: self.positional], dict(zip(self.options, values[self.positional :], strict=True))

    def run(self, *arguments: Any) -> Any:
        """The operator on tensors with values, below autograd."""
        *given, backend, wants = arguments
        values = self.inward(*given)
        with no_autocast(values), strictly():
            state = CURRENT.get()
            plan = dispatch.operator(self.spec.name).find(wants, backend, *values)
            args, options = self._call(values)
            if plan.check is not None:
                plan.check(*args, **options)
            try:
                result = plan.forward(plan.context, *args, **options)
            except PASSED:
                raise
            except Exception as error:
                raise kernel_error(plan.decision, error) from error
        if self.spec.mutates:
            return result if self.spec.outputs else None
        # What a trace was told of strides must be so.
        outputs = [
            o.contiguous(memory_format=_format(values, f, self.positions))
            for o, f in zip(self.spec.unpack(result), self._formats(result), strict=True)
        ]
        pin = torch.tensor(_pin(plan.decision.chosen or "", state))
        return (outputs, pin) if self.many else (*outputs, pin)

    def _formats(self, result: Any) -> list[str]:
        outputs = self.spec.outputs
        return [outputs[0].format] * len(result) if self.many else [o.format for o in outputs]

    def shapes(self, *arguments: Any) -> Any:
        """The outputs of tensors without values."""
        values = tuple(0 if isinstance(v, torch.SymInt) else v for v in self.inward(*arguments[:-2]))
        call = Call(self.spec, *self._call(values))
        like = next(v for v in values if isinstance(v, torch.Tensor))
        outputs = [
            torch.empty(s, dtype=getattr(torch, d), device=like.device, memory_format=_format(call.values, f))
            for s, d, f in zip(call.output_shapes(), call.output_dtypes(), call.output_formats(), strict=True)
        ]
        if self.spec.mutates:
            return outputs[0] if outputs else None
        pin = torch.empty((), dtype=torch.int64)
        return (outputs, pin) if self.many else (*outputs, pin)

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """What the backward needs: the arguments and the pin."""
        given = inputs[:-2]
        ctx.save_for_backward(*(v for v in given if isinstance(v, torch.Tensor)), output[-1])
        ctx.rest = tuple(None if isinstance(v, torch.Tensor) else (v,) for v in given)
        ctx.set_materialize_grads(False)

    def backward(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        given = [next(saved) if v is None else v[0] for v in ctx.rest]
        of_outputs = list(grads[0] or [None] * len(grads[0] or ())) if self.many else list(grads[:-1])
        needed = [ctx.needs_input_grad[self.positions[n]] for n in self.spec.differentiable]
        found = iter(self.backward_overload(of_outputs, *given, next(saved), needed))
        by_position = {
            self.positions[n]: next(found) for n, need in zip(self.spec.differentiable, needed, strict=True) if need
        }
        return (*(by_position.get(i) for i in range(len(given))), None, None)

    def run_backward(self, grads: list[Any], *arguments: Any) -> list[Any]:
        """The gradients of the inputs that are wanted, in order."""
        *given, pin, wanted = arguments
        values = self.inward(*given)
        backend, state = _PINS[int(pin)]
        token = CURRENT.set(state)
        try:
            with no_autocast(values):
                recording = dispatch.operator(self.spec.name).find(True, backend, *values).recording
                assert recording is not None
                args, options = self._call(values)
                result, kept = recording.run(args, options)
                ends = self.spec.unpack(result)
                full = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(ends, grads, strict=True))
                names = tuple(n for n, w in zip(self.spec.differentiable, wanted, strict=True) if w)
                found = dict(
                    zip(self.spec.differentiable, recording.pull(args, options, kept, full, names), strict=True)
                )
        finally:
            CURRENT.reset(token)
        likes = dict(zip((p.name for p in self.spec.parameters), values, strict=True))
        return [found[n].contiguous(memory_format=_memory_format(likes[n])) for n in names]

    def backward_shapes(self, grads: list[Any], *arguments: Any) -> list[Any]:
        *given, _, wanted = arguments
        likes = dict(zip((p.name for p in self.spec.parameters), self.inward(*given), strict=True))
        return [
            torch.empty(
                likes[n].shape, dtype=likes[n].dtype, device=likes[n].device, memory_format=_memory_format(likes[n])
            )
            for n, w in zip(self.spec.differentiable, wanted, strict=True)
            if w
        ]

    def eagerly(self, backend: str | None, values: tuple[Any, ...]) -> Any:
        """A call under a transform of torch.func, with arguments that autocast has cast, or to be deterministic."""
        if transforms.has_transforms() and not self.spec.mutates:
            return self.transformed(backend, values)
        with no_autocast(values), strictly():
            return dispatch.operator(self.spec.name).run(backend, *values)


def is_strict() -> bool:
    """Does torch ask for deterministic algorithms, where our own policy does not yet?"""
    if not torch._C._get_deterministic_algorithms() or torch._C._get_deterministic_algorithms_warn_only():
        return False
    return not CURRENT.get().deterministic


def strictly() -> AbstractContextManager[None]:
    """Within it our own policy is as torch's switch."""
    return deterministic() if is_strict() else nullcontext()


def no_autocast(values: tuple[Any, ...]) -> Any:
    """Kernels see what they are given: autocast has had its say before."""
    like = next(v for v in values if isinstance(v, torch.Tensor))
    return torch.autocast(like.device.type, enabled=False)


def _memory_format(like: Any) -> torch.memory_format:
    """Channels-last for images dense in that order, and not in their own as well; else row-major."""
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous():
        return torch.channels_last
    return torch.contiguous_format


def _format(values: Any, name: str, positions: dict[str, int] | None = None) -> torch.memory_format:
    """The memory format that an output has from the argument `name`."""
    if not name:
        return torch.contiguous_format
    return _memory_format(values[name if positions is None else positions[name]])
