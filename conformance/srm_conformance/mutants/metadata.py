"""Mutants that claim what is not so: predicates that lie, backwards that are none, results of the wrong form."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np

from srm_conformance.mutants.common import each
from srm_conformance.mutants.mutant import backward, forward
from srm_core.spec import Feature, Multiple, Reason

HERE = __name__
EVEN = Multiple("D", 2)
UNDECLARED = Feature("undeclared", lambda call: call.dims)
_asked = itertools.count()


# Predicates


def supports_all(view: Any) -> list[Reason]:
    return []


def supports_nothing(view: Any) -> list[Reason]:
    return [Reason("never", "takes nothing")]


def refuses_bfloat16(view: Any) -> list[Reason]:
    return [Reason("dtype", "takes no bfloat16")] if view.dtype == "bfloat16" else []


def refuses_without_words(view: Any) -> list[Reason]:
    return [Reason("width", "")] if not view[EVEN] else []


def refuses_without_code(view: Any) -> list[Reason]:
    return [Reason("", "works on pairs of channels")] if not view[EVEN] else []


def raises(view: Any) -> list[Reason]:
    raise KeyError("width")


def raises_for_odd(view: Any) -> list[Reason]:
    return [] if view[EVEN] else [Reason("width", f"D = {view['D']}")]


def reads_undeclared(view: Any) -> list[Reason]:
    return [Reason("steps", "needs steps")] if not view[UNDECLARED]["T"] else []


def says_false(view: Any) -> Any:
    return view[EVEN] or [False]


def says_yes_in_a_word(view: Any) -> Any:
    return [] if view[EVEN] else "odd"


def changes_its_mind(view: Any) -> list[Reason]:
    return [Reason("busy", "is busy")] if next(_asked) % 2 else []


def _as_it_is(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *args, **options)


def _claiming(name: str, predicate: Any, *ops: str, features: tuple[Feature, ...] = ()) -> None:
    for op in ops:
        forward(op, name, supports=f"{HERE}:{predicate.__name__}", features=features)(_as_it_is)


_claiming("the predicate takes nothing", supports_nothing, "scan", "conv_bn")
_claiming("bfloat16 is declared and refused", refuses_bfloat16, "scan", "attention", "mdi")
_claiming("a no without a message", refuses_without_words, "scan", "recurrent_mix", features=(EVEN,))
_claiming("a no without a code", refuses_without_code, "scan", features=(EVEN,))
_claiming("the predicate raises", raises, "lstm", "hds_pool")
_claiming("the predicate raises for odd widths", raises_for_odd, "scan", "attention", features=(EVEN,))
_claiming("the predicate reads what is not declared", reads_undeclared, "scan", "lstm")
_claiming("the predicate answers with a list of bool", says_false, "mdi_recurrence", features=(EVEN,))
_claiming("the predicate answers with a word", says_yes_in_a_word, "attention", features=(EVEN,))
_claiming("the predicate changes its mind", changes_its_mind, "scan", "recurrent_step")


# Kernels that cannot do what they claim


@each(
    partial(forward, supports=f"{HERE}:supports_all"),
    "odd widths claimed, and refused",
    "scan",
    "attention",
    "hds_pool",
)
def odd_refused(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[0].shape[-1] % 2:
        raise ValueError("works on pairs of channels")
    return honest(ctx, *args, **options)


@each(forward, "float16 claimed, and refused", "lstm", "conv_bn")
def float16_refused(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if args[0].dtype == "float16":
        raise TypeError("array type float16 is unsupported in linalg")
    return honest(ctx, *args, **options)


@each(forward, "an empty batch raises", "scan", "lstm", "hds_query", "hds_update_", "conv_bn")
def no_batch(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if not len(args[0]):
        raise ZeroDivisionError("division by zero")
    return honest(ctx, *args, **options)


@each(forward, "an empty array raises", "mdi")
def nothing_to_do(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    if not args[0].size:
        raise ZeroDivisionError("integer division or modulo by zero")
    return honest(ctx, *args, **options)


@each(forward, "no steps raise", recurrent_mix=0, mdi_recurrence=0)
def no_steps(honest: Any, ctx: Any, *args: Any, at: int, **options: Any) -> Any:
    if not args[1 if args[1] is not None and args[1].ndim == args[0].ndim else 0].shape[1]:
        raise IndexError("index -1 is out of bounds for axis 1 with size 0")
    return honest(ctx, *args, **options)


@each(forward, "results in a list", "lstm", "conv_bn_train")
def in_a_list(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return list(honest(ctx, *args, **options))


@each(forward, "the final state is left out", "scan", "recurrent_step")
def first_alone(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *args, **options)[0]


@each(forward, "the state is returned as well", "recurrent_step_")
def state_returned(honest: Any, ctx: Any, x: Any, state: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, x, state, *args, **options), state


@each(forward, "y has an axis more", "attention", "hds_query")
def axis_more(honest: Any, ctx: Any, *args: Any, **options: Any) -> Any:
    return honest(ctx, *args, **options)[None]


@each(backward, "one gradient too few", "recurrent_mix", "attention", "mdi")
def gradient_missing(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return tuple(honest(ctx, residuals, *grads))[:-1]


@each(backward, "one gradient too many", "mdi_recurrence", "hds_query", "recurrent_step")
def gradient_too_many(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return (*honest(ctx, residuals, *grads), None)


@each(backward, "a single gradient out of its tuple", "hds_pool")
def gradient_alone(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return honest(ctx, residuals, *grads)[0]


@each(backward, "a backward is claimed, and raises", "scan", "attention", "conv_bn_train")
def no_backward(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    raise NotImplementedError("backward")


@each(backward, "a backward without lengths", "lstm", "recurrent_mix")
def no_backward_with_lengths(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    if residuals.options["lengths"] is not None:
        raise NotImplementedError("lengths")
    return honest(ctx, residuals, *grads)


@each(backward, "the gradient of the first argument is None", "scan", "hds_query", "recurrent_step")
def first_gradient_none(honest: Any, ctx: Any, residuals: Any, *grads: Any) -> Any:
    return (None, *honest(ctx, residuals, *grads)[1:])


@each(backward, "gradients are broadcast as the arguments were", "attention", "scan")
def gradient_not_reduced(honest: Any, ctx: Any, residuals: Any, grad: Any, *grads: Any) -> Any:
    """The first gradient, or the mask's, in the shape of y."""
    found = tuple(honest(ctx, residuals, grad, *grads))
    if len(found) == 3 and found[0].shape != grad.shape:
        return (np.broadcast_to(found[0], grad.shape).copy(), *found[1:])
    if len(found) == 4 and found[3] is not None:
        full = (*grad.shape[:3], found[3].shape[-1])
        return (*found[:3], np.broadcast_to(found[3], full).copy())
    return found
