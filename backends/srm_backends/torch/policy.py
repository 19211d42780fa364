"""torch's own switches, held to the policy of a call: TF32 products, and deterministic algorithms.

The switches are torch's, one for all threads. So calls of several threads under one policy hold them together, the
first one sets and the last one restores; a call under the other policy waits. Where the switches agree with a call
from the start it holds nothing: then a thread under the other policy is seen.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from srm_core.context import LaunchContext

# A policy: the precision of float32 products, or None where there are none; deterministic?
Policy = tuple[str | None, bool]
# What a kernel multiplies with, which each has a switch of its own.
Products = Literal["matmul", "conv", "rnn"]


def _precision_of(is_cuda: bool, products: Products) -> tuple[Callable[[], str], Callable[[str], None]]:
    """How to read and to write the switch of float32 products: "ieee", "tf32", "bf16", or "none" where nobody has set
    it, which is "ieee".

    From torch 2.9 on there is one by device and operation. Reading it as an attribute takes microseconds, and reading
    the older form of one that was set by the newer raises.
    """
    if hasattr(torch._C, "_get_fp32_precision_getter"):
        name = ("cuda" if is_cuda else "mkldnn", products)
        return lambda: torch._C._get_fp32_precision_getter(*name), lambda v: _set_precision(*name, v)
    if not is_cuda:
        return lambda: "ieee", lambda value: None
    owner: Any = torch.backends.cuda.matmul if products == "matmul" else torch.backends.cudnn
    return lambda: "tf32" if owner.allow_tf32 else "ieee", lambda value: setattr(owner, "allow_tf32", value == "tf32")


def _set_precision(device: str, products: str, value: str) -> None:
    torch._C._set_fp32_precision_setter(device, products, value)


SWITCHES = {
    (is_cuda, products): _precision_of(is_cuda, products)
    for is_cuda in (True, False)
    for products in get_args(Products)
}


def _wanted(ctx: LaunchContext, like: Tensor) -> Policy:
    """What a call needs. Half types are computed in float32 here and there; on a CPU TF32 never helps."""
    if like.dtype is torch.float64:
        return None, ctx.deterministic
    return ctx.precision if like.is_cuda else "ieee", ctx.deterministic and like.is_cuda


def _agrees(policy: Policy, is_cuda: bool, products: Products) -> bool:
    """Are the switches as the policy says?"""
    precision, deterministic = policy
    if deterministic and not torch.are_deterministic_algorithms_enabled():
        return False
    if precision is None:
        return True
    now = SWITCHES[is_cuda, products][0]()
    return now == precision or (now == "none" and precision == "ieee")


class _Holder:
    """The calls that hold switches at the moment, all of one policy."""

    def __init__(self) -> None:
        self.free = threading.Condition()
        self.policy: Policy | None = None
        self.count = 0
        self.restore: list[Callable[[], None]] = []
        self.kinds: set[tuple[bool, Products]] = set()
        self.mine = threading.local()

    def enter(self, policy: Policy, is_cuda: bool, products: Products) -> None:
        """Wait for calls under another policy, and set what is not set yet. A call within a call of the same thread,
        whose policy it then has, waits for nobody."""
        depth = getattr(self.mine, "depth", 0)
        with self.free:
            if not depth:
                self.free.wait_for(lambda: not self.count or self.policy == policy)
            if not self.count:
                self.policy = policy
            self.count += 1
            self.mine.depth = depth + 1
            if (is_cuda, products) not in self.kinds:
                self.kinds.add((is_cuda, products))
                self._set(policy, is_cuda, products)

    def _set(self, policy: Policy, is_cuda: bool, products: Products) -> None:
        precision, deterministic = policy
        if deterministic and not torch.are_deterministic_algorithms_enabled():
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            torch.use_deterministic_algorithms(True)
            self.restore.append(lambda: torch.use_deterministic_algorithms(False, warn_only=warn_only))
        if precision is not None:
            read, write = SWITCHES[is_cuda, products]
            before = read()
            if before != precision:
                write(precision)
                self.restore.append(lambda: write(before))

    def leave(self) -> None:
        with self.free:
            self.mine.depth -= 1
            self.count -= 1
            if not self.count:
                for restore in reversed(self.restore):
                    restore()
                self.restore.clear()
                self.kinds.clear()
                self.policy = None
                self.free.notify_all()

    def forget(self) -> None:
        """In a process that was forked: the calls of other threads do not go on in it."""
        for restore in reversed(self.restore):
            restore()
        self.__init__()  # type: ignore[misc]


_HOLDER = _Holder()
if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_HOLDER.forget)


def differs(ctx: LaunchContext, like: Tensor, products: Products) -> bool:
    """Is a switch of torch other than the call's policy says, or as it says only for as long as another call lasts?"""
    return bool(_HOLDER.count) or not _agrees(_wanted(ctx, like), like.is_cuda, products)


@contextmanager
def held(ctx: LaunchContext, like: Tensor, products: Products) -> Iterator[None]:
    """Within it torch's switches for these products are as the policy of the call says, for tensors like `like`."""
    if not differs(ctx, like, products):
        yield
        return
    _HOLDER.enter(_wanted(ctx, like), like.is_cuda, products)
    try:
        yield
    finally:
        _HOLDER.leave()


class _Held(torch.autograd.Function):
    """A differentiable function whose backward runs under the policy, too, whenever and in whichever thread it comes.

    The forward's graph is kept inside. A backward that is to be differentiated itself starts anew from the arguments.
    """

    @staticmethod
    def forward(
        ctx: Any, body: Callable[..., tuple[Tensor, ...]], products: Products, launch: LaunchContext, *values: Any
    ) -> Any:
        ctx.body, ctx.products, ctx.launch = body, products, launch
        inner = [v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in values]
        with torch.enable_grad(), held(launch, values[0], products):
            outputs = body(*inner)
        ctx.save_for_backward(*(v for v in values if isinstance(v, Tensor)))
        ctx.rest = tuple(None if isinstance(v, Tensor) else (v,) for v in values)
        ctx.inner, ctx.outputs = inner, outputs
        return tuple(o.detach() for o in outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = iter(ctx.saved_tensors)  # also asks whether one was written to since
        values = [next(saved) if r is None else r[0] for r in ctx.rest]
        twice = torch.is_grad_enabled()
        with torch.enable_grad(), held(ctx.launch, values[0], ctx.products):
            outputs = ctx.body(*values) if twice else ctx.outputs
            sources = values if twice else ctx.inner
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
            ends = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in ends], [sources[i] for i in wanted], [g for _, g in ends],
                retain_graph=True, create_graph=twice, allow_unused=True,
            )  # fmt: skip
        by_place = dict(zip(wanted, found, strict=True))
        return (None, None, None, *(by_place.get(i) for i in range(len(values))))


def under_policy(products: Products) -> Callable[..., Callable[..., tuple[Tensor, ...]]]:
    """A decorator: `body(*tensors and others)`, of differentiable operations, called as `(ctx, *the same)`, forward and
    backward under the policy of the call. products: what it multiplies with. It costs next to nothing where torch's
    switches agree with it."""

    def decorator(body: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        @wraps(body)
        def run(ctx: LaunchContext, *values: Any) -> tuple[Tensor, ...]:
            if not differs(ctx, values[0], products):
                return body(*values)
            if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values):
                return _Held.apply(body, products, ctx, *values)
            with held(ctx, values[0], products):
                return body(*values)

        return run

    return decorator
