"""Numbers that count as right: an array is judged by what honest rounding would have cost.

*Truth* is the operator's reference in float64 on the rounded inputs. Where an input is float64 it is the
reference in `numpy.longdouble`, because a float64 result cannot be judged by a float64 truth.

*The rounding model* is the same reference in float32 (float64 for float64 inputs) with its results rounded to
the dtypes that the specification gives them: rounded inputs, float32 arithmetic, rounded outputs. Beside half
types it also rounds what `spec.permitted_roundings` names (the probabilities of attention, say) to that type; and
under the precision "tf32" the operands of matrix products to that format.

An array is measured in three ways against the truth, for a few wrong elements hide in a norm, and an error spread
over all elements hides in a maximum:

- `frobenius_error`: the norm of the difference over the norm of the truth;
- `row_error`: the largest difference over the largest magnitude in its last-axis row of the truth;
- `peak_error`: the largest difference over the largest magnitude of all, since one row that cancels to almost
  nothing makes the row error of an honest model large, and would hide the others.

Each may be at most ``max(4 eps, k * the same measure of the rounding model)``, eps that of the array's dtype,
k = 2 for outputs and 3 for gradients. So a half type may be rounded once at the end, but not at every step.

One run of the rounding model may be lucky, above all where a few elements decide the measure: a gradient of three
decays, say. Held to one run, a judgement in three thousand of a good kernel failed. So the rounding model is
measured on the inputs and on `NEIGHBOURS` neighbours of them, which differ in the last bits only and so are
rounded differently all the way, and its largest error counts. Half inputs have one more neighbour, in float32: among
half values a difference may be 0 exactly, of which float32 arithmetic in another order leaves some.

Even so a result of one to three numbers may be unlucky once in a thousand times. So a result that exceeds what is
allowed by less than `APPEAL` times is judged once more, against `MORE_NEIGHBOURS` of them.

NaN and infinity must stand where the rounded truth has them, with the same sign, or where the rounding model
has them: past the range of float32 a kernel cannot do better than float32 arithmetic does. An element that is
not finite on one side takes no part in the measures. A half type overflows where its rounded truth does. In a gradient
NaN may stand for infinity and infinity for NaN: where a factor stands, before a sum or in each of its terms, decides
between them, and is left open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, Literal

import numpy as np

from srm_conformance.measures import (
    NAN,
    Array,
    Worst,
    eps_of,
    frobenius_error,
    kinds_of,
    peak_error,
    rounded_to,
    row_error,
    tf32,
    where_largest,
)
from srm_core.contract import Call
from srm_core.ops.common import TF32, finfo
from srm_core.spec import HALF, Invariant, OpSpec

Measure = Literal["form", "non-finite", "frobenius", "row", "peak"]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Roundings = dict[str, Any]  # the keyword `rounding` of a reference, or nothing
Run = Callable[[Any, Roundings | None, Arguments], list[Any]]

FORWARD, BACKWARD = 2, 3  # k: how many times the error of the rounding model
LEAST = 4  # eps that are allowed anyway
NEIGHBOURS, MORE_NEIGHBOURS = 4, 40
APPEAL = 4  # times what is allowed
ROUNDED_AWAY = 1000  # eps of the truth beside the gradients of the outputs: a gradient so small is 0
EXTENDED = bool(np.finfo(np.longdouble).eps < np.finfo(np.float64).eps)  # not so on Windows and Apple silicon


@dataclass(frozen=True)
class Judgement:
    """One array by one measure.

    what: "y", "gradient of x", "state after the call". measure: "form" (an array of this shape and dtype at all),
    "non-finite" (error: how many elements have NaN or infinity in the wrong place), "frobenius", "row" or "peak".
    derived: how `allowed` came about. index, got, expected: the worst element, or the form.
    """

    what: str
    measure: Measure
    error: float
    allowed: float
    derived: str
    got: str
    expected: str
    index: tuple[int, ...] = ()

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """error / allowed: at most 1 if right."""
        return self.error / self.allowed if self.allowed else (np.inf if self.error else 0.0)

    def __str__(self) -> str:
        sign = "<=" if self.ok else ">"
        at = f"; worst at {list(self.index)}: got {self.got}, expected {self.expected}" if self.index else ""
        match self.measure:
            case "form":
                return f"{self.what}: got {self.got}, expected {self.expected}"
            case "non-finite":
                return f"{self.what}: {self.error:.0f} elements with NaN or infinity out of place{at}"
        name = {"frobenius": "Frobenius"}.get(self.measure, self.measure)
        return f"{self.what}: {name} error {self.error:.3g} {sign} {self.allowed:.3g} = {self.derived}{at}"


class Judge:
    """Judges the results of one call, from however many runs of it: what they are held against is computed once."""

    def __init__(
        self, spec: OpSpec, args: Sequence[Any], options: Mapping[str, Any], precision: str = "ieee",
        looser: float = 1.0,
    ) -> None:  # fmt: skip
        """args, options: as they were before the call. looser: what all that is allowed is multiplied by, for a
        backend that needs more."""
        self._call, self._looser = _Canonical(spec, args, options, precision), looser
        self._known: dict[Any, list[_Standard]] = {}

    def forward(self, outputs: Sequence[Any], mutated: Sequence[Any] = ()) -> list[Judgement]:
        """As `judge_forward`."""
        checked, spec = self._call.checked, self._call.spec
        mutates = [name for name, _ in checked.mutated()]
        names = [*checked.output_names(), *(f"{n} after the call" for n in mutates)]
        dtypes = [*checked.output_dtypes(), *(checked.dtypes[n] for n in mutates)]
        return self._judge(spec.reference, names, dtypes, FORWARD, [*outputs, *mutated], "forward")

    def backward(self, grads: Sequence[Array], gradients: Sequence[Any]) -> list[Judgement]:
        """As `judge_vjp`."""
        spec = self._call.spec
        if spec.vjp is None:
            raise ValueError(f"{spec.name} has no vector-Jacobian product")
        names = [f"gradient of {n}" for n in spec.differentiable]
        dtypes = [self._call.checked.dtypes.get(n, "float32") for n in spec.differentiable]

        def vjp(compute: Any, *args: Any, **options: Any) -> Any:
            return spec.vjp(compute, tuple(grads), *args, **options)  # type: ignore[misc]

        scale = max((float(np.abs(g[np.isfinite(g)]).max(initial=0)) for g in map(_wide, grads)), default=0.0)
        return self._judge(vjp, names, dtypes, BACKWARD, list(gradients), tuple(g.tobytes() for g in grads), scale)

    def _judge(
        self, function: Callable[..., Any], names: list[str], dtypes: list[str], k: float, arrays: list[Any], key: Any,
        scale: float | None = None,
    ) -> list[Judgement]:  # fmt: skip
        judgements: list[Judgement] = []
        for neighbours in (NEIGHBOURS, MORE_NEIGHBOURS):
            standards = self._known.get((key, neighbours))
            if standards is None:
                standards = list(self._call.standards(function, names, dtypes, neighbours, scale))
                self._known[key, neighbours] = standards
            judgements = _judge(standards, arrays, k, self._looser)
            if all(j.ok for j in judgements) or any(j.ratio > APPEAL for j in judgements):
                break
        return judgements


def judge_forward(
    spec: OpSpec, args: Sequence[Any], options: Mapping[str, Any], outputs: Sequence[Array],
    mutated: Sequence[Array] = (), precision: str = "ieee",
) -> list[Judgement]:  # fmt: skip
    """Judge what a call returned. Everything is a NumPy array.

    args, options: as they were before the call. outputs: in the order of `spec.outputs`, also a single one as a
    sequence. mutated: the arguments `spec.mutates` as they are after the call. precision: the policy of the call.
    """
    return Judge(spec, args, options, precision).forward(outputs, mutated)


def judge_vjp(
    spec: OpSpec, args: Sequence[Any], options: Mapping[str, Any], grads: Sequence[Array],
    gradients: Sequence[Array | None], precision: str = "ieee",
) -> list[Judgement]:  # fmt: skip
    """Judge the gradients of the inputs that came from the gradients `grads` of the outputs.

    gradients: in the order of `spec.differentiable`, None where the argument was not given or is a boolean mask.
    """
    return Judge(spec, args, options, precision).backward(grads, gradients)


def judge_invariant(
    spec: OpSpec, invariant: Invariant, call: Callable[..., Any], args: Sequence[Any], options: Mapping[str, Any]
) -> list[Judgement]:
    """Judge a law between calls, `call` being the operator on the backend under test.

    Both sides of a law may be wrong by what an output may be wrong by. So a side may differ from the other by
    the sum of what `judge_forward` would allow each, with the rounding model put through the same law.
    """
    return Law(spec, invariant, args, options).judge(call)


class Law:
    """Judges a law on however many backends: how far its sides may differ is computed once."""

    def __init__(self, spec: OpSpec, invariant: Invariant, args: Sequence[Any], options: Mapping[str, Any]) -> None:
        self._call, self._invariant = _Canonical(spec, args, options), invariant

    @cached_property
    def _errors(self) -> list[tuple[float, ...]]:
        """Of the rounding model: two for each pair."""

        def run(compute: Any, roundings: Roundings | None, arguments: Arguments) -> list[Any]:
            pairs = self._invariant.pairs(_reference_call(self._call, compute, roundings), *arguments)
            return [array for _, *sides in pairs for array in sides]

        return self._call.model_errors(run, NEIGHBOURS)

    def judge(self, call: Callable[..., Any]) -> list[Judgement]:
        """As `judge_invariant`."""
        judgements: list[Judgement] = []
        for i, (what, got, expected) in enumerate(self._invariant.pairs(call, *_cast(self._call.arguments))):
            side = tuple(np.maximum(self._errors[2 * i], self._errors[2 * i + 1]))
            name = f"{self._invariant.name}: {what}"
            truth = expected.astype(self._call.truth)
            judgements += _Standard(name, expected.dtype.name, truth, expected, side).judge(got, FORWARD, times=2)
        return judgements


@dataclass(frozen=True)
class _Standard:
    """What an array is held against. model_errors: (Frobenius, row, peak) error of the rounding model."""

    what: str
    dtype: str
    truth: Array | None
    model: Array | None
    model_errors: tuple[float, ...]
    gradient: float | None = None  # of a gradient: the largest magnitude in the gradients of the outputs
    left: float = 0.0  # of an output that is 0 throughout: what the last bits of the inputs make of it

    def judge(self, got: Any, k: float, times: float = 1) -> list[Judgement]:
        form, expected = _form(got), "None" if self.truth is None else f"{self.dtype} {np.shape(self.truth)}"
        if form != expected:
            return [Judgement(self.what, "form", np.inf, 0.0, "the specification", form, expected)]
        if self.truth is None or self.model is None:
            return []
        rounded = rounded_to(self.truth, self.dtype)
        kinds = kinds_of(got)
        wrong = (kinds != kinds_of(rounded)) & (kinds != kinds_of(self.model))
        if self.gradient is not None:  # a factor may stand before or within a sum of infinities of both signs
            wrong &= ~_neither_finite_nor_known(kinds, kinds_of(rounded))
        judgements = [self._judgement("non-finite", (float(wrong.sum()), where_largest(wrong)), 0.0, "", got, rounded)]
        eps = eps_of(self.dtype)
        for measure, worst, of_model in zip(
            ("frobenius", "row", "peak"), _measures(got, self.truth, self.dtype, self.gradient, self.left),
            self.model_errors, strict=True,
        ):  # fmt: skip
            if k * of_model > LEAST * eps:
                allowed, derived = k * of_model, f"{k:g} x {of_model:.3g} of the rounding model"
            else:
                allowed, derived = LEAST * eps, f"{LEAST} eps of {self.dtype}"
            derived = f"{times:g} x ({derived})" if times > 1 else derived
            judgements.append(self._judgement(measure, worst, times * allowed, derived, got, rounded))  # type: ignore[arg-type]
        return judgements

    def _judgement(
        self, measure: Measure, worst: Worst, allowed: float, derived: str, got: Array, expected: Array
    ) -> Judgement:
        error, index = worst
        shown = (str(np.atleast_1d(got)[index]), str(np.atleast_1d(expected)[index]))
        return Judgement(self.what, measure, error, allowed, derived, *(shown if index else ("", "")), index)


class _Canonical:
    """A checked call in canonical form, and the dtypes in which its truth and its rounding model are computed."""

    def __init__(self, spec: OpSpec, args: Sequence[Any], options: Mapping[str, Any], precision: str = "ieee") -> None:
        self.spec, self.precision = spec, precision
        self.arguments: Arguments = spec.bind(args, options)
        self.checked = Call(spec, *self.arguments)
        wide = "float64" in self.checked.dtypes.values()
        self.truth: Any = np.longdouble if wide else np.float64
        self.model: Any = np.float64 if wide else np.float32

    def roundings(self) -> Roundings:
        """How a reference is told to make the roundings that are permitted."""
        if not self.spec.permitted_roundings:
            return {}

        def rounding(name: str, values: Array) -> Array:
            if name == TF32:
                return tf32(values) if self.precision == "tf32" and values.dtype == np.float32 else values
            return (
                rounded_to(rounded_to(values, self.checked.dtype), values.dtype)
                if self.checked.dtype in HALF
                else values
            )

        return {"rounding": rounding}

    def standards(
        self, function: Callable[..., Any], names: list[str], dtypes: list[str], neighbours: int, scale: float | None
    ) -> Iterator[_Standard]:
        """One for each result of `function(compute, *args, **options)`."""

        def run(compute: Any, roundings: Roundings | None, arguments: Arguments) -> list[Any]:
            args, options = arguments
            with np.errstate(all="ignore"):
                results = function(compute, *args, **options, **(roundings or {}))
            if roundings is None or compute is not self.model:
                return list(results)
            return [None if r is None else rounded_to(r, d) for r, d in zip(results, dtypes, strict=True)]

        truths, models = run(self.truth, None, self.arguments), run(self.model, self.roundings(), self.arguments)
        left = [0.0] * len(truths)
        if scale is None and any(_vanishes(t) for t in truths):
            near = run(self.truth, None, _cast(_neighbour(self.arguments, 1), self.truth))
            left = [_largest(n) if _vanishes(t) else 0.0 for t, n in zip(truths, near, strict=True)]
        errors = self.model_errors(run, neighbours, truths, models, scale, left)
        scales = [scale] * len(truths)
        for parts in zip(names, dtypes, truths, models, errors, scales, left, strict=True):
            yield _Standard(*parts)

    def model_errors(
        self, run: Run, neighbours: int, truths: Any = None, models: Any = None, gradient: float | None = None,
        left: Sequence[float] | None = None,
    ) -> list[tuple[float, ...]]:  # fmt: skip
        """(Frobenius, row, peak) error of the rounding model for each array of `run(compute, roundings, arguments)`.

        roundings: None for the exact results, else those that are made of intermediate values, outputs being rounded.
        truths, models: what `run` gives for the arguments themselves, if that is known.
        """
        truth, model, scale = self.truth, self.model, 1.0
        arguments = _cast(self.arguments)
        if truth is np.longdouble and not EXTENDED:
            # Nothing is wider than float64: take what float32 loses on float32 inputs, scaled by eps.
            truth, model, scale = np.float64, np.float32, eps_of("float64") / eps_of("float32")
            arguments, truths, models = _cast(self.arguments, np.float32), None, None

        draws = []
        half = self.checked.dtype in HALF
        for seed in range(neighbours + 1 + half):
            if seed > neighbours:
                # Half values may cancel to 0 without a trace where float32 arithmetic in another order leaves some.
                wide = _neighbour(_cast(arguments, np.float32), seed)
                truths, models = run(truth, None, _cast(wide, truth)), run(model, {}, wide)
            elif seed or truths is None:
                near = _neighbour(arguments, seed) if seed else _cast(arguments)
                truths, models = run(truth, None, _cast(near, truth)), run(model, self.roundings(), near)
            draws.append(
                [
                    (0.0,) * 3 if t is None else tuple(scale * e for e, _ in _measures(m, t, m.dtype.name, gradient, f))
                    for t, m, f in zip(truths, models, left or [0.0] * len(truths), strict=True)
                ]
            )
        return [tuple(max(e) for e in zip(*draw, strict=True)) for draw in zip(*draws, strict=True)]


def _each(change: Callable[[Array], Array], arguments: Arguments) -> Arguments:
    def one(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(one, value))
        if not isinstance(value, np.ndarray):
            return value
        return value.copy() if value.dtype.kind in "iub" else change(value)

    args, options = arguments
    return tuple(map(one, args)), {k: one(v) for k, v in options.items()}


def _cast(arguments: Arguments, dtype: Any = None) -> Arguments:
    """Copies of the arguments, the floating ones in another dtype if one is given."""
    return _each(lambda a: a.astype(dtype or a.dtype), arguments)


def _neighbour(arguments: Arguments, seed: int) -> Arguments:
    """The arguments with other last bits."""
    rng = np.random.default_rng(seed)

    def near(a: Array) -> Array:
        reach = (1 if a.itemsize == 2 else LEAST) * eps_of(a.dtype.name)
        return rounded_to(a.astype(np.longdouble) * (1 + reach * rng.uniform(-1, 1, a.shape)), a.dtype.name)

    return _each(near, arguments)


def _reference_call(known: _Canonical, compute: Any, roundings: Roundings | None) -> Callable[..., Any]:
    """The operator in the dtype `compute`, called, and mutating, as its public function is."""
    spec = known.spec

    def call(*args: Any, **options: Any) -> Any:
        bound, named = spec.bind(args, options)
        with np.errstate(all="ignore"):
            results = spec.reference(compute, *bound, **named, **(roundings or {}))
        checked = Call(spec, bound, named)
        dtypes = checked.output_dtypes()
        outputs = results[: len(dtypes)]
        if roundings is not None:
            outputs = tuple(rounded_to(r, d) for r, d in zip(outputs, dtypes, strict=True))
        for (_, value), after in zip(checked.mutated(), results[len(dtypes) :], strict=True):
            value[...] = rounded_to(after, value.dtype)
        return spec.pack(outputs)

    return call


def _judge(standards: Sequence[_Standard], arrays: Sequence[Any], k: float, times: float) -> list[Judgement]:
    judgements: list[Judgement] = []
    count = 0
    for standard, got in zip_longest(standards, arrays):
        if standard is not None:
            count += 1
            judgements += standard.judge(got, k, times)
    if len(arrays) != count:
        derived, n = "the specification", str(len(arrays))
        judgements.append(Judgement("number of results", "form", np.inf, 0.0, derived, n, str(count)))
    return judgements


def _vanishes(truth: Array | None) -> bool:
    return truth is not None and bool(np.size(truth)) and not np.any(truth)


def _largest(values: Array) -> float:
    finite: Array = np.abs(values[np.isfinite(values)])
    return float(finite.max(initial=0))


def _measures(got: Array, truth: Array, dtype: str, gradient: float | None, left: float) -> tuple[Worst, Worst, Worst]:
    """The three errors. Below the smallest normal number the spacing no longer shrinks: it is the floor. So is `left`,
    for an output that is 0 throughout since equals cancel: the variance of equal values.

    A row of a gradient may be a difference of equals: attention's, of a step with one slot. float32 arithmetic leaves
    eps of float32 of what cancelled, where the truth is 0. So a row of zeros in a gradient is measured beside the
    largest element, and in a half type any row is taken to be large enough, beside that one, for this to be eps of its
    own type. A gradient that is 0 throughout is measured by the gradients of the outputs. Zeros are what
    the truth's own rounding may leave, too: of the query's gradient, where there is one slot.
    """
    floor = max(left, float(finfo(dtype).smallest_normal))
    within = np.where(np.isfinite(rounded_to(truth, dtype)), truth, truth.dtype.type(np.nan))
    least: Any = floor
    if gradient is not None and within.size:
        zero = np.abs(np.atleast_1d(within)) <= ROUNDED_AWAY * np.finfo(truth.dtype).eps * gradient
        if zero.all():
            floor = max(floor, gradient)
        largest = float(np.abs(within).max(initial=0, where=np.isfinite(within)))
        if dtype in HALF:
            least = max(floor, largest * eps_of("float32") / eps_of(dtype))
        else:
            least = np.maximum(floor, np.where(zero.all(-1, keepdims=True), largest, 0))
    return frobenius_error(got, within, floor), row_error(got, within, least), peak_error(got, within, floor)


def _neither_finite_nor_known(kinds: Array, expected: Array) -> Array:
    """Where both are not finite, and one is NaN."""
    both: Array = (kinds != 0) & (expected != 0) & ((kinds == NAN) | (expected == NAN))
    return both


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _form(value: Any) -> str:
    if value is None:
        return "None"
    if not isinstance(value, np.ndarray):
        return f"a {type(value).__name__}"
    return f"{value.dtype.name} {value.shape}"
