"""The fastest model within a point of accuracy: `python bench_auto.py [NAME ...] [--minutes 10]`.

Trained models of other packages (`_data.py`) are searched by `onnxprune.autoprune(target="latency", max_drop=0.01)` on
their labelled data, 30 % of which are held back. Printed is what was kept: what it loses on the data held back, and its
latency in onnxruntime beside the dense model's, measured in turns.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _data import TASKS

import onnxprune

MAX_DROP = 0.01


def fastest(name: str, minutes: float, threads: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        task = TASKS[name](Path(folder))
        found = onnxprune.autoprune(
            task.model, task.test, Path(folder) / "fast.onnx", max_drop=MAX_DROP, target="latency",
            time_limit=60 * minutes, metric=task.metric, jobs=threads, threads=threads,
        )  # fmt: skip
        if found.best is None or found.evaluation is None or found.benchmark is None:
            return f"nothing of {len(found.candidates)} models kept"
        best, timed, scored = found.best, found.benchmark, found.evaluation
        assert best.held_back is not None
        assert best.held_back <= MAX_DROP + 1e-9
        dense, now = timed["baseline"]["median"], timed["latency"]["median"]
        return (
            f"{best.recipe} at {best.strength:.4g} | held back {scored['baseline_score']:.4f} -> {scored['score']:.4f}"
            f" | {dense:.4g} -> {now:.4g} ms | {timed['speedup']:.2f} times | {len(found.candidates)} models tried"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help="of models; all unless given")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    for name in [n for n in TASKS if not given.names or any(wanted in n for wanted in given.names)]:
        print(f"{name} | {fastest(name, given.minutes, given.threads)}", flush=True)


if __name__ == "__main__":
    main()
