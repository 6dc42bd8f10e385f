"""The pruners a user names, on Keras models and on TensorFlow graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from onnxprune.api import Pruner, note
from onnxprune.errors import PruneError
from onnxprune.graph.model import Model

from ..bridge import Bridge
from .deploy import Exported
from .hold import KerasHolder
from .holder import Holder


class TensorFlowPruner(Bridge):
    """A pruner that holds its masks in a Keras model or in a TensorFlow graph from the moment it is called with it."""

    def __init__(self, config_list: Any, **options: Any) -> None:
        """See `onnxprune.Pruner`."""
        super().__init__(config_list, **options)
        self.model: Any = None
        self._holder: Holder | None = None

    def __call__(self, target: Any, example_inputs: Any = None) -> TensorFlowPruner:
        """Take charge of a model: prune what is due, and keep it pruned from now on.

        Args:
            target: a built Keras 3 model, or a TensorFlow graph, whose masks form when it first runs.
            example_inputs: for a Keras model, what it is called with. Given, the exported graph says what its weights
                are; otherwise its layers do.

        Returns:
            The pruner itself.

        Raises:
            PruneError: nothing in it can be pruned, an entry of the configuration matches nothing, or a weight holds
                NaN; nothing has been changed.
        """
        holder: Holder
        if isinstance(target, keras.Model):
            holder = KerasHolder(target, example_inputs)
        elif isinstance(target, tf.Graph):
            return self._graph(target)
        else:
            kind = f"{type(target).__module__}.{type(target).__name__}"
            raise PruneError(f"a pruner takes a keras.Model or a tf.Graph, not a {kind}")
        self._check(holder)
        self.remove()
        self._holder, self.model = holder, target
        try:
            self._attach(holder.weights, holder.skipped)
        except PruneError:
            self.remove()
            raise
        return self

    def update_epoch(self, epoch: int, sess: Any = None) -> None:
        """Move schedules that count epochs to `epoch`; what was pruned stays pruned.

        Args:
            epoch: as the configuration counts.
            sess: for a graph, the session whose variables are pruned.
        """
        if self._holder is None:
            super().update_epoch(epoch)
            return
        with self._holder.at(sess):
            super().update_epoch(epoch)

    def step(self, steps: int = 1, sess: Any = None) -> None:
        """Move schedules that count optimizer steps on; for a graph, in the session `sess`."""
        if self._holder is None or not isinstance(self.model, tf.Graph):
            super().step(steps)
            return
        Pruner.step(self, steps)
        if self._targets_now() != self._targets:  # between two updates a session's values need not be fetched
            with self._holder.at(sess):
                self._due()

    def load_state_dict(self, state: Mapping[str, Any], sess: Any = None) -> None:
        """Go on from a `state_dict`; where a model is attached, its masks are held from now on."""
        if self._holder is None or (sess is None and isinstance(self.model, tf.Graph)):
            super().load_state_dict(state)  # a graph without a session takes the masks when it first runs
            return
        with self._holder.at(sess):
            super().load_state_dict(state)

    def remove(self) -> None:
        """Stop holding: what is left is a plain model with zeros in it."""
        if self._holder is not None:
            self._holder.remove()
        self._holder, self.model = None, None

    def export(
        self, path: str | os.PathLike[str], example_inputs: Any = None, *, outputs: Any = None, sess: Any = None
    ) -> Exported:
        """Write the deployable ONNX file: exported by tf2onnx with its folding on, and checked.

        Args:
            path: the target; replaced only once everything holds.
            example_inputs: what onnxruntime and TensorFlow are compared on.
            outputs: for a graph, the tensors to export, or their names.
            sess: for a graph, the session that holds the variables.

        Raises:
            PruneError: no model is attached, a pruned entry is not zero in the file, or onnxruntime differs by more
                than 1e-4 of an output's largest magnitude.
        """
        if self._holder is None:
            raise PruneError("the pruner holds no model to export; call it with one first")
        with self._holder.at(sess):
            return self._holder.export(path, self._kept, example_inputs, outputs, sess, self._record)

    @property
    def counts_steps(self) -> bool:
        """Whether a schedule is counted in optimizer steps."""
        return any(getattr(entry, "counts", "epoch") == "step" for entry in self.config.entries if not entry.exclude)

    def _graph(self, graph: Any) -> TensorFlowPruner:
        """Put masks into a graph; they form in the first run of a session."""
        from .graph import GraphHolder

        holder = GraphHolder(graph, self._form)
        self._check(holder)
        self.remove()
        self.weights, self.skipped, self._untouched = holder.weights, holder.skipped, holder.skipped
        self._check_masks()
        holder.attach({weight.name for _, chosen in self.config.assign(self.weights) for weight in chosen})
        self._kept, self._targets = dict(self.masks), None
        self._holder, self.model = holder, graph
        return self

    def _form(self) -> Mapping[str, np.ndarray]:
        """Decide from what the weights' storages read at this moment."""
        assert self._holder is not None
        self._attach(self._holder.weights, self._holder.skipped)
        return self._kept

    def _hold(self, kept: Mapping[str, np.ndarray]) -> None:
        if self._holder is not None:
            self._holder.hold(kept)

    def _due(self) -> None:
        if self._holder is not None:
            super()._due()

    def _check(self, holder: Holder) -> None:
        """Refuse a model in which there is nothing to do, before anything is touched."""
        reasons = "".join(f"; '{s.name}' ({s.op_type}) is left alone: {s.reason}" for s in holder.skipped[:8])
        if not holder.weights:
            raise PruneError(
                f"the model has no weight that can be pruned: none of its layers or operators has a rule{reasons}"
            )
        try:
            self.config.assign(holder.weights)
        except PruneError as error:
            raise PruneError(f"{error}{reasons}") from None

    def _record(self, model: Model) -> None:
        note(model, self.config, self.report, self.clock)


class LevelPruner(TensorFlowPruner):
    """Level: the int(n * sparsity) entries of smallest magnitude of each weight."""

    kind = "level"


class AGPPruner(TensorFlowPruner):
    """AGP (Zhu & Gupta 2017): level pruning whose sparsity rises along a cubic schedule."""

    kind = "agp"


class SensitivityPruner(TensorFlowPruner):
    """Sensitivity (Han et al. 2015): thresholds in units of each weight's standard deviation."""

    kind = "sensitivity"


AGP_Pruner = AGPPruner
"""NNI's name."""
