"""The hierarchical memory against torch, the published module and pooling afresh; what an update may not touch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import srm_core
from srm_core.ops import SPECS

ORACLE = Path(__file__).parent / "oracle" / "mmrec_hds_attention.safetensors"
each_backend = pytest.mark.parametrize("backend", ["numpy", "reference"])
each_hierarchy = pytest.mark.parametrize(
    ("b", "h", "m", "num_levels", "pool"),  # without heads where h is 0
    [(1, 3, 37, 3, 4), (2, 0, 53, 4, 3), (2, 2, 70, 3, 5), (1, 2, 35, 6, 2), (2, 0, 9, 3, 1), (1, 0, 99, 2, 50)],
)
each_sharing = pytest.mark.parametrize(
    "shared", [(), ("keys",), ("values",), ("keys", "values")], ids=lambda s: "+".join(s) or "none"
)


def memory_of(rng: np.random.Generator, b: int, h: int, m: int, d: int = 5) -> np.ndarray:
    return rng.standard_normal((b, h, m, d) if h else (b, m, d))


def heads(a: np.ndarray, n: int) -> np.ndarray:
    """(B, T, H * D) as (B, H, T, D)."""
    return a.reshape(*a.shape[:2], n, -1).swapaxes(1, 2)


# the published module


@pytest.fixture(scope="module")
def oracle() -> dict[str, Any]:
    with safe_open(ORACLE, "numpy") as file:
        return {**{k: file.get_tensor(k) for k in file.keys()}, **file.metadata()}  # noqa: SIM118


@each_backend
@pytest.mark.parametrize("name", ["k", "v"])
def test_levels_are_those_of_mmrec(name: str, oracle: dict[str, Any], backend: str) -> None:
    memory = oracle[f"{name}_level0"]
    np.testing.assert_array_equal(memory[0], oracle[f"{name}_long"])
    levels = srm_core.hds_pool(memory, num_levels=int(oracle["levels"]), backend=backend)
    assert len(levels) == 2
    for i, level in enumerate(levels):
        np.testing.assert_allclose(level, oracle[f"{name}_level{i + 1}"], rtol=1e-12, atol=1e-15)


@each_backend
def test_a_query_is_the_attention_of_mmrec(oracle: dict[str, Any], backend: str) -> None:
    n = int(oracle["num_heads"])
    query = heads(oracle["query"] @ oracle["sd.W_q.weight"].T + oracle["sd.W_q.bias"], n)
    keys, values = (heads(oracle[f"{name}_long"][None], n) for name in "kv")
    out = srm_core.hds_query(query, keys, values, num_levels=int(oracle["levels"]), backend=backend)
    merged = out.swapaxes(1, 2).reshape(oracle["output"].shape)
    got = merged @ oracle["sd.W_o.weight"].T + oracle["sd.W_o.bias"]
    np.testing.assert_allclose(got, oracle["output"], rtol=1e-11, atol=1e-13)


# torch


def torch_levels(torch: Any, memory: Any, num_levels: int, pool: int) -> list[Any]:
    """(..., M, D) pooled by torch's own pooling, which drops a remainder too."""
    levels = [memory]
    for _ in range(1, num_levels):
        rows = levels[-1].transpose(-1, -2)
        flat = torch.nn.functional.avg_pool1d(rows.reshape(-1, 1, rows.shape[-1]), pool)
        levels.append(flat.reshape(*rows.shape[:-1], -1).transpose(-1, -2))
    return levels


