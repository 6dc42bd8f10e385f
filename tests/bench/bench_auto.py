"""The fastest model within a point of accuracy: `python bench_auto.py [NAME ...] [--minutes 10]`.

Trained models of other packages (`_data.py`) are searched by `onnxprune.autoprune(target="latency", max_drop=0.01)` on
their labelled data, 30 % of which are held back. Printed is, of each way to prune, the fastest model that was within
the point on the data of the search, and what was kept: what it loses on the data held back, and its latency in
onnxruntime beside the dense model's, measured in turns. `--reports FOLDER` keeps the JSON of each search.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from _data import TASKS

import onnxprune

MAX_DROP = 0.01


def by_recipe(found: onnxprune.Search) -> str:
    """Of each recipe that was tried the fastest model within the drop: times faster, and points lost."""
    told = []
    for recipe in dict.fromkeys(candidate.recipe for candidate in found.candidates):
        tried = [c for c in found.candidates if c.recipe == recipe]
        within = [c for c in tried if c.value is not None and c.loss is not None and c.loss <= MAX_DROP]
        best = min(within, key=lambda c: c.value or 1.0, default=None)
        text = f"none of {len(tried)} within" if best is None else f"{1 / (best.value or 1.0):.2f} times"
        lost = "" if best is None or best.loss is None else f", {100 * best.loss:.2f} points, at {best.strength:.3g}"
        told.append(f"  {recipe}: {text}{lost}")
    return "\n".join(told)


def fastest(name: str, minutes: float, threads: int, reports: Path | None) -> str:
    with tempfile.TemporaryDirectory() as folder:
        task = TASKS[name](Path(folder))
        found = onnxprune.autoprune(
            task.model, task.test, Path(folder) / "fast.onnx", max_drop=MAX_DROP, target="latency",
            time_limit=60 * minutes, metric=task.metric, jobs=threads, threads=threads,
        )  # fmt: skip
        print(name, by_recipe(found), sep="\n", flush=True)
        if reports is not None:
            reports.mkdir(parents=True, exist_ok=True)
            (reports / f"{name.split()[0]}.json").write_text(json.dumps(found.to_dict(), default=str))
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
    parser.add_argument("--reports", type=Path, help="a folder for the JSON of each search")
    given = parser.parse_args()
    for name in [n for n in TASKS if not given.names or any(wanted in n for wanted in given.names)]:
        print(f"{name} | {fastest(name, given.minutes, given.threads, given.reports)}", flush=True)


if __name__ == "__main__":
    main()
