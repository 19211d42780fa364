"""Loops of small steps on CUDA, captured once as a graph and replayed: a launch instead of thousands."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEPT = 16  # graphs, the most recently used ones
_graphs: OrderedDict[Any, _Graph] = OrderedDict()
_seen: OrderedDict[Any, None] = OrderedDict()  # keys that have come once: a graph is worth its capture from then on
_lock = threading.Lock()


class _Graph:
    """A captured function with the buffers that it reads and writes."""

    def __init__(self, body: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...], constant: Any) -> None:
        self.inputs = tuple(torch.empty_like(t, memory_format=torch.contiguous_format).copy_(t) for t in tensors)
        stream = torch.cuda.Stream(tensors[0].device)
        stream.wait_stream(torch.cuda.current_stream(tensors[0].device))
        with torch.cuda.stream(stream):
            body(self.inputs, constant)  # what a first call allocates has no place in the graph
        torch.cuda.current_stream(tensors[0].device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = body(self.inputs, constant)
        self.done = torch.cuda.Event()

    def __call__(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        stream = torch.cuda.current_stream(tensors[0].device)
        stream.wait_event(self.done)  # another stream may still use the buffers
        for own, given in zip(self.inputs, tensors, strict=True):
            own.copy_(given)
        self.graph.replay()
        outputs = tuple(o.clone() for o in self.outputs)
        self.done.record(stream)
        return outputs


def replayed(
    body: Callable[[tuple[Tensor, ...], Any], tuple[Tensor, ...]], tensors: tuple[Tensor, ...], constant: Any
) -> tuple[Tensor, ...]:
    """`body(tensors, constant)`, on CUDA from the second call of a kind on as a replay of its graph.

    body: operations on the tensors alone, without a look at values; it allocates its results. A kind is the body, the
    constant, shapes, dtypes and the device. Within a capture of the caller's the body is captured with it.
    """
    if not tensors[0].is_cuda or torch.cuda.is_current_stream_capturing():
        return body(tensors, constant)
    switches = (torch.backends.cuda.matmul.allow_tf32, torch.are_deterministic_algorithms_enabled())
    key = (body, constant, switches, tensors[0].device, *((t.shape, t.dtype) for t in tensors))
    with _lock, torch.cuda.device(tensors[0].device):
        graph = _graphs.get(key)
        if graph is None:
            if key not in _seen:
                _seen[key] = None
                while len(_seen) > 8 * KEPT:
                    _seen.popitem(last=False)
                return body(tensors, constant)
            graph = _graphs[key] = _Graph(body, tensors, constant)
            while len(_graphs) > KEPT:
                _graphs.popitem(last=False)
        _graphs.move_to_end(key)
        return graph(tensors)
