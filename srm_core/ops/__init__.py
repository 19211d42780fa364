"""The operators: one package each, with its specification, reference and cases."""

from __future__ import annotations

from srm_core.ops.recurrent_mix import spec as _mix
from srm_core.ops.recurrent_step import spec as _step
from srm_core.ops.recurrent_step_ import spec as _step_in_place
from srm_core.ops.scan import spec as _scan
from srm_core.spec import OpSpec

SPECS: dict[str, OpSpec] = {spec.name: spec for spec in (_step.SPEC, _step_in_place.SPEC, _mix.SPEC, _scan.SPEC)}
