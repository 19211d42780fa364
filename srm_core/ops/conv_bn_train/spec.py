"""The specification of `conv_bn_train`."""

from __future__ import annotations

from srm_core.ops.common import TF32
from srm_core.ops.conv_bn.convolution import (
    BIAS,
    BN_BIAS,
    BN_WEIGHT,
    CONVOLUTION,
    CONVOLUTION_GRADIENT,
    IMAGE,
    OPTIONS,
    WEIGHT,
    constrain,
)
from srm_core.ops.conv_bn_train import cases
from srm_core.ops.conv_bn_train.reference import reference, vjp
from srm_core.spec import Invariant, OpSpec, OutputSpec, ResidualSpec

SPEC = OpSpec(
    name="conv_bn_train",
    version=1,
    summary="convolution, then batch norm with the statistics of the batch, then activation",
    parameters=(IMAGE, WEIGHT, BIAS, BN_WEIGHT, BN_BIAS, *OPTIONS),
    outputs=(
        OutputSpec("y", "B O P Q", format="x", doc="in the memory format of x"),
        OutputSpec("batch_mean", "O", state=True, doc="the mean of the convolution over batch and pixels"),
        OutputSpec("batch_var", "O", state=True, doc="its biased variance"),
    ),
    shape_order=("x", "weight"),
    reference=reference,
    vjp=vjp,
    constrain=constrain,
    residuals=(
        ResidualSpec("convolution", "B O P Q"),
        ResidualSpec("mean", "O"),
        ResidualSpec("rate", "O"),
    ),
    permitted_roundings=(CONVOLUTION, CONVOLUTION_GRADIENT, TF32),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("batch permutation", cases.batch_permutes),
        Invariant("channel permutation", cases.channels_permute),
        Invariant("groups apart", cases.groups_are_apart),
        Invariant("bias in the mean", cases.bias_shifts_the_mean),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    autocast="lower",
    formula="c = conv(x, weight) + bias; mean, var: of c over batch and pixels, var biased;\n"
    "y = act((c - mean) / sqrt(var + eps) * bn_weight + bn_bias)",
    source="S. Ioffe, C. Szegedy, Batch normalization: accelerating deep network training by reducing internal "
    "covariate shift, 2015, algorithm 1",
)
