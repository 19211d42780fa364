"""`srm_core.nn.LSTM` against torch's own, whose parameters it takes."""

from __future__ import annotations

from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

from srm_core.nn import LSTM  # noqa: E402

FORMS = [
    {}, {"num_layers": 2, "bias": False}, {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"bidirectional": True},
]  # fmt: skip
LENGTHS = [[6, 3, 1, 4], [6, 6, 5, 2]]


def pair(form: dict[str, Any], dtype: Any = torch.float64) -> tuple[Any, Any]:
    torch.manual_seed(0)
    twin = torch.nn.LSTM(3, 5, **form, dtype=dtype)
    ours = LSTM(3, 5, **form, dtype=dtype)
    ours.load_state_dict(twin.state_dict())
    return ours, twin


def inputs(form: dict[str, Any], dtype: Any = torch.float64) -> tuple[Any, Any]:
    """(x, (h_0, c_0)), leaves."""
    rows = form.get("num_layers", 1) * (2 if form.get("bidirectional") else 1)
    x = torch.randn((4, 6, 3) if form.get("batch_first") else (6, 4, 3), dtype=dtype, requires_grad=True)
    return x, tuple(torch.randn(rows, 4, 5, dtype=dtype, requires_grad=True) for _ in range(2))


def close(got: Any, want: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def flat(result: Any) -> list[Any]:
    y, (h, c) = result
    return [y.data if hasattr(y, "batch_sizes") else y, h, c]


def compare(ours: Any, twin: Any, leaves: list[Any], call: Any) -> None:
    """Results, and the gradients of leaves and parameters."""
    got, want = flat(call(ours)), flat(call(twin))
    for a, b in zip(got, want, strict=True):
        close(a, b)
    names = [n for n, _ in twin.named_parameters()]
    assert [n for n, _ in ours.named_parameters()] == names
    totals = [sum((a * torch.linspace(1, 2, a.numel()).view(a.shape)).sum() for a in one) for one in (got, want)]
    gradients = [torch.autograd.grad(t, [*leaves, *m.parameters()]) for t, m in zip(totals, (ours, twin), strict=True)]
    for a, b in zip(*gradients, strict=True):
        close(a, b, 1e-8)


@pytest.mark.parametrize("backend", ["torch", "numpy"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_it_is_that_of_torch(form: dict[str, Any], given: bool, backend: str) -> None:
    ours, twin = pair(form)
    x, state = inputs(form)
    with srm_core.use_backend(backend):
        compare(ours, twin, [x, *(state if given else ())], lambda m: m(x, state if given else None))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_packed(form: dict[str, Any], lengths: list[int]) -> None:
    """Sorted or not; and by `lengths`, which says the same."""
    ours, twin = pair(form)
    x, state = inputs(form)
    first = bool(form.get("batch_first"))
    ordered = lengths == sorted(lengths, reverse=True)
    compare(ours, twin, [x, *state], lambda m: m(pack_padded_sequence(x, torch.tensor(lengths), first, ordered), state))
    packed, ends = twin(pack_padded_sequence(x, torch.tensor(lengths), first, ordered), state)
    y, (h, c) = ours(x, state, lengths=torch.tensor(lengths))
    close(y, pad_packed_sequence(packed, first, total_length=6)[0])
    close((h, c), ends)


@pytest.mark.parametrize("form", FORMS[:2], ids=str)
def test_without_a_batch(form: dict[str, Any]) -> None:
    ours, twin = pair(form)
    x, state = inputs(form)
    compare(ours, twin, [x], lambda m: m(x[:, 0], (state[0][:, 0].detach(), state[1][:, 0].detach())))


def test_dropout() -> None:
    """Between layers, in training alone."""
    ours, twin = pair({"num_layers": 2, "dropout": 1.0})
    x, _ = inputs({})
    close(flat(ours(x)), flat(twin(x)))
    close(flat(ours.eval()(x)), flat(twin.eval()(x)))


def test_compile() -> None:
    torch._dynamo.reset()
    ours, twin = pair(FORMS[2])
    x, state = inputs(FORMS[2])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close(flat(compiled(x, state)), flat(twin(x, state)))


def test_autocast() -> None:
    """Activations in autocast's dtype, as torch's; the states too, as there."""
    ours, twin = pair(FORMS[1], torch.float32)
    x, _ = inputs(FORMS[1], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = ours(x)
    want, _ = twin(x)
    assert y.dtype is torch.bfloat16
    close(y.float(), want, 0.05)
    y.float().sum().backward()
    assert ours.weight_ih_l0.grad.dtype is torch.float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LSTM(3, 5, proj_size=2), "proj_size: found 2"),
        (lambda: LSTM(3, 0), "hidden_size: found 0"),
        (lambda: LSTM(3, 5, dropout=2), "dropout: found 2"),
        (lambda: LSTM(3, 5)(torch.rand(4)), r"input: found shape \(4,\)"),
        (lambda: LSTM(3, 5)(torch.rand(2, 2, 4)), "input: found 4 features"),
        (lambda: LSTM(3, 5)(torch.rand(2, 2, 3), (torch.rand(1, 3, 5),) * 2), r"h_0: found shape \(1, 3, 5\)"),
    ],
)
def test_errors(make: Any, said: str) -> None:
    with pytest.raises(srm_core.ContractError, match=said):
        make()
