"""The triton backend beside its peers and the roofline, on one GPU in one run.

    python asv_bench/triton_targets.py [--out asv_bench/results/triton_targets_h200.json]

Events around replays of a graph of each call, the L2 cache overwritten before; medians, ours and its peers in turns.
Peers named "eager" are called as they are. The roofline is the bytes that an operator must move over the bandwidth of a
copy in the same run, or its operations over the rate of a matrix product, and for a small call an empty kernel on top.
accelerated-scan and fla-core are peers where installed.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_targets import host_seconds, measured, rand

import srm_core

Call = Callable[[], Any]
BYTES = 1 << 31  # of the copy, read and written


class Row(NamedTuple):
    """bytes, flops: the least that must be moved and done. targets: the least part of the roofline, or the least number
    of times that a peer takes as long as ours."""

    op: str
    size: str
    bytes: int
    ours: Call
    peers: dict[str, Call]
    targets: dict[str, float]
    flops: float = 0


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
        yield Row("recurrent_step", size, moved, on("triton", "recurrent_step", *args), peers, {"roofline": target})
    x, weight = rand(8, 4096, 12, 128), rand(12, 4096)
    args = x, weight, weight, torch.rand(12, device="cuda"), mode[10:22]
    peers = {"eager": on("torch", "recurrent_mix", *args)}
    size = "B8 T4096 H12 D128 float32"
    yield Row("recurrent_mix", size, 8 * x.numel(), on("triton", "recurrent_mix", *args), peers, {"roofline": 0.9})


def mdi_rows() -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        args = tuple(rand(8, 4096, 1024, dtype=dtype) for _ in range(5))
        moved = 7 * args[0].numel() * args[0].element_size()
        peers = {"eager": on("torch", "mdi", *args)}
        yield Row(
            "mdi", f"(8, 4096, 1024) {str(dtype)[6:]}", moved, on("triton", "mdi", *args), peers, {"roofline": 0.92}
        )


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
        yield Row("scan", size, 3 * one, on("triton", "scan", gates, tokens), peers, {"roofline": target})
        if shape == (8, 4096, 1536):
            yield from scan_variants(gates, tokens, size, one)


def scan_variants(gates: Any, tokens: Any, size: str, one: int) -> Iterator[Row]:
    constant = gates[:, :1].contiguous()
    yield Row("scan, constant gates", size, 2 * one, on("triton", "scan", constant, tokens), {}, {"roofline": 0.9})
    peers = {"torch.cumprod": lambda: gates.cumprod(1)}
    yield Row("scan, cumulative product", size, 2 * one, on("triton", "scan", gates), peers, {"roofline": 0.85})
    leaves = gates.clone().requires_grad_(), tokens.clone().requires_grad_()
    ones = torch.ones_like(tokens)

    def both_ways() -> None:
        torch.autograd.grad(srm_core.scan(*leaves, backend="triton")[0], leaves, ones)

    yield Row("scan, forward and backward", size, 8 * one, both_ways, {}, {"roofline": 0.9})
    if tokens.dtype is not torch.float32:
        return
    by_time = [a.transpose(1, 2).contiguous() for a in (gates, tokens)]
    views = [a.transpose(1, 2) for a in by_time]
    theirs = imported("accelerated_scan.scalar", "scan")
    peers = {} if theirs is None else {"accelerated_scan.scalar": lambda: theirs(*by_time)}
    ours = on("triton", "scan", *views)
    yield Row("scan, contiguous in time", size, 3 * one, ours, peers, {"accelerated_scan.scalar": 1.0})


def graphed(call: Call) -> Call:
    """The call, replayed from a graph; or as it is, where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call
    return graph.replay


