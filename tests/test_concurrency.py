"""Many threads, tasks and forks at once: each gets its own choices, and every child of a fork can dispatch.

`test_threads` has the same questions one by one; here is the crowd.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import srm_core

pytestmark = pytest.mark.usefixtures("environ")

THREADS, TASKS = 64, 1000

# Three backends; a result holds all that its kernel was told: 100 * who + 10 * tf32 + deterministic.
TELLING = """
def telling(who):
    def scan(ctx, gates, tokens, initial_state, *, reverse, lengths):
        told = 100 * who + 10 * (ctx.precision == "tf32") + ctx.deterministic
        y = ctx.empty(tokens.shape, tokens.dtype)
        y[...] = told
        return y, ctx.zeros((tokens.shape[0], tokens.shape[2]), tokens.dtype)
    return scan

one, two, three = telling(1), telling(2), telling(3)

DENSE = Contiguous("tokens")

def dense(view):
    return [] if view[DENSE] else [Reason("layout", "takes dense tokens")]

@hookimpl
def srm_backend_info():
    kernels = [Kernel("scan", f"telling:{n}") for n in ("one", "two", "three")]
    picky = Kernel("scan", "telling:one", supports="telling:dense", features=(DENSE,))
    return [BackendInfo(n, "test", (k,)) for n, k in zip(("one", "two", "three", "picky"), (*kernels, picky))]
"""
NAMES = ("one", "two", "three")
CHOICES = [
    (name, precision, deterministic)
    for name, precision, deterministic in itertools.product(NAMES, ("ieee", "tf32"), (False, True))
]
X = [np.ones((1, t, 2), np.float32) for t in range(1, 5)]


@pytest.fixture
def telling(plugin: Any) -> None:
    plugin("telling", TELLING)


@pytest.fixture
def busy() -> Iterator[None]:
    """Threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def told(k: int, **options: Any) -> int:
    """What the kernel of the k-th call was told."""
    x = X[k % len(X)]
    y, _ = srm_core.scan(x, x, **options)
    assert (y == y[0, 0, 0]).all()
    return int(y[0, 0, 0])


def code(choice: tuple[str, str, bool]) -> int:
    name, precision, deterministic = choice
    return 100 * (NAMES.index(name) + 1) + 10 * (precision == "tf32") + deterministic


@contextmanager
def chosen(choice: tuple[str, str, bool]) -> Iterator[int]:
    """All three choices are in force; gives what a kernel must be told."""
    name, precision, deterministic = choice
    with srm_core.use_backend(name), srm_core.precision(precision), srm_core.deterministic(deterministic):
        yield code(choice)


def crowd(work: Callable[[int], None], threads: int = THREADS) -> None:
    """work(i) in so many threads that begin at once; the first exception is raised here."""
    barrier = threading.Barrier(threads, timeout=30)

    def begin(i: int) -> None:
        barrier.wait()
        work(i)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(begin, range(threads)))


@pytest.mark.usefixtures("telling", "busy")
def test_threads() -> None:
    """Each thread's backend, precision and determinism are its own, nested and one after another."""

    def work(i: int) -> None:
        for k in range(25):
            outer, inner = CHOICES[(i + k) % 12], CHOICES[(5 * i + 7 * k) % 12]
            with chosen(outer) as expected:
                assert told(k) == expected
                with chosen(inner) as expected_inside:
                    assert told(k + i) == expected_inside
                assert told(k) == expected
                assert told(k, backend="three") == 300 + expected % 100
        assert srm_core.explain("scan", X[0], X[0]).source == "default"

    crowd(work)


@pytest.mark.usefixtures("telling")
def test_tasks() -> None:
    """So are each task's, who else may run between its choice and its call; children and to_thread inherit them."""
    in_thread = range(0, TASKS, 20)

    async def child(expected: int) -> None:
        assert told(0) == expected
        with chosen(("two", "tf32", True)) as mine:
            await asyncio.sleep(0)
            assert told(1) == mine

    async def work(i: int) -> None:
        for k in range(3):
            with chosen(CHOICES[(i + 5 * k) % 12]) as expected:
                await asyncio.sleep(0.0005 * ((i * 7 + k) % 5))
                assert told(k) == expected
                await child(expected)
                await asyncio.create_task(child(expected))
                assert told(k) == expected
                if i in in_thread:
                    assert await asyncio.to_thread(told, k) == expected
                    # A bare executor knows nothing of the task that it works for.
                    explained = asyncio.get_running_loop().run_in_executor(None, srm_core.explain, "scan", X[0], X[0])
                    assert (await explained).source == "default"
        assert srm_core.explain("scan", X[0], X[0]).source == "default"

    async def main() -> None:
        await asyncio.gather(*(work(i) for i in range(TASKS)))

    asyncio.run(main())


