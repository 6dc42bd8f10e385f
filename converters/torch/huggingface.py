"""A pruner in the loop of Hugging Face's Trainer."""

# Without the library installed, its classes are Any.
# mypy: disable-error-code="misc"

from __future__ import annotations

import math
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from onnxprune.errors import PruneError

from .pruners import TorchPruner

FILE = "onnxprune.pt"
"""The pruner's state in a checkpoint's folder."""


class HuggingFaceCallback(TrainerCallback):
    """Moves a pruner's schedule with the Trainer: `update_epoch` at the end of each epoch, `step` after each step.

    Epochs are counted from 1, as in the loop `train(model); pruner.update_epoch(epoch)`; what the Trainer evaluates and
    saves at the end of an epoch is the pruned model. An epoch that is cut short counts.

    Checkpoints hold the pruner's state beside the model's. Training that resumes from one goes on with its masks, and
    `load_best_model_at_end` ends with those of the best.

    Args:
        pruner: a pruner that was called with the model.
        checkpoint: the folder that `train(resume_from_checkpoint=...)` gets, where it is not in `output_dir`.
    """

    def __init__(self, pruner: TorchPruner, checkpoint: str | Path | None = None) -> None:
        """Take a pruner along."""
        self.pruner = pruner
        self.checkpoint = checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up the masks of the checkpoint that training resumes from; one of a whole epoch's last step is older.

        Raises:
            PruneError: it holds none.
        """
        if not self.pruner.weights:
            raise PruneError("the callback's pruner has no model yet; call pruner(model) before the training starts")
        if state.global_step:
            self._load(Path(self.checkpoint or args.resume_from_checkpoint or _usual(args, state)))
            self.pruner.catch_up(int(state.epoch or 0))

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move schedules that count epochs."""
        self.pruner.update_epoch(math.ceil(state.epoch or 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Move schedules that count optimizer steps: once per step, however many batches it accumulates."""
        self.pruner.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Put the pruner's state into the checkpoint."""
        if args.should_save:
            torch.save(self.pruner.state_dict(), _usual(args, state) / FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take up the masks of the best checkpoint where the Trainer took up its weights."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self._load(Path(state.best_model_checkpoint))

    def _load(self, folder: Path) -> None:
        try:
            saved = torch.load(folder / FILE, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise PruneError(
                f"the checkpoint '{folder}' holds no state of a pruner ({type(error).__name__}); resume from one that "
                "was saved with this callback, and where it is not in output_dir, give its folder as "
                "HuggingFaceCallback(pruner, checkpoint=...) too"
            ) from error
        self.pruner.load_state_dict(saved)


def _usual(args: TrainingArguments, state: TrainerState) -> Path:
    """Where the Trainer keeps the checkpoint of the current step."""
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")
