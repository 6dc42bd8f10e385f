"""A pruner in the loop of Lightning's Trainer."""

# Without the library installed, its classes are Any.
# mypy: disable-error-code="misc"

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from onnxprune.errors import PruneError

from .pruners import TorchPruner


class LightningCallback(Callback):
    """Moves a pruner's schedule with the Trainer: `update_epoch` at the end of each epoch, `step` after each step.

    Epochs are counted from 1 (Lightning's `current_epoch` from 0), as in the loop `train(model);
    pruner.update_epoch(epoch)`. Lightning validates before an epoch ends: it measures the model as it was trained, and
    checkpoints at the end of an epoch hold the pruned one.

    Checkpoints hold the pruner's state; training that resumes from one goes on with its masks.

    Args:
        pruner: a pruner that was called with the module, or with the part of it to prune.
    """

    def __init__(self, pruner: TorchPruner) -> None:
        """Take a pruner along."""
        self.pruner = pruner
        self._steps = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count steps from here, and go on where a checkpoint was written before its epoch's end.

        Raises:
            PruneError: the pruner has no model.
        """
        if not self.pruner.weights:
            raise PruneError("the callback's pruner has no model yet; call pruner(module) before the training starts")
        self._steps = trainer.global_step
        self.pruner.catch_up(trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move schedules that count epochs."""
        self.pruner.update_epoch(trainer.current_epoch + 1)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Move schedules that count optimizer steps, by as many as Lightning's `global_step` has moved."""
        taken, self._steps = trainer.global_step - self._steps, trainer.global_step
        if taken:
            self.pruner.step(taken)

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, for a checkpoint."""
        return self.pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint; its masks are held from now on.

        Raises:
            PruneError: they do not fit the model.
        """
        self.pruner.load_state_dict(state_dict)
