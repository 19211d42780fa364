"""Files of weights: safetensors with the model's arguments in the metadata, as `srm_core.models` reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from srm_core.arrays import numpy_to_torch
from srm_core.errors import CheckpointError
from srm_core.models.checkpoint import read_safetensors
from srm_core.models.config import MixerConfig
from srm_core.models.text import Vocabulary


def write(
    path: str | Path, state_dict: Mapping[str, Tensor], config: MixerConfig, vocabulary: Vocabulary | None = None,
    accept: Callable[[Path], bool] | None = None,
) -> bool:  # fmt: skip
    """Write the file whole or not at all; one of that name is replaced.

    accept: sees the file under another name, and says whether it is to be put in its place; so does the result.
    Errors: `CheckpointError` where it cannot be written.
    """
    metadata = {"config": json.dumps(asdict(config))}
    if vocabulary is not None:
        metadata["vocabulary"] = json.dumps(vocabulary.characters, ensure_ascii=False)
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state_dict.items()}
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _reported(path):
            part.write_bytes(save(tensors, metadata=metadata))
        if accept is not None and not accept(part):
            return False
        with _reported(path):
            part.replace(path)
        return True
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def read(path: str | Path) -> tuple[dict[str, Tensor], MixerConfig, Vocabulary | None]:
    """(state dict, config, vocabulary) of a file. Errors: `CheckpointError`, in one line."""
    tensors, metadata = read_safetensors(path)
    if "config" not in metadata:
        raise CheckpointError(f"{path}: its metadata have no 'config'; use load_state_dict on a model made with one")
    try:
        config = MixerConfig.from_mapping(json.loads(metadata["config"]))
        characters = json.loads(metadata["vocabulary"]) if "vocabulary" in metadata else None
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata are no JSON of a config and a vocabulary: {error}") from None
    vocabulary = None if characters is None else Vocabulary(characters)
    return {name: numpy_to_torch(array) for name, array in tensors.items()}, config, vocabulary
