"""What torch cannot do, or does wrongly, on Apple GPUs, as reasons.

The bounds follow from the dates of torch's own issues and pull requests: index_copy came in 2.8 and read strided
indices wrongly until 2.9 (#154326, #161333); scaled_dot_product_attention gave wrong values without an error, for
tensors that are not contiguous (2.8, #163597), for key lengths off the block (until 2.11, #169222, #174861), for values
of another width (until 2.12, #176767), for partly broadcast masks (mended in May 2026, #184180).
"""

from __future__ import annotations

from typing import Any

import torch
from packaging.version import Version

from srm_core.spec import Given, Reason

SLOTS = Given("slots")
INDEX_COPY, ATTENTION = "2.9", "2.13"


def _older(release: str) -> bool:
    return Version(torch.__version__).release < Version(release).release


def _needs(release: str, what: str) -> list[Reason]:
    """A reason if this torch is older than the first that does `what` right on Apple GPUs."""
    if not _older(release):
        return []
    return [
        Reason(
            "torch-version", f"torch {torch.__version__} has no {what} to rely on here", found=torch.__version__,
            required=f"torch>={release}", hint=f"pip install -U 'torch>={release}'",
        )
    ]  # fmt: skip


def dtypes(view: Any) -> list[Reason]:
    """bfloat16 came with macOS 14."""
    if view.dtype != "bfloat16" or torch.backends.mps.is_macos_or_newer(14, 0):
        return []
    hint = "cast to float16 or float32, or update macOS"
    return [Reason("bfloat16", "needs macOS 14 for bfloat16", required="macOS 14", hint=hint)]


def recurrent_step_(view: Any) -> list[Reason]:
    return dtypes(view) + (_needs(INDEX_COPY, "index_copy") if view[SLOTS] else [])


def attention(view: Any) -> list[Reason]:
    return dtypes(view) + _needs(ATTENTION, "scaled_dot_product_attention")