@pytest.mark.usefixtures("telling")
def test_task_that_is_cancelled() -> None:
    """A block that an exception leaves leaves nothing behind."""

    async def work(i: int) -> None:
        with chosen(CHOICES[i % 12]):
            await asyncio.sleep(60)

    async def main() -> None:
        tasks = [asyncio.create_task(work(i)) for i in range(100)]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(r, asyncio.CancelledError) for r in results)
        assert srm_core.explain("scan", X[0], X[0]).source == "default"

    asyncio.run(main())


@pytest.mark.usefixtures("telling", "busy")
def test_copies_of_a_context() -> None:
    """A copy keeps the choices under which it was made, in whichever thread it runs; its own stay within it."""

    copies = []
    for choice in CHOICES:
        with chosen(choice):
            copies.append(contextvars.copy_context())

    def work(i: int) -> None:
        for k in range(12):
            with chosen(CHOICES[(i * k) % 12]) as expected:
                copy = copies[(i + k) % 12].copy()
                assert copy.run(told, k) == code(CHOICES[(i + k) % 12])
                assert copy.run(switched, CHOICES[(i + 2 * k) % 12]) == code(CHOICES[(i + 2 * k) % 12])
                assert copy.run(told, k) == code(CHOICES[(i + k) % 12])
                assert told(k) == expected

    def switched(choice: tuple[str, str, bool]) -> int:
        with chosen(choice):
            return told(0)

    crowd(work)


@pytest.mark.usefixtures("telling", "busy")
def test_reload_among_choices(environ: Any) -> None:
    """While the environment is read again and again, a choice holds, and a predicate is never asked of one layout
    and believed of another."""
    done = threading.Event()
    dense = np.ones((2, 3, 4), np.float32)
    strided = np.ones((2, 3, 8), np.float32)[:, :, ::2]
    environ(SRM_BACKEND="one")

    def work(i: int) -> None:
        if i == 0:
            try:
                for k in range(10):
                    environ(SRM_BACKEND=NAMES[k % 2])
            finally:
                done.set()
            return
        k = i
        while not done.is_set():
            k += 1
            with chosen(CHOICES[k % 12]) as expected:
                assert told(k) == expected
            assert told(k) in (100, 200)
            for x, who in ((dense, 100), (strided, 200)):
                y, _ = srm_core.scan(x, x, backend="picky,two")
                assert (y == who).all()

    crowd(work, threads=16)  # each reload waits for all of them
    environ(SRM_BACKEND="three")
    assert told(0) == 300


@pytest.mark.usefixtures("busy")
def test_probe_is_asked_once(plugin: Any) -> None:
    """However many threads are first."""
    module = plugin.backend(
        "Kernel('scan', 'plug:seven')",
        """
        import time
        asked = []
        @hookimpl
        def srm_probe(backend):
            asked.append(backend)
            time.sleep(0.05)
            return []
        """,
    )
    crowd(lambda i: srm_core.scan(X[0], X[0], backend="plug"))
    assert module.asked == ["plug"]


TRACING = """
import os, threading
import numpy as np
import srm_core

def work(i):
    for k in range(10):
        heads = 1 + 700 * (k % 4)  # the longest line is longer than any buffer on its way
        x, w = np.ones((1 + 10 * i + k, heads, 1)), np.ones((heads, 2))  # a kind of call of its own
        srm_core.vjp("recurrent_step", x, x, w, w, np.ones(heads), ("row",) * heads, 0)

srm_core.reload_config()
children = []
while len(children) < 3:
    children.append(os.fork())
    if not children[-1]:
        children.clear()
        break
threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for child in children:
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_trace_lines_are_whole(run_python: Any, tmp_path: Path) -> None:
    """Eight threads in each of four processes write to one file."""
    run_python(TRACING, SRM_TRACE=str(tmp_path / "trace.jsonl"))
    lines = (tmp_path / "trace.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 4 * 8 * 10
    assert max(map(len, lines)) > 3 * 8192 // 2
    assert len({row["pid"] for row in rows}) == 4
    assert {row["chosen"] for row in rows} == {"numpy"}


# What each child of a fork does: it has 30 seconds, which only one that waits for a thread that it does not have needs.
CHILDREN = """
import multiprocessing, os, signal, sys, threading, time
import numpy as np
import srm_core
from srm_core import registry as r

