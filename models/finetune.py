"""Fine-tune small nets while AGP prunes them, beside the dense net trained as long: the table of the README.

    python models/finetune.py torch
    python models/finetune.py keras
    python models/finetune.py torch --nets lenet5 --seeds 0

Per net and seed: train; then from the same weights once train on and once train on while pruning. Mean accuracy over
the seeds and their spread are printed, beside the bar each net is held to. One thread, about half an hour a framework.
The accuracy is that on the test images after the last epoch; nothing is picked by it.

One weight in twelve is left of the two LeNets, as in Han et al. 2015 ("Learning both Weights and Connections"). A
sparsity is that of the whole net; its allocation leaves small layers denser, as Han et al. do by hand.

The animal CNN is small for what it does: its convolutions, a quarter of its weights, keep a larger share of theirs, and
pruned, it learns from the outputs of the dense net trained as long as well as from labels (Hinton et al. 2015,
"Distilling the knowledge in a neural network", section 2).
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from _data import animal_mnist, augmented_batches, japanese_vowels, mnist
from rich.console import Console
from rich.table import Table

BATCH = 64
PEAK = (3e-3, 5e-3)  # the highest learning rate of training, and of fine-tuning
TEMPERATURE, SOFT = 4.0, 0.7  # of the dense net's outputs where the pruned one learns from them, and their share


@dataclass(frozen=True)
class Task:
    """A net's data, and how it is trained and pruned.

    Attributes:
        data: returns x_train, y_train, x_test, y_test first.
        augmented: whether the images are turned, zoomed and moved.
        sparsity: operators, and the share of their weights together to prune.
        allocation: how that is spread over their layers.
        epochs: of training; of fine-tuning; and of these, those until AGP is at its end.
        bar: points of accuracy that pruning may cost.
        distilled: whether the pruned net learns from the dense one's outputs too.
    """

    data: Callable[[], Any]
    augmented: bool
    sparsity: Mapping[str, float]
    allocation: str
    epochs: tuple[int, int, int]
    bar: float
    distilled: bool = False

    def config_list(self) -> list[dict[str, Any]]:
        """AGP from the first epoch of fine-tuning on; what it leaves of the epochs is for recovery."""
        schedule = {"initial_sparsity": 0, "start_epoch": 0, "end_epoch": self.epochs[2], "frequency": 1}
        return [
            {**schedule, "final_sparsity": share, "allocation": self.allocation, "op_types": operators.split()}
            for operators, share in self.sparsity.items()
        ]


TASKS = {
    "lenet-300-100": Task(mnist, True, {"default": 0.917}, "erk", (30, 120, 60), 0.3),
    "lenet5": Task(mnist, True, {"default": 0.917}, "erk", (20, 20, 10), 0.3),
    "bilstm": Task(japanese_vowels, False, {"default": 0.8}, "erk", (60, 120, 60), 0.5),
    "animal-cnn": Task(
        animal_mnist, True, {"Conv": 0.7, "Gemm MatMul": 0.966}, "erk", (12, 60, 25), 0.5, distilled=True
    ),
}


def batches(task: Task, x: Any, y: Any, rng: np.random.Generator) -> Any:
    """One epoch of shuffled batches, the same ones for every framework."""
    if task.augmented:
        yield from augmented_batches(x, y, rng, BATCH)
        return
    order = rng.permutation(len(x))
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        yield x[part], y[part]


def rate(step: int, steps: int, peak: float) -> float:
    """Learning rate: a short warm-up, then a cosine down to nothing."""
    warm = max(1, steps // 20)
    return peak * min(1.0, (step + 1) / warm) * 0.5 * (1 + float(np.cos(np.pi * step / steps)))


def run(framework: Any, name: str, seed: int) -> tuple[float, float, float]:
    """Accuracy of the dense and of the pruned net in percent, and how many times fewer weights are left."""
    task = TASKS[name]
    x, y, x_test, y_test = task.data()[:4]
    first, second, _ = task.epochs

    def train(
        net: Any, epochs: int, peak: float, rng: np.random.Generator, pruner: Any = None, teacher: Any = None
    ) -> None:
        steps = epochs * -(-len(x) // BATCH)
        fit = framework.trainer(net) if teacher is None else framework.trainer(net, teacher, TEMPERATURE, SOFT)
        step = 0
        for epoch in range(epochs):
            if pruner is not None:
                pruner.update_epoch(epoch)
            for images, labels in batches(task, x, y, rng):
                fit(images, labels, rate(step, steps, peak))
                step += 1

    net = framework.make(name, seed)
    train(net, first, PEAK[0], np.random.default_rng(seed))
    start = framework.weights(net)
    train(net, second, PEAK[1], np.random.default_rng(seed + 1000))
    dense = framework.accuracy(net, x_test, y_test)

    teacher, net = net if task.distilled else None, framework.make(name, seed)
    framework.load(net, start)
    pruner = framework.AGPPruner(task.config_list())
    pruner(net)
    train(net, second, PEAK[1], np.random.default_rng(seed + 1000), pruner, teacher)
    pruned = framework.accuracy(net, x_test, y_test)
    return 100 * dense, 100 * pruned, 1 / (1 - pruner.sparsity)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("framework", choices=["torch", "keras"])
    parser.add_argument("--nets", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    framework = importlib.import_module(f"_nets_{options.framework}")
    table = Table(title=f"fine-tuned in {options.framework} {framework.version}, seeds {options.seeds}")
    for column in ("net", "weights left", "dense %", "pruned %", "difference", "bar", "met"):
        table.add_column(column, justify="left" if column == "net" else "right")
    for name in options.nets:
        results = np.array([run(framework, name, seed) for seed in options.seeds])
        dense, pruned, times = results.T
        difference = float((pruned - dense).mean())
        bar = TASKS[name].bar
        cells = [name, f"1/{times.mean():.1f}", spread(dense), spread(pruned), f"{difference:+.2f}", f"-{bar}"]
        table.add_row(*cells, "yes" if difference >= -bar else "no")
        print(" | ".join([*cells, str(results.round(2).tolist())]), flush=True)
    Console().print(table)


def spread(values: Any) -> str:
    """Mean, and the distance from it to the farthest seed."""
    return f"{values.mean():.2f} ± {np.abs(values - values.mean()).max():.2f}"


if __name__ == "__main__":
    main()
