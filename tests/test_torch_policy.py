"""The torch backend holds torch's own switches to the policy of a call, for several threads at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from srm_core.config import CURRENT
from srm_core.context import LaunchContext

torch = pytest.importorskip("torch")
from srm_backends.torch import policy  # noqa: E402

X = torch.ones(2)
DOUBLE = torch.ones(2, dtype=torch.float64)


@pytest.fixture
def ctx() -> LaunchContext:
    return LaunchContext("torch", torch.device("cpu"), CURRENT.get())


@pytest.fixture
def switch(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The switch of products of matrices on a CPU, in place of torch's: it stands at "tf32"."""
    state = {"now": "tf32"}
    pair = (lambda: state["now"], lambda value: state.update(now=value))
    monkeypatch.setitem(policy.SWITCHES, (False, "matmul"), pair)
    yield state
    assert state["now"] == "tf32"
    assert policy._HOLDER.count == 0


def test_held_and_restored(ctx: LaunchContext, switch: dict[str, str]) -> None:
    with policy.held(ctx, X, "matmul"):
        assert switch["now"] == "ieee"
        with policy.held(ctx, X, "matmul"):
            assert switch["now"] == "ieee"
        assert switch["now"] == "ieee"
    assert switch["now"] == "tf32"
    with pytest.raises(ZeroDivisionError), policy.held(ctx, X, "matmul"):
        raise ZeroDivisionError


def test_what_has_no_such_products_holds_nothing(ctx: LaunchContext, switch: dict[str, str]) -> None:
    with policy.held(ctx, DOUBLE, "matmul"):
        assert switch["now"] == "tf32"


@pytest.mark.skipif(not hasattr(torch._C, "_get_fp32_precision_getter"), reason="older switches")
def test_the_switches_are_those_of_torch(ctx: LaunchContext) -> None:
    rnn: Any = torch.backends.mkldnn.rnn
    before = rnn.fp32_precision
    rnn.fp32_precision = "tf32"
    try:
        with policy.held(ctx, X, "rnn"):
            assert rnn.fp32_precision == "ieee"
        assert rnn.fp32_precision == "tf32"
    finally:
        rnn.fp32_precision = before


def test_the_last_one_restores(ctx: LaunchContext, switch: dict[str, str]) -> None:
    """A call that ends in one thread takes nothing from a call in another."""
    inside, first_is_done = threading.Event(), threading.Event()
    seen: list[str] = []

    def second() -> None:
        with policy.held(ctx, X, "matmul"):
            inside.set()
            assert first_is_done.wait(10)
            seen.append(switch["now"])

    thread = threading.Thread(target=second)
    with policy.held(ctx, X, "matmul"):
        thread.start()
        assert inside.wait(10)
    first_is_done.set()
    thread.join(10)
    assert seen == ["ieee"]


def test_another_policy_waits(ctx: LaunchContext, switch: dict[str, str]) -> None:
    other = LaunchContext("torch", torch.device("cpu"), CURRENT.get())
    other.precision, other.deterministic = "tf32", False
    done = threading.Event()
    wanted = policy._wanted

    def as_on_cuda(ctx: LaunchContext, like: Any) -> Any:
        return (ctx.precision, False) if like is X else wanted(ctx, like)

    def second() -> None:
        with policy.held(other, X, "matmul"):
            assert switch["now"] == "tf32"
        done.set()

    thread = threading.Thread(target=second)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy, "_wanted", as_on_cuda)
        with policy.held(ctx, X, "matmul"):
            thread.start()
            assert not done.wait(0.2)
        assert done.wait(10)
        thread.join(10)


def test_many_threads(ctx: LaunchContext, switch: dict[str, str]) -> None:
    wrong: list[str] = []

    def work() -> None:
        for _ in range(500):
            with policy.held(ctx, X, "matmul"):
                if switch["now"] != "ieee":
                    wrong.append(switch["now"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_a_backward_is_under_the_policy_of_its_forward(ctx: LaunchContext, switch: dict[str, str]) -> None:
    seen: list[str] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            seen.append(switch["now"])
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            seen.append(switch["now"])
            return grad * 2

    body = policy.under_policy("matmul")(lambda x: (Watched.apply(x),))
    leaf = torch.ones(3, requires_grad=True)
    (y,) = body(ctx, leaf)
    y.sum().backward()
    assert seen == ["ieee", "ieee"]
    assert leaf.grad.tolist() == [2, 2, 2]


def test_a_fork_holds_nothing(ctx: LaunchContext, switch: dict[str, str]) -> None:
    """What another thread is in the midst of does not go on in the child."""
    inside, over = threading.Event(), threading.Event()

    def second() -> None:
        with policy.held(ctx, X, "matmul"):
            inside.set()
            over.wait(10)

    thread = threading.Thread(target=second)
    thread.start()
    assert inside.wait(10)
    child = os.fork()
    if not child:
        os._exit(int(policy._HOLDER.count != 0 or switch["now"] != "tf32"))
    over.set()
    thread.join(10)
    assert os.waitpid(child, 0)[1] == 0
