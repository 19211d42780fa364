"""The words in which a specification says shapes, such as "B T D", "4H I" or "B? H M D".

`D` is an extent with a name, the same wherever it stands in a call; `2D` twice that; `D?` that or 1; `3` is 3;
`*` any extent. `...` alone is any shape, the same wherever it stands, of N elements.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import prod

WORD = re.compile(r"(\d*)([A-Za-z]*)(\??)")
ANY_SHAPE = "..."
ANY = -1  # the factor of "*"


@cache
def _parse(axes: str) -> tuple[tuple[int, str, bool], ...]:
    """(factor, name, may be 1) of each axis; a literal extent has no name, and "*" the factor ANY."""
    parsed = []
    for word in axes.split():
        found = WORD.fullmatch(word)
        if word == "*":
            parsed.append((ANY, "", False))
        elif found and (found[1] or found[2]):
            parsed.append((int(found[1] or 1), found[2], bool(found[3])))
        else:
            raise ValueError(f"the axis {word!r} of {axes!r}; required a number, a name, 2D, D? or *")
    return tuple(parsed)


def match(axes: str, shape: tuple[int, ...], known: Mapping[str, int]) -> dict[str, int] | None:
    """The extents that `shape` gives to names, beside those that are known; None if it does not fit."""
    if axes == ANY_SHAPE:
        return {"N": prod(shape)} if known.get("N", prod(shape)) == prod(shape) else None
    words = _parse(axes)
    if len(words) != len(shape):
        return None
    dims: dict[str, int] = {}
    for (factor, name, maybe), extent in zip(words, shape, strict=True):
        if factor == ANY or (maybe and extent == 1):
            continue
        required = 1 if not name else known.get(name, dims.get(name))
        if required is None:
            if extent % factor:
                return None
            dims[name] = extent // factor
        elif factor * required != extent:
            return None
    return dims


def extents(axes: str, dims: Mapping[str, int]) -> tuple[int, ...]:
    """The shape that `axes` says where every name is known."""
    return tuple(factor * dims[name] if name else factor for factor, name, _ in _parse(axes))


def shown(alternatives: tuple[str, ...]) -> str:
    """Alternatives for people: "(B, T, D) or (B, T, 1)"."""

    def one(axes: str) -> str:
        names = axes.split()
        return f"({', '.join(names)}{',' if len(names) == 1 else ''})"

    return " or ".join("of one shape" if a == ANY_SHAPE else one(a) for a in alternatives)
