"""Inference of the structured recurrent mixer on any array library."""

from __future__ import annotations

from srm_core.models.config import MixerConfig
from srm_core.models.mixer import MixerState, RecurrentMixer
from srm_core.models.text import Vocabulary

__all__ = ["MixerConfig", "MixerState", "RecurrentMixer", "Vocabulary"]
