"""The reference page of an operator, made of its specification, so that it cannot go stale.

`srm-core describe OP` shows it; docs/build_operator_pages.py writes docs/reference/operators/OP.md.
"""

from __future__ import annotations

import doctest
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping
from itertools import groupby

import srm_core
from srm_core.axes import ANY_SHAPE, WORD, shown
from srm_core.ops.common import TF32
from srm_core.registry import registry
from srm_core.spec import Case, Invariant, Kernel, OpSpec, OptionSpec, OutputSpec, Parameter, TensorSpec

EMPTY = inspect.Parameter.empty
WIDTH = 120


def describe(op: str) -> str:
    """The page of the operator `op`, in Markdown. Errors: `UnknownNameError`."""
    spec = registry().spec(op)
    function = getattr(srm_core, op, None) if op in srm_core.__all__ else None
    return page(spec, built_in_kernels(op), inspect.getdoc(function) or "")


def built_in_kernels(op: str) -> dict[str, Kernel]:
    """The kernels of `op` that come with srm_core, by backend, whether or not they can run on this machine."""
    return {name: entry.kernel for name, entry in registry().kernels[op].items() if entry.built_in}


def page(spec: OpSpec, kernels: Mapping[str, Kernel], docstring: str = "") -> str:
    """The page of a specification, in Markdown. kernels: by backend. docstring: its doctest is the example."""
    title = f"# {spec.name}\n\n{sentence(spec.summary)}"
    shared = "What all operators share is in [docs/reference/operators](README.md)."
    sections = (
        ("", [title, _indented(call_line(spec)), _indented(spec.formula), _source(spec), shared]),
        ("Example", [_example(docstring)]),
        ("Arguments", [_parameters(spec), _words(spec), _dtypes(spec)]),
        ("Results", [_outputs(spec), _mutated(spec)]),
        ("Gradients", [_gradients(spec)]),
        ("Rounding", [_rounding(spec)]),
        ("Laws", [_laws(spec.invariants)]),
        ("Errors", [_errors(spec)]),
        ("Backends", [_backends(kernels)]),
        ("Sizes", [_cases(spec)]),
    )
    parts: list[str] = []
    for heading, texts in sections:
        given = [t for t in texts if t]
        parts += ([f"## {heading}"] if heading and given else []) + given
    return "\n\n".join(parts) + "\n"


def provides(kernel: Kernel | None) -> str:
    """What a kernel gives, for a table."""
    if kernel is None:
        return "no"
    return "forward, backward" if kernel.pulls_back else "forward"


def text(plain: str) -> str:
    """Plain text as Markdown that may stand in a table; `code` stays as it is."""
    parts = re.split(r"(`[^`]*`)", " ".join(plain.split()).replace("|", r"\|"))
    return "".join(p if p.startswith("`") else p.replace("*", r"\*") for p in parts)


def sentence(plain: str) -> str:
    return f"{plain[:1].upper()}{text(plain)[1:]}."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, "" without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    names = list(head)
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *lines]) if lines else ""


def call_line(spec: OpSpec) -> str:
    """The call with the names of its results, broken where it is long."""
    results = [o.name for o in spec.outputs]
    result = f"({', '.join(results)})" if len(results) > 1 else "".join(results) or "None"
    signature = re.sub(r"e-0(\d)\b", r"e-\1", str(spec.signature))
    own = spec.name in srm_core.__all__  # an operator of a plugin has no function of its own
    call = f"srm_core.{spec.name}(" if own else f'srm_core.call("{spec.name}", '
    line = f"{call}{signature.removeprefix('(')} -> {result}"
    return textwrap.fill(line, WIDTH - 4, subsequent_indent="    ")


