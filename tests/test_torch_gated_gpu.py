"""The torch backend's LSTM and mdi_recurrence on CUDA: replayed graphs, cuDNN, streams, threads, captures."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from srm_core.config import CURRENT
from srm_core.context import LaunchContext

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch sees no CUDA device", allow_module_level=True)
from srm_backends.torch import graphs, lstm, mdi_recurrence, recurrence  # noqa: E402
from test_torch_gated import layer, loop_layer  # noqa: E402

DEVICE = torch.device("cuda", 0)
# Products of other strides may be added in another order.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@pytest.fixture
def ctx() -> LaunchContext:
    return LaunchContext("torch", DEVICE, CURRENT.get())


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache of graphs."""
    monkeypatch.setattr(graphs, "_graphs", OrderedDict())
    monkeypatch.setattr(graphs, "_seen", OrderedDict())
    yield
    torch.cuda.synchronize()


def on_device(tensors: Any, dtype: Any = torch.float32) -> tuple[Any, ...]:
    return tuple(t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors)


def pulled(outputs: Any, leaves: Any) -> tuple[Any, ...]:
    grads = [torch.linspace(-1, 1, o.numel(), device=o.device).to(o.dtype).view_as(o) for o in outputs]
    return tuple(o.detach() for o in outputs) + torch.autograd.grad(outputs, leaves, grads)


def eagerly(call: Callable[[], Any]) -> Any:
    """The same without graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "_replays", lambda like: False)
        return call()


def loop(ctx: LaunchContext, leaves: Any, lengths: Any = None) -> Any:
    return mdi_recurrence.forward(ctx, *leaves, mix=0.2, lengths=lengths)


def close(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        off = TOLERANCE[b.dtype]
        torch.testing.assert_close(a.cpu().double(), b.cpu().double(), rtol=off, atol=off * scale)


@pytest.mark.parametrize("lengths", [None, [150, 0, 70]])
@pytest.mark.parametrize("steps", [1, 64, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replayed_is_eager(ctx: LaunchContext, dtype: Any, steps: int, lengths: Any) -> None:
    """Values and gradients, however often; and those of the CPU."""
    host = loop_layer(3, steps, 20)
    leaves = on_device(host, dtype)
    ends = None if lengths is None else torch.tensor(lengths, device=DEVICE).clamp(max=steps)
    want = eagerly(lambda: pulled(loop(ctx, leaves, ends), leaves))
    assert not graphs._graphs
    for _ in range(3):
        close(pulled(loop(ctx, leaves, ends), leaves), want)
    assert len(graphs._graphs) == 2 * ((steps >= 64) + (steps % 64 > 0))
    cpu = LaunchContext("torch", torch.device("cpu"), CURRENT.get())
    low = tuple(t.detach().to(dtype).requires_grad_() for t in host)
    on_host = pulled(loop(cpu, low, None if ends is None else ends.cpu()), low)
    close(want, on_host)


def test_replays_in_inference_mode(ctx: LaunchContext) -> None:
    leaves = on_device(loop_layer(2, 64, 8))
    plain = [t.detach() for t in leaves]
    with torch.inference_mode():
        for _ in range(3):
            inside = loop(ctx, plain)
    close(loop(ctx, plain), inside)
    close(pulled(loop(ctx, leaves), leaves)[:2], inside)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("steps", [16, 63, 64, 2000])
def test_recurrences_are_replayed(steps: int, constant: bool, reverse: bool) -> None:
    """Values and gradients, on any strides, of every call; and those of the CPU."""
    torch.manual_seed(steps)
    gates = torch.rand(2, 1 if constant else steps, 12)[:, :, ::2]
    host = [gates, torch.randn(2, steps, 6), torch.randn(2, 6)]
    want = [t.requires_grad_() for t in host]
    expected = pulled(recurrence.recurrence(*want, reverse), want)
    for i in range(3):
        leaves = [t.detach().to(DEVICE).requires_grad_() for t in host]
        close(pulled(recurrence.recurrence(*leaves, reverse), leaves), expected)
        assert bool(graphs._graphs) == (i > 0)
    plain = [t.detach().mul(2).to(DEVICE) for t in host]
    close(recurrence.recurrence(*plain, reverse), recurrence.recurrence(*(t.cpu() for t in plain), reverse))


def test_gradients_twice(ctx: LaunchContext) -> None:
    leaves = on_device(loop_layer(2, 5, 3), torch.float64)
    for _ in range(2):
        assert torch.autograd.gradcheck(lambda *a: loop(ctx, a), leaves, fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda *a: loop(ctx, a), leaves, fast_mode=True)


def test_streams(ctx: LaunchContext) -> None:
    """Two streams share a graph and its buffers, in turns, without the host waiting for either."""
    sets = [on_device([t * (i + 1) for t in loop_layer(4, 256, 64)]) for i in range(2)]
    want = [eagerly(lambda s=s: pulled(loop(ctx, s), s)) for s in sets]
    streams = [torch.cuda.Stream(DEVICE) for _ in sets]
    torch.cuda.synchronize()
    got: list[Any] = []
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            got.append(pulled(loop(ctx, sets[i % 2]), sets[i % 2]))
    torch.cuda.synchronize()
    for i, found in enumerate(got):
        close(found, want[i % 2])


def test_threads(ctx: LaunchContext) -> None:
    """Some capture while others replay, each on a stream of its own; backwards among them."""
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # the leaves are of the first stream
    sets = [on_device(loop_layer(2, 64 + 16 * i, 16 + 8 * i)) for i in range(4)]
    want = [eagerly(lambda s=s: pulled(loop(ctx, s), s)) for s in sets]
    torch.cuda.synchronize()
    wrong: list[Any] = []

    def work(seed: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream(DEVICE)):
                for i in range(20):
                    k = (seed + i) % 4
                    found = pulled(loop(ctx, sets[k]), sets[k])
                    torch.cuda.current_stream().synchronize()
                    close(found, want[k])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("known", [False, True])
def test_within_a_capture(ctx: LaunchContext, known: bool) -> None:
    """A caller's capture takes the steps along, whether or not there is a graph of ours for them."""
    leaves = tuple(t.detach() for t in on_device(loop_layer(2, 70, 16)))
    ends = torch.tensor([70, 33], device=DEVICE)
    layers = tuple(t.detach() for t in on_device(layer(2, 70, 8, 16)))

    def call() -> Any:
        return (*loop(ctx, leaves, ends), *lstm.forward(ctx, *layers, lengths=ends))

    for _ in range(3 if known else 0):
        call()
    stream = torch.cuda.Stream(DEVICE)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eagerly(call)
    torch.cuda.current_stream().wait_stream(stream)
    count = len(graphs._graphs)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        outputs = call()
    assert len(graphs._graphs) == count
    for factor in (1.0, 0.5):
        leaves[0].mul_(factor)
        layers[0].mul_(factor)
        ends.sub_(int(factor == 0.5))
        captured.replay()
        close(outputs, call())


