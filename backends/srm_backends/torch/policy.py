"""torch's own switches, held to the policy of a call: TF32 products, and deterministic algorithms.

The switches are torch's, one for all threads: a call in another thread, at the same moment and under another policy,
sees them. They are touched only where they differ from the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from srm_core.context import LaunchContext


@contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _deterministically() -> Iterator[None]:
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False, warn_only=warn_only)


def _switches() -> list[tuple[Any, str, tuple[Any, Any]]]:
    """(owner, name, (value for "ieee", value for "tf32")) of every switch that changes float32 products.

    From torch 2.9 on a switch is a precision by name; reading the older form of one that was set by the newer raises.
    """
    cuda: Any = torch.backends.cuda
    cudnn: Any = torch.backends.cudnn
    host: Any = torch.backends.mkldnn
    if hasattr(cuda.matmul, "fp32_precision"):
        devices = [(o, "fp32_precision", ("ieee", "tf32")) for o in (cuda.matmul, cudnn.conv, cudnn.rnn)]
        return [*devices, *((o, "fp32_precision", ("ieee", "ieee")) for o in (host.matmul, host.conv, host.rnn))]
    return [(cuda.matmul, "allow_tf32", (False, True)), (cudnn, "allow_tf32", (False, True))]


SWITCHES = _switches()
# A name that leaves the choice to a more general switch, and the last one, "none", to the default.
UNSET = "none"


def _differing(precision: str) -> list[tuple[Any, str, Any]]:
    wanted = 1 if precision == "tf32" else 0
    return [
        (owner, name, values[wanted])
        for owner, name, values in SWITCHES
        if _now(owner, name) != values[wanted] and not (_now(owner, name) == UNSET and values[wanted] == "ieee")
    ]


def _now(owner: Any, name: str) -> Any:
    return getattr(owner, name)


def differs(ctx: LaunchContext, like: Tensor) -> bool:
    """Is a switch of torch other than the call's policy says?"""
    if ctx.deterministic and like.is_cuda and not torch.are_deterministic_algorithms_enabled():
        return True
    return like.dtype is torch.float32 and bool(_differing(ctx.precision))


@contextmanager
def held(ctx: LaunchContext, like: Tensor) -> Iterator[None]:
    """Within it torch's switches are as the policy of the call says, for tensors like `like`."""
    with ExitStack() as stack:
        if ctx.deterministic and like.is_cuda and not torch.are_deterministic_algorithms_enabled():
            stack.enter_context(_deterministically())
        if like.dtype is torch.float32:
            for owner, name, value in _differing(ctx.precision):
                stack.enter_context(_set(owner, name, value))
        yield


class _Held(torch.autograd.Function):
    """A differentiable function whose backward runs under the policy, too, whenever and in whichever thread it comes.

    The forward's graph is kept inside. A backward that is to be differentiated itself starts anew from the arguments.
    """

    @staticmethod
    def forward(ctx: Any, body: Callable[..., tuple[Tensor, ...]], launch: LaunchContext, *values: Any) -> Any:
        ctx.body, ctx.launch = body, launch
        inner = [v.detach().requires_grad_(v.requires_grad) if isinstance(v, Tensor) else v for v in values]
        with torch.enable_grad(), held(launch, values[0]):
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
        with torch.enable_grad(), held(ctx.launch, values[0]):
            outputs = ctx.body(*values) if twice else ctx.outputs
            sources = values if twice else ctx.inner
            wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
            ends = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
            found = torch.autograd.grad(
                [o for o, _ in ends], [sources[i] for i in wanted], [g for _, g in ends],
                retain_graph=True, create_graph=twice, allow_unused=True,
            )  # fmt: skip
        by_place = dict(zip(wanted, found, strict=True))
        return (None, None, *(by_place.get(i) for i in range(len(values))))


def under_policy(body: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A decorator: `body(*tensors and others)`, of differentiable operations, called as `(ctx, *the same)`, forward and
    backward under the policy of the call. It costs nothing where torch's switches agree with it."""

    @wraps(body)
    def run(ctx: LaunchContext, *values: Any) -> tuple[Tensor, ...]:
        if not differs(ctx, values[0]):
            return body(*values)
        if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in values):
            return _Held.apply(body, ctx, *values)
        with held(ctx, values[0]):
            return body(*values)

    return run
