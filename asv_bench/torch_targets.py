"""The torch backend beside what a user would write with torch, and beside torch's own, on one machine in one run.

    python asv_bench/torch_targets.py [--out asv_bench/results/torch_targets_cuda.json]

On CUDA: events around each call, the L2 cache overwritten before, which also takes longer than the host takes for a
call; medians. On a CPU: the best of several calls. Ours and its peers in turns. A row says how many times as long as
ours a peer takes; on CUDA also how long the host takes for a call, and that of each peer over ours.
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
import srm_core.nn
from srm_core.hookspecs import hookimpl
from srm_core.registry import local_plugin
from srm_core.spec import BackendInfo, Kernel

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
    flush = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) if LARGE else None
    for call in calls.values():
        for _ in range(3):
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(tries):
        for name, call in calls.items():
            samples[name].append(seconds(call, flush))
    return {name: statistics.median(s) if LARGE else min(s) for name, s in samples.items()}


def host_seconds(calls: dict[str, Callable[[], Any]], tries: int = 5, times: int = 10) -> dict[str, float]:
    """How long a call takes until it is in the queue of the device, the least of some tries."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(tries):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(times):
                call()
            best[name] = min(best[name], (time.perf_counter() - start) / times)
    torch.cuda.synchronize()
    return best


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
    sizes = [(16, 1024, 512), (1, 1024, 256), (16, 32, 128)] if LARGE else [(16, 32, 256)]
    for batch, steps, width in sizes:
        for dtype in (torch.float32, torch.float16, torch.bfloat16) if LARGE else (torch.float32,):
            layer = torch.nn.LSTM(width, width, batch_first=True).to(DEVICE, dtype)
            own = srm_core.nn.LSTM(width, width, batch_first=True).to(DEVICE, dtype)
            own.load_state_dict(layer.state_dict())
            x = rand(batch, steps, width, dtype=dtype)

            def theirs(x: Any = x, layer: Any = layer) -> Any:
                with torch.no_grad():
                    return layer(x)

            def ours(x: Any = x, layer: Any = own) -> Any:
                with torch.no_grad(), srm_core.use_backend("torch"):
                    return layer(x)

            yield "nn.LSTM", f"B{batch} T{steps} H{width} {str(dtype)[6:]}", ours, {"torch.nn.LSTM": theirs}


