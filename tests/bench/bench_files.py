"""What pruning costs, beside copying and beside what people use instead: `python bench_files.py`.

What stands in one row of the table of ratios was measured side by side, in turns; of each the least time counts, since
other work on the machine only ever adds to it. Wall-clock time is what counts; processor time stands beside it. Files
are made in --folder, removed afterwards, and synced before each run, so that nobody pays for the writing of others.
`prune` is a whole process, fsync included, with --no-benchmark.

Peers that live in other interpreters are named by `--peer-python nni=/path/python` (nni, tfmot, onnxsim); torch is used
where this one has it. `--only` takes some of the tables, `--quick` smaller files and fewer rounds, `--parameters` some
sizes of models. `--into FILE` puts what was measured into a JSON file, from which later runs with the same option print
and plot, too. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from _files import BARS, COLUMNS, GB, LOADED, ROWS, Cost, bar, clear, least, row, run, table, timed, write_model
from _sizes import CURVES, MEMORY, conclude, plot, sizes
from bench_select import SIDE, SPARSITY, extra_memory, processor, prune

from onnxprune.algorithms.select import side_by_side

HERE = Path(__file__).parent


def one_matrix(peers: dict[str, str], rounds: int) -> None:
    """Bar 1."""
    matrix = np.random.default_rng(0).standard_normal((SIDE, SIDE), dtype=np.float32)
    out, count = np.empty_like(matrix), int(SPARSITY * matrix.size)
    works: dict[str, Callable[[], object]] = {
        "one read-and-write pass": lambda: np.add(matrix, 1, out=out),
        "onnxprune, one thread": lambda: prune([matrix], [out], count, 1),
    }
    times: dict[str, list[Cost]] = {name: [] for name in works}
    torch_times = []
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(timed(work))
    print(f"\n{SIDE} x {SIDE} float32 to {SPARSITY:.0%}, select and apply, in memory")
    print(COLUMNS.format("", "s", "cpu s", "x ours", ""))
    found = {name: least(costs) for name, costs in times.items()}
    ours = found["onnxprune, one thread"]
    for name, cost in found.items():
        row(name, cost, f"{cost.wall / ours.wall:.2f}")
    if importlib.util.find_spec("torch"):
        from bench_select import torch_l1

        work = torch_l1(matrix)
        torch_times = [timed(work) for _ in range(2)]
        row("torch.nn.utils.prune.l1_unstructured", min(torch_times), f"{min(torch_times).wall / ours.wall:.1f}")
    passes = ours.wall / found["one read-and-write pass"].wall
    bar(1, "one matrix of 16.8 M, one read-and-write pass", passes, 6)
    if torch_times:
        bar(1, "torch l1_unstructured, the same matrix", min(torch_times).wall / ours.wall, 50, least=True)
    for name, python in peers.items():
        if name in ("nni", "tfmot") and (told := peer(python, name, SIDE)) is not None:
            row(f"{name}, of its own interpreter", Cost(told, 0.0, 0.0), f"{told / ours.wall:.1f}")
            bar(1, f"{name}, the same matrix", told / ours.wall, 50, least=True)


def peer(python: str, name: str, *arguments: object) -> float | None:
    """Seconds that another tool takes; None where it fails, which is said."""
    command = [python, HERE / "_peers.py", name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name} fails: {(done.stderr.strip().splitlines() or [''])[-1][:100]}")
        return None
    return float(done.stdout.split()[-1])


def many_matrices(rounds: int) -> None:
    """Bar 2."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((1024, 1024 * n), dtype=np.float32) for n in (1, 2, 4) * 33]
    total = sum(array.size for array in arrays)
    count = int(SPARSITY * total)
    outs = [np.empty_like(array) for array in arrays]
    works: dict[str, Callable[[], object]] = {
        "each on its own": lambda: side_by_side(
            lambda a, o: prune([a], [o], int(SPARSITY * a.size), 1), arrays, outs, size=total
        ),
        "all together": lambda: prune(arrays, outs, count, 2),
    }
    times: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(timed(work))
    print(f"\n{total / 1e6:.0f} M parameters in {len(arrays)} matrices, select and apply, two threads")
    print(COLUMNS.format("", "s", "cpu s", "ns/entry", ""))
    for name, costs in times.items():
        row(name, min(costs), f"{min(costs).wall / total * 1e9:.2f}")
    local, together = (min(costs).wall for costs in times.values())
    memory = extra_memory(arrays, count, 2)
    bar(2, f"{total / 1e6:.0f} M in {len(arrays)} matrices, all together: each on its own", together / local, 1.2)
    bar(2, "memory beside the masks", memory, 64, unit="MB")
    if importlib.util.find_spec("torch"):
        import torch
        from torch.nn.utils import prune as torch_prune

        torch.set_num_threads(2)

        some = arrays[::4]  # the whole takes 12 GB
        share = sum(array.size for array in some)

        def layers() -> list[tuple[torch.nn.Module, str]]:
            made = [torch.nn.Module() for _ in some]
            for layer, array in zip(made, some, strict=True):
                layer.weight = torch.nn.Parameter(torch.from_numpy(array))
            return [(layer, "weight") for layer in made]

        l1 = torch_prune.L1Unstructured
        theirs: dict[str, Callable[[list[tuple[torch.nn.Module, str]]], object]] = {
            "l1_unstructured": lambda made: [torch_prune.l1_unstructured(*layer, SPARSITY) for layer in made],
            "global_unstructured": lambda made: torch_prune.global_unstructured(made, l1, amount=SPARSITY),
        }
        for (name, work), ours in zip(theirs.items(), (local, together), strict=True):
            made = layers()
            cost = timed(lambda work=work, made=made: work(made))  # type: ignore[misc]
            each = cost.wall / share
            row(f"torch {name}, {share / 1e6:.0f} M of them", cost, f"{each * 1e9:.2f}")
            bar(2, f"torch {name}, time per parameter", each / (ours / total), 50, least=True)