def attention_rows() -> Iterator[Row]:
    bf16 = torch.bfloat16
    for batch, heads, steps, width, causal in (
        (4, 16, 4096, 128, True), (4, 16, 4096, 128, False), (1, 16, 16384, 128, True), (4, 32, 4096, 64, True),
    ):  # fmt: skip
        q, k, v = (rand(batch, heads, steps, width, dtype=bf16) for _ in range(3))
        size = f"B{batch} H{heads} T{steps} D{width} {'causal' if causal else 'full'}"
        flops = 4 * batch * heads * steps * steps * width / (2 if causal else 1)
        peers = {name: sdpa(kind, q, k, v, causal) for name, kind in FUSED.items()}
        targets = {"flash": 1.3, "cudnn": 0.75} if width == 128 else {"flash": 1.0}
        ours = on("triton", "attention", q, k, v, is_causal=causal)
        yield Row("attention", size, 4 * 2 * q.numel(), ours, peers, targets, flops)
        if size == "B4 H16 T4096 D128 causal":
            leaves = tuple(t.clone().requires_grad_() for t in (q, k, v))
            peers = {name: gradients(sdpa(kind, *leaves, causal), leaves) for name, kind in FUSED.items()}
            ours = gradients(lambda a=leaves: srm_core.attention(*a, is_causal=True, backend="triton"), leaves)
            yield Row("attention, both ways", size, 32 * q.numel(), ours, peers, {"flash": 1.0}, 3.5 * flops)


FUSED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def sdpa(kind: Any, q: Any, k: Any, v: Any, causal: bool) -> Call:
    def run() -> Any:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return run


def gradients(call: Call, leaves: tuple[Any, ...]) -> Call:
    """The call and its gradient, of ones."""
    ones: list[Any] = []

    def run() -> None:
        found = call()
        first = found[0] if isinstance(found, tuple) else found
        if not ones:
            ones.append(torch.ones_like(first))
        torch.autograd.grad(first, leaves, ones[0])

    return run


def lstm_rows() -> Iterator[Row]:
    """cuDNN is given what ours is; under TF32, which it is by default, it would not compute in float32."""
    torch.backends.cudnn.allow_tf32 = False
    for batch, steps, inputs, width, dtype in (
        (16, 1024, 128, 128, torch.bfloat16), (16, 1024, 128, 128, torch.float32),
        (16, 1024, 512, 512, torch.bfloat16), (16, 1024, 512, 512, torch.float32),
        (16, 1024, 512, 512, torch.float16), (16, 1024, 768, 768, torch.bfloat16),
        (16, 1024, 768, 768, torch.float32), (1, 1024, 256, 256, torch.bfloat16),
        (1, 1024, 256, 256, torch.float32), (16, 32, 128, 256, torch.bfloat16), (16, 32, 128, 256, torch.float32),
    ):  # fmt: skip
        layer = torch.nn.LSTM(inputs, width, batch_first=True, device="cuda", dtype=dtype)
        weights = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0)
        x = rand(batch, steps, inputs, dtype=dtype)
        args = (x, *(w.detach() for w in weights))
        size = f"B{batch} T{steps} I{inputs} H{width} {str(dtype)[6:]}"
        peers = {"cudnn": lambda layer=layer, x=x: torch.no_grad()(layer)(x), "torch": on("torch", "lstm", *args)}
        flops = 8 * batch * steps * width * (inputs + width)
        moved = (x.numel() + batch * steps * width + sum(w.numel() for w in weights)) * x.element_size()
        targets = {"cudnn": 2.0} if width <= 128 else {"torch": 1.0}
        yield Row("lstm", size, moved, on("triton", "lstm", *args), peers, targets, flops)
        if width == 512 and dtype is torch.bfloat16:
            leaves = (x.clone().requires_grad_(), *weights)
            peers = {"cudnn": gradients(lambda layer=layer, x=leaves[0]: layer(x), leaves)}
            ours = gradients(lambda a=leaves: srm_core.lstm(*a, backend="triton"), leaves)
            yield Row("lstm, both ways", size, 3 * moved, ours, peers, {"cudnn": 1.0}, 3 * flops)
    torch.backends.cudnn.allow_tf32 = True


def eager_recurrence(z: Any, gamma: Any, h: Any, w_gate: Any, b_gate: Any, w_mdi: Any, b_mdi: Any) -> Any:
    out = []
    for t in range(z.shape[1]):
        g = torch.sigmoid(F.linear(torch.cat([z[:, t], h], 1), w_mdi, b_mdi))
        n = (1 - g) * h + g * z[:, t] + gamma[:, t] * h
        h = z[:, t] * torch.sigmoid(F.linear(h, w_gate, b_gate)) + gamma[:, t] * h + 0.1 * n
        out.append(h)
    return torch.stack(out, 1)


