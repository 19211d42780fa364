"""`patch(model)`: the operators inside an existing torch model, and back."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from srm_core.errors import SRMError
from srm_core.nn.conv_bn import ConvBN2d
from srm_core.nn.patch_calls import Heads, Pair, Recurrence, Scope, Seen
from srm_core.nn.patch_trace import BATCH_NORMS, HOOKS, Found, Survey, survey

ATTENTION = F.scaled_dot_product_attention
TOLERANCE = 1e-4
CALLS = "calls that drop out, that are compiled, or that the operator does not define stay torch's"
WEIGHTS = "calls that want weights or drop out stay torch's"
FAST_PATH = "in evaluation without gradients torch's own encoder passes it by"
UNFOLLOWED = "no BatchNorm2d follows it"


@dataclass(frozen=True)
class Entry:
    """One thing that was swapped, or left.

    kind: "conv_bn", "lstm" or "attention"; "script" for what torch has compiled. names: of the modules, as in
    `named_modules()`. note: why it was left; or what of it is still torch's.
    """

    kind: str
    names: tuple[str, ...]
    swapped: bool
    note: str = ""


class Report:
    """What `patch` did: `entries`, of which are `swapped` and `left`. As a context manager it undoes the patch at the
    end; `print(report)` shows a table."""

    def __init__(self) -> None:
        self.entries: tuple[Entry, ...] = ()
        self._set: list[tuple[nn.Module, str, Any]] = []

    @property
    def swapped(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.swapped)

    @property
    def left(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if not e.swapped)

    def undo(self) -> None:
        """Make the model what it was; a second time does nothing.

        Errors: `SRMError` if one of the forwards has been replaced since, and then nothing is undone.
        """
        for module, name, value in self._set:
            if module.__dict__.get(name) is not value:
                found = f"the {name} of a {type(module).__name__} has been replaced since"
                raise SRMError(f"patch: undo: {found}; undo first what was done last")
        for module, name, _ in self._set:
            del module.__dict__[name]
        self._set.clear()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        rows = [("what", "", "modules", "note")]
        rows += [(e.kind, "swapped" if e.swapped else "left", ", ".join(e.names), e.note) for e in self.entries]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join((*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3])).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.left)} left"])

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        module.__dict__[name] = value
        self._set.append((module, name, value))


def patch(model: nn.Module, example: tuple[Any, ...] | None = None) -> Report:
    """Swap pairs of `Conv2d` and `BatchNorm2d`, `LSTM` and attention inside a torch model for the operators.

    A pair is a convolution whose output goes into the batch norm and nowhere else, in the model's traced dataflow
    (torch.fx), in training as in evaluation; an `nn.ReLU` that follows is taken in if it follows nothing else.
    Attention is `nn.MultiheadAttention`, and calls of `scaled_dot_product_attention` in the forward of a module, which
    `torch.compile` keeps as they are.
    Exact types only: what subclasses, hooks or parametrizations may compute otherwise is left, and the report says so.

    Modules stay what and where they are: parameters, state dict, `train()`, `to()`, copies and pickles are not touched;
    only the `forward` of some instances is set, which `undo()` of the report takes back. A forward that branches on an
    attribute that changes later must be patched anew.

    example: arguments of the model. It runs on them in evaluation before and after: so calls of attention are seen
    that are behind a table of functions, as in transformers; and `SRMError` is raised, with the patch undone, if the
    outputs differ by more than 1e-4.

    >>> from torch import nn
    >>> from srm_core.nn import patch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> print(patch(model))
    what              modules  note
    conv_bn  swapped  0, 1, 2
    1 swapped, 0 left
    """
    before, report, seen = None, Report(), Seen(set(model.modules()))
    if example is not None:
        with seen:
            before = _outputs(model, example)
    try:
        _Patch(model, report).run(seen.owners)
        if before is not None:
            assert example is not None
            torch.testing.assert_close(
                _outputs(model, example), before, rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True, check_stride=False
            )
    except AssertionError as error:
        report.undo()
        raise SRMError(f"patch: the model's outputs changed: {' '.join(str(error).split())}") from None
    except BaseException:
        report.undo()
        raise
    return report


@torch.no_grad()
def _outputs(model: nn.Module, example: tuple[Any, ...]) -> list[Any]:
    """What the model gives in evaluation, flat; its modes are as before afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    for m, _ in modes:
        m.training = False
    try:
        flat, _ = torch.utils._pytree.tree_flatten(model(*example))
        return [x.clone() if isinstance(x, torch.Tensor) else x for x in flat]
    finally:
        for m, mode in modes:
            m.training = mode


