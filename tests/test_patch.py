"""`patch`: what it swaps in models of torch's, what it leaves, and that both compute the same."""

from __future__ import annotations

import copy
import pickle
import runpy
import threading
from pathlib import Path
from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
# ruff: noqa: E402

import torch.nn.functional as F
from torch import nn

from srm_core.nn.conv_bn import ConvBN2d
from srm_core.nn.patching import patch


class Block(nn.Module):
    """As in residual networks: the ReLU is used twice, and defined before what it follows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x: Any) -> Any:
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Recogniser(nn.Module):
    """A convolutional stem, residual blocks, an LSTM and both kinds of attention over what comes out."""

    def __init__(self, training_branch: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.lstm = nn.LSTM(8, 6, num_layers=2, bidirectional=True, batch_first=True)
        self.heads = nn.MultiheadAttention(12, 3, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Any) -> Any:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        x = x.mean(2).transpose(1, 2)  # (B, W, C)
        x, _ = self.lstm(x)
        x = x + self.heads(x, x, x, need_weights=False)[0]
        q = x.unflatten(-1, (3, 4)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, q, q, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(x.mean(1))


def varied(model: Any, seed: int = 0) -> Any:
    """With statistics and scales that are not those of a beginning."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None:
            m.running_mean.normal_(generator=g)
            m.running_var.uniform_(0.5, 2, generator=g)
            if m.affine:
                nn.init.normal_(m.weight, generator=g), nn.init.normal_(m.bias, generator=g)
    return model


