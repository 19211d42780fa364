"""The operators as torch sees them: autograd, torch.compile, opcheck, autocast, torch.func, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import srm_core
from srm_core.ops import SPECS
from srm_core.spec import OpSpec

torch = pytest.importorskip("torch")
from srm_core import torch_ops  # noqa: E402

DIFFERENTIABLE = [s for s in SPECS.values() if not s.mutates]
BACKENDS = ["numpy", "torch"]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with srm_core.use_backend(request.param):
        yield request.param


def tensor(a: Any, gradient: bool = True) -> Any:
    if isinstance(a, tuple | list) and any(isinstance(e, np.ndarray) for e in a):
        return [tensor(e, gradient) for e in a]
    if not isinstance(a, np.ndarray):
        return a
    made = torch.from_numpy(a.copy())
    return made.requires_grad_(gradient and made.is_floating_point())


def sample(spec: OpSpec, dtype: str = "float64", case: int = 0, gradient: bool = True) -> tuple[list[Any], Any]:
    """Arguments and options of a case as tensors; what a spec gives no gradient of does not want one."""
    args, options = spec.sample(spec.cases[case], dtype)
    gradient = gradient and not spec.mutates
    names = [p.name for p in spec.parameters]
    args = [tensor(a, gradient and n in spec.differentiable) for n, a in zip(names, args, strict=False)]
    return args, {n: tensor(a, gradient and n in spec.differentiable) for n, a in options.items()}


def leaves(args: list[Any]) -> list[Any]:
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def weights(output: Any) -> Any:
    return torch.linspace(1, 2, output.numel(), dtype=output.dtype).view(output.shape)


def total(spec: OpSpec, result: Any) -> Any:
    """A number that every element of every output has its own part in."""
    return sum((o * weights(o)).sum() for o in spec.unpack(result))


def gradients(spec: OpSpec, call: Any, args: list[Any], options: dict[str, Any]) -> list[Any]:
    return list(torch.autograd.grad(total(spec, call(*args, **options)), leaves(args), allow_unused=True))


def expected(spec: OpSpec, args: list[Any], options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """(outputs, gradients) by the reference, through vjp."""
    plain = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
    result, pullback = srm_core.vjp(spec.name, *plain, backend="reference", **options)
    outputs = spec.unpack(result)
    found = pullback(*map(weights, outputs))
    names = [p.name for p in spec.parameters]
    by_name = dict(zip(spec.differentiable, found, strict=True))
    wanted = [n for n, a in zip(names, args, strict=False) if isinstance(a, torch.Tensor) and a.requires_grad]
    return list(outputs), [by_name[n] for n in wanted]


def same(got: list[Any], want: list[Any], tolerance: float = 1e-9) -> None:
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(torch.zeros_like(w) if g is None else g, w, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda s: s.name)
def test_autograd(spec: OpSpec, backend: str) -> None:
    """The gradients of an operator on tensors that want them, in eager mode."""
    for case in range(min(4, len(spec.cases))):
        args, options = sample(spec, case=case)
        outputs, wanted = expected(spec, args, options)
        call = getattr(srm_core, spec.name)
        same(list(spec.unpack(call(*args, **options))), outputs)
        same(gradients(spec, call, args, options), wanted)


@pytest.mark.parametrize("spec", SPECS.values(), ids=lambda s: s.name)
def test_opcheck(spec: OpSpec, backend: str) -> None:
    """The schema, the shapes without values, the registration of autograd, and all of it under AOTAutograd."""
    for case in range(2):
        args, options = sample(spec, "float32", case)
        values = [*spec.bind(args, options)[0], *spec.bind(args, options)[1].values()]
        calls: list[Any] = []
        torch_ops.outward(spec, lambda *a, into=calls: into.append(a))(backend, *values)
        torch.library.opcheck(torch_ops.define(spec).overload, calls[0])


@pytest.mark.parametrize("spec", DIFFERENTIABLE, ids=lambda s: s.name)
def test_compile(spec: OpSpec, backend: str) -> None:
    """One graph without a break, forward and backward, with the values of eager mode."""
    torch._dynamo.reset()
    args, options = sample(spec)
    call = getattr(srm_core, spec.name)
    compiled = torch.compile(lambda *a, **o: call(*a, **o), fullgraph=True, backend="aot_eager")
    outputs, wanted = expected(spec, args, options)
    same(list(spec.unpack(compiled(*args, **options))), outputs)
    same(gradients(spec, compiled, args, options), wanted)


@pytest.mark.parametrize("name", ["recurrent_step_", "hds_update_"])
def test_compile_in_place(name: str, backend: str) -> None:
    torch._dynamo.reset()
    spec = SPECS[name]
    call = getattr(srm_core, name)
    compiled = torch.compile(lambda *a, **o: call(*a, **o), fullgraph=True, backend="aot_eager")
    one, options = sample(spec, gradient=False)
    two, _ = sample(spec, gradient=False)
    got, want = compiled(*one, **options), call(*two, **options)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(one[1], two[1])
    torch.testing.assert_close(one[0], two[0])


def scan_loss(gates: Any, tokens: Any) -> Any:
    y, final = srm_core.scan(gates, tokens)
    return (y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum() + final.sum()


def scan_arguments(gradient: bool = True, dtype: Any = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    gates, tokens = (torch.rand(2, 7, 3, generator=generator, dtype=dtype) for _ in range(2))
    return gates.requires_grad_(gradient), tokens.requires_grad_(gradient)


def test_inductor() -> None:
    """The default compiler, with the shapes of a batch that changes, in one compilation for all of them."""
    torch._dynamo.reset()
    compiled = torch.compile(scan_loss, fullgraph=True, dynamic=True)
    for batch in (2, 3, 5):
        gates, tokens = (torch.rand(batch, 7, 4, requires_grad=True) for _ in range(2))
        got = torch.autograd.grad(compiled(gates, tokens), (gates, tokens))
        same(list(got), list(torch.autograd.grad(scan_loss(gates, tokens), (gates, tokens))), 1e-5)


def test_an_index_that_changes() -> None:
    """Decoding in a compiled function does not compile again for each position."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    (x, state, *weights), _ = sample(SPECS["recurrent_step"], gradient=False)
    weights = weights[:4]

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Any, state: Any, index: int) -> Any:
        return srm_core.recurrent_step(x, state, *weights, index)

    length = weights[0].shape[1]
    for index in range(length):
        for got, want in zip(step(x, state, index), srm_core.recurrent_step(x, state, *weights, index), strict=True):
            assert torch.equal(got, want)
    assert counter.frame_count <= 3  # 0 and 1 are constants to torch.compile; then one for all