class _Patch:
    """One run over a model."""

    def __init__(self, model: nn.Module, report: Report) -> None:
        self.model, self.report = model, report
        self.names = {m: name or "(the model)" for name, m in model.named_modules()}
        self.entries: list[Entry] = []
        self.scopes: dict[nn.Module, Scope] = {}
        self.taken: set[nn.Module] = set()

    def run(self, attending: Iterable[nn.Module]) -> None:
        """attending: modules that were seen to call scaled_dot_product_attention."""
        found = survey(self.model)
        for module in found.untraced:
            if self._is_replaced(module) and isinstance(module.__dict__["forward"].__self__, Scope):
                found.untraced[module] = "patched already"
        for module in self.names:
            if isinstance(module, BATCH_NORMS):
                self._pair(module, found)
        scripts = [m for m in self.names if isinstance(m, torch.jit.ScriptModule)]
        within = {part for m in scripts for part in m.modules() if part is not m}
        for module in self.names:
            if isinstance(module, nn.Conv2d) and module not in self.taken:
                seen = found.reasons.get(module, UNFOLLOWED) if module in found.called else self._unseen(module, found)
                self._note("conv_bn", (module,), seen)
            elif module in scripts and module not in within:
                self._note("script", (module,), "Python does not run it")
            elif isinstance(module, nn.LSTM):
                self._whole("lstm", module, nn.LSTM, Recurrence, _of_lstm(module))
            elif isinstance(module, nn.MultiheadAttention):
                self._whole("attention", module, nn.MultiheadAttention, Heads, _of_heads(module))
        named = (m for m in self.names if _names_attention(type(m)))
        for module in dict.fromkeys((*found.attends, *attending, *named)):
            self._calls(module)
        self.report.entries = tuple(self.entries)

    def _note(self, kind: str, modules: tuple[nn.Module, ...], note: str = "", swapped: bool = False) -> None:
        self.entries.append(Entry(kind, tuple(self.names[m] for m in modules), swapped, note))

    def _pair(self, bn: Any, found: Survey) -> None:
        pair = found.pairs.get(bn)
        if pair is None:
            reason = _of_type(bn, nn.BatchNorm2d) or found.reasons.get(bn) or self._unseen(bn, found)
            return self._note("conv_bn", (bn,), reason)
        conv: Any = pair.conv
        reason = self._unfit(pair)
        if reason:
            self._note("conv_bn", (conv, bn), reason)
        else:
            relu: Any = None if pair.relu is None or _of_hooks(pair.relu) else pair.relu
            fused = ConvBN2d.from_torch(conv, bn, None if relu is None else "relu")
            calls = Pair(self._scope(pair.owner), fused, relu)
            self.report._replace(conv, "forward", calls.conv_forward)
            self.report._replace(bn, "forward", calls.bn_forward)
            self.report._replace(bn, "train", calls.train)
            if relu is not None:
                self.report._replace(relu, "forward", calls.relu_forward)
            self._note("conv_bn", (conv, bn) if relu is None else (conv, bn, relu), swapped=True)
        self.taken.add(conv)
        return None

    def _unfit(self, pair: Found) -> str:
        """Why the pair cannot be swapped, or nothing."""
        conv: Any = pair.conv
        bn: Any = pair.bn
        reason = _of_type(conv, nn.Conv2d) or _of_type(bn, nn.BatchNorm2d)
        for module in (conv, bn, *pair.between):
            reason = reason or _of_hooks(module)
        if reason:
            return reason
        if conv in self.taken:
            return "the convolution is in another pair"
        if self._is_replaced(pair.owner) and pair.owner not in self.scopes:
            return f"the forward of {self.names[pair.owner]} has been replaced"
        if "train" in bn.__dict__:
            return "its train() has been replaced"
        if isinstance(conv.padding, str) or conv.padding_mode != "zeros":
            return f"padding={conv.padding!r}, padding_mode={conv.padding_mode!r}"
        if bn.running_mean is None:
            return "track_running_stats=False"
        if bn.num_features != conv.out_channels or conv.weight.dtype is not bn.running_mean.dtype:
            return "they do not fit each other"
        return "" if conv.weight.device == bn.running_mean.device else "they are on two devices"

    def _unseen(self, part: nn.Module, found: Survey) -> str:
        """Why no trace has come to a convolution or batch norm."""
        name = self.names[part]
        for module, error in reversed(found.untraced.items()):
            own = self.names[module]
            if module is self.model or name == own or name.startswith(f"{own}."):
                return f"{own} cannot be traced: {error}"
        return "no forward that was traced calls it"

    def _whole(self, kind: str, module: nn.Module, exact: type, swap: Any, reason: str) -> None:
        reason = _of_type(module, exact) or _of_hooks(module) or reason
        if reason:
            return self._note(kind, (module,), reason)
        self.report._replace(module, "forward", swap(module).forward)
        note = ""
        if swap is Heads:
            inside = any(isinstance(m, nn.TransformerEncoderLayer) and m.self_attn is module for m in self.names)
            note = f"{WEIGHTS}; {FAST_PATH}" if inside else WEIGHTS
        return self._note(kind, (module,), note, swapped=True)

    def _calls(self, module: nn.Module) -> None:
        if self._is_replaced(module) and module not in self.scopes:
            self._note("attention", (module,), "its forward has been replaced")
        elif isinstance(module, torch.jit.ScriptModule):
            return  # noted
        else:
            self._scope(module).attends = True
            self._note("attention", (module,), CALLS, swapped=True)

    def _scope(self, owner: nn.Module) -> Scope:
        if owner not in self.scopes:
            scope = self.scopes[owner] = Scope(owner)
            self.report._replace(owner, "forward", scope.forward)
        return self.scopes[owner]

    @staticmethod
    def _is_replaced(module: nn.Module) -> bool:
        return "forward" in module.__dict__


