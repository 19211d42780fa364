"""`srm-core convert`."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from srm_core.errors import CheckpointError, ConfigError
from srm_core.models.config import MixerConfig
from srm_core.models.mixer import RecurrentMixer
from srm_core.models.text import Vocabulary

REQUIRED = ("vocab_size", "hidden_dim", "seq_len", "num_blocks")
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # what torch puts into names
DTYPES = ("float16", "bfloat16", "float32", "float64")
WINDOWS = 4  # random texts that are compared, each as long as the model allows
AGREE = 1e-9  # of the largest logit, in float64


def run(weights: Path, out: Path, config: Path | None, check: bool, force: bool) -> int:
    if importlib.util.find_spec("torch") is None:
        raise ConfigError("convert: torch is not installed; pip install 'srm-core[torch]'")
    if out.exists() and not force:
        raise CheckpointError(f"{out}: exists already; --force replaces it")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: the folder {out.parent} does not exist")
    console = Console(stderr=True)
    # Elsewhere than on a terminal, a progress bar would end with an empty line.
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=3 + (2 * WINDOWS if check else 0))
        checkpoint = _load(weights)
        progress.advance(task)
        try:
            state_dict = _state_dict(checkpoint)
            arguments = _arguments(checkpoint, state_dict, None if config is None else _json(config))
            model_config = MixerConfig.from_mapping(arguments)
            characters = checkpoint.get("vocabulary")
            vocabulary = Vocabulary(characters) if isinstance(characters, str) else None
            RecurrentMixer.from_state_dict(state_dict, model_config, vocabulary=vocabulary)
        except CheckpointError as error:
            raise CheckpointError(f"{weights}: {error}") from None
        progress.update(task, advance=1, description="writing")

        from srm_core.nn.weights import write

        compared = (0.0, 0.0)

        def agree(part: Path) -> bool:
            nonlocal compared
            progress.update(task, advance=1, description="checking")
            compared = _compare(part, state_dict, model_config, progress, task)
            return compared[0] <= AGREE * compared[1]  # a NaN is not

        written = write(out, state_dict, model_config, vocabulary, agree if check else None)
    if check:
        print(f"largest difference of the logits: {compared[0]:.3g}, of a largest logit of {compared[1]:.3g}")
    if not written:
        print(f"they differ by more than {AGREE:g} of it: this is a bug; {out} is not written")
        return 1
    count = sum(t.numel() for t in state_dict.values())
    print(f"{out}: {len(state_dict)} tensors, {count:,} parameters, {out.stat().st_size:,} bytes")
    return 0


def _load(path: Path) -> Mapping[str, Any]:
    """The checkpoint, read without running anything that is in it."""
    import torch

    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle that is refused anyway
            value = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|Unsupported class) ([\w.]+)", str(error))
        if found is None:
            raise CheckpointError(f"{path}: is no torch checkpoint, or a damaged one; none of it was run") from None
        raise CheckpointError(
            f"{path}: refused: it holds {found[1]}, and reading that would run code; "
            "where you trust it, save it anew with torch.save(model.state_dict(), ...)"
        ) from None
    except Exception as error:  # torch raises RuntimeError, EOFError, ValueError and others for damaged files
        said = _line(error) or type(error).__name__
        raise CheckpointError(f"{path}: is no torch checkpoint, or a damaged one: {said}") from None
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{path}: found a {type(value).__name__}; required a state dict")
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"--config {path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"--config {path}: is no JSON: {_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"--config {path}: found a {type(value).__name__}; required an object of arguments")
    return value


def _state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors under the original's names, without what wrappers of torch put before them."""
    import torch

    inner = next((checkpoint[k] for k in ("state_dict", "model_state_dict") if k in checkpoint), checkpoint)
    if not isinstance(inner, Mapping):
        raise CheckpointError(f"its state dict is a {type(inner).__name__}; required names and tensors")
    tensors: dict[str, Any] = {}
    for name, value in inner.items():
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{name}: found a {type(value).__name__}; required a tensor, in a state dict or under 'state_dict' or "
                "'model_state_dict'"
            )
        if value.layout != torch.strided or value.device.type == "meta" or str(value.dtype)[6:] not in DTYPES:
            raise CheckpointError(
                f"{name}: found a {value.layout} tensor of {value.dtype} on {value.device}; required "
                f"a plain one of {', '.join(DTYPES)}"
            )
        bare = ".".join(part for part in str(name).split(".") if part not in WRAPPERS)
        if bare in tensors:
            raise CheckpointError(f"{bare}: is there twice, once as {name}")
        tensors[bare] = value
    if not tensors:
        raise CheckpointError("its state dict is empty")
    return tensors


