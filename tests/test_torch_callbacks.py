"""Pruners in the loops of the real libraries: a transformers.Trainer on a small transformer, a lightning.Trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnxprune.converters.torch import AGPPruner
from torch import nn

from onnxprune import PruneError

transformers = pytest.importorskip("transformers")
lightning = pytest.importorskip("lightning")

from onnxprune.converters.torch import HuggingFaceCallback, LightningCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning:lightning"
)

EPOCHS = [{"final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 3, "op_types": ["Linear"]}]
STEPS = [{"final_sparsity": 0.8, "end_step": 9, "frequency": 2, "op_types": ["Linear"]}]


def schedules(slow: str) -> pytest.MarkDecorator:
    """Both kinds of schedule; each library runs one of them by default."""
    cases = {"epochs": EPOCHS, "steps": STEPS}
    marked = [pytest.param(c, id=n, marks=pytest.mark.slow if n == slow else ()) for n, c in cases.items()]
    return pytest.mark.parametrize("schedule", marked)


def zeros_held(pruner: AGPPruner, model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    for name in pruner.masks:
        assert (parameters[name].detach().numpy()[~pruner.masks[name]] == 0).all(), name


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, vocab_size=40, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config)


SENTENCES = [{"input_ids": [(3 * i + 7 * j) % 40 for j in range(8)], "labels": i % 2} for i in range(24)]


class Watch(transformers.TrainerCallback):
    """Looks at the masks after every optimizer step, and writes down what the sparsity was."""

    def __init__(self, pruner: AGPPruner, model: nn.Module) -> None:
        self.pruner, self.model, self.seen = pruner, model, []

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        zeros_held(self.pruner, self.model)
        self.seen.append(round(self.pruner.sparsity, 3))


def train(schedule, folder: Path, stop: int = 0, resume: str | None = None, epochs: int = 4, **options):
    """A Trainer's run of three optimizer steps an epoch, stopped after some steps or resumed from a checkpoint."""
    model = bert()
    pruner = AGPPruner(schedule)
    pruner(model)
    watch = Watch(pruner, model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
        **{"save_strategy": "steps", "save_steps": 2, **options},
    )

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            control.should_training_stop = state.global_step == stop

    callbacks = [HuggingFaceCallback(pruner), watch, Stop()]
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=SENTENCES, eval_dataset=SENTENCES, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    zeros_held(pruner, model)
    return pruner, model, watch.seen


@schedules(slow="steps")
def test_hugging_face_resumes_where_it_stopped(tmp_path, schedule):
    whole, model, seen = train(schedule, tmp_path / "whole")
    assert len(seen) == 12
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(0.8, abs=5e-3)
    assert len(set(seen)) > 2
    _, _, first = train(schedule, tmp_path / "part", stop=4)  # in the middle of an epoch
    resumed, again, rest = train(schedule, tmp_path / "part", resume=str(tmp_path / "part" / "checkpoint-4"))
    assert first + rest == seen
    assert resumed.masks == whole.masks
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


