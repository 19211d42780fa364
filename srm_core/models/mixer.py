"""The structured recurrent mixer as a language model, for inference on NumPy, torch or CuPy arrays."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from srm_core.arrays import library_of, torch_to_numpy
from srm_core.decision import Decision
from srm_core.dispatch import explain
from srm_core.errors import CheckpointError, ConfigError, ContractError, SequenceLengthError, VocabularyError
from srm_core.models import mixing
from srm_core.models.checkpoint import Parameters, read_safetensors
from srm_core.models.config import MixerConfig
from srm_core.models.sampling import check_integer, check_temperature, sample
from srm_core.models.text import Vocabulary
from srm_core.ops.common import Array

SHIPPED = Path(__file__).parent / "data" / "bard.safetensors"


@dataclass(frozen=True)
class MixerState:
    """What a model remembers of a batch: an array (B, H', D) a block, and how many positions each has seen.

    A value: `step` and `prefill` return a new one and leave the old as it was.
    """

    layers: tuple[Any, ...]
    positions: Array  # (B,) int64, in host memory


@dataclass
class _Norm:
    weight: Any
    bias: Any


@dataclass
class _Block:
    """x + MLP(LN(x)), then x + mix(LN(x))."""

    channel_norm: _Norm
    up: tuple[Any, Any]
    down: tuple[Any, Any]
    token_norm: _Norm
    tokens: mixing.TokenMixing


class RecurrentMixer:
    """A language model of blocks of an MLP over channels and a linear recurrence over time.

    Make one with `load` or `from_state_dict`. The same weights run in parallel over a whole text (`forward`),
    in steps (`step`), or in chunks (`prefill`), with the same logits. The recurrences run through the registry,
    so `use_backend` and SRM_BACKEND choose who computes them; everything else is in `array_library`.
    """

    def __init__(
        self, config: MixerConfig, embedding: Any, blocks: list[_Block], output: Any, library: str,
        dtype: str, device: Any, vocabulary: Vocabulary | None = None,
    ) -> None:  # fmt: skip
        self.config, self.array_library, self.dtype, self.device = config, library, dtype, device
        self.vocabulary = vocabulary
        try:
            self._xp = importlib.import_module(f"array_api_compat.{library}")
        except ImportError as error:
            raise ConfigError(f"library={library!r}: {library} cannot be imported: {error}") from error
        try:
            self._embedding = self._array(embedding)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(f"device={device!r}: {library} cannot place an array there: {error}") from error
        self._output = self._array(output)
        self._blocks = [self._placed(block) for block in blocks]

    @classmethod
    def load(
        cls, path: str | Path = SHIPPED, *, library: str = "numpy", dtype: Literal["float32", "float64"] = "float32",
        device: Any = None,
    ) -> RecurrentMixer:  # fmt: skip
        """Read a safetensors file (float32, float64, float16 or bfloat16) whose metadata hold its config.

        path: by default the model that ships with the package. library: "numpy", "torch" or "cupy".
        Errors: `CheckpointError` for a file that cannot be read, is damaged, or does not fit its config.
        """
        tensors, metadata = read_safetensors(path)
        try:
            config = json.loads(metadata["config"])
            characters = json.loads(metadata["vocabulary"]) if "vocabulary" in metadata else None
        except KeyError:
            raise CheckpointError(f"{path}: its metadata have no 'config'; use from_state_dict with one") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: its metadata are no JSON: {error}") from None
        if not isinstance(config, dict) or not isinstance(characters, str | None):
            raise CheckpointError(f"{path}: its metadata need a JSON object 'config' and a string 'vocabulary'")
        vocabulary = None if characters is None else Vocabulary(characters)
        try:
            return cls.from_state_dict(
                tensors, config, library=library, dtype=dtype, device=device, vocabulary=vocabulary
            )
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Any], config: Mapping[str, Any] | MixerConfig, *, library: str = "numpy",
        dtype: Literal["float32", "float64"] = "float32", device: Any = None, vocabulary: Vocabulary | None = None,
    ) -> RecurrentMixer:  # fmt: skip
        """From the parameters under the original's names (arrays of any library) and its arguments.

        Errors: `CheckpointError` for a missing, superfluous or misshapen parameter.
        """
        c = config if isinstance(config, MixerConfig) else MixerConfig.from_mapping(config)
        if dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype: found {dtype!r}; required 'float32' or 'float64'")
        if library not in ("numpy", "torch", "cupy"):
            raise ConfigError(f"library: found {library!r}; required 'numpy', 'torch' or 'cupy'")
        if vocabulary is not None and len(vocabulary) != c.vocab_size:
            raise CheckpointError(f"the vocabulary has {len(vocabulary)} characters; vocab_size is {c.vocab_size}")
        p, e = Parameters(state_dict), c.hidden_dim
        embedding = p.take("input_layer.weight", c.vocab_size, e)
        blocks = []
        for i in range(c.num_blocks):
            at = f"mixer_blocks.{i}."
            mlp = at + "channel_mixing_layer."
            blocks.append(
                _Block(
                    _Norm(p.take(at + "channel_norm.weight", e), p.take(at + "channel_norm.bias", e)),
                    (p.take(mlp + "0.weight", 4 * e, e).T, p.take(mlp + "0.bias", 4 * e)),
                    (p.take(mlp + "2.weight", e, 4 * e).T, p.take(mlp + "2.bias", e)),
                    _Norm(p.take(at + "token_norm.weight", e), p.take(at + "token_norm.bias", e)),
                    mixing.build(p, at + "token_mixing_layer.", c),
                )
            )
        output = p.take("output_layer.weight", c.vocab_size, e).T
        p.finish()
        return cls(c, embedding, blocks, output, library, dtype, device, vocabulary)

    def _array(self, value: Array, dtype: str | None = None) -> Any:
        host = np.ascontiguousarray(value, dtype or self.dtype)
        return self._xp.asarray(host, device=self.device) if self.device is not None else self._xp.asarray(host)

    def _placed(self, value: Any) -> Any:
        """The parameters in `value` as arrays of the model's library."""
        if isinstance(value, np.ndarray):
            return self._array(value)
        if isinstance(value, tuple):
            return tuple(self._placed(v) for v in value)
        if isinstance(value, _Norm | _Block | mixing.TokenMixing):
            for f in fields(value):
                setattr(value, f.name, self._placed(getattr(value, f.name)))
        return value

    def _norm(self, x: Any, norm: _Norm) -> Any:
        xp = self._xp
        centred = x - xp.mean(x, axis=-1, keepdims=True)
        variance = xp.mean(centred * centred, axis=-1, keepdims=True)
        return centred / xp.sqrt(variance + 1e-5) * norm.weight + norm.bias

    def _channels(self, x: Any, block: _Block) -> Any:
        h = self._norm(x, block.channel_norm) @ block.up[0] + block.up[1]
        h = h * (0.5 * self._xp.tanh(0.5 * h) + 0.5)  # SiLU; this form of the sigmoid cannot overflow
        return x + (h @ block.down[0] + block.down[1])

    def _host_ids(self, ids: Any, rank: int) -> Array:
        """Checked ids as a NumPy array."""
        axes = "(B, T)" if rank == 2 else "(B,)"
        if library_of(ids) == "torch":
            ids = torch_to_numpy(ids.cpu())
        elif library_of(ids) == "cupy":
            ids = ids.get()
        try:
            host = np.asarray(ids)
        except ValueError:
            raise ContractError("RecurrentMixer", "ids", "rows of different lengths", f"integers {axes}") from None
        if host.size == 0 and host.dtype == np.float64:
            host = host.astype(np.int64)  # an empty list has no integers to show
        if host.ndim != rank or host.dtype.kind not in "iu":
            raise ContractError("RecurrentMixer", "ids", f"{host.dtype} {host.shape}", f"integers {axes}")
        if host.size and not (host.min() >= 0 and host.max() < self.config.vocab_size):
            bad = host.min() if host.min() < 0 else host.max()
            raise VocabularyError(f"the id {bad} is not in the vocabulary of {self.config.vocab_size}")
        return host.astype(np.int64)

    def _embed(self, ids: Array) -> Any:
        rows = self._xp.take(self._embedding, self._array(ids.ravel(), "int64"), axis=0)
        return self._xp.reshape(rows, (*ids.shape, self.config.hidden_dim))

    def _check_room(self, positions: Array, more: int) -> None:
        end = int(positions.max(initial=0)) + more
        if end > self.config.seq_len:
            raise SequenceLengthError(
                f"the model has {self.config.seq_len} positions and this needs {end}; start again with a shorter text"
            )

    def forward(self, ids: Any) -> Any:
        """Logits (B, T, V) of ids (B, T), in parallel over T.

        Errors: `SequenceLengthError` if T is past seq_len, `VocabularyError` for an id out of range.
        """
        return self.prefill(ids)[0]

    def prefill(self, ids: Any, lengths: Any = None, state: MixerState | None = None) -> tuple[Any, MixerState]:
        """Logits (B, T, V) of ids (B, T), in parallel over T, and the state to go on from.

        lengths: (B,) integers on the host, for sequences of different lengths padded to T; logits beyond a
        length mean nothing. state: where an earlier chunk left off; None: at the beginning.
        Errors: `SequenceLengthError`, `VocabularyError`, `ContractError`.
        """
        host = self._host_ids(ids, 2)
        batch, steps = host.shape
        positions = np.zeros(batch, np.int64) if state is None else self._state(state, batch).positions
        try:
            n = np.full(batch, steps) if lengths is None else np.asarray(lengths)
        except ValueError:
            n = np.empty(0)  # ragged: refused like any other wrong shape
        if n.shape != (batch,) or n.dtype.kind not in "iu" or (batch and not (n.min() >= 0 and n.max() <= steps)):
            raise ContractError("RecurrentMixer", "lengths", f"{lengths!r}", f"{batch} integers, 0 to {steps}")
        uniform = batch == 0 or bool((positions == positions[0]).all())
        self._check_room(positions, steps if uniform else 0)
        self._check_room(positions + n, 0)
        start = (int(positions[0]) if batch else 0) if uniform else self._array(positions, "int64")
        device_lengths = None if lengths is None else self._array(n, "int64")
        x, layers = self._embed(host), []
        for i, block in enumerate(self._blocks):
            x = self._channels(x, block)
            before = None if state is None else state.layers[i]
            y, after = block.tokens.mix(self._xp, self._norm(x, block.token_norm), before, start, device_lengths)
            x = x + y
            layers.append(after)
        return x @ self._output, MixerState(tuple(layers), positions + n)

    def step(self, ids: Any, state: MixerState) -> tuple[Any, MixerState]:
        """Logits (B, V) after one more token each, ids (B,), and the new state.

        Errors: `SequenceLengthError` if a sequence has used up its positions.
        """
        host = self._host_ids(ids, 1)
        positions = self._state(state, len(host)).positions
        self._check_room(positions, 1)
        uniform = len(host) == 0 or bool((positions == positions[0]).all())
        index = (int(positions[0]) if len(host) else 0) if uniform else self._array(positions, "int64")
        x, layers = self._embed(host), []
        for block, before in zip(self._blocks, state.layers, strict=True):
            x = self._channels(x, block)
            y, after = block.tokens.step(self._xp, self._norm(x, block.token_norm), before, index)
            x = x + y
            layers.append(after)
        return x @ self._output, MixerState(tuple(layers), positions + 1)

    def initial_state(self, batch: int) -> MixerState:
        """The state before the first token: zeros."""
        width = self.config.hidden_dim
        layers = tuple(self._array(np.zeros(block.tokens.state_shape(batch, width))) for block in self._blocks)
        return MixerState(layers, np.zeros(batch, np.int64))

    def explain(self, batch: int = 1) -> Decision:
        """Which backend a decode step runs on, and why."""
        mixing = self._blocks[0].tokens
        state = self.initial_state(batch).layers[0]
        weights = (mixing.weight, mixing.bias, mixing.decay, mixing.mode)
        return explain("recurrent_step", state, state, *weights, 0)

    def _state(self, state: MixerState, batch: int) -> MixerState:
        if len(state.positions) != batch:
            raise ContractError(
                "RecurrentMixer", "state", f"a batch of {len(state.positions)}", f"{batch}, as ids have"
            )
        return state

    def _rows(self, first: MixerState, second: MixerState, order: list[int]) -> MixerState:
        """Rows of two states, taken from both laid end to end."""
        xp, take = self._xp, self._array(np.array(order), "int64")
        layers = tuple(
            xp.take(xp.concat([a, b], axis=0), take, axis=0) for a, b in zip(first.layers, second.layers, strict=True)
        )
        return MixerState(layers, np.concatenate([first.positions, second.positions])[order])

    def _read(self, texts: Sequence[Sequence[int]]) -> tuple[Array, MixerState]:
        """The last logits (B, V), on the host, and the state after texts of different lengths."""
        lengths = [len(t) for t in texts]
        ids = np.zeros((len(texts), max(lengths)), np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[: len(text)] = text
        logits, state = self.prefill(ids, None if len(set(lengths)) == 1 else lengths)
        return _host(logits)[np.arange(len(texts)), np.array(lengths) - 1], state

    def stream(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, temperature: float = 1.0,
        top_k: int | None = None, seed: int = 0, sequences: Sequence[int] | None = None, restart: bool = False,
    ) -> Iterator[list[int]]:  # fmt: skip
        """Yield the next token of every prompt, max_new_tokens times. The arguments are those of `generate`."""
        temperature = check_temperature(temperature)
        top_k = None if top_k is None else check_integer("top_k", top_k, 1)
        seed = check_integer("seed", seed, 0, 2**64)
        max_new_tokens = check_integer("max_new_tokens", max_new_tokens, 0)
        texts = [self._host_ids(p, 1).tolist() for p in prompts]
        for i, text in enumerate(texts):
            if not text:
                raise ContractError("generate", "prompts", f"an empty prompt (number {i})", "at least one token each")
        given = range(len(texts)) if sequences is None else sequences
        names = [check_integer("sequences", s, 0, 2**64) for s in given]
        if len(names) != len(texts):
            raise ContractError("generate", "sequences", f"{len(names)} numbers", f"{len(texts)}, one a prompt")
        limit = self.config.seq_len
        longest = max((len(t) for t in texts), default=0)
        if not restart and max_new_tokens and longest + max_new_tokens - 1 > limit:
            raise SequenceLengthError(
                f"the model has {limit} positions; a prompt of {longest} tokens leaves room for "
                f"{max(0, limit - longest + 1)} new ones, not {max_new_tokens}"
            )
        return self._stream(texts, max_new_tokens, temperature, top_k, seed, names)

    def _stream(
        self, texts: list[list[int]], count: int, temperature: float, top_k: int | None, seed: int, names: list[int]
    ) -> Iterator[list[int]]:
        if not texts or count == 0:
            return
        limit, window = self.config.seq_len, max(1, self.config.seq_len // 2)
        logits, state = self._read([t if len(t) <= limit else t[-window:] for t in texts])
        for left in range(count - 1, -1, -1):
            chosen = sample(logits, temperature, top_k, seed, names, [len(t) for t in texts]).tolist()
            for text, token in zip(texts, chosen, strict=True):
                text.append(token)
            yield chosen
            if left == 0:
                return
            # A sequence that has used up its positions reads its last half window anew; the others go on.
            full = [i for i, used in enumerate(state.positions) if used == limit]
            going = [i for i in range(len(texts)) if i not in full]
            if not full:
                stepped, state = self.step(chosen, state)
                logits = _host(stepped)
                continue
            fresh_logits, fresh = self._read([texts[i][-window:] for i in full])
            logits = np.empty_like(logits)
            logits[full] = fresh_logits
            if going:
                kept = self._rows(state, fresh, going)
                stepped, kept = self.step([chosen[i] for i in going], kept)
                logits[going] = _host(stepped)
                order = [going.index(i) if i in going else len(going) + full.index(i) for i in range(len(texts))]
                state = self._rows(kept, fresh, order)
            else:
                state = fresh

    def generate(
        self, prompts: Sequence[Any], max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
        seed: int = 0, *, sequences: Sequence[int] | None = None, restart: bool = False,
    ) -> list[Any]:  # fmt: skip
        """Continue a batch of prompts, which may have different lengths.

        prompts: texts, if the model has a vocabulary, or sequences of ids; none empty.
        temperature: 0 takes the likeliest token. top_k: choose among the k likeliest only.
        seed, sequences: each draw is keyed by (seed, sequences[i], position); sequences defaults to 0, 1, 2 ...
            A prompt thus gets the same text alone, as `sequences=[i]`, as in row i of a batch.
        restart: at the last position, read the last half window anew instead of raising.

        Returns the new texts, or the new ids, without the prompts.
        Errors: `SequenceLengthError` if prompt and new tokens do not fit, `VocabularyError`, `ContractError`.
        """
        if isinstance(prompts, str):
            raise ContractError("generate", "prompts", f"the text {prompts[:20]!r}", "a sequence of texts")
        texts = [isinstance(p, str) for p in prompts]
        if any(texts) and self.vocabulary is None:
            raise VocabularyError("this model has no vocabulary; give prompts as ids")
        encoded = [self.vocabulary.encode(p) if isinstance(p, str) else p for p in prompts]  # type: ignore[union-attr]
        new: list[list[int]] = [[] for _ in prompts]
        stream = self.stream(
            encoded, max_new_tokens, temperature=temperature, top_k=top_k, seed=seed, sequences=sequences,
            restart=restart,
        )  # fmt: skip
        for tokens in stream:
            for row, token in zip(new, tokens, strict=True):
                row.append(token)
        return [
            self.vocabulary.decode(ids) if text and self.vocabulary is not None else ids
            for ids, text in zip(new, texts, strict=True)
        ]


def _host(logits: Any) -> Array:
    """Logits as a NumPy array."""
    library = library_of(logits)
    if library == "torch":
        logits = torch_to_numpy(logits.cpu())
    elif library == "cupy":
        logits = logits.get()
    result: Array = logits
    return result
