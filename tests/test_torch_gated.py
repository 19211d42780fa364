"""The torch backend's LSTM and mdi_recurrence: gradients and theirs, lengths, what is launched and kept, the graphs."""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import srm_core
from srm_core.config import CURRENT
from srm_core.context import LaunchContext
from srm_core.ops import SPECS

torch = pytest.importorskip("torch")
from srm_backends.torch import graphs, lstm, mdi_recurrence  # noqa: E402
from test_torch_recurrences import Count, check_twice, made  # noqa: E402
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402


@pytest.fixture
def ctx() -> LaunchContext:
    return LaunchContext("torch", torch.device("cpu"), CURRENT.get())


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form for a device, which looks at neither lengths nor weights."""
    monkeypatch.setattr(lstm, "SMALL", 0.0)


def layer(batch: int, steps: int, inputs: int, width: int) -> tuple[Any, ...]:
    """x, w_ih, w_hh, b_ih, b_hh, h0, c0 in float64; no two are alike."""
    shapes = (batch, steps, inputs), (4 * width, inputs), (4 * width, width), (4 * width,), (4 * width,)
    states = (batch, width), (batch, width)
    return tuple(
        ((i + 1) * made(*s, low=-0.3, high=0.3)).detach().requires_grad_() for i, s in enumerate((*shapes, *states))
    )


def loop_layer(batch: int, steps: int, width: int) -> tuple[Any, ...]:
    """z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi in float64."""
    shapes = (batch, steps, width), (batch, steps, width), (batch, width), (width, width), (width,), (width, 2 * width)
    return tuple(
        ((i + 1) * made(*s, low=-0.3, high=0.3)).detach().requires_grad_() for i, s in enumerate((*shapes, (width,)))
    )


def values(tensors: Any) -> list[Any]:
    return [None if t is None else t.detach().numpy() for t in tensors]


@pytest.mark.parametrize("lengths", [None, [2, 0, 4]])
@pytest.mark.parametrize("given", ["both", "one bias", "neither", "cell alone"])
def test_lstm_gradients(ctx: LaunchContext, given: str, lengths: Any) -> None:
    x, w_ih, w_hh, b_ih, b_hh, h0, c0 = layer(3, 4, 2, 3)
    rest = {
        "both": (b_ih, b_hh, h0, c0), "one bias": (None, b_hh, h0, None), "neither": (None,) * 4,
        "cell alone": (b_ih, None, None, c0),
    }[given]  # fmt: skip
    ends = None if lengths is None else torch.tensor(lengths)
    check_twice(functools.partial(lstm.forward, ctx, lengths=ends), (x, w_ih, w_hh, *rest), thorough=True)


def test_lstm_gradients_in_parts(ctx: LaunchContext, in_parts: None) -> None:
    ends = torch.tensor([2, 0, 5])
    check_twice(functools.partial(lstm.forward, ctx, lengths=ends), layer(3, 5, 2, 3), thorough=True)


def test_lstm_twice_in_float32(ctx: LaunchContext) -> None:
    """oneDNN's layer has a second derivative, the same as the composed one's in float64."""

    def twice(arguments: Any) -> Any:
        y, h, c = lstm.forward(ctx, *arguments, lengths=torch.tensor([4, 0, 2]))
        first = torch.autograd.grad(y.square().sum() + (h * c).sum(), arguments, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), arguments)

    given = layer(3, 4, 2, 3)
    found = twice(tuple(a.detach().float().requires_grad_() for a in given))
    for got, want in zip(found, twice(given), strict=True):
        torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-5)


def packed(arguments: Any, lengths: Any) -> tuple[Any, ...]:
    """torch's own layer over a packed sequence; every length at least 1."""
    x, *weights, h0, c0 = arguments
    own = torch.nn.LSTM(x.shape[2], h0.shape[1], batch_first=True, dtype=x.dtype)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    sequence = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    called = torch.func.functional_call(own, dict(zip(names, weights, strict=True)), (sequence, (h0[None], c0[None])))
    y, (h, c) = called
    return pad_packed_sequence(y, batch_first=True, total_length=x.shape[1])[0], h[0], c[0]


