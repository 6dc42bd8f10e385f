"""The pruners a user names, on Keras models and on TensorFlow graphs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from onnxprune.api import Pruner
from onnxprune.errors import PruneError

from ..bridge import Bridge
from ..deploy import Exported
from .binding import Binding, bind
from .hold import KerasHolder
from .holder import Holder


class TensorFlowPruner(Bridge):
    """A pruner that holds its masks in a Keras model or in a TensorFlow graph from the moment it is called with it."""

    def __init__(self, config_list: Any, **options: Any) -> None:
        """See `onnxprune.Pruner`."""
        super().__init__(config_list, **options)
        self.model: Any = None
        self._binding: Binding | None = None  # where channels are pruned
        self._holder: Holder | None

    def __call__(self, target: Any, example_inputs: Any = None, *, align: int | None = None) -> TensorFlowPruner:
        """Take charge of a model: prune what is due, and keep it pruned from now on.

        Args:
            target: a built Keras 3 model, or a TensorFlow graph, whose masks form when it first runs.
            example_inputs: for a Keras model, what it is called with. Given, the exported graph says what its weights
                are; otherwise its layers do. The patterns 'channel' and 'head' need the graph, and with it the example
                where the model is subclassed.
            align: counts of channels are rounded to multiples of it; what suits the machine unless given.

        Returns:
            The pruner itself.

        Raises:
            PruneError: nothing in it can be pruned, an entry of the configuration matches nothing, or a weight holds
                NaN; nothing has been changed.
        """
        if isinstance(target, tf.Graph):
            return self._graph(target)
        if not isinstance(target, keras.Model):
            kind = f"{type(target).__module__}.{type(target).__name__}"
            raise PruneError(f"a pruner takes a keras.Model or a tf.Graph, not a {kind}")
        if example_inputs is None and not self.config.coupled:
            return self._start(KerasHolder.of_layers(target))
        binding = bind(target, example_inputs)
        if self.config.coupled:
            binding.channels.align = align
        return self._start(KerasHolder.of_graph(target, binding, example_inputs), binding)

    def update_epoch(self, epoch: int, sess: Any = None) -> None:
        """Move schedules that count epochs to `epoch`; what was pruned stays pruned.

        Args:
            epoch: the number of the epoch that has just finished; the first is 1.
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
        """Stop holding the masks: what is left is a plain model with zeros in it."""
        super().remove()
        self.model = None

    def export(
        self,
        path: str | os.PathLike[str],
        example_inputs: Any = None,
        *,
        outputs: Any = None,
        sess: Any = None,
        keep_shape: bool = False,
    ) -> Exported:
        """Write the deployable ONNX file: exported by tf2onnx with its folding on, and checked.

        Where channels are pruned, they are cut out of it.

        Args:
            path: the target; replaced only once everything holds.
            example_inputs: what onnxruntime and TensorFlow are compared on.
            outputs: for a graph, the tensors to export, or their names.
            sess: for a graph, the session that holds the variables.
            keep_shape: leave pruned channels in the file, as zeros.

        Raises:
            PruneError: no model is attached, a pruned entry is not zero in the file, or onnxruntime differs by more
                than 1e-4 of an output's largest magnitude.
        """
        if self._holder is None:
            raise PruneError("the pruner holds no model to export; call it with one first")
        with self._holder.at(sess):
            return self._write(self._holder.candidate(self._kept, example_inputs, outputs, sess), path, keep_shape)

    def shrink(self) -> Any:
        """A new model without the pruned channels, on which fine-tuning goes on; see `Binding.shrink`.

        Raises:
            PruneError: the pruner takes no channels; or as `Binding.shrink`.
        """
        if self._holder is None or self._binding is None or self._channels is None:
            raise PruneError(
                "there are no channels to cut out: call a pruner whose configuration has the pattern 'channel' or "
                "'head' with a Keras model first"
            )
        with self._holder.at(None):
            return self._binding.shrink()

    @property
    def counts_steps(self) -> bool:
        """Whether a schedule is counted in optimizer steps."""
        return any(getattr(entry, "counts", "epoch") == "step" for entry in self.config.entries if not entry.exclude)

    def _start(self, holder: KerasHolder, binding: Binding | None = None) -> TensorFlowPruner:
        """Take charge of a Keras model whose weights are known."""
        channels = binding.channels if binding is not None and self.config.coupled else None
        self._check(holder.weights, holder.skipped, channels)
        self.remove()
        self._holder, self.model = holder, holder.model
        self._binding = binding if channels is not None else None
        try:
            self._attach(holder.weights, holder.skipped, channels)
        except PruneError:
            self.remove()
            raise
        return self

    def _graph(self, graph: Any) -> TensorFlowPruner:
        """Put masks into a graph; they form in the first run of a session."""
        from .graph import GraphHolder

        holder = GraphHolder(graph, self._form)
        self._check(holder.weights, holder.skipped)
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
