"""`srm-core describe`."""

from __future__ import annotations

import re
import sys

from rich.console import Console
from rich.markdown import Markdown

from srm_core.describe import describe

LINK = re.compile(r"\[([^]]+)\]\([^)]*\)")  # to a page beside this one, which a terminal cannot follow


def run(op: str, markdown: bool, console: Console) -> None:
    """Show the page of an operator: laid out on a terminal, as it is elsewhere."""
    page = describe(op)
    if markdown or not console.is_terminal:
        sys.stdout.write(page)
    else:
        console.print(Markdown(LINK.sub(r"\1", page)))
