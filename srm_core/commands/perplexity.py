"""`srm-core perplexity`."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

import srm_core
from srm_core.errors import ContractError, VocabularyError
from srm_core.models.mixer import SHIPPED, RecurrentMixer
from srm_core.ops.common import Array

WINDOWS = 64  # windows computed at once
AGREE = 1e-4  # bits per character by which the two forms may differ, in float32


def run(file: Path, path: Path | None, backend: str | None, skip_unknown: bool) -> int:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{file}: is no UTF-8 text: {error.reason} at byte {error.start}") from None
    with srm_core.use_backend(backend) if backend is not None else nullcontext():
        model = RecurrentMixer.load(path or SHIPPED)
        if model.vocabulary is None:
            raise VocabularyError(f"{path}: the model has no vocabulary in its metadata, so it cannot read text")
        unread = 0
        if skip_unknown:
            known = model.vocabulary.known(text)
            unread, text = len(text) - len(known), known
        try:
            ids = np.array(model.vocabulary.encode(text), np.int64)
        except VocabularyError as error:
            raise VocabularyError(f"{file}: {error}; --skip-unknown leaves such characters out") from None
        if len(ids) < 2:
            raise ContractError("perplexity", str(file), f"{len(ids)} characters", "at least 2")
        windows = _windows(ids, model.config.seq_len)
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("scoring", total=2 * len(ids))
            parallel = steps = 0.0
            for chunk in windows:
                parallel += _bits(model.forward(chunk)[:, :-1], chunk[:, 1:])
                progress.advance(task, chunk.size)
                state = model.initial_state(len(chunk))
                for t in range(chunk.shape[1] - 1):
                    logits, state = model.step(chunk[:, t], state)
                    steps += _bits(logits, chunk[:, t + 1])
                    progress.advance(task, len(chunk))
    count = sum(chunk[:, 1:].size for chunk in windows)
    left_out = f", {unread:,} left out" if unread else ""
    print(f"{file}: {len(ids):,} characters{left_out}, {count:,} predicted")
    print(f"in parallel: {parallel / count:.5f} bits per character")
    print(f"in steps:    {steps / count:.5f} bits per character")
    agree = abs(parallel - steps) / count < AGREE
    print("they agree" if agree else f"they differ by more than {AGREE}: this is a bug")
    return 0 if agree else 1


def _windows(ids: Array, length: int) -> list[Array]:
    """Whole windows (B, L), at most WINDOWS at once, then what is left over as one shorter window."""
    whole = len(ids) // length * length
    parts = list(ids[:whole].reshape(-1, length)) if whole else []
    batches = [np.stack(parts[i : i + WINDOWS]) for i in range(0, len(parts), WINDOWS)]
    if len(ids) - whole > 1:
        batches.append(ids[whole:][None])
    return batches


def _bits(logits: Array, targets: Array) -> float:
    """-log2 of the probability of the targets, summed."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
    return float((np.log(np.exp(x).sum(axis=-1)) - chosen).sum() / math.log(2))