ran: list[str] = []


@pytest.fixture
def watched() -> Iterator[list[str]]:
    """The targets of the kernels that run."""
    from srm_core.registry import instrumented

    ran.clear()

    def wrap(target: str, function: Any) -> Any:
        def watch(*args: Any, **options: Any) -> Any:
            ran.append(target)
            return function(*args, **options)

        return watch

    with instrumented(wrap):
        yield ran


@pytest.mark.parametrize("compiled", [False, True])
def test_pinned(watched: list[str], compiled: bool) -> None:
    """A forward within use_backend("numpy") has numpy's backward, whatever is selected when that comes."""
    torch._dynamo.reset()
    loss = torch.compile(scan_loss, fullgraph=True, backend="aot_eager") if compiled else scan_loss
    gates, tokens = scan_arguments()
    with srm_core.use_backend("numpy"):
        first = loss(gates, tokens)
    with srm_core.use_backend("reference"):
        second = loss(gates, tokens)
        watched.clear()
        first.backward()
    assert {t.partition(".scan")[0].split(":")[0] for t in watched} == {"srm_backends.numpy"}
    watched.clear()
    with srm_core.use_backend("numpy"):
        second.backward()
    assert watched
    assert all(t.startswith("srm_backends.reference") for t in watched)


def test_backward_of_another_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin's kernel with a backward is differentiable, without a line of torch in it."""
    import types

    import srm_backends.numpy.scan as kernels

    from srm_core.registry import local_plugin
    from srm_core.spec import BackendInfo, Kernel

    module = types.ModuleType("mine")
    info = BackendInfo("mine", "numpy", (Kernel("scan", "mine:forward", "mine:backward"),))
    module.srm_backend_info = srm_core.hookimpl(lambda: info)  # type: ignore[attr-defined]
    module.forward, module.backward = kernels.forward, kernels.backward  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "mine", module)
    gates, tokens = scan_arguments()
    want = torch.autograd.grad(scan_loss(gates, tokens), (gates, tokens))
    with local_plugin("mine", module), srm_core.use_backend("mine"):
        got = torch.autograd.grad(scan_loss(gates, tokens), (gates, tokens))
        same(list(got), list(want), 1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_deterministic_as_torch_says(monkeypatch: pytest.MonkeyPatch, gradient: bool, compiled: bool) -> None:
    """torch's own switch leaves out what is not declared deterministic, as our policy does; not if it only warns."""
    import types

    import srm_backends.numpy.scan as kernels

    from srm_core.registry import local_plugin
    from srm_core.spec import BackendInfo, Kernel

    module = types.ModuleType("loose")
    info = BackendInfo("loose", "numpy", (Kernel("scan", "loose:forward", "loose:backward", deterministic=False),))
    module.srm_backend_info = srm_core.hookimpl(lambda: info)  # type: ignore[attr-defined]
    module.forward, module.backward = kernels.forward, kernels.backward  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "loose", module)
    gates, tokens = scan_arguments()
    if not gradient:
        gates, tokens = gates.detach(), tokens.detach()
    torch._dynamo.reset()
    run = torch.compile(srm_core.scan, fullgraph=True, backend="aot_eager") if compiled else srm_core.scan
    with local_plugin("loose", module), srm_core.use_backend("loose"):
        run(gates, tokens)
        for warn_only in (False, True):
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
            try:
                if warn_only:
                    run(gates, tokens)
                else:
                    with pytest.raises(srm_core.NoBackendError, match="deterministic"):
                        run(gates, tokens)
                    with srm_core.use_backend("loose,numpy"):
                        y, _ = run(gates, tokens)
                        if gradient:
                            y.sum().backward()
            finally:
                torch.use_deterministic_algorithms(False)
        run(gates, tokens)


