"""The specification of `mdi_recurrence`."""

from __future__ import annotations

from srm_core.contract import check_finite, lengths_check
from srm_core.ops.common import GATE_GRADIENTS, STATE, TF32
from srm_core.ops.mdi_recurrence import cases
from srm_core.ops.mdi_recurrence.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, ResidualSpec, TensorSpec

SPEC = OpSpec(
    name="mdi_recurrence",
    version=1,
    summary="the sequential loop of the MM-Rec block, with a memory-decay integration at each step",
    parameters=(
        TensorSpec("z", ("B T D",), doc="what comes in at each step"),
        TensorSpec("gamma", ("B T D",), doc="the decay at each step, a factor"),
        TensorSpec("h0", ("B D",), role="state", doc="the initial state"),
        TensorSpec("w_gate", ("D D",), role="parameter", doc="weights of the gate of z, by the state"),
        TensorSpec("b_gate", ("D",), role="parameter", doc="their bias"),
        TensorSpec("w_mdi", ("D 2D",), role="parameter", doc="weights of the integration's gate, by z and the state"),
        TensorSpec("b_mdi", ("D",), role="parameter", doc="their bias"),
        OptionSpec("mix", check_finite, default=0.1, keyword=True, schema="float", doc="how much of n is added"),
        TensorSpec("lengths", ("B",), role="integer", optional=True, keyword=True, doc="0 <= length <= T; None: all T"),
    ),
    outputs=(
        OutputSpec("h", "B T D", like=("z",), doc="the state after each step; 0 beyond a length"),
        OutputSpec("h_last", "B D", like=("h0",), state=True, doc="the state at each sequence's length"),
    ),
    shape_order=("z",),
    reference=reference,
    vjp=vjp,
    check_values=lengths_check("mdi_recurrence"),
    residuals=(ResidualSpec("states", "B T D"), ResidualSpec("gates", "B T 2D")),
    permitted_roundings=(STATE, GATE_GRADIENTS, TF32),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("split = whole", cases.split_is_whole),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    autocast="lower",
    formula=(
        "g = sigmoid([z[t], h] @ w_mdi.T + b_mdi)\n"
        "n = (1 - g) * h + g * z[t] + gamma[t] * h\n"
        "h = z[t] * sigmoid(h @ w_gate.T + b_gate) + gamma[t] * h + mix * n"
    ),
    source="the sequential loop of the MM-Rec block",
)
