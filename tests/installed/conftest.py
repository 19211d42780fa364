"""Plugins as people have them: wheels that pip installs into an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

SOURCES = Path(__file__).parent / "packages"
Done = subprocess.CompletedProcess[str]


class Environment:
    """A virtual environment that sees the packages of this one, and the plugins that pip installs into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        venv.EnvBuilder(symlinks=os.name != "nt").create(folder / "env")
        known = {"base": str(folder / "env"), "platbase": str(folder / "env")}
        self.packages = Path(sysconfig.get_path("purelib", "venv", known))
        self._python = Path(sysconfig.get_path("scripts", "venv", known)) / "python"
        # As site does it for its own folder: also what is installed there for editing.
        parent = sysconfig.get_path("purelib")
        (self.packages / "parent.pth").write_text(f"import site; site.addsitedir({parent!r})\n", encoding="utf-8")

    def install(self, *modules: str, entry: str = "") -> None:
        """Install plugins out of `packages`, each as the distribution srm-MODULE with one entry point.

        entry: its name; default: the module's.
        """
        self._pip(
            wheel(self.folder, f"srm-{module.replace('_', '-')}", {entry or module: module}, [SOURCES / f"{module}.py"])
            for module in modules
        )

    def install_project(self, project: Path) -> None:
        """Install a plugin out of its own project, which has one package."""
        facts = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        package = project / facts["name"].replace("-", "_")
        entries = facts["entry-points"]["srm_core.backends"]
        self._pip([wheel(self.folder, facts["name"], entries, package.glob("*.py"), f"{package.name}/")])

    def _pip(self, wheels: Iterable[Path]) -> None:
        quick = ("--no-deps", "--no-index", "--no-compile", "--quiet", *map(str, wheels))
        done = self.run("-m", "pip", "--isolated", "--disable-pip-version-check", "install", *quick)
        assert done.returncode == 0, done.stderr

    def command(self, *arguments: str, **environ: str) -> Done:
        """`srm-core ARGUMENTS`."""
        return self.run("-m", "srm_core", *arguments, **environ)

    def run(self, *arguments: str, timeout: float = 60, **environ: str) -> Done:
        env = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "80"}
        env = {k: v for k, v in env.items() if not k.startswith(("SRM_", "MEDDLER_"))} | environ
        return subprocess.run(
            [str(self._python), *arguments], capture_output=True, text=True, encoding="utf-8", env=env,
            cwd=self.folder, timeout=timeout, check=False,
        )  # fmt: skip

    def start(self, code: str, **environ: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self._python), "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | environ, cwd=self.folder,
        )  # fmt: skip


def wheel(folder: Path, name: str, entries: dict[str, str], modules: Iterable[Path], package: str = "") -> Path:
    """A wheel as a build backend would make it, which would take a second, or the network, to install itself."""
    stem = f"{name.replace('-', '_')}-1.0"
    info = f"{stem}.dist-info"
    files = {package + module.name: module.read_text(encoding="utf-8") for module in modules} | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[srm_core.backends]\n" + "".join(f"{n} = {t}\n" for n, t in entries.items()),
    }
    files[f"{info}/RECORD"] = "".join(f"{file},,\n" for file in (*files, f"{info}/RECORD"))
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in files.items():
            archive.writestr(file, text)
    return path


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    """A fresh environment without plugins but the built-in ones."""
    return Environment(tmp_path)
