"""What the registry's tests share: an environment of their own, plugins made on the spot, fresh interpreters."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import srm_core

HEADER = """
import numpy as np
import srm_core
from srm_core import hookimpl
from srm_core.spec import *

def constant(value):
    # A scan whose every result is `value`, which tells who ran.
    def scan(ctx, gates, tokens, initial_state, *, reverse, lengths):
        y = ctx.empty(tokens.shape, tokens.dtype)
        final = ctx.empty((tokens.shape[0], tokens.shape[2]), tokens.dtype)
        y[...] = final[...] = value
        return y, final
    return scan

seven = constant(7)
"""


class Environ:
    """`environ(SRM_BACKEND="numpy")` sets variables and has them read."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self.patch.setenv(name, value)

    def __call__(self, **variables: str) -> None:
        self.set(**variables)
        srm_core.reload_config()


@pytest.fixture
def environ() -> Iterator[Environ]:
    """No SRM_ variable is set but by the test."""
    with pytest.MonkeyPatch.context() as patch:
        _clear(patch)
        yield Environ(patch)
        _clear(patch)


def _clear(patch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("SRM_")]:
        patch.delenv(name)
    srm_core.reload_config()


class Plugins:
    """Writes plugins as installed distributions onto sys.path."""

    def __init__(self, environ: Environ, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.environ, self.folder, self.patch = environ, folder, patch
        self.modules: list[str] = []

    def write(self, module: str, source: str, *, entry: str = "", target: str = "", distribution: str = "") -> None:
        distribution = distribution or f"srm-{module}"
        root = self.folder / distribution
        info = root / f"{distribution.replace('-', '_')}-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[srm_core.backends]\n{entry or module} = {target or module}\n")
        (root / f"{module}.py").write_text(HEADER + textwrap.dedent(source))
        self.patch.syspath_prepend(str(root))
        self.modules.append(module)

    def __call__(self, module: str, source: str, **names: str) -> ModuleType | None:
        """Install the plugin and read the registry again; returns its module if it can be imported."""
        self.write(module, source, **names)
        srm_core.reload_config()
        return sys.modules.get(module)

    def backend(self, kernels: str, source: str = "", *, name: str = "plug", **fields: Any) -> Any:
        """Install one backend with these kernels (source of a tuple)."""
        extra = "".join(f", {k}={v!r}" for k, v in fields.items())
        info = f"@hookimpl\ndef srm_backend_info():\n    return BackendInfo({name!r}, 'test', ({kernels},){extra})\n"
        return self(name, textwrap.dedent(source) + "\n" + info)


@pytest.fixture
def plugin(environ: Environ, tmp_path: Path) -> Iterator[Plugins]:
    """`plugin(module, source)` installs a plugin for one test; `environ` reads the registry again afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        plugins = Plugins(environ, tmp_path / "plugins", patch)
        yield plugins
    for module in plugins.modules:
        sys.modules.pop(module, None)
    importlib.invalidate_caches()


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """`run_python(source, **environment)` returns what a fresh interpreter prints."""

    def run(source: str, *flags: str, **environment: str) -> str:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("SRM_")}
        done = subprocess.run(
            [sys.executable, *flags, "-c", textwrap.dedent(source)],
            env={**inherited, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def arrays() -> tuple[Any, Any]:
    """(gates, tokens) of a small scan."""
    rng = np.random.default_rng(0)
    return rng.uniform(0.5, 1, (2, 3, 4)).astype(np.float32), rng.standard_normal((2, 3, 4)).astype(np.float32)
