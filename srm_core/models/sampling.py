"""Choosing the next token, by a generator keyed by (seed, sequence, position).

A draw depends on nothing else: not on what else is in the batch, on how many draws came before, or on the
backend that computed the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from srm_core.errors import ContractError
from srm_core.ops.common import Array


def uniform(seed: int, sequence: int, position: int) -> float:
    """A float64 in [0, 1) from one block of Philox-4x64 with key (seed, sequence) and counter (position)."""
    raw = np.random.Philox(key=[seed, sequence], counter=[position, 0, 0, 0]).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def check_options(temperature: float, top_k: int | None, seed: int) -> None:
    """Errors: `ContractError`."""
    if not (isinstance(temperature, int | float) and 0 <= temperature < float("inf")):
        raise ContractError("generate", "temperature", f"{temperature!r}", "a finite number >= 0")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ContractError("generate", "top_k", f"{top_k!r}", "None or a positive integer")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ContractError("generate", "seed", f"{seed!r}", "an integer, 0 <= seed < 2**64")


def sample(
    logits: Array, temperature: float, top_k: int | None, seed: int, sequences: Sequence[int], positions: Sequence[int]
) -> Array:
    """One token id a row of logits (B, V). temperature 0 takes the largest logit; ties go to the lower id."""
    logits = logits.astype(np.float64)
    chosen: Array = logits.argmax(axis=1)
    if temperature == 0:
        return chosen
    for i, row in enumerate(logits):
        scaled = (row - row.max()) / temperature
        if top_k is not None and top_k < len(row):
            scaled[np.argsort(-row, kind="stable")[top_k:]] = -np.inf
        cumulative = np.cumsum(np.exp(scaled))
        draw = uniform(seed, sequences[i], positions[i]) * cumulative[-1]
        chosen[i] = min(int(np.searchsorted(cumulative, draw, side="right")), len(row) - 1)
    return chosen