def test_no_backward() -> None:
    """Gradients of a kernel without a backward are an error that says so, not a constant."""
    gates, tokens = scan_arguments()
    (x, state, *rest), _ = sample(SPECS["recurrent_step_"], gradient=False)
    with pytest.raises(srm_core.ContractError, match="x: found a tensor that requires grad"):
        srm_core.recurrent_step_(x.requires_grad_(), state, *rest)
    decision = srm_core.explain("scan", gates, tokens)
    assert decision.chosen == "torch"


def test_double_backward() -> None:
    """The torch backend's gradients can be differentiated; numpy's say that they cannot."""
    gates, tokens = scan_arguments(dtype=torch.float64)
    with srm_core.use_backend("torch"):
        assert torch.autograd.gradgradcheck(lambda g, x: srm_core.scan(g, x)[0], (gates, tokens))
    with srm_core.use_backend("numpy"):
        (first,) = torch.autograd.grad(scan_loss(gates, tokens), gates, create_graph=True)
        with pytest.raises(srm_core.KernelError, match="'numpy' cannot be differentiated again"):
            first.sum().backward()
        y, _ = srm_core.scan(
            gates, gates.cos()
        )  # where the gradient of y is a constant, and the rest is known to torch
        (first,) = torch.autograd.grad(y.sum(), gates, create_graph=True)
        with pytest.raises(srm_core.KernelError, match="cannot be differentiated again"):
            torch.autograd.grad(first.sum(), gates)


def test_written_to_before_the_backward(backend: str) -> None:
    """torch's own check of versions holds: a saved tensor that was changed is an error."""
    gates, tokens = scan_arguments()
    gates = gates * 1
    loss = scan_loss(gates, tokens)
    gates.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_some_gradients(backend: str) -> None:
    """Only what is asked for has a gradient."""
    gates, tokens = scan_arguments()
    scan_loss(gates.detach(), tokens).backward()
    assert gates.grad is None
    assert tokens.grad is not None
    with torch.no_grad():
        assert not srm_core.scan(gates, tokens)[0].requires_grad


def test_checkpoint(backend: str) -> None:
    """torch.utils.checkpoint runs the forward again and gets the same gradients."""
    from torch.utils.checkpoint import checkpoint

    gates, tokens = scan_arguments()
    want = torch.autograd.grad(scan_loss(gates, tokens), (gates, tokens))
    same(
        list(torch.autograd.grad(checkpoint(scan_loss, gates, tokens, use_reentrant=False), (gates, tokens))),
        list(want),
    )


