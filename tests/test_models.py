"""The recurrent mixer: the oracles in all three forms, texts, sampling, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from srm_core import CheckpointError, ConfigError, ContractError, SequenceLengthError, VocabularyError, use_backend
from srm_core.models import MixerConfig, RecurrentMixer, Vocabulary
from srm_core.models.mixer import SHIPPED
from srm_core.models.sampling import sample, uniform

ORACLES = sorted((Path(__file__).parent / "oracle").glob("srm_*.safetensors"))


def read_oracle(path: Path):
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    state_dict = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    return state_dict, config, tensors["input_ids"], tensors["positions"], tensors["logits_f64"]


def in_steps(model: RecurrentMixer, ids):
    state, logits = model.initial_state(len(ids)), []
    for t in range(ids.shape[1]):
        step, state = model.step(ids[:, t], state)
        logits.append(step)
    return np.stack(logits, 1)


def in_chunks(model: RecurrentMixer, ids, cuts=(100, 101, 357)):
    state, logits = None, []
    for part in np.split(ids, cuts, axis=1):
        chunk, state = model.prefill(part, state=state)
        logits.append(chunk)
    return np.concatenate(logits, 1)


def error(got, expected):
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


def test_there_are_oracles_of_every_variant():
    assert len(ORACLES) == 9


@pytest.mark.parametrize(("dtype", "allowed"), [("float64", 1e-9), ("float32", 1e-3)])
@pytest.mark.parametrize("path", ORACLES, ids=lambda p: p.stem)
def test_oracle_in_three_forms(path, dtype, allowed):
    state_dict, config, ids, positions, expected = read_oracle(path)
    model = RecurrentMixer.from_state_dict(state_dict, config, dtype=dtype)
    for form in (RecurrentMixer.forward, in_steps, in_chunks):
        assert error(form(model, ids)[:, positions], expected) <= allowed, form.__name__


@pytest.mark.parametrize("path", ORACLES, ids=lambda p: p.stem)
def test_forms_agree_everywhere(path):
    """Not only where the oracle looked."""
    state_dict, config, ids, _, _ = read_oracle(path)
    model = RecurrentMixer.from_state_dict(state_dict, config, dtype="float64")
    whole = model.forward(ids)
    assert error(in_steps(model, ids), whole) < 1e-12
    assert error(in_chunks(model, ids), whole) < 1e-12


@pytest.mark.parametrize("path", ORACLES, ids=lambda p: p.stem)
def test_different_lengths_in_one_batch(path):
    """Each sequence of a padded batch goes on as it would alone."""
    state_dict, config, ids, _, _ = read_oracle(path)
    model = RecurrentMixer.from_state_dict(state_dict, config, dtype="float64")
    batch, lengths = np.concatenate([ids, ids[:1]])[:, :40], np.array([40, 7, 0])
    logits, state = model.prefill(batch, lengths)
    more, _ = model.prefill(batch[:, :5], state=state)
    stepped, _ = model.step(batch[:, 0], state)
    for i, n in enumerate(lengths):
        alone = model.forward(np.concatenate([batch[i : i + 1, :n], batch[i : i + 1, :5]], axis=1))
        np.testing.assert_allclose(logits[i, :n], alone[0, :n], atol=1e-12)
        np.testing.assert_allclose(more[i], alone[0, n:], atol=1e-12)
        np.testing.assert_allclose(stepped[i], alone[0, n], atol=1e-12)


@pytest.mark.parametrize("decay", [False, True])
def test_long_model_forgets_more_slowly(decay):
    """seq_len 1024: the decay's exponent is 1/2, for kernels 1/4."""
    assert MixerConfig(8, 8, 1024, 1, heads=2, decay=decay).decay_constant == 2
    assert MixerConfig(8, 8, 1024, 1, kernel=3, decay=decay).decay_constant == 4
    assert MixerConfig(8, 8, 100, 1, kernel=3, decay=decay).decay_constant == 1


def test_states_are_values():
    """A step leaves the state that it began with as it was."""
    model = RecurrentMixer.load()
    _, state = model.prefill([[1, 2, 3]])
    before = [layer.copy() for layer in state.layers]
    first, _ = model.step([4], state)
    again, _ = model.step([4], state)
    np.testing.assert_array_equal(first, again)
    for layer, was in zip(state.layers, before, strict=True):
        np.testing.assert_array_equal(layer, was)


def test_empty_batch_and_text():
    model = RecurrentMixer.load()
    assert model.forward(np.zeros((0, 3), int)).shape == (0, 3, 66)
    assert model.forward(np.zeros((2, 0), int)).shape == (2, 0, 66)
    assert model.generate([], 3) == []
    assert model.generate(["A"], 0) == [""]


