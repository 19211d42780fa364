"""The operators: one package each, with its specification, reference and cases."""

from __future__ import annotations

from srm_core.ops.attention import spec as _attention
from srm_core.ops.conv_bn import spec as _conv_bn
from srm_core.ops.conv_bn_train import spec as _conv_bn_train
from srm_core.ops.hds_pool import spec as _hds_pool
from srm_core.ops.hds_query import spec as _hds_query
from srm_core.ops.hds_update_ import spec as _hds_update
from srm_core.ops.lstm import spec as _lstm
from srm_core.ops.mdi import spec as _mdi
from srm_core.ops.mdi_recurrence import spec as _mdi_recurrence
from srm_core.ops.recurrent_mix import spec as _mix
from srm_core.ops.recurrent_step import spec as _step
from srm_core.ops.recurrent_step_ import spec as _step_in_place
from srm_core.ops.scan import spec as _scan
from srm_core.spec import OpSpec

SPECS: dict[str, OpSpec] = {
    spec.name: spec
    for spec in (
        _step.SPEC,
        _step_in_place.SPEC,
        _mix.SPEC,
        _scan.SPEC,
        _mdi.SPEC,
        _mdi_recurrence.SPEC,
        _hds_pool.SPEC,
        _hds_update.SPEC,
        _hds_query.SPEC,
        _attention.SPEC,
        _lstm.SPEC,
        _conv_bn.SPEC,
        _conv_bn_train.SPEC,
    )
}
