"""What a mutant is: an honest kernel of the `numpy` backend, wrong in one small way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from srm_core.registry import registry, resolve
from srm_core.spec import BackendInfo, Kernel

Wrapper = Callable[..., Any]
CATALOGUE: list[Mutant] = []


@dataclass(frozen=True)
class Mutant:
    """A wrong kernel of one operator.

    forward(honest, ctx, *args, **options) and backward(honest, ctx, residuals, *grads) stand in for the honest
    kernel, which they may call; None: the honest one. fields: what of the `Kernel` is another.
    """

    op: str
    name: str
    forward: Wrapper | None = None
    backward: Wrapper | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def honest(self) -> Kernel:
        return registry().kernels[self.op]["numpy"].kernel

    def backend(self, name: str) -> BackendInfo:
        """A backend called `name` whose one kernel is this one."""
        here = f"{__name__}:running.{name}"
        honest = self.honest
        backward = honest.backward and f"{here}.backward"
        kernel = replace(honest, forward=f"{here}.forward", backward=backward, **self.fields)
        setattr(running, name, _Targets(self))
        return BackendInfo(name, tech="numpy", kernels=(kernel,))


class _Targets:
    """The functions that a mutant's kernel names."""

    def __init__(self, mutant: Mutant) -> None:
        honest = mutant.honest
        self.forward = _around(mutant.forward, honest.forward)
        self.backward = _around(mutant.backward, honest.backward) if honest.backward else None


def _around(wrapper: Wrapper | None, target: str) -> Callable[..., Any]:
    return resolve(target) if wrapper is None else partial(wrapper, resolve(target))


class _Running:
    """Where the targets of the mutants that run are found, by the name of their backend."""


running = _Running()


def forward(op: str, name: str, **fields: Any) -> Callable[[Wrapper], Wrapper]:
    """A mutant whose forward is this function; a decorator."""

    def add(wrapper: Wrapper) -> Wrapper:
        CATALOGUE.append(Mutant(op, name, forward=wrapper, fields=fields))
        return wrapper

    return add


def backward(op: str, name: str, **fields: Any) -> Callable[[Wrapper], Wrapper]:
    """A mutant whose backward is this function; a decorator."""

    def add(wrapper: Wrapper) -> Wrapper:
        CATALOGUE.append(Mutant(op, name, backward=wrapper, fields=fields))
        return wrapper

    return add