def made(kind: Any = Recogniser, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    return varied(kind(*args, **kwargs))


def images(batch: int = 2, dtype: Any = torch.float32) -> Any:
    return torch.randn(batch, 3, 13, 15, dtype=dtype, generator=torch.Generator().manual_seed(1))


def close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def swapped(report: Any) -> list[tuple[str, ...]]:
    return [e.names for e in report.swapped]


def why(report: Any, name: str) -> str:
    return next(e.note for e in report.left if name in e.names)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that are called, in order."""
    calls: list[str] = []
    for name in ("conv_bn", "conv_bn_train", "lstm", "attention"):
        real = getattr(srm_core, name)
        monkeypatch.setattr(srm_core, name, lambda *a, _r=real, _n=name, **k: (calls.append(_n), _r(*a, **k))[1])
    return calls


@pytest.mark.parametrize("backend", ["torch", "numpy"])
def test_a_whole_model(ran: list[str], backend: str) -> None:
    model = made().eval()
    with torch.no_grad():
        want = model(images())
    keys, modules = list(model.state_dict()), list(model.named_modules())
    report = patch(model)
    assert swapped(report) == [
        ("stem.0", "stem.1", "stem.2"), ("blocks.0.conv2", "blocks.0.bn2"), ("blocks.0.conv1", "blocks.0.bn1"),
        ("blocks.1.conv2", "blocks.1.bn2"), ("blocks.1.conv1", "blocks.1.bn1"), ("lstm",), ("heads",), ("(the model)",),
    ]  # fmt: skip
    assert not report.left
    assert (list(model.state_dict()), list(model.named_modules())) == (keys, modules)
    with torch.no_grad(), srm_core.use_backend(backend):
        close(model(images()), want)
    assert ran == ["conv_bn"] * 5 + ["lstm"] * 4 + ["attention"] * 2
    assert "blocks.1.conv1, blocks.1.bn1" in str(report)
    assert str(report).endswith("8 swapped, 0 left")
    report.undo()
    ran.clear()
    with torch.no_grad():
        assert torch.equal(model(images()), want)
    assert not ran
    assert not any("forward" in m.__dict__ or "train" in m.__dict__ for m in model.modules())
    report.undo()


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool) -> None:
    """In float64, with the statistics as torch would move them, over two batches."""
    twin = made().double().train(training)
    model = copy.deepcopy(twin)
    report = patch(model)
    for i in range(2):
        x = images(2 + i, torch.float64).requires_grad_()
        grads = []
        for m in (model, twin):
            m.zero_grad()
            y = m(x)
            y.square().sum().backward()
            grads.append([y, x.grad, *(p.grad for p in m.parameters())])
            x.grad = None
        close(*grads, 1e-8)
    close(model.state_dict(), twin.state_dict(), 1e-9)
    assert model.stem[1].num_batches_tracked == (2 if training else 0)
    report.undo()
    close(model.eval()(images(2, torch.float64)), twin.eval()(images(2, torch.float64)), 1e-9)


def test_context_manager() -> None:
    model = made(Block, 3).eval()
    with patch(model) as report:
        assert len(report.swapped) == 2
        assert len(patch(model).swapped) == 0  # all is patched already
        assert "has been replaced" in patch(model).left[0].note
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_training_after_patching() -> None:
    """What an optimiser or load_state_dict writes is seen by the folds."""
    twin = made().train()
    model = copy.deepcopy(twin)
    patch(model)
    for m in (model, twin):
        optimizer = torch.optim.SGD(m.parameters(), 0.05)
        for _ in range(3):
            m.eval()
            with torch.no_grad():
                m(images())
            m.train()
            m(images()).square().sum().backward()
            optimizer.step()
    with torch.no_grad():
        close(model.eval()(images()), twin.eval()(images()))
        other = made(seed_of := Recogniser).state_dict()
        assert seed_of is Recogniser
        for m in (model, twin):
            m.load_state_dict({k: v * 1.25 for k, v in other.items()})
        close(model(images()), twin(images()))
        for m in (model, twin):
            m.stem[0].weight.data.mul_(1.5)  # which torch tells nobody: eval() forgets the folds
        close(model.eval()(images()), twin.eval()(images()))
        close(model.double()(images(2, torch.float64)), twin.double()(images(2, torch.float64)), 1e-9)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_their_own(again: Any, ran: list[str]) -> None:
    """A copy of a patched model is patched, over its own parameters."""
    model = made().eval()
    want = model(images()).detach()
    patch(model)
    other = again(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        close(other(images()), want)
    assert len(ran) == 11


def test_compile() -> None:
    """One graph, of our operators, but for scaled_dot_product_attention. Unless it is told to, torch compiles no
    nn.LSTM, patched or not."""
    model = made()
    twin = copy.deepcopy(model)
    patch(model)
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return make_boxed_eager(graph, inputs)

    make_boxed_eager = torch._dynamo.lookup_backend("aot_eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for training in (True, False):
            model.train(training), twin.train(training)
            close(compiled(images()), twin(images()), 1e-3)
            assert len(graphs) == 2 - training
            name = "srm.conv_bn_train" if training else "srm.conv_bn"
            counts = [graphs[-1].count(f"torch.ops.{n}.default") for n in (name, "srm.lstm", "srm.attention")]
            assert counts == [5, 4, 1]
    close(model.stem[1].running_var, twin.stem[1].running_var)


def test_autocast() -> None:
    model = made().train()
    twin = copy.deepcopy(model)
    patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = model(images(8)), twin(images(8))
    assert y.dtype is want.dtype
    assert (y - want).abs().max() < 0.2 * want.abs().max()
    y.float().sum().backward()


class Reused(nn.Module):
    """One pair for two images, and a convolution that two batch norms share."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU()
        self.shared, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        a, b = (self.relu(self.bn(self.conv(v))) for v in (x, x.flip(0)))
        return self.one(self.shared(a)) + self.two(self.shared(b))


def test_modules_that_are_used_twice() -> None:
    twin = made(Reused).train()
    model = copy.deepcopy(twin)
    report = patch(model)
    assert swapped(report) == [("conv", "bn", "relu")]
    assert why(report, "one") == why(report, "two") == "the convolution is also called without the batch norm"
    close(model(images()), twin(images()))
    close(model.state_dict(), twin.state_dict())


class Branches(nn.Module):
    """Pairs that are none, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        conv, bn = (lambda **k: nn.Conv2d(3, 3, 1, **k)), (lambda **k: nn.BatchNorm2d(3, **k))
        self.tapped, self.tapped_bn = conv(), bn()
        self.late, self.late_bn = conv(), bn()
        self.mode, self.mode_bn = conv(), bn()
        self.given, self.given_bn = conv(), bn()
        self.words, self.words_bn = conv(padding="same"), bn()
        self.stateless, self.stateless_bn = conv(), bn(track_running_stats=False)
        self.hooked, self.hooked_bn = conv(), bn()
        self.hooked_bn.register_forward_hook(lambda *_: None)
        self.normed = nn.utils.parametrizations.weight_norm(conv())
        self.normed_bn = bn()
        self.child, self.child_bn = type("Conv", (nn.Conv2d,), {})(3, 3, 1), bn()
        self.lonely, self.unused_bn = conv(), bn()

    def forward(self, x: Any, more: Any = None) -> Any:
        y = self.tapped(x)
        x = self.tapped_bn(y) + y
        x = self.late_bn(torch.relu(self.late(x)))
        x = self.mode(x)
        x = self.mode_bn(x) if self.training else x
        x = self.given(x)
        if more is None:
            x = x + 1
        x = self.given_bn(x)
        for name in ("words", "stateless", "hooked", "normed", "child"):
            x = getattr(self, name + "_bn")(getattr(self, name)(x))
        return self.lonely(x)


REASONS = {
    "tapped_bn": "used elsewhere too",
    "tapped": "used elsewhere too",
    "late_bn": "not the output of a Conv2d",
    "late": "no BatchNorm2d follows it",
    "mode": "called otherwise in training",
    "mode_bn": "called otherwise in training",
    "given_bn": "not the output of a Conv2d",
    "words_bn": "padding='same'",
    "stateless_bn": "track_running_stats=False",
    "hooked_bn": "has hooks",
    "normed_bn": "whose parameters are computed",
    "child_bn": "a Conv, not Conv2d itself",
    "lonely": "no BatchNorm2d follows it",
    "unused_bn": "no forward that was traced calls it",
}


def test_what_is_left() -> None:
    model = made(Branches)
    twin = copy.deepcopy(model)
    report = patch(model)
    assert not report.swapped
    for name, reason in REASONS.items():
        assert reason in why(report, name), name
    for training in (True, False):
        for more in ((), (1,)):
            assert torch.equal(model.train(training)(images(), *more), twin.train(training)(images(), *more))


class Untraceable(nn.Module):
    """Looks at values, and at a layer of its features by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.block = Block(3)
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Any) -> Any:
        x = self.bn(self.conv(x))
        if x.sum() > 1e9:
            return x
        x = self.block(x)
        taps = []
        for layer in self.features:
            x = layer(x)
            taps.append(x)
        return torch.cat([*taps, self.features(x)])


