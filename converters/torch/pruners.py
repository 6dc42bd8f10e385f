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
from onnxprune.structure.cutting import keep

from ..bridge import Bridge
from ..deploy import Exported
from . import distributed, exporting, layers
from .binding import Binding, bind
from .hold import Holder, Place
from .layers import Buffer, Site
from .shrinking import Optimizers, Shrunk, shrink


class TorchPruner(Bridge):
    """A pruner of a torch module; `LevelPruner`, `AGPPruner` and `SensitivityPruner` say which."""

    def __init__(self, config_list: Any, **options: Any) -> None:
        """See `onnxprune.Pruner`."""
        super().__init__(config_list, **options)
        self._module: nn.Module | None = None
        self._places: dict[str, Place] = {}
        self._examples: Any = None
        self._binding: Binding | None = None

    def __call__(self, model: nn.Module, example_inputs: Any = None, *, align: int | None = None) -> TorchPruner:
        """Prune what is due now, and hold the masks from now on.

        Args:
            model: the module, wrapped (DistributedDataParallel, torch.compile) or not.
            example_inputs: a tensor, a tuple of arguments or a mapping of keyword arguments; with them, weights are
                found in the exported graph, those of functional calls too. Without, the modules' classes say.
                The patterns 'channel' and 'head' need them.
            align: counts of channels are rounded to multiples of it; what suits the machine unless given.

        Returns:
            The pruner itself.

        Raises:
            PruneError: an entry of the configuration matches nothing in the model; a parameter has no values.
        """
        module = exporting.unwrap(model)
        if example_inputs is None:
            return self._start(module, *layers.find(module))
        binding = bind(module, example_inputs)
        if self.config.coupled:
            binding.channels.align = align
        return self._start(module, binding.weights, binding.skipped, example_inputs, binding)

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
            self._zero_buffers()

    def shrink(self, optimizer: Optimizers = None) -> Shrunk:
        """Cut the pruned channels out of the live module, so that fine-tuning goes on at the smaller size.

        What else is pruned stays held, and is all that the report tells of from now on. See `Binding.shrink`.

        Args:
            optimizer: one or several, whose momenta and averages are cut too.

        Raises:
            PruneError: the pruner takes no channels, or has more to take; or as `Binding.shrink`. The module is as it
                was.
        """
        binding, module = self._binding, self._module
        if binding is None or module is None or self._channels is None or self._holder is None:
            raise PruneError(
                "there are no channels to cut out: call a pruner whose configuration has the pattern 'channel' or "
                "'head' with the model and example_inputs first"
            )
        if self._smaller:
            raise PruneError("the channels have been cut out already")
        last = [entry.final() for entry in self.config.entries if not entry.exclude]
        if self._targets != last:
            raise PruneError(
                f"the schedule is not at its end yet (sparsity {self._targets}, at the end {last}), and what is cut "
                "out cannot be pruned on; shrink after the last update"
            )
        self.apply()
        kept = self._kept
        done = shrink(module, self._examples, binding.channels, binding.sources, optimizer)
        self.remove()
        cut = {binding.names[key]: list(axes) for key, axes in done.alive.items()}
        left = {w.name: keep(kept[w.name], cut.get(w.name, [])) for w in self.weights if w.name in kept}
        self._kept = {name: mask for name, mask in left.items() if not mask.all()}
        self.weights = bind(module, self._examples).weights if self._kept else ()
        self.masks, self._binding, self._channels, self._smaller = Masks(self._kept), None, None, True
        self._holder = Holder(module)
        self._hold(self._kept)
        return done

    def export(
        self,
        path: str | os.PathLike[str],
        example_inputs: Any = None,
        *,
        dynamic_shapes: Any = None,
        keep_shape: bool = False,
    ) -> Exported:
        """Write the deployable file: torch's own export with constants folded and operators fused, checked.

        Where channels are pruned, they are cut out of it; grouped inputs are lowered.

        Args:
            path: the file; weights go to a file beside it above 2 GB. It appears complete or not at all.
            example_inputs: as for the call; those of the call unless given.
            dynamic_shapes: as torch.onnx.export takes them; by default the batch has any size, where that can be had.
            keep_shape: leave pruned channels and inputs in the file, as zeros.

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
        candidate = exporting.candidate(module, inputs, self.weights, self._kept, dynamic_shapes)
        return self._write(candidate, path, keep_shape)

    def _start(
        self,
        module: nn.Module,
        weights: Sequence[Weight],
        skipped: Sequence[Skipped],
        example_inputs: Any = None,
        binding: Binding | None = None,
    ) -> TorchPruner:
        """Take charge of a module whose weights are known."""
        channels = binding.channels if binding is not None and self.config.coupled else None
        self._check(weights, skipped, channels)
        self.remove()
        self._holder, self._module, self._examples = Holder(module), module, example_inputs
        self._binding = binding if channels is not None else None
        self._places = {w.name: w.storage.place for w in weights if isinstance(w.storage, Site)}
        if self._binding is not None:
            self._places |= {s.name: s.place for s in self._binding.sources.values() if isinstance(s, Site)}
        try:
            self._attach(weights, skipped, channels)
        except PruneError:
            self.remove()
            raise
        return self

    def _hold(self, kept: Mapping[str, np.ndarray]) -> None:
        if distributed.active():
            self._kept = kept = distributed.agreed(kept)
            self.masks = Masks(kept)
        if self._holder is not None:
            self._holder.hold({self._places[name]: mask for name, mask in kept.items() if name in self._places})
            self._zero_buffers()

    def _zero_buffers(self) -> None:
        """Zero what buffers hold for channels that are gone: running means, which nothing else would move."""
        for source in () if self._binding is None else self._binding.sources.values():
            if isinstance(source, Buffer) and source.name in self._kept:
                source.write(np.where(self._kept[source.name], source.read(), np.zeros((), source.read().dtype)))


class LevelPruner(TorchPruner):
    """Level: the int(n * sparsity) entries of smallest magnitude of each weight."""

    kind: ClassVar[str | None] = "level"


class AGPPruner(TorchPruner):
    """AGP (Zhu & Gupta 2017): level pruning whose sparsity rises along a cubic schedule."""

    kind: ClassVar[str | None] = "agp"


class SensitivityPruner(TorchPruner):
    """Sensitivity (Han et al. 2015): thresholds in units of each weight's standard deviation."""

    kind: ClassVar[str | None] = "sensitivity"
