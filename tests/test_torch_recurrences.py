"""The torch backend's recurrences: the blocked form, gradients and theirs, what is kept, what a device may see."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import srm_core
from srm_core.config import CURRENT
from srm_core.context import LaunchContext
from srm_core.ops import SPECS

torch = pytest.importorskip("torch")
from srm_backends.torch import mdi, recurrence, recurrent_mix, recurrent_step, scan  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

GATES = {"full": "BTD", "step": "BT1", "channel": "B1D", "shared": "11D"}


class Count(TorchDispatchMode):
    """Counts the operations that would be launches, and refuses those that read a value back."""

    launches = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_local_scalar_dense" not in str(op), "waits for the device"
        assert "nonzero" not in str(op), "has a shape that only the device knows"
        self.launches += not op.is_view
        return op(*args, **(kwargs or {}))


@pytest.fixture
def ctx() -> LaunchContext:
    return LaunchContext("torch", torch.device("cpu"), CURRENT.get())


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks from 16 steps on."""
    monkeypatch.setattr(recurrence, "SHORT", 16)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    """The kernels' form for a device, in which no value may be looked at."""
    monkeypatch.setattr(recurrence, "_on_host", lambda _: False)
    with Count() as count:
        yield count


def made(*shape: int, low: float = 0.3, high: float = 1.2, grad: bool = True) -> Any:
    """float64 values from the same generator at each call, so that a test does not depend on another."""
    g = torch.Generator().manual_seed(sum(shape))
    return (low + (high - low) * torch.rand(*shape, generator=g, dtype=torch.float64)).requires_grad_(grad)


def gates_of(form: str, batch: int, steps: int, width: int) -> Any:
    extent = {"B": batch, "T": steps, "D": width, "1": 1}
    return made(*(extent[a] for a in GATES[form]), low=-0.6, high=1.1)


def loop(gates: Any, tokens: Any, state: Any, reverse: bool = False) -> tuple[Any, Any]:
    """The recurrence one step after the other."""
    steps = (gates if tokens is None else tokens).shape[1]
    y: list[Any] = [None] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        state = gates[:, t if gates.shape[1] > 1 else 0] * state
        if tokens is not None:
            state = state + tokens[:, t]
        y[t] = state
    return torch.stack(y, 1), state


def check_twice(call: Callable[..., Any], arguments: tuple[Any, ...], thorough: bool = False) -> None:
    """Gradients and their gradients against differences; thorough: element by element."""
    given = tuple(a for a in arguments if a is not None)

    def outputs(*changed: Any) -> Any:
        left = iter(changed)
        return call(*(None if a is None else next(left) for a in arguments))

    assert torch.autograd.gradcheck(outputs, given, fast_mode=not thorough)
    assert torch.autograd.gradgradcheck(outputs, given, fast_mode=not thorough)


SCANS = [
    (form, tokens, state, reverse, lengths)
    for form, tokens, state, reverse, lengths in itertools.product(GATES, *[(True, False)] * 4)
    if tokens or form == "full"
]


@pytest.mark.parametrize(("form", "tokens", "state", "reverse", "lengths"), SCANS)
def test_scan_gradients(
    ctx: LaunchContext, form: str, tokens: bool, state: bool, reverse: bool, lengths: bool
) -> None:  # fmt: skip
    ends = torch.tensor([2, 0, 4]) if lengths else None
    arguments = (gates_of(form, 3, 4, 2), made(3, 4, 2) if tokens else None, made(3, 2) if state else None)
    check_twice(functools.partial(scan.forward, ctx, reverse=reverse, lengths=ends), arguments, thorough=True)


@pytest.mark.parametrize("form", GATES)
@pytest.mark.parametrize("reverse", [False, True])
def test_scan_gradients_in_blocks(ctx: LaunchContext, short_blocks: None, form: str, reverse: bool) -> None:
    arguments = gates_of(form, 1, 27, 2), made(1, 27, 2), made(1, 2)
    check_twice(functools.partial(scan.forward, ctx, reverse=reverse, lengths=None), arguments)


