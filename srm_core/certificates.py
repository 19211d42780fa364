"""Certificates of the conformance suite: where they lie, and what they say of a backend that is installed here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srm_core.config import cache_folder
from srm_core.errors import ConfigError
from srm_core.registry import Entry

FORMAT = 1


def folder() -> Path:
    """Where `srm-core conformance` keeps certificates."""
    return cache_folder() / "certificates"


def path_of(backend: str, device: str) -> Path:
    return folder() / f"{backend}-{device}.json"


def digest(body: Mapping[str, Any]) -> str:
    """Of a certificate without its digest: it shows damage, and is no signature."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def read(path: Path) -> dict[str, Any]:
    """A certificate. Errors: `ConfigError` if it cannot be read, is of another format, or does not fit its digest."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as a certificate: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ConfigError(f"{path}: found another format; required a certificate of format {FORMAT}")
    body = {k: v for k, v in found.items() if k != "digest"}
    if found.get("digest") != digest(body):
        raise ConfigError(f"{path}: does not fit its digest; run srm-core conformance again")
    return found


def verdict(entry: Entry, device: str) -> str:
    """What the certificate in `folder()` says of a kernel, in a few words; "not checked" without one."""
    path = path_of(entry.backend.name, device)
    if not path.exists():
        return "not checked"
    try:
        found = read(path)
    except ConfigError:
        return "its certificate cannot be read"
    installed = _version(entry.plugin.distribution)
    if found["distribution"] != entry.plugin.distribution or found["version"] != installed:
        return f"checked as {found['distribution']} {found['version']}, not as it is installed"
    op = found["operators"].get(entry.kernel.op)
    if op is None:
        return "not checked"
    return f"{op['verdict']} ({op['passed']} of {op['run']} checks, {found['created'][:10]})"


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
