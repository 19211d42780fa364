"""The call path: look the call up, or check it, choose a kernel and remember both; then run.

The memo key holds everything that the checks and predicates may look at (see docs/adr/0002): each
array's type, shape, dtype and device, static options by value, the selection and the policies.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from srm_core.arrays import LIBRARIES, DeviceKeys, library_of
from srm_core.bridge import Bridge
from srm_core.config import CURRENT, State
from srm_core.context import LaunchContext
from srm_core.contract import Call
from srm_core.decision import PASSED, Decision, decide, kernel_error, no_backend, trace
from srm_core.errors import NoBackendError
from srm_core.gradients import Recording
from srm_core.registry import Registry, on_reload, registry, resolve
from srm_core.spec import OpSpec, TensorSpec

logger = logging.getLogger(__name__)
_DEVICES = DeviceKeys()
MEMO_LIMIT = 4096  # keys an operator remembers; beyond that it starts afresh


class Plan:
    """A remembered answer: the kernel, its context, the check of what may change at each call, and, where gradients
    are wanted, the recording form of the kernel."""

    __slots__ = ("check", "context", "decision", "forward", "recording")

    def __init__(
        self, forward: Callable[..., Any], context: LaunchContext, decision: Decision,
        check: Callable[..., None] | None, recording: Recording | None = None,
    ) -> None:  # fmt: skip
        self.forward, self.context, self.decision, self.check = forward, context, decision, check
        self.recording = recording


class Operator:
    """The call path of one operator. `run(backend, *every parameter in order)` is the way in."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.forget()

    def forget(self) -> None:
        """Drop every remembered answer; the next call reads the registry anew."""
        self.memo: dict[Any, Plan] = {}
        self.run: Callable[..., Any] = self.first_run
        self.find: Callable[..., Plan] = self._first_find

    def first_run(self, backend: str | None, *values: Any) -> Any:
        """`run`, before the call path is compiled. torch.compile may be the first to come, and follows this far."""
        if "torch" in sys.modules:
            from srm_core import torch_ops

            if torch_ops.is_special():
                return torch_ops.THROUGH[self.spec.name](backend, *values)
        return self._compiled().run(backend, *values)

    def _first_find(self, wants: bool, backend: str | None, *values: Any) -> Plan:
        return self._compiled().find(wants, backend, *values)

    def _compiled(self) -> Operator:
        # Only the registry knows whether a predicate looks at strides, which then belong into the key.
        found = registry()
        self.run, self.find = _compile(self, _reads_layout(self.spec, found))
        if registry() is not found:  # reloaded meanwhile
            self.forget()
        return self

    def __call__(self, args: tuple[Any, ...], options: dict[str, Any], backend: str | None = None) -> Any:
        """Run a call in the canonical form of `OpSpec.bind`."""
        return self.run(backend, *args, *options.values())

    def plan(self, args: tuple[Any, ...], options: dict[str, Any], backend: str | None, wants: bool = False) -> Plan:
        """Check a call and choose its kernel. Who remembers the plan announces it afterwards.

        wants: gradients are wanted through the plan's recording, whatever torch's autograd wants.
        """
        found, state = registry(), CURRENT.get()
        call = Call(self.spec, args, options)
        refuse_gradients(call)
        decision = decide(found, call, state, backend, gradients=wants or bool(call.wanted))
        trace(found, decision)
        return self._plan(call, decision, state, wants)

    def _plan(self, call: Call, decision: Decision, state: State, wants: bool) -> Plan:
        check = value_check(call)
        if decision.entry is None:
            if check is not None:
                check(**call.values)  # a wrong call is a wrong call, also where nobody can run it
            raise NoBackendError(no_backend(decision), decision)
        kernel = decision.entry.kernel
        logger.debug("%s -> %s (%s): %s", decision.call, decision.chosen, decision.why, kernel.forward)
        native = call.array_library in kernel.arrays
        recording = Recording(call, decision, state) if (wants or call.wanted) and not call.traced else None
        if call.traced:
            from srm_core import torch_ops

            forward = torch_ops.trace_through(self.spec)
        elif call.wanted and not (native and kernel.backward == "autograd"):
            from srm_core.torch_ops.autograd import pinned

            assert recording is not None
            forward = pinned(recording)
        else:
            forward = resolve(kernel.forward)
            if not native:
                forward = Bridge(call, kernel.arrays, state).forward(forward)
        context = LaunchContext(call.array_library, call.device, state)
        return Plan(forward, context, decision, check, recording)


def refuse_gradients(call: Call) -> None:
    """Errors: `ContractError` if torch's autograd wants gradients of an operator that has none."""
    if call.wanted and call.spec.mutates:
        raise call.error(
            call.wanted[0], "a tensor that requires grad", "a plain array: what is updated in place has no gradient",
            "call under torch.no_grad(), or detach it",
        )  # fmt: skip


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
    {special}
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