@pytest.mark.parametrize("lengths", [None, [3, 0, 5]])
@pytest.mark.parametrize("start", [0, 1, [0, 4, -2]])
@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("mode", [("row",) * 2, ("col",) * 2, ("col", "row")])
def test_mix_gradients(ctx: LaunchContext, mode: tuple[str, ...], state: bool, start: Any, lengths: Any) -> None:
    if isinstance(start, list):
        start = torch.tensor(start)
        lengths = lengths and [2, 0, 0]  # differences of NaN, where a position is out of range, say nothing
        start = start if lengths else start.clamp(0, 1)
    ends = None if lengths is None else torch.tensor(lengths)
    initial = made(3, 2, 2) if state else None
    arguments = made(3, 5, 2, 2), made(2, 6), made(2, 6), made(2), initial

    def call(x: Any, weight: Any, bias: Any, decay: Any, initial: Any) -> Any:
        return recurrent_mix.forward(ctx, x, weight, bias, decay, mode, initial, start=start, lengths=ends)

    check_twice(call, arguments, thorough=True)


@pytest.mark.parametrize("index", [2, torch.tensor(1), torch.tensor([3, 0, 3])], ids=["int", "0-d", "array"])
@pytest.mark.parametrize("mode", [("row",) * 2, ("col",) * 2, ("col", "row")])
def test_step_gradients(ctx: LaunchContext, mode: tuple[str, ...], index: Any) -> None:
    arguments = made(3, 2, 2), made(3, 2, 2), made(2, 4), made(2, 4), made(2)
    check_twice(lambda *a: recurrent_step.forward(ctx, *a, mode, index), arguments, thorough=True)


@pytest.mark.parametrize("modulation", [True, False])
@pytest.mark.parametrize("eps", [1e-6, 0.3, 0.5])
def test_mdi_gradients(ctx: LaunchContext, modulation: bool, eps: float) -> None:
    spread = made(2, 4, low=-3, high=3)  # with eps = 0.3 some are clamped, at 0.5 all of them
    arguments = made(2, 4), made(2, 4), made(2, 4), spread, made(2, 4) if modulation else None
    check_twice(lambda *a: mdi.forward(ctx, *a, eps=eps), arguments, thorough=True)


def test_mdi_at_the_clamp(ctx: LaunchContext) -> None:
    """Logits have a gradient exactly where the reference gives them one; a NaN is not clamped."""
    logits = np.array([-40.0, -2.0, np.log(0.25 / 0.75), 0.0, 2.0, np.inf, np.nan])
    arrays = [np.linspace(-1, 1, 7), np.linspace(2, 3, 7), np.zeros(7), logits, None]
    grads = np.linspace(1, 2, 7), np.linspace(3, 4, 7)
    tensors = [None if a is None else torch.tensor(a, requires_grad=True) for a in arrays]
    result = mdi.forward(ctx, *tensors, eps=0.25)
    wanted, _ = SPECS["mdi"].reference(np.float64, *arrays, eps=0.25)
    np.testing.assert_allclose(result[0].detach(), wanted, rtol=1e-14)
    found = torch.autograd.grad(result, tensors[:4], [torch.tensor(g) for g in grads])
    vjp = SPECS["mdi"].vjp
    assert vjp is not None
    for got, want in zip(found, vjp(np.float64, grads, *arrays, eps=0.25), strict=False):
        np.testing.assert_allclose(got, want, rtol=1e-13)
    assert found[3][:2].abs().sum() == found[3][4:6].abs().sum() == 0


