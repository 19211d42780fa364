"""Loops of small steps on CUDA, captured as a graph and replayed: one launch instead of hundreds."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

STEPS = 64  # of a loop in one graph, which serves sequences of every length
KEPT = 16  # graphs, the most recently used ones
BYTES = 1 << 29  # of their buffers altogether
Tensors = tuple[Tensor, ...]
Body = Callable[[Tensors, Tensors, Any], None]

_graphs: OrderedDict[Any, _Graph] = OrderedDict()
_seen: OrderedDict[Any, None] = OrderedDict()  # kinds that have come once: a capture pays from the second time on
_lives: dict[torch.device, tuple[Any, Any]] = {}  # of a device: the stream of captures, the event of the last replay
_lock = threading.Lock()


def pieces(steps: int, like: Tensor) -> list[slice]:
    """The steps 0 to `steps` - 1 in the pieces in which to hand them to `replayed`."""
    size = STEPS if _replays(like) else max(1, steps)
    return [slice(t, min(t + size, steps)) for t in range(0, steps, size)]


def replayed(body: Body, outputs: Tensors, inputs: Tensors, constant: Any, policy: str) -> None:
    """`body(outputs, inputs, constant)`; on CUDA, the second time of a kind and from then on, as its graph.

    body: operations on tensors that write all of `outputs` and look at no value. A kind is the body, the constant, the
    policy, shapes, dtypes and the device. Within a capture of the caller's the body is captured with it. An error of a
    capture is an error of the call.
    """
    if _replays(inputs[0]):
        with _lock:  # the buffers of a graph are one call's at a time, until its work is in the queue
            graph = _found(body, outputs, inputs, constant, policy)
            if graph is not None:
                graph(outputs, inputs)
                return
    body(outputs, inputs, constant)


def _replays(like: Tensor) -> bool:
    if not like.is_cuda:
        return False
    with torch.cuda.device(like.device):
        return not torch.cuda.is_current_stream_capturing()


def _found(body: Body, outputs: Tensors, inputs: Tensors, constant: Any, policy: str) -> _Graph | None:
    """The graph of this kind; None if it comes for the first time, or would take too much memory."""
    key = (body, constant, policy, inputs[0].device, *((t.shape, t.dtype) for t in inputs))
    if key in _graphs:
        _graphs.move_to_end(key)
        return _graphs[key]
    size = _bytes(outputs) + _bytes(inputs)
    if key not in _seen or size > BYTES // 2:
        _seen[key] = None
        if len(_seen) > 8 * KEPT:
            _seen.popitem(last=False)
        return None
    while _graphs and (len(_graphs) >= KEPT or size + sum(g.size for g in _graphs.values()) > BYTES):
        _graphs.popitem(last=False)[1].retire()
    graph = _graphs[key] = _Graph(body, outputs, inputs, constant)
    return graph


def _bytes(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


class _Graph:
    """A captured call with the buffers that it reads and writes.

    All of a device are captured on one stream, and share with it what cuBLAS works in: so a replay waits for the one
    before, whichever graph's and on whichever stream that was.
    """

    def __init__(self, body: Body, outputs: Tensors, inputs: Tensors, constant: Any) -> None:
        self.device, self.size = inputs[0].device, _bytes(outputs) + _bytes(inputs)
        with torch.cuda.device(self.device), torch.inference_mode(False), torch.no_grad():
            if self.device not in _lives:
                _lives[self.device] = torch.cuda.Stream(priority=-1), torch.cuda.Event()
            stream, self.last = _lives[self.device]
            current = torch.cuda.current_stream()
            current.wait_event(self.last)
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self.inputs, self.outputs = (
                    tuple(torch.zeros(t.shape, dtype=t.dtype, device=self.device) for t in tensors)
                    for tensors in (inputs, outputs)
                )
                body(self.outputs, self.inputs, constant)  # what a first call sets up has no place in a graph
                self.graph = torch.cuda.CUDAGraph()
                self.graph.capture_begin(capture_error_mode="thread_local")
                try:
                    body(self.outputs, self.inputs, constant)
                finally:
                    self.graph.capture_end()
            current.wait_stream(stream)

    def __call__(self, outputs: Tensors, inputs: Tensors) -> None:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self.last)
            for own, given in zip(self.inputs, inputs, strict=True):
                own.copy_(given)
            self.graph.replay()
            for given, own in zip(outputs, self.outputs, strict=True):
                given.copy_(own)
            self.last.record(stream)

    def retire(self) -> None:
        """Before its memory goes: another stream may still be in the midst of it."""
        self.last.synchronize()
