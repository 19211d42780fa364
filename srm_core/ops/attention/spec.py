"""The specification of `attention`."""

from __future__ import annotations

from typing import Any

from srm_core.contract import check_bool, check_scale
from srm_core.ops.attention import cases
from srm_core.ops.attention.reference import OUT, PROBABILITIES, SCORE_GRADIENTS, reference, vjp
from srm_core.ops.common import TF32
from srm_core.spec import Invariant, OpSpec, OptionSpec, OutputSpec, ResidualSpec, TensorSpec


def _constrain(call: Any) -> None:
    heads, groups = call.dims["H"], call.dims["G"]
    if call.values["is_causal"] and call.values["attn_mask"] is not None:
        raise call.error(
            "attn_mask", "a mask together with is_causal=True", "one of the two", "let the mask be causal itself"
        )
    if not call.values["enable_gqa"]:
        if groups != heads:
            raise call.error(
                "key", f"{groups} heads beside {heads} of query", f"{heads}", "enable_gqa=True lets heads share keys"
            )
    elif heads and (not groups or heads % groups):
        raise call.error("key", f"{groups} heads", f"a divisor of the {heads} heads of query")


SPEC = OpSpec(
    name="attention",
    version=1,
    summary="scaled dot-product attention",
    parameters=(
        TensorSpec("query", ("B H T D",), doc="what each step looks for"),
        TensorSpec("key", ("B G S D",), doc="what each slot is found by; G = H without enable_gqa"),
        TensorSpec("value", ("B G S E",), doc="what each slot holds"),
        TensorSpec(
            "attn_mask",
            ("T? S?", "H? T? S?", "B? H? T? S?"),
            role="mask",
            optional=True,
            doc="boolean, True where a step attends, or added to the scores; -inf there masks too",
        ),
        OptionSpec(
            "is_causal", check_bool, default=False, keyword=True, schema="bool",
            doc="step t attends to slots s <= t alone",
        ),
        OptionSpec(
            "scale", check_scale, default=None, keyword=True, schema="float?", doc="what scores are multiplied by"
        ),
        OptionSpec(
            "enable_gqa", check_bool, default=False, keyword=True, schema="bool",
            doc="head h attends to the keys and values of head h // (H / G)",
        ),
    ),
    outputs=(OutputSpec("out", "B H T E", like=("query",), doc="0 for a step with nothing to attend to"),),
    shape_order=("query", "key", "value"),
    constrain=_constrain,
    reference=reference,
    vjp=vjp,
    residuals=(ResidualSpec("out", "B H T E"), *(ResidualSpec(n, "B H T") for n in ("logsumexp", "peak", "total"))),
    permitted_roundings=(PROBABILITIES, SCORE_GRADIENTS, OUT, TF32),
    cases=cases.CASES,
    sample=cases.sample,
    error_samples=cases.ERROR_SAMPLES,
    invariants=(
        Invariant("slot permutation", cases.slots_permute),
        Invariant("boolean = additive", cases.boolean_is_additive),
        Invariant("causal = lower triangular", cases.causal_is_a_mask),
        Invariant("grouped = repeated", cases.grouped_is_repeated),
        Invariant("batch permutation", cases.batch_permutes),
    ),
    flops=cases.flops,
    bytes=cases.bytes_moved,
    autocast="lower",
    formula=(
        "score[t,s] = scale * (q[t] . k[s]) + mask[t,s], of the slots s that step t attends to\n"
        "p[t,s] = exp(score[t,s]) / sum over s of exp(score[t,s])\n"
        "out[t] = sum over s of p[t,s] * v[s]"
    ),
    source='A. Vaswani et al., "Attention is all you need", 2017, eq. 1',
)  # fmt: skip