@each_backend
@each_hierarchy
def test_pooling_and_its_gradient_are_those_of_torch(
    b: int, h: int, m: int, num_levels: int, pool: int, backend: str
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    memory = memory_of(rng, b, h, m)
    leaf = torch.tensor(memory, requires_grad=True)
    expected = torch_levels(torch, leaf, num_levels, pool)[1:]
    levels, pullback = srm_core.vjp("hds_pool", memory, num_levels=num_levels, pool=pool, backend=backend)
    assert isinstance(levels, tuple)
    grads = [rng.standard_normal(level.shape) for level in levels]
    for level, right in zip(levels, expected, strict=True):
        np.testing.assert_allclose(level, right.detach().numpy(), rtol=1e-13, atol=1e-15)
    sum((x * torch.tensor(g)).sum() for x, g in zip(expected, grads, strict=True)).backward()
    (d_memory,) = pullback(*grads)
    np.testing.assert_allclose(d_memory, leaf.grad.numpy(), rtol=1e-13, atol=1e-15)
    np.testing.assert_array_equal(pullback(*grads[:-1], None)[0], pullback(*grads[:-1], 0 * grads[-1])[0])


@each_backend
@each_sharing
@pytest.mark.parametrize(("level", "scale"), [(-1, None), (0, 0.4), (1, -1.5), (-2, None)])
def test_queries_and_their_gradients_are_those_of_torch(
    level: int, scale: float | None, shared: tuple[str, ...], backend: str
) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    batch = {n: 1 if n in shared else 3 for n in ("keys", "values")}
    shapes = ((3, 2, 7, 5), (batch["keys"], 2, 55, 5), (batch["values"], 2, 55, 6))
    args = [rng.standard_normal(s) for s in shapes]
    grad = rng.standard_normal((3, 2, 7, 6))
    leaves = [torch.tensor(a, requires_grad=True) for a in args]
    k, v = (torch_levels(torch, a, 3, 4)[level].expand(3, -1, -1, -1) for a in leaves[1:])
    expected = torch.nn.functional.scaled_dot_product_attention(leaves[0], k, v, scale=scale)
    expected.backward(torch.tensor(grad))
    out, pullback = srm_core.vjp("hds_query", *args, level=level, scale=scale, backend=backend)
    np.testing.assert_allclose(out, expected.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(out, srm_core.hds_query(*args, level=level, scale=scale, backend=backend))
    for got, leaf in zip(pullback(grad), leaves, strict=True):
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=1e-11, atol=1e-13)


# edges of queries and of pooling


@each_backend
def test_one_level_is_the_memory_alone(backend: str) -> None:
    memory = np.full((2, 3, 4), np.nan)  # which has no part in its gradient
    levels, pullback = srm_core.vjp("hds_pool", memory, num_levels=1, backend=backend)
    assert levels == srm_core.hds_pool(memory, num_levels=1, backend=backend) == ()
    (d_memory,) = pullback()
    assert d_memory.shape == memory.shape
    assert not d_memory.any()


@each_backend
def test_a_single_slot_at_the_top_is_what_every_step_gets(backend: str) -> None:
    rng = np.random.default_rng(2)
    query, keys, values = (rng.standard_normal(s) for s in ((2, 3, 5, 4), (2, 3, 17, 4), (2, 3, 17, 6)))
    out, pullback = srm_core.vjp("hds_query", query, keys, values, backend=backend)
    mean = values[:, :, :16].mean(2, keepdims=True)
    np.testing.assert_allclose(out, np.broadcast_to(mean, out.shape), rtol=1e-13, atol=1e-15)
    d_query, d_keys, d_values = pullback(np.ones_like(out))
    np.testing.assert_allclose(d_query, 0, atol=1e-14)
    np.testing.assert_allclose(d_keys, 0, atol=1e-14)
    np.testing.assert_allclose(d_values[:, :, :16], 5 / 16, rtol=1e-13)
    assert not d_values[:, :, 16].any()


@each_backend
def test_without_slots_a_query_gives_zeros(backend: str) -> None:
    query, none = np.ones((2, 3, 4, 5)), np.ones((1, 3, 0, 5))
    out, pullback = srm_core.vjp("hds_query", query, none, none, num_levels=1, backend=backend)
    assert out.shape == (2, 3, 4, 5)
    assert not out.any()
    assert [g.shape for g in pullback(out)] == [query.shape, none.shape, none.shape]
    assert not pullback(np.ones_like(out))[0].any()


@each_backend
def test_a_remainder_is_not_read(backend: str) -> None:
    memory = np.random.default_rng(3).standard_normal((2, 2, 39, 5))
    memory[:, :, 32:] = np.nan  # 39 -> 9 -> 2 slots, which stand for 32
    level_1, top = srm_core.hds_pool(memory, backend=backend)
    assert np.isfinite(level_1[:, :, :8]).all()
    assert np.isnan(level_1[:, :, 8]).all()
    assert np.isfinite(top).all()
    out, pullback = srm_core.vjp("hds_query", memory[:, :, :3], memory, memory, backend=backend)
    assert np.isfinite(out).all()
    for gradient in pullback(out):
        assert np.isfinite(gradient).all()
    assert not gradient[:, :, 32:].any()


def test_large_levels_are_summed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the work is cut, the result is the same to the last bit."""
    from srm_backends.numpy import hds

    memory = np.random.default_rng(4).standard_normal((3, 2, 67, 5)).astype("float32")
    whole = srm_core.hds_pool(memory, pool=3, backend="numpy")
    for block in (1, 16, 100, 1000):
        monkeypatch.setattr(hds, "BLOCK", block)
        for a, b in zip(srm_core.hds_pool(memory, pool=3, backend="numpy"), whole, strict=True):
            np.testing.assert_array_equal(a, b)


# updates


def fresh(memory: np.ndarray, num_levels: int, pool: int) -> list[np.ndarray]:
    return [memory, *srm_core.hds_pool(memory, num_levels=num_levels, pool=pool, backend="numpy")]


def written(memory: np.ndarray, new: np.ndarray, index: Any) -> np.ndarray:
    """memory with the new slots in it, one at a time."""
    memory = memory.copy()
    for b, first in enumerate(np.broadcast_to(index, len(memory))):
        for s in range(new.shape[-2]):
            memory[b][..., (int(first) + s) % memory.shape[-2], :] = new[b][..., s, :]
    return memory


@each_backend
@each_hierarchy
def test_an_update_is_writing_and_pooling_afresh(
    b: int, h: int, m: int, num_levels: int, pool: int, backend: str
) -> None:
    rng = np.random.default_rng(5)
    arrays = fresh(memory_of(rng, b, h, m), num_levels, pool)
    for s in (1, 0, 2, m // 2, m - 1, m, *rng.integers(0, m + 1, 10 if backend == "numpy" else 2)):
        new = memory_of(rng, b, h, int(s))
        for index in (int(rng.integers(-3 * m, 3 * m)), np.array(m - 1), rng.integers(-3 * m, 3 * m, b)):
            expected = fresh(written(arrays[0], new, index), num_levels, pool)
            assert srm_core.hds_update_(arrays[0], arrays[1:], new, index, pool=pool, backend=backend) is None
            for got, right in zip(arrays, expected, strict=True):
                np.testing.assert_allclose(got, right, rtol=1e-13, atol=1e-15)


def ancestors(touched: np.ndarray, m: int, num_levels: int, pool: int) -> list[np.ndarray]:
    """Which slots (B, M_l) of each level are above a touched one, by looking at every slot."""
    found = [touched]
    for _ in range(1, num_levels):
        m //= pool
        found.append(found[-1][:, : m * pool].reshape(len(touched), m, pool).any(-1))
    return found


@each_backend
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("index", [60, 17, np.array([60, 17])], ids=["around", "within", "array"])
def test_an_update_touches_ancestors_alone_and_reads_their_slots_alone(index: Any, dtype: str, backend: str) -> None:
    rng = np.random.default_rng(6)
    memory = rng.standard_normal((2, 3, 67, 4)).astype(dtype)
    before = [memory, *(a.astype(dtype) for a in fresh(memory.astype("float64"), 4, 3)[1:])]
    touched = np.zeros((2, 67), bool)
    for b, first in enumerate(np.broadcast_to(index, 2)):
        touched[b, (first + np.arange(9)) % 67] = True
    changes = ancestors(touched, 67, 4, 3)
    for level, (array, change) in enumerate(zip(before, changes, strict=True)):
        reads = change.copy()  # what is written, or averaged with something that is
        if level + 1 < len(changes):
            above = np.repeat(changes[level + 1], 3, axis=1)
            reads[:, : above.shape[1]] |= above
        array.swapaxes(1, 2)[~reads] = np.nan
    after = [a.copy() for a in before]
    srm_core.hds_update_(after[0], after[1:], np.ones((2, 3, 9, 4), dtype), index, pool=3, backend=backend)
    for old, new, change in zip(before, after, changes, strict=True):
        old, new = old.swapaxes(1, 2), new.swapaxes(1, 2)
        assert np.isfinite(new[change].astype("float32")).all()
        assert not np.array_equal(old[change], new[change])
        assert new[~change].tobytes() == old[~change].tobytes()


@each_backend
def test_refreshed_slots_are_means_of_the_stored_ones(backend: str) -> None:
    """Levels that are not those of the memory are not mended where nothing was written."""
    memory, level, top = np.zeros((1, 16, 1)), np.full((1, 4, 1), 8.0), np.full((1, 1, 1), 5.0)
    srm_core.hds_update_(memory, (level, top), np.full((1, 1, 1), 4.0), 6, backend=backend)
    assert level.ravel().tolist() == [8, 1, 8, 8]
    assert top.item() == 25 / 4


@each_backend
@pytest.mark.parametrize("index", [10**30 + 4, np.int64(-6), np.array(2**31 - 8, np.int32)], ids=str)
def test_any_integer_is_an_index(index: Any, backend: str) -> None:
    memory, new = np.zeros((1, 10, 1)), np.ones((1, 3, 1))
    srm_core.hds_update_(memory, (), new, index, backend=backend)
    np.testing.assert_array_equal(memory, written(np.zeros((1, 10, 1)), new, int(index) % 10))


@each_backend
def test_new_may_be_a_part_of_memory(backend: str) -> None:
    memory = np.arange(10.0).reshape(1, 10, 1)
    expected = written(memory, memory[:, :8], 5)
    levels = srm_core.hds_pool(memory, pool=2)
    srm_core.hds_update_(memory, levels, memory[:, :8], 5, pool=2, backend=backend)
    np.testing.assert_array_equal(memory, expected)
    np.testing.assert_array_equal(levels[1], srm_core.hds_pool(expected, pool=2)[1])


def test_levels_may_lie_beside_the_memory_in_one_array() -> None:
    arena = np.zeros((2, 16 + 4 + 1, 3))
    memory, level, top = arena[:, :16], arena[:, 16:20], arena[:, 20:]
    srm_core.hds_update_(memory, (level, top), np.ones((2, 16, 3)), 0)
    assert (arena == 1).all()
    with pytest.raises(srm_core.ContractError, match=r"levels\[1\].*shares memory with memory"):
        srm_core.hds_update_(memory, (level, memory[:, 3:4]), np.ones((2, 16, 3)), 0)


@each_backend
def test_a_refused_update_changes_nothing(backend: str) -> None:
    memory, levels = np.zeros((1, 16, 2)), (np.zeros((1, 4, 2)), np.zeros((1, 1, 2)))
    levels[1].flags.writeable = False
    with pytest.raises(srm_core.ContractError, match=r"levels\[1\].*read-only"):
        srm_core.hds_update_(memory, levels, np.ones((1, 3, 2)), 0, backend=backend)
    assert not memory.any()
    assert not levels[0].any()


def test_a_read_only_array_is_found_also_where_the_call_is_known() -> None:
    memory, new = np.zeros((1, 16, 2)), np.ones((1, 3, 2))
    levels = list(srm_core.hds_pool(memory))
    srm_core.hds_update_(memory, levels, new, 0)
    memory.flags.writeable = False
    with pytest.raises(srm_core.ContractError, match="memory: found a read-only array"):
        srm_core.hds_update_(memory, levels, new, 0)


def test_bound_calls() -> None:
    memory = np.random.default_rng(7).standard_normal((1, 16, 2))
    pool = srm_core.bind("hds_pool", memory, pool=2)
    levels = pool(memory)
    for got, expected in zip(levels, srm_core.hds_pool(memory, pool=2), strict=True):
        np.testing.assert_array_equal(got, expected)
    update = srm_core.bind("hds_update_", memory, levels, memory[:, :3], 0, pool=2)
    for index, given in ((5, list(levels)), (14, levels)):
        update(memory, given, np.ones((1, 3, 2)), index)
        for got, expected in zip(levels, srm_core.hds_pool(memory, pool=2), strict=True):
            np.testing.assert_array_equal(got, expected)
    query = srm_core.bind("hds_query", memory[None], memory[None], memory[None], level=1)
    np.testing.assert_array_equal(
        query(memory[None], memory[None], memory[None]), srm_core.hds_query(*[memory[None]] * 3, level=1)
    )


def test_explanations_name_a_backend_and_change_nothing() -> None:
    memory = np.ones((1, 1, 16, 2), np.float32)
    levels = srm_core.hds_pool(memory)
    assert srm_core.explain("hds_pool", memory, gradients=True).chosen == "numpy"
    assert srm_core.explain("hds_query", memory, memory, memory, gradients=True).chosen == "numpy"
    assert srm_core.explain("hds_update_", memory, list(levels), 0 * memory, 0).chosen == "numpy"
    assert (memory == 1).all()


@pytest.mark.parametrize(
    ("op", "flops", "size"),
    [
        # 37, 9 and 2 slots of 3 numbers in 2 sequences; 11 windows of 4
        ("hds_pool", 6 * 11 * 4, 4 * 6 * 48),
        # 5 slots from 9 on, below 2 slots and those below 1, in 2 sequences
        ("hds_update_", 6 * (5 + 3 * 4), 4 * 6 * (2 * 5 + 3 * 5)),
        # 3 heads, 2 sequences: the same 11 windows of 4 + 4 numbers; 5 queries of 2 slots
        ("hds_query", 6 * (11 * 4 * 8 + 2 * 5 * 2 * 8), 4 * 6 * (5 * 8 + 37 * 8)),
    ],
)
def test_work_is_what_a_hand_counts(op: str, flops: int, size: int) -> None:
    spec = SPECS[op]
    case = next(c for c in spec.cases if c.name == "small")
    assert (spec.flops(case), spec.bytes(case, "float32")) == (flops, size)


# torch's tensors on the backends of NumPy


@each_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("sequence", [tuple, list])
def test_tensors_of_torch(sequence: Any, dtype: str, backend: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(8)
    memory = rng.standard_normal((2, 3, 37, 4)).astype(dtype)
    new = rng.standard_normal((2, 3, 6, 4)).astype(dtype)

    def tensor(a: np.ndarray) -> Any:
        return torch.tensor(a.astype("float64")).to(getattr(torch, dtype))

    def assert_same(tensors: Any, arrays: Any) -> None:
        for a, b in zip(tensors, arrays, strict=True):
            assert isinstance(a, torch.Tensor)
            assert a.dtype == getattr(torch, dtype)
            np.testing.assert_array_equal(a.double().numpy(), b.astype("float64"))

    (memory_t, new_t), levels = (tensor(memory), tensor(new)), srm_core.hds_pool(memory, backend=backend)
    levels_t, pullback = srm_core.vjp("hds_pool", memory_t, backend=backend)
    assert_same(levels_t, levels)
    assert_same(srm_core.hds_pool(memory_t, backend=backend), levels)
    assert_same(pullback(*levels_t), srm_core.vjp("hds_pool", memory, backend=backend)[1](*levels))
    for index in (34, torch.tensor([3, -1]), torch.tensor(9, dtype=torch.int32)):
        held = sequence(levels_t)
        srm_core.hds_update_(memory_t, held, new_t, index, backend=backend)
        host = index if isinstance(index, int) else index.numpy()
        srm_core.hds_update_(memory, sequence(levels), new, host, backend=backend)
        assert_same((memory_t, *levels_t), (memory, *levels))
    bound = srm_core.bind("hds_update_", memory_t, sequence(levels_t), new_t, 0, backend=backend)
    bound(memory_t, sequence(levels_t), new_t, 20)
    srm_core.hds_update_(memory, levels, new, 20, backend=backend)
    assert_same((memory_t, *levels_t), (memory, *levels))
    out = srm_core.hds_query(new_t, memory_t, memory_t, backend=backend)
    assert_same([out], [srm_core.hds_query(new, memory, memory, backend=backend)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@each_backend
def test_updates_in_place_of_strided_tensors(dtype: str, backend: str) -> None:
    torch = pytest.importorskip("torch")
    arena = torch.zeros(2, 4, 16, 6, dtype=getattr(torch, dtype)).transpose(1, 2)[..., ::2]  # (2, 16, 4, 3)
    memory = arena.transpose(1, 2)
    levels = [torch.zeros(2, 4, n, 3, dtype=memory.dtype) for n in (4, 1)]
    srm_core.hds_update_(memory, levels, torch.ones(2, 4, 16, 3, dtype=memory.dtype), 7, backend=backend)
    assert all((a == 1).all() for a in (memory, arena, *levels))


def test_an_update_beside_a_memory_of_another_library() -> None:
    torch = pytest.importorskip("torch")
    memory, levels = np.zeros((1, 4, 2)), [np.zeros((1, 1, 2)), torch.zeros(1, 1, 2)]
    with pytest.raises(srm_core.ContractError, match=r"levels\[1\].*beside memory of numpy"):
        srm_core.hds_update_(memory, levels, memory, 0)
