"""Every exception that the library raises on purpose. All derive from `SRMError`."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SRMError(Exception):
    """The base of every error that srm_core raises."""


class ContractError(SRMError, ValueError):
    """An argument breaks the operator's contract: wrong shape, dtype, option, value or library.

    Raised in the operator's specification, before any backend is asked, so that every backend says the same.
    """

    def __init__(self, op: str, param: str, found: str, required: str, hint: str = "") -> None:
        self.op, self.param, self.found, self.required, self.hint = op, param, found, required, hint
        message = f"{op}: {param}: found {found}; required {required}"
        super().__init__(f"{message}; {hint}" if hint else message)


class ConfigError(SRMError, ValueError):
    """An environment variable or a selection string cannot be understood."""


class UnknownNameError(ConfigError):
    """A name of a backend or operator that nothing here has."""

    def __init__(self, kind: str, name: str, known: Iterable[str], source: str = "", note: str = "") -> None:
        names = sorted(known)
        close = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        where = f"{source}: " if source else ""
        super().__init__(f"{where}no {kind} is called {name!r}{note}; known: {', '.join(names)}{hint}")


class NoBackendError(SRMError, RuntimeError):
    """No candidate can run the call. `decision` holds every reason of every candidate."""

    def __init__(self, message: str, decision: object = None) -> None:
        self.decision = decision
        super().__init__(message)


class KernelError(SRMError, RuntimeError):
    """A kernel raised. The cause is chained; no other backend is tried."""


class PluginError(SRMError, RuntimeError):
    """A plugin breaks the rules of the registry; it is quarantined, the others go on."""


class UndeclaredFeature(SRMError, LookupError):
    """A predicate read something that neither its operator nor its kernel declares."""


class CheckpointError(SRMError, ValueError):
    """A model file or state dict is missing, damaged or does not fit its configuration."""


class SequenceLengthError(SRMError, ValueError):
    """More positions were asked for than the model has weights for."""


class VocabularyError(SRMError, ValueError):
    """A text or an id that the model's vocabulary does not hold."""
