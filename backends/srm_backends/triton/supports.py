"""What the kernels cannot do, as reasons."""

from __future__ import annotations

from typing import Any

from srm_core.spec import Bucket, Reason

WIDEST = 256
WIDTHS = {"query": Bucket("D"), "value": Bucket("E")}


def attention(view: Any) -> list[Reason]:
    """Tiles have whole rows of query, key and value."""
    return [
        Reason(
            "width", f"holds rows of up to {WIDEST} numbers on chip", param=param, found=f"more than {WIDEST}",
            required=f"at most {WIDEST}", hint="use the backend torch",
        )
        for param, feature in WIDTHS.items() if view[feature] > WIDEST
    ]  # fmt: skip
