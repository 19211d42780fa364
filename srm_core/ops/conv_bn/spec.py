"""The specification of `conv_bn`."""

from __future__ import annotations

from typing import Any

from srm_core.ops.common import TF32
from srm_core.ops.conv_bn import cases
from srm_core.ops.conv_bn.convolution import (
    BIAS,
    BN_BIAS,
    BN_WEIGHT,
    CONVOLUTION,
    CONVOLUTION_GRADIENT,
    FOLDED,
    IMAGE,
    OPTIONS,
    WEIGHT,
    constrain,
    vector,
)
from srm_core.ops.conv_bn.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OutputSpec, ResidualSpec


def _constrain(call: Any) -> None:
    for one, other in (("running_mean", "running_var"), ("running_var", "running_mean")):
        if call.values[one] is None and call.values[other] is not None:
            raise call.error(one, f"None beside a {other}", "both, or neither", "None for both: already normalised")
    constrain(call)


SPEC = OpSpec(
    name="conv_bn",
    version=1,
    summary="convolution, then batch norm with running statistics, then activation",
    parameters=(
        IMAGE,
        WEIGHT,
        BIAS,
        vector(
            "running_mean", "the mean to normalise by; None, with running_var: already normalised", differentiable=False
        ),
        vector("running_var", "the variance to normalise by", differentiable=False),
        BN_WEIGHT,
        BN_BIAS,
        *OPTIONS,
    ),
    outputs=(OutputSpec("y", "B O P Q", format="x", doc="in the memory format of x"),),
    shape_order=("x", "weight"),
    reference=reference,
    vjp=vjp,
    constrain=_constrain,
    residuals=(ResidualSpec("y", "B O P Q"),),
    permitted_roundings=(FOLDED, CONVOLUTION, CONVOLUTION_GRADIENT, TF32),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("batch permutation", cases.batch_permutes),
        Invariant("channel permutation", cases.channels_permute),
        Invariant("groups apart", cases.groups_are_apart),
        Invariant("shifted mean", cases.mean_shifts_with_bias),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    autocast="lower",
    formula="y = act((conv(x, weight) + bias - running_mean) / sqrt(running_var + eps) * bn_weight + bn_bias)",
    source="S. Ioffe, C. Szegedy, Batch normalization: accelerating deep network training by reducing internal "
    "covariate shift, 2015, algorithm 2",
)
