"""What `train_mixer.py` keeps while it trains: checkpoints, the history of the losses, and where it goes besides."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from training_data import Problem

FORMAT = 1


def write_checkpoint(
    path: Path, settings: Mapping[str, Any], parts: Mapping[str, Any], progress: Mapping[str, Any]
) -> None:
    """parts: what has a state_dict. progress: step, history and the like."""
    states = {name: part.state_dict() for name, part in parts.items()}
    chance = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        chance["cuda"] = torch.cuda.get_rng_state()
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "settings": dict(settings), "states": states, "chance": chance, **progress}, buffer)
    write_whole(path, buffer.getvalue())


def write_whole(path: Path, data: bytes) -> None:
    """Write whole or not at all, whatever interrupts."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        raise Problem(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)


def read_checkpoint(path: Path, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Put the parts and the random numbers back where they were; returns the progress.

    Nothing is touched if the checkpoint is of a run with other settings.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Problem(f"{path}: no checkpoint to resume from; start without --resume") from None
    except Exception as error:  # of no common type: whatever unpickling what is no checkpoint raises
        raise Problem(f"{path}: no checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise Problem(f"{path}: no checkpoint that this script wrote")
    before = found["settings"]
    other = [n for n in settings if before.get(n) != settings[n]]
    if other:
        names = {"identity": "the text"}
        said = "; ".join(f"{names.get(n, '--' + n)}: {_short(before.get(n))}, now {_short(settings[n])}" for n in other)
        raise Problem(f"{path}: a checkpoint of another run ({said}); give what it was started with")
    for name, part in parts.items():
        part.load_state_dict(found["states"][name])
    torch.set_rng_state(found["chance"]["cpu"])
    if "cuda" in found["chance"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(found["chance"]["cuda"])
    return {n: v for n, v in found.items() if n not in ("format", "settings", "states", "chance")}


def _short(value: Any) -> str:
    return f"{str(value)[:12]}"


def write_history(path: Path, rows: list[dict[str, float]]) -> None:
    """The losses as JSON lines."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


class TensorBoard:
    """Scalars for TensorBoard, in a folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int, run: str | None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise Problem("--log tensorboard: needs tensorboard; pip install 'srm-core[tensorboard]'") from None
        self.run = None
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self.writer.add_text("settings", json.dumps(dict(settings)), step)

    def add(self, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, int(row["step"]))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """Metrics for MLflow, wherever its own settings send them; a resumed training goes on with its run."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int, run: str | None) -> None:
        try:
            import mlflow
        except ImportError:
            raise Problem("--log mlflow: needs mlflow; pip install 'srm-core[mlflow]'") from None
        self.mlflow = mlflow
        name = None if run else folder.name
        self.run: str | None = mlflow.start_run(run_id=run, run_name=name).info.run_id
        if run is None:
            mlflow.log_params(dict(settings))

    def add(self, row: Mapping[str, float]) -> None:
        self.mlflow.log_metrics({n: v for n, v in row.items() if n != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self.mlflow.end_run()


LOGS = {"tensorboard": TensorBoard, "mlflow": MLflow}


class Interrupt:
    """Has Ctrl-C been pressed?"""

    pressed = False


@contextmanager
def interruptible() -> Iterator[Interrupt]:
    """The first Ctrl-C is noted, so that a step can end; the second one interrupts as ever."""
    seen = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield seen
        return

    def note(*_: Any) -> None:
        seen.pressed = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
