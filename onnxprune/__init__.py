"""onnxprune: prune neural networks where they are deployed, in their ONNX graph.

Names are loaded when they are first used, so that importing the package costs little and brings in neither a
framework nor a runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune._version import __version__
    from onnxprune.api import (
        AGPPruner,
        LevelPruner,
        Lowered,
        Pruner,
        Report,
        Result,
        SensitivityPruner,
        lower,
        prune,
    )
    from onnxprune.curves import Sensitivity, sensitivity
    from onnxprune.errors import PruneError
    from onnxprune.graph.masks import Masks
    from onnxprune.inspection import Inspection, inspect
    from onnxprune.runtime.benchmark import Benchmark, benchmark
    from onnxprune.runtime.evaluate import Evaluation, evaluate
    from onnxprune.search import Search, autoprune

_HOMES = {
    "onnxprune._version": ("__version__",),
    "onnxprune.api": (
        "AGPPruner",
        "LevelPruner",
        "Lowered",
        "Pruner",
        "Report",
        "Result",
        "SensitivityPruner",
        "lower",
        "prune",
    ),
    "onnxprune.curves": ("Sensitivity", "sensitivity"),
    "onnxprune.errors": ("PruneError",),
    "onnxprune.graph.masks": ("Masks",),
    "onnxprune.inspection": ("Inspection", "inspect"),
    "onnxprune.runtime.benchmark": ("Benchmark", "benchmark"),
    "onnxprune.runtime.evaluate": ("Evaluation", "evaluate"),
    "onnxprune.search": ("Search", "autoprune"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AGPPruner",
    "Benchmark",
    "Evaluation",
    "Inspection",
    "LevelPruner",
    "Lowered",
    "Masks",
    "PruneError",
    "Pruner",
    "Report",
    "Result",
    "Search",
    "Sensitivity",
    "SensitivityPruner",
    "__version__",
    "autoprune",
    "benchmark",
    "evaluate",
    "inspect",
    "lower",
    "prune",
    "sensitivity",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'onnxprune' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
