"""Measure the targets of a 2-core CPU: ratios of neighbours in time, all in one run.

    python asv_bench/cpu_targets.py [--json FILE]

scan: against a plain loop over T in NumPy, both with fresh outputs. Dispatch: what a memo hit adds to a call
of the same kernel function, and what `bind` adds, the least of 41 tries. Import: a fresh interpreter, with bytecode
as an installation has it. The other operators: against torch, see `cpu_peers`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "2")

import numpy as np  # noqa: E402
from cpu_peers import PEERS, Peers  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

import srm_core  # noqa: E402
from srm_core.config import CURRENT  # noqa: E402
from srm_core.context import LaunchContext  # noqa: E402

# (B, T, D) and the least times a plain loop
SCANS = (
    ((1, 8192, 16), 8.0),
    ((1, 16384, 64), 4.0),
    ((1, 2048, 1024), 1.4),
    ((2, 2048, 1024), 1.4),
    ((4, 1024, 1024), 1.4),
    ((8, 1024, 1536), 1.4),
)


def plain_loop(gates: Any, tokens: Any) -> Any:
    state = np.zeros_like(tokens[:, 0])
    out = np.empty_like(tokens)
    for t in range(tokens.shape[1]):
        state = gates[:, t] * state + tokens[:, t]
        out[:, t] = state
    return out


def interleaved(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; each round runs all of them, one after the other."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return samples


def scan_row(shape: tuple[int, int, int], target: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    gates = rng.uniform(0.5, 1.0, shape).astype(np.float32)
    tokens = rng.standard_normal(shape).astype(np.float32)
    np.testing.assert_allclose(srm_core.scan(gates, tokens)[0], plain_loop(gates, tokens), rtol=1e-4, atol=1e-4)
    samples = interleaved(
        {"plain": lambda: plain_loop(gates, tokens), "ours": lambda: srm_core.scan(gates, tokens, backend="numpy")}, 15
    )
    ratio = statistics.median(p / o for p, o in zip(samples["plain"], samples["ours"], strict=True))
    return {
        "what": f"scan {shape}", "ours": f"{statistics.median(samples['ours']) * 1e3:.2f} ms",
        "other": f"plain loop {statistics.median(samples['plain']) * 1e3:.2f} ms",
        "ratio": ratio, "target": f">= {target} x", "met": ratio >= target,
    }  # fmt: skip


def per_call(function: Callable[[], Any], number: int = 2000) -> float:
    start = time.perf_counter()
    for _ in range(number):
        function()
    return (time.perf_counter() - start) / number


# Kernels that do nothing, with the signatures of the true ones: what is left is the call itself.
def no_scan(ctx: Any, gates: Any, tokens: Any, initial_state: Any, *, reverse: Any, lengths: Any) -> None: ...


def no_step(ctx: Any, x: Any, state: Any, weight: Any, bias: Any, decay: Any, mode: Any, index: Any) -> None: ...


def no_mix(
    ctx: Any, x: Any, weight: Any, bias: Any, decay: Any, mode: Any, initial_state: Any, *, start: Any, lengths: Any
) -> None: ...


def dispatch_rows() -> list[dict[str, Any]]:
    """The budget is for a call beyond the kernel, so the kernel is replaced by one that does nothing."""
    one = np.ones((2, 3, 4), np.float32)
    step = (one, one, np.ones((3, 8), np.float32), np.ones((3, 8), np.float32), np.ones(3, np.float32))
    mode = ("row", "col", "row")
    x = np.ones((2, 5, 3, 4), np.float32)
    return [
        *dispatch_of(srm_core.scan, no_scan, (one, one), 2),
        *dispatch_of(srm_core.recurrent_step, no_step, (*step, mode, 0), 5),
        *dispatch_of(srm_core.recurrent_mix, no_mix, (x, *step[2:], mode), 4),
    ]


def dispatch_of(
    function: Callable[..., Any], nothing: Callable[..., None], args: tuple[Any, ...], tensors: int
) -> list[dict[str, Any]]:
    name = function.__name__
    context = LaunchContext("numpy", "cpu", CURRENT.get())
    bound = srm_core.bind(name, *args)
    function(*args)
    operator = srm_core.dispatch.operator(name)
    canonical, named = operator.spec.bind(args, {})
    direct_args = (context, *canonical)  # put together beforehand: that would count for the direct call
    [plan] = operator.memo.values()
    kernel, plan.forward = plan.forward, nothing
    bound.__globals__["_forward"] = nothing
    samples: dict[str, list[float]] = {"direct": [], "hit": [], "bound": []}
    for _ in range(41):
        samples["direct"].append(per_call(lambda: nothing(*direct_args, **named)))
        samples["hit"].append(per_call(lambda: function(*args)))
        samples["bound"].append(per_call(lambda: bound(*canonical, **named)))
    plan.forward = kernel
    direct = min(samples["direct"])  # other work on the machine only adds to a microsecond
    rows = []
    for kind, budget in (("hit", 0.5e-6 + 0.35e-6 * tensors), ("bound", 0.1e-6)):
        extra = min(samples[kind]) - direct
        rows.append(
            {
                "what": f"{name}, {'memo hit' if kind == 'hit' else 'bind'}", "ours": f"{extra * 1e6:.2f} µs",
                "other": f"direct call {direct * 1e6:.2f} µs", "ratio": extra / budget,
                "target": f"<= {budget * 1e6:.2f} µs over", "met": extra <= budget,
            }
        )  # fmt: skip
    return rows


def import_row() -> dict[str, Any]:
    code = "import time; t = time.perf_counter(); import srm_core; print(time.perf_counter() - t)"
    with tempfile.TemporaryDirectory() as compiled:  # installed packages have their bytecode beside them
        environ = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        environ["PYTHONPYCACHEPREFIX"] = compiled
        command = [sys.executable, "-c", code]
        outputs = [subprocess.check_output(command, env=environ, text=True) for _ in range(10)]
    runs = [float(seconds) for seconds in outputs[1:]]  # the first one compiles
    seconds = statistics.median(runs)
    return {
        "what": "import srm_core", "ours": f"{seconds:.3f} s", "other": "", "ratio": seconds / 0.25,
        "target": "<= 0.25 s", "met": seconds <= 0.25,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    jobs: list[Callable[[], list[dict[str, Any]]]] = [dispatch_rows, lambda: [import_row()]]
    jobs += [lambda s=shape, t=target: [scan_row(s, t)] for shape, target in SCANS]  # type: ignore[misc]
    with Peers() as peers:
        jobs += [lambda w=what, t=target: [peers.row(w, t)] for what, _, _, target in PEERS]  # type: ignore[misc]
        rows = [row for job in track(jobs, "measuring", console=Console(stderr=True), transient=True) for row in job()]
    table = Table("what", "ours", "other", "ratio", "target", "met", title="CPU targets")
    for row in rows:
        table.add_row(
            row["what"], row["ours"], row["other"], f"{row['ratio']:.2f}", row["target"], "yes" if row["met"] else "NO"
        )
    Console(width=110).print(table)
    if args.json:
        machine = {"python": platform.python_version(), "numpy": np.__version__, "cores": os.cpu_count()}
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1, default=bool) + "\n")


if __name__ == "__main__":
    main()