x = np.ones((2, 3, 4), np.float32)

def child(backend=None):
    signal.alarm(30)
    y, _ = srm_core.scan(x, x, backend=backend)
    assert (y == (7 if backend else y[0, 0, 0] + np.arange(3)[:, None])).all(), y
    srm_core.reload_config()
    with srm_core.use_backend("reference"):
        srm_core.vjp("scan", x, x)

def fork(backend=None):
    pid = os.fork()
    if pid == 0:
        try:
            child(backend)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"a child ended with {status}"

def work(i):
    n = i
    while True:
        n += 1
        a = np.ones((1, 1 + n % 300, 1))
        srm_core.scan(a, a, backend=("numpy", "reference", "numpy,auto")[n % 3])
        with srm_core.use_backend("numpy"):
            srm_core.vjp("scan", a, a)
        if n % 50 == 0:
            srm_core.reload_config()

def begin():
    sys.setswitchinterval(1e-4)
    for i in range(4):
        threading.Thread(target=work, args=(i,), daemon=True).start()
    time.sleep(0.05)

{main}
print("done")
sys.stdout.flush()
os._exit(0)
"""
DISPATCHING = """
begin()
for _ in range(25):
    fork()
"""
POOL = """
begin()
context = multiprocessing.get_context("fork")
for _ in range(5):
    processes = [context.Process(target=child) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0, process.exitcode
"""
# A module's import holds a lock of Python's own, which no child would ever get if its parent forked in the middle.
LOADING = """
for _ in range(8):
    sys.modules.pop("lazy", None)
    r._registry = None
    thread = threading.Thread(target=r.registry)
    thread.start()
    while "lazy" not in sys.modules:
        time.sleep(0.001)
    fork("lazy")
    thread.join()
"""
IMPORTING = """
for _ in range(8):
    srm_core.reload_config()
    sys.modules.pop("lazy_kernel", None)
    thread = threading.Thread(target=srm_core.scan, args=(x, x), kwargs=dict(backend="lazy"))
    thread.start()
    while "lazy_kernel" not in sys.modules:
        time.sleep(0.001)
    fork("lazy")
    thread.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("main", [DISPATCHING, POOL], ids=["os.fork", "multiprocessing"])
def test_fork_among_calls(run_python: Any, main: str) -> None:
    """A child dispatches at once, whatever the other threads of its parent were doing."""
    assert run_python(CHILDREN.replace("{main}", main)) == "done\n"


STUCK = """
r.FORK_WAITS = 0.1
threading.Thread(target=r.registry, daemon=True).start()
while "stuck" not in sys.modules:
    time.sleep(0.001)
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_waits_for_no_import_for_ever(plugin: Any, run_python: Any) -> None:
    """One that hangs keeps nobody from forking."""
    plugin.environ.set(SRM_BLOCK="stuck")
    plugin.write("stuck", "import time; time.sleep(9999)")
    path = str(plugin.folder / "srm-stuck")
    assert run_python(CHILDREN.replace("{main}", STUCK), PYTHONPATH=path) == "done\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("main", [LOADING, IMPORTING], ids=["plugin", "kernel"])
def test_fork_among_imports(plugin: Any, run_python: Any, main: str) -> None:
    """Also where they were importing a plugin, or a kernel."""
    slow = "import time; time.sleep(0.1)\n"
    info = "@hookimpl\ndef srm_backend_info(): return BackendInfo('lazy', 't', (Kernel('scan', 'lazy_kernel:seven'),))"
    plugin.write("lazy_kernel", slow, target="lazy", entry="unused")
    plugin.write("lazy", slow + info)
    path = os.pathsep.join(str(plugin.folder / f"srm-{name}") for name in ("lazy_kernel", "lazy"))
    assert run_python(CHILDREN.replace("{main}", main), PYTHONPATH=path, SRM_BLOCK="unused") == "done\n"
