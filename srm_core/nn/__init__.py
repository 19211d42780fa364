"""Torch modules over the operators: the layers and models that they come from, for training and serving.

A name is imported with its module when it is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    "repeat": (
        "ColRepeatCausalLinear", "RowRepeatCausalLinear", "CombinedRepeatCausalLinear", "KernelRepeatLinear",
        "HeadedRepeatCausalLinear", "ParallelRepeatHeads", "MixedRepeatHeads", "RepeatHeads",
    ),
    "mixer": ("MixerBlock", "RecurrentMLPMixer"),
    "shared_cache": ("SharedCache",),
    "conv_bn": ("ConvBN2d",),
    "lstm": ("LSTM",),
    "attention": ("Attention",),
    "memory": ("MemoryBank", "MemoryState", "HierarchicalDataStructure"),
    "mmrec": ("MemoryDecayIntegration", "MultiMemoryAttention", "MMRecBlock"),
    "neural_components": (
        "TritonAttention", "TritonLSTM", "TritonConvBN", "create_triton_attention", "create_triton_lstm",
        "create_triton_conv_bn", "benchmark_neural_components",
    ),
    "patching": ("patch",),
}  # fmt: skip
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
