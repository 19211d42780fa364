"""One call on the backend under test, with everything that must hold whatever the values are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

import srm_core
from srm_conformance.layouts import PLAIN, Layout, Placed, extent, overlap, to_numpy
from srm_conformance.outcome import NotClaimed, Report, Wrong
from srm_conformance.proof import recording
from srm_conformance.subject import Subject
from srm_core.arrays import LIBRARIES, library_of
from srm_core.contract import Call
from srm_core.errors import UndeclaredFeature
from srm_core.ops.common import is_channels_last
from srm_core.spec import Kernel, OpSpec

Values = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments and options of a call, as NumPy arrays


class Trial:
    """A call's arguments, placed in memory of the subject's library, and runs of the kernel on them.

    keep: the parameters that stay plain whatever the layout is. number: of the device, where there are several.
    """

    def __init__(
        self, subject: Subject, spec: OpSpec, values: Values, library: str, report: Report,
        layout: Layout = PLAIN, keep: Sequence[str] = (), number: int = 0,
    ) -> None:  # fmt: skip
        self.subject, self.spec, self.library, self.report = subject, spec, library, report
        self.placed: dict[str, Placed] = {}
        self._device = subject.place(library, number)
        args, options = spec.bind(*values)
        named = {**dict(zip((p.name for p in spec.parameters), args, strict=False)), **options}
        shown = {n: self._place(n, v, PLAIN if n in keep else layout) for n, v in named.items()}
        self.args = tuple(shown[n] for n in named if n not in options)
        self.options = {n: shown[n] for n in options}
        self.call = Call(spec, self.args, self.options)

    def _place(self, name: str, value: Any, layout: Layout) -> Any:
        if isinstance(value, tuple) and any(isinstance(v, np.ndarray) for v in value):
            return tuple(self._place(f"{name}[{i}]", v, layout) for i, v in enumerate(value))
        if not isinstance(value, np.ndarray):
            return value
        placed = self.placed[name] = Placed(value, layout, self.library, self._device)
        return placed.view

    def named(self) -> dict[str, Any]:
        """Every argument by its name."""
        return {**dict(zip((p.name for p in self.spec.parameters), self.args, strict=False)), **self.options}

    @property
    def kernel(self) -> Kernel:
        kernel = self.subject.kernel(self.spec.name)
        assert kernel is not None  # no item is made of an operator without one
        return kernel

    def claimed(self, gradients: bool = False) -> None:
        """Go on if the backend says that it takes this call. Errors: `NotClaimed` with its reasons; `Wrong` ones."""
        try:
            decision = srm_core.explain(
                self.spec.name, *self.args, backend=self.subject.backend, gradients=gradients, **self.options
            )
        except UndeclaredFeature as error:
            raise Wrong(str(error)) from error
        if decision.chosen is not None:
            return
        reasons = decision.candidates[0].reasons or ()
        for reason in reasons:
            if reason.code in ("predicate-failed", "probe-failed"):
                raise Wrong(f"a no must have reasons, but {reason.message}")
            if not reason.code.strip() or not reason.message.strip():
                raise Wrong(f"a no must have reasons that people understand, found {reason!r}")
        raise NotClaimed("; ".join(map(str, reasons)))

    def forward(self, **how: Any) -> tuple[tuple[Any, ...], list[Any]]:
        """Run the kernel. Returns its outputs, and what the arguments that it mutates then hold, as NumPy arrays."""
        with self._runs([self.kernel.forward]):
            result = srm_core.call(self.spec.name, *self.args, backend=self.subject.backend, **{**self.options, **how})
        outputs = self.spec.unpack(result)
        self._form(result, outputs)
        self._memory(outputs)
        return tuple(map(to_numpy, outputs)), [self.placed[n].value() for n, _ in self.call.mutated()]

    def vjp(self) -> tuple[tuple[Any, ...], Any]:
        """Run the forward that keeps residuals. Returns its outputs and the pullback, both of the library."""
        with self._runs([self.kernel.forward]):
            result, pullback = srm_core.vjp(
                self.spec.name, *self.args, backend=self.subject.backend, **self.options
            )  # fmt: skip
        outputs = self.spec.unpack(result)
        self._form(result, outputs)
        self._memory(outputs)
        return outputs, pullback

    def pull_back(self, outputs: Any, pullback: Any, grads: Sequence[Any], layout: Layout = PLAIN) -> tuple[Any, ...]:
        """Run the backward on gradients (NumPy arrays, or None for one left out). Returns NumPy arrays and None."""
        placed = [None if g is None else Placed(g, layout, self.library, self._device) for g in grads]
        held = [None if o is None else to_numpy(o).tobytes() for o in outputs]
        backward = self.kernel.backward or ""
        with self._runs([] if backward == "autograd" else [backward]):  # autograd runs no kernel of the backend
            gradients = pullback(*(None if p is None else p.view for p in placed))
        if not isinstance(gradients, tuple):
            raise Wrong(f"the backward returned a {type(gradients).__name__}; required a tuple")
        for name, p in zip(self.call.output_names(), placed, strict=True):
            if p is not None and (what := p.touched(within=True)):
                raise Wrong(f"the backward wrote to the gradient of {name}: {what}")
        if held != [None if o is None else to_numpy(o).tobytes() for o in outputs]:
            raise Wrong("the backward wrote to an output of the forward")
        self._memory(gradients, [p.view for p in placed if p is not None], "gradient")
        for name, gradient in zip(self.spec.differentiable, gradients, strict=False):
            if gradient is not None:
                self._of_library(f"the gradient of {name}", gradient)
        return tuple(None if g is None else to_numpy(g) for g in gradients)

    @contextmanager
    def _runs(self, expected: list[str]) -> Iterator[None]:
        """The body must run these kernels, and no other."""
        with recording() as launches:
            try:
                yield
            except Exception as error:
                cause = error.__cause__ or error
                raise Wrong(f"it said yes, and raised {type(cause).__name__}: {cause}") from error
        self.report.launches += len(launches)
        if launches != expected:
            ran = ", ".join(launches) or "no kernel"
            raise Wrong(f"{ran} ran; required {', '.join(expected)}, once")

    def _form(self, result: Any, outputs: tuple[Any, ...]) -> None:
        if isinstance(result, list):
            raise Wrong("it returned a list; required a tuple, or one array")
        for name, output, like in zip(self.call.output_names(), outputs, self.call.output_formats(), strict=False):
            self._of_library(name, output)
            if like:
                self._in_format(name, output, like)

    def _of_library(self, name: str, array: Any) -> None:
        found = library_of(array)
        if found != self.library:
            raise Wrong(f"{name} is a {type(array).__name__}; required an array of {self.library}, as it was given")
        platform = LIBRARIES[found].platform(array)
        if platform != self.subject.device:
            raise Wrong(f"{name} is on {platform}; required {self.subject.device}, where the arguments are")

    def _in_format(self, name: str, output: Any, like: str) -> None:
        """An output has the memory format of the argument `like`: channels-last where that is, else row-major."""
        given, strides = _host_strides(self.call.values[like]), _host_strides(output)
        want = "channels-last" if is_channels_last(given) else "row-major"
        dense = strides.transpose(0, 2, 3, 1) if want == "channels-last" else strides
        if strides.size and not dense.flags.c_contiguous:
            raise Wrong(f"{name} is not {want} in memory, which {like} makes it")

    def _memory(self, results: Sequence[Any], others: Sequence[Any] = (), what: str = "output") -> None:
        """No argument was written to that may not be; no result shares memory with one, or with another result."""
        for name, placed in self.placed.items():
            mutated = name.partition("[")[0] in self.spec.mutates
            if place := placed.touched(within=not mutated):
                raise Wrong(f"it wrote to {name}: {place}")
        taken = {n: extent(p.view) for n, p in self.placed.items()}
        taken |= {f"the gradient {i} it was given": extent(a) for i, a in enumerate(others)}
        for i, result in enumerate(results):
            if library_of(result) != self.library:
                continue
            own = extent(result)
            for other, where in taken.items():
                if overlap(own, where):
                    raise Wrong(f"{what} {i} shares memory with {other}")
            taken[f"{what} {i}"] = own


def _host_strides(array: Any) -> Any:
    """A NumPy array of the shape and strides of an array of any library; its values mean nothing."""
    if library_of(array) == "numpy":
        return array
    strides = LIBRARIES[library_of(array) or "numpy"].strides(array)
    return np.lib.stride_tricks.as_strided(np.empty(0, np.int8), tuple(array.shape), tuple(int(s) for s in strides))
