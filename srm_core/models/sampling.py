"""Choosing the next token, by a generator keyed by (seed, sequence, position).

A draw depends on nothing else: not on what else is in the batch, on how many draws came before, or on the
backend that computed the logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from srm_core.errors import ContractError
from srm_core.ops.common import Array


def uniform(seed: int, sequence: int, position: int) -> float:
    """A float64 in [0, 1) from one block of Philox-4x64 with key (seed, sequence) and counter (position)."""
    # As uint64 from the start: NumPy makes floats of a list with integers past 2**63.
    key = np.array([seed, sequence], np.uint64)
    raw = np.random.Philox(key=key, counter=[position, 0, 0, 0]).random_raw()
    return (int(raw) >> 11) * 2.0**-53


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A host integer in [low, high). Errors: `ContractError`."""
    required = f"an integer >= {low}" if high is None else f"an integer, {low} <= {name} < {high}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ContractError("generate", name, f"{value!r}", required)
    if high is not None and value >= high:
        raise ContractError("generate", name, f"{value!r}", required)
    return int(value)


def check_temperature(value: Any) -> float:
    """A finite number >= 0. Errors: `ContractError`."""
    real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    try:
        temperature = float(value) if real else math.nan
    except OverflowError:
        temperature = math.inf
    if not 0 <= temperature < math.inf:
        raise ContractError("generate", "temperature", f"{value!r}"[:40], "a finite number >= 0")
    return temperature


def sample(
    logits: Array, temperature: float, top_k: int | None, seed: int, sequences: Sequence[int], positions: Sequence[int]
) -> Array:
    """One token id a row of logits (B, V). temperature 0 takes the largest logit; ties go to the lower id."""
    logits = logits.astype(np.float64)
    chosen: Array = logits.argmax(axis=1)
    if temperature == 0:
        return chosen
    for i, row in enumerate(logits):
        with np.errstate(over="ignore"):  # a tiny temperature makes all but the largest -infinity, as it should
            scaled = (row - row.max()) / temperature
        if top_k is not None and top_k < len(row):
            scaled[np.argsort(-row, kind="stable")[top_k:]] = -np.inf
        cumulative = np.cumsum(np.exp(scaled))
        draw = uniform(seed, sequences[i], positions[i]) * cumulative[-1]
        chosen[i] = min(int(np.searchsorted(cumulative, draw, side="right")), len(row) - 1)
    return chosen