def files(folder: Path, gb: float, rounds: int) -> None:
    """Bar 3."""
    matrices = max(1, round(gb * GB / (ROWS * ROWS * 4)))
    external, single = folder / "keep-external.onnx", folder / "keep-single.onnx"
    size = write_model(external, matrices, True)
    write_model(single, matrices, False)
    command = [sys.executable, "-m", "onnxprune", "prune"]
    options = ["--sparsity", str(SPARSITY), "--no-benchmark", "--json"]
    works: dict[str, Sequence[object]] = {
        "cp of the data": ["cp", f"{external}.data", folder / "copy"],
        "cp of the data, then sync": ["sh", "-c", f"cp {external}.data {folder}/copy && sync {folder}/copy"],
        "onnxprune prune, external data": [*command, external, "-o", folder / "out.onnx", *options],
        "onnxprune prune, a single file": [*command, single, "-o", folder / "out.onnx", *options],
        "load, np.partition, save; external data": [sys.executable, "-c", LOADED, external, folder / "out.onnx", "e"],
    }
    found = processes(folder, size, works, rounds, "x cp")
    cp, synced, ours, alone, loaded = found.values()
    for name, cost, times_ in (("external data", ours, 4), ("a single file", alone, 6)):
        what = f"{size / GB:.2g} GB, {name}, less 0.6 s: cp ({cp.wall:.2f} s)"
        bar(3, what, (cost.wall - 0.6) / cp.wall, times_)
        print(f"  less 0.6 s, beside cp and sync: {(cost.wall - 0.6) / synced.wall:.2f}")
    bar(3, f"{size / GB:.2g} GB, load, np.partition, save: ours", loaded.wall / ours.wall, 4, least=True)


