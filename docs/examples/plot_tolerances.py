"""Draw the errors of three attention kernels in bfloat16, and what is allowed.

python docs/examples/plot_tolerances.py docs/images/tolerances.png
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
from srm_conformance.tolerances import judge_forward

from srm_core.ops import SPECS

Arrays = tuple[np.ndarray, ...]
HALF, WIDTH, STEPS = ml_dtypes.bfloat16, 16, 8
SPEC = SPECS["attention"]
STRICT = replace(SPEC, permitted_roundings=())


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, weights_in: Any, sums_in: Any) -> np.ndarray:
    """The probabilities rounded to one dtype, the sums over the slots to another, at every step."""
    scores = query.astype(np.float32) @ key.astype(np.float32).swapaxes(2, 3) / np.sqrt(WIDTH)
    weights = np.exp(scores - scores.max(-1, keepdims=True)).astype(weights_in)
    total, out = np.zeros((1, 1, STEPS, 1), sums_in), np.zeros((1, 1, STEPS, WIDTH), sums_in)
    for s in range(key.shape[2]):
        w = weights[..., s, None].astype(sums_in)
        total, out = (total + w).astype(sums_in), (out + w * value[:, :, s, None]).astype(sums_in)
    return (out / total).astype(HALF)


KERNELS: dict[str, tuple[str, Callable[..., np.ndarray]]] = {
    "float32 throughout": ("#888888", lambda *a: attention(*a, np.float32, np.float32)),
    "rounds the probabilities": ("#1f5fa8", lambda *a: attention(*a, HALF, np.float32)),
    "sums in bfloat16": ("#c0392b", lambda *a: attention(*a, HALF, HALF)),
}


def many_slots(slots: float) -> Arrays:
    rng = np.random.default_rng(0)
    return tuple(rng.normal(size=(1, 1, n, WIDTH)).astype(HALF) for n in (STEPS, int(slots), int(slots)))


def cancelling(apart: float) -> Arrays:
    """Pairs of slots with opposite values, whose keys differ by so much."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 1, n, WIDTH)) for n in (STEPS, 32, 32))
    keys = np.concatenate([key, key + apart * rng.normal(size=key.shape)], 2)
    return query.astype(HALF), keys.astype(HALF), np.concatenate([value, -value], 2).astype(HALF)


def judged(spec: Any, arrays: Arrays, out: np.ndarray) -> tuple[float, float]:
    """(error, allowed)"""
    judgement = next(j for j in judge_forward(spec, arrays, {}, (out,)) if j.measure == "frobenius")
    return judgement.error, judgement.allowed


def draw(axes: Any, at: np.ndarray, make: Callable[[float], Arrays]) -> None:
    inputs = [make(x) for x in at]
    for name, (colour, kernel) in KERNELS.items():
        outs = [kernel(*arrays) for arrays in inputs]
        errors = [judged(SPEC, *pair)[0] for pair in zip(inputs, outs, strict=True)]
        axes.loglog(at, errors, "o-", color=colour, label=name, markersize=3)
    for spec, style, name in ((SPEC, "-", "allowed"), (STRICT, ":", "allowed if nothing were permitted")):
        axes.loglog(at, [judged(spec, *pair)[1] for pair in zip(inputs, outs, strict=True)], f"k{style}", label=name)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained", facecolor="white", sharey=True)
    draw(left, 2.0 ** np.arange(2, 12), many_slots)
    draw(right, 2.0 ** np.arange(0, -7, -1), cancelling)
    left.set(xlabel="slots", ylabel="relative Frobenius error", title="random keys and values")
    right.set(xlabel="distance between the keys of opposite values", title="values that cancel: 64 slots")
    right.invert_xaxis()
    handles, names = left.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(args.picture, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
