"""Prune Keras models and TensorFlow graphs while they train, with the pruners of the core."""

from __future__ import annotations

from ..deploy import Exported
from .binding import Binding, bind
from .callback import Pruning
from .pruners import AGP_Pruner, AGPPruner, LevelPruner, SensitivityPruner
from .reimporting import reimport

__all__ = [
    "AGPPruner",
    "AGP_Pruner",
    "Binding",
    "Exported",
    "LevelPruner",
    "Pruning",
    "SensitivityPruner",
    "bind",
    "reimport",
]
