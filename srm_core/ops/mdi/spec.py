"""The specification of `mdi`."""

from __future__ import annotations

from srm_core.contract import check_number
from srm_core.ops.mdi import cases
from srm_core.ops.mdi.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, TensorSpec

SPEC = OpSpec(
    name="mdi",
    version=1,
    summary="the memory-decay integration of a state, element by element",
    parameters=(
        TensorSpec("z", ("...",), doc="what comes in"),
        TensorSpec("h", ("...",), role="state", doc="the state"),
        TensorSpec("gate_logits", ("...",), doc="how much of z replaces h, before the sigmoid"),
        TensorSpec("decay_logits", ("...",), doc="how much of h is kept besides, before the sigmoid"),
        TensorSpec("modulation_logits", ("...",), optional=True, doc="of a second factor of gamma; None: that is 1"),
        OptionSpec(
            "eps",
            check_number(0, 0.5),
            default=1e-6,
            keyword=True,
            schema="float",
            doc="gamma is clamped to eps and 1 - eps, before rounding",
        ),
    ),
    outputs=(
        OutputSpec("h_new", "...", like=("h",), doc="the new state"),
        OutputSpec("gamma", "...", like=("z",), doc="the decay that was used"),
    ),
    shape_order=("z",),
    reference=reference,
    vjp=vjp,
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("any shape", cases.shape_does_not_matter),
        Invariant("halves", cases.elements_are_apart),
        Invariant("factors of gamma", cases.factors_change_places),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    formula=(
        "g = sigmoid(gate_logits)\n"
        "gamma = clamp(sigmoid(decay_logits) * sigmoid(modulation_logits), eps, 1 - eps)\n"
        "h_new = (1 - g) * h + g * z + gamma * h"
    ),
    source="the memory decay integration of the MM-Rec block",
)