def test_a_part_for_itself() -> None:
    """What cannot be traced is left; its children are patched where they are called as a whole, and only there."""
    model = made(Untraceable).eval()
    twin = copy.deepcopy(model)
    report = patch(model)
    for name in ("conv", "bn"):
        assert "(the model) cannot be traced: symbolically traced variables" in why(report, name)
    assert ("block.conv1", "block.bn1") in swapped(report)
    assert ("features.0", "features.1", "features.2") in swapped(report)
    with torch.no_grad():
        close(model(images()), twin(images()))
        close(model.features[0](images()), twin.features[0](images()), 0)


def test_threads() -> None:
    """Calls of a part by itself do not see that another thread is in the whole."""
    model = made(Block, 3).eval()
    with torch.no_grad():
        want, alone = model(images()), model.conv1(images())
        patch(model)
        wrong = []

        def work(call: Any, expected: Any) -> None:
            with torch.no_grad():
                for _ in range(200):
                    if not torch.allclose(call(images()), expected, atol=1e-4):
                        wrong.append(call)

        threads = [threading.Thread(target=work, args=a) for a in ((model, want), (model.conv1, alone)) * 2]
        [t.start() for t in threads]
        [t.join() for t in threads]
    assert not wrong


def test_tracing_leaves_no_trace() -> None:
    """Neither what a forward stores, nor its hooks, nor the generator see that it was traced."""

    class Stores(Block):
        def forward(self, x: Any) -> Any:
            self.last = x
            self.bn1.num_batches_tracked += 1
            return super().forward(x) + torch.rand(1)

    model, seen = Stores(3), []
    model.register_forward_hook(lambda *a: seen.append(a))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert len(patch(model).swapped) == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(model, "last")
    assert not seen
    assert model.bn1.num_batches_tracked == 0


LSTMS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "layers": {"num_layers": 2, "bidirectional": True, "bias": False},
    "dropout": {"num_layers": 2, "dropout": 0.5},
}


