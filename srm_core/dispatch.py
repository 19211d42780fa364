"""The call path: look the call up, or check it, choose a kernel and remember both; then run.

The memo key holds everything that the checks and predicates may look at (see docs/adr/0002): each
array's type, shape, dtype and device, static options by value, the selection and the policies.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from srm_core.arrays import LIBRARIES, VIEWS, library_of
from srm_core.config import CURRENT, Selection, State, parse_selection
from srm_core.context import ForeignContext, LaunchContext, Residuals
from srm_core.contract import Call
from srm_core.errors import ContractError, KernelError, NoBackendError, UndeclaredFeature
from srm_core.registry import Entry, Registry, checked_reasons, on_reload, registry, resolve
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
    """The call path of one operator. `run(backend, *every parameter in order)` is the way in."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.forget()
        on_reload(self.forget)

    def forget(self) -> None:
        """Drop every remembered answer; the next call reads the registry anew."""
        self.memo: dict[Any, Plan] = {}
        self.run: Callable[..., Any] = self._first_run

    def _first_run(self, backend: str | None, *values: Any) -> Any:
        # Only the registry knows whether a predicate looks at strides, which then belong into the key.
        found = registry()
        run = self.run = _compile(self, _reads_layout(self.spec, found))
        if registry() is not found:  # reloaded meanwhile
            self.forget()
        return run(backend, *values)

    def __call__(self, args: tuple[Any, ...], options: dict[str, Any], backend: str | None = None) -> Any:
        """Run a call in the canonical form of `OpSpec.bind`."""
        return self.run(backend, *args, *options.values())

    def plan(self, args: tuple[Any, ...], options: dict[str, Any], backend: str | None) -> Plan:
        """Check a call and choose its kernel. Who remembers the plan announces it afterwards."""
        found, state = registry(), CURRENT.get()
        call = Call(self.spec, args, options)
        decision = decide(found, call, state, backend)
        _trace(found, decision)
        return self._plan(call, decision, state)

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


# Every name of its own has an underscore: an operator's parameter may be called key, or plan.
CALL = """
def run(_backend, {parameters}):
    _plan = None
    try:
        _key = (_current(), _backend, {key})
        _plan = _memo.get(_key)
    except Exception:
        _key = None  # an argument that is no array or cannot be hashed: the contract will name it
    if _plan is None:
        _plan = _miss(({args}), {{{options}}}, _backend)
        if _key is not None:
            _remember(_memo, _key, _plan)
        _announce(_plan.decision)
    if _plan.check is not None:
        _plan.check({call})
    try:
        return _plan.forward(_plan.context, {call})
    except _passed:
        raise
    except Exception as _error:
        raise _kernel_error(_plan.decision, _error) from _error
"""
PASSED = (ContractError, KernelError)  # a kernel that raises one of these means the caller to have it as it is


def _compile(operator: Operator, layout: bool) -> Callable[..., Any]:
    """The call path with this operator's parameters written out.

    It runs on every call: as source made once an operator, as in `collections.namedtuple`, it costs half of
    what a loop over the parameters does.
    """
    names: list[str] = []
    key: list[str] = []
    args: list[str] = []
    options: list[str] = []
    for p in operator.spec.parameters:
        n = p.name
        seen = f"{n}.__class__, {n}.shape, {n}.dtype, None if {n}.__class__ is _ndarray else _device({n})"
        if layout:
            seen += f", _strides({n})"
        if isinstance(p, TensorSpec):
            key.append(f"None if {n} is None else ({seen})" if p.optional else seen)
        elif p.dynamic:
            array = f"None if {n} is None else ({seen})" if p.axes else f"{n}.__class__"
            key.append(f"int if {n}.__class__ is int else {array}")
        else:
            key.append(f"{n}.__class__, {n}")  # True == 1, but not to the contract
        names.append(n)
        (options if p.keyword else args).append(n)
    source = CALL.format(
        parameters=", ".join(names), key=", ".join(key), args="".join(f"{n}, " for n in args),
        options=", ".join(f"{n!r}: {n}" for n in options),
        call=", ".join([*args, *(f"{n}={n}" for n in options)]),
    )  # fmt: skip
    scope: dict[str, Any] = {
        "_current": CURRENT.get, "_memo": operator.memo, "_miss": operator.plan, "_remember": _remember,
        "_announce": _announce, "_passed": PASSED, "_kernel_error": _kernel_error,
        "_strides": _strides, "_device": _device, "_ndarray": np.ndarray,
    }  # fmt: skip
    logger.debug("%s: compiled its call path; strides are in the key: %s", operator.spec.name, layout)
    exec(compile(source, f"<call path of {operator.spec.name}>", "exec"), scope)
    run: Callable[..., Any] = scope["run"]
    return run


def _remember(memo: dict[Any, Plan], key: Any, plan: Plan) -> None:
    if len(memo) >= MEMO_LIMIT:
        memo.clear()
    memo[key] = plan


def _announce(decision: Decision) -> None:
    registry().plugins.notify(decision)


