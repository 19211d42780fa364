"""Write what the documentation says of the operators, from their specifications.

python docs/build_operator_pages.py            write docs/reference/operators/OP.md and the tables in other pages
python docs/build_operator_pages.py --check    write nothing; exit code 1 names what is stale
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from srm_core.describe import built_in_kernels, describe, provides, table, text
from srm_core.ops import SPECS

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "docs/reference/operators"
COMMAND = "python docs/build_operator_pages.py"


def operators(folder: str) -> str:
    """Every operator by every built-in backend. folder: that of the pages, seen from the page of the table."""
    kernels = {op: built_in_kernels(op) for op in SPECS}
    backends = list(dict.fromkeys(b for of_op in kernels.values() for b in of_op))
    rows = (
        (f"[`{op}`]({folder}{op}.md)", text(spec.summary), *(provides(kernels[op].get(b)) for b in backends))
        for op, spec in SPECS.items()
    )
    return table(("operator", "what it computes", *backends), rows)


def roundings() -> str:
    """What each operator permits to be rounded, beside its inputs and outputs."""
    rows = (
        (f"`{op}`", ", ".join(f"`{n}`" for n in spec.permitted_roundings) or "nothing") for op, spec in SPECS.items()
    )
    return table(("operator", "permits"), rows)


def tables() -> dict[str, dict[str, str]]:
    """The parts of hand-written pages that are made here: page -> name of the part -> text."""
    return {
        "README.md": {"operators": operators(f"{FOLDER}/")},
        f"{FOLDER}/README.md": {"operators": operators("")},
        "docs/explanation/tolerances.md": {"roundings": roundings()},
    }


def built(root: Path = ROOT) -> dict[str, str]:
    """Every page that is made here, or has such a part, as it should be."""
    pages = {f"{FOLDER}/{op}.md": describe(op) for op in SPECS}
    for path, parts in tables().items():
        pages[path] = filled((root / path).read_text(encoding="utf-8"), parts)
    return pages


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with each part between its two comments. Errors: `ValueError` for a part that it has no place for."""
    for name, part in parts.items():
        begin, end = f"<!-- {name}: made by docs/build_operator_pages.py -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"no place for it: {begin} ... {end}")
        page = f"{before}{begin}\n\n{part}\n\n{end}{after}"
    return page


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 names what is stale")
    args = parser.parse_args(argv)
    for variable in [n for n in os.environ if n.startswith("SRM_")]:
        del os.environ[variable]  # what is selected or blocked here is no part of the documentation

    pages = built(root)
    stale = [p for p in pages if not (root / p).exists() or (root / p).read_text(encoding="utf-8") != pages[p]]
    left = [p for p in (root / FOLDER).glob("*.md") if f"{FOLDER}/{p.name}" not in pages]  # of operators that are gone
    if args.check:
        for name in [*stale, *(p.relative_to(root).as_posix() for p in left)]:
            print(f"{name}: stale; write it with: {COMMAND}")
        return 1 if stale or left else 0
    for name in stale:
        (root / name).write_text(pages[name], encoding="utf-8")
    for path in left:
        path.unlink()
    print(f"{len(pages)} pages, {len(stale) + len(left)} of them changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
