"""What pruning a file costs for each parameter, and in memory, whatever the size of the model."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from _files import COLUMNS, GB, LOADED, ROWS, Cost, bar, clear, least, row, run, timed, write_model
from bench_select import SPARSITY

CHILD = """
import json, os, sys, time
import onnxprune
onnxprune.prune(sys.argv[1], [{"sparsity": 0.5}])
config = [{"sparsity": 0.8, "allocation": sys.argv[4]}]
found = []
for _ in range(2):
    wall, cpu = time.perf_counter(), time.process_time()
    result = onnxprune.prune(sys.argv[2], config, sys.argv[3])
    found.append((time.perf_counter() - wall, time.process_time() - cpu))
    for name in os.listdir(os.path.dirname(sys.argv[3])):
        if name.startswith("out"):
            os.unlink(os.path.join(os.path.dirname(sys.argv[3]), name))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([*min(found), int(peak.split()[1]) * 1024]))
"""

MEMORY: list[float] = []
CURVES: dict[str, list[tuple[int, float]]] = {}
"""Of the plot: what is measured -> parameters, and ns for each."""

OURS = "onnxprune, each weight"
SYNCED = "cp, then sync"
LINES = {OURS: "uniform", "onnxprune, global": "global"}


MANY = 5e8
"""From so many parameters on, one round is measured, and nothing that an earlier run has measured."""


def sizes(
    folder: Path, parameters: Sequence[float], rounds: int, save: Callable[[], None], models: Path | None = None
) -> None:
    """Bars 4 and 7."""
    small = folder / "keep-small.onnx"
    write_model(small, 1, True)
    print("\none process each: seconds without interpreter and imports; memory of all of it")
    print(COLUMNS.format("parameters", "s", "cpu s", "ns each", "MB"))

    def found(name: str, count: int, cost: Cost) -> None:
        each = cost.wall / count * 1e9
        points = dict(CURVES.get(name, []))
        points[count] = min(each, points.get(count, each))
        CURVES[name] = sorted(points.items())
        MEMORY.extend([cost.memory / 1e6] if name in LINES else [])
        row(f"{count / 1e6:.0f} M, {name}", cost, f"{each:.2f}", f"{cost.memory / 1e6:.0f}" * (name in LINES))
        save()

    for wanted in parameters:
        matrices = math.ceil(wanted / ROWS**2)
        path = (models or folder) / f"keep-{matrices}.onnx"
        if not path.exists():
            write_model(path, matrices, True)
        count = matrices * ROWS**2
        copy, sync = f"cp {path}.data {folder}/copy", f"sync {folder}/copy"

        def pruned(allocation: str, path: Path = path) -> Cost:
            command = [sys.executable, "-c", CHILD, small, path, folder / "out.onnx", allocation]
            told = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout
            return Cost(*json.loads(told))

        works: dict[str, Callable[[], Cost]] = {
            "cp": partial(twice, copy, folder / "copy"),
            SYNCED: partial(twice, f"{copy} && {sync}", folder / "copy"),
            **{name: partial(pruned, kind) for name, kind in LINES.items()},
        }
        if wanted >= MANY:
            works = {name: work for name, work in works.items() if count not in dict(CURVES.get(name, []))}
        costs: dict[str, list[Cost]] = {}
        for _ in range(3 * rounds if wanted < 1e8 else rounds if wanted < MANY else 1):
            for name, work in works.items():
                clear(folder, "keep-")
                costs.setdefault(name, []).append(work())
                if wanted >= MANY:
                    found(name, count, costs[name][-1])
        for name, of in costs.items() if wanted < MANY else ():
            found(name, count, least(of))
        if wanted <= 3e8:
            clear(folder, "keep-")
            found("load, np.partition, save", count, run(sys.executable, "-c", LOADED, path, folder / "out.onnx", "e"))
        if wanted <= 1e8 and importlib.util.find_spec("torch"):
            found("torch l1_unstructured, in memory", count, Cost(torch_each(matrices), 0.0, 0.0))
        clear(folder, "keep-small")
    clear(folder, "nothing")


def twice(command: str, target: Path) -> Cost:
    """The cheaper of two runs, as of ours: a virtual machine has to ask for memory, which may take seconds."""
    costs = []
    for _ in range(2):
        costs.append(run("sh", "-c", command))
        target.unlink()
    return least(costs)


def conclude() -> None:
    """Bars 4 and 7, of all sizes measured."""
    sizes_ = [count for count, _ in CURVES[OURS]]
    bar(4, f"peak memory, {sizes_[0] * 4 / GB:.2g} to {sizes_[-1] * 4 / GB:.2g} GB", max(MEMORY), 400, unit="MB")
    for name in LINES:
        each = [ns for _, ns in CURVES[name]]
        what = f"{name}, {sizes_[0] / 1e6:.0f} M to {sizes_[-1] / 1e9:.2g} G: most per parameter / least"
        bar(7, what, max(each) / min(each), 1.3)
        beside = [ns / copied for ns, copied in zip(each, [ns for _, ns in CURVES[SYNCED]], strict=True)]
        print(f"  beside {SYNCED}: " + ", ".join(f"{times:.2f}" for times in beside))
    copied = [ns for _, ns in CURVES[SYNCED]]
    print(f"  {SYNCED}, by itself: most per parameter / least {max(copied) / min(copied):.2f} x")


def torch_each(matrices: int) -> float:
    import torch
    from torch.nn.utils import prune as torch_prune

    layer = torch.nn.Linear(ROWS, ROWS, bias=False)
    return min(timed(lambda: torch_prune.l1_unstructured(layer, "weight", SPARSITY)).wall for _ in range(2)) * matrices


def plot(lines: dict[str, list[tuple[int, float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "onnxprune"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, points in lines.items():
        style = "-" if name in LINES else "--"
        (line,) = axes.loglog(*zip(*points, strict=True), style, marker="o", markersize=3.5)
        axes.annotate(name, points[-1], (6, 0), textcoords="offset points", va="center", color=line.get_color(), size=7)
    axes.set_xlabel("parameters (float32)")
    axes.set_ylabel("ns per parameter")
    axes.set_xlim(right=max(count for points in lines.values() for count, _ in points) * 12)
    axes.grid(True, which="major", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    print(f"plotted: {path.name}")
