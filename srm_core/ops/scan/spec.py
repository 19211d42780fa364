"""The specification of `scan`."""

from __future__ import annotations

from srm_core.contract import check_bool, lengths_check
from srm_core.ops.scan import cases
from srm_core.ops.scan.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, ResidualSpec, TensorSpec

SPEC = OpSpec(
    name="scan",
    version=1,
    summary="the linear recurrence y_t = g_t * y_{t-1} + x_t over time",
    parameters=(
        TensorSpec(
            "gates",
            ("B T D", "B T 1", "B 1 D", "1 1 D"),
            role="parameter",
            doc="g, linear, not logarithms; one that is constant in time is not read T times",
        ),
        TensorSpec("tokens", ("B T D",), optional=True, doc="x; None: the cumulative product, and gates must have T"),
        TensorSpec("initial_state", ("B D",), role="state", optional=True, doc="y[-1]; None: 0, or 1 without tokens"),
        OptionSpec("reverse", check_bool, default=False, keyword=True, schema="bool", doc="t runs from the end to 0"),
        TensorSpec("lengths", ("B",), role="integer", optional=True, keyword=True, doc="0 <= length <= T; None: all T"),
    ),
    outputs=(
        OutputSpec("y", "B T D", like=("tokens", "gates"), doc="0 beyond a length"),
        OutputSpec(
            "final_state",
            "B D",
            like=("initial_state",),
            state=True,
            doc="the state at each sequence's length; with reverse, after step 0",
        ),
    ),
    shape_order=("tokens", "gates"),
    reference=reference,
    vjp=vjp,
    check_values=lengths_check("scan"),
    residuals=(ResidualSpec("states", "B T D"),),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("split = whole", cases.split_is_whole),
        Invariant("flip = reverse", cases.flip_is_reverse),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    formula="y[t] = g[t] * y[t-1] + x[t]\nwithout tokens: y[t] = g[t] * y[t-1]",
    source='E. Martin and C. Cundy, "Parallelizing linear recurrent neural nets over sequence length", 2018, eq. 5',
)
