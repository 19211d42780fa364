"""A backend of somebody else's, for torch and CuPy arrays on any device: the recurrences as plain array code.

It stands in for the device backends in tests of what is built on the registry, and is as slow as it looks.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from srm_core import hookimpl
from srm_core.spec import BackendInfo, Kernel

FORM = {"arrays": ("torch", "cupy"), "platforms": ("cpu", "cuda"), "dtypes": ("float32", "float64")}


@hookimpl
def srm_backend_info() -> BackendInfo:
    kernels = (
        Kernel("recurrent_step", "eager_backend:step", **FORM),
        Kernel("recurrent_mix", "eager_backend:mix", **FORM),
    )
    return BackendInfo("eager", tech="array-api", platforms=("cpu", "cuda"), kernels=kernels)


def step(ctx: Any, x: Any, state: Any, weight: Any, bias: Any, decay: Any, mode: Any, index: Any) -> tuple[Any, Any]:
    xp = array_namespace(x)
    row = xp.asarray([m == "row" for m in mode], device=ctx.device)[:, None]
    w, b = weight[:, index], bias[:, index]  # (H,) or (H, B)
    if w.ndim == 2:
        w, b = w.T, b.T
    w, b = w[..., None], b[..., None]
    one = xp.ones_like(w)
    new = x * xp.where(row, w, one) + decay[:, None] * state
    return new * xp.where(row, one, w) + b, new


def mix(
    ctx: Any, x: Any, weight: Any, bias: Any, decay: Any, mode: Any, initial_state: Any = None,
    *, start: Any = 0, lengths: Any = None,
) -> tuple[Any, Any]:  # fmt: skip
    xp = array_namespace(x)
    y = ctx.zeros(x.shape, x.dtype)
    state = xp.zeros_like(x[:, 0]) if initial_state is None else xp.asarray(initial_state, copy=True)
    for t in range(x.shape[1]):
        index = start + t
        if not isinstance(index, int):
            index = xp.minimum(index, xp.full_like(index, weight.shape[1] - 1))
        y_t, new = step(ctx, x[:, t], state, weight, bias, decay, mode, index)
        going = xp.ones(x.shape[0], dtype=xp.bool, device=ctx.device) if lengths is None else lengths > t
        going = going[:, None, None]
        y[:, t] = xp.where(going, y_t, xp.zeros_like(y_t))
        state = xp.where(going, new, state)
    return y, state
