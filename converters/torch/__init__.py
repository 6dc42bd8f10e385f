"""Prune while fine-tuning in PyTorch: the core's pruners on a module's parameters.

from onnxprune.converters.torch import AGPPruner
pruner = AGPPruner(config_list)
pruner(model)
for epoch in range(1, 11):
    train(model)
    pruner.update_epoch(epoch)
pruner.export("pruned.onnx", example_inputs)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ..deploy import Exported
from .binding import Binding, bind
from .pruners import AGPPruner, LevelPruner, SensitivityPruner
from .reimport import reimport
from .shrinking import Shrunk

if TYPE_CHECKING:
    from .huggingface import HuggingFaceCallback
    from .lightning import LightningCallback

AGP_Pruner = AGPPruner

_LAZY = {"HuggingFaceCallback": "huggingface", "LightningCallback": "lightning"}


def __getattr__(name: str) -> Any:
    """Load what needs further libraries only where it is asked for."""
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AGPPruner",
    "AGP_Pruner",
    "Binding",
    "Exported",
    "HuggingFaceCallback",
    "LevelPruner",
    "LightningCallback",
    "SensitivityPruner",
    "Shrunk",
    "bind",
    "reimport",
]