@pytest.mark.parametrize("form", LSTMS.values(), ids=LSTMS)
def test_lstm(form: dict[str, Any], ran: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 5, **form)).double()
    twin = copy.deepcopy(model)
    assert swapped(patch(model)) == [("0",)]
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    layers = model[0].num_layers * (1 + model[0].bidirectional)
    batch = x.shape[0] if model[0].batch_first else x.shape[1]
    hx = (torch.randn(layers, batch, 5, dtype=torch.float64), torch.randn(layers, batch, 5, dtype=torch.float64))
    for m in (model, twin):
        m.eval()
    close(model(x), twin(x), 1e-9)
    close(model[0](x, hx), twin[0](x, hx), 1e-9)
    close(model(x[0]), twin(x[0]), 1e-9)
    packed = nn.utils.rnn.pack_sequence([x[0], x[1][:2]])
    for got, want in zip(model(packed)[0][:2], twin(packed)[0][:2], strict=True):
        close(got, want, 1e-9)
    assert ran == ["lstm"] * (4 * layers)
    if model[0].dropout:
        assert not torch.equal(model.train()(x)[0], twin(x)[0])


def masks() -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    flags = torch.rand(5, 7, generator=g) < 0.3
    flags[:, 0] = False
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    each = (torch.rand(2 * 3, 5, 7, generator=g) < 0.3) & (torch.arange(7) > 0)
    added = torch.randn(5, 7, generator=g, dtype=torch.float64)
    wide = torch.zeros(2, 7, dtype=torch.float64).masked_fill(padding, -torch.inf)
    return [
        {}, {"attn_mask": flags}, {"attn_mask": each}, {"attn_mask": added}, {"key_padding_mask": padding},
        {"attn_mask": flags, "key_padding_mask": padding}, {"attn_mask": added, "key_padding_mask": wide},
        {"attn_mask": flags, "is_causal": False},
    ]  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 4, "vdim": 9}],
    ids=["", "batch_first", "bias", "kdim"],
)
@pytest.mark.parametrize("options", masks(), ids=lambda o: "+".join(o) or "none")
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_multihead(form: dict[str, Any], options: dict[str, Any], ran: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(6, 3, **form).double()
    twin = copy.deepcopy(model)
    assert swapped(patch(model)) == [("(the model)",)]
    sizes = [(5, 6), (7, form.get("kdim", 6)), (7, form.get("vdim", 6))]
    given = [torch.randn((2, *s) if form.get("batch_first") else (s[0], 2, s[1])).double() for s in sizes]
    got, want = (m(*given, need_weights=False, **options) for m in (model, twin))
    close(got, want, 1e-9)
    assert ran == ["attention"]
    got[0].sum().backward(), want[0].sum().backward()
    close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()], 1e-9)
    with_weights, those = (m(*given, **options) for m in (model, twin))
    close(with_weights, those, 1e-12)
    assert ran == ["attention"]


def test_dropout_of_attention_stays_torchs(ran: list[str]) -> None:
    model = nn.MultiheadAttention(6, 3, dropout=0.5, batch_first=True)
    patch(model)
    x = torch.randn(2, 4, 6)
    model(x, x, x, need_weights=False)
    assert not ran
    model.eval()(x, x, x, need_weights=False)
    assert ran == ["attention"]


def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, **options)