def test_many_shapes(ctx: LaunchContext) -> None:
    """More kinds than are kept, in turns: memory stays bounded, and every value is right."""
    reserved = []
    for _ in range(2):
        for width in range(8, 8 + 3 * graphs.KEPT):
            leaves = tuple(t.detach() for t in on_device(loop_layer(2, 64, width)))
            want = eagerly(lambda s=leaves: loop(ctx, s))
            for _ in range(2):
                close(loop(ctx, leaves), want)
            assert len(graphs._graphs) <= graphs.KEPT
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[1] <= 2 * reserved[0]


def test_every_length_has_the_same_graph(ctx: LaunchContext) -> None:
    for steps in (128, 192, 256, 640):
        loop(ctx, tuple(t.detach() for t in on_device(loop_layer(2, steps, 16))))
    assert len(graphs._graphs) == 1


@pytest.mark.parametrize("lengths", [None, [40, 0, 13]])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_lstm(ctx: LaunchContext, dtype: Any, biases: bool, lengths: Any) -> None:
    """cuDNN's values and gradients are the CPU's, without a warning of weights in pieces; no garbage is seen."""
    host = layer(3, 40, 9, 12)
    ends = None if lengths is None else torch.tensor(lengths)
    found = []
    for device in (DEVICE, torch.device("cpu")):
        context = LaunchContext("torch", device, CURRENT.get())
        own = [t.detach().to(device, dtype) for t in host]
        if ends is not None:
            own[0][torch.arange(40, device=device) >= ends.to(device)[:, None]] = torch.nan
        leaves = [t.requires_grad_() for t in own]
        given = leaves if biases else [*leaves[:3], None, None, *leaves[5:]]
        outputs = lstm.forward(context, *given, lengths=None if ends is None else ends.to(device))
        wanted = [t for t in given if t is not None]
        found.append(pulled(outputs, wanted))
    close(*found)


def test_lstm_does_not_wait_for_lengths(ctx: LaunchContext) -> None:
    leaves = on_device(layer(3, 40, 9, 12))
    ends = torch.tensor([40, 0, 13], device=DEVICE)
    lstm.forward(ctx, *leaves, lengths=ends)
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that the mode is new
        torch.cuda.set_sync_debug_mode("error")
    try:
        y, h, c = lstm.forward(ctx, *leaves, lengths=ends)
        torch.autograd.grad((y, h, c), leaves, [torch.ones_like(o) for o in (y, h, c)])
    finally:
        torch.cuda.set_sync_debug_mode("default")
