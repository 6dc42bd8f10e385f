"""Grouped inputs beside channels at equal measured latency, after the same fine-tuning.

    python models/finetune_grouped.py results.jsonl
    python models/finetune_grouped.py results.jsonl --nets wide-residual --seeds 0 1
    python models/finetune_grouped.py results.jsonl --table

Two nets on animal-mnist, wide enough to gain: a plain and a residual one. First, with random weights, the share of
channels is looked for at which a net takes as long as with grouped inputs, lowered. Then, per net and seed: train; from
the same weights once train on, and once for each pattern and share train on while AGP prunes. Accuracy is that of the
exported files under onnxruntime on the test images after the last epoch; latency is processor time of one thread on one
image, all files of a seed in turns. Training multiplies in bfloat16, the files in float32. What a seed gives is
appended to the file at once, and left out when run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import _nets_torch as framework
import numpy as np
import torch
from _data import animal_mnist, augmented_batches
from finetune import BATCH, PEAK, rate, spread
from onnxprune.converters.torch import LevelPruner
from rich.console import Console
from rich.table import Table

import onnxprune
from onnxprune.runtime.turns import in_turns

NETS = ("wide-plain", "wide-residual")
EPOCHS = (6, 12, 6)
"""Of training; of fine-tuning; and of these, those until AGP is at its end."""

SHARES = (0.625, 0.75)
"""Of the inputs of each convolution that go."""

HALVED = ("grouped:64", 0.75)
"""Two groups for each layer instead of one, and the share at which they take about as long."""

GRID = tuple(n / 16 for n in range(2, 15))
"""Of the channels of each group, to choose from."""


def entry(pattern: str, share: float) -> dict[str, Any]:
    """AGP takes that much. The last layer is left out where it would not gain."""
    return {
        "final_sparsity": share,
        "end_epoch": EPOCHS[2],
        "pattern": pattern,
        "op_types": "default" if pattern == "channel" else ["Conv2d"],
    }


def latencies(files: list[Path], seconds: float = 1.0) -> list[float]:
    """Milliseconds of one thread on one image, in turns."""
    image = np.random.default_rng(0).integers(0, 256, (1, 1, 28, 28)).astype(np.float32)
    return in_turns(files, {"image": image}, 1, seconds)


def match(name: str) -> list[tuple[str, float]]:
    """Patterns and shares to compare: for each share of grouped inputs the share of channels that is as fast.

    All that was timed is printed, with the weights that are left.
    """
    example = torch.zeros(1, 1, 28, 28)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense.onnx"
        LevelPruner([{"sparsity": 0.0}])(framework.make(name, 0).eval()).export(dense, example)
        files = [dense]
        tried = [("dense", 0.0)]
        for pattern, shares in (("grouped", SHARES), ("channel", GRID), (HALVED[0], HALVED[1:])):
            for share in shares:
                files.append(Path(folder) / f"{len(files)}.onnx")
                tried.append((pattern, share))
                chosen = {"op_types": "default"} if pattern == "channel" else {"op_types": ["Conv"]}
                onnxprune.prune(dense, [{"sparsity": share, "pattern": pattern, **chosen}], files[-1])
        times = dict(zip(tried, latencies(files), strict=True))
        sizes = list(map(stored, files))
    for (point, time), size in zip(times.items(), sizes, strict=True):
        print(f"{name}, {point[0]}, {point[1]:.1%} removed: {time:.3f} ms, {size / sizes[0]:.1%} of the weights")
    points: list[tuple[str, float]] = []
    for share in SHARES:
        near = min(GRID, key=lambda other, share=share: abs(times["channel", other] - times["grouped", share]))
        points += [("grouped", share), ("channel", near)]
    return [*points, HALVED]


def stored(file: Path) -> int:
    """Entries of all weights of a file."""
    return sum(int(np.prod(w.shape)) for w in onnxprune.inspect(file).weights)


def run(name: str, seed: int, points: list[tuple[str, float]]) -> list[dict[str, Any]]:
    """One row for the dense net and for each point: accuracy in percent, latency in ms, weights left of the dense."""
    x, y, x_test, y_test = animal_mnist()
    example = torch.from_numpy(x_test[:1].astype("float32"))
    data = [({"image": x_test.astype("float32")}, y_test)]

    def train(net: Any, count: int, peak: float, rng: np.random.Generator, pruner: Any = None) -> None:
        net.train()
        steps, step = count * (len(x) // BATCH), 0
        fit = framework.trainer(net)
        for epoch in range(1, count + 1):
            for images, labels in augmented_batches(x, y, rng, BATCH):
                with torch.autocast("cpu", torch.bfloat16):
                    fit(images, labels, rate(step, steps, peak))
                step += 1
            if pruner is not None:
                pruner.update_epoch(epoch)
        net.eval()

    net = framework.make(name, seed)
    train(net, EPOCHS[0], PEAK[0], np.random.default_rng(seed))
    start = framework.weights(net)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / "dense.onnx"]
        train(net, EPOCHS[1], PEAK[0], np.random.default_rng(seed + 1000))
        LevelPruner([{"sparsity": 0.0}])(net).export(files[0], example)
        for pattern, share in points:
            net = framework.make(name, seed).eval()
            framework.load(net, start)
            pruner = framework.AGPPruner([entry(pattern, share)])(net, example)
            train(net, EPOCHS[1], PEAK[0], np.random.default_rng(seed + 1000), pruner)
            files.append(Path(folder) / f"{len(files)}.onnx")
            pruner.export(files[-1])
        rows = []
        sizes = list(map(stored, files))
        described = [("dense", 0.0), *points]
        for (pattern, share), file, ms, size in zip(described, files, latencies(files), sizes, strict=True):
            score = onnxprune.evaluate(file, data, threads=1, progress=False).score
            assert score is not None
            row = {"pattern": pattern, "share": share, "accuracy": 100 * score, "ms": ms, "left": size / sizes[0]}
            rows.append({"net": name, "seed": seed, **row})
        return rows


def show(rows: list[dict[str, Any]]) -> None:
    """The table: mean over the seeds, and the distance to the farthest."""
    seeds = sorted({row["seed"] for row in rows})
    table = Table(title=f"animal-mnist, fine-tuned in torch {framework.version}, seeds {seeds}")
    for column in ("net", "pattern", "share", "weights left", "ms", "times faster", "accuracy %", "to dense"):
        table.add_column(column, justify="left" if column in {"net", "pattern"} else "right")
    for name in NETS:
        own = [row for row in rows if row["net"] == name]
        dense = {row["seed"]: row for row in own if row["pattern"] == "dense"}
        for pattern, share in dict.fromkeys((row["pattern"], row["share"]) for row in own):
            point = [row for row in own if (row["pattern"], row["share"]) == (pattern, share)]
            score, ms, left = (np.array([row[key] for row in point]) for key in ("accuracy", "ms", "left"))
            faster = np.array([dense[row["seed"]]["ms"] / row["ms"] for row in point])
            lost = np.array([row["accuracy"] - dense[row["seed"]]["accuracy"] for row in point])
            cells = [name, pattern, f"{share:.1%}", f"{left.mean():.1%}", f"{ms.mean():.3f}", f"{faster.mean():.2f}"]
            cells += [spread(score), f"{lost.mean():+.2f} ± {np.abs(lost - lost.mean()).max():.2f}"]
            table.add_row(*cells)
            print("| " + " | ".join([*cells, f"{len(point)} seeds"]) + " |")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path, help="file of JSON lines, which is added to")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--match", action="store_true", help="only look for shares of equal latency")
    parser.add_argument("--table", action="store_true", help="only show what is there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")

    def known(name: str) -> list[dict[str, Any]]:
        lines = options.results.read_text().splitlines() if options.results.exists() else []
        return [row for row in map(json.loads, lines) if row["net"] == name]

    def add(rows: list[dict[str, Any]]) -> None:
        with options.results.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(*rows, sep="\n", flush=True)

    for name in () if options.table else options.nets:
        if not any("points" in row for row in known(name)):
            add([{"net": name, "points": match(name)}])
    for seed in () if options.table or options.match else options.seeds:
        for name in options.nets:
            if not any(row.get("seed") == seed for row in known(name)):
                points = next(row["points"] for row in known(name) if "points" in row)
                add(run(name, seed, [(pattern, share) for pattern, share in points]))
    show([row for name in NETS for row in known(name) if "seed" in row])


if __name__ == "__main__":
    main()
