"""Known failures: a TOML file of ids, each with a reason and a day on which it must be looked at again.

[[xfail]]
id = "lstm/gradients/wide/float16"   # an item's id; * and ? stand for any text and any letter
reason = "the backward rounds the cell, see issue 12"
expires = 2027-01-31
device = "cuda"                      # optional: only there
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from srm_core.errors import ConfigError

FIELDS = {"id": str, "reason": str, "expires": date, "device": str}


@dataclass(frozen=True)
class Xfail:
    """Items that are known to fail."""

    id: str
    reason: str
    expires: date
    device: str = ""


def read(path: Path, device: str, today: date | None = None) -> list[Xfail]:
    """The entries for a device. Errors: `ConfigError` for a file that cannot be read, or an entry that is not valid
    or has expired."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML: {error}") from None
    entries = table.pop("xfail", [])
    if table or not isinstance(entries, list):
        raise ConfigError(f"{path}: found {', '.join(table) or 'xfail as a table'}; required [[xfail]] entries alone")
    found = [_entry(path, i, e) for i, e in enumerate(entries, 1)]
    for entry in found:
        if entry.expires < (today or date.today()):
            raise ConfigError(
                f"{path}: {entry.id} expired on {entry.expires}; look whether it still fails, and give it a new day"
            )
    return [e for e in found if e.device in ("", device)]


def _entry(path: Path, number: int, entry: Any) -> Xfail:
    where = f"{path}: entry {number}"
    if not isinstance(entry, dict) or set(entry) - set(FIELDS):
        raise ConfigError(f"{where}: found {entry!r}; required id, reason, expires, and perhaps device")
    for name, kind in FIELDS.items():
        value = entry.get(name)
        if name == "device" and value is None:
            continue
        if type(value) is not kind or not str(value).strip():
            required = "a day such as 2027-01-31" if kind is date else "a text"
            raise ConfigError(f"{where}: {name}: found {value!r}; required {required}")
    return Xfail(**entry)


def matching(entries: Iterable[Xfail], item: str) -> Xfail | None:
    """The first entry for an item."""
    return next((e for e in entries if fnmatchcase(item, e.id)), None)


def unmatched(entries: Iterable[Xfail], items: Iterable[str]) -> list[Xfail]:
    """Entries that are for none of these items."""
    ids = list(items)
    return [e for e in entries if not any(fnmatchcase(i, e.id) for i in ids)]
