"""Gradients without torch: a forward that keeps what its backward needs, and the function back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from srm_core.arrays import LIBRARIES
from srm_core.bridge import Bridge
from srm_core.config import CURRENT
from srm_core.context import LaunchContext, Residuals
from srm_core.contract import Call
from srm_core.decision import decide, no_backend, trace
from srm_core.dispatch import PASSED, kernel_error, operator, value_check
from srm_core.errors import ContractError, NoBackendError
from srm_core.registry import registry, resolve


def vjp(op: Any, *args: Any, backend: str | None = None, **options: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """`outputs, pullback = vjp(op, *args, **options)`: the outputs, and the function from gradients of the outputs
    to gradients of the inputs, without torch.

    `pullback(*grad_outputs)` takes one array an output (None: zeros), of its shape and dtype, and returns one
    array for each differentiable tensor parameter in the order of the signature (`spec.differentiable`), None
    where the argument was not given or is a boolean mask. The arguments and outputs are kept, not copied: do not
    write to them before the pullback.
    Errors: as a call; `NoBackendError` if no candidate has a backward.
    """
    path = operator(op)
    bound, named = path.spec.bind(args, options)
    found, state = registry(), CURRENT.get()
    checked = Call(path.spec, bound, named)
    decision = decide(found, checked, state, backend, gradients=True)
    trace(found, decision)
    check = value_check(checked)
    if check is not None:
        check(*bound, **named)
    if decision.entry is None:
        raise NoBackendError(no_backend(decision), decision)
    found.plugins.notify(decision)
    kernel = decision.entry.kernel
    forward, backward = resolve(kernel.forward), resolve(kernel.backward or "")
    kept: dict[str, Any] = {}
    bridge = None if checked.array_library in kernel.arrays else Bridge(checked, kernel.arrays, state)
    if bridge is None:
        context = LaunchContext(checked.array_library, checked.device, state, kept)
    else:
        context = bridge.context(kept)
        bound, named = bridge.all_inward(bound, named)
    try:
        inner = forward(context, *bound, **named)
    except PASSED:
        raise
    except Exception as error:
        raise kernel_error(decision, error) from error
    outputs = inner if bridge is None else bridge.outward(context, inner)  # type: ignore[arg-type]
    residuals = Residuals(bound, named, kept)

    def pullback(*grads: Any) -> tuple[Any, ...]:
        expected, names = path.spec.unpack(outputs), checked.output_names()
        if len(grads) != len(expected):
            raise ContractError(
                path.spec.name, "pullback", f"{len(grads)} gradients", f"{len(expected)}: {', '.join(names)}"
            )
        own = bridge.context() if bridge else LaunchContext(checked.array_library, checked.device, state)
        checked_grads = []
        for name, grad, output in zip(names, grads, expected, strict=True):
            if grad is None:
                grad = LIBRARIES[checked.array_library].zeros(tuple(output.shape), output.dtype, checked.device)
            elif type(grad) is not type(output) or _form(grad) != _form(output):
                found = _form(grad) if type(grad) is type(output) else (type(grad).__name__,)
                raise ContractError(
                    path.spec.name, f"gradient of {name}", " ".join(map(str, found)),
                    " ".join(map(str, _form(output))),
                )  # fmt: skip
            checked_grads.append(grad if bridge is None else bridge.inward(name, grad))
        try:
            result = backward(own, residuals, *checked_grads)
        except PASSED:
            raise
        except Exception as error:
            raise kernel_error(decision, error, "backward") from error
        return tuple(result) if bridge is None else bridge.outward(own, tuple(result))  # type: ignore[arg-type]

    return outputs, pullback


def _form(array: Any) -> tuple[Any, ...]:
    """What a gradient must have in common with its output."""
    return array.dtype, tuple(array.shape), "on", array.device
