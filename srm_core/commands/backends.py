"""`srm-core backends`: the table, and below it what the reader should know."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from srm_core.listing import Cell, Listing


def run(listing: Listing, traceback: bool, console: Console) -> None:
    for names in _side_by_side(listing, console.width):
        table = Table(title="operator × backend")
        for name in ("operator", *names):
            table.add_column(name, no_wrap=True)
        for op in listing.ops:
            table.add_row(op, *(_shown(listing.cell(op, name)) for name in names))
        console.print(table)
    for note in _notes(listing):
        console.print(f"  {note}", markup=False, soft_wrap=True)
    for plugin in listing.quarantined:
        line = f"  quarantined: {plugin['name']} ({plugin['distribution']}): {plugin['error']}"
        console.print(line, markup=False, soft_wrap=True)
        if traceback:
            console.print(plugin["traceback"], markup=False, soft_wrap=True)
    if listing.quarantined and not traceback:
        console.print("  see the whole error with: srm-core backends --traceback", markup=False)


def _shown(cell: Cell) -> str:
    return cell.provides if cell.has_kernel else "-"


def _side_by_side(listing: Listing, width: int) -> Iterator[list[str]]:
    """The backends, as many at a time as a table of this width holds."""
    frame = 3
    begin = max(map(len, ("operator", *listing.ops))) + frame + 1
    names: list[str] = []
    taken = begin
    for backend in listing.backends:
        name = backend["name"]
        column = max(len(name), *(len(_shown(listing.cell(op, name))) for op in listing.ops)) + frame
        if names and taken + column > width:
            yield names
            names, taken = [], begin
        names.append(name)
        taken += column
    yield names


def _notes(listing: Listing) -> Iterator[str]:
    """Why there are gaps, and where the rest comes from. What holds for a whole backend is said once."""
    if not all(c.has_kernel for c in listing.cells):
        yield "-: the backend has no kernel for the operator"
    for cell in listing.cells:
        if cell.provides != "no":
            yield from (f"{cell.op} on {cell.backend}: {reason}" for reason in cell.reasons)
    for backend in listing.backends:
        if not backend["built_in"]:
            yield f"{backend['name']}: from {backend['distribution']}"
        yield from (f"{backend['name']}: {reason}" for reason in backend["reasons"])
    for plugin in listing.plugins:
        if not plugin["backends"]:
            yield f"{plugin['name']}: from {plugin['distribution']}, which has no backend"
        yield from (f"{plugin['name']}: {note}" for note in plugin["notes"])
    for name in listing.blocked:
        yield f"{name}: blocked by SRM_BLOCK, not loaded"
