"""Threads, tasks and forks: nobody sees another's choice, and nobody waits for the dead."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import srm_core
from srm_core import registry as registry_module

pytestmark = pytest.mark.usefixtures("environ")

THREADS = 16
MANY = """
one, two, three = constant(1), constant(2), constant(3)

@hookimpl
def srm_backend_info():
    return [BackendInfo(n, "test", (Kernel("scan", f"many:{n}"),)) for n in ("one", "two", "three")]
"""
NUMBER = {"one": 1, "two": 2, "three": 3}


@pytest.fixture
def many(plugin: Any) -> None:
    """Three backends whose results are 1, 2 and 3."""
    plugin("many", MANY)


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(work: Callable[[int], Any]) -> list[Any]:
    """work(i) in as many threads, begun at once; the first exception is raised here."""
    barrier = threading.Barrier(THREADS, timeout=20)

    def begin(i: int) -> Any:
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS)))


def ran(arrays: Any, **options: Any) -> int:
    """The number of the backend that ran."""
    y, _ = srm_core.scan(*arrays, **options)
    assert (y == y.flat[0]).all()
    return int(y.flat[0])


@pytest.mark.usefixtures("many", "busy")
def test_threads(arrays: Any) -> None:
    """Threads that switch backends all the time get each their own."""
    names = list(NUMBER)

    def work(i: int) -> None:
        for k in range(100):
            mine, inner = names[(i + k) % 3], names[(i + 2 * k + 1) % 3]
            part = [a[:, : 1 + k % 3] for a in arrays]
            with srm_core.use_backend(mine):
                assert ran(part) == NUMBER[mine]
                with srm_core.use_backend(inner):
                    assert ran(part) == NUMBER[inner]
                assert ran(part) == NUMBER[mine]
                assert ran(part, backend=inner) == NUMBER[inner]

    together(work)


@pytest.mark.usefixtures("many")
def test_a_new_thread_starts_afresh(arrays: Any) -> None:
    """An override is its own thread's; the environment is everybody's."""
    with srm_core.use_backend("one"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(srm_core.explain, "scan", *arrays).result().source == "default"
        assert ran(arrays) == 1


@pytest.mark.usefixtures("many")
def test_tasks(arrays: Any) -> None:
    """So do tasks that take turns in the middle of their blocks; a child has its parent's choice."""
    names = list(NUMBER)

    async def child(expected: int) -> None:
        assert ran(arrays) == expected
        with srm_core.use_backend("three"):
            await asyncio.sleep(0)
            assert ran(arrays) == 3

    async def work(i: int) -> None:
        mine = names[i % 3]
        with srm_core.use_backend(mine):
            for k in range(5):
                await asyncio.sleep(0.001 * ((i + k) % 3))
                assert ran(arrays) == NUMBER[mine]
                await asyncio.create_task(child(NUMBER[mine]))
        assert srm_core.explain("scan", *arrays).source == "default"

    async def main() -> None:
        await asyncio.gather(*(work(i) for i in range(200)))

    asyncio.run(main())


@pytest.mark.usefixtures("many", "busy")
def test_policies_of_threads(arrays: Any) -> None:
    """Precision and determinism are as local as the backend."""

    def work(i: int) -> None:
        from srm_core.config import CURRENT

        for _ in range(50):
            with srm_core.precision("tf32" if i % 2 else "ieee"), srm_core.deterministic(bool(i % 3)):
                ran(arrays, backend="one")
                assert (CURRENT.get().precision == "tf32", CURRENT.get().deterministic) == (bool(i % 2), bool(i % 3))

    together(work)


@pytest.mark.usefixtures("busy")
def test_first_use(monkeypatch: pytest.MonkeyPatch, arrays: Any) -> None:
    """Threads that all come first build one registry."""
    built = []

    class Slow(registry_module.Registry):
        def __init__(self) -> None:
            built.append(threading.get_ident())
            time.sleep(0.05)
            super().__init__()

    monkeypatch.setattr(registry_module, "Registry", Slow)
    monkeypatch.setattr(registry_module, "_registry", None)
    found = together(lambda i: (srm_core.scan(*arrays), registry_module.registry())[1])
    assert len(built) == 1
    assert len(set(map(id, found))) == 1


@pytest.mark.usefixtures("many", "busy")
def test_reload_among_calls(arrays: Any) -> None:
    """Calls go on while the registry is read again."""
    done = threading.Event()

    def work(i: int) -> None:
        if i == 0:
            for _ in range(8):
                srm_core.reload_config()
            done.set()
            return
        name = list(NUMBER)[i % 3]
        while not done.is_set():
            assert ran(arrays, backend=name) == NUMBER[name]

    together(work)


def test_reload_reaches_other_threads(environ: Any, arrays: Any) -> None:
    """After reload_config has returned, no thread gets an older answer."""
    with ThreadPoolExecutor(1) as pool:
        for name in ("reference", "numpy") * 3:
            environ(SRM_BACKEND=name)
            assert pool.submit(srm_core.explain, "scan", *arrays).result().chosen == name
            pool.submit(srm_core.scan, *arrays).result()


def test_same_results(arrays: Any) -> None:
    """The kernels keep nothing between calls that another thread could disturb."""
    rng = np.random.default_rng(3)
    inputs = [(rng.uniform(0, 1, (2, 40, 8)), rng.standard_normal((2, 40, 8))) for _ in range(THREADS)]
    expected = [srm_core.scan(*x)[0] for x in inputs]
    for got in together(lambda i: [srm_core.scan(*inputs[i])[0] for _ in range(20)]):
        assert any(np.array_equal(got[0], e) for e in expected)
        assert all(np.array_equal(g, got[0]) for g in got)


FORK = """
import os, signal, sys, threading, time
import numpy as np
import srm_core
from srm_core import registry as r

signal.alarm(30)
x = np.ones((2, 3, 4), np.float32)
{setup}
time.sleep(0.05)
for _ in range({forks}):
    child = os.fork()
    if child == 0:
        signal.alarm(10)  # a child that waits for a lock of a thread it does not have dies of this
        try:
            y, _ = srm_core.scan(x, x)
            srm_core.reload_config()
            with srm_core.use_backend("reference"):
                z, _ = srm_core.scan(x, x)
            os._exit(0 if (y == z).all() else 3)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(4)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
stop = True
print("done")
os._exit(0)
"""
BUSY = """
stop = False
def work():
    n = 0
    while not stop:
        n += 1
        a = np.ones((1, 1 + n % 50, 1))
        srm_core.scan(a, a, backend=("numpy", "reference", "numpy,auto")[n % 3])
        if n % 40 == 0:
            srm_core.reload_config()
threading.Thread(target=work, daemon=True).start()
"""
BUILDING = """
inside = threading.Event()
class Slow(r.Registry):
    def __init__(self):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            time.sleep(5)
        super().__init__()
r.Registry = Slow
threading.Thread(target=lambda: srm_core.scan(x, x), daemon=True).start()
inside.wait()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(("setup", "forks"), [(BUSY, 10), (BUILDING, 1)], ids=["dispatching", "building"])
def test_fork(run_python: Any, setup: str, forks: int) -> None:
    """The child of a fork dispatches, whatever another thread was doing, the registry's lock held or not."""
    assert run_python(FORK.format(setup=setup, forks=forks)).strip() == "done"