TEN = [{"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 10, "op_types": ["Linear"]}]


def loop(pruner: AGPPruner) -> list[float]:
    """The sparsity after each epoch of the documentation's loop; how AGP rises does not depend on the weights."""
    reached = []
    for epoch in range(1, 11):
        pruner.update_epoch(epoch)
        reached.append(round(pruner.sparsity, 3))
    return reached


def test_hugging_face_counts_epochs_as_the_loop_of_the_documentation(tmp_path):
    pruner, _, seen = train(TEN, tmp_path, epochs=10, save_strategy="no")
    twin = AGPPruner(TEN)
    reached = loop(twin(bert()))
    assert seen == [s for s in [0.0, *reached[:-1]] for _ in range(3)]  # an epoch trains what the one before left
    assert pruner.report.zeros == twin.report.zeros == sum(int(row.size * 0.8) for row in pruner.report.rows)


def test_hugging_face_resumes_from_an_epochs_last_step(tmp_path):
    """The checkpoint is written before the epoch ends, and the epoch never ends again."""
    schedule = [{"final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2, "op_types": ["Linear"]}]
    options = {"save_steps": 3, "epochs": 2}
    whole, model, seen = train(schedule, tmp_path, **options)
    resumed, again, rest = train(schedule, tmp_path, resume=str(tmp_path / "checkpoint-3"), **options)
    assert rest == seen[3:]
    assert rest[0] > 0.5
    assert resumed.masks == whole.masks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.slow
def test_hugging_face_ends_with_the_best_checkpoints_masks(tmp_path):
    best = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "eval_strategy": "steps",
        "eval_steps": 4,
        "save_steps": 4,
    }
    pruner, model, _ = train(EPOCHS, tmp_path, **best)
    for name in pruner.masks:  # neither fewer zeros than the masks say nor more
        assert np.array_equal(dict(model.named_parameters())[name].detach().numpy() != 0, pruner.masks[name])


def test_hugging_face_refuses_a_checkpoint_without_masks(tmp_path):
    train(EPOCHS, tmp_path, stop=2)
    (tmp_path / "checkpoint-2" / "onnxprune.pt").unlink()
    with pytest.raises(PruneError, match=r"checkpoint-2' holds no state of a pruner .* checkpoint="):
        train(EPOCHS, tmp_path, resume=str(tmp_path / "checkpoint-2"))


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)


class Look(lightning.Callback):
    def __init__(self, pruner: AGPPruner) -> None:
        self.pruner, self.seen = pruner, []

    def on_before_zero_grad(self, trainer, module, optimizer) -> None:
        zeros_held(self.pruner, module)
        self.seen.append(round(self.pruner.sparsity, 3))


def fit(schedule, folder: Path, epochs: int, resume: Path | None = None, precision: str = "32-true", extra=()):
    model = Net()
    pruner = AGPPruner(schedule)
    pruner(model)
    look = Look(pruner)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        precision=precision,
        callbacks=[*extra, LightningCallback(pruner), look],
    )
    generator = torch.Generator().manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 8, generator=generator), torch.arange(64) % 2)
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer.fit(model, loader, loader, ckpt_path=resume)
    zeros_held(pruner, model)
    trainer.save_checkpoint(folder / "last.ckpt")
    return pruner, model, look.seen


@schedules(slow="epochs")
def test_lightning_resumes_where_it_stopped(tmp_path, schedule):
    whole, model, seen = fit(schedule, tmp_path, 4)
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(0.8, abs=5e-3)
    assert len(set(seen)) > 2
    _, _, first = fit(schedule, tmp_path, 2)
    resumed, again, rest = fit(schedule, tmp_path, 4, resume=tmp_path / "last.ckpt")
    assert first + rest == seen
    assert resumed.masks == whole.masks
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_lightning_counts_epochs_as_the_loop_of_the_documentation(tmp_path):
    pruner, _, seen = fit(TEN, tmp_path, 10)
    twin = AGPPruner(TEN)
    reached = loop(twin(Net()))
    assert seen == [s for s in [0.0, *reached[:-1]] for _ in range(4)]
    assert pruner.report.zeros == twin.report.zeros == sum(int(row.size * 0.8) for row in pruner.report.rows)


@pytest.mark.parametrize("moment", ["on_validation_end", "on_train_epoch_end"])
def test_lightning_resumes_from_a_checkpoint_written_before_the_epochs_pruning(tmp_path, moment):
    schedule = [{"final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2, "op_types": ["Linear"]}]

    def save(trainer, module) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def saver() -> lightning.Callback:
        callback = lightning.Callback()
        setattr(callback, moment, save)
        return callback

    whole, model, seen = fit(schedule, tmp_path, 2, extra=[saver()])
    resumed, again, rest = fit(schedule, tmp_path, 2, resume=tmp_path / "0.ckpt", extra=[saver()])
    assert rest == seen[4:]
    assert rest[0] > 0.5
    assert resumed.masks == whole.masks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_lightning_in_mixed_precision(tmp_path):
    pruner, _, _ = fit(EPOCHS, tmp_path, 4, precision="bf16-mixed")
    assert pruner.sparsity == pytest.approx(0.8, abs=5e-3)


def test_a_pruner_without_a_model_is_an_error(tmp_path):
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    callback = HuggingFaceCallback(AGPPruner(EPOCHS))
    with pytest.raises(PruneError, match="has no model yet"):
        callback.on_train_begin(arguments, transformers.TrainerState(), transformers.TrainerControl())
    trainer = lightning.Trainer(accelerator="cpu", logger=False)
    with pytest.raises(PruneError, match="has no model yet"):
        LightningCallback(AGPPruner(EPOCHS)).on_train_start(trainer, Net())
