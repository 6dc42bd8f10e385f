"""What the torch bridge costs, beside a re-export and beside training: `python bench_bridges.py`.

Two models with random weights, a ResNet-50 (written out here) and BERT-base (transformers). For each:

- one `update_epoch` of an AGP schedule over ten epochs (weights out, masks, weights in; the weights move in
  between), against exporting the module anew with each of torch's exporters. A re-export is timed as the export
  alone, in memory: reading it, pruning it and bringing the weights back would come on top.
- a training step with masks held against the plain step of the same module, in alternating pairs whose ratio is
  taken, in wall-clock and in processor time. Attaching the pruner between the two is not timed. Steps vary by more
  than masks cost where other work shares the machine; so the calls that zero are also timed within each step.

All in one run. `--quick` takes fewer rounds, `--only` one model, `--threads` sets the threads of torch.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import logging
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnxprune.converters.torch import AGPPruner, LevelPruner, hold
from torch import nn

SCHEDULE = [{"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 10, "op_types": "default"}]
HELD = [{"sparsity": 0.8, "op_types": "default"}]
BAR_EXPORT = 20
BAR_STEP = 0.03
COLUMNS = "{:44}{:>10}{:>10}{:>10}{:>12}{:>12}"


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut (He et al. 2015)."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        return torch.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for stage, count in enumerate([3, 4, 6, 3]):
        for index in range(count):
            layers.append(Bottleneck(inputs, 64 << stage, 2 if stage and index == 0 else 1))
            inputs = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


def bert_base() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = BertForSequenceClassification(BertConfig())

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.bert(input_ids=ids).logits
            return logits

    return Logits()


class Case(NamedTuple):
    """A model, and one batch for it."""

    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    labels: Callable[[], torch.Tensor]


CASES = {
    "resnet50": Case(
        "ResNet-50, 8 images of 224x224",
        resnet50,
        lambda: torch.randn(8, 3, 224, 224),
        lambda: torch.randint(0, 1000, (8,)),
    ),
    "bert": Case(
        "BERT-base, 8 sequences of 128 tokens",
        bert_base,
        lambda: torch.randint(0, 30_000, (8, 128)),
        lambda: torch.randint(0, 2, (8,)),
    ),
}

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD, momentum 0.9": lambda m: torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-5),
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    for name in ("torch", "onnxscript", "onnx_ir", "transformers"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def dynamo(model: nn.Module, inputs: torch.Tensor, optimize: bool) -> None:
    torch.onnx.export(model, (inputs,), dynamo=True, optimize=optimize, verbose=False)


def legacy(model: nn.Module, inputs: torch.Tensor, fold: bool) -> None:
    torch.onnx.export(model, (inputs,), io.BytesIO(), dynamo=False, do_constant_folding=fold)  # type: ignore[arg-type]


EXPORTS: dict[str, Callable[[nn.Module, torch.Tensor], None]] = {
    "dynamo, unfolded (as the bridge binds)": lambda m, x: dynamo(m, x, False),
    "dynamo, optimised (torch's default)": lambda m, x: dynamo(m, x, True),
    "legacy, unfolded": lambda m, x: legacy(m, x, False),
    "legacy, folded": lambda m, x: legacy(m, x, True),
}


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of wall-clock and of processor time (all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def line(name: str, times: Sequence[tuple[float, float]], *ratios: str) -> str:
    wall = [t[0] for t in times]
    numbers = f"{statistics.median(wall):.3f}", f"{min(wall):.3f}", f"{max(wall):.3f}"
    return COLUMNS.format(name, *numbers, *ratios, *[""] * (2 - len(ratios)))


def updates_and_exports(case: Case, rounds: int) -> None:
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()[:1]
    with quiet():
        pruner = AGPPruner(SCHEDULE)(model)
    exports: dict[str, list[tuple[float, float]]] = {name: [] for name in EXPORTS}
    updates: list[tuple[float, float]] = []
    failed: dict[str, str] = {}
    for epoch in range(1, 11):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-4)
        pruner.apply()  # as the hooks do after an optimizer's step
        updates.append(timed(lambda epoch=epoch: pruner.update_epoch(epoch)))  # type: ignore[misc]
        if epoch <= rounds:
            for name, export in EXPORTS.items():
                try:
                    with quiet():
                        exports[name].append(timed(lambda export=export: export(model, inputs)))  # type: ignore[misc]
                except Exception as error:
                    failed[name] = " ".join(str(error).split())[:60]
    governed = sum(row.size for row in pruner.report.rows)
    total = sum(p.numel() for p in model.parameters())
    print(f"\nupdate_epoch against a re-export: {total / 1e6:.1f} M parameters, {governed / 1e6:.1f} M of them pruned")
    print(f"to {pruner.sparsity:.0%} in ten updates. Seconds, and how many times the re-export costs the update")
    print(COLUMNS.format("", "median", "least", "most", "x median", "x first"))
    first, later = updates[0][0], statistics.median(t[0] for t in updates[1:])
    print(line("update_epoch, the first", updates[:1]))
    print(line("update_epoch, the nine later ones", updates[1:]))
    medians = {name: statistics.median(t[0] for t in times) for name, times in exports.items() if times}
    for name, times in exports.items():
        if times:
            print(line(f"export: {name}", times, f"{medians[name] / later:.1f}", f"{medians[name] / first:.1f}"))
        else:
            print(f"export: {name} fails: {failed[name]}")
    cheapest, used = min(medians.values()), next(iter(medians.values()))
    slowest = max(t[0] for t in updates)
    print(
        f"bar {BAR_EXPORT}: the cheapest re-export costs {cheapest / later:.1f} updates ({cheapest / slowest:.1f} of "
        f"the slowest one), the bridge's own {used / later:.1f} ({used / slowest:.1f})"
    )


def steps(case: Case, optimizer_name: str, pairs: int) -> None:
    torch.manual_seed(0)
    model, inputs, labels = case.build().train(), case.inputs(), case.labels()
    optimizer = OPTIMIZERS[optimizer_name](model)

    def step() -> None:
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    inside: list[list[float]] = [[]]
    zero = hold.zero

    def watched(values: torch.Tensor, keep: torch.Tensor) -> None:
        inside[-1].append(timed(lambda: zero(values, keep))[0])

    def held() -> tuple[float, float]:
        with quiet():
            pruner = LevelPruner(HELD)(model)
        try:
            step()  # attaching returns memory to the system, which the next step has to fetch again
            inside.append([])
            return timed(step)
        finally:
            pruner.remove()

    def plain() -> tuple[float, float]:
        step()
        return timed(step)

    hold.zero = watched
    step()
    step()
    plain_times, held_times = [], []
    for pair in range(pairs):  # ABBA, so that a drift hits both alike
        order = [(plain_times, plain), (held_times, held)]
        for times, run in order if pair % 2 == 0 else reversed(order):
            times.append(run())
    hold.zero = zero
    print(f"\na training step with masks held against the plain one: {optimizer_name}, {pairs} alternating pairs")
    print(COLUMNS.format("", "median", "least", "most", "wall", "processor"))
    print(line("plain step, s", plain_times))
    print(line("step with masks held, s", held_times))
    ratios = [[b[i] / a[i] for a, b in zip(plain_times, held_times, strict=True)] for i in (0, 1)]
    text = [f"{(statistics.median(r) - 1) * 100:+.2f} %" for r in ratios]
    print(COLUMNS.format("median of the pairs' ratios", "", "", "", *text))
    middle = [np.quantile(r, [0.25, 0.75]) for r in ratios]
    text = [f"{(low - 1) * 100:+.1f} to {(high - 1) * 100:+.1f}" for low, high in middle]
    print(COLUMNS.format("middle half of them, %", "", "", "", *text))
    spent = [sum(calls) / (whole[0] - sum(calls)) for calls, whole in zip(inside[1:], held_times, strict=True)]
    calls = len(inside[-1])
    print(
        f"of a step, {calls} calls that zero weights and gradients take {statistics.median(spent):.2%} (middle half "
        f"{np.quantile(spent, 0.25):.2%} to {np.quantile(spent, 0.75):.2%}), timed within the step itself"
    )
    print(f"bar {BAR_STEP:.0%}")


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [text.split(":")[1].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--only", choices=list(CASES), help="one of the models")
    parser.add_argument("--part", choices=["update", "step"], help="one of the comparisons")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; 1 unless given")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    rounds, pairs = (1, 3) if chosen.quick else (3, 12)
    state: list[Any] = [f"Python {platform.python_version()}", f"torch {torch.__version__}", f"onnx {onnx.__version__}"]
    state.append(f"numpy {np.__version__}")
    if importlib.util.find_spec("transformers") is not None:
        import transformers

        state.append(f"transformers {transformers.__version__}")
    load = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}, {load}; {', '.join(state)}")
    print(f"torch runs {chosen.threads} thread(s); selecting masks runs up to one per CPU")
    for name, case in CASES.items():
        if chosen.only in (None, name):
            print(f"\n=== {case.title}")
            if chosen.part != "step":
                updates_and_exports(case, rounds)
            if chosen.part != "update":
                for optimizer in OPTIMIZERS:
                    steps(case, optimizer, pairs)


if __name__ == "__main__":
    main()
