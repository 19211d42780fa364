"""The memory of MM-Rec and the block around it, against the formulas in single operations."""

from __future__ import annotations

from typing import Any

import pytest

import srm_core

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from srm_core.nn import HierarchicalDataStructure, MemoryState, MMRecBlock, MultiMemoryAttention  # noqa: E402

each_backend = pytest.mark.parametrize("backend", ["torch", "numpy"])


def close(got: Any, want: Any, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def rand(*shape: int) -> Any:
    return torch.randn(*shape, dtype=torch.float64)


def block(**options: Any) -> Any:
    torch.manual_seed(0)
    return MMRecBlock(8, num_heads=2, slots=16, num_levels=2, **options).double()


def equal(one: Any, other: Any) -> None:
    """Two states, or banks."""
    for a, b in zip(one, other, strict=True):
        if isinstance(a, tuple):
            equal(a, b)
        else:
            close(a, b)


# The bank


@each_backend
@pytest.mark.parametrize("steps", [1, 5, 8, 12, 30])
def test_writes_are_a_ring(backend: str, steps: int) -> None:
    """As one by one, with the levels that pooling afresh gives."""
    torch.manual_seed(0)
    hierarchy = HierarchicalDataStructure(num_levels=3, pool=2)
    bank = hierarchy.empty(2, 11, 3, value_width=4, dtype=torch.float64)
    keys, values = rand(2, 11, 3), rand(2, 11, 4)
    bank.pointer.copy_(torch.tensor([4, 9]))
    at = bank.pointer.clone()
    with srm_core.use_backend(backend):
        for part in (slice(0, 3), slice(3, steps + 3)):
            new = rand(2, len(range(*part.indices(steps + 3))), 3), rand(2, len(range(*part.indices(steps + 3))), 4)
            hierarchy.write_(bank, *new)
            for t in range(new[0].shape[1]):
                for b in range(2):
                    slot = int(at[b]) % 11
                    keys[b, slot], values[b, slot] = new[0][b, t], new[1][b, t]
                at = at + 1
    assert bank.pointer.tolist() == (at % 11).tolist()
    written = torch.zeros(2, 11, dtype=torch.bool)
    for b, start in enumerate((4, 9)):
        written[b, [(start + i) % 11 for i in range(min(11, steps + 3))]] = True
    close(bank.keys, torch.where(written[:, :, None], keys, 0))
    afresh = hierarchy.over(bank.keys, bank.values)
    equal(bank.key_levels, afresh.key_levels)
    equal(bank.value_levels, afresh.value_levels)


def test_lengths_end_what_is_written() -> None:
    torch.manual_seed(0)
    hierarchy = HierarchicalDataStructure(num_levels=2, pool=2)
    lengths, new = torch.tensor([7, 0, 3, 2]), (rand(4, 7, 3), rand(4, 7, 3))
    new[0][torch.arange(7) >= lengths[:, None]] = torch.nan
    bank = hierarchy.over(rand(4, 5, 3), rand(4, 5, 3))
    each = [hierarchy.over(bank.keys[b : b + 1].clone(), bank.values[b : b + 1].clone()) for b in range(4)]
    hierarchy.write_(bank, *new, lengths)
    for b, alone in enumerate(each):
        n = int(lengths[b])
        hierarchy.write_(alone, new[0][b : b + 1, :n], new[1][b : b + 1, :n])
        close(bank.keys[b], alone.keys[0])
        close(bank.value_levels[0][b], alone.value_levels[0][0])
        assert bank.pointer[b] == alone.pointer[0]


@each_backend
def test_a_level_is_read_as_it_is_stored(backend: str) -> None:
    torch.manual_seed(0)
    hierarchy = HierarchicalDataStructure(num_levels=2, pool=4)
    bank, query = hierarchy.over(rand(2, 16, 6), rand(2, 16, 6)), rand(2, 3, 5, 2)
    with srm_core.use_backend(backend):
        for level, (keys, values) in enumerate([(bank.keys, bank.values), (bank.key_levels[0], bank.value_levels[0])]):
            k, v = (a.unflatten(-1, (3, 2)).transpose(1, 2) for a in (keys, values))
            want = (query @ k.transpose(-1, -2) * 2**-0.5).softmax(-1) @ v
            close(hierarchy(query, bank, level), want)
        close(hierarchy(query, bank), hierarchy(query, bank, 1))


def test_the_attention_reads_a_bank() -> None:
    """As it reads keys and values, where these have been pooled."""
    torch.manual_seed(0)
    attention = MultiMemoryAttention(8, 2, num_levels=2).double()
    keys, values, query = rand(3, 16, 8), rand(3, 16, 8), rand(3, 4, 8)
    close(attention(query, attention.hierarchy.over(keys, values)), attention(query, keys, values))
    assert set(attention.state_dict()) == {"W_q.weight", "W_q.bias", "W_o.weight", "W_o.bias"}


def test_states_are_values() -> None:
    state = block().initial_state(2)
    moved = state.to(dtype=torch.float32)
    assert moved.h.dtype is torch.float32
    assert moved.bank.key_levels[0].dtype is torch.float32
    assert moved.bank.pointer.dtype is torch.int64
    other = state.clone()
    other.bank.keys.fill_(1)
    other.h.fill_(2)
    other.bank.pointer.fill_(3)
    assert not state.bank.keys.any()
    anew = other.reset(torch.tensor([True, False]))
    assert anew.bank.keys.flatten(1).any(1).tolist() == [False, True]
    assert anew.bank.pointer.tolist() == [0, 3]
    assert not other.reset().h.any()
    assert isinstance(other.detach(), MemoryState)


# The block


def plainly(module: Any, x: Any, size: int) -> Any:
    """The block in single operations, from nothing; segments of `size` steps."""
    batch, steps, width = x.shape
    h, outputs = x.new_zeros(batch, width), []
    memory = [x.new_zeros(batch, module.slots, width) for _ in "kv"]
    for start in range(0, steps, size):
        part = x[:, start : start + size]
        z = module.W_z(module.norm_in(part))
        pooled = [a.unflatten(1, (-1, 4)).mean(2).unflatten(-1, (2, -1)).transpose(1, 2) for a in memory]
        q = module.memory.W_q(z).unflatten(-1, (2, -1)).transpose(1, 2)
        weights = (q @ pooled[0].transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        context = module.memory.W_o((weights @ pooled[1]).transpose(1, 2).flatten(2))
        gamma = torch.sigmoid(module.mdi.W_gamma(z)) * torch.sigmoid(module.mdi.W_context(context))
        gamma, states = gamma.clamp(1e-6, 1 - 1e-6), []
        for t in range(part.shape[1]):
            g = torch.sigmoid(module.mdi.W_g(torch.cat([z[:, t], h], -1)))
            mixed = (1 - g) * h + g * z[:, t] + gamma[:, t] * h
            h = z[:, t] * torch.sigmoid(module.W_gate(h)) + gamma[:, t] * h + module.mix * mixed
            states.append(h)
        states = torch.stack(states, 1)
        y = part + module.W_out(module.norm_out(states + context))
        outputs.append(y + module.ffn(module.norm_ffn(y)))
        memory = [a.clone() for a in memory]
        for t in range(part.shape[1]):
            for a, new in zip(memory, (z, states), strict=True):
                a[:, (start + t) % module.slots] = new[:, t].detach()
    return torch.cat(outputs, 1), h


@each_backend
@pytest.mark.parametrize("segment", [1, 4, None])
def test_the_block_is_its_formula(backend: str, segment: int | None) -> None:
    """Values, and gradients of x and every parameter."""
    module, x = block(segment=segment), rand(2, 10, 8).requires_grad_()
    leaves = [x, *module.parameters()]
    with srm_core.use_backend(backend):
        y, state = module(x)
        got = torch.autograd.grad(y.square().sum() + state.h.sum(), leaves)
    want, h = plainly(module, x, segment or 10)
    close(y, want)
    close(state.h, h)
    for a, b in zip(got, torch.autograd.grad(want.square().sum() + h.sum(), leaves), strict=True):
        close(a, b, 1e-9)


@torch.no_grad()
def test_chunks_of_whole_segments_are_the_whole() -> None:
    module, x = block(segment=3), rand(2, 20, 8)
    whole, end = module(x)
    state, parts = None, []
    for part in (x[:, :6], x[:, 6:9], x[:, 9:]):
        y, state = module(part, state)
        parts.append(y)
    close(torch.cat(parts, 1), whole)
    equal(state, end)


@torch.no_grad()
def test_without_writing_any_chunks_are_the_whole() -> None:
    module, x = block(), rand(2, 11, 8)
    _, before = module(rand(2, 9, 8))
    whole, end = module(x, before, write=False)
    first, state = module(x[:, :4], before, write=False)
    second, state = module(x[:, 4:], state, write=False)
    close(torch.cat([first, second], 1), whole)
    equal(state, end)
    equal(state.bank, before.bank)


@torch.no_grad()
def test_lengths_of_a_batch_are_sequences_alone() -> None:
    module, lengths = block(segment=4), torch.tensor([10, 0, 3])
    x = rand(3, 10, 8)
    x[torch.arange(10) >= lengths[:, None]] = torch.nan
    y, state = module(x, lengths=lengths)
    for b, n in enumerate(lengths.tolist()):
        alone, end = module(x[b : b + 1, :n])
        close(y[b, :n], alone[0])
        assert not y[b, n:].any()
        close(state.h[b], end.h[0])
        close(state.bank.values[b], end.bank.values[0])
        assert state.bank.pointer[b] == end.bank.pointer[0]


def test_the_given_state_stays_or_is_written_in_place() -> None:
    module, x = block(), rand(2, 5, 8)
    given = module.initial_state(2)
    kept = given.clone()
    _, after = module(x, given)
    equal(given, kept)
    assert after.bank.keys.any()
    with torch.no_grad():
        _, same = module(x, given, inplace=True)
    assert same.bank.keys is given.bank.keys
    close(given.bank.keys, after.bank.keys)


def test_training_over_several_calls() -> None:
    """A backward through two calls sees no memory that was written to since; detach() ends it."""
    module, x = block(segment=2), rand(2, 6, 8)
    y, state = module(x)
    z, state = module(x, state)
    (y.sum() + z.sum()).backward()
    assert all(p.grad is not None for p in module.parameters())
    y, state = module(x, state.detach())
    y.sum().backward()


def test_no_steps() -> None:
    module = block()
    state = module.initial_state(2)
    y, after = module(rand(2, 0, 8), state)
    assert y.shape == (2, 0, 8)
    equal(after, state)


def test_compile() -> None:
    torch._dynamo.reset()
    module, x = block(segment=4), rand(2, 8, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    y, state = compiled(x)
    want, after = module(x)
    close(y, want)
    equal(state, after)


def test_it_learns() -> None:
    """To tell what came eight steps before, which a state of its own has to keep."""
    torch.manual_seed(0)
    module = nn.ModuleList([MMRecBlock(16, 2, slots=16, num_levels=2), nn.Linear(16, 4)])
    embedding = nn.Embedding(4, 16)
    optim = torch.optim.Adam([*module.parameters(), *embedding.parameters()], lr=1e-2)
    losses = []
    for _ in range(60):
        ids = torch.randint(4, (32, 4))
        y, _ = module[0](embedding(ids))
        loss = nn.functional.cross_entropy(module[1](y[:, 3]), ids[:, 0])
        optim.zero_grad()
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MMRecBlock(8, 2, slots=3), "slots: found 3 for 3 levels in pools of 4; required at least 16"),
        (lambda: MMRecBlock(8, 2, segment=0), "segment: found 0"),
        (lambda: block()(rand(2, 3, 7)), r"x: found shape \(2, 3, 7\); required \(B, T, 8\)"),
        (lambda: block()(rand(2, 3, 8), block().initial_state(3)), "state: found h of shape"),
        (lambda: block()(rand(2, 3, 8), inplace=True), "inplace: found True with gradients enabled"),
        (lambda: HierarchicalDataStructure(pool=0), "pool: found 0; required a positive integer"),
        (lambda: HierarchicalDataStructure(2)(rand(1, 1, 1, 2), HierarchicalDataStructure(1).empty(1, 4, 2)), "level"),
        (lambda: HierarchicalDataStructure(2).over(rand(1, 4, 2), rand(2, 4, 2)), "values: found shape"),
        (lambda: MultiMemoryAttention(8, 2).double()(rand(1, 3, 8), rand(9, 8)), "values: found None"),
    ],
)
def test_errors(make: Any, said: str) -> None:
    with pytest.raises(srm_core.ContractError, match=said):
        make()
