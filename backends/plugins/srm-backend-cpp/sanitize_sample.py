"""What `sanitize.sh` runs: forward and backward of every small case, in several variants, and of some that use threads.

With the word `levels` it prints those of the instruction set that can run here.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from srm_backend_cpp import _cpu
from srm_backend_cpp.plugin import DTYPES, KERNELS

import srm_core
from srm_core.ops import SPECS
from srm_core.spec import Case, OpSpec

LEVELS = {"base": 1, "v3": 3, "v4": 4}
THREADED = {
    "scan": {"B": 3, "T": 257, "D": 341},
    "recurrent_mix": {"T": 65, "D": 331, "L": 400},
    "recurrent_step": {"D": 9000},
    "mdi": {"B": 3, "T": 50, "D": 341},
    "mdi_recurrence": {"B": 2, "T": 5, "D": 331},
    "lstm": {"B": 1, "T": 5, "I": 60, "H": 263},
    "hds_query": {"B": 3, "H": 2, "T": 67, "M": 300, "D": 33, "E": 70},
}


def variants(array: Any) -> list[Any]:
    """The same values in several layouts, and some that are no numbers; anything but an array stays what it is."""
    if not isinstance(array, np.ndarray) or not array.ndim:
        return [array] * 6
    memory = np.zeros(array.nbytes + 1, np.uint8)
    misaligned = memory[1:].view(array.dtype).reshape(array.shape)
    misaligned[...] = array
    flip = (slice(None, None, -1),) * array.ndim
    odd = array.copy()
    if odd.dtype.kind == "f":
        for i, value in enumerate((np.nan, -np.nan, np.inf, -np.inf, 1e30, 1e-40)):
            odd.reshape(-1)[i :: max(6, odd.size // 2)] = value
    strided = np.repeat(array, 2, -1)[..., ::2]
    return [array, np.asfortranarray(array), strided, array[flip].copy()[flip], misaligned, odd]


def run(spec: OpSpec, case: Case, dtype: str) -> int:
    args, options = spec.sample(case, dtype)  # type: ignore[misc]
    calls = list(zip(*map(variants, args), strict=True))
    for call in calls:
        outputs, pullback = srm_core.vjp(spec.name, *call, backend="cpp", **options)
        pullback(*(np.ones_like(o) for o in spec.unpack(outputs)))
    return len(calls)


def main() -> None:
    if sys.argv[1:] == ["levels"]:
        print(*(name for name, level in LEVELS.items() if level <= _cpu.level()))
        return
    calls = 0
    for op in (kernel.op for kernel in KERNELS):
        spec = SPECS[op]
        cases = [case for case in spec.cases if "ci" in case.tags]
        some = (case for case in cases if case.name != "no_batch")
        larger = [Case("threaded", {**c.dims, **THREADED[op]}, c.tags, c.settings) for c in some]
        for case in [*cases, *larger]:
            for dtype in DTYPES:
                calls += run(spec, case, dtype)
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
