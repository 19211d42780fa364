"""Which convolution goes into which batch norm: a model's dataflow, found with torch.fx.

A forward is traced on a copy of the modules (over the same parameters) as in training and as in evaluation, with its
optional arguments given and left out. Only what holds in every one of these traces counts. Where a forward cannot be
traced, those of its children are, each for itself.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

Module = nn.Module
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# Whole also where they are subclassed outside of torch: they are not looked into, and not swapped.
LEAVES = (nn.Conv2d, *BATCH_NORMS, nn.RNNBase, nn.MultiheadAttention)
DIFFERS = "called otherwise in training, or with other arguments"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Found:
    """A batch norm whose input is a convolution's output, wherever either is called."""

    conv: Module
    bn: Module
    owner: Module  # the innermost one whose forward calls both
    between: tuple[Module, ...]  # the modules that are called in between
    relu: Module | None = None  # the ReLU that follows, if it follows nothing else


@dataclass
class Survey:
    """What was found in a model, by its own modules."""

    pairs: dict[Module, Found] = field(default_factory=dict)  # by batch norm
    reasons: dict[Module, str] = field(default_factory=dict)  # why a batch norm, or its convolution, is in no pair
    attends: dict[Module, None] = field(default_factory=dict)  # whose forward calls scaled_dot_product_attention
    untraced: dict[Module, str] = field(default_factory=dict)  # and why
    called: set[Module] = field(default_factory=set)  # the leaves that a trace has come to


def survey(model: Module) -> Survey:
    """The pairs and the attention calls in the forwards of a model and, where it must, of its parts."""
    found = Survey()
    _survey(model, found, set())
    return found


def _survey(module: Module, found: Survey, seen: set[Module]) -> None:
    if module in seen:
        return
    seen.add(module)
    if _is_traced(module):
        try:
            _merge(_traces(module), found)
            seen.update(module.modules())
            return
        except Exception as error:  # a trace runs the model's own code on what is no tensor: anything may happen
            found.untraced[module] = (str(error).strip() or type(error).__name__).splitlines()[0]
    for child in module.children():
        _survey(child, found, seen)


def _is_traced(module: Module) -> bool:
    own = type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)
    return not own and not isinstance(module, torch.jit.ScriptModule)


class _Tracer(fx.Tracer):
    """Notes for each call of a leaf which modules' forwards it is in, from the outermost on."""

    def __init__(self, root: Module) -> None:
        super().__init__()
        self.within: list[Module] = [root]
        self.calls: dict[fx.Node, tuple[Module, tuple[Module, ...]]] = {}
        self.attends: dict[Module, None] = {}

    def is_leaf_module(self, m: Module, name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, name)

    def call_module(self, m: Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.is_leaf_module(m, self.path_of_module(m)):
            result = super().call_module(m, forward, args, kwargs)
            self.calls[result.node] = (m, tuple(self.within))
            return result
        self.within.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.within.pop()

    def create_node(self, kind: str, target: Any, *rest: Any, **more: Any) -> fx.Node:
        if target is F.scaled_dot_product_attention:
            self.attends[self.within[-1]] = None
        return super().create_node(kind, target, *rest, **more)


def _traces(module: Module) -> list[Survey]:
    """A survey of each trace, in terms of the module's own parts."""
    memo: dict[int, Any] = {id(p): p for p in module.parameters()}
    for m in module.modules():  # hooks see nothing of this
        memo.update((id(getattr(m, name)), OrderedDict()) for name in HOOKS)
    twin = copy.deepcopy(module, memo)
    original = dict(zip(twin.modules(), module.modules(), strict=True))
    parameters = inspect.signature(type(twin).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    surveys = []
    for training in (False, True):
        for m in twin.modules():
            m.training = training
        for given in [None, defaults] if defaults else [None]:
            tracer = _Tracer(twin)
            with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
                warnings.simplefilter("ignore")
                tracer.trace(twin, concrete_args=given)
            surveys.append(_read(tracer, original))
    return surveys


def _read(tracer: _Tracer, original: dict[Module, Module]) -> Survey:
    calls = tracer.calls
    nodes: dict[Module, list[fx.Node]] = {}
    for node, (module, _) in calls.items():
        nodes.setdefault(module, []).append(node)
    found = Survey(attends={original[m]: None for m in tracer.attends}, called={original[m] for m in nodes})
    for bn, of_bn in nodes.items():
        if not isinstance(bn, BATCH_NORMS):
            continue
        sources = [_input(node) for node in of_bn]
        convs = {calls[s][0] if s in calls else None for s in sources}
        conv = convs.pop()
        if convs:
            found.reasons[original[bn]] = "called in several places, with different inputs"
        elif not isinstance(conv, nn.Conv2d):
            found.reasons[original[bn]] = "its input is not the output of a Conv2d"
        elif len(set(sources)) != len(of_bn) or any(set(s.users) != {n} for s, n in zip(sources, of_bn, strict=True)):
            found.reasons |= dict.fromkeys(
                (original[bn], original[conv]), "the convolution's output is used elsewhere too"
            )
        elif set(nodes[conv]) != set(sources):
            reason = "the convolution is also called without the batch norm"
            found.reasons |= dict.fromkeys((original[bn], original[conv]), reason)
        else:
            stacks = [calls[n][1] for n in (*sources, *of_bn)]
            owners = {_common(calls[s][1], calls[n][1]) for s, n in zip(sources, of_bn, strict=True)}
            if len(owners) > 1:
                found.reasons[original[bn]] = "called from several modules"
                continue
            owner = owners.pop()
            between = dict.fromkeys(m for stack in stacks for m in stack[stack.index(owner) + 1 :])
            relu = _relu(of_bn, owner, nodes, calls)
            found.pairs[original[bn]] = Found(
                original[conv], original[bn], original[owner], tuple(original[m] for m in between),
                None if relu is None else original[relu],
            )  # fmt: skip
    return found


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _common(one: tuple[Module, ...], other: tuple[Module, ...]) -> Module:
    """The innermost module that two calls are both in."""
    return [m for m, n in zip(one, other, strict=False) if m is n][-1]


def _relu(of_bn: list[fx.Node], owner: Module, nodes: dict[Module, list[fx.Node]], calls: Any) -> Module | None:
    """The module that every call of the batch norm goes to, and nowhere else, if nothing else goes there."""
    after = [next(iter(n.users)) if len(n.users) == 1 else None for n in of_bn]
    modules = {calls[n][0] if n in calls else None for n in after}
    relu = modules.pop()
    if modules or type(relu) is not nn.ReLU or set(nodes[relu]) != set(after):
        return None
    return relu if all(owner in calls[n][1] for n in after) else None


def _merge(surveys: list[Survey], into: Survey) -> None:
    """Add what every trace says that has a say."""
    for s in surveys:
        into.attends |= s.attends
        into.reasons |= s.reasons
        into.called |= s.called
    for pair in [p for s in surveys for p in s.pairs.values()]:
        into.pairs.setdefault(pair.bn, pair)
    for bn, pair in list(into.pairs.items()):
        for s in surveys:
            other = s.pairs.get(bn)
            if other is None and not s.called & {bn, pair.conv, pair.relu}:
                continue  # a branch that this trace did not take
            if other is None or (other.conv, other.owner, other.between) != (pair.conv, pair.owner, pair.between):
                into.reasons = dict.fromkeys((pair.conv, bn), DIFFERS) | into.reasons
            elif other.relu is not pair.relu:
                into.pairs[bn] = replace(into.pairs[bn], relu=None)
    for bn in into.reasons:
        into.pairs.pop(bn, None)
