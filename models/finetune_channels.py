"""Prune channels while fine-tuning, and export: the files are smaller, and onnxruntime is faster with them.

    python models/finetune_channels.py
    python models/finetune_channels.py --nets lenet5 --seeds 0

Per net and seed: train; then from the same weights once train on and once train on while AGP takes half of the
channels. Accuracies are those of the exported files under onnxruntime on the test images after the last epoch; latency
is the median of one thread on one image, the two files run in turns. The bar is half a point of accuracy. The recipe is
that of `finetune.py`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import _nets_torch as framework
import numpy as np
import torch
from finetune import BATCH, PEAK, SOFT, TASKS, TEMPERATURE, batches, rate, spread
from onnxprune.converters.torch import LevelPruner
from rich.console import Console
from rich.table import Table

import onnxprune

EPOCHS = {"lenet5": (20, 20, 10), "animal-cnn": (12, 60, 25)}
"""Of training; of fine-tuning; and of these, those until AGP is at its end."""

SPARSITY, BAR = 0.5, 0.5


def run(name: str, seed: int, epochs: tuple[int, int, int]) -> tuple[float, ...]:
    """Accuracy of both files in percent, latency of both in ms, size of both in kB, and entries left of the dense."""
    task = TASKS[name]
    x, y, x_test, y_test = task.data()[:4]
    example = torch.from_numpy(x_test[:2].astype("float32"))
    first, second, rise = epochs

    def train(
        net: Any, count: int, peak: float, rng: np.random.Generator, pruner: Any = None, teacher: Any = None
    ) -> None:
        steps, step = count * -(-len(x) // BATCH), 0
        fit = framework.trainer(net) if teacher is None else framework.trainer(net, teacher, TEMPERATURE, SOFT)
        for epoch in range(1, count + 1):
            for images, labels in batches(task, x, y, rng):
                fit(images, labels, rate(step, steps, peak))
                step += 1
            if pruner is not None:
                pruner.update_epoch(epoch)

    def accuracy(file: Path) -> float:
        score = onnxprune.evaluate(
            file, [({"image": x_test.astype("float32")}, y_test)], threads=1, progress=False
        ).score
        assert score is not None
        return 100 * score

    net = framework.make(name, seed)
    train(net, first, PEAK[0], np.random.default_rng(seed))
    start = framework.weights(net)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "dense.onnx", Path(folder) / "small.onnx"]
        train(net, second, PEAK[1], np.random.default_rng(seed + 1000))
        LevelPruner([{"sparsity": 0.0}])(net).export(files[0], example)
        teacher, net = net if task.distilled else None, framework.make(name, seed)
        framework.load(net, start)
        entry = {"final_sparsity": SPARSITY, "end_epoch": rise, "pattern": "channel", "op_types": "default"}
        pruner = framework.AGPPruner([entry])(net, example)
        train(net, second, PEAK[1], np.random.default_rng(seed + 1000), pruner, teacher)
        pruner.export(files[1])
        timed = onnxprune.benchmark(files[1], files[0])
        assert timed.baseline is not None
        left = [sum(int(np.prod(w.shape)) for w in onnxprune.inspect(file).weights) for file in files]
        sizes = [file.stat().st_size / 1000 for file in files]
        return (*map(accuracy, files), timed.baseline.median, timed.latency.median, *sizes, left[1] / left[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nets", nargs="+", choices=sorted(EPOCHS), default=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", nargs=3, type=int, help="instead of those of the table")
    options = parser.parse_args()
    table = Table(title=f"half of the channels, fine-tuned in torch {framework.version}, seeds {options.seeds}")
    columns = ("net", "weights left", "dense %", "pruned %", "difference", "bar", "met", "ms", "times faster", "kB")
    for column in columns:
        table.add_column(column, justify="left" if column == "net" else "right")
    for name in options.nets:
        epochs = tuple(options.epochs or EPOCHS[name])
        results = np.array([run(name, seed, epochs) for seed in options.seeds])
        dense, pruned, before, after, large, small, left = results.T
        difference = float((pruned - dense).mean())
        cells = [name, f"{left.mean():.1%}", spread(dense), spread(pruned), f"{difference:+.2f}", f"-{BAR}"]
        cells += ["yes" if difference >= -BAR else "no", f"{before.mean():.3f} -> {after.mean():.3f}"]
        cells += [f"{(before / after).mean():.2f}", f"{large.mean():.0f} -> {small.mean():.0f}"]
        table.add_row(*cells)
        print(" | ".join([*cells, str(results.round(3).tolist())]), flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
