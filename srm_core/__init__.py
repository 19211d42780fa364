"""SRM kernels: one specification per operator, any number of backends behind it.

    y, state = srm_core.scan(gates, tokens)

Choose a backend with SRM_BACKEND, with `use_backend(...)`, or with `backend=`.
"""

from __future__ import annotations

from srm_core.config import deterministic, precision, use_backend
from srm_core.decision import Decision
from srm_core.dispatch import bind, call, explain
from srm_core.errors import (
    CheckpointError,
    ConfigError,
    ContractError,
    KernelError,
    NoBackendError,
    PluginError,
    SequenceLengthError,
    SRMError,
    UndeclaredFeature,
    UnknownNameError,
    VocabularyError,
)
from srm_core.gradients import vjp
from srm_core.hookspecs import hookimpl
from srm_core.listing import list_backends, report
from srm_core.ops.attention import attention
from srm_core.ops.conv_bn import conv_bn
from srm_core.ops.conv_bn_train import conv_bn_train
from srm_core.ops.hds_pool import hds_pool
from srm_core.ops.hds_query import hds_query
from srm_core.ops.hds_update_ import hds_update_
from srm_core.ops.lstm import lstm
from srm_core.ops.mdi import mdi
from srm_core.ops.mdi_recurrence import mdi_recurrence
from srm_core.ops.recurrent_mix import recurrent_mix
from srm_core.ops.recurrent_step import recurrent_step
from srm_core.ops.recurrent_step_ import recurrent_step_
from srm_core.ops.scan import scan
from srm_core.registry import reload_config

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ContractError",
    "Decision",
    "KernelError",
    "NoBackendError",
    "PluginError",
    "SRMError",
    "SequenceLengthError",
    "UndeclaredFeature",
    "UnknownNameError",
    "VocabularyError",
    "attention",
    "bind",
    "call",
    "conv_bn",
    "conv_bn_train",
    "deterministic",
    "explain",
    "hds_pool",
    "hds_query",
    "hds_update_",
    "hookimpl",
    "list_backends",
    "lstm",
    "mdi",
    "mdi_recurrence",
    "precision",
    "recurrent_mix",
    "recurrent_step",
    "recurrent_step_",
    "reload_config",
    "report",
    "scan",
    "use_backend",
    "vjp",
]