class Calls(nn.Module):
    """Attention by way of a function."""

    def forward(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        return attend(q, k, v, **options)


class Untraced(nn.Module):
    def forward(self, q: Any, k: Any, v: Any, **options: Any) -> Any:
        if q.sum() > 1e9:
            return q
        return F.scaled_dot_product_attention(q, k, v, **options)


FLAGS = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.6
SHAPES = {
    "plain": ((2, 3, 4, 5), (2, 3, 6, 5), {}, 1),
    "causal": ((2, 3, 4, 5), (2, 3, 6, 5), {"is_causal": True, "scale": 0.3}, 1),
    "mask": ((2, 3, 4, 5), (2, 3, 6, 5), {"attn_mask": FLAGS | (torch.arange(6) == 0)}, 1),
    "groups": ((2, 4, 4, 5), (2, 2, 6, 5), {"enable_gqa": True}, 1),
    "one_head": ((2, 4, 5), (2, 6, 5), {"attn_mask": (FLAGS | (torch.arange(6) == 0)).expand(2, 4, 6)}, 1),
    "five_axes": ((2, 1, 3, 4, 5), (2, 1, 3, 6, 5), {}, 0),
    "broadcast": ((2, 3, 4, 5), (1, 3, 6, 5), {}, 0),
    "two_axes": ((4, 5), (6, 5), {}, 0),
}


@pytest.mark.parametrize("kind", [Calls, Untraced])
@pytest.mark.parametrize(("query", "key", "options", "count"), SHAPES.values(), ids=SHAPES)
def test_attention_calls(kind: Any, query: Any, key: Any, options: dict[str, Any], count: int, ran: list[str]) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(query), torch.randn(key), torch.randn(key)
    model = nn.ModuleDict({"inner": kind()})["inner"]
    with patch(model) as report:
        assert swapped(report) == [("(the model)",)]
        close(model(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options), 1e-5)
        assert ran == ["attention"] * count
        model(q, k, v, **{**options, "dropout_p": 0.5})
        assert ran == ["attention"] * count
    model(q, k, v, **options)
    assert ran == ["attention"] * count


def test_the_check_on_an_example(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is not the same afterwards is put back, and its modes and statistics are not touched."""
    model = made().train()
    before = copy.deepcopy(model.state_dict())
    patch(model, (images(),)).undo()
    close(model.state_dict(), before, 0)
    assert model.training
    monkeypatch.setattr(ConvBN2d, "forward", lambda self, x: self.conv.weight.new_zeros(len(x), 3, 13, 15))
    model = made(Block, 3)
    with pytest.raises(srm_core.SRMError, match=r"patch: the model's outputs changed: .*not close"):
        patch(model, (images(),))
    assert "forward" not in model.conv1.__dict__


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/examples/patch_pretrained.py, on a network of a module that is importable, and weights from a file."""
    source = "from torch import nn\n\ndef small(channels=2):\n"
    source += "    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())\n"
    (tmp_path / "some_networks.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    torch.save(varied(network).state_dict(), tmp_path / "weights.pt")
    script = Path(__file__).parents[1] / "docs/examples/patch_pretrained.py"
    main = runpy.run_path(str(script))["main"]
    main(
        ["some_networks:small", "--arguments", '{"channels": 4}', "--weights", str(tmp_path / "weights.pt"),
         "--shape", "1", "3", "8", "8", "--repeats", "1"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "conv_bn  swapped  0, 1, 2" in said
    assert "largest difference" in said


def test_undo_in_order() -> None:
    model = made(Block, 3)
    report = patch(model)
    mine = model.conv1.forward
    model.conv1.forward = lambda x: mine(x)
    with pytest.raises(srm_core.SRMError, match="forward of a Conv2d has been replaced since; undo first"):
        report.undo()
    assert "forward" in model.bn1.__dict__
    model.conv1.__dict__["forward"] = mine
    report.undo()
    assert not any("forward" in m.__dict__ for m in model.modules())


def _looked_up(module: Any, x: Any) -> Any:
    return TABLE["sdpa"](x, x, x)


TABLE = {"sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)}


def test_attention_behind_a_table_is_seen_in_an_example() -> None:
    class Layer(nn.Module):
        def forward(self, x: Any) -> Any:
            if float(x.sum()) < -1e30:  # which no trace follows
                return x
            return x + globals()["_looked_" + "up"](self, x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.heads = nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            flat = x.transpose(1, 2).flatten(2)
            return self.heads(flat, flat, flat, need_weights=False)[0]

    model, x = Model(), torch.rand(1, 2, 5, 2)
    assert [e.kind for e in patch(model).swapped] == ["attention"]  # the heads; no one says what else there is
    model = Model()
    want = model(x)
    report = patch(model, example=(x,))
    assert [e.names for e in report.swapped] == [("heads",), ("layers.0",), ("layers.1",)]
    calls = []
    with pytest.MonkeyPatch.context() as context:
        run = srm_core.attention
        context.setattr(srm_core, "attention", lambda *a, **k: calls.append(1) or run(*a, **k))
        torch.testing.assert_close(model(x), want)
    assert len(calls) == 3