def processes(folder: Path, size: int, works: dict[str, Sequence[object]], rounds: int, times: str) -> dict[str, Cost]:
    """The least of some rounds of each process, printed beside the first one."""
    costs: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            clear(folder, "keep-")
            costs[name].append(run(*work))
    clear(folder, "nothing")
    print(f"\na model of {size / GB:.2f} GB, whole processes")
    print(COLUMNS.format("", "s", "cpu s", "MB", times))
    found = {name: least(of) for name, of in costs.items()}
    first = next(iter(found.values()))
    for name, cost in found.items():
        row(name, cost, f"{cost.memory / 1e6:.0f}", f"{cost.wall / first.wall:.1f}")
    return found


def startup(rounds: int) -> None:
    """Bar 5."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(HERE.parents[1] / "models" / "lenet-300-100.onnx", folder / "model.onnx")
        proto = onnx.load(folder / "model.onnx")
        proto.doc_string = "." * max(0, 2_000_000 - proto.ByteSize())
        onnx.save(proto, folder / "model.onnx")
        prune_ = ["prune", folder / "model.onnx", "-o", folder / "out.onnx", "--sparsity", "0.8", "--no-benchmark"]
        works: dict[str, tuple[Sequence[object], float]] = {
            "python -c pass": ([sys.executable, "-c", "pass"], 0),
            "import onnxprune": ([sys.executable, "-c", "import onnxprune"], 0.3),
            "onnxprune --help": ([sys.executable, "-m", "onnxprune", "--help"], 0.5),
            "onnxprune prune, 2 MB": ([sys.executable, "-m", "onnxprune", *prune_], 1.2),
        }
        times: dict[str, list[Cost]] = {work: [] for work in works}
        for _ in range(rounds):
            for work, (command, _) in works.items():
                times[work].append(run(*command))
    print("\nto begin with: whole processes")
    print(COLUMNS.format("", "s", "cpu s", "MB", ""))
    for work, (_, limit) in works.items():
        cost = least(times[work])
        row(work, cost, f"{cost.memory / 1e6:.0f}")
        if limit:
            bar(5, work, cost.wall, limit, unit="s")


def simplifier(folder: Path, peers: dict[str, str], rounds: int) -> None:
    """Of bar 3: another tool for files, where there is one."""
    if "onnxsim" not in peers:
        return
    single = folder / "keep-single.onnx"
    size = write_model(single, 15, False)
    command = [sys.executable, "-m", "onnxprune", "prune", single, "-o", folder / "out.onnx"]
    works: dict[str, Sequence[object]] = {
        "onnxprune prune, a single file": [*command, "--sparsity", str(SPARSITY), "--no-benchmark", "--json"],
        "onnxsim, a single file": [peers["onnxsim"], HERE / "_peers.py", "onnxsim", single, folder / "out.onnx"],
    }
    ours, theirs = processes(folder, size, works, rounds, "x ours").values()
    bar(3, f"{size / GB:.2g} GB, onnxsim's magnitude pruning: ours", theirs.wall / ours.wall, 4, least=True)


def bridges(rounds: int) -> None:
    """Bar 6."""
    import torch
    from bench_bridges import CASES, EXPORTS, SCHEDULE, quiet
    from onnxprune.converters.torch import AGPPruner
    from torch.nn.utils import prune as torch_prune

    case = CASES["resnet50"]
    torch.manual_seed(0)
    model, inputs = case.build().eval(), case.inputs()[:1]
    with quiet():
        pruner = AGPPruner(SCHEDULE)(model)
    updates = []
    for epoch in range(1, 11):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=1e-4)
        updates.append(timed(lambda epoch=epoch: pruner.update_epoch(epoch)))  # type: ignore[misc]
    print("\nResNet-50 in torch")
    print(COLUMNS.format("", "s", "cpu s", "x ours", ""))
    ours = least(updates)
    row("update_epoch", ours)
    exported = {}
    for name, export in EXPORTS.items():
        with quiet():
            try:
                exported[name] = least([timed(lambda export=export: export(model, inputs)) for _ in range(rounds)])  # type: ignore[misc]
            except Exception:
                continue
        row(f"export: {name}", exported[name], f"{exported[name].wall / ours.wall:.1f}")
    copy = case.build()
    layers = [(m, "weight") for m in copy.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]

    def globally() -> None:
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=SPARSITY)
        for layer in layers:
            torch_prune.remove(*layer)

    theirs = least([timed(globally) for _ in range(rounds)])
    row("torch global_unstructured", theirs, f"{theirs.wall / ours.wall:.1f}")
    bar(6, "torch global_unstructured: update_epoch, ResNet-50", theirs.wall / ours.wall, 50, least=True)
    cheapest = min(cost.wall for cost in exported.values())
    bar(6, "the cheapest re-export: update_epoch, ResNet-50", cheapest / ours.wall, 20, least=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tables = ["matrix", "matrices", "files", "start", "bridges", "peers", "sizes"]
    parser.add_argument("--only", action="append", choices=tables)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the files are made; the system's temporary folder")
    parser.add_argument("--parameters", type=float, nargs="+", default=[1e7, 6e7, 2.5e8, 1e9, 3e9])
    parser.add_argument("--models", type=Path, help="where models of these sizes are made, if need be, and kept")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--into", type=Path, help="a JSON file of what was measured, here and before")
    parser.add_argument("--plot", type=Path, help="an SVG file to write; bench_files.svg beside this script")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PYTHON")
    options = parser.parse_args()
    chosen = options.only or tables
    peers = dict(text.split("=", 1) for text in options.peer_python)
    rounds = 2 if options.quick else options.rounds
    before: dict[str, Any] = {"machine": [], "bars": {}, "curves": {}, "memory": []}
    if options.into is not None and options.into.exists():
        before = json.loads(options.into.read_text())
        CURVES.update({name: [tuple(point) for point in points] for name, points in before["curves"].items()})
        MEMORY.extend(before["memory"])
    print(machine := versions(peers))

    def save() -> None:
        if options.into is not None:
            told = {"machine": [*before["machine"], machine], "bars": {**before["bars"], **BARS}}
            options.into.write_text(json.dumps({**told, "curves": CURVES, "memory": MEMORY}, indent=1))

    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        works: dict[str, Callable[[], object]] = {
            "matrix": lambda: one_matrix(peers, 3 * rounds),
            "matrices": lambda: many_matrices(rounds),
            "files": lambda: files(Path(name), 0.2 if options.quick else 1.0, rounds),
            "start": lambda: startup(2 * rounds),
            "bridges": lambda: bridges(min(rounds, 3)),
            "peers": lambda: simplifier(Path(name), peers, min(rounds, 3)),
            "sizes": lambda: sizes(
                Path(name), [1e7, 3e7] if options.quick else options.parameters, rounds, save, options.models
            ),
        }
        for part, work in works.items():
            if part in chosen and (part != "bridges" or importlib.util.find_spec("torch")):
                BARS[part] = []
                work()
                save()
    print(f"load after: {os.getloadavg()[0]:.1f}")
    if CURVES:
        BARS["sizes"] = []
        conclude()
        save()
        plot(CURVES, options.plot or HERE / "bench_files.svg")
    BARS.update({part: rows for part, rows in before["bars"].items() if part not in BARS})
    table()


def versions(peers: dict[str, str]) -> str:
    """The machine, and what was measured."""
    found = [f"Python {platform.python_version()}"]
    for name in ("numpy", "onnx", "onnx-ir", "onnxruntime", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    for name, python in peers.items():
        code = f"from importlib.metadata import version; print(version('{PACKAGES.get(name, name)}'))"
        told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
        found.append(f"{name} {told or '(not found)'}")
    return f"{processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}; {', '.join(found)}"


PACKAGES = {"tfmot": "tensorflow-model-optimization"}

if __name__ == "__main__":
    main()
