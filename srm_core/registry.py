"""(operator, backend) -> Kernel: who is there, who can run here, and in which order they are asked."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.requirements import Requirement

from srm_core.config import AUTO, Config, Selection
from srm_core.errors import PluginError, UnknownNameError
from srm_core.plugins import BUILT_IN, Plugin, PluginSet
from srm_core.spec import BackendInfo, Kernel, OpSpec, Reason

logger = logging.getLogger(__name__)


def reference_kernel(spec: OpSpec) -> Kernel:
    """The kernel of the `reference` backend that runs the specification's own NumPy loops."""
    target = f"srm_backends.reference.kernels:{spec.name}"
    return Kernel(spec.name, target, f"{target}.vjp" if spec.vjp else None, rank=-100)


@dataclass(frozen=True)
class Entry:
    """A kernel with the backend and plugin that it came with."""

    kernel: Kernel
    backend: BackendInfo
    plugin: Plugin

    @property
    def built_in(self) -> bool:
        return self.plugin.distribution == BUILT_IN


class Registry:
    """One reading of the environment and of the installed plugins. Immutable but for its caches."""

    def __init__(self) -> None:
        from srm_core.ops import SPECS  # the operators import the call path, which imports this module

        self.config = Config.from_environ()
        self.plugins = PluginSet(self.config.blocked, frozenset(SPECS), _local_plugins)
        self.specs: dict[str, OpSpec] = dict(SPECS)
        for plugin in self.plugins.plugins:
            self.specs.update((op.name, op) for op in plugin.ops)
        self.backends: dict[str, tuple[BackendInfo, Plugin]] = {}
        self.kernels: dict[str, dict[str, Entry]] = {name: {} for name in self.specs}
        self.orphans: list[tuple[str, str]] = []  # (backend, operator that nobody specifies)
        for plugin in self.plugins.plugins:
            for backend in plugin.backends:
                self.backends[backend.name] = (backend, plugin)
                for kernel in backend.kernels:
                    if kernel.op in self.specs:
                        self.kernels[kernel.op][backend.name] = Entry(kernel, backend, plugin)
                    else:
                        logger.warning("backend %r: no operator is called %r", backend.name, kernel.op)
                        self.orphans.append((backend.name, kernel.op))
        if "reference" in self.backends:
            backend, plugin = self.backends["reference"]
            for name, spec in self.specs.items():
                # A plugin's operator brings its reference; so it runs on that backend like any other.
                if name not in SPECS:
                    self.kernels[name]["reference"] = Entry(reference_kernel(spec), backend, plugin)
        self._runnable: dict[str, tuple[Reason, ...]] = {}
        self.config.check_names(self.specs, self.backends, self._lost)

    def spec(self, op: str) -> OpSpec:
        """The specification of the operator `op`. Errors: `UnknownNameError`."""
        try:
            return self.specs[op]
        except KeyError:
            raise UnknownNameError("operator", op, self.specs) from None

    def check_selection(self, selection: Selection) -> None:
        for name in selection.names:
            if name != AUTO:
                self.backend(name, [*self.backends, AUTO], selection.source)

    def backend(self, name: str, known: Iterable[str] = (), source: str = "") -> tuple[BackendInfo, Plugin]:
        """The backend `name` and its plugin. Errors: `UnknownNameError`, with the `known` names."""
        try:
            return self.backends[name]
        except KeyError:
            known = known or self.backends
            raise UnknownNameError("backend", name, known, source=source, note=self._lost(name)) from None

    def _lost(self, name: str) -> str:
        if name in self.plugins.blocked:
            return " (it is blocked by SRM_BLOCK)"
        for plugin in self.plugins.quarantined:
            if plugin.name == name:
                return f" (its plugin is quarantined: {plugin.error})"
        return ""

    def selection(self, op: str) -> Selection:
        """What the environment selects for `op`."""
        return self.config.per_op.get(op, self.config.default)

    def candidates(self, op: str, selection: Selection, library: str) -> list[tuple[str, Entry | None]]:
        """Backends in the order in which they are asked; None where one has no kernel for `op`.

        Within `auto`: the caller's own library first, then by rank. Other packages' backends are not part of
        `auto`: installing a plugin changes no result.
        """
        entries = self.kernels[op]
        ranked = sorted(
            (e for e in entries.values() if e.built_in),
            key=lambda e: (library not in e.kernel.arrays, -e.kernel.rank, e.backend.name),
        )
        names: list[str] = []
        for name in selection.names:
            names.extend([e.backend.name for e in ranked] if name == AUTO else [name])
        return [(name, entries.get(name)) for name in dict.fromkeys(names)]

    def runnable(self, backend: BackendInfo, plugin: Plugin) -> tuple[Reason, ...]:
        """Why the backend cannot run on this machine: a missing distribution, or what its probe says."""
        reasons = self._runnable.get(backend.name)
        if reasons is None:
            with _lock:  # a probe may be slow; threads that come together ask it once
                reasons = self._runnable.get(backend.name)
                if reasons is None:
                    reasons = tuple(_missing(backend.requires)) or tuple(self._probe(backend, plugin))
                    self._runnable[backend.name] = reasons
        return reasons

    def _probe(self, backend: BackendInfo, plugin: Plugin) -> list[Reason]:
        try:
            return checked_reasons(self.plugins.probe(plugin.name, backend.name))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reason = Reason("probe-failed", f"its probe raised {type(error).__name__}: {error}")
            logger.warning("backend %r: %s", backend.name, reason, exc_info=logger.isEnabledFor(logging.DEBUG))
            return [reason]