@pytest.mark.parametrize("form", ["at once", "in parts"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 9, 33])
def test_lengths(
    ctx: LaunchContext, monkeypatch: pytest.MonkeyPatch, steps: int, dtype: Any, form: str
) -> None:  # fmt: skip
    """Every length, with garbage beyond it, as torch's packed sequences have it; without a step the state is what it
    was, to the bit."""
    if form == "in parts":
        monkeypatch.setattr(lstm, "SMALL", 0.0)
    lengths = torch.arange(steps, -1, -1, dtype=torch.int32)
    arguments = tuple(a.detach().to(dtype) for a in layer(steps + 1, steps, 3, 5))
    beyond = torch.arange(steps) >= lengths[:, None]
    arguments[0][beyond] = torch.nan
    leaves = tuple(a.requires_grad_() for a in arguments)
    y, h, c = lstm.forward(ctx, *leaves, lengths=lengths)
    assert torch.equal(h[-1], leaves[5][-1])
    assert torch.equal(c[-1], leaves[6][-1])
    assert not y[beyond].any()
    clean = tuple(a.detach().nan_to_num().requires_grad_() for a in arguments)
    wanted = packed((*(a if i in range(1, 5) else a[:-1] for i, a in enumerate(clean)),), lengths[:-1])
    for got, want in zip((y[:-1], h[:-1], c[:-1]), wanted, strict=True):
        torch.testing.assert_close(got, want)
    grads = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y).masked_fill(beyond[..., None], torch.nan)
    ends = torch.linspace(-1, 2, h.numel(), dtype=dtype).view_as(h)
    found = torch.autograd.grad((y, h, c), leaves, (grads, ends, ends.flip(0)))
    pulled = torch.autograd.grad(wanted, clean, (grads.nan_to_num()[:-1], ends[:-1], ends.flip(0)[:-1]))
    for i, (got, want) in enumerate(zip(found, pulled, strict=True)):
        part = slice(None) if i in range(1, 5) else slice(None, -1)  # the sequence without steps has no peer
        torch.testing.assert_close(got[part], want[part])
    assert torch.equal(found[5][-1], ends[-1])
    assert not found[0][beyond].any()


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("which", [1, 2, 3, 6])
def test_odd_weights_within_lengths(ctx: LaunchContext, which: int, odd: float) -> None:
    """A weight that no gate could be shut against: what is carried on is still what the reference has."""
    given = values(layer(4, 5, 3, 2))
    given[which].flat[1] = odd
    lengths = np.array([1, 5, 0, 2])
    found = lstm.forward(ctx, *(torch.tensor(a) for a in given), lengths=torch.tensor(lengths))
    with np.errstate(all="ignore"):
        wanted = SPECS["lstm"].reference(np.float64, *given, lengths=lengths)
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


