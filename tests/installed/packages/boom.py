"""It raises at import."""

raise RuntimeError("no driver here\nand a second line")
