"""Pruning inside `model.fit`."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from .pruners import TensorFlowPruner


class Pruning(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no types
    """Moves a pruner's schedule with `fit`: `update_epoch` at the end of each epoch, `step` after optimizer steps.

    Epochs are counted from 1 (`fit` hands callbacks numbers from 0), as in the loop `train(model);
    pruner.update_epoch(epoch)`: `fit(epochs=10)` ends with what `end_epoch: 10` says. An epoch's validation measures
    the model that is pruned already, and the sparsity joins its logs, so that History, the progress bar and a CSVLogger
    show it. Give this callback before those that save at the end of an epoch.

    The pruner is called with the model unless it was before.

    Args:
        pruner: a pruner of this package.
    """

    def __init__(self, pruner: TensorFlowPruner) -> None:
        """Nothing happens before `fit`."""
        super().__init__()
        self.pruner = pruner
        self._steps: int | None = None
        self._epoch: int | None = None

    def set_model(self, model: Any) -> None:
        """Attach the pruner before the train function is made."""
        super().set_model(model)
        if self.pruner.model is not model:
            self.pruner(model)

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Count optimizer steps from here."""
        self._steps = self._taken()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Go on where `initial_epoch` says that epochs were finished elsewhere."""
        self.pruner.catch_up(epoch)
        self._epoch = epoch + 1

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Pass on the optimizer steps: gradient accumulation and steps_per_execution make them differ from batches."""
        if not self.pruner.counts_steps:
            return
        taken = self._taken()
        if self._steps is not None and taken > self._steps:
            self.pruner.step(taken - self._steps)
        self._steps = taken

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Prune what is due at an epoch's end before its validation."""
        if self._epoch is not None:
            self.pruner.update_epoch(self._epoch)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Prune what is due, unless the validation saw to it, and log the sparsity."""
        if self._epoch is not None:
            self.pruner.update_epoch(self._epoch)
            self._epoch = None
        if logs is not None:
            logs["sparsity"] = self.pruner.sparsity

    def _taken(self) -> int:
        optimizer = self.model.optimizer
        return int(tf.convert_to_tensor(getattr(optimizer, "inner_optimizer", optimizer).iterations))
