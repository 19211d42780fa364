"""The torch backend beside what a user would write with torch, and beside torch's own, on one machine in one run.

    python asv_bench/torch_targets.py [--out asv_bench/results/torch_targets_cuda.json]

On CUDA: events around each call, the L2 cache overwritten before, medians; on a CPU: the best of several calls.
Ours and its peers in turns. A row says how many times as long as ours a peer takes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import srm_core

Row = tuple[str, str, Callable[[], Any], dict[str, Callable[[], Any]]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"


def rand(*shape: int, dtype: torch.dtype = torch.float32, gradient: bool = False) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_(gradient)


def seconds(call: Callable[[], Any], flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush.zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def measured(calls: dict[str, Callable[[], Any]], tries: int) -> dict[str, float]:
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE) if LARGE else None
    for call in calls.values():
        for _ in range(3):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(tries):
        for name, call in calls.items():
            samples[name].append(seconds(call, flush))
    return {name: statistics.median(s) if LARGE else min(s) for name, s in samples.items()}


def with_gradients(call: Callable[[], Any], leaves: tuple[torch.Tensor, ...]) -> Callable[[], Any]:
    def run() -> None:
        result = call()
        y = result[0] if isinstance(result, tuple) else result
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def scan_rows() -> Iterator[Row]:
    for shape in [(8, 4096, 1536), (1, 65536, 64), (16, 16384, 128)] if LARGE else [(1, 8192, 16), (2, 2048, 512)]:
        gates, tokens = (torch.rand(shape, device=DEVICE) for _ in range(2))

        def doubling(g: torch.Tensor = gates, x: torch.Tensor = tokens) -> torch.Tensor:
            step = 1
            while step < x.shape[1]:
                x = torch.cat([x[:, :step], x[:, step:] + g[:, step:] * x[:, :-step]], 1)
                g = torch.cat([g[:, :step], g[:, step:] * g[:, :-step]], 1)
                step *= 2
            return x

        def ours(g: torch.Tensor = gates, x: torch.Tensor = tokens) -> Any:
            return srm_core.scan(g, x, backend="torch")

        yield "scan", f"{shape} float32", ours, {"doubling": doubling}


def recurrence_rows() -> Iterator[Row]:
    for batch, steps, width in [(16, 256, 256), (16, 256, 512)] if LARGE else [(4, 128, 256)]:
        z, gamma, h0 = rand(batch, steps, width), torch.rand(batch, steps, width, device=DEVICE), rand(batch, width)
        w_gate, w_mdi = rand(width, width) * width**-0.5, rand(width, 2 * width) * width**-0.5
        b_gate, b_mdi = rand(width), rand(width)
        leaves = tuple(a.requires_grad_() for a in (z, gamma, h0, w_gate, b_gate, w_mdi, b_mdi))

        def eager(a: tuple[torch.Tensor, ...] = leaves) -> torch.Tensor:
            z, gamma, h, w_gate, b_gate, w_mdi, b_mdi = a
            out = []
            for t in range(z.shape[1]):
                g = torch.sigmoid(F.linear(torch.cat([z[:, t], h], 1), w_mdi, b_mdi))
                n = (1 - g) * h + g * z[:, t] + gamma[:, t] * h
                h = z[:, t] * torch.sigmoid(F.linear(h, w_gate, b_gate)) + gamma[:, t] * h + 0.1 * n
                out.append(h)
            return torch.stack(out, 1)

        def ours(a: tuple[torch.Tensor, ...] = leaves) -> Any:
            return srm_core.mdi_recurrence(*a, backend="torch")

        def quietly(call: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: torch.no_grad()(call)()

        name = f"B{batch} T{steps} D{width} float32"
        yield "mdi_recurrence", name, quietly(ours), {"eager loop": quietly(eager)}
        yield (
            "mdi_recurrence",
            f"{name}, with gradients",
            with_gradients(ours, leaves),
            {"eager loop": with_gradients(eager, leaves)},
        )


def lstm_rows() -> Iterator[Row]:
    for batch, steps, width in [(16, 1024, 512), (1, 1024, 256)] if LARGE else [(16, 32, 256)]:
        for dtype in (torch.float32, torch.bfloat16) if LARGE else (torch.float32,):
            layer = torch.nn.LSTM(width, width, batch_first=True, device=DEVICE, dtype=dtype)
            x = rand(batch, steps, width, dtype=dtype)
            weights = [w.detach() for w in layer._flat_weights]
            state = rand(batch, width, dtype=dtype)

            def ours(x: Any = x, weights: Any = weights, state: Any = state) -> Any:
                return srm_core.lstm(x, *weights, state, state, backend="torch")

            def theirs(x: Any = x, layer: Any = layer, state: Any = state) -> Any:
                with torch.no_grad():
                    return layer(x, (state[None], state[None]))

            yield "lstm", f"B{batch} T{steps} H{width} {str(dtype)[6:]}", ours, {"torch.nn.LSTM": theirs}


def attention_rows() -> Iterator[Row]:
    shapes = [(4, 16, 4096, 128)] if LARGE else [(1, 8, 512, 64)]
    for shape in shapes:
        for causal in (True, False):
            q, k, v = (rand(*shape, dtype=torch.bfloat16 if LARGE else torch.float32) for _ in range(3))

            def ours(q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                return srm_core.attention(q, k, v, is_causal=causal, backend="torch")

            def theirs(q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            yield "attention", f"{shape} {'causal' if causal else 'full'}", ours, {"SDPA": theirs}


def conv_rows() -> Iterator[Row]:
    shapes = [(32, 64, 56, 64, 3), (16, 128, 64, 256, 3), (16, 256, 128, 512, 3), (32, 64, 56, 256, 1)]
    dtype = torch.bfloat16 if LARGE else torch.float32
    for batch, channels, size, out, kernel in shapes if LARGE else [(4, 64, 28, 64, 3)]:
        layout = torch.channels_last
        x = rand(batch, channels, size, size, dtype=dtype).to(memory_format=layout)
        weight = (rand(out, channels, kernel, kernel, dtype=dtype) * 0.05).to(memory_format=layout)
        bias, mean, var = rand(out, dtype=dtype), rand(out), torch.rand(out, device=DEVICE) + 0.5
        gamma, beta = rand(out), rand(out)
        pad = kernel // 2

        def ours(x: Any = x, w: Any = weight, b: Any = bias, pad: int = pad) -> Any:
            return srm_core.conv_bn(x, w, b, None, None, padding=pad, activation="relu", backend="torch")

        def eager(x: Any = x, w: Any = weight, b: Any = bias, pad: int = pad, s: Any = (mean, var, gamma, beta)) -> Any:
            return F.relu(F.batch_norm(F.conv2d(x, w, b, padding=pad), *s))

        peers = {"eager": eager}
        if LARGE:

            def fused(x: Any = x, w: Any = weight, b: Any = bias, pad: int = pad) -> Any:
                return torch.cudnn_convolution_relu(x, w, b, (1, 1), (pad, pad), (1, 1), 1)

            peers["cudnn_convolution_relu"] = fused
        yield "conv_bn, folded", f"N{batch} C{channels} {size}^2 K{out} {kernel}x{kernel}", ours, peers

        def train(x: Any = x, w: Any = weight, g: Any = gamma, b: Any = beta, pad: int = pad) -> Any:
            return srm_core.conv_bn_train(x, w, None, g, b, padding=pad, activation="relu", backend="torch")

        def eager_train(x: Any = x, w: Any = weight, g: Any = gamma, b: Any = beta, pad: int = pad) -> Any:
            return F.relu(F.batch_norm(F.conv2d(x, w, None, padding=pad), None, None, g, b, training=True))

        yield "conv_bn_train", f"N{batch} C{channels} {size}^2 K{out} {kernel}x{kernel}", train, {"eager": eager_train}


def call_rows() -> Iterator[Row]:
    """A call of next to no work with gradients: what an autograd.Function of its own costs beside."""
    x, state = rand(4, 2, 8, gradient=True), rand(4, 2, 8)
    weight, bias, decay = rand(2, 16), rand(2, 16), rand(2)

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *a: torch.Tensor) -> Any:
            ctx.save_for_backward(*a)
            return a[0] * 2, a[1] * 2

        @staticmethod
        def backward(ctx: Any, *g: torch.Tensor) -> Any:
            return (*g, None, None, None)

    def ours() -> Any:
        return srm_core.recurrent_step(x, state, weight, bias, decay, ("row", "col"), 3, backend="numpy")

    from srm_core.torch_ops.autograd import pinned  # noqa: F401  (imported before it is timed)

    if not LARGE:
        yield (
            "recurrent_step with gradients (numpy)",
            "B4 H2 D8",
            ours,
            {
                "a plain autograd.Function": lambda: Plain.apply(x, state, weight, bias, decay),
                "srm_core.vjp": lambda: srm_core.vjp(
                    "recurrent_step", x, state, weight, bias, decay, ("row", "col"), 3, backend="numpy"
                ),
            },
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tries", type=int, default=15)
    args = parser.parse_args()
    table = []
    for rows in (scan_rows, recurrence_rows, lstm_rows, attention_rows, conv_rows, call_rows):
        for op, size, ours, peers in rows():
            took = measured({"ours": ours, **peers}, args.tries)
            row = {"op": op, "size": size, "ms": took["ours"] * 1e3}
            row["times"] = {name: took[name] / took["ours"] for name in peers}
            table.append(row)
            print(
                f"{op:36} {size:44} {row['ms']:9.3f} ms  ",
                *(f"{n} {t:.2f}x" for n, t in row["times"].items()),
                flush=True,
            )
    if args.out:
        machine = torch.cuda.get_device_name() if LARGE else platform.processor() or platform.machine()
        head = {"device": machine, "torch": torch.__version__, "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps({**head, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
