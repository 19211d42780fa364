"""`srm-core generate`."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

from srm_core import use_backend
from srm_core.errors import ConfigError, ContractError, VocabularyError
from srm_core.models.mixer import SHIPPED, RecurrentMixer

MOST = 65536  # texts at once
START = "\n"  # what a text begins with if nobody says; it is not shown


def open_model(path: Path | None, device: str) -> RecurrentMixer:
    """The model on a device. Errors: `CheckpointError`, `ConfigError` for a device that is not here."""
    kind, _, number = device.partition(":")
    if device == "cpu":
        return RecurrentMixer.load(path or SHIPPED)
    if kind != "cuda" or (number and not number.isdecimal()):
        raise ConfigError(f"--device: found {device!r}; required cpu, cuda, or cuda:N")
    if find_spec("cupy") is not None:
        import cupy

        if not cupy.cuda.is_available():
            raise ConfigError(f"--device {device}: CuPy sees no CUDA device")
        if int(number or 0) >= cupy.cuda.runtime.getDeviceCount():
            raise ConfigError(f"--device {device}: CuPy sees {cupy.cuda.runtime.getDeviceCount()} CUDA devices")
        cupy.cuda.Device(int(number or 0)).use()  # for the steps, too
        return RecurrentMixer.load(path or SHIPPED, library="cupy")
    if find_spec("torch") is not None:
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: torch sees no CUDA device")
        return RecurrentMixer.load(path or SHIPPED, library="torch", device=device)
    raise ConfigError(f"--device {device}: needs CuPy or torch; pip install 'srm-core[cupy-cuda12x]'")


def run(
    prompts: list[str], tokens: int, batch: int, seed: int, temperature: float, top_k: int | None,
    backend: str | None, device: str, path: Path | None,
) -> None:  # fmt: skip
    if tokens < 1:
        raise ContractError("generate", "--tokens", f"{tokens}", "a positive number")
    if not 1 <= batch * len(prompts) <= MOST:
        raise ContractError("generate", "--batch", f"{batch}", f"1 to {MOST} texts in all")
    for prompt in prompts:
        if not prompt:
            raise ContractError("generate", "--prompt", "an empty text", "at least one character")
    with use_backend(backend) if backend is not None else nullcontext():
        model = open_model(path, device)
        if model.vocabulary is None:
            raise VocabularyError(f"{path}: the model has no vocabulary in its metadata, so it cannot write text")
        texts = [p for p in prompts for _ in range(batch)]
        ids = [model.vocabulary.encode(t) for t in texts]
        stream = model.stream(ids, tokens, temperature=temperature, top_k=top_k, seed=seed, restart=True)
        start = time.perf_counter()
        written = _stream_one(model, texts[0], stream) if len(texts) == 1 else _collect(model, texts, stream, tokens)
        seconds = time.perf_counter() - start
        print(_closing_line(model, written, seconds), file=sys.stderr)


def _stream_one(model: RecurrentMixer, prompt: str, stream: object) -> int:
    """Write one text as it comes."""
    assert model.vocabulary is not None
    count = 0
    sys.stdout.write("" if prompt == START else prompt)
    for [token] in stream:  # type: ignore[attr-defined]
        sys.stdout.write(model.vocabulary.decode([token]))
        sys.stdout.flush()
        count += 1
    print()
    return count


def _collect(model: RecurrentMixer, texts: list[str], stream: object, tokens: int) -> int:
    """Write several texts, one after the other, when all are done."""
    from rich.console import Console
    from rich.progress import track

    assert model.vocabulary is not None
    new: list[list[int]] = [[] for _ in texts]
    steps = track(stream, "writing", total=tokens, console=Console(stderr=True), transient=True)  # type: ignore[arg-type, var-annotated]
    for chosen in steps:
        for row, token in zip(new, chosen, strict=True):
            row.append(token)
    for number, (text, row) in enumerate(zip(texts, new, strict=True)):
        print(f"--- {number} ---\n{'' if text == START else text}{model.vocabulary.decode(row)}\n")
    return len(texts) * tokens


def _closing_line(model: RecurrentMixer, count: int, seconds: float) -> str:
    decision = model.explain()
    speed = f"{count} tokens in {seconds:.2f} s, {count / seconds:,.0f} tokens/s"
    return f"[backend {decision.chosen}: {decision.why}; {speed}]"
