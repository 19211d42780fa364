"""`ConvBN2d` against the pair of torch's own modules."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from srm_core.nn import ConvBN2d  # noqa: E402

FORMS = [
    {},
    {"bias": True, "padding": 1, "activation": "relu"},
    {"stride": 2, "padding": (1, 2), "momentum": None},
    {"groups": 2, "dilation": 2, "activation": "relu", "eps": 0.1},
]


def pair(form: dict[str, Any], dtype: Any = torch.float64) -> tuple[Any, Any]:
    """(ours, torch's own over a copy of the parameters), with statistics that are not those of a beginning."""
    torch.manual_seed(0)
    ours = ConvBN2d(4, 6, 3, **form, dtype=dtype)
    for t in (ours.bn.weight, ours.bn.bias, ours.bn.running_mean):
        nn.init.normal_(t)
    nn.init.uniform_(ours.bn.running_var, 0.5, 2)
    tail = [nn.ReLU()] if form.get("activation") else []
    return ours, nn.Sequential(copy.deepcopy(ours.conv), copy.deepcopy(ours.bn), *tail)


def images(dtype: Any = torch.float64, layout: Any = torch.contiguous_format) -> Any:
    return torch.randn(3, 4, 9, 8, dtype=dtype, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients(form: dict[str, Any], training: bool, backend: str) -> None:
    """Outputs, gradients and what the statistics become, for several batches."""
    ours, twin = (m.train(training) for m in pair(form))
    for _ in range(2):
        x = images().requires_grad_()
        with srm_core.use_backend(backend):
            y = ours(x)
        want = twin(x)
        close(y, want)
        parameters = [[m.conv.weight, m.conv.bias, m.bn.weight, m.bn.bias] for m in [ours]]
        parameters.append([twin[0].weight, twin[0].bias, twin[1].weight, twin[1].bias])
        for own, others in zip(*parameters, strict=True):
            if own is not None:
                got = torch.autograd.grad(y.square().sum(), own, retain_graph=True)
                close(got, torch.autograd.grad(want.square().sum(), others, retain_graph=True), 1e-8)
        got = torch.autograd.grad(y.square().sum(), x)
        close(got, torch.autograd.grad(want.square().sum(), x), 1e-8)
    close(ours.bn.running_mean, twin[1].running_mean)
    close(ours.bn.running_var, twin[1].running_var)
    assert ours.bn.num_batches_tracked == twin[1].num_batches_tracked


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_fold(form: dict[str, Any], layout: Any) -> None:
    """Kept between calls, made anew when anything that it is made of changes."""
    ours, twin = (m.eval() for m in pair(form, torch.float32))
    x = images(torch.float32, layout)
    with torch.no_grad():
        close(ours(x), twin(x), 1e-4)
        kept = ours._kept
        y = ours(x)
        assert ours._kept is kept
        assert y.is_contiguous(memory_format=layout)
        changes = [
            lambda m: m[1].running_var.mul_(2), lambda m: m[0].weight.add_(0.1), lambda m: m[1].bias.zero_(),
            lambda m: setattr(m[1], "running_mean", m[1].running_mean + 1), lambda m: setattr(m[1], "eps", 0.3),
            lambda m: m[1].load_state_dict({n: t * 1.5 for n, t in m[1].state_dict().items()}),
        ]  # fmt: skip
        for i, change in enumerate(changes):
            for m in ((ours.conv, ours.bn), (twin[0], twin[1])):
                change(m)
            close(ours(x), twin(x), 1e-4)
            assert ours._kept is not kept, i
            kept = ours._kept
        close(ours.double()(x.double()), twin.double()(x.double()))
        for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
            assert again._kept is None
            close(again(x.double()), twin(x.double()))
    with torch.no_grad():
        for m in (ours.bn, twin[1]):
            m.bias.data.add_(1)  # which torch tells nobody
        close(ours.eval()(x.double()), twin(x.double()))
    ours.train()(x.double())
    twin.train()(x.double())
    with torch.no_grad():
        close(ours.eval()(x.double()), twin.eval()(x.double()))


def test_torch_state_dicts() -> None:
    """Those of a pair load as they are, and the pair itself is shared."""
    ours, twin = pair(FORMS[1])
    pair_of = nn.ModuleDict({"conv": twin[0], "bn": twin[1]})
    fresh = ConvBN2d(4, 6, 3, bias=True, padding=1, activation="relu", dtype=torch.float64)
    fresh.load_state_dict(pair_of.state_dict())
    close(fresh.eval()(images()), twin.eval()(images()))
    shared = ConvBN2d.from_torch(twin[0], twin[1], "relu")
    assert shared.conv.weight is twin[0].weight
    assert not shared.training
    close(shared(images()), twin(images()))
    assert set(ours.state_dict()) == set(pair_of.state_dict())


def test_to_torch() -> None:
    """Torch's modules over the same tensors, and back."""
    for form in FORMS:
        ours, _ = pair(form)
        ours.eval()
        back = ours.to_torch()
        assert [type(m) for m in back] == [nn.Conv2d, nn.BatchNorm2d, *([nn.ReLU] if form.get("activation") else [])]
        assert back[0].weight is ours.conv.weight
        assert not back.training
        close(back(images()), ours(images()))
        close(ConvBN2d.from_torch(back[0], back[1], form.get("activation"))(images()), ours(images()))


@torch.no_grad()
def test_memory_that_is_used_again() -> None:
    """What replaces a tensor may get its place in memory, and must not pass for it."""
    ours, twin = (m.eval() for m in pair({}, torch.float32))
    for i in range(20):
        ours(images(torch.float32))
        for step in (1.0, i + 2.0):
            ours.bn.running_mean = torch.full((6,), step)
            ours.bn.running_var.data = torch.full((6,), step)
        twin[1].running_mean, twin[1].running_var = ours.bn.running_mean, ours.bn.running_var
        close(ours(images(torch.float32)), twin(images(torch.float32)), 1e-4)


def test_compile() -> None:
    """One graph, in training and in evaluation."""
    ours, twin = pair(FORMS[1])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        ours.train(training), twin.train(training)
        close(compiled(images()), twin(images()))
    close(ours.bn.running_var, twin[1].running_var)
    with torch.no_grad():
        close(compiled(images()), twin(images()))


def test_autocast() -> None:
    ours, twin = (m.train() for m in pair(FORMS[1], torch.float32))
    x = images(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, want = ours(x), twin(x)
    assert y.dtype is torch.bfloat16
    close(y, want.bfloat16(), 0.05)
    y.float().sum().backward()
    assert ours.conv.weight.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: ConvBN2d(3, 4, 3, padding="same"), "padding: found padding='same'"),
        (lambda: ConvBN2d(3, 4, 3, activation="gelu"), "activation: found 'gelu'"),
        (lambda: ConvBN2d.from_torch(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(5)), "bn: found 5 features after 4 channels"),
        (
            lambda: ConvBN2d.from_torch(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
            "track_running_stats=False",
        ),
        (
            lambda: ConvBN2d.from_torch(nn.Conv2d(3, 4, 3), nn.SyncBatchNorm(4)),
            "bn: found SyncBatchNorm; required torch.nn.BatchNorm2d itself",
        ),
        (
            lambda: ConvBN2d.from_torch(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
            "conv: found ParametrizedConv2d; required torch.nn.Conv2d itself",
        ),
        (lambda: ConvBN2d(3, 4, 3)(torch.rand(1, 3, 3, 3)), "x: found 1 values a channel"),
        (lambda: ConvBN2d(3, 4, 3)(torch.rand(1, 2, 5, 5)), "weight: found kernels of 3 input channels"),
    ],
)
def test_errors(make: Any, said: str) -> None:
    with pytest.raises(srm_core.ContractError, match=said):
        make()
