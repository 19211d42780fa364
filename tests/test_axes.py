"""The words for shapes, sequences of arrays, and masks, in calls of an operator made for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import srm_core
from srm_core.axes import extents, match, shown
from srm_core.contract import Call, check_count, check_number, check_scale
from srm_core.spec import OpSpec, OptionSpec, OutputSpec, TensorSpec


@pytest.mark.parametrize(
    ("axes", "shape", "known", "found"),
    [
        ("B T D", (2, 3, 4), {}, {"B": 2, "T": 3, "D": 4}),
        ("B T D", (2, 3), {}, None),
        ("B D", (2, 3), {"B": 2}, {"D": 3}),
        ("B D", (2, 3), {"B": 3}, None),
        ("D D", (3, 3), {}, {"D": 3}),
        ("D D", (3, 4), {}, None),
        ("4H I", (12, 5), {}, {"H": 3, "I": 5}),
        ("4H I", (13, 5), {}, None),
        ("4H H", (12, 3), {}, {"H": 3}),
        ("4H H", (12, 4), {}, None),
        ("D 2D", (3, 6), {"D": 3}, {}),
        ("B? 3", (1, 3), {"B": 7}, {}),
        ("B? 3", (7, 3), {"B": 7}, {}),
        ("B? 3", (2, 3), {"B": 7}, None),
        ("B? 3", (7, 4), {"B": 7}, None),
        ("B * D", (2, 9, 4), {"B": 2}, {"D": 4}),
        ("", (), {}, {}),
        ("0 B", (0, 2), {}, {"B": 2}),
        ("0 B", (5, 2), {}, None),
        ("...", (2, 3), {}, {"N": 6}),
        ("...", (), {}, {"N": 1}),
        ("...", (2, 3), {"N": 5}, None),
    ],
)
def test_match(axes: str, shape: tuple[int, ...], known: dict[str, int], found: dict[str, int] | None) -> None:
    assert match(axes, shape, known) == found


@pytest.mark.parametrize("axes", ["B-T", "B? *?", "?", "2.5"])
def test_a_word_that_is_none(axes: str) -> None:
    with pytest.raises(ValueError, match="required a number, a name"):
        match(axes, (1,) * len(axes.split()), {})


def test_what_axes_say() -> None:
    assert extents("B 4H 2 D?", {"B": 3, "H": 5, "D": 7}) == (3, 20, 2, 7)
    assert shown(("B T D", "D", "...")) == "(B, T, D) or (D,) or of one shape"


def reference(compute: Any, x: Any, mask: Any, levels: Any, *, times: int) -> tuple[Any, ...]:
    return tuple(times * level.astype(compute) for level in levels)


SPEC = OpSpec(
    "every_level", 1, "for this test", reference=reference,
    parameters=(
        TensorSpec("x", ("B M D",)),
        TensorSpec("mask", ("M? D?",), role="mask", optional=True),
        TensorSpec("levels", ("B * D",), many=True),
        OptionSpec("times", check_count(1), default=2, keyword=True),
    ),
    outputs=(OutputSpec("levels", "B * D", many=lambda values: [level.shape for level in values["levels"]]),),
)  # fmt: skip


def made(*args: Any, **options: Any) -> Call:
    return Call(SPEC, *SPEC.bind(args, options))


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


def test_an_optional_tensor_before_a_required_one_has_no_default() -> None:
    assert str(SPEC.signature) == "(x, mask, levels, *, times=2)"


def test_a_sequence_of_arrays() -> None:
    call = made(ones(2, 8, 3), None, [ones(2, 4, 3), ones(2, 1, 3)])
    assert call.dtypes == {"x": "float32", "levels[0]": "float32", "levels[1]": "float32"}
    assert call.output_names() == ("levels[0]", "levels[1]")
    assert call.output_dtypes() == ("float32", "float32")
    assert made(ones(2, 8, 3), None, ()).output_names() == ()
    assert SPEC.pack([1]) == (1,)
    assert SPEC.unpack((1,)) == (1,)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((ones(2, 8, 3), None, ones(2, 4, 3)), {}, "levels: found a ndarray; required a sequence of arrays"),
        ((ones(2, 8, 3), None, None), {}, "levels: found None; required a sequence of arrays"),
        ((ones(2, 8, 3), None, (ones(2, 4, 3), 1.0)), {}, r"levels\[1\]: found a float; required an array"),
        ((ones(2, 8, 3), None, (ones(2, 4, 5),)), {}, r"levels\[0\]: found shape \(2, 4, 5\)"),
        ((ones(2, 8, 3), None, (ones(2, 4, 3, dtype=float),)), {}, r"levels\[0\]: found dtype float64"),
        ((ones(2, 8, 3), ones(8, 3, dtype=int), ()), {}, "mask: found dtype int64; required bool or float32"),
        ((ones(2, 8, 3), ones(7, 3, dtype=bool), ()), {}, r"mask: found shape \(7, 3\); required \(M\?, D\?\)"),
        ((ones(2, 8, 3), None, ()), {"times": 0}, "times: found 0; required an integer, at least 1"),
        ((ones(2, 8, 3), None, ()), {"times": True}, "times: found True; required an integer"),
    ],
)
def test_errors(args: Any, options: Any, message: str) -> None:
    with pytest.raises(srm_core.ContractError, match=message):
        made(*args, **options)


@pytest.mark.parametrize(
    ("dtype", "mask", "allowed"),
    [
        ("float32", "bool", True), ("float32", "float32", True), ("float32", "float16", False),
        ("float16", "bool", True), ("float16", "float16", True), ("float16", "float32", True),
        ("float16", "float64", False), ("bfloat16", "float16", False), ("float64", "float32", False),
    ],
)  # fmt: skip
def test_dtypes_of_a_mask(dtype: str, mask: str, allowed: bool) -> None:
    args = ones(2, 8, 3, dtype=dtype), ones(1, 3, dtype=mask), ()
    if allowed:
        assert made(*args).dtypes["mask"] == mask
        return
    with pytest.raises(srm_core.ContractError, match="mask: found dtype"):
        made(*args)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "0.5", None])
def test_check_number(value: Any) -> None:
    for right in (0.5, 1, np.float32(0.5), np.int64(1)):
        check_number(0, 1)("eps", right, {})
    with pytest.raises(ValueError, match="required a number from 0 to 1"):
        check_number(0, 1)("eps", value, {})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**400, True, "1"])
def test_check_scale(value: Any) -> None:
    check_scale("scale", None, {})
    check_scale("scale", 2, {})
    with pytest.raises(ValueError, match="required a finite number"):
        check_scale("scale", value, {})
