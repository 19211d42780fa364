"""What torch asks of an operator: `torch.library.opcheck`, and a compiled graph without a break. For torch tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from srm_conformance.checks.values import drawn
from srm_conformance.items import Item, Target, sampled
from srm_conformance.layouts import to_numpy
from srm_conformance.outcome import Report, Wrong
from srm_conformance.proof import recording
from srm_conformance.trial import Trial
from srm_core.dispatch import operator

CASES = 2


def compiled(target: Target) -> Iterator[Item]:
    """The first cases, with this backend selected within the operator that torch sees."""
    if target.library != "torch":
        return
    dtype = target.one_half()[0]
    for case in target.cases()[:CASES]:

        def opcheck(report: Report, case: Any = case) -> None:
            import torch

            from srm_core import torch_ops

            trial = _trial(target, case, dtype, report)
            given: list[Any] = []
            capture = torch_ops.outward(target.spec, lambda *arguments: given.extend(arguments))
            with recording() as launches, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                capture(target.subject.backend, *_leaves(trial).values())
                try:
                    torch.library.opcheck(torch_ops.define(target.spec).overload, tuple(given))
                except Exception as error:
                    raise Wrong(f"opcheck: {error}") from error
            _count(report, launches, target)

        def fullgraph(report: Report, case: Any = case) -> None:
            import torch

            trial = _trial(target, case, dtype, report)
            leaves = _leaves(trial)
            path = operator(target.spec.name)

            def function(*values: Any) -> Any:
                return path.run(target.subject.backend, *values)

            with recording() as launches, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch, about itself
                torch._dynamo.reset()
                try:
                    run = torch.compile(function, fullgraph=True, backend="aot_eager")
                    outputs = target.spec.unpack(run(*leaves.values()))
                    report.judge(target.judge(case, dtype).forward([to_numpy(o.detach()) for o in outputs], [
                        trial.placed[n].value() for n, _ in trial.call.mutated()
                    ]))  # fmt: skip
                    if any(o.requires_grad for o in outputs):
                        _backward(target, case, dtype, leaves, outputs, report)
                except Wrong:
                    raise
                except Exception as error:
                    raise Wrong(f"torch.compile: {type(error).__name__}: {error}") from error
            _count(report, launches, target)

        yield target.item("compiled", ("opcheck", case.name, dtype), opcheck, dtype)
        yield target.item("compiled", ("fullgraph", case.name, dtype), fullgraph, dtype)


def _trial(target: Target, case: Any, dtype: str, report: Report) -> Trial:
    trial = Trial(target.subject, target.spec, sampled(target.spec, case, dtype), target.library, report)
    trial.claimed(gradients=_differentiable(target))
    return trial


def _differentiable(target: Target) -> bool:
    return target.spec.vjp is not None and target.kernel.pulls_back


def _leaves(trial: Trial) -> dict[str, Any]:
    """The arguments by name; those that have gradients want them."""
    named = trial.named()
    if trial.spec.vjp is not None and trial.kernel.pulls_back:
        for name in trial.spec.differentiable:
            if named[name] is not None and named[name].is_floating_point():
                named[name] = named[name].detach().clone().requires_grad_()
    return named


def _backward(
    target: Target, case: Any, dtype: str, leaves: dict[str, Any], outputs: tuple[Any, ...], report: Report
) -> None:
    import torch

    grads = drawn([o.detach() for o in outputs])
    wanted = [n for n in target.spec.differentiable if leaves[n] is not None and leaves[n].requires_grad]
    given = [torch.from_numpy(g).to(o.device) for g, o in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, [leaves[n] for n in wanted], given)
    by_name = dict(zip(wanted, (to_numpy(g) for g in found), strict=True))
    gradients = [by_name.get(n) for n in target.spec.differentiable]
    report.judge(target.judge(case, dtype).backward(grads, gradients))


def _count(report: Report, launches: list[str], target: Target) -> None:
    """Errors: `Wrong` unless kernels of this backend ran, and no others."""
    report.launches += len(launches)
    strangers = sorted({t for t in launches if t not in (target.kernel.forward, target.kernel.backward)})
    if strangers or not launches:
        raise Wrong(f"{', '.join(strangers) or 'no kernel'} ran; required {target.kernel.forward}")
