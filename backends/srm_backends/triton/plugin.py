"""What the `triton` backend offers, and whether there is a GPU for it."""

from __future__ import annotations

import os
import subprocess
import sys

from srm_core.hookspecs import hookimpl
from srm_core.spec import BackendInfo, Bucket, Feature, Kernel, Reason

HERE = "srm_backends.triton"
# Triton's interpreter runs kernels on a CPU, slowly, to test them. Its arithmetic in bfloat16 is wrong.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
PLATFORMS = ("cuda", "cpu") if INTERPRETED else ("cuda",)
DTYPES = ("float32", "float16") if INTERPRETED else ("float32", "float16", "bfloat16")
OLDEST = (8, 0)  # compute capability: the first with bfloat16


def _kernel(
    op: str, target: str, backward: str | None = None, supports: str | None = None, features: tuple[Feature, ...] = ()
) -> Kernel:
    return Kernel(
        op, f"{HERE}.{target}", backward and f"{HERE}.{backward}", arrays=("torch",), dtypes=DTYPES,
        platforms=PLATFORMS, graph_safe=True, rank=-50 if INTERPRETED else 20, features=features,
        supports=supports and f"{HERE}.supports:{supports}",
    )  # fmt: skip


WIDTHS = Bucket("D"), Bucket("E")
KERNELS = (
    _kernel("scan", "scan:forward", "scan:backward"),
    _kernel("recurrent_mix", "recurrent_mix:forward", "recurrent_mix:backward"),
    _kernel("recurrent_step", "recurrent_step:forward", "recurrent_step:backward"),
    _kernel("recurrent_step_", "recurrent_step:forward_"),
    _kernel("mdi", "mdi:forward", "mdi:backward"),
    _kernel("mdi_recurrence", "mdi_recurrence:forward", "mdi_recurrence:backward"),
    _kernel("lstm", "lstm:forward", "lstm:backward"),
    _kernel("conv_bn", "conv_bn:forward", "conv_bn:backward"),
    _kernel("conv_bn_train", "conv_bn:forward_train", "conv_bn:backward_train"),
    _kernel("hds_pool", "hds:pool", "hds:pool_backward"),
    _kernel("hds_update_", "hds:update_"),
    _kernel("hds_query", "hds_query:forward", "hds_query:backward", "attention", WIDTHS),
    _kernel("attention", "attention:forward", "attention_backward:backward", "attention", WIDTHS),
)


@hookimpl
def srm_backend_info() -> BackendInfo:
    return BackendInfo(
        "triton", tech="triton", platforms=PLATFORMS, requires=("torch>=2.10", "triton>=3.6"), kernels=KERNELS
    )


@hookimpl
def srm_probe(backend: str) -> list[Reason]:
    if backend != "triton" or INTERPRETED:
        return []
    return why_not(*ask_torch())


def why_not(name: str, capability: tuple[int, int] | None) -> list[Reason]:
    """name: of the GPU, or why there is none. capability: of an NVIDIA GPU; (0, 0) for another maker's."""
    if capability is None:
        hint = "run on a machine with one, with a torch wheel built for CUDA or ROCm"
        return [Reason("no-device", f"needs a GPU that torch can use: {name}", hint=hint)]
    if (0, 0) < capability < OLDEST:
        return [
            Reason(
                "device-too-old", f"the kernels are for compute capability 8.0 and above; {name} has less",
                found=".".join(map(str, capability)), required="8.0", hint="use the backend torch on this GPU",
            )
        ]  # fmt: skip
    return []


def ask_torch() -> tuple[str, tuple[int, int] | None]:
    """(name, compute capability) of the GPU. If torch is not imported yet, another process asks: a listing imports
    no torch."""
    if "torch" in sys.modules:
        return look()
    code = "from srm_backends.triton.plugin import look; n, c = look(); print(n); print(*(c or ()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    name, numbers = done.stdout.splitlines()[-2:]
    found = tuple(map(int, numbers.split()))
    return name, (found[0], found[1]) if found else None


def look() -> tuple[str, tuple[int, int] | None]:
    import torch

    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return ("it sees none" if built else "this torch is built for the CPU alone"), None
    name = torch.cuda.get_device_name().splitlines()[0]
    return name, (0, 0) if torch.version.hip else torch.cuda.get_device_capability()
