"""Reading safetensors files, and taking named parameters out of a state dict with their shapes checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize

from srm_core.arrays import BFLOAT16, library_of, torch_to_numpy
from srm_core.errors import CheckpointError
from srm_core.ops.common import Array

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}


def read_safetensors(path: str | Path) -> tuple[dict[str, Array], dict[str, str]]:
    """(tensors, metadata) of a file, bfloat16 too. Errors: `CheckpointError`, in one line."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        entries = deserialize(data)  # type: ignore[no-untyped-call]
        # The library offers metadata only for files it opens itself; the header is JSON behind its length.
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no whole safetensors file: {error}") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(f"{path}: {name}: found dtype {entry['dtype']}; required one of {', '.join(DTYPES)}")
        tensors[name] = np.frombuffer(bytes(entry["data"]), DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


class Parameters:
    """A state dict from which parameters are taken by name; knows what has been taken."""

    def __init__(self, state_dict: Mapping[str, Any]) -> None:
        self._left = dict(state_dict)

    def take(self, name: str, *shape: int) -> Array:
        """The parameter as float64. Errors: `CheckpointError` if it is missing, of another shape or not finite."""
        if name not in self._left:
            near = ", ".join(sorted(self._left)[:3])
            raise CheckpointError(f"the state dict has no {name!r}; it has {near}, ...")
        value = _to_host(name, self._left.pop(name))
        if value.shape != shape:
            raise CheckpointError(f"{name}: found shape {value.shape}; required {shape} by the config")
        if not np.isfinite(value).all():
            raise CheckpointError(f"{name}: holds a NaN or an infinity")
        return value

    def drop(self, prefix: str) -> None:
        """Take what the original keeps but does not use."""
        for name in [n for n in self._left if n.startswith(prefix)]:
            del self._left[name]

    def finish(self) -> None:
        """Errors: `CheckpointError` if something is left, which would mean that the config is another model's."""
        if self._left:
            some = ", ".join(sorted(self._left)[:3])
            raise CheckpointError(f"the state dict has {len(self._left)} parameters that the config does not: {some}")


def _to_host(name: str, value: Any) -> Array:
    library = library_of(value)
    if library == "torch":
        value = torch_to_numpy(value.detach().cpu())
    elif library == "cupy":
        value = value.get()
    elif library != "numpy":
        raise CheckpointError(f"{name}: found a {type(value).__name__}; required an array")
    if value.dtype.kind not in "fiuV" or (value.dtype.kind == "V" and value.dtype != BFLOAT16):
        raise CheckpointError(f"{name}: found dtype {value.dtype}; required real numbers")
    result: Array = value.astype(np.float64)
    return result
