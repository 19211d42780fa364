"""Measure the targets of the `cpp` backend on a CPU of two cores: ratios of neighbours in time, all in one run.

    python asv_bench/cpp_targets.py [--json FILE]

mdi_recurrence: against the same loop in torch, eagerly. lstm: against torch's own; recurrent_mix, hds_query, mdi:
against the NumPy backend. Each library in a process of its own, in turns, as in `cpu_peers`; the NumPy backend is
measured in each of these rows.

scan: against a copy of memory. A scan reads gates and tokens and writes y, three arrays of N numbers, the last into
memory that is fresh at each call, as the operator gives it. The copy is `np.copyto` of 1.5 N numbers into a fresh
array: 3 N numbers read and written, too. Of fresh memory the copy has half as much again. `np.copyto` has one thread;
a scan with one thread is a row of its own, for the record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from cpu_peers import REST, ROUNDS, SECONDS, _arrays, _torch
from cpu_targets import interleaved  # which sets two threads before NumPy is loaded
from rich.console import Console
from rich.progress import track
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "cpp_targets.json"

# (operator, sizes, what it is compared with, the least speed relative to that)
PEERS: tuple[tuple[str, dict[str, Any], str, float | None], ...] = (
    ("mdi_recurrence", {"B": 1, "T": 512, "D": 64}, "torch", 20.0),
    ("mdi_recurrence", {"B": 4, "T": 512, "D": 256}, "torch", 3.0),
    ("mdi_recurrence", {"B": 16, "T": 256, "D": 512}, "torch", None),
    ("lstm", {"B": 1, "T": 512, "I": 64, "H": 64}, "torch", None),
    ("lstm", {"B": 16, "T": 32, "I": 128, "H": 256}, "torch", None),
    ("lstm", {"B": 8, "T": 64, "I": 256, "H": 512}, "torch", None),
    ("recurrent_mix", {"B": 4, "T": 512, "H": 8, "D": 64}, "numpy", None),
    ("recurrent_mix", {"B": 1, "T": 2048, "H": 4, "D": 32}, "numpy", None),
    ("hds_query", {"B": 4, "H": 8, "T": 128, "M": 1024, "D": 64}, "numpy", None),
    ("hds_query", {"B": 16, "H": 8, "T": 1, "M": 4096, "D": 64}, "numpy", None),
    ("mdi", {"B": 8, "T": 256, "D": 1024}, "numpy", None),
)
SCANS = ((8, 1024, 1536), (4, 1024, 1024))
COPIES = 0.8  # the least speed of a scan relative to a copy


def title(op: str, sizes: dict[str, Any]) -> str:
    return f"{op} {' '.join(f'{k}{v}' for k, v in sizes.items())}"


def arrays(op: str, s: dict[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call, float32, the same in all processes."""
    if op in ("lstm", "mdi_recurrence"):
        return _arrays(op, s)[0]
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return rng.standard_normal(shape, np.float32)

    if op == "mdi":
        return tuple(normal(s["B"], s["T"], s["D"]) for _ in range(5))
    if op == "recurrent_mix":
        weights = normal(s["H"], s["T"]), normal(s["H"], s["T"]), rng.uniform(0.9, 1, s["H"]).astype(np.float32)
        return normal(s["B"], s["T"], s["H"], s["D"]), *weights, ("row", "col") * (s["H"] // 2)
    return normal(s["B"], s["H"], s["T"], s["D"]), *(normal(s["B"], s["H"], s["M"], s["D"]) for _ in range(2))


def call_of(library: str, op: str, sizes: dict[str, Any]) -> Callable[[], Any]:
    args = arrays(op, sizes)
    if library == "torch":
        import torch

        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
        return _torch(op, args, {})
    import srm_core

    return lambda: srm_core.call(op, *args, backend=library)


_calls: dict[str, Callable[[], Any]] = {}


def measure(library: str, op: str, sizes: dict[str, Any]) -> tuple[float, float]:
    """(seconds a call, the mean magnitude of the result), in the process of one library."""
    key = title(op, sizes)
    if key not in _calls:
        _calls[key] = call_of(library, op, sizes)
    run = _calls[key]
    result, count, start = run(), 0, time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        run()
        count += 1
    seconds = (time.perf_counter() - start) / count
    result = result[0] if isinstance(result, tuple) else result
    return seconds, float(abs(result).mean())


def process(threads: int = 2) -> ProcessPoolExecutor:
    """A process of one library; its threads are told by the environment that it is born with."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    pool = ProcessPoolExecutor(1, get_context("spawn"))
    pool.submit(os.getpid).result()
    os.environ["OMP_NUM_THREADS"] = "2"
    return pool


def peer_row(
    pools: dict[str, ProcessPoolExecutor], op: str, sizes: dict[str, Any], peer: str, target: float | None
) -> dict[str, Any]:
    names = [n for n in pools if n in ("cpp", "numpy", peer)]
    samples: dict[str, list[float]] = {n: [] for n in names}
    results: dict[str, float] = {}
    for _ in range(ROUNDS + 1):  # the first round warms up
        for name in names:
            time.sleep(REST)
            seconds, results[name] = pools[name].submit(measure, name, op, sizes).result()
            samples[name].append(seconds)
    if not np.allclose(list(results.values()), results["cpp"], rtol=1e-4):
        raise ValueError(f"{title(op, sizes)}: the libraries disagree: {results}")
    return row(title(op, sizes), peer, {n: s[1:] for n, s in samples.items()}, target)


def row(
    what: str, peer: str, samples: dict[str, list[float]], target: float | None, threads: int = 2
) -> dict[str, Any]:
    """Milliseconds are medians, and ratio the median of the peer's seconds over those of `cpp`, round by round."""
    ratio = statistics.median(p / o for p, o in zip(samples[peer], samples["cpp"], strict=True))
    return {
        "what": what, "threads": threads, "ms": {n: statistics.median(s) * 1e3 for n, s in samples.items()},
        "peer": peer, "ratio": ratio, "target": target, "met": None if target is None else ratio >= target,
    }  # fmt: skip


def scan_samples(shape: tuple[int, ...]) -> dict[str, list[float]]:
    import srm_core

    rng = np.random.default_rng(0)
    gates, tokens = rng.uniform(0.5, 1.0, shape).astype(np.float32), rng.standard_normal(shape, np.float32)
    source = np.ones(gates.size * 3 // 2, np.float32)
    return interleaved(
        {
            "copy": lambda: np.copyto(np.empty_like(source), source),
            "cpp": lambda: srm_core.scan(gates, tokens, backend="cpp"),
            "numpy": lambda: srm_core.scan(gates, tokens, backend="numpy"),
        },
        4 * ROUNDS,
    )


def level() -> str:
    from srm_backend_cpp.native import kernels

    return kernels.__name__.rpartition("_")[2]


def machine(pool: ProcessPoolExecutor) -> dict[str, Any]:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "torch", "srm-backend-cpp")},
        "instructions": pool.submit(level).result(), "load": os.getloadavg()[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=RESULTS, help="write the rows here")
    args = parser.parse_args()
    pools = {name: process() for name in ("cpp", "numpy", "torch")}
    alone = process(threads=1)
    facts = machine(pools["cpp"])

    def scan_row(shape: tuple[int, ...], threads: int, target: float | None) -> dict[str, Any]:
        samples = (pools["cpp"] if threads == 2 else alone).submit(scan_samples, shape).result()
        return row(f"scan {shape}", "copy", samples, target, threads)

    jobs: list[Callable[[], dict[str, Any]]] = [
        lambda s=shape, n=threads, t=target: scan_row(s, n, t)  # type: ignore[misc]
        for shape in SCANS for threads, target in ((2, COPIES), (1, None))
    ]  # fmt: skip
    jobs += [lambda p=peer: peer_row(pools, *p) for peer in PEERS]  # type: ignore[misc]
    rows = [job() for job in track(jobs, "measuring", console=Console(stderr=True), transient=True)]
    for pool in (*pools.values(), alone):
        pool.shutdown()
    table = Table("what", "threads", "cpp", "numpy", "peer", "ratio", "target", "met", title="Targets of `cpp`")
    for r in rows:
        met = {None: "", True: "yes", False: "NO"}[r["met"]]
        cpp, numpy, peer = (f"{r['ms'][name]:.3f} ms" for name in ("cpp", "numpy", r["peer"]))
        target = "" if r["target"] is None else f">= {r['target']:g} x"
        table.add_row(r["what"], str(r["threads"]), cpp, numpy, f"{r['peer']} {peer}", f"{r['ratio']:.2f}", target, met)
    Console(width=130).print(table)
    args.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
