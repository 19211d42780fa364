"""Draw the losses of a training log.

python docs/examples/plot_training.py docs/examples/bard_training.jsonl docs/images/training.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure


def draw(rows: Sequence[Mapping[str, float]], picture: Path, unit: str = "character") -> None:
    """A PNG of rows as train_mixer.py logs them."""
    held = [row for row in rows if "validation" in row]
    figure = Figure(figsize=(7, 3.6), layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.plot([r["step"] for r in rows], [r["train"] for r in rows], "o", color="#888888", label="training, one batch")
    axes.plot([r["step"] for r in held], [r["validation"] for r in held], color="#1f5fa8", label="validation")
    last = held[-1]
    axes.annotate(
        f"{last['validation']:.3f}",
        (last["step"], last["validation"]),
        xytext=(0, 7),
        textcoords="offset points",
        ha="right",
        color="#1f5fa8",
    )
    axes.set(xlabel="step", ylabel=f"bits per {unit}", xlim=(0, None))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log", type=Path, help="JSON lines, as train_mixer.py writes them")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    args = parser.parse_args()
    draw([json.loads(line) for line in args.log.read_text(encoding="utf-8").splitlines()], args.picture)


if __name__ == "__main__":
    main()
