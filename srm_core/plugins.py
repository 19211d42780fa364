"""Discovery: each entry point is loaded in its own try; a broken one is quarantined, the rest go on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping
from contextvars import copy_context
from dataclasses import dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType
from typing import Any

import pluggy
from packaging.requirements import Requirement

from srm_core import hookspecs
from srm_core.config import AUTO
from srm_core.errors import PluginError, UnknownNameError
from srm_core.guards import Loading
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
    """A loaded plugin with what it declared. notes: what it should not have done while it loaded."""

    name: str
    distribution: str
    backends: tuple[BackendInfo, ...]
    ops: tuple[OpSpec, ...]
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


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
        # Built-in plugins first, so that a stranger cannot take one of their names; then in an order that does not
        # depend on the machine, so that of two that claim one name the same one always has it.
        for entry in sorted(entries, key=lambda e: (_distribution(e) != BUILT_IN, e.name, _distribution(e))):
            if entry.name in blocked:
                self.blocked.append(entry.name)
            else:
                copy_context().run(self._add, entry)  # what it sets of the context is its own
        for name, module in local.items():  # its author is here, and sees what it raises
            self.plugins.append(self._register(EntryPoint(name, "", GROUP), module))

    def _add(self, entry: EntryPoint) -> None:
        logger.debug("loading plugin %r (%s)", entry.name, _distribution(entry))
        try:
            with Loading() as seen:
                plugin = self._register(entry, entry.load())
        except KeyboardInterrupt:
            logger.warning(
                "interrupted while plugin %r (%s) was loading; SRM_BLOCK=%s leaves it out",
                entry.name, _distribution(entry), entry.name,
            )  # fmt: skip
            raise
        # A plugin that calls sys.exit or panics in Rust at import is broken, too; only an interrupt is the user's.
        except BaseException as error:
            self._quarantine(entry, error)
        else:
            self.plugins.append(replace(plugin, seconds=seen.seconds, notes=tuple(seen.notes)))

    def _register(self, entry: EntryPoint, module: Any) -> Plugin:
        for plugin in self.plugins:
            if plugin.name == entry.name:
                raise PluginError(
                    f"the entry point {entry.name!r} is already taken by {plugin.distribution}; "
                    "uninstall one of the two"
                )
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
        line = _line(error)
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

    def profiles(self, plugin: str, backend: str) -> list[Any]:
        """What the plugin tells the conformance suite of its `backend`."""
        return self._call(plugin, "srm_conformance_profile", backend=backend)

    def notify(self, decision: Any) -> None:
        """Tell the observers; one that raises is logged and changes nothing."""
        for implementation in self.manager.hook.srm_on_decision.get_hookimpls():
            try:
                self._call(implementation.plugin_name, "srm_on_decision", decision=decision)
            except KeyboardInterrupt:
                raise
            except BaseException:  # no observer may end the program that it watches
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
    # There is no name where an uninstallation was cut short.
    return entry.dist.name if entry.dist is not None and "Name" in entry.dist.metadata else "unknown"


def _line(error: BaseException) -> str:
    """The first line of an error, whose own text may be broken, too."""
    try:
        text = str(error).strip()
    except Exception as another:
        text = f"(its text cannot be had: {type(another).__name__})"
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