class TestGenerate:
    model = RecurrentMixer.load()
    prompts = ("ROMEO.", "O, what a", "First Witch.\nWhen shall we three meet again")

    def test_text_does_not_depend_on_the_batch(self):
        together = self.model.generate(self.prompts, 60, seed=5)
        alone = [self.model.generate([p], 60, seed=5, sequences=[i])[0] for i, p in enumerate(self.prompts)]
        assert together == alone
        assert len(set(together)) == 3

    def test_text_does_not_depend_on_the_backend(self):
        expected = self.model.generate(self.prompts, 25, seed=5)
        with use_backend("reference"):
            assert self.model.generate(self.prompts, 25, seed=5) == expected

    def test_same_prompt_gets_different_texts(self):
        assert len(set(self.model.generate(["The "] * 4, 30, seed=1))) == 4

    def test_seed_chooses_the_text(self):
        assert self.model.generate(["The "], 30, seed=1) == self.model.generate(["The "], 30, seed=1)
        assert self.model.generate(["The "], 30, seed=1) != self.model.generate(["The "], 30, seed=2)

    def test_temperature_zero_is_greedy(self):
        text = self.model.generate(["The king"], 20, temperature=0)[0]
        ids = np.array([self.model.vocabulary.encode("The king" + text)])
        best = self.model.forward(ids)[0].argmax(-1)
        assert best[7:-1].tolist() == ids[0, 8:].tolist()
        assert text == self.model.generate(["The king"], 20, top_k=1, seed=9)[0]

    def test_it_writes_english(self):
        """More than a quarter of its words are among the commonest of the language."""
        text = self.model.generate(["\n"], 500, temperature=0.5, seed=0)[0]
        words = [w.strip(".,;:!?'[]-").lower() for w in text.split()]
        common = {
            *("the", "and", "of", "to", "i", "you", "my", "a", "that", "in", "is", "not", "me", "it", "with", "be"),
            *("his", "your", "for", "this", "he", "but", "have", "thou", "as", "him", "so", "will", "what", "by"),
            *("thy", "all", "are", "her", "no", "do", "shall", "if", "we", "on", "or", "our", "from", "at", "they"),
        }
        assert sum(w in common for w in words) > len(words) / 4

    def test_past_the_end_is_an_error(self):
        limit = self.model.config.seq_len
        assert len(self.model.generate(["A" * (limit - 3)], 4)[0]) == 4
        with pytest.raises(SequenceLengthError, match="leaves room for 4 new ones, not 5"):
            self.model.generate(["A" * (limit - 3)], 5)
        with pytest.raises(SequenceLengthError, match="512 positions and this needs 513"):
            self.model.forward(np.zeros((1, limit + 1), int))
        _, state = self.model.prefill(np.zeros((1, limit), int))
        with pytest.raises(SequenceLengthError):
            self.model.step([0], state)

    def test_restart_goes_on_from_the_last_half_window(self):
        limit = self.model.config.seq_len
        prompt = ("To be, or not to be, that is the question. " * 20)[: limit - 2]
        text = self.model.generate([prompt], 12, temperature=0, restart=True)[0]
        window = (prompt + text[:3])[-limit // 2 :]  # three characters fit before the window is full
        assert text[3:] == self.model.generate([window], 9, temperature=0)[0]

    def test_restart_does_not_depend_on_the_batch(self):
        limit = self.model.config.seq_len
        prompts = ["A" * (limit - 5), "The quality of mercy", "B" * (limit - 9), "C" * (limit + 40)]
        together = self.model.generate(prompts, 30, seed=2, restart=True)
        for i, prompt in enumerate(prompts):
            assert together[i] == self.model.generate([prompt], 30, seed=2, sequences=[i], restart=True)[0]

    @pytest.mark.parametrize(
        ("change", "found"),
        [
            ({"temperature": -1}, "temperature: found -1"),
            ({"temperature": float("nan")}, "temperature: found nan"),
            ({"top_k": 0}, "top_k: found 0"),
            ({"seed": -1}, "seed: found -1"),
            ({"max_new_tokens": -1}, "max_new_tokens: found -1"),
            ({"sequences": [1, 2]}, "sequences"),
            ({"sequences": [2**64]}, "sequences"),
            ({"sequences": [0.5]}, "sequences"),
            ({"temperature": 10**400}, "temperature"),
            ({"temperature": True}, "temperature"),
            ({"max_new_tokens": True}, "max_new_tokens"),
            ({"prompts": "abc"}, "the text 'abc'"),
            ({"prompts": [""]}, "an empty prompt"),
        ],
    )
    def test_wrong_options(self, change, found):
        with pytest.raises(ContractError, match=found):
            self.model.generate(**{"prompts": ["A"], "max_new_tokens": 3, **change})

    def test_unknown_character(self):
        with pytest.raises(VocabularyError, match=r"'é' \(line 2\) is not in the vocabulary"):
            self.model.generate(["The\ncafé"], 3)

    def test_unknown_id(self):
        with pytest.raises(VocabularyError, match="the id 66"):
            self.model.forward([[66]])
        with pytest.raises(VocabularyError, match="the id -1"):
            self.model.forward([[-1]])

    @pytest.mark.parametrize("ids", [[1, 2], [[1.5]], [[1], [2, 3]], "abc", None])
    def test_ids_of_another_form(self, ids):
        with pytest.raises(ContractError, match="ids"):
            self.model.forward(ids)

    def test_numpy_integers_are_integers(self):
        options = {"seed": np.int64(3), "top_k": np.int64(5), "temperature": np.float32(0.5)}
        assert self.model.generate(["A"], np.int64(4), **options) == self.model.generate(["A"], 4, 0.5, 5, 3)

    @pytest.mark.parametrize("lengths", [[1, [2]], [1], [1, 4], [-1, 0], [1.0, 2.0]])
    def test_wrong_lengths(self, lengths):
        with pytest.raises(ContractError, match="lengths"):
            self.model.prefill([[1, 2, 3], [1, 2, 3]], lengths)

    def test_state_of_another_batch(self):
        with pytest.raises(ContractError, match="a batch of 2"):
            self.model.step([1], self.model.initial_state(2))


def test_draws_are_uniform_and_keyed():
    draws = np.array([uniform(s, q, p) for s in range(3) for q in range(20) for p in range(50)])
    assert len(set(draws)) == len(draws)
    assert ((draws >= 0) & (draws < 1)).all()
    counts, _ = np.histogram(draws, 10, (0, 1))
    assert ((counts - 300) ** 2 / 300).sum() < 30  # chi-squared with 9 degrees of freedom: p < 0.0005
    assert uniform(1, 2, 3) == uniform(1, 2, 3) != uniform(1, 3, 2)


def test_large_seeds_differ():
    """Every bit of a seed and of a sequence counts, also past the range of int64."""
    seeds = [2**63 - 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1]
    assert len({uniform(s, 0, 5) for s in seeds} | {uniform(0, s, 5) for s in seeds}) == 10


def test_sampling_follows_the_distribution():
    logits = np.log(np.array([[0.5, 0.3, 0.2]])).repeat(3000, 0)
    drawn = sample(logits, 1.0, None, 0, [0] * 3000, range(3000))
    np.testing.assert_allclose(np.bincount(drawn) / 3000, [0.5, 0.3, 0.2], atol=0.03)
    assert set(sample(logits, 1.0, 2, 0, [0] * 3000, range(3000))) == {0, 1}


def test_ties_go_to_the_lower_id():
    assert sample(np.zeros((1, 4)), 0, None, 0, [0], [0]).tolist() == [0]
    assert sample(np.zeros((1, 4)), 1.0, 1, 0, [0], [0]).tolist() == [0]


class TestFiles:
    @pytest.fixture
    def saved(self, tmp_path):
        """A small model in a file, with what it was made from."""
        state_dict, config, ids, _, _ = read_oracle(ORACLES[-1])
        path = tmp_path / "model.safetensors"

        def save(state=state_dict, metadata=None):
            save_file(state, path, metadata={"config": json.dumps(config)} if metadata is None else metadata)
            return path

        return save, state_dict, config, ids

    @pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
    def test_every_dtype(self, saved, dtype):
        save, state_dict, config, ids = saved
        stored = {k: v.astype(dtype) for k, v in state_dict.items()}
        expected = RecurrentMixer.from_state_dict(stored, config, dtype="float64").forward(ids)
        np.testing.assert_array_equal(RecurrentMixer.load(save(stored), dtype="float64").forward(ids), expected)

    def test_shipped_model(self):
        assert SHIPPED.stat().st_size <= 4_000_000
        model = RecurrentMixer.load()
        assert isinstance(model.vocabulary, Vocabulary)
        assert model.config.vocab_size == len(model.vocabulary) == 66

    @pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, -1])
    def test_truncated(self, saved, keep):
        path = saved[0]()
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(CheckpointError, match="is no whole safetensors file"):
            RecurrentMixer.load(path)

    @pytest.mark.parametrize("junk", [b"hello, this is no model file", b"\xff" * 64, b"PK\x03\x04" * 20])
    def test_junk(self, tmp_path, junk):
        path = tmp_path / "junk"
        path.write_bytes(junk)
        with pytest.raises(CheckpointError, match="is no whole safetensors file"):
            RecurrentMixer.load(path)

    def test_missing_and_unreadable(self, tmp_path):
        with pytest.raises(CheckpointError, match="No such file"):
            RecurrentMixer.load(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="cannot be read"):
            RecurrentMixer.load(tmp_path)

    def test_metadata(self, saved):
        with pytest.raises(CheckpointError, match="have no 'config'"):
            RecurrentMixer.load(saved[0](metadata={}))
        with pytest.raises(CheckpointError, match="are no JSON"):
            RecurrentMixer.load(saved[0](metadata={"config": "{"}))
        for metadata in ({"config": "[1]"}, {"config": "{}", "vocabulary": "7"}):
            with pytest.raises(CheckpointError, match="need a JSON object 'config' and a string 'vocabulary'"):
                RecurrentMixer.load(saved[0](metadata=metadata))

    def test_missing_key(self, saved):
        save, state_dict, _, _ = saved
        del state_dict["mixer_blocks.1.token_norm.bias"]
        with pytest.raises(CheckpointError, match=r"has no 'mixer_blocks\.1\.token_norm\.bias'"):
            RecurrentMixer.load(save(state_dict))

    def test_superfluous_key(self, saved):
        save, state_dict, _, _ = saved
        state_dict["another.weight"] = np.ones(3, np.float32)
        with pytest.raises(CheckpointError, match=r"1 parameters that the config does not: another\.weight"):
            RecurrentMixer.load(save(state_dict))

    def test_wrong_shape_and_values(self, saved):
        save, state_dict, _, _ = saved
        good = state_dict["output_layer.weight"]
        state_dict["output_layer.weight"] = good[:-1].copy()
        with pytest.raises(CheckpointError, match=r"output_layer\.weight: found shape \(60, 32\); required \(61, 32\)"):
            RecurrentMixer.load(save(state_dict))
        state_dict["output_layer.weight"] = good * np.nan
        with pytest.raises(CheckpointError, match="NaN"):
            RecurrentMixer.load(save(state_dict))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_dim": 0}, "hidden_dim: found 0"),
            ({"heads": 3}, "required a divisor of hidden_dim 32"),
            ({"heads": 4, "mixed_heads": True, "combined_heads": True}, "at most one of"),
            ({"mixed_heads": True}, "heads: found None"),
            ({"head": 4}, "unknown head; known: "),
            ({"num_blocks": "2"}, "num_blocks: found '2'"),
        ],
    )
    def test_wrong_config(self, saved, change, message):
        _, state_dict, config, _ = saved
        with pytest.raises(CheckpointError, match=message):
            RecurrentMixer.from_state_dict(state_dict, {**config, **change})
        with pytest.raises(CheckpointError, match="seq_len missing"):
            RecurrentMixer.from_state_dict(state_dict, {k: v for k, v in config.items() if k != "seq_len"})

    def test_wrong_library_and_dtype(self, saved):
        _, state_dict, config, _ = saved
        with pytest.raises(ConfigError, match="library: found 'jax'"):
            RecurrentMixer.from_state_dict(state_dict, config, library="jax")
        with pytest.raises(ConfigError, match="dtype: found 'int8'"):
            RecurrentMixer.from_state_dict(state_dict, config, dtype="int8")

    @pytest.mark.parametrize("dtype", ["complex64", "U3", "bool"])
    def test_numbers_that_are_not_real(self, saved, dtype):
        _, state_dict, config, _ = saved
        state_dict["output_layer.weight"] = state_dict["output_layer.weight"].astype(dtype)
        with pytest.raises(CheckpointError, match="required real numbers"):
            RecurrentMixer.from_state_dict(state_dict, config)

    def test_device_that_is_not_there(self):
        with pytest.raises(ConfigError, match="device='cuda'"):
            RecurrentMixer.load(device="cuda")

    def test_torch_state_dict(self, saved):
        torch = pytest.importorskip("torch")
        _, state_dict, config, ids = saved
        tensors = {k: torch.from_numpy(v.copy()) for k, v in state_dict.items()}
        np.testing.assert_array_equal(
            RecurrentMixer.from_state_dict(tensors, config).forward(ids),
            RecurrentMixer.from_state_dict(state_dict, config).forward(ids),
        )


@pytest.mark.parametrize("path", ORACLES, ids=lambda p: p.stem)
def test_every_variant_on_torch(path):
    """CPU tensors, whose recurrences the numpy backend computes on views."""
    torch = pytest.importorskip("torch")
    state_dict, config, ids, positions, expected = read_oracle(path)
    model = RecurrentMixer.from_state_dict(state_dict, config, library="torch", dtype="float64")
    with torch.no_grad():
        logits = model.forward(torch.from_numpy(ids))
        chunks = [model.prefill(ids[:, :9])]
        chunks.append(model.prefill(ids[:, 9:30], state=chunks[0][1]))
    assert isinstance(logits, torch.Tensor)
    assert error(logits[:, positions].numpy(), expected) < 1e-9
    assert error(torch.cat([c[0] for c in chunks], 1).numpy(), logits[:, :30].numpy()) < 1e-12
