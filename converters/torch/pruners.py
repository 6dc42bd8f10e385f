"""The pruners a torch user names: the core's, on a module's parameters, with masks that hold during training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.weights import Skipped, Weight

from ..bridge import Bridge
from ..deploy import Exported
from . import distributed, exporting, layers
from .binding import bind
from .hold import Holder, Place
from .layers import Site


class TorchPruner(Bridge):
    """A pruner of a torch module; `LevelPruner`, `AGPPruner` and `SensitivityPruner` say which."""

    def __init__(self, config_list: Any, **options: Any) -> None:
        """See `onnxprune.Pruner`."""
        super().__init__(config_list, **options)
        self._module: nn.Module | None = None
        self._places: dict[str, Place] = {}
        self._examples: Any = None

    def __call__(self, model: nn.Module, example_inputs: Any = None) -> TorchPruner:
        """Prune what is due now, and hold the masks from now on.

        Args:
            model: the module, wrapped (DistributedDataParallel, torch.compile) or not.
            example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments; with them, weights are
                found in the exported graph, those of functional calls too. Without, the modules' classes say.

        Returns:
            The pruner itself.

        Raises:
            PruneError: an entry of the configuration matches nothing in the model; a parameter has no values.
        """
        module = exporting.unwrap(model)
        if example_inputs is None:
            return self._start(module, *layers.find(module))
        binding = bind(module, example_inputs)
        return self._start(module, binding.weights, binding.skipped, example_inputs)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is and what is pruned: numbers, and boolean tensors by parameter name (True is kept)."""
        state = super().state_dict()
        return {**state, "masks": {name: torch.from_numpy(mask) for name, mask in state["masks"].items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, before or after the pruner is called with the model.

        Raises:
            PruneError: it is none, or belongs to another model.
        """
        masks = state.get("masks") if isinstance(state, Mapping) else None
        if isinstance(masks, Mapping):
            arrays = {name: m.cpu().numpy() if isinstance(m, torch.Tensor) else m for name, m in masks.items()}
            state = {**state, "masks": arrays}
        super().load_state_dict(state)

    def apply(self) -> None:
        """Zero the pruned entries now, where the model's `load_state_dict` brought others; a step does it too."""
        if self._holder is not None:
            self._holder.apply()

    def export(
        self, path: str | os.PathLike[str], example_inputs: Any = None, *, dynamic_shapes: Any = None
    ) -> Exported:
        """Write the deployable file: torch's own export with constants folded and operators fused, checked.

        Args:
            path: the file; weights go to a file beside it above 2 GB. It appears complete or not at all.
            example_inputs: as for the call; those of the call unless given.
            dynamic_shapes: as torch.onnx.export takes them; by default the batch has any size, where that can be had.

        Returns:
            What was written, and how far onnxruntime is from the module.

        Raises:
            PruneError: the exporter fails, a pruned entry is not zero in the file, or onnxruntime disagrees with the
                module by more than 1e-4 of the output's scale (16 units in the last place of float16), or cannot run
                what is computed in bfloat16. Nothing was written.
        """
        module = self._module
        if module is None:
            raise PruneError("there is no model to export: call the pruner with it first")
        inputs = self._examples if example_inputs is None else example_inputs
        if inputs is None:
            raise PruneError(
                "export needs example inputs to trace the model with: a tensor, a tuple of arguments or a mapping of "
                "keyword arguments"
            )
        self.apply()
        return self._write(exporting.candidate(module, inputs, self.weights, self._kept, dynamic_shapes), path)

    def _start(
        self, module: nn.Module, weights: Sequence[Weight], skipped: Sequence[Skipped], example_inputs: Any = None
    ) -> TorchPruner:
        """Take charge of a module whose weights are known."""
        self._check(weights, skipped)
        self.remove()
        self._holder, self._module, self._examples = Holder(module), module, example_inputs
        self._places = {w.name: w.storage.place for w in weights if isinstance(w.storage, Site)}
        try:
            self._attach(weights, skipped)
        except PruneError:
            self.remove()
            raise
        return self

    def _hold(self, kept: Mapping[str, np.ndarray]) -> None:
        if distributed.active():
            self._kept = kept = distributed.agreed(kept)
            self.masks = Masks(kept)
        if self._holder is not None:
            self._holder.hold({self._places[name]: mask for name, mask in kept.items()})


class LevelPruner(TorchPruner):
    """Level: the int(n * sparsity) entries of smallest magnitude of each weight."""

    kind: ClassVar[str | None] = "level"


class AGPPruner(TorchPruner):
    """AGP (Zhu & Gupta 2017): level pruning whose sparsity rises along a cubic schedule."""

    kind: ClassVar[str | None] = "agp"


class SensitivityPruner(TorchPruner):
    """Sensitivity (Han et al. 2015): thresholds in units of each weight's standard deviation."""

    kind: ClassVar[str | None] = "sensitivity"
