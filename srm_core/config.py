"""The environment grammar, and the overrides that hold for one context (thread, task) only.

    SRM_BACKEND=triton,auto      names in order; `auto` stands for the built-in backends in ranked order
    SRM_BACKEND_SCAN=numpy       the same for one operator
    SRM_BLOCK=name,...           entry points that are never loaded
    SRM_TRACE=decisions.jsonl    a JSON line for every decision
    SRM_AUTOTUNE=off             backends measure nothing to choose between their ways; default on
    SRM_CACHE_DIR=folder         where certificates and measurements are kept; read when it is needed

The environment is read once, and again by `srm_core.reload_config()`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal

from srm_core.errors import ConfigError, UnknownNameError

AUTO = "auto"
Precision = Literal["ieee", "tf32"]
VARIABLES = ("SRM_BACKEND", "SRM_BLOCK", "SRM_TRACE", "SRM_AUTOTUNE", "SRM_CACHE_DIR")


@dataclass(frozen=True)
class Selection:
    """Names of backends in the order of preference, and where they were said."""

    names: tuple[str, ...]
    source: str = field(compare=False)

    @property
    def strict(self) -> bool:
        return AUTO not in self.names

    def __str__(self) -> str:
        return ",".join(self.names)


DEFAULT = Selection((AUTO,), "default")


def parse_selection(text: str, source: str) -> Selection:
    """`text` is a comma list of names. Errors: `ConfigError` for an empty list, an empty or a repeated name."""
    if not isinstance(text, str):
        raise ConfigError(f"{source}: found {text!r}; required a comma list of backend names, or 'auto'")
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ConfigError(f"{source}: an empty name in {text!r}; required a comma list of backend names, or 'auto'")
    if len(set(names)) != len(names):
        raise ConfigError(f"{source}: a name stands twice in {text!r}; name each backend once")
    return Selection(names, source)


@dataclass(frozen=True)
class Config:
    """What the environment says."""

    default: Selection = DEFAULT
    per_op: Mapping[str, Selection] = field(default_factory=dict)
    blocked: frozenset[str] = frozenset()
    trace: str | None = None
    autotune: bool = True

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Config:
        """Read the environment. An empty variable counts as unset."""
        env = {k: v for k, v in (os.environ if environ is None else environ).items() if v.strip()}
        for name in env:
            own = name in VARIABLES or name.startswith("SRM_BACKEND_")
            # Another program's SRM_HOME is not ours to refuse; something close to one of ours is.
            near = name.startswith("SRM_BACKEND") or get_close_matches(name, VARIABLES, cutoff=0.8)
            if name.startswith("SRM_") and not own and near:
                raise UnknownNameError("environment variable", name, VARIABLES)
        selections = {
            name: parse_selection(value, name) for name, value in env.items() if name.startswith("SRM_BACKEND")
        }
        blocked = env.get("SRM_BLOCK", "")
        trace = env.get("SRM_TRACE")
        if trace is not None:
            try:
                with open(trace, "a", encoding="utf-8"):
                    pass
            except OSError as error:
                raise ConfigError(
                    f"SRM_TRACE={trace}: cannot be written ({error.strerror}); name a writable file"
                ) from None
        autotune = env.get("SRM_AUTOTUNE", "on")
        if autotune not in ("on", "off"):
            raise ConfigError(f"SRM_AUTOTUNE: found {autotune!r}; required 'on' or 'off'")
        return cls(
            default=selections.pop("SRM_BACKEND", DEFAULT),
            per_op={name.removeprefix("SRM_BACKEND_").lower(): s for name, s in selections.items()},
            blocked=frozenset(n.strip() for n in blocked.split(",") if n.strip()),
            trace=trace,
            autotune=autotune == "on",
        )

    def check_names(self, ops: Iterable[str], backends: Iterable[str], note: Callable[[str], str]) -> None:
        """A misspelt operator or backend in the environment is an error, not a silent default.

        note: what else is known of a backend that is not here (blocked, quarantined).
        """
        known = [*backends, AUTO]
        ops = list(ops)
        for op in self.per_op:
            if op not in ops:
                raise UnknownNameError("operator", op, ops, source=f"SRM_BACKEND_{op.upper()}")
        for selection in (self.default, *self.per_op.values()):
            for name in selection.names:
                if name not in known:
                    raise UnknownNameError(
                        "backend", name, known, source=f"{selection.source}={selection}", note=note(name)
                    )


def cache_folder() -> Path:
    """Where files of ours outlive a process: SRM_CACHE_DIR, else `srm-core` in the user's cache."""
    root = os.environ.get("SRM_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) if root else Path(cache) / "srm-core"


@dataclass(frozen=True, eq=False)
class State:
    """The context-local part of a memo key. States are interned, so identity is equality."""

    selection: Selection | None
    precision: Precision
    deterministic: bool


@cache
def _intern(selection: Selection | None, precision: Precision, deterministic: bool) -> State:
    return State(selection, precision, deterministic)


CURRENT: ContextVar[State] = ContextVar("srm_state", default=_intern(None, "ieee", False))  # noqa: B039  (frozen)


@contextmanager
def _override(**change: object) -> Iterator[None]:
    state = replace(CURRENT.get(), **change)  # type: ignore[arg-type]
    token = CURRENT.set(_intern(state.selection, state.precision, state.deterministic))
    try:
        yield
    finally:
        CURRENT.reset(token)


def use_backend(selection: str) -> AbstractContextManager[None]:
    """Use these backends inside the `with` block, in this thread or task only.

    selection: a comma list such as "numpy" (strict) or "triton,auto" (with a fallback).
    Errors: `ConfigError` for a malformed list, `UnknownNameError` for a name that nothing here has.
    """
    from srm_core.registry import registry

    parsed = parse_selection(selection, "use_backend")
    registry().check_selection(parsed)
    return _override(selection=parsed)


def precision(policy: Precision) -> AbstractContextManager[None]:
    """Allow ("tf32") or forbid ("ieee", the default) TF32 products of float32 inside the `with` block."""
    if policy not in ("ieee", "tf32"):
        raise ConfigError(f"precision: found {policy!r}; required 'ieee' or 'tf32'")
    return _override(precision=policy)


def deterministic(on: bool = True) -> AbstractContextManager[None]:
    """Inside the `with` block use only kernels that are declared deterministic."""
    if not isinstance(on, bool):
        raise ConfigError(f"deterministic: found {on!r}; required True or False")
    return _override(deterministic=on)
