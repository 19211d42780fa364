"""The recurrent mixer as torch modules: the oracles, gradients, the three forms, training, files, errors."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402

import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from srm_core import CheckpointError, ContractError, SequenceLengthError, VocabularyError, use_backend
from srm_core.models import MixerConfig, RecurrentMixer, Vocabulary
from srm_core.models.mixer import SHIPPED
from srm_core.nn import (
    ColRepeatCausalLinear,
    CombinedRepeatCausalLinear,
    HeadedRepeatCausalLinear,
    KernelRepeatLinear,
    MixedRepeatHeads,
    MixerBlock,
    ParallelRepeatHeads,
    RecurrentMLPMixer,
    RepeatHeads,
    RowRepeatCausalLinear,
)
from srm_core.nn.repeat import effective_decay

ORACLES = sorted((Path(__file__).parent / "oracle").glob("srm_*.safetensors"))
VARIANTS = {
    "row": {},
    "row-decay": {"decay": True},
    "kernel": {"kernel": 3, "decay": True},
    "heads": {"heads": 4},
    "mixed": {"heads": 4, "mixed_heads": True, "decay": True},
    "mixed-odd": {"heads": 3, "mixed_heads": True, "decay": True, "use_projections": False},
    "combined": {"heads": 2, "combined_heads": True, "decay": True},
    "parallel": {"heads": 4, "parallel_heads": True, "decay": True},
    "parallel-plain": {"heads": 4, "parallel_heads": True, "use_projections": False},
}
# Dynamo's own: it makes an instance of each autograd.Function that it traces.
compiles = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:.*torch.jit.script.*:DeprecationWarning"
)
every_variant = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
every_oracle = pytest.mark.parametrize("path", ORACLES, ids=lambda p: p.stem)


def small(seed: int = 0, **variant) -> RecurrentMLPMixer:
    """In float64, with nothing where initialisation leaves it."""
    torch.manual_seed(seed)
    model = RecurrentMLPMixer(13, 12, 24, 2, **variant).double()
    scatter(model)
    return model


def scatter(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("decay_value"):
                parameter.uniform_(0.91, 0.99)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))


def random_ids(*shape: int, seed: int = 0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 13, shape))


def read_oracle(path: Path):
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["config"])
    tensors = load_file(path)
    state_dict = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    return state_dict, config, tensors["input_ids"], tensors["positions"], tensors["logits_f64"]


def in_steps(model, ids):
    state, logits = model.initial_state(len(ids)), []
    for t in range(ids.shape[1]):
        step, state = model.step(ids[:, t], state)
        logits.append(step)
    return torch.stack(logits, 1)


def in_chunks(model, ids, cuts=(5, 6, 17)):
    state, logits = None, []
    for part in ids.tensor_split(cuts, dim=1):
        chunk, state = model.prefill(part, state=state)
        logits.append(chunk)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@every_oracle
def test_oracle(path, dtype, allowed):
    state_dict, config, ids, positions, expected = read_oracle(path)
    model = RecurrentMLPMixer.from_config(config)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in state_dict.items()}
    model.load_state_dict(state_dict, strict=True)
    with torch.no_grad():
        logits = model.to(dtype)(ids)[:, positions].double()
    assert (logits - expected).norm() / expected.norm() < allowed


def clipped(value, constant):
    return value.clamp(0.9, 1.0) ** (1 / constant)


def matrix(weight, decay, kind, steps):
    """The lower-triangular matrix of a head over time, (T, T)."""
    t = torch.arange(steps)
    power = (t[:, None] - t).clamp(min=0)
    weight = weight[:steps]
    return torch.tril(decay**power * (weight if kind == "row" else weight[:, None]))


def apply(weight, decay, kind, x):
    return torch.einsum("ts,bse->bte", matrix(weight, decay, kind, x.shape[1]), x)


def explicit(layer, x):
    """What a layer means, by matrices, straight from its named parameters."""
    if isinstance(layer, ParallelRepeatHeads | MixedRepeatHeads | RepeatHeads):
        if isinstance(layer, ParallelRepeatHeads):
            inner = layer.in_proj(x) if layer.use_projections else x
            y = explicit(layer.mixer_heads, inner)
        else:
            heads = len(layer.mixer_heads)
            parts = [p(x) for p in layer.proj_head] if layer.use_projections else x.chunk(heads, -1)
            y = torch.cat([explicit(m, part) for m, part in zip(layer.mixer_heads, parts, strict=True)], -1)
        return layer.out_proj(y) if layer.use_projections else y
    steps = x.shape[1]
    value, one = layer.decay_value, torch.ones(2, dtype=x.dtype)
    d = one if value is None else clipped(value.flatten(), layer.decay_constant)
    if isinstance(layer, HeadedRepeatCausalLinear):
        heads = len(layer.weight)
        parts = [
            apply(layer.weight[h], d[1], "col" if h < heads // 2 else "row", part) + layer.bias[h, :steps, None]
            for h, part in enumerate(x.chunk(heads, -1))
        ]
        return torch.cat(parts, -1)
    bias = layer.bias[:steps, None]
    if isinstance(layer, CombinedRepeatCausalLinear):
        return apply(layer.weight[0], d[0], "row", x) + apply(layer.weight[1], d[1], "col", x) + bias
    if isinstance(layer, KernelRepeatLinear):
        taps, width = len(layer.weight), x.shape[-1]
        shifted = [torch.cat([x.new_zeros(*x.shape[:2], s), x], -1)[..., :width] for s in reversed(range(taps))]
        return sum(apply(w, d[1], "col", part) for w, part in zip(layer.weight, shifted, strict=True)) + bias
    kind = "row" if isinstance(layer, RowRepeatCausalLinear) else "col"
    return apply(layer.weight[0], d[0], kind, x) + bias


LAYERS = {
    "col": lambda: ColRepeatCausalLinear(9),
    "col-decay": lambda: ColRepeatCausalLinear(9, decay=True, decay_constant=2),
    "row": lambda: RowRepeatCausalLinear(9),
    "row-long": lambda: RowRepeatCausalLinear(1024, decay=True),
    "combined": lambda: CombinedRepeatCausalLinear(9),
    "combined-decay": lambda: CombinedRepeatCausalLinear(9, decay=True),
    "kernel": lambda: KernelRepeatLinear(9, 4),
    "kernel-decay": lambda: KernelRepeatLinear(1024, 3, decay=True),
    "kernel-wide": lambda: KernelRepeatLinear(9, 8, decay=True),
    "headed": lambda: HeadedRepeatCausalLinear(9, 3),
    "headed-decay": lambda: HeadedRepeatCausalLinear(9, 2, decay=True),
    "parallel": lambda: ParallelRepeatHeads(6, 9, 3, decay=True),
    "parallel-plain": lambda: ParallelRepeatHeads(6, 9, 3, use_projections=False),
    "mixed": lambda: MixedRepeatHeads(6, 9, 3, decay=True),
    "mixed-plain": lambda: MixedRepeatHeads(6, 9, 2, use_projections=False),
    "repeat": lambda: RepeatHeads(6, 9, 2, decay=True),
    "repeat-combined": lambda: RepeatHeads(6, 9, 3, combined=True, decay=True),
    "repeat-combined-plain": lambda: RepeatHeads(6, 9, 3, combined=True, use_projections=False),
}


@pytest.mark.parametrize("steps", [9, 4])
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_values_and_gradients_are_those_of_the_matrices(make, steps):
    torch.manual_seed(1)
    layer = make().double()
    scatter(layer)
    x = torch.randn(2, steps, 6, dtype=torch.float64, requires_grad=True)
    names = [n for n, _ in layer.named_parameters()]
    inputs = [x, *layer.parameters()]
    grad = torch.randn(2, steps, 6, dtype=torch.float64)
    got, expected = layer(x), explicit(layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad(got, inputs, grad, allow_unused=True)
    theirs = torch.autograd.grad(expected, inputs, grad, allow_unused=True)
    for name, g, e in zip(["x", *names], ours, theirs, strict=True):
        assert (g is None) == (e is None), name
        if e is not None:
            torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")
    used = [g for n, g in zip(names, ours[1:], strict=True) if g is not None]
    assert all(g.abs().max() > 1e-6 for g in used)


def test_a_decay_outside_its_bounds_finds_back():
    """Its clip has no derivative there; only a gradient whose descent leads back passes."""
    value = torch.tensor([0.8, 0.8, 0.9, 0.95, 1.0, 1.1, 1.1], requires_grad=True)
    effective_decay(value, 1).backward(torch.tensor([-2.0, 2.0, 2.0, -2.0, 2.0, 2.0, -2.0]))
    assert value.grad.tolist() == [-2.0, 0.0, 2.0, -2.0, 2.0, 2.0, 0.0]
    assert effective_decay(value.detach(), 1).tolist() == pytest.approx([0.9, 0.9, 0.9, 0.95, 1, 1, 1])
    assert effective_decay(torch.tensor([0.998], dtype=torch.bfloat16), 2).dtype == torch.float32

    layer = RowRepeatCausalLinear(8, decay=True)
    with torch.no_grad():
        layer.decay_value.fill_(0.5)
    x = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(0))
    target = RowRepeatCausalLinear(8, decay=True, initial_decay=1.0)
    target.weight.data.copy_(layer.weight)
    optimiser = torch.optim.SGD([layer.decay_value], lr=5.0)
    for _ in range(400):
        optimiser.zero_grad()
        (layer(x) - target(x).detach()).square().mean().backward()
        optimiser.step()
    assert layer.decay_value.item() > 0.95


@every_variant
def test_steps_and_chunks_are_the_whole(variant):
    model, ids = small(**variant), random_ids(3, 24)
    with torch.no_grad():
        whole = model(ids)
        torch.testing.assert_close(in_steps(model, ids), whole, rtol=0, atol=1e-11)
        torch.testing.assert_close(in_chunks(model, ids), whole, rtol=0, atol=1e-11)
        torch.testing.assert_close(model(ids[:, :5]), whole[:, :5], rtol=0, atol=1e-11)
        packed = model.pack()
        _, state = model.prefill(ids[:, :7], packed=packed)
        step, _ = model.step(ids[:, 7], state, packed=packed)
        torch.testing.assert_close(step, whole[:, 7], rtol=0, atol=1e-11)


@every_variant
def test_it_is_the_model_of_srm_core_models(variant, tmp_path):
    model, ids = small(**variant), random_ids(3, 24)
    model.save(tmp_path / "m.safetensors")
    other = RecurrentMixer.load(tmp_path / "m.safetensors", dtype="float64")
    assert other.config == model.config
    with torch.no_grad():
        np.testing.assert_allclose(model(ids).numpy(), other.forward(ids.numpy()), rtol=0, atol=1e-11)
        again = RecurrentMLPMixer.load(tmp_path / "m.safetensors", dtype=torch.float64)
        assert torch.equal(again(ids), model(ids))
    assert again.config == model.config
    assert list(tmp_path.iterdir()) == [tmp_path / "m.safetensors"]


@pytest.mark.parametrize("on_host", [True, False])
def test_different_lengths_in_one_batch(on_host):
    model, ids = small(heads=2, mixed_heads=True, decay=True), random_ids(3, 10)
    lengths = torch.tensor([10, 3, 0]) if on_host else [10, 3, 0]
    with torch.no_grad():
        logits, state = model.prefill(ids, lengths)
        assert state.position.tolist() == [10, 3, 0]
        assert state.furthest == 10
        more, _ = model.prefill(ids[:, :5], state=state)
        step, _ = model.step(ids[:, 0], state)
        for i, n in enumerate([10, 3, 0]):
            alone = model(torch.cat([ids[i : i + 1, :n], ids[i : i + 1, :5]], 1))[0]
            torch.testing.assert_close(logits[i, :n], alone[:n], rtol=0, atol=1e-11)
            torch.testing.assert_close(more[i], alone[n:], rtol=0, atol=1e-11)
            torch.testing.assert_close(step[i], alone[n], rtol=0, atol=1e-11)


def test_gradients_go_through_chunks():
    model, ids = small(heads=2, decay=True), random_ids(2, 12)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(model(ids)[:, -1].square().sum(), parameters)
    chunked = torch.autograd.grad(in_chunks(model, ids, (4, 9))[:, -1].square().sum(), parameters)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_variant
def test_training_lowers_the_loss(variant):
    torch.manual_seed(0)
    model = RecurrentMLPMixer(13, 12, 16, 1, **variant, dropout=0.1)
    ids = random_ids(4, 16)
    optimiser = torch.optim.Adam(list(model.parameters()), lr=1e-2)
    losses = []
    for _ in range(30):
        loss, logits = model(ids, ids)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert logits.shape == (4, 16, 13)
    assert losses[-1] < 0.7 * losses[0]


def test_the_loss_is_of_the_next_token():
    model, ids = small(), random_ids(3, 8)
    loss, logits = model(ids, ids)
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 13), ids[:, 1:].reshape(-1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    labels = ids.clone()
    labels[:, 4:] = -100
    assert model(ids, labels)[0].item() == pytest.approx(
        F.cross_entropy(logits[:, :3].reshape(-1, 13), ids[:, 1:4].reshape(-1)).item(), rel=1e-5
    )


@compiles
@pytest.mark.parametrize("variant", ["kernel", "mixed", "combined", "parallel"])
def test_it_compiles_whole(variant):
    torch._dynamo.reset()
    model, ids = small(**VARIANTS[variant]), random_ids(3, 24)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss, logits = compiled(ids, ids)
    expected_loss, expected = model(ids, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-11)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    for g, e in zip(ours, torch.autograd.grad(expected_loss, parameters, allow_unused=True), strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-8)


@compiles
def test_a_step_compiles_whole():
    torch._dynamo.reset()
    model, ids = small(**VARIANTS["mixed"]), random_ids(3, 8)
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        state = model.initial_state(3)
        for t in range(4):
            logits, state = step(ids[:, t], state)
        torch.testing.assert_close(logits, model(ids)[:, 3], rtol=0, atol=1e-11)


@pytest.mark.parametrize("variant", ["row-decay", "mixed", "mixed-odd", "combined", "parallel"])
def test_autocast_and_half_models(variant):
    model, ids = small(**VARIANTS[variant]).float(), random_ids(3, 24)
    expected = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(ids, ids)
    loss.backward()
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        half = model.bfloat16()
        parallel, steps = half(ids), in_steps(half, ids)
    for got in (logits, parallel, steps):
        assert ((got - expected).norm() / expected.norm()).item() < 0.06


@pytest.mark.parametrize("name", ["numpy", "torch", "reference"])
def test_the_choice_of_a_backend_holds(name):
    model, ids = small(heads=2, decay=True), random_ids(1, 6)
    expected = model(ids)
    with use_backend(name):
        torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-11)


class TestGenerate:
    @pytest.mark.parametrize("shared", [False, True])
    def test_greedy(self, shared):
        model = small(heads=2, mixed_heads=True, decay=True, use_shared_cache=shared)
        model.train()
        new = model.generate(random_ids(2, 5), 8, temperature=0)
        assert new.shape == (2, 8)
        assert model.training
        ids = torch.cat([random_ids(2, 5), new], 1)
        assert torch.equal(model(ids)[:, 4:-1].argmax(-1), new)

    def test_prompts_of_different_lengths(self):
        model, ids = small(heads=2), random_ids(2, 6)
        new = model.generate(ids, 5, temperature=0, lengths=[6, 2])
        assert torch.equal(new[1:], model.generate(ids[1:, :2], 5, temperature=0))

    def test_samples(self):
        model, ids = small(), random_ids(1, 3).expand(200, -1)
        generator = torch.Generator().manual_seed(0)
        first = model.generate(ids, 1, generator=generator)[:, 0]
        assert len(set(first.tolist())) > 2
        best = model(ids[:1])[0, -1].topk(2).indices
        chosen = model.generate(ids, 1, top_k=2, temperature=50.0, generator=generator)[:, 0]
        assert set(chosen.tolist()) == set(best.tolist())

    def test_as_the_model_that_ships(self):
        model, other = RecurrentMLPMixer.load(SHIPPED), RecurrentMixer.load()
        assert model.vocabulary.characters == other.vocabulary.characters
        prompt = model.vocabulary.encode("ROMEO.\nWhat")
        new = model.generate(torch.tensor([prompt]), 20, temperature=0)[0].tolist()
        assert model.vocabulary.decode(new) == other.generate(["ROMEO.\nWhat"], 20, temperature=0)[0]

    def test_nothing(self):
        model = small()
        assert model.generate(random_ids(2, 5), 0).shape == (2, 0)
        assert model.generate(random_ids(0, 5), 3).shape == (0, 3)
        assert len(model.generate(random_ids(1, 5), 20)[0]) == 20  # the last token is read by nobody

    def test_refuses(self):
        model = small()
        with pytest.raises(SequenceLengthError, match="24 positions and this needs 25"):
            model.generate(random_ids(1, 5), 21)
        with pytest.raises(ContractError, match="at least one token"):
            model.generate(random_ids(1, 0), 3)
        with pytest.raises(ContractError, match="temperature"):
            model.generate(random_ids(1, 3), 3, temperature=-1)
        with pytest.raises(ContractError, match=r"lengths: found .* 1 integers"):
            model.generate(random_ids(1, 3), 3, lengths=[1, 2])
        with pytest.raises(ContractError, match="lengths"):
            model.generate(random_ids(1, 3), 3, lengths=[0])


def test_refuses():
    model = small()
    with pytest.raises(VocabularyError, match="found 3 to 13; the model has the ids 0 to 12"):
        model(torch.tensor([[3, 13]]))
    with pytest.raises(SequenceLengthError, match="24 positions and this needs 25"):
        model(random_ids(1, 25))
    for bad in (random_ids(3), random_ids(1, 3).float(), [[1, 2]]):
        with pytest.raises(ContractError, match="int64 or int32 tokens of shape"):
            model(bad)
    with pytest.raises(ContractError, match="labels: found shape"):
        model(random_ids(1, 3), random_ids(1, 4))
    _, state = model.prefill(random_ids(2, 24))
    with pytest.raises(SequenceLengthError):
        model.step(random_ids(2), state)
    with pytest.raises(ContractError, match="a batch of 2"):
        model.step(random_ids(3), state)
    with pytest.raises(ContractError, match="weight"):
        MixerBlock(4, 8).token_mixing_layer(torch.zeros(1, 3, 4, dtype=torch.float64))
    with pytest.raises(ContractError, match="found positions 0 to 8"):
        ColRepeatCausalLinear(8)(torch.zeros(1, 9, 4))


def test_refuses_to_be_made():
    with pytest.raises(CheckpointError, match="found 5; required a divisor of hidden_dim 12"):
        RecurrentMLPMixer(13, 12, 24, 2, heads=5)
    with pytest.raises(CheckpointError, match="at most one of"):
        RecurrentMLPMixer(13, 12, 24, 2, heads=4, mixed_heads=True, combined_heads=True)
    with pytest.raises(CheckpointError, match="seq_len"):
        RecurrentMLPMixer(13, 12, 0, 2)
    for kind in (RepeatHeads, MixedRepeatHeads, ParallelRepeatHeads):
        with pytest.raises(ContractError, match="heads: found 5; required a positive divisor"):
            kind(12, 8, 5)
    with pytest.raises(ContractError, match="kernel"):
        KernelRepeatLinear(8, 0)


def test_files(tmp_path):
    model = small(heads=2, decay=True)
    model.vocabulary = Vocabulary("abcdefghijklm")
    model.save(tmp_path / "m.safetensors")
    assert RecurrentMLPMixer.load(tmp_path / "m.safetensors").vocabulary.characters == "abcdefghijklm"
    assert RecurrentMixer.load(tmp_path / "m.safetensors").generate(["abc"], 3)
    with pytest.raises(CheckpointError, match=r"none.safetensors: cannot be read"):
        RecurrentMLPMixer.load(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="cannot be written: No such file"):
        model.save(tmp_path / "no" / "m.safetensors")
    with pytest.raises(CheckpointError, match="no 'config'"):
        RecurrentMLPMixer.load(ORACLES[0].with_name("mmrec_recurrence.safetensors"))


def test_config_and_counts():
    model = RecurrentMLPMixer.from_config(
        {"vocab_size": 13, "hidden_dim": 12, "seq_len": 24, "num_blocks": 2, "heads": 4, "dropout": 0.25}
    )
    assert model.config == MixerConfig(13, 12, 24, 2, heads=4)
    assert model.mixer_blocks[0].dropout.p == 0.25
    assert RecurrentMLPMixer.from_config(model.config).config == model.config
    assert model.count_params() == sum(v.numel() for v in model.state_dict().values())
    copy = pickle.loads(pickle.dumps(model.eval()))
    assert torch.equal(copy(random_ids(1, 4)), model(random_ids(1, 4)))


@every_variant
def test_a_fresh_model_is_near_the_uniform_guess(variant):
    """Logits of a size that trains: the first loss is about log V, however long the text."""
    torch.manual_seed(0)
    model = RecurrentMLPMixer(64, 24, 512, 3, **variant)
    ids = torch.randint(0, 64, (2, 512))
    loss, logits = model(ids, ids)
    assert abs(loss.item() - np.log(64)) < 1.5
    assert logits.std() < 3
