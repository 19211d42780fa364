"""The specification of `lstm`."""

from __future__ import annotations

from srm_core.contract import lengths_check
from srm_core.ops.common import GATE_GRADIENTS, STATE, TF32
from srm_core.ops.lstm import cases
from srm_core.ops.lstm.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OutputSpec, ResidualSpec, TensorSpec

SPEC = OpSpec(
    name="lstm",
    version=1,
    summary="one layer of long short-term memory, in one direction",
    parameters=(
        TensorSpec("x", ("B T I",), doc="what comes in at each step"),
        TensorSpec("w_ih", ("4H I",), role="parameter", doc="weights of x for the gates i, f, g, o"),
        TensorSpec("w_hh", ("4H H",), role="parameter", doc="weights of the state for the gates i, f, g, o"),
        TensorSpec("b_ih", ("4H",), role="parameter", optional=True, doc="a bias of the gates; None: 0"),
        TensorSpec("b_hh", ("4H",), role="parameter", optional=True, doc="another one, added to it; None: 0"),
        TensorSpec("h0", ("B H",), role="state", optional=True, doc="the initial state; None: 0"),
        TensorSpec("c0", ("B H",), role="state", optional=True, doc="the initial cell; None: 0"),
        TensorSpec("lengths", ("B",), role="integer", optional=True, keyword=True, doc="0 <= length <= T; None: all T"),
    ),
    outputs=(
        OutputSpec("y", "B T H", like=("x",), doc="h after each step; 0 beyond a length"),
        OutputSpec("h_n", "B H", like=("h0",), state=True, doc="h at each sequence's length"),
        OutputSpec("c_n", "B H", like=("c0",), state=True, doc="c at each sequence's length"),
    ),
    shape_order=("x", "w_ih"),
    reference=reference,
    vjp=vjp,
    check_values=lengths_check("lstm"),
    residuals=(ResidualSpec("gates", "B T 4H"), ResidualSpec("states", "B T H"), ResidualSpec("cells", "B T H")),
    permitted_roundings=(STATE, GATE_GRADIENTS, TF32),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("split = whole", cases.split_is_whole),
        Invariant("batch permutation", cases.batch_permutes),
        Invariant("one bias", cases.biases_add_up),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    autocast="lower",
    formula=(
        "[i, f, g, o] = x[t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh\n"
        "c = sigmoid(f) * c + sigmoid(i) * tanh(g)\n"
        "h = sigmoid(o) * tanh(c)"
    ),
    source=(
        'S. Hochreiter, J. Schmidhuber, "Long short-term memory", 1997, with the forget gate of F. Gers, '
        'J. Schmidhuber, F. Cummins, "Learning to forget", 2000'
    ),
)
