"""Draw how much memory attention takes beside its arguments, in tiles and with the whole matrix of scores.

python docs/examples/plot_attention_memory.py docs/images/attention_memory.png
"""

from __future__ import annotations

import argparse
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import srm_core

WIDTH = 64
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


def whole(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The formula as it stands."""
    scores = query @ key.swapaxes(2, 3) / np.float32(np.sqrt(WIDTH))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    out: np.ndarray = weights @ value / weights.sum(-1, keepdims=True)
    return out


def forward(*arrays: np.ndarray) -> None:
    srm_core.attention(*arrays, backend="numpy")


def both(*arrays: np.ndarray) -> None:
    out, pullback = srm_core.vjp("attention", *arrays, backend="numpy")
    pullback(out)


def peak(run: Callable[..., object], length: int) -> float:
    """Megabytes, results included."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 1, length, WIDTH)).astype(np.float32) for _ in range(3)]
    run(*(a[:, :, :8] for a in arrays))  # what is loaded once is not counted
    tracemalloc.start()
    run(*arrays)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained", facecolor="white")
    drawn = (("the formula, forward", "#c0392b", whole), ("numpy, forward and backward", "#888888", both),
             ("numpy, forward", "#1f5fa8", forward))  # fmt: skip
    for name, colour, run in drawn:
        sizes = [peak(run, n) for n in LENGTHS]
        axes.loglog(LENGTHS, sizes, "o-", color=colour, label=name)
        axes.annotate(f"{sizes[-1]:.0f} MB", (LENGTHS[-1], sizes[-1]), xytext=(6, -3), textcoords="offset points",
                      color=colour)  # fmt: skip
        print(name, *(f"T={n}: {s:.1f} MB" for n, s in zip(LENGTHS, sizes, strict=True)), sep="  ")
    axes.set(xlabel="T (one head of 64, float32)", ylabel="peak, MB", xlim=(220, 14000))
    axes.set_xticks(LENGTHS, [str(n) for n in LENGTHS], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(args.picture, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
