"""The structured recurrent mixer as a torch model: training in parallel, decoding in steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srm_core.errors import CheckpointError, ContractError, SequenceLengthError, VocabularyError
from srm_core.models.config import MixerConfig
from srm_core.models.sampling import check_integer, check_temperature
from srm_core.models.text import Vocabulary
from srm_core.nn import weights
from srm_core.nn.block import MixerBlock
from srm_core.nn.repeat import Packed
from srm_core.nn.shared_cache import CacheRows, SharedCache

__all__ = ["MixerBlock", "MixerState", "RecurrentMLPMixer"]

NAME = "RecurrentMLPMixer"


class MixerState(NamedTuple):
    """What a model remembers of a batch. A value: `step` and `prefill` return a new one.

    layers: a tensor (B, H', D) a block. position: how many positions the sequences have seen, an int if all the same,
    else (B,) int64 on the model's device. furthest: the most that one has seen, known on the host.
    """

    layers: tuple[Tensor, ...]
    position: int | Tensor
    furthest: int


class RecurrentMLPMixer(nn.Module):
    """A language model of blocks of an MLP over channels and a linear recurrence over time.

    vocab_size V, hidden_dim E, seq_len L (positions the model knows), num_blocks. heads None: one row mixer over all
    channels, or with kernel > 1 that many col mixers on shifted channels. With heads H, each of E/H channels: col
    mixers; with mixed_heads half col, half row; with combined_heads a row and a col mixer each; with parallel_heads
    half col, half row, with one decay for all. decay: learnable, clipped to [0.9, 1]. use_projections: linear maps
    before and after the heads. use_shared_cache: decoding keeps every state in shared memory (`SharedCache`).
    dropout: on what a block adds, in training.

    State dicts have the original implementation's names. Errors: `CheckpointError` for arguments that fit no model.

    >>> import torch
    >>> model = RecurrentMLPMixer(50, 16, 32, 2, heads=4, mixed_heads=True, decay=True)
    >>> logits = model(torch.zeros(3, 10, dtype=torch.long))
    >>> logits.shape
    torch.Size([3, 10, 50])
    """

    def __init__(
        self, vocab_size: int, hidden_dim: int, seq_len: int, num_blocks: int, heads: int | None = None,
        kernel: int = 1, mixed_heads: bool = False, combined_heads: bool = False, decay: bool = False,
        parallel_heads: bool = False, use_projections: bool = True, use_shared_cache: bool = False, *,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        variant = {
            "mixed_heads": mixed_heads, "combined_heads": combined_heads, "parallel_heads": parallel_heads,
            "decay": decay, "use_projections": use_projections,
        }  # fmt: skip
        self.config = MixerConfig(vocab_size, hidden_dim, seq_len, num_blocks, heads, kernel, **variant)
        self.use_shared_cache, self.vocabulary = use_shared_cache, None
        self.input_layer = nn.Embedding(vocab_size, hidden_dim)
        nn.init.normal_(self.input_layer.weight, std=0.5)
        self.mixer_blocks: Any = nn.ModuleList(
            MixerBlock(hidden_dim, seq_len, heads, kernel, dropout=dropout, **variant) for _ in range(num_blocks)
        )
        self.output_layer = nn.Linear(hidden_dim, vocab_size, bias=False)

    vocabulary: Vocabulary | None

    @classmethod
    def from_config(
        cls, config: MixerConfig | Mapping[str, Any], *, use_shared_cache: bool | None = None,
        dropout: float | None = None,
    ) -> RecurrentMLPMixer:  # fmt: skip
        """A fresh model from a `MixerConfig` or the original's arguments, which may hold the keywords, too."""
        given = {} if isinstance(config, MixerConfig) else config
        c = config if isinstance(config, MixerConfig) else MixerConfig.from_mapping(config)
        if use_shared_cache is None:
            use_shared_cache = bool(given.get("use_shared_cache", False))
        return cls(
            **vars(c), use_shared_cache=use_shared_cache,
            dropout=float(given.get("dropout", 0.0)) if dropout is None else dropout,
        )  # fmt: skip

    @classmethod
    def load(
        cls, path: str | Path, *, dtype: torch.dtype = torch.float32, device: Any = None,
        use_shared_cache: bool = False, dropout: float = 0.0,
    ) -> RecurrentMLPMixer:  # fmt: skip
        """A model from a safetensors file with its config. Errors: `CheckpointError`."""
        state_dict, config, vocabulary = weights.read(path)
        model = cls.from_config(config, use_shared_cache=use_shared_cache, dropout=dropout).to(device, dtype)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None
        model.vocabulary = vocabulary
        return model

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `load` and `srm_core.models.RecurrentMixer.load` read, whole or not at all."""
        weights.write(path, self.state_dict(), self.config, self.vocabulary)

    def count_params(self) -> int:
        """How many numbers the model's parameters hold."""
        return sum(p.numel() for p in self.parameters())

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        """Logits (B, T, V) of ids (B, T), T <= seq_len, in parallel over T.

        With labels (B, T), (loss, logits): the mean cross-entropy of labels[:, 1:] under logits[:, :-1], so that ids
        can be given as labels; a label of -100 does not count.
        Errors: `SequenceLengthError` if T is past seq_len, `VocabularyError` for an id out of range in host memory,
        `ContractError` for ids of another shape or dtype.
        """
        x = self._embed(ids, 2)
        self._check_room(ids.shape[1])
        for block in self.mixer_blocks:
            x = block(x)
        logits = self.output_layer(x)
        if labels is None:
            return logits
        if labels.shape != ids.shape:
            raise ContractError(NAME, "labels", f"shape {tuple(labels.shape)}", f"{tuple(ids.shape)}, as ids have")
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return loss, logits

    def pack(self) -> tuple[Packed, ...]:
        """The parameters of each block's token mixing as the operators take them.

        `step` and `prefill` gather them anew on each call; given as `packed`, they are used as they are.
        """
        return tuple(block.token_mixing_layer.pack() for block in self.mixer_blocks)

    def prefill(
        self, ids: Tensor, lengths: Any = None, state: MixerState | CacheRows | None = None, *,
        packed: tuple[Packed, ...] | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """Logits (B, T, V) of ids (B, T), in parallel over T, and the state to go on from.

        lengths: (B,) integers, for sequences of different lengths padded to T; logits beyond a length mean nothing.
        state: where an earlier chunk left off; None: at the beginning, as `initial_state` has it. `CacheRows` are
        updated in place and returned.
        Errors: `SequenceLengthError`, `VocabularyError`, `ContractError`.
        """
        x, after = self._read(ids, lengths, state, packed or self.pack())
        return self.output_layer(x), after

    def step(
        self, ids: Tensor, state: MixerState | CacheRows, *, packed: tuple[Packed, ...] | None = None
    ) -> tuple[Tensor, Any]:
        """Logits (B, V) after one more token each, ids (B,), and the new state; `CacheRows` are updated in place.

        Errors: `SequenceLengthError` if a sequence has used up its positions.
        """
        x, layers, packed = self._embed(ids, 1), [], packed or self.pack()
        if isinstance(state, CacheRows):
            return self._step_rows(x, state, packed)
        self._check_batch(ids, state)
        self._check_room(state.furthest + 1)
        for block, before, p in zip(self.mixer_blocks, state.layers, packed, strict=True):
            x, after = block.step(x, before, state.position, p)
            layers.append(after)
        return self.output_layer(x), MixerState(tuple(layers), state.position + 1, state.furthest + 1)

    def _step_rows(self, x: Tensor, rows: CacheRows, packed: tuple[Packed, ...]) -> tuple[Tensor, CacheRows]:
        index, furthest = self._rows_at(rows, len(x))
        self._check_room(furthest + 1)
        with torch.no_grad():
            for block, layer, p in zip(self.mixer_blocks, rows.cache.layers, packed, strict=True):
                x = block.step_(x, layer, index, rows.slots, p)
            rows.cache.positions[rows.slots] += 1
            return self.output_layer(x), rows

    def _read(
        self, ids: Tensor, lengths: Any, state: MixerState | CacheRows | None, packed: tuple[Packed, ...]
    ) -> tuple[Tensor, Any]:
        """What the last block gives, (B, T, E), and the state."""
        x = self._embed(ids, 2)
        batch, steps = ids.shape
        if state is None:
            state = self.initial_state(batch)
        device_lengths, most = self._lengths(lengths, batch, steps)
        start: int | Tensor
        before: tuple[Tensor, ...]
        if isinstance(state, CacheRows):
            start, furthest = self._rows_at(state, batch)
            before = tuple(layer[state.slots] for layer in state.cache.layers)
        else:
            self._check_batch(ids, state)
            start, furthest, before = state.position, state.furthest, state.layers
        # The operator wants room for all T after a common start, and only for the lengths after different ones.
        self._check_room(furthest + (steps if isinstance(start, int) else most))
        layers = []
        with torch.set_grad_enabled(torch.is_grad_enabled() and not isinstance(state, CacheRows)):
            for block, s, p in zip(self.mixer_blocks, before, packed, strict=True):
                x, after = block.mix(x, s, start=start, lengths=device_lengths, packed=p)
                layers.append(after)
            seen = steps if device_lengths is None else device_lengths
            if not isinstance(state, CacheRows):
                return x, MixerState(tuple(layers), start + seen, furthest + most)
            for layer, after in zip(state.cache.layers, layers, strict=True):
                layer[state.slots] = after.to(layer.dtype)
            state.cache.positions[state.slots] += seen
        return x, state

    def initial_state(self, batch: int) -> MixerState | CacheRows:
        """The state before the first token: zeros. With use_shared_cache, rows of a cache that goes with them."""
        if self.use_shared_cache:
            return self.shared_cache(batch).rows()
        device, dtype = self.output_layer.weight.device, self._state_dtype()
        width = self.config.hidden_dim
        shapes = [block.token_mixing_layer.state_shape(batch, width) for block in self.mixer_blocks]
        return MixerState(tuple(torch.zeros(s, device=device, dtype=dtype) for s in shapes), 0, 0)

    def shared_cache(self, slots: int, *, name: str | None = None, lock: bool = False) -> SharedCache:
        """Room for the states of `slots` sequences in shared memory, for `prefill` and `step` on its rows.

            with model.shared_cache(8) as cache:
                logits, rows = model.prefill(ids, state=cache.rows([0, 3]))

        Errors: `ContractError` if the model is not in host memory.
        """
        width = self.config.hidden_dim
        shapes = [block.token_mixing_layer.state_shape(slots, width) for block in self.mixer_blocks]
        self._check_host()
        return SharedCache(shapes, self._state_dtype(), name=name, lock=lock)

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        lengths: Any = None, generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Continue prompts (B, T), T >= 1: the new tokens (B, max_new_tokens), int64. Dropout is off meanwhile.

        temperature: 0 takes the likeliest token. top_k: choose among the k likeliest only. lengths: (B,) integers,
        1 to T, for prompts of different lengths.
        Errors: `SequenceLengthError` if prompt and new tokens do not fit, `VocabularyError`, `ContractError`.
        """
        temperature = check_temperature(temperature)
        count = check_integer("max_new_tokens", max_new_tokens, 0)
        k = None if top_k is None else min(check_integer("top_k", top_k, 1), self.config.vocab_size)
        self._check_ids(ids, 2)
        if ids.shape[1] == 0:
            raise ContractError(NAME, "ids", "empty prompts", "at least one token each")
        last, most = self._lengths(lengths, *ids.shape)
        if last is not None and last.device.type == "cpu" and (last < 1).any():
            raise ContractError(
                NAME, "lengths", f"{last.tolist()}"[:60], f"at least 1 each, and at most {ids.shape[1]}"
            )
        self._check_room(most + max(0, count - 1))
        training, new = self.training, []
        self.eval()
        packed = self.pack()
        cache = self.shared_cache(len(ids)) if self.use_shared_cache else None
        try:
            x, state = self._read(ids, lengths, None if cache is None else cache.rows(), packed)
            at = (last.to(x.device) if last is not None else torch.full((len(ids),), most, device=x.device)) - 1
            logits = self.output_layer(x[torch.arange(len(ids), device=x.device), at])
            for left in range(count - 1, -1, -1):
                new.append(_choose(logits, temperature, k, generator))
                if left:
                    logits, state = self.step(new[-1], state, packed=packed)
        finally:
            self.train(training)
            if cache is not None:
                cache.close()
        return torch.stack(new, 1) if new else ids.new_empty((len(ids), 0), dtype=torch.int64)

    def _embed(self, ids: Tensor, rank: int) -> Tensor:
        self._check_ids(ids, rank)
        if torch.compiler.is_compiling():
            return self.input_layer(ids)
        try:
            return self.input_layer(ids)
        except IndexError:
            low, high = (int(i) for i in ids.aminmax())
            last = self.config.vocab_size - 1
            raise VocabularyError(f"ids: found {low} to {high}; the model has the ids 0 to {last}") from None

    def _check_ids(self, ids: Tensor, rank: int) -> None:
        if not isinstance(ids, Tensor) or ids.ndim != rank or ids.dtype not in (torch.int64, torch.int32):
            found = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            axes = "(B, T)" if rank == 2 else "(B,)"
            raise ContractError(NAME, "ids", found, f"int64 or int32 tokens of shape {axes}")

    def _check_batch(self, ids: Tensor, state: MixerState) -> None:
        batch = len(state.layers[0])
        if batch != len(ids):
            raise ContractError(NAME, "state", f"a batch of {batch}", f"{len(ids)}, as ids have")

    def _check_room(self, end: int) -> None:
        if end > self.config.seq_len:
            raise SequenceLengthError(
                f"the model has {self.config.seq_len} positions and this needs {end}; start again with a shorter text"
            )

    def _check_host(self) -> None:
        device = self.output_layer.weight.device
        if device.type != "cpu":
            raise ContractError(
                NAME, "use_shared_cache", f"a model on {device}", "one in host memory, where the cache is",
                "use the states that prefill returns, or model.cpu()",
            )  # fmt: skip

    def _state_dtype(self) -> torch.dtype:
        return torch.float64 if self.output_layer.weight.dtype == torch.float64 else torch.float32

    def _lengths(self, lengths: Any, batch: int, steps: int) -> tuple[Tensor | None, int]:
        """On the device, and the largest that the host knows of: of lengths on a device it knows T only."""
        if lengths is None:
            return None, steps
        on_device = torch.as_tensor(lengths, device=self.output_layer.weight.device)
        if on_device.shape != (batch,) or on_device.dtype.is_floating_point or on_device.dtype == torch.bool:
            raise ContractError(NAME, "lengths", f"{lengths!r}"[:60], f"{batch} integers, 0 to {steps}")
        host = not isinstance(lengths, Tensor) or lengths.device.type == "cpu"
        return on_device.long(), int(max(lengths, default=0)) if host else steps

    def _rows_at(self, rows: CacheRows, batch: int) -> tuple[int | Tensor, int]:
        """The positions of rows, an int if they are all the same, and the furthest."""
        self._check_host()
        shapes = [tuple(layer.shape[1:]) for layer in rows.cache.layers]
        width = self.config.hidden_dim
        mine = [block.token_mixing_layer.state_shape(1, width)[1:] for block in self.mixer_blocks]
        if shapes != mine or rows.cache.layers[0].dtype != self._state_dtype():
            raise ContractError(NAME, "state", "rows of another model's cache", "a cache made by model.shared_cache")
        if len(rows.slots) != batch:
            raise ContractError(NAME, "state", f"{len(rows.slots)} rows", f"{batch}, as many as ids have")
        positions = rows.positions
        if batch == 0:
            return 0, 0
        low, high = (int(p) for p in positions.aminmax())
        return (low if low == high else positions), high


def _choose(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """A token (B,) of each row of logits (B, V)."""
    if temperature == 0 or not len(logits):
        return logits.argmax(-1)
    scaled = (logits.double() - logits.double().amax(-1, keepdim=True)) / temperature
    if top_k is not None:
        smallest = scaled.topk(top_k).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, -torch.inf)
    return torch.multinomial(scaled.softmax(-1), 1, generator=generator)[:, 0]
