"""The backend under test: its kernels, and the array library and device that they are given."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import srm_core
from srm_conformance.profile import Profile
from srm_core.errors import ConfigError
from srm_core.plugins import BUILT_IN
from srm_core.registry import registry
from srm_core.spec import Kernel, OpSpec, Reason

DEVICES = ("cpu", "cuda", "mps")
LIBRARIES = {"cpu": ("numpy", "torch"), "cuda": ("torch", "cupy"), "mps": ("torch",)}


class Subject:
    """A backend on a device.

    arrays: the library whose arrays it is given; None: each that a kernel takes natively and that is here.
    Errors: `UnknownNameError` for a backend that is not installed, `ConfigError` for a device that is not here.
    """

    def __init__(self, backend: str, device: str = "cpu", arrays: str | None = None) -> None:
        found = registry()
        if device not in DEVICES:
            raise ConfigError(f"--srm-device: found {device!r}; required one of {', '.join(DEVICES)}")
        if arrays is not None and arrays not in LIBRARIES[device]:
            raise ConfigError(f"--srm-arrays: found {arrays!r}; required one of {', '.join(LIBRARIES[device])}")
        self.info, self._plugin = found.backend(backend, source="--srm-backend")
        self.backend, self.device, self._arrays = backend, device, arrays
        self.profile = self._profile()
        if device != "cpu" and not any(_here(name, device) for name in LIBRARIES[device]):
            raise ConfigError(f"--srm-device {device}: no array library that is installed sees such a device")

    def _profile(self) -> Profile:
        answers = registry().plugins.profiles(self._plugin.name, self.backend)
        for answer in answers:
            if not isinstance(answer, Profile):
                raise ConfigError(
                    f"plugin {self._plugin.name!r}: srm_conformance_profile returned {type(answer).__name__}; "
                    "required srm_conformance.profile.Profile"
                )
            return answer
        return Profile()

    @property
    def distribution(self) -> str:
        return self._plugin.distribution

    @property
    def version(self) -> str:
        """That of the distribution, or "" if none installed it."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return ""

    @property
    def built_in(self) -> bool:
        return self.distribution == BUILT_IN

    def specs(self) -> list[OpSpec]:
        """Every operator that is known here, also those that the backend has no kernel for."""
        return list(registry().specs.values())

    def kernel(self, op: str) -> Kernel | None:
        entry = registry().kernels[op].get(self.backend)
        return entry.kernel if entry else None

    def runnable(self) -> tuple[Reason, ...]:
        """Why the backend cannot run here; () if it can."""
        return registry().runnable(self.info, self._plugin)

    def libraries(self, kernel: Kernel) -> tuple[str, ...]:
        """The libraries whose arrays the kernel is tested with, the first one with every check."""
        if self.device not in kernel.platforms:
            return ()
        names = kernel.arrays if self._arrays is None else (self._arrays,)
        return tuple(n for n in names if n in LIBRARIES[self.device] and _here(n, self.device))

    def place(self, library: str, number: int = 0) -> Any:
        """The device as the library names it."""
        if library == "torch":
            return import_module("torch").device(self.device, number)
        return import_module("cupy").cuda.Device(number) if library == "cupy" else "cpu"

    def call(self, spec: OpSpec, values: Mapping[str, Any]) -> Any:
        """The operator on the backend, with every argument by name."""
        return srm_core.call(spec.name, **values, backend=self.backend)


def _here(library: str, device: str) -> bool:
    if find_spec(library) is None:
        return False
    if device == "cpu":
        return True
    module = import_module(library)
    if library == "torch" and device == "mps":
        return bool(module.backends.mps.is_available())
    return bool(module.cuda.is_available())
