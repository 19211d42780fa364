"""Every Triton kernel compiled ahead of time, which needs no GPU: for Ampere and Hopper, within a budget.

The wrappers run on tensors of the meta device; what they would launch is compiled as Triton would specialise it.
`python tests/test_triton_compile.py` writes the budget anew.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None or find_spec("torch") is None, reason="needs triton")

BUDGET = Path(__file__).with_name("triton_budget.json")
COMPILED = ((80, "bfloat16"), (90, "float32"), (90, "bfloat16"))
MODULES = (
    "attention",
    "attention_backward",
    "attention_masks",
    "batch_norm",
    "conv_bn",
    "convolution",
    "hds",
    "hds_query",
    "lstm",
    "mdi",
    "mdi_recurrence",
    "recurrent_mix",
    "recurrent_step",
    "scan",
    "sequence",
)


USERS_OF_TILES = ("attention", "convolution")


def calls(dtype: str) -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(operator, arguments, options): sizes that are compiled as the large ones are."""
    import torch

    def t(*shape: int, dtype: str = dtype) -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    z = t(8, 4096, 1024)
    yield "mdi", (z, z, z, z, z), {"eps": 1e-6}
    mixed = ("row",) * 16 + ("col",) * 16
    x, w = t(8192, 32, 128), t(32, 512)
    yield "recurrent_step", (x, x, w, w, t(32), mixed, 5), {}
    yield "recurrent_step", (t(64, 32, 128), t(64, 32, 128), w, w, t(32), mixed, t(64, dtype="int64")), {}
    yield "recurrent_step_", (t(64, 32, 128), x, w, w, t(32), mixed, 5), {"slots": t(64, dtype="int64")}
    yield "recurrent_mix", (t(8, 4096, 12, 128), t(12, 4096), t(12, 4096), t(12), mixed[10:22]), {}
    for batch, steps, width in ((8, 4096, 1536), (1, 131072, 512)):
        x = t(batch, steps, width)
        yield "scan", (x, x), {}
        yield "scan", (t(batch, 1, width), x), {}
    for batch, width in ((1, 40), (1, 128), (16, 128), (16, 512), (16, 768), (4, 2048)):
        yield "lstm", (t(batch, 256, width), t(4 * width, width), t(4 * width, width), t(4 * width), t(4 * width)), {}
    for width in (32, 128, 512):
        z, w, b = t(16, 256, width), t(width, width), t(width)
        yield "mdi_recurrence", (z, z, z[:, 0], w, b, t(width, 2 * width), b), {}
    for channels, out, kernel, groups in ((64, 64, 3, 1), (128, 256, 3, 1), (64, 64, 3, 64)):
        images, o = t(32, 56, 56, channels).permute(0, 3, 1, 2), t(out)
        weight = t(out, kernel, kernel, channels // groups).permute(0, 3, 1, 2)
        geometry = {"padding": kernel // 2, "groups": groups, "activation": "relu"}
        yield "conv_bn", (images, weight, o, o, o, o, o), geometry
        yield "conv_bn_train", (images, weight, None, o, o), geometry
    for width in (64, 128):
        q = t(4, 16, 4096, width)
        yield "attention", (q, q, q), {"is_causal": True}
    yield "attention", (q, q, q, t(4096, 4096)), {}
    q, one, few = t(4, 16, 4096, 256), t(1, 32, 1, 128), t(1, 8, 16384, 128)
    yield "attention", (q, q, q), {"is_causal": True}
    yield "attention", (one, few, few), {"enable_gqa": True}
    memory = t(4, 16, 4096, 128)
    yield "hds_pool", (memory,), {"num_levels": 3}
    yield "hds_query", (t(4, 16, 1, 128), memory, memory), {}
    yield "hds_query", (t(4, 16, 1024, 128), memory, memory), {}
    levels = [t(4, 16, n, 128) for n in (1024, 256)]
    yield "hds_update_", (memory, levels, t(4, 16, 1, 128), 5), {}
    by_time = t(8, 1536, 4096).transpose(1, 2)
    yield "scan", (by_time, by_time), {}


class Meta:
    """A launch context on the meta device, in which nothing is measured."""

    wants_residuals = deterministic = True
    device = array_library = None
    precision = "ieee"

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}
        self.memo: dict[Any, Any] = {}

    def empty(self, shape: Any, dtype: Any) -> Any:
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype, device="meta")

    zeros = scratch = empty

    def keep(self, name: str, array: Any) -> None:
        self.kept[name] = array


def launches(dtype: str, architecture: int) -> dict[str, tuple[Any, ...]]:
    """By name: (kernel, tensors, scalars, configuration) of all that the calls and their gradients would launch on a
    GPU of this architecture."""
    import torch
    from srm_backends.triton import plugin

    from srm_core.context import Residuals
    from srm_core.registry import _imported, registry

    found: dict[str, tuple[Any, ...]] = {}

    def record(_: Any, kernel: Any, key: Any, tensors: Any, configure: Any, scalars: Any = ()) -> None:
        config = configure()
        name = f"{kernel.fn.__name__} {dtype} {' '.join(map(str, config.constants))}"
        found[name] = kernel, tensors, scalars, config

    targets = {k.op: k for k in plugin.KERNELS}
    with pytest.MonkeyPatch.context() as patch:
        for module in USERS_OF_TILES:
            patch.setattr(f"srm_backends.triton.{module}.available", lambda _: architecture >= 90)
        for module in MODULES:
            patch.setattr(f"srm_backends.triton.{module}.launch", record, raising=False)
        for op, args, options in calls(dtype):
            context: Any = Meta()
            args, options = registry().spec(op).bind(args, options)
            result = _imported(targets[op].forward)(context, *args, **options)
            if targets[op].backward:
                grads = [torch.empty_like(r) for r in registry().spec(op).unpack(result)]
                _imported(targets[op].backward)(context, Residuals(args, options, context.kept), *grads)
    return found