def recurrence_rows() -> Iterator[Row]:
    for width, dtype, target in (
        (128, torch.float32, 10), (256, torch.float32, 2), (512, torch.float32, 2), (192, torch.bfloat16, 10),
    ):  # fmt: skip
        batch, steps = 16, 256
        shapes = ((width, width), (width,), (width, 2 * width), (width,))
        z, h0 = rand(batch, steps, width, dtype=dtype), rand(batch, width, dtype=dtype)
        gamma = torch.rand(z.shape, device="cuda").to(dtype)
        args = (z, gamma, h0, *(rand(*s, dtype=dtype) * width**-0.5 for s in shapes))
        size = f"B{batch} T{steps} D{width} {str(dtype)[6:]}"
        peers = {
            "eager": lambda a=args: eager_recurrence(*a),
            "eager in a graph": lambda a=args: eager_recurrence(*a),
        }
        flops = 6 * batch * steps * width * width
        targets = {"eager in a graph": float(target)}
        moved = 3 * z.numel() * z.element_size()
        yield Row("mdi_recurrence", size, moved, on("triton", "mdi_recurrence", *args), peers, targets, flops)
        leaves = tuple(a.requires_grad_() for a in args)
        peers = {"eager": gradients(lambda a=leaves: eager_recurrence(*a), leaves)}
        ours = gradients(lambda a=leaves: srm_core.mdi_recurrence(*a, backend="triton"), leaves)
        yield Row("mdi_recurrence, both ways", size, 3 * moved, ours, peers, {"eager": 5.0}, 3 * flops)


def pooled(t: Any, pool: int, levels: int) -> Any:
    for _ in range(levels - 1):
        t = t.unflatten(2, (-1, pool)).mean(3)
    return t


def hds_rows() -> Iterator[Row]:
    for dtype in (torch.float32, torch.bfloat16):
        memory = rand(4, 16, 16384, 128, dtype=dtype)
        moved = int(memory.numel() * memory.element_size() * (1 + 1 / 4 + 1 / 16))
        peers = {"eager": lambda m=memory: [pooled(m, 4, 2), pooled(m, 4, 3)]}
        size = f"B4 H16 M16384 D128 {str(dtype)[6:]}"
        yield Row("hds_pool", size, moved, on("triton", "hds_pool", memory), peers, {"roofline": 0.85})
    values = rand(4, 16, 16384, 128, dtype=dtype)
    for steps in (1, 64, 1024):
        query = rand(4, 16, steps, 128, dtype=dtype)

        def eager(q: Any = query, k: Any = memory, v: Any = values) -> Any:
            return F.scaled_dot_product_attention(q, pooled(k, 4, 3), pooled(v, 4, 3))

        args = query, memory, values
        size = f"B4 H16 T{steps} M16384 D128 bfloat16"
        ours = on("triton", "hds_query", *args)
        yield Row("hds_query", size, 2 * memory.numel() * 2, ours, {"eager": eager}, {"eager": 1.5})
    for slots in (4096, 65536):
        memory = rand(4, 16, slots, 128, dtype=dtype)
        levels = srm_core.hds_pool(memory, backend="triton")
        args = memory, levels, rand(4, 16, 1, 128, dtype=dtype), 5
        again = on("torch", "hds_update_", *args)
        yield Row(
            "hds_update_", f"B4 H16 S1 M{slots} D128 bfloat16", 0, on("triton", "hds_update_", *args),
            {"torch": again}, {"torch": 1.0},
        )  # fmt: skip