def find(_wants, _backend, {parameters}):
    _plan = None
    try:
        _key = (_current(), _backend, _wants, {key})
        _plan = _memo.get(_key)
    except Exception:
        _key = None
    if _plan is None:
        _plan = _miss(({args}), {{{options}}}, _backend, _wants)
        if _key is not None:
            _remember(_memo, _key, _plan)
        _announce(_plan.decision)
    return _plan
"""
# torch.compile, torch.func's transforms and autocast do not see kernels: they go through an operator of torch.library.
# torch's own switch for deterministic algorithms is ours, too.
# Without torch there is nothing to ask; the first tensor brings the call path that asks.
SPECIAL = (
    "if {array}(_compiling() or _transforms() or _autocasts() or _strict()): return _through(_backend, {parameters})"
)
BEFORE_TORCH = "if {array}'torch' in _modules: return _again(_backend, {parameters})"


def _compile(operator: Operator, layout: bool) -> tuple[Callable[..., Any], Callable[..., Plan]]:
    """The call path with this operator's parameters written out, and the part of it that finds a plan.

    It runs on every call: as source made once an operator, as in `collections.namedtuple`, it costs half of
    what a loop over the parameters does.
    """
    names: list[str] = []
    key: list[str] = []
    args: list[str] = []
    options: list[str] = []
    for p in operator.spec.parameters:
        n = "_one" if isinstance(p, TensorSpec) and p.many else p.name
        seen = (
            f"{n}.__class__, {n}.shape, {n}.dtype, None if {n}.__class__ is _ndarray else _devices[{n}.__class__]({n})"
        )
        if layout:
            seen += f", _strides({n})"
        if isinstance(p, TensorSpec) and p.many:
            n = p.name
            key.append(f"{n}.__class__, tuple([({seen}) for _one in {n}])")
        elif isinstance(p, TensorSpec):
            key.append(f"None if {n} is None else ({seen})" if p.optional else seen)
        elif p.dynamic:
            array = f"None if {n} is None else ({seen})" if p.axes else f"{n}.__class__"
            key.append(f"int if {n}.__class__ is int else {array}")
        else:
            key.append(f"{n}.__class__, {n}")  # True == 1, but not to the contract
        names.append(n)
        (options if p.keyword else args).append(n)
    first = operator.spec.parameters[0]
    array = f"{first.name}.__class__ is not _ndarray and " if isinstance(first, TensorSpec) and not first.many else ""
    special = SPECIAL if "torch" in sys.modules else BEFORE_TORCH
    source = CALL.format(
        special=special.format(array=array, parameters=", ".join(names)),
        parameters=", ".join(names), key=", ".join(key), args="".join(f"{n}, " for n in args),
        options=", ".join(f"{n!r}: {n}" for n in options),
        call=", ".join([*args, *(f"{n}={n}" for n in options)]),
    )  # fmt: skip
    scope: dict[str, Any] = {
        "_current": CURRENT.get, "_memo": operator.memo, "_miss": operator.plan, "_remember": _remember,
        "_announce": _announce, "_passed": PASSED, "_kernel_error": kernel_error,
        "_strides": _strides, "_devices": _DEVICES, "_ndarray": np.ndarray,
        "_modules": sys.modules, "_again": operator.first_run,
    }  # fmt: skip
    if special is SPECIAL:
        from srm_core import torch_ops

        scope.update(torch_ops.call_path(operator.spec))
    logger.debug("%s: compiled its call path; strides are in the key: %s", operator.spec.name, layout)
    exec(compile(source, f"<call path of {operator.spec.name}>", "exec"), scope)
    return scope["run"], scope["find"]


def _remember(memo: dict[Any, Plan], key: Any, plan: Plan) -> None:
    if len(memo) >= MEMO_LIMIT:
        memo.clear()
    memo[key] = plan


def _announce(decision: Decision) -> None:
    registry().plugins.notify(decision)


def _strides(x: Any) -> tuple[float, ...]:
    library = library_of(x)
    return LIBRARIES[library].strides(x) if library else ()  # NumPy's scalars have none


_operators: dict[str, Operator] = {}


@on_reload
def _forget_all() -> None:
    for path in list(_operators.values()):
        path.forget()


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
    return decide(registry(), checked, CURRENT.get(), backend, gradients=gradients or bool(checked.wanted), all_of=True)


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
            head.append(f"{n}=None" if spec.signature.parameters[n].default is None else n)
        elif p.default is inspect.Parameter.empty:
            head.append(n)
        else:
            known[f"_default_{n}"] = p.default if p.dynamic else example[n]
            head.append(f"{n}=_default_{n}")
        passed.append(f"{n}={n}" if p.keyword else n)
    function: Callable[..., Any] = eval(f"lambda {', '.join(head)}: _forward(_context, {', '.join(passed)})", known)
    return function
