"""The certificate of a run: what was checked, how it ended, and how near each operator came to what is allowed."""

from __future__ import annotations

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import srm_conformance
import srm_core
from srm_conformance.session import Ended, Session
from srm_core.certificates import FORMAT, digest
from srm_core.errors import ConfigError

LIBRARIES = ("numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "hypothesis", "pytest")
KEYS = {"passed": "passed", "failed": "failed", "xfailed": "xfailed", "not claimed": "not_claimed"}


def certificate(session: Session, ended: Sequence[Ended]) -> dict[str, Any]:
    """As JSON. A run of single items, by --srm-only, earns none: `ConfigError`."""
    if session.options.only:
        raise ConfigError("--srm-certificate: found a run of --srm-only; a certificate is for whole operators")
    subject = session.subject
    body: dict[str, Any] = {
        "format": FORMAT,
        "backend": subject.backend,
        "distribution": subject.distribution,
        "version": subject.version,
        "tech": subject.info.tech,
        "device": subject.device,
        "machine": {"python": platform.python_version(), "platform": platform.platform(), "gpu": _gpu(subject.device)},
        "libraries": {name: found for name in LIBRARIES if (found := _version(name))},
        "suite": {"version": srm_core.__version__, "digest": suite_digest()},
        "profile": {"name": session.options.profile, "seed": session.options.seed, "large": session.options.large},
        "looser": {op: vars(looser) for op, looser in subject.profile.looser.items()},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "launches": sum(e.launches for e in ended),
        "operators": {op: _operator(op, ended) for op in dict.fromkeys(e.op for e in ended)},
    }
    return {**body, "digest": digest(body)}


def write(session: Session, ended: Sequence[Ended], path: Path) -> None:
    text = json.dumps(certificate(session, ended), indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def counts(ended: Iterable[Ended]) -> dict[str, int]:
    """How many ended how; "run" are those that were claimed."""
    found = Counter(e.verdict for e in ended)
    known = {key: found[verdict] for verdict, key in KEYS.items()}  # type: ignore[index]
    return {"run": known["passed"] + known["failed"] + known["xfailed"], **known}


def verdict_of(ended: Sequence[Ended]) -> str:
    """ "passed", "failed", "known failures", or "not claimed"."""
    found = counts(ended)
    if found["failed"]:
        return "failed"
    if not sum(e.launches for e in ended):
        return "not claimed"
    return "known failures" if found["xfailed"] else "passed"


def _operator(op: str, everything: Sequence[Ended]) -> dict[str, Any]:
    ended = [e for e in everything if e.op == op]
    dtypes: dict[str, Any] = {}
    for dtype in dict.fromkeys(e.dtype for e in ended if e.dtype):
        of_dtype = [e for e in ended if e.dtype == dtype]
        worst = max(of_dtype, key=lambda e: e.worst)
        dtypes[dtype] = {
            **counts(of_dtype), "worst": round(worst.worst, 4), "worst_item": worst.id, "worst_of": worst.worst_of,
        }  # fmt: skip
    checks = {c: counts(e for e in ended if e.check == c) for c in dict.fromkeys(e.check for e in ended)}
    return {"verdict": verdict_of(ended), **counts(ended), "dtypes": dtypes, "checks": checks}


def suite_digest() -> str:
    """Of the sources of the suite and of the specifications: which suite it was, whatever its version says."""
    total = hashlib.sha256()
    for module, below in ((srm_conformance, ""), (srm_core, "ops")):
        root = Path(module.__file__ or "").parent / below
        for file in sorted(root.rglob("*.py")):
            total.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return "sha256:" + total.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _gpu(device: str) -> str:
    return "" if device == "cpu" else next(iter(srm_core.report(look_for_devices=True)["devices"][1:]), "")