def conv_rows() -> Iterator[Row]:
    for batch, channels, side, out, kernel in (
        (32, 64, 56, 64, 3), (16, 128, 64, 256, 3), (16, 256, 128, 512, 3), (32, 64, 56, 256, 1),
    ):  # fmt: skip
        layout, pad, dtype = torch.channels_last, kernel // 2, torch.bfloat16
        x = rand(batch, channels, side, side, dtype=dtype).to(memory_format=layout)
        w = (rand(out, channels, kernel, kernel, dtype=dtype) * channels**-0.5).to(memory_format=layout)
        b, var = rand(out, dtype=dtype), torch.rand(out, device="cuda", dtype=dtype) + 0.5
        options = {"padding": pad, "activation": "relu"}

        def eager(x: Any = x, w: Any = w, b: Any = b, v: Any = var, pad: int = pad) -> Any:
            return F.relu(F.batch_norm(F.conv2d(x, w, b, padding=pad), b, v, b, b))

        def fused(x: Any = x, w: Any = w, b: Any = b, pad: int = pad) -> Any:
            return torch.cudnn_convolution_relu(x, w, b, (1, 1), (pad, pad), (1, 1), 1)

        peers = {"cudnn": fused, "eager": eager, "torch.compile": torch.compile(eager)}
        size = f"N{batch} C{channels} {side}^2 K{out} {kernel}x{kernel} bfloat16"
        flops = 2 * batch * side * side * out * channels * kernel * kernel
        moved = 2 * batch * side * side * (channels + out)
        targets = {"cudnn": 0.75, **({"torch.compile": 1.2} if kernel == 3 else {})}
        ours = on("triton", "conv_bn", x, w, b, b, var, b, b, **options)
        yield Row("conv_bn", size, moved, ours, peers, targets, flops)

        def trained(x: Any = x, w: Any = w, b: Any = b, pad: int = pad) -> Any:
            return F.relu(F.batch_norm(F.conv2d(x, w, None, padding=pad), None, None, b, b, training=True))

        ours = on("triton", "conv_bn_train", x, w, None, b, b, **options)
        yield Row("conv_bn_train", size, moved, ours, {"eager": trained}, {"eager": 1.15}, flops)


def imported(module: str, name: str) -> Any:
    try:
        return getattr(__import__(module, fromlist=[name]), name)
    except ImportError:
        return None


AS_CALLED = ("eager",)  # what a user would write, launch by launch
ROWS = {
    "step": step_rows, "mdi": mdi_rows, "scan": scan_rows, "attention": attention_rows, "lstm": lstm_rows,
    "recurrence": recurrence_rows, "hds": hds_rows, "conv": conv_rows,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tries", type=int, default=15)
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS))
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("srm_backends").setLevel(logging.INFO)  # what is measured before a choice is remembered
    source = torch.empty(BYTES // 2, dtype=torch.uint8, device="cuda")
    target, small = torch.empty_like(source), torch.empty(1, device="cuda")
    a, b = rand(8192, 8192, dtype=torch.bfloat16), rand(8192, 8192, dtype=torch.bfloat16)
    ceilings = {"copy": partial(target.copy_, source), "empty": small.zero_, "product": partial(torch.mm, a, b)}
    took = measured(ceilings, args.tries)
    copy, floor, product = BYTES / took["copy"], took["empty"], 2 * 8192**3 / took["product"]
    print(
        f"copy {copy / 1e12:.2f} TB/s, a kernel of one element {floor * 1e6:.1f} us, "
        f"a product in bfloat16 {product / 1e12:.0f} TFLOP/s"
    )
    table = []
    for name in args.only:
        for row in ROWS[name]():
            calls = {"ours": row.ours, **row.peers}
            took = measured({n: c if n in AS_CALLED else graphed(c) for n, c in calls.items()}, args.tries)
            least = max(row.bytes / copy, row.flops / product) + (floor if row.bytes < BYTES / 64 else 0)
            times = {name: took[name] / took["ours"] for name in row.peers}
            reached = {"roofline": least / took["ours"], **times}
            host = host_seconds({"ours": row.ours})["ours"]
            met = {of: reached.get(of, 0.0) >= wanted for of, wanted in row.targets.items()}
            table.append({
                "op": row.op, "size": row.size, "us": took["ours"] * 1e6, "of_roofline": reached["roofline"],
                "times": times, "host_us": host * 1e6, "targets": row.targets, "met": met,
            })  # fmt: skip
            shown = ", ".join(f"{name} {t:.2f}x" for name, t in times.items())
            wanted = ", ".join(f"{of} {w:g} {'met' if met[of] else 'NOT MET'}" for of, w in row.targets.items())
            print(
                f"{row.op:26} {row.size:36} {took['ours'] * 1e6:9.1f} us  {reached['roofline']:.2f} of the roofline  "
                f"[{wanted}]  {shown}  host {host * 1e6:.0f} us", flush=True,
            )  # fmt: skip
    if args.out:
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        ceilings = {"copy_TB_s": copy / 1e12, "product_TFLOP_s": product / 1e12}
        args.out.write_text(json.dumps({**head, **ceilings, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
