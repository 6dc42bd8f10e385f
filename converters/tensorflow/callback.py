"""Pruning inside `model.fit`."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from .pruners import TensorFlowPruner


class Pruning(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Moves a pruner's schedule with the training: epochs as `fit` counts them, from 0, and optimizer steps.

    The pruner is called with the model unless it was before. The sparsity joins the epoch's logs, so that History, the
    progress bar and a CSVLogger show it.

    Args:
        pruner: a pruner of this package.
    """

    def __init__(self, pruner: TensorFlowPruner) -> None:
        """Nothing happens before `fit`."""
        super().__init__()
        self.pruner = pruner
        self._steps: int | None = None

    def set_model(self, model: Any) -> None:
        """Attach the pruner before the train function is made."""
        super().set_model(model)
        if self.pruner.model is not model:
            self.pruner(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Count optimizer steps from here."""
        self._steps = self._taken()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Prune what is due."""
        self.pruner.update_epoch(epoch)

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Pass on the optimizer steps: gradient accumulation and steps_per_execution make them differ from batches."""
        if not self.pruner.counts_steps:
            return
        taken = self._taken()
        if self._steps is not None and taken > self._steps:
            self.pruner.step(taken - self._steps)
        self._steps = taken

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Log the sparsity."""
        if logs is not None:
            logs["sparsity"] = self.pruner.sparsity

    def _taken(self) -> int:
        optimizer = self.model.optimizer
        return int(tf.convert_to_tensor(getattr(optimizer, "inner_optimizer", optimizer).iterations))
