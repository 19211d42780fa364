"""The NumPy backend against torch on this CPU: each library in a process of its own, measured in turns.

The thread pools of two libraries stall each other within one process. Here one process waits, asleep, while the
other one works; a round measures both, so that a ratio is one of two neighbours in time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

ROUNDS = 11
SECONDS = 0.15  # of calls in one measurement
REST = 0.05  # seconds for the other process's threads to fall asleep

# (what, operator, sizes, the least speed relative to torch)
PEERS: tuple[tuple[str, str, dict[str, Any], float], ...] = (
    ("attention (1,8,1024,64)", "attention", {"shape": (1, 8, 1024, 64)}, 0.45),
    ("attention (1,8,1024,64) causal", "attention", {"shape": (1, 8, 1024, 64), "is_causal": True}, 0.45),
    ("lstm B16 T32 I128 H256", "lstm", {"B": 16, "T": 32, "I": 128, "H": 256}, 0.35),
    ("lstm B8 T64 I256 H512", "lstm", {"B": 8, "T": 64, "I": 256, "H": 512}, 0.35),
    ("lstm B4 T128 I512 H1024", "lstm", {"B": 4, "T": 128, "I": 512, "H": 1024}, 0.35),
    ("mdi_recurrence B16 T256 D256", "mdi_recurrence", {"B": 16, "T": 256, "D": 256}, 0.35),
    ("mdi_recurrence B16 T256 D512", "mdi_recurrence", {"B": 16, "T": 256, "D": 512}, 0.35),
    ("conv_bn (8,64,56,56) 3x3", "conv_bn", {"shape": (8, 64, 56, 56), "out": 64}, 0.35),
)


def _arrays(op: str, s: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, float32, the same in both processes."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    if op == "attention":
        return tuple(normal(*s["shape"]) for _ in range(3)), {"is_causal": s.get("is_causal", False)}
    if op == "lstm":
        i, h, r = s["I"], s["H"], s["H"] ** -0.5
        weights = (normal(4 * h, i, scale=r), normal(4 * h, h, scale=r), normal(4 * h, scale=r), normal(4 * h, scale=r))
        return (normal(s["B"], s["T"], i), *weights), {}
    if op == "mdi_recurrence":
        b, t, d = (s[k] for k in "BTD")
        gamma = rng.uniform(0.5, 0.9, (b, t, d)).astype(np.float32)
        weights = (normal(d, d, scale=d**-0.5), normal(d), normal(d, 2 * d, scale=d**-0.5), normal(d))
        return (normal(b, t, d), gamma, normal(b, d), *weights), {}
    n, c, height, width = s["shape"]
    x = normal(n, height, width, c).transpose(0, 3, 1, 2)  # channels-last
    variance = rng.uniform(0.5, 2, s["out"]).astype(np.float32)
    weight = normal(s["out"], c, 3, 3, scale=(9 * c) ** -0.5)
    vectors = [normal(s["out"]) for _ in range(4)]
    return (x, weight, vectors[0], vectors[1], variance, *vectors[2:]), {"padding": 1, "activation": "relu"}


def _ours(op: str, args: tuple[Any, ...], options: dict[str, Any]) -> Callable[[], Any]:
    import srm_core

    return lambda: srm_core.call(op, *args, backend="numpy", **options)


def _torch(op: str, args: tuple[Any, ...], options: dict[str, Any]) -> Callable[[], Any]:
    """What a user of torch would write."""
    import torch
    from torch.nn import functional as F

    tensors = [torch.from_numpy(a) for a in args]
    if op == "attention":
        return lambda: F.scaled_dot_product_attention(*tensors, **options)
    if op == "lstm":
        x, *weights = tensors
        state = torch.zeros(1, x.shape[0], weights[1].shape[1])
        return lambda: torch.lstm(x, (state, state), weights, True, 1, 0.0, False, False, True)[0]
    if op == "mdi_recurrence":
        return lambda: _eager_recurrence(F, *tensors)
    x, weight, bias, mean, variance, bn_weight, bn_bias = tensors
    weight = weight.contiguous(memory_format=torch.channels_last)

    def conv() -> Any:
        y = F.conv2d(x, weight, bias, padding=1)
        return F.relu_(F.batch_norm(y, mean, variance, bn_weight, bn_bias))

    return conv


def _eager_recurrence(F: Any, z: Any, gamma: Any, h: Any, w_gate: Any, b_gate: Any, w_mdi: Any, b_mdi: Any) -> Any:
    import torch

    states = []
    for z_t, gamma_t in zip(z.unbind(1), gamma.unbind(1), strict=True):
        g = torch.sigmoid(F.linear(torch.cat([z_t, h], -1), w_mdi, b_mdi))
        new = (1 - g) * h + g * z_t + gamma_t * h
        h = z_t * torch.sigmoid(F.linear(h, w_gate, b_gate)) + gamma_t * h + 0.1 * new
        states.append(h)
    return torch.stack(states, 1)


_calls: dict[str, Callable[[], Any]] = {}


def _measure(library: str, what: str) -> tuple[float, float]:
    """(seconds a call, the mean magnitude of the result), in the process of one library."""
    if library == "torch":
        import torch

        torch.set_grad_enabled(False)
        torch.set_num_threads(2)
    if what not in _calls:
        _, op, sizes, _ = next(p for p in PEERS if p[0] == what)
        _calls[what] = (_torch if library == "torch" else _ours)(op, *_arrays(op, sizes))
    run, count = _calls[what], 0
    result = run()
    start = time.perf_counter()
    while time.perf_counter() - start < SECONDS:
        run()
        count += 1
    seconds = (time.perf_counter() - start) / count
    result = result[0] if isinstance(result, tuple) else result
    return seconds, float(abs(result).mean())


class Peers:
    """A process of each library."""

    def __enter__(self) -> Peers:
        self.pools = {name: ProcessPoolExecutor(1, get_context("spawn")) for name in ("torch", "ours")}
        return self

    def __exit__(self, *_: Any) -> None:
        for pool in self.pools.values():
            pool.shutdown()

    def row(self, what: str, target: float) -> dict[str, Any]:
        samples: dict[str, list[float]] = {name: [] for name in self.pools}
        results: dict[str, float] = {}
        for _ in range(ROUNDS + 1):
            for name, pool in self.pools.items():
                time.sleep(REST)
                seconds, results[name] = pool.submit(_measure, name, what).result()
                samples[name].append(seconds)
        if not np.isclose(results["ours"], results["torch"], rtol=1e-4):
            raise ValueError(f"{what}: the libraries disagree: {results}")
        torch, ours = samples["torch"][1:], samples["ours"][1:]  # the first round warms up
        ratio = statistics.median(t / o for t, o in zip(torch, ours, strict=True))
        return {
            "what": what, "ours": f"{statistics.median(ours) * 1e3:.2f} ms",
            "other": f"torch {statistics.median(torch) * 1e3:.2f} ms",
            "ratio": ratio, "target": f">= {target} x", "met": ratio >= target,
        }  # fmt: skip