def test_huge_weights_within_lengths(ctx: LaunchContext) -> None:
    """Finite ones that would win against the shut gate."""
    given = values(layer(3, 4, 2, 3))
    given[2] *= 1e35
    found = lstm.forward(ctx, *(torch.tensor(a) for a in given), lengths=torch.tensor([1, 4, 2]))
    with np.errstate(all="ignore"):
        wanted = SPECS["lstm"].reference(np.float64, *given, lengths=np.array([1, 4, 2]))
    for got, want in zip(found, wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("gradient", [False, True])
def test_nothing_waits_for_lengths(ctx: LaunchContext, gradient: bool) -> None:
    """On a device: the calls of the fused layer are as many as T has binary digits, and no value is read."""
    x, *weights, h0, c0 = (a.detach().float().requires_grad_(gradient) for a in layer(3, 100, 2, 3))
    fused = 0

    class Watch(Count):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal fused
            fused += "mkldnn_rnn_layer" in str(op)
            return super().__torch_dispatch__(op, types, args, kwargs)

    with Watch() as watch:
        y, h, c = lstm._in_parts(x, h0, c0, weights, torch.tensor([100, 0, 37]), gradient, True)
        forward = fused
        if gradient:
            torch.autograd.backward((y, h, c), [torch.ones_like(o) for o in (y, h, c)])
    assert forward == (100).bit_length() or not torch.backends.mkldnn.is_available()
    assert watch.launches < 800


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_cell_stays_wide(ctx: LaunchContext, dtype: Any) -> None:
    """A cell that counts to 4096, which a half type cannot."""
    x, w_ih, w_hh = torch.zeros(1, 4096, 1, dtype=dtype), torch.zeros(4, 1, dtype=dtype), torch.zeros(4, 1)
    bias = torch.full((4,), 100.0)
    y, h, c = lstm.forward(ctx, x, w_ih, w_hh, bias, lengths=None)
    assert (y.dtype, h.dtype, c.dtype) == (dtype, torch.float32, torch.float32)
    assert c.tolist() == [[4096.0]]


@pytest.mark.parametrize("mix", [0.1, 0.0, -0.7])
@pytest.mark.parametrize("lengths", [None, [2, 0, 4]])
def test_loop_gradients(ctx: LaunchContext, mix: float, lengths: Any) -> None:
    ends = None if lengths is None else torch.tensor(lengths)
    call = functools.partial(mdi_recurrence.forward, ctx, mix=mix, lengths=ends)
    check_twice(call, loop_layer(3, 4, 2), thorough=True)


@pytest.mark.parametrize("lengths", [None, [7, 0, 30]])
def test_loop_gradients_are_the_references(ctx: LaunchContext, lengths: Any) -> None:
    arguments = loop_layer(3, 30, 4)
    ends = None if lengths is None else np.array(lengths)
    grads = np.linspace(-1, 1, 360).reshape(3, 30, 4), np.linspace(-1, 1, 12).reshape(3, 4)
    outputs = mdi_recurrence.forward(ctx, *arguments, mix=0.3, lengths=None if ends is None else torch.tensor(ends))
    given = [torch.tensor(g) for g in grads]
    found = torch.autograd.grad(outputs, arguments, given, retain_graph=True)
    vjp = SPECS["mdi_recurrence"].vjp
    assert vjp is not None
    for got, want in zip(found, vjp(np.float64, grads, *values(arguments), mix=0.3, lengths=ends), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)
    for got, want in zip(given, grads, strict=True):
        np.testing.assert_array_equal(got, want)  # nothing was written into the gradients that came
    for again, first in zip(torch.autograd.grad(outputs, arguments, given), found, strict=True):
        assert torch.equal(again, first)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (5,), (0, 6)])
def test_loop_only_what_is_asked_for(ctx: LaunchContext, which: tuple[int, ...]) -> None:
    arguments = [a.detach() for a in loop_layer(2, 6, 3)]
    for i in which:
        arguments[i].requires_grad_()
    y, _ = mdi_recurrence.forward(ctx, *arguments, mix=0.2)
    found: list[Any] = []
    y.grad_fn.register_hook(lambda grads, _: found.extend(g is not None for g in grads))
    y.sum().backward()
    assert not any(found[i] for i in (0, 1) if i not in which)
    assert any(found[3:]) == any(i > 2 for i in which)