def compiled(kernel: Any, tensors: Any, scalars: Any, config: Any, architecture: int) -> Any:
    """What Triton would make of a launch on a GPU of this architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"float32": "*fp32", "bfloat16": "*bf16", "int64": "*i64", "int8": "*i8", "uint8": "*u8", "int32": "*i32"}
    values = [*tensors, *scalars, *config.sizes, *config.constants]
    signature: dict[str, str] = {}
    constants: dict[Any, Any] = {}
    attributes: dict[Any, Any] = {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True)):
        if i >= len(values) - len(config.constants) or value is None:
            signature[name], constants[i,] = "constexpr", value
        elif i < len(tensors):
            signature[name], attributes[i,] = types[str(value.dtype)[6:]], [["tt.divisibility", 16]]
        elif hasattr(value, "block_shape"):
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{types[str(value.base.dtype)[6:]][1:]}[{block}]>"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and i >= len(tensors) + len(scalars):
            signature[name], constants[i,] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and i >= len(tensors) + len(scalars):
                attributes[i,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=config.compiled_with)


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    """Registers, and bytes of a thread's stack: what has spilled, mostly."""
    import triton

    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return {"registers": int(found[1]), "stack": int(found[2])}


@pytest.mark.parametrize(("architecture", "dtype"), COMPILED)
def test_each_kernel_compiles_within_its_budget(architecture: int, dtype: str, tmp_path: Path) -> None:
    import triton

    recorded = json.loads(BUDGET.read_text())
    budget, over = recorded[f"sm_{architecture}"], {}
    for name, what in launches(dtype, architecture).items():
        binary = compiled(*what, architecture).asm["cubin"]
        if triton.__version__ != recorded["triton"]:
            continue  # another version is held to compile them, and no more
        used = resources(binary, tmp_path / "kernel.cubin")
        if used["registers"] > budget[name]["registers"] + 8 or used["stack"] > budget[name]["stack"] + 64:
            over[name] = used
    assert not over


def test_every_kernel_of_the_backend_is_compiled() -> None:
    import importlib

    import triton

    there = set()
    for module in MODULES:
        for name, value in vars(importlib.import_module(f"srm_backends.triton.{module}")).items():
            if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__.endswith(f".{module}"):
                writes = "tl.program_id(" in value.src or "tl.store(" in value.src
                there |= {name} if writes and not name.startswith("_") else set()
    names = {name.partition(" ")[0] for dtype in ("float32", "bfloat16") for name in launches(dtype, 90)}
    assert there == names


def test_half_types_are_multiplied_on_matrix_units() -> None:
    """Where tiles are large, on Hopper by the instructions that take them from shared memory."""
    on_matrix_units = (
        "attention_forward", "attention_backward_slots", "attention_backward_steps", "convolve_blocks",
        "convolve_tiles", "lstm_", "mdi_recurrence_", "weight_gradient_blocks",
    )  # fmt: skip
    for architecture in (80, 90):
        for name, what in launches("bfloat16", architecture).items():
            if name.startswith(on_matrix_units):
                ptx = compiled(*what, architecture).asm["ptx"]
                large = architecture == 90 and name.startswith(("attention_forward bfloat16 0 True", "convolve_tiles"))
                assert ("wgmma.mma_async" if large else "mma") in ptx, name


def test_words_are_read_by_one_thread_each() -> None:
    """Of threads that read the same word, the kernel would ask only one whether it was there (`receive`)."""
    known = re.compile(
        r"(#\w+) = #ttg.blocked<\{sizePerThread = \[(.*?)\], threadsPerWarp = \[(.*?)\], warpsPerCTA = \[(.*?)\]"
    )
    reads = re.compile(r"tt\.load .*isVolatile = true.*: tensor<([\dx]+)x!tt\.ptr<i\d+>, (#\w+)>")
    found = set()
    for dtype in ("float32", "bfloat16"):
        for name, what in launches(dtype, 90).items():
            if not name.startswith(("lstm_", "mdi_recurrence_", "scan_chained")):
                continue
            code = compiled(*what, 90).asm["ttgir"]
            layouts = {
                key: [
                    math.prod(axis)
                    for axis in zip(*([int(n) for n in part.split(", ")] for part in parts), strict=True)
                ]
                for key, *parts in known.findall(code)
            }
            for shape, layout in reads.findall(code):
                sizes = [int(n) for n in shape.split("x")]
                assert all(size >= n for size, n in zip(sizes, layouts[layout], strict=True)), (name, shape)
                found.add(name.partition(" ")[0])
    assert {"lstm_forward", "lstm_backward", "mdi_recurrence_forward", "scan_chained"} <= found


def test_reads_and_writes_are_of_16_bytes_where_memory_is_dense() -> None:
    for name, what in launches("float32", 90).items():
        if name.startswith(("mdi_forward", "mdi_backward", "step_forward float32 2 True False")):
            ptx = compiled(*what, 90).asm["ptx"]
            assert "ld.global.v4.b32" in ptx, name
            assert "st.global.v4.b32" in ptx, name


if __name__ == "__main__":
    import tempfile

    import triton

    budget: dict[str, Any] = {"triton": triton.__version__}
    with tempfile.TemporaryDirectory() as folder:
        for a, d in COMPILED:
            found = {n: resources(compiled(*w, a).asm["cubin"], Path(folder, "k")) for n, w in launches(d, a).items()}
            budget.setdefault(f"sm_{a}", {}).update(found)
    BUDGET.write_text(json.dumps(budget, indent=1) + "\n")
    sys.stdout.write(BUDGET.read_text())