def _arguments(
    checkpoint: Mapping[str, Any], state_dict: Mapping[str, Any], given: Mapping[str, Any] | None
) -> Mapping[str, Any]:
    """The model's arguments: those given, else the checkpoint's own, with what they lack taken from shapes."""
    arguments = given if given is not None else checkpoint.get("config", {})
    if not isinstance(arguments, Mapping):
        raise CheckpointError(
            f"config: found a {type(arguments).__name__}; required a mapping; give --config FILE.json"
        )
    if all(name in arguments for name in REQUIRED):
        return arguments
    inferred, unclear = _infer(state_dict)
    missing = [name for name in unclear if name not in arguments]
    if missing:
        raise CheckpointError(
            f"shapes do not tell {' and '.join(missing)} (true or false); give --config FILE.json with "
            + json.dumps(dict.fromkeys(missing, False)) + " or the right values"
        )  # fmt: skip
    return {**inferred, **arguments}


def _infer(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments that the shapes tell, and the names of those that they do not."""
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    mixing = "mixer_blocks.0.token_mixing_layer."
    single, together, first = (mixing + n for n in ("weight", "mixer_heads.weight", "mixer_heads.0.weight"))
    weight = next((shapes[n] for n in (single, together, first) if n in shapes), ())
    embedding = shapes.get("input_layer.weight", ())
    if len(embedding) != 2 or len(weight) != 2:
        some = ", ".join(sorted(shapes)[:3])
        raise CheckpointError(f"its names are not those of a recurrent mixer: {some}, ...")
    blocks = {int(m[1]) for name in shapes if (m := re.match(r"mixer_blocks\.(\d+)\.", name))}
    config: dict[str, Any] = {
        "vocab_size": embedding[0], "hidden_dim": embedding[1], "seq_len": weight[1], "num_blocks": len(blocks),
        "decay": any(name.startswith(mixing) and name.endswith("decay_value") for name in shapes),
    }  # fmt: skip
    if single in shapes:
        return {**config, "kernel": weight[0]}, []
    if together in shapes:  # projections are kept even where they are not in use
        return {**config, "heads": weight[0], "parallel_heads": True}, ["use_projections"]
    heads = {m[1] for name in shapes if (m := re.match(re.escape(mixing) + r"mixer_heads\.(\d+)\.", name))}
    config.update(heads=len(heads), use_projections=mixing + "out_proj.weight" in shapes)
    if weight[0] == 2:
        return {**config, "combined_heads": True}, []
    return config, ["mixed_heads"]


def _compare(
    path: Path, state_dict: Mapping[str, Any], config: MixerConfig, progress: Progress, task: Any
) -> tuple[float, float]:
    """(largest difference, largest logit) of the torch module with the checkpoint's tensors and the file's model."""
    import torch

    from srm_core.nn import RecurrentMLPMixer

    module = RecurrentMLPMixer.from_config(config).double().eval()
    module.load_state_dict(state_dict)
    model = RecurrentMixer.load(path, dtype="float64")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (WINDOWS, 1, config.seq_len))
    differences, sizes = [], []
    for window in ids:
        with torch.no_grad():
            expected = module(torch.from_numpy(window)).numpy()
        progress.advance(task)
        differences.append(np.abs(model.forward(window) - expected).max())
        sizes.append(np.abs(expected).max())
        progress.advance(task)
    return float(np.max(differences)), float(np.max(sizes))