def test_loop_func(ctx: LaunchContext) -> None:
    """torch.func.grad, and it of itself."""
    z, *rest = (a.detach() for a in loop_layer(2, 3, 2))

    def of(z: Any) -> Any:
        return mdi_recurrence.forward(ctx, z, *rest, mix=0.2)[0].square().sum()

    def twice(z: Any) -> Any:
        return torch.func.grad(of)(z).square().sum()

    leaf = z.clone().requires_grad_()
    (first,) = torch.autograd.grad(of(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    torch.testing.assert_close(torch.func.grad(of)(z), first.detach())
    torch.testing.assert_close(torch.func.grad(twice)(z), second)


def test_loop_keeps_no_more_than_it_needs(ctx: LaunchContext) -> None:
    """The arguments and the states: the gates are computed again."""
    arguments = loop_layer(2, 50, 4)
    kept: dict[int, int] = {}

    def pack(t: Any) -> Any:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        mdi_recurrence.forward(ctx, *arguments, mix=0.1)
    assert sum(kept.values()) <= sum(a.nbytes for a in arguments) + arguments[0].nbytes


@pytest.mark.parametrize("gradient", [False, True])
def test_loop_launches(ctx: LaunchContext, gradient: bool) -> None:
    """Seven a step forward, three a step backward, a few for all steps; none that waits for a device."""
    arguments = [a.detach().requires_grad_(gradient) for a in loop_layer(2, 400, 3)]
    with Count() as count:
        y, last = mdi_recurrence.forward(ctx, *arguments, mix=0.1)
        if gradient:
            torch.autograd.backward((y, last), (torch.ones_like(y), torch.ones_like(last)))
    assert count.launches < 400 * (10 if gradient else 7) + 100


def test_loop_with_odd_strides(ctx: LaunchContext) -> None:
    z, gamma, *rest = (a.detach() for a in loop_layer(3, 5, 4))
    want = mdi_recurrence.forward(ctx, z, gamma, *rest, mix=0.1)
    strided = z.transpose(0, 1).contiguous().transpose(0, 1), gamma.repeat(1, 1, 2)[..., ::2].contiguous()
    got = mdi_recurrence.forward(ctx, strided[0], gamma.transpose(1, 2).contiguous().transpose(1, 2), *rest, mix=0.1)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)
    wide = mdi_recurrence.forward(ctx, z[:, :1].expand(3, 5, 4), gamma[:, :1].expand(3, 5, 4), *rest, mix=0.1)
    dense = z[:, :1].repeat(1, 5, 1), gamma[:, :1].repeat(1, 5, 1)
    for a, b in zip(wide, mdi_recurrence.forward(ctx, *dense, *rest, mix=0.1), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


class Replay:
    """In the place of a graph: buffers of its own, and the body in each call."""

    made = 0
    calls = 0
    retired = 0
    broken = False

    def __init__(self, body: Any, outputs: Any, inputs: Any, constant: Any) -> None:
        if Replay.broken:
            raise RuntimeError("no capture")
        Replay.made += 1
        self.size = graphs._bytes(outputs) + graphs._bytes(inputs)
        self.body, self.constant = body, constant
        self.outputs, self.inputs = (tuple(torch.zeros(t.shape, dtype=t.dtype) for t in ts) for ts in (outputs, inputs))

    def __call__(self, outputs: Any, inputs: Any) -> None:
        Replay.calls += 1
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.body(self.outputs, self.inputs, self.constant)
        for given, own in zip(outputs, self.outputs, strict=True):
            given.copy_(own)

    def retire(self) -> None:
        Replay.retired += 1


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> type[Replay]:
    """As if on a device, with `Replay` for its graphs and an empty cache."""
    Replay.made = Replay.calls = Replay.retired = 0
    Replay.broken = False
    monkeypatch.setattr(graphs, "_Graph", Replay)
    monkeypatch.setattr(graphs, "_replays", lambda like: True)
    monkeypatch.setattr(graphs, "_graphs", OrderedDict())
    monkeypatch.setattr(graphs, "_seen", OrderedDict())
    return Replay


def double(outputs: Any, inputs: Any, constant: Any) -> None:
    torch.mul(inputs[0], constant, out=outputs[0])


def doubled(size: int, constant: float = 2.0, policy: str = "ieee", dtype: Any = torch.float32) -> Any:
    given, out = torch.arange(size, dtype=dtype), torch.empty(size, dtype=dtype)
    graphs.replayed(double, (out,), (given,), constant, policy)
    assert torch.equal(out, given * constant)


def test_a_graph_from_the_second_time_on(replays: type[Replay]) -> None:
    for calls in (0, 1, 2, 3):
        doubled(5)
        assert (replays.made, replays.calls) == (min(calls, 1), calls)
    for other in ({"size": 6}, {"constant": 3.0}, {"policy": "tf32"}, {"dtype": torch.float64}):
        doubled(**{"size": 5, **other})  # type: ignore[arg-type]
        assert replays.made == 1
    doubled(5)
    assert (replays.made, replays.calls) == (1, 4)


def test_the_least_recently_used_graph_goes(replays: type[Replay]) -> None:
    for size in range(1, graphs.KEPT + 1):
        doubled(size)
        doubled(size)
    doubled(1)
    for _ in range(2):
        doubled(100)
    assert (len(graphs._graphs), replays.retired) == (graphs.KEPT, 1)
    made = replays.made
    doubled(1)
    assert replays.made == made
    doubled(2)  # which was the oldest
    assert replays.made == made + 1
    for size in range(1000, 1000 + 20 * graphs.KEPT):
        doubled(size)
    assert len(graphs._seen) <= 8 * graphs.KEPT


def test_graphs_are_bounded_in_memory(replays: type[Replay], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "BYTES", 8000)
    for size in (200, 300, 400):  # 1600, 2400 and 3200 bytes
        doubled(size)
        doubled(size)
    assert replays.retired == 0
    doubled(450)
    doubled(450)
    assert replays.retired == 2
    for _ in range(3):
        doubled(501)
    assert replays.made == 4  # the last one alone is over half of what there is
    assert sum(g.size for g in graphs._graphs.values()) <= 8000


def test_an_error_of_a_capture_is_an_error(replays: type[Replay]) -> None:
    doubled(5)
    replays.broken = True
    with pytest.raises(RuntimeError, match="no capture"):
        doubled(5)
    replays.broken = False
    doubled(5)
    assert (replays.made, replays.calls, len(graphs._graphs)) == (1, 1, 1)


def test_threads_share_graphs(replays: type[Replay]) -> None:
    wrong: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for i in range(100):
                doubled(1 + (seed * 7 + i) % 20)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert len(graphs._graphs) <= graphs.KEPT


@pytest.mark.parametrize("lengths", [None, [150, 0, 70]])
@pytest.mark.parametrize("steps", [64, 65, 150])
def test_loop_in_pieces(ctx: LaunchContext, monkeypatch: pytest.MonkeyPatch, steps: int, lengths: Any) -> None:
    """Replayed piece by piece, forward and backward, it is what it is at once."""
    arguments = loop_layer(3, steps, 4)
    ends = None if lengths is None else torch.tensor(lengths).clamp(max=steps)

    def run() -> Any:
        outputs = mdi_recurrence.forward(ctx, *arguments, mix=0.3, lengths=ends)
        grads = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
        return (*outputs, *torch.autograd.grad(outputs, arguments, grads))

    whole = run()
    Replay.made = Replay.calls = 0
    monkeypatch.setattr(graphs, "_Graph", Replay)
    monkeypatch.setattr(graphs, "_replays", lambda like: True)
    monkeypatch.setattr(graphs, "_graphs", OrderedDict())
    monkeypatch.setattr(graphs, "_seen", OrderedDict())
    for _ in range(3):
        for got, want in zip(run(), whole, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    kinds = 2 * (steps >= 64) + 2 * (steps % 64 > 0)  # forward and backward, of whole pieces and of the rest
    assert Replay.made == kinds
    assert Replay.calls == 3 * 2 * len(graphs.pieces(steps, arguments[0])) - kinds


def test_through_the_public_operators() -> None:
    """Gradients of both, as the NumPy backend's."""
    for name, arguments, options in (
        ("lstm", layer(3, 9, 2, 4), {}),
        ("mdi_recurrence", loop_layer(3, 9, 4), {"mix": 0.4}),
    ):
        lengths = torch.tensor([9, 0, 4])
        found = []
        for backend in ("torch", "numpy"):
            outputs = getattr(srm_core, name)(*arguments, lengths=lengths, backend=backend, **options)
            grads = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view_as(o) for o in outputs]
            found.append((*outputs, *torch.autograd.grad(outputs, arguments, grads)))
        for got, want in zip(*found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_axes_of_one_are_put_in_order() -> None:
    """Their strides are torch's own, also where no element shows the difference."""
    from srm_backends.torch.common import in_order

    base = torch.arange(12.0)
    for shape, strides in (((1, 5), (0, 1)), ((1, 5), (1, 1)), ((2, 1, 3), (3, 7, 1)), ((1, 1), (4, 9))):
        odd = base.as_strided(shape, strides)
        plain = in_order(odd)
        assert plain.stride() == torch.empty(shape).stride()
        assert torch.equal(plain, odd)
    for kept in (base.view(3, 4), base.view(3, 4).T, base.view(3, 4)[:, ::2], base.view(1, 12), torch.empty(0, 3)):
        assert in_order(kept) is kept
