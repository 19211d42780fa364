"""The call path: look the call up, or check it, choose a kernel and remember both; then run.

The memo key holds everything that the checks and predicates may look at (see docs/adr/0002): each
array's type, shape, dtype and device, static options by value, the selection and the policies.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from srm_core.arrays import LIBRARIES, VIEWS, library_of
from srm_core.config import CURRENT, Selection, State, parse_selection
from srm_core.context import ForeignContext, LaunchContext, Residuals
from srm_core.contract import Call
from srm_core.errors import ContractError, KernelError, NoBackendError, SRMError, UndeclaredFeature
from srm_core.registry import Entry, Registry, on_reload, registry, resolve
from srm_core.spec import COMMON_FEATURES, Feature, OpSpec, Reason, TensorSpec

logger = logging.getLogger(__name__)
MEMO_LIMIT = 4096  # keys an operator remembers; beyond that it starts afresh


@dataclass(frozen=True)
class Candidate:
    """A backend that was asked: why not, or () if it can; None if it was not asked any more."""

    backend: str
    reasons: tuple[Reason, ...] | None
    target: str = ""


@dataclass(frozen=True)
class Decision:
    """Which backend runs a call, and why. `chosen` is None if no candidate can."""

    op: str
    call: str
    chosen: str | None
    why: str
    selection: str
    source: str
    candidates: tuple[Candidate, ...]
    entry: Entry | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        wide = max([len("backend"), *(len(c.backend) for c in self.candidates)])
        lines = [self.call, f"chosen: {self.chosen or 'none'} ({self.why})", ""]
        return "\n".join(lines + [f"{name:{wide}}  {why}" for name, why in self.rows()])

    def rows(self) -> list[tuple[str, str]]:
        """(backend, what it said) for each candidate."""
        return [(c.backend, "runs it" if c.backend == self.chosen else _reasons(c)) for c in self.candidates]


def _reasons(candidate: Candidate) -> str:
    if candidate.reasons is None:
        return "not asked: an earlier one runs"
    if not candidate.reasons:
        return "could run it"
    return "; ".join(str(r) for r in candidate.reasons)


class View:
    """What a predicate sees of a call: the declared features, and nothing else.

    `view.dtype`, `view.platform`, `view.library` are always declared; others are read as `view[feature]`.
    """

    __slots__ = ("_call", "_declared")

    def __init__(self, call: Call, declared: tuple[Feature, ...]) -> None:
        self._call, self._declared = call, declared

    def __getitem__(self, feature: Feature) -> Any:
        if feature not in self._declared:
            known = ", ".join(f.name for f in self._declared)
            raise UndeclaredFeature(
                f"{self._call.spec.name}: the predicate reads {getattr(feature, 'name', feature)!r}, which is not "
                f"declared; declared: {known}; add it to the kernel's features"
            )
        return feature.read(self._call)

    def __getattr__(self, name: str) -> Any:
        for feature in COMMON_FEATURES:
            if feature.name == name:
                return feature.read(self._call)
        raise UndeclaredFeature(
            f"{self._call.spec.name}: the predicate reads {name!r}; required dtype, platform, library, "
            "or view[feature] with a declared feature"
        )


class Plan:
    """A remembered answer: the kernel, its context, and the check of what may change at each call."""

    __slots__ = ("check", "context", "decision", "forward")

    def __init__(
        self, forward: Callable[..., Any], context: LaunchContext, decision: Decision, check: Callable[..., None] | None
    ) -> None:
        self.forward, self.context, self.decision, self.check = forward, context, decision, check


class Operator:
    """The call path of one operator: `operator(args, options, backend)`."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.forget()
        on_reload(self.forget)

    def forget(self) -> None:
        self.memo: dict[Any, Plan] = {}
        self._key: Callable[..., Any] = _unread

    def __call__(self, args: tuple[Any, ...], options: dict[str, Any], backend: str | None = None) -> Any:
        try:
            plan = self.memo.get(self._key(CURRENT.get(), backend, *args, **options))
        except (TypeError, AttributeError):
            plan = None  # an argument that is no array or cannot be hashed: the contract will name it
        if plan is None:
            plan = self._miss(args, options, backend)
        if plan.check is not None:
            plan.check(*args, **options)
        try:
            return plan.forward(plan.context, *args, **options)
        except Exception as error:
            raise _kernel_error(plan.decision, error) from error

    def _miss(self, args: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Plan:
        memo = self.memo  # if the registry is reloaded meanwhile, this answer goes where it is forgotten
        found = registry()
        state = CURRENT.get()
        if self._key is _unread:
            self._key = _key_function(self.spec, _reads_layout(self.spec, found))
        call = Call(self.spec, args, options)
        decision = decide(found, call, state, backend)
        plan = self._plan(call, decision, state)
        found.plugins.notify(decision)
        _trace(found, decision)
        if len(memo) >= MEMO_LIMIT:
            memo.clear()
        memo[self._key(state, backend, *args, **options)] = plan
        return plan

    def _plan(self, call: Call, decision: Decision, state: State) -> Plan:
        if decision.entry is None:
            raise NoBackendError(_no_backend(decision), decision)
        kernel = decision.entry.kernel
        forward = resolve(kernel.forward)
        logger.debug("%s -> %s (%s): %s", decision.call, decision.chosen, decision.why, kernel.forward)
        if call.library in kernel.arrays:
            context = LaunchContext(call.library, call.device, state)
        else:
            forward = Bridge(call, kernel.arrays, state).forward(forward)
            context = LaunchContext(call.library, call.device, state)
        return Plan(forward, context, decision, value_check(call))


def _unread(*args: Any, **options: Any) -> Any:
    """Stands for the key function until the registry is read, which tells whether keys need strides."""
    raise TypeError


def value_check(call: Call) -> Callable[..., None] | None:
    """The check that each call needs, or None if nothing in this kind of call may change under one key."""
    spec = call.spec
    if spec.check_values is None or not any(
        p.dynamic and (not isinstance(p, TensorSpec) or p.role == "integer") and call.values[p.name] is not None
        for p in spec.parameters
    ):
        return None
    return partial(spec.check_values, call.dims)


def _reads_layout(spec: OpSpec, found: Registry) -> bool:
    features = [*spec.features]
    for entry in found.kernels.get(spec.name, {}).values():
        features.extend(entry.kernel.features)
    return any(f.layout for f in features)


def _key_function(spec: OpSpec, layout: bool) -> Callable[..., Any]:
    """Compile the function (state, backend, *args, **options) -> memo key for this operator.

    Written as source, once an operator, because it runs on every call: a loop over the parameters costs
    twice the whole budget.
    """
    names, parts = [], []
    for p in spec.parameters:
        n = p.name
        seen = f"{n}.__class__, {n}.shape, {n}.dtype, {n}.device"
        if layout:
            seen += f", strides({n})"
        if isinstance(p, TensorSpec):
            parts.append(f"None if {n} is None else ({seen})" if p.optional else seen)
        elif p.dynamic:
            parts.append(f"int if {n}.__class__ is int else None if {n} is None else ({seen})")
        else:
            parts.append(n)
        names.append(f"{n}=None" if p.keyword else n)
    source = f"lambda _state, _backend, {', '.join(names)}: (_state, _backend, {', '.join(parts)})"
    key: Callable[..., Any] = eval(source, {"int": int, "strides": _strides, "__builtins__": {}})
    return key


def _strides(x: Any) -> tuple[int, ...]:
    return LIBRARIES[library_of(x)].strides(x)  # type: ignore[index]


def decide(
    found: Registry,
    call: Call,
    state: State,
    backend: str | None = None,
    *,
    gradients: bool = False,
    all_of: bool = False,
) -> Decision:
    """Ask the candidates in order. `all_of` goes on asking after one can run, for explain."""
    op = call.spec.name
    if backend is not None:
        selection = parse_selection(backend, "backend=")
        found.check_selection(selection)
    else:
        selection = state.selection or found.selection(op)
    asked: list[Candidate] = []
    chosen: Entry | None = None
    for name, entry in found.candidates(op, selection, call.library):
        if chosen is not None and not all_of:
            asked.append(Candidate(name, None))
            continue
        reasons = tuple(_why_not(found, entry, call, state, gradients))
        asked.append(Candidate(name, reasons, entry.kernel.forward if entry else ""))
        if chosen is None and not reasons:
            chosen = entry
    why = _why(chosen, selection, call) if chosen else f"{selection.source} selects {selection}"
    return Decision(
        op, describe(call), chosen.backend.name if chosen else None, why,
        str(selection), selection.source, tuple(asked), chosen,
    )  # fmt: skip


def _why(entry: Entry, selection: Selection, call: Call) -> str:
    name = entry.backend.name
    if name in selection.names:
        return f"named by {selection.source}"
    if call.library in entry.kernel.arrays:
        return f"auto: takes {call.library} arrays natively, rank {entry.kernel.rank}"
    return f"auto: takes {call.library} arrays as views, rank {entry.kernel.rank}"


def _why_not(found: Registry, entry: Entry | None, call: Call, state: State, gradients: bool) -> Iterator[Reason]:
    """Every reason why this kernel cannot take this call; what needs an import is asked last."""
    if entry is None:
        yield Reason("no-kernel", f"has no kernel for {call.spec.name}")
        return
    kernel = entry.kernel
    reasons = []
    if call.platform not in kernel.platforms:
        reasons.append(
            Reason(
                "platform", f"runs on {', '.join(kernel.platforms)}; the arrays are on {call.platform}",
                found=call.platform, required=", ".join(kernel.platforms), hint="move the arrays there",
            )
        )  # fmt: skip
    elif _view_library(call, kernel.arrays) is None:
        reasons.append(
            Reason(
                "library", f"takes arrays of {', '.join(kernel.arrays)}, not of {call.library}",
                found=call.library, required=", ".join(kernel.arrays),
            )
        )  # fmt: skip
    if call.dtype not in kernel.dtypes:
        reasons.append(
            Reason(
                "dtype", f"takes {', '.join(kernel.dtypes)}, not {call.dtype}",
                found=call.dtype, required=", ".join(kernel.dtypes), hint="cast the arrays",
            )
        )  # fmt: skip
    if state.deterministic and not kernel.deterministic:
        reasons.append(Reason("nondeterministic", "is not deterministic, which srm_core.deterministic() asks for"))
    if gradients and kernel.backward is None:
        reasons.append(Reason("no-backward", "has no backward"))
    yield from reasons
    runnable = found.runnable(entry.backend, entry.plugin)
    yield from runnable
    if kernel.supports is not None and not reasons and not runnable:
        view = View(call, (*COMMON_FEATURES, *call.spec.features, *kernel.features))
        try:
            yield from resolve(kernel.supports)(view)
        except UndeclaredFeature:
            raise
        except Exception as error:
            yield Reason("predicate-failed", f"its predicate raised {type(error).__name__}: {error}")


def _view_library(call: Call, arrays: tuple[str, ...]) -> str | None:
    """The library as which the kernel can see the call's arrays without a copy."""
    if call.library in arrays:
        return call.library
    return next((a for a in arrays if (call.library, a, call.platform) in VIEWS), None)


class Bridge:
    """Runs a kernel of one library on arrays of another, which it sees as views; results go the way back."""

    def __init__(self, call: Call, arrays: tuple[str, ...], state: State) -> None:
        target = _view_library(call, arrays)
        assert target is not None  # the decision was made by the same function
        self.caller, self.target = call.library, target
        self.device, self.state = call.device, state
        self.view = VIEWS[call.library, target, call.platform]
        self.back = VIEWS[target, call.library, call.platform]
        self.op = call.spec.name

    def context(self, kept: dict[str, Any] | None = None) -> ForeignContext:
        return ForeignContext(self.target, self.caller, self.device, self.state, self.view, self.back, kept)

    def inward(self, name: str, value: Any) -> Any:
        if library_of(value) != self.caller:
            return value
        why = LIBRARIES[self.caller].refuse(value)  # requires_grad and the like are not in the memo key
        if why:
            raise ContractError(
                self.op, str(name), why, "a plain array",
                "call under torch.no_grad(), detach it, or use srm_core.vjp for gradients",
            )  # fmt: skip
        return self.view(value)

    def all_inward(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(self.inward(f"argument {i}", a) for i, a in enumerate(args)),
            {k: self.inward(k, v) for k, v in options.items()},
        )

    def outward(self, context: ForeignContext, result: Any) -> Any:
        if isinstance(result, tuple):
            return tuple(self.outward(context, r) for r in result)
        return None if result is None else context.to_caller(result)

    def forward(self, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(_: LaunchContext, *args: Any, **options: Any) -> Any:
            context = self.context()
            args, options = self.all_inward(args, options)
            return self.outward(context, kernel(context, *args, **options))

        return run


def _kernel_error(decision: Decision, error: Exception, direction: str = "forward") -> SRMError:
    if isinstance(error, ContractError | KernelError):
        return error
    return KernelError(
        f"{decision.op}: the {direction} kernel of backend {decision.chosen!r} raised "
        f"{type(error).__name__}: {error}; call: {decision.call}"
    )


def _no_backend(decision: Decision) -> str:
    reasons = " | ".join(f"{c.backend}: {_reasons(c)}" for c in decision.candidates) or "there are no backends"
    return f"{decision.call}: no backend of {decision.selection!r} ({decision.source}) can run it: {reasons}"


def describe(call: Call) -> str:
    """The call in one line, such as scan(gates=float32[2,8,4], reverse=False)."""
    parts = []
    for name, value in call.values.items():
        if value is None:
            continue
        if name in call.dtypes:
            value = f"{call.dtypes[name]}[{','.join(map(str, value.shape))}]"
        parts.append(f"{name}={value}")
    return f"{call.spec.name}({', '.join(parts)}) on {call.library}/{call.platform}"


def _trace(found: Registry, decision: Decision) -> None:
    if found.config.trace is None:
        return
    row = {
        "time": time.time(), "pid": os.getpid(), "thread": threading.get_ident(), "op": decision.op,
        "call": decision.call, "chosen": decision.chosen, "why": decision.why,
        "selection": decision.selection, "source": decision.source,
        "candidates": [
            {"backend": c.backend, "reasons": None if c.reasons is None else [r.code for r in c.reasons]}
            for c in decision.candidates
        ],
    }  # fmt: skip
    # Opened for each line, in append mode: whole lines from any thread, and from both sides of a fork.
    with open(found.config.trace, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


_operators: dict[str, Operator] = {}


def operator(name: Any) -> Operator:
    """The call path of an operator, by name or by its public function. Errors: `UnknownNameError`."""
    key = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
    spec = registry().spec(key)
    found = _operators.get(key)
    if found is None or found.spec is not spec:
        found = _operators[key] = Operator(spec)
    return found


def define(spec: OpSpec) -> Operator:
    """The call path of a built-in operator, made at import; the registry is not needed yet."""
    return _operators.setdefault(spec.name, Operator(spec))


def call(op: Any, *args: Any, backend: str | None = None, **options: Any) -> Any:
    """Call any operator by name, also one that a plugin brings: `call("scan", gates, tokens, reverse=True)`."""
    path = operator(op)
    return path(*path.spec.bind(args, options), backend)


def explain(op: Any, *args: Any, backend: str | None = None, gradients: bool = False, **options: Any) -> Decision:
    """Which backend would run this call, why, and every reason of every other candidate. Runs nothing.

    Errors: `ContractError` if the call is no valid one; that no backend can run it is an answer, not an error.
    """
    spec = operator(op).spec
    checked = Call(spec, *spec.bind(args, options))
    check = value_check(checked)
    if check is not None:
        check(**checked.values)
    return decide(registry(), checked, CURRENT.get(), backend, gradients=gradients, all_of=True)


def bind(op: Any, *example: Any, backend: str | None = None, **options: Any) -> Callable[..., Any]:
    """Check and choose once, with example arguments; returns a function that calls the kernel directly.

    The function takes what the operator takes. **Nothing is checked any more**: arguments of another shape,
    dtype, device or library than the example's give wrong results or crash, and policies and selections
    that are in force later are not seen.
    """
    path = operator(op)
    bound, named = path.spec.bind(example, options)
    plan = path._miss(bound, named, backend)
    if plan.check is not None:
        plan.check(*bound, **named)
    return partial(plan.forward, plan.context)


def vjp(op: Any, *args: Any, backend: str | None = None, **options: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """`outputs, pullback = vjp(op, *args, **options)`: the outputs, and the function from gradients of the outputs
    to gradients of the inputs, without torch.

    `pullback(*grad_outputs)` takes one array an output (None: zeros), of its shape and dtype, and returns one
    array for each differentiable tensor parameter in the order of the signature (`spec.differentiable`), None
    where the argument was not given.
    Errors: as a call; `NoBackendError` if no candidate has a backward.
    """
    path = operator(op)
    bound, named = path.spec.bind(args, options)
    found, state = registry(), CURRENT.get()
    checked = Call(path.spec, bound, named)
    decision = decide(found, checked, state, backend, gradients=True)
    if decision.entry is None:
        raise NoBackendError(_no_backend(decision), decision)
    check = value_check(checked)
    if check is not None:
        check(*bound, **named)
    found.plugins.notify(decision)
    _trace(found, decision)
    kernel = decision.entry.kernel
    forward, backward = resolve(kernel.forward), resolve(kernel.backward or "")
    kept: dict[str, Any] = {}
    bridge = None if checked.library in kernel.arrays else Bridge(checked, kernel.arrays, state)
    if bridge is None:
        context = LaunchContext(checked.library, checked.device, state, kept)
    else:
        context = bridge.context(kept)
        bound, named = bridge.all_inward(bound, named)
    try:
        inner = forward(context, *bound, **named)
    except Exception as error:
        raise _kernel_error(decision, error) from error
    outputs = inner if bridge is None else bridge.outward(context, inner)  # type: ignore[arg-type]
    several = isinstance(outputs, tuple)
    residuals = Residuals(bound, named, kept)

    def pullback(*grads: Any) -> tuple[Any, ...]:
        expected = outputs if several else (outputs,)
        names = [o.name for o in path.spec.outputs]
        if len(grads) != len(expected):
            raise ContractError(
                path.spec.name, "pullback", f"{len(grads)} gradients", f"{len(expected)}: {', '.join(names)}"
            )
        own = bridge.context() if bridge else LaunchContext(checked.library, checked.device, state)
        checked_grads = []
        for name, grad, output in zip(names, grads, expected, strict=True):
            if grad is None:
                grad = LIBRARIES[checked.library].zeros(tuple(output.shape), output.dtype, checked.device)
            elif type(grad) is not type(output) or grad.shape != output.shape or grad.dtype != output.dtype:
                shape = getattr(grad, "shape", "")
                dtype = getattr(grad, "dtype", type(grad).__name__)
                raise ContractError(
                    path.spec.name, f"gradient of {name}", f"{dtype} {shape}", f"{output.dtype} {output.shape}"
                )
            checked_grads.append(grad if bridge is None else bridge.inward(name, grad))
        try:
            result = backward(own, residuals, *checked_grads)
        except Exception as error:
            raise _kernel_error(decision, error, "backward") from error
        return tuple(result) if bridge is None else bridge.outward(own, tuple(result))  # type: ignore[arg-type]

    return outputs, pullback
