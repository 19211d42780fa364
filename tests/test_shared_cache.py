"""States in shared memory: threads, processes of every kind, the lock, and that nothing is left behind."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
# ruff: noqa: E402

from srm_core import ContractError
from srm_core.nn import RecurrentMLPMixer, SharedCache

SEGMENTS = Path("/dev/shm")
THREADS, PROCESSES, TURNS = 8, 4, 60
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks at /dev/shm"),
    # Python 3.12 and newer warn of every fork beside threads, which torch always has.
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def nothing_left():
    before = set(SEGMENTS.iterdir())
    yield
    gc.collect()
    assert {p.name for p in set(SEGMENTS.iterdir()) - before if p.name.startswith(("psm_", "srm_test"))} == set()


def exists(name: str) -> bool:
    return (SEGMENTS / name).exists()


def python(code: str, *, fails: bool = False) -> subprocess.CompletedProcess[str]:
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert fails or run.returncode == 0, run.stderr
    return run


def mixer(**variant) -> RecurrentMLPMixer:
    torch.manual_seed(0)
    return RecurrentMLPMixer(11, 8, 64, 2, heads=2, mixed_heads=True, decay=True, **variant).double()


def texts(rows: int):
    return torch.from_numpy(np.random.default_rng(0).integers(0, 11, (rows, TURNS)))


def decode(cache: SharedCache, row: int, model: RecurrentMLPMixer | None = None) -> None:
    """Read one text into one row, and count every turn. A process makes the model anew, threads share one."""
    model, ids = model or mixer(), texts(THREADS + PROCESSES)
    rows = cache.rows([row])
    with torch.no_grad():
        for t in range(TURNS):
            model.step(ids[row : row + 1, t], rows)
            with cache.lock():
                count = cache.layers[-1][-1, 0, 0].item()
                time.sleep(0)  # invite the others
                cache.layers[-1][-1, 0, 0] = count + 1


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_threads_and_processes_lose_nothing(method):
    """8 threads and 4 processes, a row each, and a counter under the lock."""
    workers = THREADS + PROCESSES
    model = mixer()
    with model.shared_cache(workers + 1, lock=True) as cache:  # the last row is the counter's
        context = multiprocessing.get_context(method)
        processes = [context.Process(target=decode, args=(cache, THREADS + i)) for i in range(PROCESSES)]
        threads = [threading.Thread(target=decode, args=(cache, i, model)) for i in range(THREADS)]
        for worker in processes + threads:
            worker.start()
        for worker in processes + threads:
            worker.join(60)
        assert [p.exitcode for p in processes] == [0] * PROCESSES
        assert cache.layers[-1][-1, 0, 0].item() == workers * TURNS
        assert cache.positions.tolist() == [TURNS] * workers + [0]
        with torch.no_grad():
            _, expected = model.prefill(texts(workers))
        for layer, whole in zip(cache.layers, expected.layers, strict=True):
            torch.testing.assert_close(layer[:-1], whole, rtol=0, atol=1e-12)
        name = cache.name
    assert not exists(name)


def test_the_lock_is_what_keeps_the_count():
    """The counter of the test above does lose turns without it."""
    with SharedCache([(1, 1, 1)], torch.float64) as cache:
        counter, gate = cache.arrays[0], threading.Barrier(4)

        def work():
            gate.wait()
            for _ in range(50):
                count = counter[0, 0, 0]
                time.sleep(0)
                counter[0, 0, 0] = count + 1

        workers = [threading.Thread(target=work) for _ in range(4)]
        for w in workers:
            w.start()
        for w in workers:
            w.join()
        assert counter[0, 0, 0] < 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layout(dtype):
    shapes = [(5, 3, 7), (5, 1, 1), (5, 2, 9)]
    with SharedCache(shapes, dtype) as cache, SharedCache.attach(cache.name) as other:
        assert [tuple(t.shape) for t in cache.layers] == shapes == [a.shape for a in other.arrays]
        for tensor, array in zip(cache.layers, cache.arrays, strict=True):
            assert tensor.dtype == dtype
            assert tensor.data_ptr() % 64 == 0
            assert array.ctypes.data == tensor.data_ptr()
            assert not array.any()
        assert cache.positions.data_ptr() % 64 == 0
        for i, layer in enumerate(cache.layers):
            layer[:] = i + 1
        cache.positions[:] = 9
        for i, array in enumerate(other.arrays):
            assert (array == i + 1).all()
        other.reset([1, 4])
        assert cache.layers[2][:, 0, 0].tolist() == [3, 0, 3, 3, 0]
        assert cache.positions.tolist() == [9, 0, 9, 9, 0]


def test_rows_go_on_where_another_left_off():
    """A text begun through one attachment, continued through another, beside other rows."""
    model, ids = mixer(), texts(2)
    with torch.no_grad(), model.shared_cache(4) as cache:
        whole = model(ids)
        logits, rows = model.prefill(ids[:, :20], state=cache.rows([3, 1]))
        torch.testing.assert_close(logits, whole[:, :20], rtol=0, atol=1e-12)
        with SharedCache.attach(cache.name) as other:
            first, _ = model.step(ids[:1, 20], other.rows([3]))
            torch.testing.assert_close(first, whole[:1, 20], rtol=0, atol=1e-12)
            logits, _ = model.prefill(
                torch.stack([ids[0, 21:30], torch.cat([ids[1, 20:28], ids[1, :1]])]), [9, 8], other.rows([3, 1])
            )
            torch.testing.assert_close(logits[1, :8], whole[1, 20:28], rtol=0, atol=1e-12)
        assert rows.positions.tolist() == [30, 28]
        logits, _ = model.step(torch.stack([ids[0, 30], ids[1, 28]]), rows)
        torch.testing.assert_close(logits, torch.stack([whole[0, 30], whole[1, 28]]), rtol=0, atol=1e-12)
        assert all(not layer[[0, 2]].any() for layer in cache.layers)


def test_a_model_that_always_uses_one():
    model, ids = mixer(use_shared_cache=True), texts(2)
    with torch.no_grad():
        logits, rows = model.prefill(ids[:, :9])
        name = rows.cache.name
        assert exists(name)
        step, rows = model.step(ids[:, 9], rows)
        torch.testing.assert_close(step, model(ids)[:, 9], rtol=0, atol=1e-12)
    assert torch.equal(model.generate(ids[:, :5], 6, temperature=0), mixer().generate(ids[:, :5], 6, temperature=0))
    assert [p.name for p in SEGMENTS.glob("psm_*") if p.name == name] == [name]
    del rows
    assert not exists(name)


def test_a_half_model_keeps_its_states_in_float32():
    model = mixer().bfloat16()
    with torch.no_grad(), model.shared_cache(2) as cache:
        assert cache.layers[0].dtype == torch.float32
        logits, rows = model.prefill(texts(2)[:, :4], state=cache.rows())
        step, _ = model.step(texts(2)[:, 4], rows)
        assert step.dtype == torch.bfloat16
        assert cache.layers[1].any()


def test_an_unrelated_process_does_not_unlink():
    with SharedCache([(3, 2, 2)]) as cache:
        run = python(
            "from srm_core.nn import SharedCache\n"
            f"cache = SharedCache.attach({cache.name!r})\n"
            "cache.layers[0][1] = 5\n"
            "cache.close()\n"
            f"SharedCache.attach({cache.name!r}).layers[0][2] = 6"  # and one that is never closed
        )
        assert run.stderr == ""  # the resource tracker has nothing to say
        time.sleep(0.1)
        assert exists(cache.name)
        assert cache.layers[0][:, 0, 0].tolist() == [0, 5, 6]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_child_that_attaches_leaves_the_owners_entry(method):
    """The owner's tracker has one entry for both; were it taken out, the owner's close would complain."""
    code = (
        "import multiprocessing as mp, os, sys\n"
        "from srm_core.nn import SharedCache\n"
        "def child(name):\n"
        "    SharedCache.attach(name).close()\n"
        "if __name__ == '__main__':\n"
        "    with SharedCache([(2, 1, 1)]) as cache:\n"
        f"        p = mp.get_context({method!r}).Process(target=child, args=(cache.name,))\n"
        "        p.start(); p.join(); assert p.exitcode == 0\n"
        "        assert os.path.exists('/dev/shm/' + cache.name)\n"
        "    assert not os.path.exists('/dev/shm/' + cache.name)\n"
    )
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"srm_test_{os.getpid()}.py"  # spawn wants a file
    path.write_text(code)
    try:
        run = subprocess.run(
            [sys.executable, "-W", "ignore", str(path)], capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        path.unlink()
    assert (run.returncode, run.stderr) == (0, "")


def test_leaves_nothing_when_an_exception_flies():
    cache = SharedCache([(3, 2, 2)], lock=True)
    name = cache.name
    with pytest.raises(RuntimeError, match="flies"), cache, cache.lock():
        raise RuntimeError("flies")
    assert not exists(name)
    cache = SharedCache([(3, 2, 2)])
    name = cache.name
    del cache
    assert not exists(name)
    run = python("from srm_core.nn import SharedCache\nprint(SharedCache([(3, 2, 2)]).name)\n1 / 0", fails=True)
    assert "ZeroDivisionError" in run.stderr
    assert not exists(run.stdout.strip())
    run = python("from srm_core.nn import SharedCache\nkept = SharedCache([(3, 2, 2)])\nprint(kept.name)\n")
    assert run.stderr == ""
    assert not exists(run.stdout.strip())


def test_leaves_nothing_when_the_owner_is_killed():
    run = python(
        "import os, signal\nfrom srm_core.nn import SharedCache\n"
        "cache = SharedCache([(3, 2, 2)], lock=True)\n"
        "print(cache.name, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)",
        fails=True,
    )
    assert run.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while exists(run.stdout.strip()) and time.monotonic() < deadline:  # its resource tracker cleans up
        time.sleep(0.05)
    assert not exists(run.stdout.strip())


def hold_and_die(cache: SharedCache) -> None:
    with cache.lock():
        cache.layers[0][0] = 1
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_killed_child_takes_neither_the_lock_nor_the_cache(method):
    with SharedCache([(1, 1, 1)], lock=True) as cache:
        child = multiprocessing.get_context(method).Process(target=hold_and_die, args=(cache,))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        assert exists(cache.name)
        with cache.lock():
            assert cache.layers[0].item() == 1


def test_a_forked_child_that_ends_normally_does_not_unlink():
    run = python(
        "import os, sys, warnings\nwarnings.simplefilter('ignore')\nfrom srm_core.nn import SharedCache\n"
        "cache = SharedCache([(1, 1, 1)])\npid = os.fork()\n"
        "if pid == 0:\n    sys.exit(0)\n"  # runs the finalizers, also the cache's
        "os.waitpid(pid, 0)\nprint(os.path.exists('/dev/shm/' + cache.name))"
    )
    assert run.stdout.split()[-1] == "True"


def test_views_outlive_the_cache():
    cache = SharedCache([(2, 2, 2)])
    layer, array, name = cache.layers[0], cache.arrays[0], cache.name
    layer[:] = 3
    cache.close()
    cache.close()
    assert not exists(name)
    layer += 1
    assert array.sum() == 32
    with pytest.raises(ContractError, match="a cache that is closed"):
        _ = cache.layers
    with pytest.raises(ContractError, match="a cache that is closed"), cache:
        pass
    assert "closed" in repr(cache)


def test_memory_and_descriptors_are_given_back():
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    SharedCache([(1, 1, 1)]).close()
    before, kept = descriptors(), []
    for _ in range(20):
        with SharedCache([(1, 1, 1)], lock=True) as cache, SharedCache.attach(cache.name), cache.lock():
            kept.append(cache.layers[0])
    del cache
    kept.clear()
    SharedCache([(1, 1, 1)]).close()
    assert descriptors() <= before


def test_can_be_sent():
    with SharedCache([(2, 1, 1)], lock=True) as cache, pickle.loads(pickle.dumps(cache)) as other:
        assert (cache.owned, other.owned) == (True, False)
        with other.lock():
            other.layers[0][0] = 1
        assert cache.layers[0][0].item() == 1
        assert cache.name in repr(other)


def test_refuses():
    with pytest.raises(ContractError, match=r"no shared memory called 'srm_none'.*create it first"):
        SharedCache.attach("srm_none")
    with SharedCache([(2, 1, 1)], name="srm_test_taken") as cache:
        with pytest.raises(ContractError, match=r"'srm_test_taken', which is taken.*attach"):
            SharedCache([(2, 1, 1)], name="srm_test_taken")
        with (
            pytest.raises(ContractError, match=r"lock: found a cache without one; required SharedCache\(...,"),
            cache.lock(),
        ):
            pass
        for slots in ([0, 0], [2], [-1], [[0]], [0.5], [True]):
            with pytest.raises(ContractError, match="slots: found"):
                cache.rows(slots)
        assert len(cache.rows([]).slots) == 0
    stranger = SharedMemory(create=True, size=100, name="srm_test_other")
    try:
        for content in (
            b"",
            b"srmcache" + (2**60).to_bytes(8, "little"),
            b"srmcache" + (2).to_bytes(8, "little") + b"{}",
        ):
            stranger.buf[: len(content)] = content
            with pytest.raises(ContractError, match="'srm_test_other', which is no cache"):
                SharedCache.attach("srm_test_other")
    finally:
        stranger.close()
        stranger.unlink()
    for shapes in ([], [(2, 3)], [(2, 1, 1), (3, 1, 1)], [(2, -1, 1)]):
        with pytest.raises(ContractError, match="shapes: found"):
            SharedCache(shapes)
    with pytest.raises(ContractError, match=r"dtype: found torch.float16"):
        SharedCache([(2, 1, 1)], torch.float16)
    for name in ("", "a/b", "x" * 300):
        with pytest.raises(ContractError, match="name: found"):
            SharedCache([(2, 1, 1)], name=name)
    with SharedCache([(2, 1, 1)], lock=True) as cache, SharedCache.attach(cache.name) as other:
        cache.close()
        with pytest.raises(ContractError, match="a cache that its owner has closed"), other.lock():
            pass


def test_a_model_refuses_rows_that_are_not_its_own():
    model, ids = mixer(), texts(2)
    with torch.no_grad(), model.shared_cache(3) as cache:
        with pytest.raises(ContractError, match="found 3 rows; required 2"):
            model.step(ids[:, 0], cache.rows())
        with pytest.raises(ContractError, match="rows of another model's cache"):
            mixer().float().step(ids[:, 0], cache.rows([0, 1]))
        with SharedCache([(3, 2, 4)], torch.float64) as short, pytest.raises(ContractError, match="another model's"):
            model.prefill(ids, state=short.rows([0, 1]))
    with pytest.raises(ContractError, match="a model on meta; required one in host memory"):
        mixer().to("meta").shared_cache(2)