def test_saved_tensors() -> None:
    """What scan keeps between its passes: the gates and the states, and nothing of their size besides."""
    gates, tokens = scan_arguments()
    kept: dict[int, int] = {}

    def pack(t: Any) -> Any:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    for name, limit in (("torch", 2), ("numpy", 3)):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), srm_core.use_backend(name):
            srm_core.scan(gates, tokens)
        assert sum(kept.values()) <= limit * gates.nbytes + 256


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast(compiled: bool, backend: str) -> None:
    """Operators of matrix products run in autocast's dtype, recurrences in the widest of their activations."""
    torch._dynamo.reset()
    wrap = torch.compile(fullgraph=True, backend="aot_eager") if compiled else lambda f: f
    attention, scan = wrap(lambda *a: srm_core.attention(*a)), wrap(lambda *a: srm_core.scan(*a))
    query = torch.rand(1, 2, 5, 4, requires_grad=True)
    gates, tokens = scan_arguments()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(query, query, query)
        y, final = scan(gates, tokens)
        half, _ = scan(gates, tokens.detach().bfloat16())
    assert (out.dtype, y.dtype, final.dtype, half.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
        torch.bfloat16,
    )
    out.float().sum().backward()
    assert query.grad is not None
    assert query.grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(srm_core.ContractError, match="gates: found shape"):
        srm_core.scan(gates, tokens[:, :3])


def test_mixed_activations_under_autocast() -> None:
    """What autocast has made of two activations is brought together, which without it is an error."""
    z = torch.rand(3, 4)
    with pytest.raises(srm_core.ContractError):
        srm_core.mdi(z, z, z.bfloat16(), z)
    with torch.autocast("cpu", torch.bfloat16):
        h, gamma = srm_core.mdi(z, z, z.bfloat16(), z)
    assert (h.dtype, gamma.dtype) == (torch.float32, torch.float32)


def test_vmap(backend: str) -> None:
    """vmap folds a new axis into the batch, or calls for each example, with one result."""
    gates, tokens = (torch.rand(4, 2, 5, 3) for _ in range(2))
    want = torch.stack([srm_core.scan(g, x)[0] for g, x in zip(gates, tokens, strict=True)])
    same([torch.func.vmap(lambda g, x: srm_core.scan(g, x)[0])(gates, tokens)], [want])
    moved = gates.movedim(0, 2), tokens.movedim(0, 1)
    same([torch.func.vmap(lambda g, x: srm_core.scan(g, x)[0], in_dims=(2, 1))(*moved)], [want])
    one = gates[0, :1, :1]
    want = torch.stack([srm_core.scan(one, x)[0] for x in tokens])
    same([torch.func.vmap(lambda x: srm_core.scan(one, x)[0])(tokens)], [want])
    (x, weight, bias, decay, mode, *_), _ = sample(SPECS["recurrent_mix"], gradient=False)
    weights = torch.stack([weight, 2 * weight])
    want = torch.stack([srm_core.recurrent_mix(x, w, bias, decay, mode)[0] for w in weights])
    same([torch.func.vmap(lambda w: srm_core.recurrent_mix(x, w, bias, decay, mode)[0])(weights)], [want])


def test_func_grad(backend: str) -> None:
    """Gradients of each example by torch.func, against a loop."""
    gates, tokens = (torch.rand(4, 2, 5, 3) for _ in range(2))
    got = torch.func.vmap(torch.func.grad(scan_loss, argnums=(0, 1)))(gates, tokens)
    pairs = [torch.func.grad(scan_loss, argnums=(0, 1))(g, x) for g, x in zip(gates, tokens, strict=True)]
    same(list(got), [torch.stack(column) for column in zip(*pairs, strict=True)])
    g, x = gates[0].requires_grad_(), tokens[0].requires_grad_()
    same(list(pairs[0]), list(torch.autograd.grad(scan_loss(g, x), (g, x))))


def test_fake_tensors() -> None:
    """Tensors without values have the shapes, dtypes and strides of the results."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 3, 8, 8).to(memory_format=torch.channels_last)
        y = srm_core.conv_bn(x, torch.empty(4, 3, 3, 3), None, torch.empty(4), torch.empty(4), None, None)
        levels = srm_core.hds_pool(torch.empty(2, 16, 3), num_levels=3, pool=2)
    assert y.shape == (2, 4, 6, 6)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert [tuple(level.shape) for level in levels] == [(2, 8, 3), (2, 4, 3)]


def test_a_wrong_call_while_compiling() -> None:
    """The contract's words are in what torch.compile reports."""
    torch._dynamo.reset()
    gates, tokens = scan_arguments()
    compiled = torch.compile(scan_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"gates: found shape \(2, 7, 2\)"):
        compiled(gates[..., :2].detach(), tokens)
