"""What autocast does to the arguments of an operator. Plain code, since torch.compile follows it."""

from __future__ import annotations

from typing import Any

import torch

HALF = (torch.float16, torch.bfloat16)


def cast(lower: torch.dtype | None, roles: tuple[str, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values as autocast wants them; what is float64, or no floating-point tensor, stays as it is.

    lower: the dtype of activations; None: the widest among them. Parameters, states and masks may be float32 beside
    half activations, and stay so; in another dtype they are brought to that of the activations.
    """
    dtype = lower
    if dtype is None or any(_is_float(v) and v.dtype is torch.float64 for v in values):
        dtype = _widest([v.dtype for r, v in zip(roles, values, strict=True) if r == "activation" and _is_float(v)])
    if dtype is None:
        return values
    return tuple([_cast(v, r, dtype) for r, v in zip(roles, values, strict=True)])


def _cast(value: Any, role: str, dtype: torch.dtype) -> Any:
    if not _is_float(value) or value.dtype is dtype:
        return value
    if role != "activation" and dtype in HALF and value.dtype is torch.float32:
        return value
    return value.to(dtype)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _widest(dtypes: list[torch.dtype]) -> torch.dtype | None:
    widest = None
    for dtype in dtypes:
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    return widest