@pytest.mark.parametrize("form", GATES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("steps", [63, 64, 65, 191, 192, 193, 400, 5000])
def test_blocks(form: str, reverse: bool, steps: int) -> None:
    """The blocked form is the loop, whatever is left over; also where time has another stride."""
    batch, width = 2, 3
    gates = gates_of(form, batch, steps, width).detach()
    tokens = made(batch, steps, 2 * width, low=-1, high=1).detach()[..., ::2]
    state = made(batch, width).detach()
    y, last = recurrence.recurrence(gates, tokens, state, reverse)
    wanted, end = loop(gates, tokens, state, reverse)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, end, rtol=1e-12, atol=1e-12)
    if gates.shape[1] == steps:
        products = gates + 0.75  # which neither vanish nor overflow
        y, last = recurrence.recurrence(products, None, state, reverse)
        wanted, end = loop(products, None, state, reverse)
        torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-250)
        torch.testing.assert_close(last, end, rtol=1e-12, atol=1e-250)


ODD = ["zero", "NaN", "infinite", "infinite, then zero", "overflow", "faint"]


def odd_gates(kind: str, steps: int) -> Any:
    gates = made(1, steps, 2, low=-1, high=1).detach().float()
    if kind == "zero":
        gates[:, ::3] = 0
    elif kind == "NaN":
        gates[:, steps // 2, 1] = torch.nan
    elif kind == "infinite":
        gates[:, steps // 2, 1] = torch.inf
    elif kind == "infinite, then zero":
        gates[:, 0, 0], gates[:, steps // 2 :: 8, 0] = torch.inf, 0
    elif kind == "overflow":  # of every product of a block
        gates[:] = 3e37
    elif kind == "faint":
        gates[:] = 1e-38
    return gates


def odd_call(kind: str, tokens: str | None) -> tuple[Any, Any, Any]:
    x = None if tokens is None else made(1, 300, 2, low=-1, high=1).detach().float()
    if x is not None and tokens == "sparse":
        x[:, :-5] = 0  # zero times a product that overflows must not be NaN
    return odd_gates(kind, 300), x, torch.full((1, 2), 0.0 if tokens == "sparse" else 1.0)


def flipped(gates: Any, x: Any, state: Any) -> tuple[Any, Any, Any]:
    return gates.flip(1), None if x is None else x.flip(1), state


@pytest.mark.parametrize("tokens", ["some", "sparse", None])
@pytest.mark.parametrize("kind", ODD)
def test_odd_gates(kind: str, tokens: str | None) -> None:
    """On a CPU they give what the loop gives."""
    arguments = odd_call(kind, tokens)
    want = loop(*arguments)[0]
    got = recurrence.recurrence(*arguments)[0]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)
    got = recurrence.recurrence(*flipped(*arguments), reverse=True)[0].flip(1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("tokens", ["some", "sparse", None])
@pytest.mark.parametrize("kind", ODD)
def test_odd_gates_on_a_device(
    monkeypatch: pytest.MonkeyPatch, kind: str, tokens: str | None, reverse: bool
) -> None:  # fmt: skip
    """Where no value may be looked at, what is finite is as in the loop, and what is not finite is not in either."""
    monkeypatch.setattr(recurrence, "_on_host", lambda _: False)
    arguments = odd_call(kind, tokens)
    want = loop(*arguments)[0]
    if reverse:
        arguments, want = flipped(*arguments), want.flip(1)
    with Count():
        got = recurrence.recurrence(*arguments, reverse)[0]
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    torch.testing.assert_close(got[finite], want[finite], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_launches(ctx: LaunchContext, device: Count, gradient: bool) -> None:
    """Far fewer than steps, whether or not gradients are wanted, and none that waits for the device."""
    gates, tokens = (t.float().detach().requires_grad_(gradient) for t in (made(2, 8192, 3), made(2, 8192, 3)))
    lengths = torch.tensor([8192, 100])
    y, last = scan.forward(ctx, gates, tokens, None, reverse=False, lengths=lengths)
    if gradient:
        torch.autograd.backward((y, last), (torch.ones_like(y), torch.ones_like(last)))
    assert device.launches < 8192 / (4 if gradient else 8)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2)])
def test_only_what_is_asked_for(ctx: LaunchContext, which: tuple[int, ...]) -> None:
    """A gradient that nobody asks for costs nothing: tokens alone need no products with the states."""
    arguments = [t.detach() for t in (made(2, 30, 3), made(2, 30, 3), made(2, 3))]
    for i in which:
        arguments[i].requires_grad_()
    y, last = scan.forward(ctx, *arguments, reverse=False, lengths=None)
    found: list[Any] = []
    node = y.grad_fn
    node.register_hook(lambda grads, _: found.extend(g is not None for g in grads))
    torch.autograd.grad(y.sum() + last.sum(), [arguments[i] for i in which])
    assert [i for i in range(3) if found[i]] == list(which)


@pytest.mark.parametrize("name", ["z", "h", "gate_logits", "decay_logits", "modulation_logits"])
def test_mdi_only_what_is_asked_for(ctx: LaunchContext, name: str) -> None:
    arguments = [made(2, 3).detach() for _ in range(5)]
    names = ["z", "h", "gate_logits", "decay_logits", "modulation_logits"]
    arguments[names.index(name)].requires_grad_()
    y, _ = mdi.forward(ctx, *arguments, eps=1e-6)
    found: list[Any] = []
    y.grad_fn.register_hook(lambda grads, _: found.extend(g is not None for g in grads))
    y.sum().backward()
    assert [n for n, there in zip(names, found, strict=False) if there] == [name]


def test_constant_gates_stay_small(ctx: LaunchContext) -> None:
    """A gate that is constant in time is not written out over it: what is kept is the states and a little."""
    gates, tokens = made(1, 1, 5), made(2, 1000, 5)
    kept: dict[int, int] = {}

    def pack(t: Any) -> Any:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scan.forward(ctx, gates, tokens, None, reverse=False, lengths=None)
    assert sum(kept.values()) <= tokens.nbytes + 1024


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_accumulate_in_float32(ctx: LaunchContext, dtype: Any) -> None:
    """A sum of 4096 ones, which a half type cannot count to."""
    gates, tokens = torch.ones(1, 1, 2, dtype=dtype), torch.ones(1, 4096, 2, dtype=dtype)
    y, last = scan.forward(ctx, gates, tokens, None, reverse=False, lengths=None)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    assert last.tolist() == [[4096, 4096]]


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_does_not_leak(ctx: LaunchContext, reverse: bool) -> None:
    """Neither its values nor gradients that come to it, NaN both."""
    lengths = torch.tensor([3, 0, 70])
    beyond = torch.arange(70) >= lengths[:, None]
    gates, tokens = gates_of("full", 3, 70, 2), made(3, 70, 2)

    def run(fill: float) -> tuple[Any, ...]:
        g, x = (t.detach().masked_fill(beyond[..., None], fill).requires_grad_() for t in (gates, tokens))
        y, last = scan.forward(ctx, g, x, None, reverse=reverse, lengths=lengths)
        grad = torch.ones_like(y).masked_fill(beyond[..., None], fill)
        return (y, last, *torch.autograd.grad((y, last), (g, x), (grad, torch.ones_like(last))))

    for clean, poisoned in zip(run(0.0), run(torch.nan), strict=True):
        assert torch.equal(clean, poisoned)
        if clean.dim() == 3:
            assert not clean[beyond].any()


def test_func() -> None:
    """torch.func.grad, and it of itself, through the kernel and through the operator."""
    gates, tokens = made(1, 5, 2).detach(), made(1, 5, 2).detach()
    context = LaunchContext("torch", torch.device("cpu"), CURRENT.get())

    def by_kernel(g: Any) -> Any:
        return scan.forward(context, g, tokens, None, reverse=False, lengths=None)[0].square().sum()

    def by_operator(g: Any) -> Any:
        return srm_core.scan(g, tokens, backend="torch")[0].square().sum()

    def by_loop(g: Any) -> Any:
        return loop(g, tokens, torch.zeros(1, 2, dtype=torch.float64))[0].square().sum()

    want = torch.func.grad(by_loop)(gates)
    twice = torch.func.grad(lambda g: torch.func.grad(by_loop)(g).square().sum())(gates)
    torch.testing.assert_close(torch.func.grad(by_kernel)(gates), want)
    torch.testing.assert_close(torch.func.grad(lambda g: torch.func.grad(by_kernel)(g).square().sum())(gates), twice)
    torch.testing.assert_close(torch.func.grad(by_operator)(gates), want)


@pytest.mark.parametrize("length", [0, 4])
@pytest.mark.parametrize("mode", [("row",) * 2, ("col",) * 2, ("col", "row")])
def test_positions_out_of_range(length: int, mode: tuple[str, ...]) -> None:
    """NaN for w and b, without a read of what is not there, also where there are no positions at all."""
    weight, bias = made(2, length), made(2, length)
    x, state, decay = made(3, 2, 2), made(3, 2, 2), made(2)
    index = torch.tensor([-1, 4, 2**40])
    y, new = srm_core.recurrent_step(x, state, weight, bias, decay, mode, index, backend="torch")
    assert y.isnan().all()
    for head, word in enumerate(mode):
        assert new[:, head].isnan().all() == (word == "row")
    for grad in torch.autograd.grad(y.nansum() + new.nansum(), (weight, bias)):
        assert not grad.any()
    wide = x[:, None].expand(3, 6, 2, 2)
    y, _ = srm_core.recurrent_mix(wide, weight, bias, decay, mode, start=index.clamp(-1, 99), backend="torch")
    assert y[1:].isnan().all()
    assert y[0, 0].isnan().all()
    assert y[0, 1:].isfinite().all() == (length == 99)
    assert torch.equal(
        y[0, 1 : length + 1].isnan().flatten(1).all(1), torch.full((length,), "row" in mode and "col" not in mode)
    )


def test_step_without_waiting(ctx: LaunchContext) -> None:
    """An index and slots in device memory: nothing is read back, no row but those named is written."""
    x, state = made(4, 2, 3, grad=False), made(5, 2, 3, grad=False)
    parameters = made(2, 6, grad=False), made(2, 6, grad=False), made(2, grad=False), ("col", "row")
    recurrent_step._row_heads(parameters[3], x.device)  # made once, before a graph is captured
    slots, index = torch.tensor([3, 0, -1, 5]), torch.tensor([1, 9, 2, 3])  # the last two name no row
    before = state.clone()
    with Count() as count:
        y = recurrent_step._unchecked(x, state, *parameters, index, slots)
        assert count.launches < 40
    good = [0, 1]
    want, new = recurrent_step.forward(ctx, x[good], before[[3, 0]], *parameters, index[good])
    torch.testing.assert_close(y[good], want, equal_nan=True)
    assert y[2:].isnan().all()
    torch.testing.assert_close(state[[3, 0]], new, equal_nan=True)
    assert torch.equal(state[[1, 2, 4]], before[[1, 2, 4]])

    before = state.clone()
    with Count():
        y = recurrent_step._unchecked(x, state, *parameters, index, torch.tensor([-1, 5, 6, 7]))
    assert y.isnan().all()
    torch.testing.assert_close(state, before, rtol=0, atol=0, equal_nan=True)
    assert recurrent_step._unchecked(x, state[:0], *parameters, index, slots).isnan().all()


@pytest.mark.parametrize("slots", [None, [2, 0]])
def test_step_in_place(slots: list[int] | None) -> None:
    """The state that comes in is the one that is written, of whatever dtype and strides."""
    parameters = made(2, 6, grad=False).float(), made(2, 6, grad=False).float(), made(2, grad=False).float()
    x = made(2, 2, 3, grad=False).bfloat16()
    rows = slots or [0, 1]
    state = made(3 if slots else 2, 2, 6, grad=False).float()[..., ::2]
    before = state.clone()
    given = None if slots is None else torch.tensor(slots)
    y = srm_core.recurrent_step_(x, state, *parameters, ("col", "row"), 3, slots=given, backend="torch")
    want, new = srm_core.recurrent_step(x, before[rows], *parameters, ("col", "row"), 3, backend="torch")
    assert torch.equal(y, want)
    assert torch.equal(state[rows], new)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
