"""`srm-core explain`: arguments written as text."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from srm_core.arrays import BFLOAT16, numpy_to_torch
from srm_core.errors import ConfigError
from srm_core.registry import registry

DTYPES = {
    "f16": np.float16, "bf16": BFLOAT16, "f32": np.float32, "f64": np.float64, "i32": np.int32, "i64": np.int64,
}  # fmt: skip
ARRAY = re.compile(r"(\w+)\[([\d,\s]*)\]")


def parse(op: str, arguments: Sequence[str], library: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in order, and NAME=VALUE options. Errors: `ConfigError` for what cannot be understood."""
    spec = registry().spec(op)
    if library not in ("numpy", "torch"):
        raise ConfigError(f"--library: found {library!r}; required numpy or torch")
    positional: list[Any] = []
    options: dict[str, Any] = {}
    for text in arguments:
        name, equals, value = text.partition("=")
        if equals and name in spec.signature.parameters:
            options[name] = _value(value, library)
        elif equals:
            raise ConfigError(
                f"{text!r}: {op} has no parameter {name!r}; it has {', '.join(spec.signature.parameters)}"
            )
        else:
            positional.append(_value(text, library))
    try:
        return spec.bind(positional, options)
    except TypeError as error:
        raise ConfigError(str(error)) from None


def _value(text: str, library: str) -> Any:
    array = ARRAY.fullmatch(text.strip())
    if array:
        dtype, extents = array.groups()
        if dtype not in DTYPES:
            raise ConfigError(f"{text!r}: found the dtype {dtype!r}; required one of {', '.join(DTYPES)}")
        # Nothing is computed: zeros cost no memory until they are touched.
        try:
            made = np.zeros([int(n) for n in extents.split(",") if n.strip()], DTYPES[dtype])
            return numpy_to_torch(made) if library == "torch" else made
        except (ValueError, MemoryError, ImportError) as error:
            raise ConfigError(f"{text[:60]!r}: cannot be made: {error}") from None
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        words = tuple(w.strip() for w in text.split(","))
        if all(re.fullmatch(r"\w+", w) for w in words):
            return words
        raise ConfigError(f"{text[:60]!r}: required an array such as f32[2,3], a number, None, or words") from None
