"""On a GPU: the caller's stream, a second device, and capture in a graph."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import numpy as np

from srm_conformance.items import Check, Item, Target, sampled
from srm_conformance.layouts import to_numpy
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.trial import Trial

MATRIX = 4096  # its products keep a stream busy for some milliseconds


class Gpu(Protocol):
    """What the checks need of an array library on a GPU."""

    def count(self) -> int: ...

    def side_stream(self) -> AbstractContextManager[Any]:
        """Another stream than the default one is current within; the work on both is done at the end."""

    def busy(self) -> None:
        """Keep the current stream busy."""

    def fill(self, array: Any, values: Any) -> None:
        """Write values, that are on the device already, on the current stream."""

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Capture a call in a graph: its result, and the function that replays it and waits."""


class _Torch:
    def __init__(self) -> None:
        self.torch = sys.modules["torch"]

    def count(self) -> int:
        return int(self.torch.cuda.device_count())

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        self.torch.cuda.synchronize()
        stream = self.torch.cuda.Stream()

        with self.torch.cuda.stream(stream):
            yield
        self.torch.cuda.synchronize()

    def busy(self) -> None:
        m = self.torch.ones(MATRIX, MATRIX, device="cuda")
        for _ in range(8):
            m = (m @ m) * 0

    def fill(self, array: Any, values: Any) -> None:
        array.copy_(values)

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        with self.side_stream():
            function()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            result = function()

        def replay() -> None:
            graph.replay()
            self.torch.cuda.synchronize()

        return result, replay


class _CuPy:
    def __init__(self) -> None:
        self.cupy = sys.modules["cupy"]

    def count(self) -> int:
        return int(self.cupy.cuda.runtime.getDeviceCount())

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        self.cupy.cuda.runtime.deviceSynchronize()
        stream = self.cupy.cuda.Stream(non_blocking=True)

        with stream:
            yield
        self.cupy.cuda.runtime.deviceSynchronize()

    def busy(self) -> None:
        m = self.cupy.ones((MATRIX, MATRIX), np.float32)
        for _ in range(8):
            m = (m @ m) * 0

    def fill(self, array: Any, values: Any) -> None:
        array[...] = values

    def captured(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        stream = self.cupy.cuda.Stream(non_blocking=True)
        with stream:
            function()
            stream.synchronize()
            stream.begin_capture()
            result = function()
            graph = stream.end_capture()

        def replay() -> None:
            graph.launch(stream)
            stream.synchronize()

        return result, replay


def gpu(library: str) -> Gpu:
    return _Torch() if library == "torch" else _CuPy()


def streams(target: Target) -> Iterator[Item]:
    """The arguments get their values on a stream that is still busy: a kernel on another one would see NaN."""
    dtype = target.one_half()[0]
    for case in target.cases()[:3]:

        def run(report: Report, case: Any = case) -> None:
            device = gpu(target.library)
            values = sampled(target.spec, case, dtype)
            trial = Trial(target.subject, target.spec, values, target.library, report)
            trial.claimed()
            trial.forward()  # compiled, if it needs that
            fresh = Trial(target.subject, target.spec, values, target.library, report)
            late = Trial(target.subject, target.spec, _blank(values), target.library, report)
            with device.side_stream():
                device.busy()
                for name, placed in late.placed.items():
                    device.fill(placed.view, fresh.placed[name].view)
                result = target.subject.call(target.spec, late.named())
            got = tuple(map(to_numpy, target.spec.unpack(result)))
            after = [late.placed[n].value() for n, _ in late.call.mutated()]
            report.judge(target.judge(case, dtype).forward(got, after))

        yield target.item("streams", (case.name, dtype), run, dtype)


def second_device(target: Target) -> Iterator[Item]:
    """Arrays on a device that is not the current one."""
    dtype = target.one_half()[0]
    for case in target.cases()[:3]:

        def run(report: Report, case: Any = case) -> None:
            if gpu(target.library).count() < 2:
                raise NotClaimed("there is one device here")
            values = sampled(target.spec, case, dtype)
            trial = Trial(target.subject, target.spec, values, target.library, report, number=1)
            trial.claimed()
            report.judge(target.judge(case, dtype).forward(*trial.forward()))

        yield target.item("second-device", (case.name, dtype), run, dtype)


def graphs(target: Target) -> Iterator[Item]:
    """A call captured in a graph, replayed with other values in the same memory."""
    dtype = target.one_half()[0]
    for case in target.cases():
        if 0 in case.dims.values():
            continue  # an empty graph is refused

        def run(report: Report, case: Any = case) -> None:
            if not target.kernel.graph_safe:
                raise NotClaimed("is not declared graph_safe")
            device = gpu(target.library)
            trial = Trial(target.subject, target.spec, sampled(target.spec, case, dtype), target.library, report)
            trial.claimed()
            other = Trial(target.subject, target.spec, sampled(target.spec, case, dtype, 1), target.library, report)
            result, replay = device.captured(lambda: target.subject.call(target.spec, trial.named()))
            for name, placed in trial.placed.items():
                device.fill(placed.view, other.placed[name].view)
            for _ in range(1 if target.spec.mutates else 3):
                replay()
            got = tuple(map(to_numpy, target.spec.unpack(result)))
            if not got and not target.spec.mutates:
                raise Wrong("the captured call returned nothing")
            after = [trial.placed[n].value() for n, _ in trial.call.mutated()]
            report.judge(target.judge(case, dtype, seed=1).forward(got, after))

        yield target.item("graphs", (case.name, dtype), run, dtype)


def _blank(values: Any) -> Any:
    """The same arguments, the floating ones of NaN."""

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if isinstance(value, np.ndarray) and value.dtype.kind not in "iub":
            return np.full_like(value, np.nan)
        return value

    args, options = values
    return tuple(map(of, args)), {n: of(v) for n, v in options.items()}


DEVICE_CHECKS: dict[str, Check] = {"streams": streams, "second-device": second_device, "graphs": graphs}
