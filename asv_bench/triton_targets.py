"""The triton backend beside its peers and the roofline, on one GPU in one run.

    python asv_bench/triton_targets.py [--out asv_bench/results/triton_targets_h200.json]

Events around each call, the L2 cache overwritten before, which also takes longer than the host takes for a call;
medians, ours and its peers in turns. The roofline is the bytes that an operator must move over the bandwidth of a copy
in the same run, and for a small call an empty kernel on top. accelerated-scan and fla-core are peers where installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch_targets import host_seconds, measured, rand

import srm_core

Call = Callable[[], Any]
BYTES = 1 << 31  # of the copy, read and written


class Row(NamedTuple):
    """target: the least part of the roofline, or the least number of times that a peer takes as long as ours."""

    op: str
    size: str
    bytes: int
    ours: Call
    peers: dict[str, Call]
    target: float
    peer: str = ""


def on(backend: str, op: str, *args: Any, **options: Any) -> Call:
    return lambda: srm_core.call(op, *args, backend=backend, **options)


def step_rows() -> Iterator[Row]:
    heads, width = 32, 128
    mode = ("row",) * 16 + ("col",) * 16
    for batch, dtype, target in (
        (8192, torch.float32, 0.92), (8192, torch.bfloat16, 0.92), (64, torch.float32, 1 / 1.3),
    ):  # fmt: skip
        x, state = rand(batch, heads, width, dtype=dtype), rand(batch, heads, width, dtype=dtype)
        args = x, state, rand(heads, 512, dtype=dtype), rand(heads, 512, dtype=dtype), rand(heads, dtype=dtype), mode, 5
        moved = 4 * x.numel() * x.element_size()
        size = f"B{batch} H{heads} D{width} {str(dtype)[6:]}"
        peers = {"eager": on("torch", "recurrent_step", *args)}
        yield Row("recurrent_step", size, moved, on("triton", "recurrent_step", *args), peers, target)
    x, weight = rand(8, 4096, 12, 128), rand(12, 4096)
    args = x, weight, weight, torch.rand(12, device="cuda"), mode[10:22]
    peers = {"eager": on("torch", "recurrent_mix", *args)}
    size = "B8 T4096 H12 D128 float32"
    yield Row("recurrent_mix", size, 8 * x.numel(), on("triton", "recurrent_mix", *args), peers, 0.9)


def mdi_rows() -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        args = tuple(rand(8, 4096, 1024, dtype=dtype) for _ in range(5))
        moved = 7 * args[0].numel() * args[0].element_size()
        peers = {"eager": on("torch", "mdi", *args)}
        yield Row("mdi", f"(8, 4096, 1024) {str(dtype)[6:]}", moved, on("triton", "mdi", *args), peers, 0.92)


def scan_rows() -> Iterator[Row]:
    chunk_hgrn = imported("fla.ops.hgrn", "chunk_hgrn")
    for shape, dtype, target in (
        ((8, 4096, 1536), torch.float32, 0.95), ((4, 16384, 1024), torch.float32, 0.95),
        ((16, 16384, 128), torch.float32, 0.88), ((1, 131072, 512), torch.float32, 0.85),
        ((1, 65536, 64), torch.float32, 0.5), ((8, 4096, 1536), torch.bfloat16, 0.95),
        ((4, 16384, 1024), torch.bfloat16, 0.95), ((1, 131072, 512), torch.bfloat16, 0.85),
    ):  # fmt: skip
        gates = (0.8 + 0.2 * torch.rand(shape, device="cuda")).to(dtype)
        tokens = rand(*shape, dtype=dtype)
        one = tokens.numel() * tokens.element_size()
        size = f"{shape} {str(dtype)[6:]}"
        peers = {}
        if chunk_hgrn is not None and dtype is torch.float32:
            logs = gates.log()
            peers["chunk_hgrn"] = lambda x=tokens, g=logs: chunk_hgrn(x, g)
        yield Row("scan", size, 3 * one, on("triton", "scan", gates, tokens), peers, target)
        if shape == (8, 4096, 1536):
            yield from scan_variants(gates, tokens, size, one)


def scan_variants(gates: Any, tokens: Any, size: str, one: int) -> Iterator[Row]:
    constant = gates[:, :1].contiguous()
    yield Row("scan, constant gates", size, 2 * one, on("triton", "scan", constant, tokens), {}, 0.9)
    peers = {"torch.cumprod": lambda: gates.cumprod(1)}
    yield Row("scan, cumulative product", size, 2 * one, on("triton", "scan", gates), peers, 0.85)
    leaves = gates.clone().requires_grad_(), tokens.clone().requires_grad_()
    ones = torch.ones_like(tokens)

    def both_ways() -> None:
        torch.autograd.grad(srm_core.scan(*leaves, backend="triton")[0], leaves, ones)

    yield Row("scan, forward and backward", size, 8 * one, both_ways, {}, 0.9)
    if tokens.dtype is not torch.float32:
        return
    by_time = [a.transpose(1, 2).contiguous() for a in (gates, tokens)]
    views = [a.transpose(1, 2) for a in by_time]
    theirs = imported("accelerated_scan.scalar", "scan")
    peers = {} if theirs is None else {"accelerated_scan.scalar": lambda: theirs(*by_time)}
    ours = on("triton", "scan", *views)
    yield Row("scan, contiguous in time", size, 3 * one, ours, peers, 1.0, "accelerated_scan.scalar")


def imported(module: str, name: str) -> Any:
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tries", type=int, default=15)
    args = parser.parse_args()
    source = torch.empty(BYTES // 2, dtype=torch.uint8, device="cuda")
    target, small = torch.empty_like(source), torch.empty(1, device="cuda")
    took = measured({"copy": partial(target.copy_, source), "empty": small.zero_}, args.tries)
    copy, floor = BYTES / took["copy"], took["empty"]
    print(f"copy {copy / 1e12:.2f} TB/s, a kernel of one element {floor * 1e6:.1f} us")
    table = []
    for rows in (step_rows, mdi_rows, scan_rows):
        for row in rows():
            calls = {"ours": row.ours, **row.peers}
            took = measured(calls, args.tries)
            part = (row.bytes / copy + (floor if row.bytes < BYTES / 64 else 0)) / took["ours"]
            times = {name: took[name] / took["ours"] for name in row.peers}
            reached = times.get(row.peer, 0.0) if row.peer else part
            host = host_seconds({"ours": row.ours})["ours"]
            found = {
                "op": row.op, "size": row.size, "us": took["ours"] * 1e6, "of_roofline": part, "times": times,
                "host_us": host * 1e6, "target": row.target, "of": row.peer or "roofline", "met": reached >= row.target,
            }  # fmt: skip
            table.append(found)
            shown = ", ".join(f"{name} {t:.2f}x" for name, t in times.items())
            print(
                f"{row.op:28} {row.size:32} {found['us']:8.1f} us  {part:.2f} of the roofline  "
                f"{'met' if found['met'] else 'NOT MET'} ({row.target:.2f} of {found['of']})  {shown}  "
                f"host {found['host_us']:.0f} us", flush=True,
            )  # fmt: skip
    if args.out:
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        args.out.write_text(json.dumps({**head, "copy_TB_s": copy / 1e12, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
