"""Forwards that keep what their backward needs, and gradients without torch's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from srm_core.arrays import LIBRARIES
from srm_core.bridge import Bridge
from srm_core.config import State
from srm_core.context import LaunchContext, Residuals
from srm_core.contract import Call
from srm_core.decision import PASSED, Decision, kernel_error
from srm_core.errors import ContractError
from srm_core.registry import resolve


class Recording:
    """A kernel with its backward, pinned: `run` gives the outputs and the residuals that `pull` takes.

    Both take and give the caller's arrays, whichever library the kernel is for. `pull` returns a gradient for each
    name in `spec.differentiable`, None where there is none.
    """

    def __init__(self, call: Call, decision: Decision, state: State) -> None:
        assert decision.entry is not None
        kernel = decision.entry.kernel
        self.spec, self.decision = call.spec, decision
        self.output_names = call.output_names()
        self.library, self.device, self.state = call.array_library, call.device, state
        self.context = LaunchContext(call.array_library, call.device, state)
        self.bridge = None if call.array_library in kernel.arrays else Bridge(call, kernel.arrays, state)
        forward = resolve(kernel.forward)
        if kernel.backward == "autograd":
            from srm_core.torch_ops.autograd import Tape

            tape = Tape(call.spec, forward)
            self._forward, self._backward = tape.forward, tape.backward
        else:
            self._forward, self._backward = forward, resolve(kernel.backward or "")

    def run(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The outputs as the operator returns them, and the residuals by name."""
        kept: dict[str, Any] = {}
        try:
            if self.bridge is None:
                context = LaunchContext(self.library, self.device, self.state, kept, self.context.memo)
                return self._forward(context, *args, **options), kept
            foreign = self.bridge.context(kept)
            seen, named = self.bridge.all_inward(args, options)
            return self.bridge.outward(foreign, self._forward(foreign, *seen, **named)), kept
        except PASSED:
            raise
        except Exception as error:
            raise kernel_error(self.decision, error) from error

    def pull(
        self, args: tuple[Any, ...], options: dict[str, Any], kept: dict[str, Any], grads: tuple[Any, ...],
        wanted: tuple[str, ...] | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """The gradients of the inputs, of those of the outputs, one array each. wanted: the names; None: all."""
        try:
            if self.bridge is None:
                return tuple(self._backward(self.context, Residuals(args, options, kept, wanted), *grads))
            foreign = self.bridge.context()
            seen, named = self.bridge.all_inward(args, options)
            inward = [self.bridge.inward(n, g) for n, g in zip(self.output_names, grads, strict=True)]
            result = self._backward(foreign, Residuals(seen, named, kept, wanted), *inward)
            return self.bridge.outward(foreign, tuple(result))  # type: ignore[no-any-return]
        except PASSED:
            raise
        except Exception as error:
            raise kernel_error(self.decision, error, "backward") from error


def vjp(op: Any, *args: Any, backend: str | None = None, **options: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """`outputs, pullback = vjp(op, *args, **options)`: the outputs, and the function from gradients of the outputs
    to gradients of the inputs, without torch's autograd: neither is part of its graph.

    `pullback(*grad_outputs)` takes one array an output (None: zeros), of its shape and dtype, and returns one
    array for each differentiable tensor parameter in the order of the signature (`spec.differentiable`), None
    where the argument was not given or is a boolean mask. The arguments and outputs are kept, not copied: do not
    write to them before the pullback.
    Errors: as a call; `NoBackendError` if no candidate has a backward.
    """
    from srm_core.dispatch import operator

    path = operator(op)
    args, options = path.spec.bind(args, options)
    plan = path.find(True, backend, *args, *options.values())
    if plan.check is not None:
        plan.check(*args, **options)
    recording = plan.recording
    assert recording is not None
    outputs, kept = recording.run(args, options)

    def pullback(*grads: Any) -> tuple[Any, ...]:
        return recording.pull(args, options, kept, _checked(recording, outputs, grads))

    return outputs, pullback


def _checked(recording: Recording, result: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients given to a pullback, zeros for None. Errors: `ContractError` for one unlike its output."""
    op, names, outputs = recording.spec.name, recording.output_names, recording.spec.unpack(result)
    library = LIBRARIES[recording.library]
    if len(grads) != len(outputs):
        raise ContractError(op, "pullback", f"{len(grads)} gradients", f"{len(outputs)}: {', '.join(names)}")
    checked = []
    for name, grad, output in zip(names, grads, outputs, strict=True):
        if grad is None:
            grad = library.zeros(tuple(output.shape), output.dtype, recording.device)
        elif type(grad) is not type(output) or _form(grad) != _form(output):
            found = _form(grad) if type(grad) is type(output) else (type(grad).__name__,)
            raise ContractError(op, f"gradient of {name}", " ".join(map(str, found)), " ".join(map(str, _form(output))))
        elif library.wants_gradient(grad):
            raise ContractError(
                op, f"gradient of {name}", "a tensor that requires grad", "a plain array",
                "detach it, or call the operator itself, which torch's autograd differentiates",
            )  # fmt: skip
        checked.append(grad)
    return tuple(checked)


def _form(array: Any) -> tuple[Any, ...]:
    """What a gradient must have in common with its output."""
    return array.dtype, tuple(array.shape), "on", array.device