def _device(x: Any) -> Any:
    library = library_of(x)
    return LIBRARIES[library].device_key(x) if library else None  # NumPy's scalars are on none


def _strides(x: Any) -> tuple[float, ...]:
    library = library_of(x)
    return LIBRARIES[library].strides(x) if library else ()  # NumPy's scalars have none


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
    if gradients and kernel.backward in (None, "autograd"):
        reasons.append(Reason("no-backward", "has no backward"))
    yield from reasons
    runnable = found.runnable(entry.backend, entry.plugin)
    yield from runnable
    if kernel.supports is not None and not reasons and not runnable:
        view = View(call, (*COMMON_FEATURES, *call.spec.features, *kernel.features))
        try:
            yield from checked_reasons(resolve(kernel.supports)(view))
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
        self.mutates = call.spec.mutates
        self.names = tuple(p.name for p in call.spec.parameters)

    def context(self, kept: dict[str, Any] | None = None) -> ForeignContext:
        return ForeignContext(self.target, self.caller, self.device, self.state, self.view, self.back, kept)

    def inward(self, name: str, value: Any) -> Any:
        if library_of(value) != self.caller:
            return value
        why = LIBRARIES[self.caller].refuse(value)  # gradients given to a pullback have not been through `Call`
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
            seen, named = self.all_inward(args, options)
            result = kernel(context, *seen, **named)
            if self.mutates:
                self._write_back(
                    {**dict(zip(self.names, args, strict=False)), **options},
                    {**dict(zip(self.names, seen, strict=False)), **named},
                )
            return self.outward(context, result)

        return run

    def _write_back(self, values: dict[str, Any], views: dict[str, Any]) -> None:
        """What the kernel changed, where the array could not be seen without a copy (only NumPy's: VIEWS)."""
        for name in self.mutates:
            value, after = values[name], self.back(views[name])
            if self.caller == "numpy" and not np.may_share_memory(value, after):
                value[...] = after


def _kernel_error(decision: Decision, error: Exception, direction: str = "forward") -> KernelError:
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

    The function takes what the operator takes; an option that is left out has the example's value (a tensor,
    or an option that changes at each call, its usual default). **Nothing is checked any more**: arguments of
    another shape, dtype, device or library than the example's give wrong results or crash, and policies and
    selections that are in force later are not seen.
    """
    path = operator(op)
    bound, named = path.spec.bind(example, options)
    plan = path.plan(bound, named, backend)
    _announce(plan.decision)
    if plan.check is not None:
        plan.check(*bound, **named)
    values = {**dict(zip((p.name for p in path.spec.parameters), bound, strict=False)), **named}
    return _direct(path.spec, plan, values)


def _direct(spec: OpSpec, plan: Plan, example: dict[str, Any]) -> Callable[..., Any]:
    """The operator's own signature around a kernel, which is always called with every argument."""
    known: dict[str, Any] = {"_forward": plan.forward, "_context": plan.context, "__builtins__": {}}
    head, passed, star = [], [], False
    for p in spec.parameters:
        n = p.name
        if p.keyword and not star:
            head.append("*")
            star = True
        if isinstance(p, TensorSpec):
            head.append(f"{n}=None" if p.optional else n)
        elif p.default is inspect.Parameter.empty:
            head.append(n)
        else:
            known[f"_default_{n}"] = p.default if p.dynamic else example[n]
            head.append(f"{n}=_default_{n}")
        passed.append(f"{n}={n}" if p.keyword else n)
    function: Callable[..., Any] = eval(f"lambda {', '.join(head)}: _forward(_context, {', '.join(passed)})", known)
    return function


def vjp(op: Any, *args: Any, backend: str | None = None, **options: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """`outputs, pullback = vjp(op, *args, **options)`: the outputs, and the function from gradients of the outputs
    to gradients of the inputs, without torch.

    `pullback(*grad_outputs)` takes one array an output (None: zeros), of its shape and dtype, and returns one
    array for each differentiable tensor parameter in the order of the signature (`spec.differentiable`), None
    where the argument was not given. The arguments and outputs are kept, not copied: do not write to them before
    the pullback.
    Errors: as a call; `NoBackendError` if no candidate has a backward.
    """
    path = operator(op)
    bound, named = path.spec.bind(args, options)
    found, state = registry(), CURRENT.get()
    checked = Call(path.spec, bound, named)
    decision = decide(found, checked, state, backend, gradients=True)
    _trace(found, decision)
    if decision.entry is None:
        raise NoBackendError(_no_backend(decision), decision)
    check = value_check(checked)
    if check is not None:
        check(*bound, **named)
    found.plugins.notify(decision)
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
    except PASSED:
        raise
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
            raise _kernel_error(decision, error, "backward") from error
        return tuple(result) if bridge is None else bridge.outward(own, tuple(result))  # type: ignore[arg-type]

    return outputs, pullback


def _form(array: Any) -> tuple[Any, ...]:
    """What a gradient must have in common with its output."""
    return array.dtype, tuple(array.shape), "on", array.device