def attention_rows() -> Iterator[Row]:
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [((1, 8, 512, 64), torch.float32)]
    if LARGE:
        shapes = [((4, 16, 4096, 128), torch.bfloat16), ((4, 16, 4096, 128), torch.float32)]
        shapes += [((1, 8, 256, 64), torch.bfloat16), ((1, 8, 256, 64), torch.float32)]
    for shape, dtype in shapes:
        for causal in (True, False):
            q, k, v = (rand(*shape, dtype=dtype) for _ in range(3))

            def ours(q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                return srm_core.attention(q, k, v, is_causal=causal, backend="torch")

            def theirs(q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

            def plain(q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> Any:
                scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
                if causal:
                    steps = torch.ones(scores.shape[2:], dtype=torch.bool, device=DEVICE)
                    scores = scores.masked_fill(~steps.tril(), -torch.inf)
                return scores.softmax(-1) @ v

            size = f"{shape} {'causal' if causal else 'full'} {str(dtype)[6:]}"
            yield "attention", size, ours, {"SDPA": theirs, "composition": plain}


def pointwise_rows() -> Iterator[Row]:
    batch, heads, width = (8192, 32, 128) if LARGE else (512, 8, 64)
    for b in (64, batch):
        x, state = rand(b, heads, width), rand(b, heads, width)
        weight, bias, decay = rand(heads, 16), rand(heads, 16), torch.rand(heads, device=DEVICE)
        row = torch.arange(heads, device=DEVICE) % 2 == 0
        mode = tuple("row" if i % 2 == 0 else "col" for i in range(heads))

        def step(x: Any = x, s: Any = state, w: Any = weight, b: Any = bias, d: Any = decay, mode: Any = mode) -> Any:
            return srm_core.recurrent_step(x, s, w, b, d, mode, 3, backend="torch")

        def eager_step(x: Any = x, s: Any = state, w: Any = weight, b: Any = bias, d: Any = decay, r: Any = row) -> Any:
            at, beside = w[:, 3, None], b[:, 3, None]
            new = torch.where(r[:, None], at * x, x) + d[:, None] * s
            return torch.where(r[:, None], new, at * new) + beside, new

        yield "recurrent_step", f"B{b} H{heads} D{width} float32", step, {"composition": eager_step}

    tensors = [rand(batch, heads * width) for _ in range(5)]

    def mdi(a: Any = tensors) -> Any:
        return srm_core.mdi(*a, backend="torch")

    def eager_mdi(a: Any = tensors) -> Any:
        z, h, gate, decay, modulation = a
        g = torch.sigmoid(gate)
        gamma = (torch.sigmoid(decay) * torch.sigmoid(modulation)).clamp(1e-6, 1 - 1e-6)
        return (1 - g) * h + g * z + gamma * h, gamma

    yield "mdi", f"({batch}, {heads * width}) float32", mdi, {"composition": eager_mdi}


def hds_rows() -> Iterator[Row]:
    batch, slots, width = (8, 65536, 128) if LARGE else (2, 4096, 64)
    memory = rand(batch, slots, width)

    def pooled(a: Any = memory) -> Any:
        return srm_core.hds_pool(a, num_levels=3, pool=4, backend="torch")

    def eager_pooled(a: Any = memory) -> Any:
        one = a.unflatten(1, (-1, 4)).mean(2)
        return one, one.unflatten(1, (-1, 4)).mean(2)

    yield "hds_pool", f"{tuple(memory.shape)} float32", pooled, {"composition": eager_pooled}
    dtype = torch.bfloat16 if LARGE else torch.float32
    q, k, v = rand(batch, 4, 256, width, dtype=dtype), *(rand(batch, 4, slots // 4, width, dtype=dtype) for _ in "kv")

    def query(q: Any = q, k: Any = k, v: Any = v) -> Any:
        return srm_core.hds_query(q, k, v, backend="torch")

    def eager_query(q: Any = q, k: Any = k, v: Any = v) -> Any:
        k, v = (a.unflatten(2, (-1, 16)).mean(3) for a in (k, v))
        return F.scaled_dot_product_attention(q, k, v)

    yield "hds_query", f"{tuple(k.shape)} {str(dtype)[6:]}", query, {"composition": eager_query}


def conv_rows() -> Iterator[Row]:
    shapes = [(32, 64, 56, 64, 3), (16, 128, 64, 256, 3), (16, 256, 128, 512, 3), (32, 64, 56, 256, 1)]
    dtype = torch.bfloat16 if LARGE else torch.float32
    for batch, channels, size, out, kernel in shapes if LARGE else [(4, 64, 28, 64, 3)]:
        layout = torch.channels_last
        x = rand(batch, channels, size, size, dtype=dtype).to(memory_format=layout)
        pad = kernel // 2
        module = srm_core.nn.ConvBN2d(channels, out, kernel, padding=pad, activation="relu").to(DEVICE).eval()
        twin = module.to_torch().to(dtype, memory_format=layout)
        weight, bias = module.conv.weight.detach().to(dtype, memory_format=layout), rand(out, dtype=dtype)
        gamma, beta = rand(out), rand(out)

        def ours(x: Any = x, module: Any = module) -> Any:
            with torch.no_grad(), srm_core.use_backend("torch"):
                return module(x)

        def eager(x: Any = x, module: Any = twin) -> Any:
            with torch.no_grad():
                return module(x)

        peers = {"eager": eager}
        if LARGE:

            def fused(x: Any = x, w: Any = weight, b: Any = bias, pad: int = pad) -> Any:
                return torch.cudnn_convolution_relu(x, w, b, (1, 1), (pad, pad), (1, 1), 1)

            peers["cudnn_convolution_relu"] = fused
        yield "nn.ConvBN2d", f"N{batch} C{channels} {size}^2 K{out} {kernel}x{kernel}", ours, peers

        def train(x: Any = x, w: Any = weight, g: Any = gamma, b: Any = beta, pad: int = pad) -> Any:
            return srm_core.conv_bn_train(x, w, None, g, b, padding=pad, activation="relu", backend="torch")

        def eager_train(x: Any = x, w: Any = weight, g: Any = gamma, b: Any = beta, pad: int = pad) -> Any:
            return F.relu(F.batch_norm(F.conv2d(x, w, None, padding=pad), None, None, g, b, training=True))

        yield "conv_bn_train", f"N{batch} C{channels} {size}^2 K{out} {kernel}x{kernel}", train, {"eager": eager_train}


def trivial(ctx: Any, x: Any, state: Any, *others: Any) -> Any:
    return x * 2, state * 2


def trivial_backward(ctx: Any, residuals: Any, d_y: Any, d_state: Any) -> Any:
    return d_y * 2, d_state * 2, None, None, None


class Trivial:
    """A backend whose kernel does next to nothing: what is left is what a call costs."""

    @hookimpl
    def srm_backend_info(self) -> BackendInfo:
        kernel = Kernel(
            "recurrent_step", f"{__name__}:trivial", f"{__name__}:trivial_backward", arrays=("torch",),
            platforms=("cpu", "cuda"),
        )  # fmt: skip
        return BackendInfo("trivial", tech="torch", platforms=("cpu", "cuda"), kernels=(kernel,))


class Plain(torch.autograd.Function):
    """The same as a user would write it."""

    @staticmethod
    def forward(ctx: Any, x: Any, state: Any, weight: Any, bias: Any, decay: Any, mode: Any, index: Any) -> Any:
        ctx.save_for_backward(x, state, weight, bias, decay)
        ctx.mode, ctx.index = mode, index
        return trivial(None, x, state)

    @staticmethod
    def backward(ctx: Any, d_y: Any, d_state: Any) -> Any:
        saved = ctx.saved_tensors
        return (*trivial_backward(None, saved, d_y, d_state), None, None)


def call_rows() -> Iterator[Row]:
    """A call of five tensors with gradients, beside an autograd.Function; without them, beside the function itself."""
    x, state = rand(4, 2, 8, gradient=True), rand(4, 2, 8)
    others = (rand(2, 16), rand(2, 16), rand(2), ("row", "col"), 3)
    plain = x.detach()

    def many(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            for _ in range(1000):
                call()

        return run

    def pulled(call: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(x, state, *others), x, (state, state))

    def ours(x: Any, *rest: Any) -> Any:
        return srm_core.recurrent_step(x, *rest, backend="trivial")

    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "without": (lambda: ours(plain, state, *others), lambda: trivial(None, plain, state, *others)),
        "with, forward": (lambda: ours(x, state, *others), lambda: Plain.apply(x, state, *others)),
        "with, forward and backward": (pulled(ours), pulled(Plain.apply)),
    }
    with local_plugin("trivial", Trivial()):
        for name, (one, other) in pairs.items():
            yield "1000 calls, gradients", name, many(one), {"a user's own": many(other)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tries", type=int, default=15)
    args = parser.parse_args()
    table = []
    families = (
        scan_rows, pointwise_rows, recurrence_rows, lstm_rows, attention_rows, hds_rows, conv_rows, call_rows,
    )  # fmt: skip
    for rows in families:
        for op, size, ours, peers in rows():
            took = measured({"ours": ours, **peers}, args.tries)
            row = {"op": op, "size": size, "ms": took["ours"] * 1e3}
            row["times"] = {name: took[name] / took["ours"] for name in peers}
            shown = [f"{name} {times:.2f}x" for name, times in row["times"].items()]
            if LARGE:
                host = host_seconds({"ours": ours, **peers})
                row["host_us"] = host["ours"] * 1e6
                row["host_times"] = {name: host[name] / host["ours"] for name in peers}
                shown += [f"| host {row['host_us']:.0f} us", *(f"{t:.2f}x" for t in row["host_times"].values())]
            table.append(row)
            print(f"{op:36} {size:44} {row['ms']:9.3f} ms  ", *shown, flush=True)
    if args.out:
        machine = torch.cuda.get_device_name() if LARGE else platform.processor() or platform.machine()
        head = {"device": machine, "torch": torch.__version__, "threads": torch.get_num_threads()}
        args.out.write_text(json.dumps({**head, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