def _missing(requirements: Iterable[str]) -> list[Reason]:
    """Requirements that no installed distribution meets. "a | b" is met by either."""
    reasons = []
    for text in requirements:
        if not any(_met(Requirement(alternative.strip())) for alternative in text.split("|")):
            hint = " or ".join(f"pip install '{alternative.strip()}'" for alternative in text.split("|"))
            reasons.append(Reason("not-installed", f"{text} is not installed", hint=hint))
    return reasons


def checked_reasons(answer: Iterable[Any]) -> list[Reason]:
    """What a probe or a predicate answered. Errors: `PluginError` if it holds anything but reasons."""
    reasons = list(answer)
    for reason in reasons:
        if not isinstance(reason, Reason):
            raise PluginError(f"found {reason!r}; required a list of srm_core.spec.Reason, empty for yes")
    return reasons


def _met(requirement: Requirement) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True  # it is not for this platform
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except (PackageNotFoundError, TypeError, KeyError):  # a distribution that is half removed has no version
        return False


Wrap = Callable[[str, Callable[..., Any]], Callable[..., Any]]
_wrap: Wrap | None = None


def resolve(target: str) -> Callable[..., Any]:
    """Import "package.module:function". Errors: `PluginError` with the cause."""
    function = _imported(target)
    return function if _wrap is None else _wrap(target, function)


def _imported(target: str) -> Callable[..., Any]:
    module, _, names = target.partition(":")
    try:
        if module not in sys.modules:
            with _lock:  # keeps a fork from falling into an import; see _hold
                importlib.import_module(module)
        function: Any = importlib.import_module(module)
        for name in names.split("."):
            function = getattr(function, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise PluginError(f"the target {target!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return function  # type: ignore[no-any-return]


_lock = threading.RLock()
_registry: Registry | None = None
_on_reload: list[Callable[[], None]] = []
_local_plugins: dict[str, Any] = {}
_maker: int | None = None  # the thread that makes a registry

FORK_WAITS = 10.0  # seconds


def _hold() -> None:
    """A fork waits for imports that are under way: Python's lock of a module that is being imported by a thread that
    the child does not have is never released there. It does not wait for ever, as an import may."""
    _lock.acquire(timeout=FORK_WAITS)


def _let_go() -> None:
    with suppress(RuntimeError):  # it was not held: the fork has not waited to the end
        _lock.release()


def _renew() -> None:
    global _lock, _maker
    _lock = threading.RLock()
    if _maker != threading.get_ident():
        _maker = None


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(before=_hold, after_in_parent=_let_go, after_in_child=_renew)


def registry() -> Registry:
    """The registry of this process, made on first use. Errors: `PluginError` if a plugin asks for it at its import."""
    global _registry
    if _maker == threading.get_ident():
        raise PluginError("srm_core was called by a plugin that is only being loaded; call it later than at import")
    found = _registry
    if found is None:
        with _lock:
            if _registry is None:
                _registry = _made()
            found = _registry
    return found


def _made() -> Registry:
    global _maker
    _maker = threading.get_ident()
    try:
        return Registry()
    finally:
        _maker = None


def on_reload(forget: Callable[[], None]) -> Callable[[], None]:
    """Call `forget` whenever the registry is made anew; a decorator."""
    _on_reload.append(forget)
    return forget


def reload_config() -> None:
    """Read the environment and the installed plugins again. Decisions made before are forgotten.

    Errors: `ConfigError`; then the configuration stays as it was.
    """
    global _registry
    with _lock:
        _registry = _made()
        _forget()


def _forget() -> None:
    for forget in _on_reload:
        forget()


@contextmanager
def instrumented(wrap: Wrap) -> Iterator[None]:
    """Within it every target, in all threads, is `wrap(target, function)`; for those who watch kernels run.

    What was decided before, or within, is decided again afterwards.
    """
    global _wrap
    before = _wrap
    try:
        with _lock:
            _wrap = wrap
            _forget()
        yield
    finally:
        with _lock:
            _wrap = before
            _forget()


@contextmanager
def local_plugin(name: str, module: Any) -> Iterator[None]:
    """Within it `module` is a plugin called `name` in this process, though no package has installed it."""
    _local_plugins[name] = module
    try:
        reload_config()
        yield
    finally:
        del _local_plugins[name]
        reload_config()
