"""Discovery: each entry point is loaded in its own try; a broken one is quarantined, the rest go on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

import pluggy
from packaging.requirements import Requirement

from srm_core import hookspecs
from srm_core.config import AUTO
from srm_core.errors import PluginError, UnknownNameError
from srm_core.spec import API_VERSION, BackendInfo, Feature, Kernel, OpSpec

logger = logging.getLogger(__name__)
GROUP = "srm_core.backends"
BUILT_IN = "srm-core"


@dataclass(frozen=True)
class Quarantined:
    """A plugin that could not be used: the entry point, its distribution, one line, and the traceback."""

    name: str
    distribution: str
    error: str
    traceback: str


@dataclass(frozen=True)
class Plugin:
    """A loaded plugin with what it declared."""

    name: str
    distribution: str
    backends: tuple[BackendInfo, ...]
    ops: tuple[OpSpec, ...]


class PluginSet:
    """All plugins of one discovery. `blocked` entry points are never imported."""

    def __init__(
        self, blocked: frozenset[str] = frozenset(), own_ops: frozenset[str] = frozenset(),
        local: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.own_ops = own_ops  # the operators of srm-core itself, which no plugin may replace
        self.manager = pluggy.PluginManager(hookspecs.PROJECT)
        self.manager.add_hookspecs(hookspecs)
        self.plugins: list[Plugin] = []
        self.quarantined: list[Quarantined] = []
        self.blocked: list[str] = []
        entries = entry_points(group=GROUP)
        for name in sorted(blocked - set(entries.names)):
            raise UnknownNameError("plugin", name, entries.names, source="SRM_BLOCK")
        # Built-in plugins first, so that a stranger cannot take one of their names.
        for entry in sorted(entries, key=lambda e: (_distribution(e) != BUILT_IN, e.name)):
            if entry.name in blocked:
                self.blocked.append(entry.name)
                continue
            try:
                self.plugins.append(self._load(entry))
            except KeyboardInterrupt:
                raise
            # A plugin that calls sys.exit or panics in Rust at import is broken, too; only an interrupt is the user's.
            except BaseException as error:
                self._quarantine(entry, error)
        for name, module in local.items():  # its author is here, and sees what it raises
            self.plugins.append(self._register(EntryPoint(name, "", GROUP), module))

    def _load(self, entry: EntryPoint) -> Plugin:
        return self._register(entry, entry.load())

    def _register(self, entry: EntryPoint, module: Any) -> Plugin:
        self.manager.register(module, name=entry.name)
        unknown = [caller.name for caller in self._hooks(module) if caller.spec is None]
        if unknown:
            known = sorted(n for n in vars(hookspecs) if n.startswith("srm_"))
            raise PluginError(f"it implements {', '.join(unknown)}, which is no hook; hooks: {', '.join(known)}")
        backends: list[BackendInfo] = []
        answers = self._call(entry.name, "srm_backend_info")
        if not answers and any(caller.name == "srm_backend_info" for caller in self._hooks(module)):
            raise PluginError("srm_backend_info returned None, not BackendInfo")
        for info in answers:
            backends.extend(info if isinstance(info, list | tuple) else [info])
        ops = [op for result in self._call(entry.name, "srm_ops") for op in result]
        for backend in backends:
            _check_backend(backend)
        for op in ops:
            if not isinstance(op, OpSpec):
                raise PluginError(f"srm_ops returned {type(op).__name__}, not OpSpec")
        self._claim(backends, ops)
        return Plugin(entry.name, _distribution(entry), tuple(backends), tuple(ops))

    def _hooks(self, module: Any) -> list[pluggy.HookCaller]:
        return self.manager.get_hookcallers(module) or []

    def _claim(self, backends: list[BackendInfo], ops: list[OpSpec]) -> None:
        """Two plugins may not use one name: the second is quarantined, the first stays as it is."""
        own = self.own_ops & {o.name for o in ops}
        if own:
            raise PluginError(f"the operator {', '.join(sorted(own))} is srm-core's own; give yours another name")
        for plugin in self.plugins:
            taken = {b.name for b in plugin.backends} & {b.name for b in backends}
            taken |= {o.name for o in plugin.ops} & {o.name for o in ops}
            if taken:
                raise PluginError(
                    f"the name {', '.join(sorted(taken))} is already taken by plugin {plugin.name!r} "
                    f"({plugin.distribution}); keep one of them, or block one with SRM_BLOCK"
                )

    def _quarantine(self, entry: EntryPoint, error: BaseException) -> None:
        # An entry point may bear the name of one that is loaded, which keeps its hooks.
        if self.manager.has_plugin(entry.name) and entry.name not in (p.name for p in self.plugins):
            self.manager.unregister(name=entry.name)
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("plugin %r is quarantined: %s", entry.name, line)
        text = "".join(traceback.format_exception(error))
        self.quarantined.append(Quarantined(entry.name, _distribution(entry), line, text))

    def _call(self, plugin: str, hook: str, **kwargs: Any) -> list[Any]:
        """Call one plugin's implementation of a hook, and only that one's: an exception stays its own."""
        others = [p for n, p in self.manager.list_name_plugin() if n != plugin and p is not None]
        result: list[Any] = self.manager.subset_hook_caller(hook, others)(**kwargs)
        return result

    def probe(self, plugin: str, backend: str) -> list[Any]:
        """Every reason that the plugin gives why `backend` cannot run here."""
        return [reason for reasons in self._call(plugin, "srm_probe", backend=backend) for reason in reasons]

    def notify(self, decision: Any) -> None:
        """Tell the observers; one that raises is logged and changes nothing."""
        for implementation in self.manager.hook.srm_on_decision.get_hookimpls():
            try:
                self._call(implementation.plugin_name, "srm_on_decision", decision=decision)
            except Exception:
                logger.exception("plugin %r: srm_on_decision raised", implementation.plugin_name)


def _check_backend(info: Any) -> None:
    """Mistakes that would otherwise come to light in somebody's call. Errors: `PluginError`."""
    if not isinstance(info, BackendInfo):
        raise PluginError(f"srm_backend_info returned {type(info).__name__}, not BackendInfo")
    if info.api_version != API_VERSION:
        raise PluginError(
            f"backend {info.name!r} is written for API version {info.api_version}; "
            f"this srm-core has version {API_VERSION}; install a release of the plugin that matches"
        )
    if info.name == AUTO or not info.name.strip() or "," in info.name:
        raise PluginError(f"a backend cannot be called {info.name!r}: no selection could name it")
    _check_tuple(info.name, "kernels", info.kernels, Kernel)
    _check_tuple(info.name, "platforms", info.platforms, str)
    _check_tuple(info.name, "requires", info.requires, str)
    for requirement in info.requires:
        for alternative in requirement.split("|"):
            Requirement(alternative.strip())  # its error says what is wrong
    for kernel in info.kernels:
        for name, kind in (("arrays", str), ("dtypes", str), ("platforms", str), ("features", Feature)):
            _check_tuple(f"{info.name}: {kernel.op}", name, getattr(kernel, name), kind)
    ops = [kernel.op for kernel in info.kernels]
    twice = sorted({op for op in ops if ops.count(op) > 1})
    if twice:
        raise PluginError(f"{info.name}: two kernels for {', '.join(twice)}; a backend has one for an operator")


def _check_tuple(where: str, name: str, value: Any, kind: type) -> None:
    # A lone string or kernel stands where its comma was forgotten.
    if not isinstance(value, tuple | list) or not all(isinstance(v, kind) for v in value):
        raise PluginError(f"{where}: {name}: found {value!r}; required a tuple of {kind.__name__}")


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else "unknown"