def _of_type(module: nn.Module, exact: type) -> str:
    if type(module) is exact:
        return ""
    if hasattr(module, "parametrizations"):
        return f"{_kind(module)}, whose parameters are computed"
    return f"{_kind(module)}, not {exact.__name__} itself"


def _kind(module: nn.Module) -> str:
    return f"a {type(module).__name__}"


def _of_hooks(module: nn.Module) -> str:
    if any(getattr(module, name) for name in HOOKS):
        return f"{_kind(module)} has hooks"
    if "forward" in module.__dict__:
        return f"the forward of {_kind(module)} has been replaced"
    return ""


def _of_lstm(module: Any) -> str:
    return f"proj_size={module.proj_size}" if module.proj_size else ""


def _of_heads(module: Any) -> str:
    if module.bias_k is not None or module.add_zero_attn:
        return "add_bias_kv or add_zero_attn"
    return ""


def _names_attention(kind: type) -> bool:
    """Does a method of the class, or a function that it names, name scaled_dot_product_attention? Outside of torch."""
    waiting: list[Any] = [f for base in kind.__mro__ if not _is_foreign(base) for f in vars(base).values()]
    seen: set[Any] = set()
    while waiting:
        function = waiting.pop()
        if not isinstance(function, types.FunctionType) or function in seen or _is_foreign(function):
            continue
        seen.add(function)
        for word in _words(function.__code__):
            named = function.__globals__.get(word)
            if word == ATTENTION.__name__ or named is ATTENTION:
                return True
            waiting.append(named)
    return False


def _is_foreign(thing: Any) -> bool:
    return thing.__module__.split(".")[0] in ("torch", "builtins", "srm_core")


def _words(code: types.CodeType) -> Iterator[str]:
    """The names that a function and those within it look up."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _words(constant)