def _prose(sentences: Iterable[str], indent: str = "") -> str:
    return textwrap.fill(" ".join(sentences), WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def _indented(plain: str) -> str:
    return textwrap.indent(plain, "    ")


def _source(spec: OpSpec) -> str:
    return _prose([f"Source: {text(spec.source.rstrip('.'))}."]) if spec.source else ""


def _example(docstring: str) -> str:
    """Blocks of code, and of doctests where a result is shown."""
    blocks = []
    for results, group in groupby(doctest.DocTestParser().get_examples(docstring), lambda e: bool(e.want)):
        lines: list[str] = []
        for e in group:
            source = e.source.rstrip().splitlines()
            prompts = [">>> ", *["... "] * (len(source) - 1)] if results else [""] * len(source)
            lines += [p + line for p, line in zip(prompts, source, strict=True)] + e.want.splitlines()
            if source[0].startswith("import ") and not results:
                lines.append("")
        blocks.append("\n".join(["```python", *lines, "```"]))
    return "\n\n".join(blocks)


def _parameters(spec: OpSpec) -> str:
    return table(
        ("", "shape", "role", "default", ""),
        ((f"`{p.name}`", _shape(p), _role(p), _default(spec, p), text(p.doc)) for p in spec.parameters),
    )


def _shape(p: Parameter) -> str:
    if isinstance(p, TensorSpec):
        return text(_sequence(p.many, "a sequence of", shown(p.axes)))
    return text(f"an integer, or integers {shown(p.axes)}") if p.axes else ""


def _sequence(many: bool, of: str, shapes: str) -> str:
    return f"{of} {shapes.removeprefix('of ')}" if many else shapes


def _role(p: Parameter) -> str:
    return "option" if isinstance(p, OptionSpec) else p.role


def _default(spec: OpSpec, p: Parameter) -> str:
    default = spec.signature.parameters[p.name].default
    if default is not EMPTY:
        return text(f"`{default!r}`".replace("e-0", "e-"))
    return "may be None" if isinstance(p, TensorSpec) and p.optional else ""


def _words(spec: OpSpec) -> str:
    """What the words in the shapes mean, as far as they are used."""
    told: dict[str, str] = {}
    for axes in [a for t in spec.tensors for a in t.axes] + [o.axes for o in spec.outputs]:
        for word in axes.split():
            found = WORD.fullmatch(word)
            if word == ANY_SHAPE:
                told[word] = "tensors *of one shape* may have any, of N elements"
            elif found is None:
                told[word] = r"\* is any extent"
            elif found[1] and found[2]:
                told[word] = f"{word} is {found[1]} times {found[2]}"
            elif found[3]:
                told["?"] = 'an extent with "?" may be 1 instead'
    return f"In the shapes, {', '.join(told.values())}." if told else ""


def _dtypes(spec: OpSpec) -> str:
    """The roles that the operator uses, and whose dtype is the call's."""
    if not spec.tensors:
        return ""
    order = [*spec.shape_order, *(t.name for t in spec.tensors if t.name not in spec.shape_order)]
    first = _first_given(spec, order)
    rules = [f"The dtype of the call is that of {first}."]
    roles = {t.role for t in spec.tensors if t.name != order[0]}
    if "activation" in roles:
        rules.append("Other activations have it, too.")
    wide = [r for r in ("parameter", "state") if r in roles]
    if wide:
        rules.append(f"A {' or '.join(wide)} has it, or float32 beside a half type.")
    if "mask" in roles:
        rules.append("A mask is boolean, or has the call's dtype, or float32 beside a half type.")
    if "integer" in roles or any(isinstance(p, OptionSpec) and p.axes for p in spec.parameters):
        rules.append("Integers are int32 or int64.")
    return _prose(rules)


def _first_given(spec: OpSpec, names: Iterable[str]) -> str:
    """ "`tokens`, else of `gates`": up to the first that is always given."""
    optional = {t.name for t in spec.tensors if t.optional}
    told: list[str] = []
    for name in names:
        told.append(f"`{name}`")
        if name not in optional:
            break
    return ", else of ".join(told)


def _outputs(spec: OpSpec) -> str:
    rows = ((f"`{o.name}`", _output_shape(o), _output_dtype(spec, o), text(o.doc)) for o in spec.outputs)
    return table(("", "shape", "dtype", ""), rows)


def _output_shape(o: OutputSpec) -> str:
    return text(_sequence(o.many is not None, "a tuple of", shown((o.axes,))))


def _output_dtype(spec: OpSpec, o: OutputSpec) -> str:
    rest = "float32 for a half type, else the call's" if o.state else "the call's"
    if not o.like:
        return rest
    first = f"of {_first_given(spec, o.like)}"
    optional = {t.name for t in spec.tensors if t.optional}
    return f"{first}; without it {rest}" if set(o.like) <= optional else first


def _mutated(spec: OpSpec) -> str:
    if not spec.mutates:
        return ""
    names = " and ".join(f"`{n}`" for n in spec.mutates)
    return _prose(
        [
            *([] if spec.outputs else ["It returns None."]),
            f"It updates {names} in place, and nothing else.",
            "An array that is updated must be writable, and no two of its elements the same memory;",
            "after a `ContractError` it is as it was.",
        ]
    )


def _gradients(spec: OpSpec) -> str:
    if spec.vjp is None:
        return "It has no gradient."
    names = ", ".join(f"`{n}`" for n in spec.differentiable)
    told = [f"Of {names}, in this order." if len(spec.differentiable) > 1 else f"Of {names}."]
    if any(t.role == "mask" and t.differentiable for t in spec.tensors):
        told.append("A boolean mask has none.")
    if spec.residuals:
        kept = ", ".join(f"`{r.name}` {text(shown((r.axes,)))}" for r in spec.residuals)
        told.append(f"A forward may keep {kept} for its backward.")
    return _prose(told)


def _rounding(spec: OpSpec) -> str:
    told = [
        "Results and gradients are held to the operator's own loops in float64, and may be off by a small multiple of "
        "what honest rounding costs: see [docs/explanation/tolerances.md](../../explanation/tolerances.md)."
    ]
    half = [n for n in spec.permitted_roundings if n != TF32]
    if half:
        names = ", ".join(f"`{n}`" for n in half)
        told.append(f"Beside inputs and outputs, these may be rounded to a half type: {names}.")
    else:
        told.append("Beside inputs and outputs nothing may be rounded to a half type.")
    if TF32 in spec.permitted_roundings:
        told.append('Under `srm_core.precision("tf32")` the operands of matrix products may be rounded to that format.')
    return _prose(told)


def _laws(invariants: Iterable[Invariant]) -> str:
    lines = []
    for law in invariants:
        first = (inspect.getdoc(law.pairs) or "").partition("\n")[0]
        lines.append(_prose([f"- {text(law.name)}{':' if first else ''}", text(first)], "  "))
    return "\n".join(lines)


def _errors(spec: OpSpec) -> str:
    """The kinds of wrong calls, by the parameter that the error names."""
    kinds: dict[str, list[str]] = {}
    for sample in spec.error_samples:
        kinds.setdefault(sample.param, []).append(text(sample.name))
    order = [p.name for p in spec.parameters]
    params = sorted(kinds, key=lambda param: order.index(param.partition("[")[0]))
    rows = [(f"`{param}`", "; ".join(kinds[param])) for param in params]
    return f"Each is a `ContractError` that names the argument:\n\n{table(('', ''), rows)}" if rows else ""


def _backends(kernels: Mapping[str, Kernel]) -> str:
    rows = (
        (name, provides(k), ", ".join(k.dtypes), ", ".join(k.platforms), ", ".join(k.arrays))
        for name, k in kernels.items()
    )
    return table(("", "gives", "dtypes", "platforms", "arrays"), rows)


def _cases(spec: OpSpec) -> str:
    counts = ((tag, [c for c in spec.cases if tag in c.tags]) for tag in ("ci", "edge"))
    small = (
        _prose([f"- `{tag}`, {len(cases)} cases:", ", ".join(c.name for c in cases)], "  ")
        for tag, cases in counts
        if cases
    )
    big = [c for c in spec.cases if {"bench", "seed"} & c.tags]
    rows = ((f"`{c.name}`", ", ".join(sorted(c.tags)), _dims(c), _settings(c), *_work(spec, c)) for c in big)
    told = table(("", "tags", "sizes", "with", "operations", "bytes in float32"), rows)
    return "\n\n".join(t for t in ("\n".join(small), told) if t)


def _dims(case: Case) -> str:
    return ", ".join(f"{k}={v}" for k, v in case.dims.items())


def _settings(case: Case) -> str:
    return text(", ".join(f"{k}={v!r}" for k, v in case.settings.items()))


def _work(spec: OpSpec, case: Case) -> tuple[str, str]:
    flops = "" if spec.flops is None else _si(spec.flops(case))
    return flops, "" if spec.bytes is None else _si(spec.bytes(case, "float32"))


def _si(n: float) -> str:
    """12.6 M"""
    for unit in ("", "k", "M", "G"):
        if n < 999.5:
            return f"{n:.3g} {unit}".strip()
        n /= 1000
    return f"{n:.3g} T"
