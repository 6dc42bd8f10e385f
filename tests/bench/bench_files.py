"""What pruning costs, beside copying and beside what people use instead: `python bench_files.py`.

Every table is measured in one run, in turns, and shows medians. Wall-clock time is what counts; processor time stands
beside it because other work on the machine stretches the one and hardly the other. Files are made in --folder, removed
afterwards, and synced before each run, so that nobody pays for the writing of others. `prune` is a whole process,
fsync included, with --no-benchmark.

Peers that live in other interpreters are named by `--peer-python nni=/path/python`; torch is used where this one has
it. `--only` takes some of the tables, `--quick` smaller files and fewer rounds, `--largest` the largest model's GB.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from bench_select import SIDE, SPARSITY, extra_memory, processor, prune
from onnx import TensorProto, helper

HERE = Path(__file__).parent
ROWS = 2048
"""Of the matrices that the models are made of, 4.2 M entries each."""
GB = 1e9
COLUMNS = "{:52}{:>10}{:>10}{:>10}{:>10}"

CHILD = """
import json, sys, time
import onnxprune
onnxprune.prune(sys.argv[1], [{"sparsity": 0.5}])
config = [{"sparsity": 0.8, "allocation": sys.argv[4]}]
wall, cpu = time.perf_counter(), time.process_time()
onnxprune.prune(sys.argv[2], config, sys.argv[3])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([wall, cpu, int(peak.split()[1]) * 1024]))
"""

LOADED = """
import sys
import numpy as np, onnx
from onnx import numpy_helper
model = onnx.load(sys.argv[1])
for tensor in model.graph.initializer:
    weight = numpy_helper.to_array(tensor)
    size = np.abs(weight)
    count = int(0.8 * weight.size)
    kept = size > np.partition(size, count - 1, axis=None)[count - 1]
    tensor.raw_data = (weight * kept).tobytes()
onnx.save(model, sys.argv[2], save_as_external_data=len(sys.argv) > 3)
"""


class Cost(NamedTuple):
    """Seconds of wall-clock and processor time, and bytes of memory at most."""

    wall: float
    cpu: float
    memory: float


def run(*command: object) -> Cost:
    """A whole process."""
    start = time.perf_counter()
    child = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = status
    if status:
        raise SystemExit(f"{command} failed")
    return Cost(time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def timed(work: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, 0.0)


def median(costs: Sequence[Cost]) -> Cost:
    return Cost(*(statistics.median(part) for part in zip(*costs, strict=True)))


def row(name: str, cost: Cost, *more: str) -> None:
    print(COLUMNS.format(name, f"{cost.wall:.3f}", f"{cost.cpu:.3f}", *more, *[""] * (2 - len(more))), flush=True)


def bar(number: int, text: str, met: bool) -> None:
    print(f"bar {number}: {text}: {'met' if met else 'NOT MET'}", flush=True)


def write_model(path: Path, matrices: int, external: bool) -> int:
    """A chain of MatMuls with random weights, made by another process: the memory of this one counts for its children.

    Returns:
        The bytes of the weights.
    """
    subprocess.run([sys.executable, __file__, "--make", path, str(matrices), str(int(external))], check=True)
    return matrices * ROWS**2 * 4


def make_model(path: Path, matrices: int, external: bool) -> None:
    base = np.random.default_rng(0).standard_normal((ROWS, ROWS), dtype=np.float32)
    names = ["x", *(f"y{i}" for i in range(matrices))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(matrices)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", ROWS]) for name in ("x", names[-1])]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data = path.with_name(f"{path.name}.data")
    with open(data, "wb") if external else open(os.devnull, "wb") as file:
        for i in range(matrices):
            tensor = graph_tensor(model, f"w{i}")
            content = np.roll(base, i * 977)
            if external:
                tensor.data_location = TensorProto.EXTERNAL
                for key, value in (("location", data.name), ("offset", i * base.nbytes), ("length", base.nbytes)):
                    tensor.external_data.add(key=key, value=str(value))
                file.write(content)
            else:
                tensor.raw_data = content.tobytes()
    path.write_bytes(model.SerializeToString())
    os.sync()


def graph_tensor(model: onnx.ModelProto, name: str) -> TensorProto:
    return model.graph.initializer.add(name=name, data_type=TensorProto.FLOAT, dims=[ROWS, ROWS])


def clear(folder: Path, keep: str) -> None:
    for path in folder.iterdir():
        if not path.name.startswith(keep):
            path.unlink()
    os.sync()


# ------------------------------------------------------------------ the tables


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
    least = {name: min(costs) for name, costs in times.items()}
    ours = least["onnxprune, one thread"]
    for name in works:
        row(name, least[name], f"{least[name].wall / ours.wall:.2f}")
    if importlib.util.find_spec("torch"):
        from bench_select import torch_l1

        work = torch_l1(matrix)
        torch_times = [timed(work) for _ in range(2)]
        row("torch.nn.utils.prune.l1_unstructured", min(torch_times), f"{min(torch_times).wall / ours.wall:.1f}")
    for name, python in peers.items():
        if name in ("nni", "tfmot"):
            told = peer(python, name, SIDE)
            print(COLUMNS.format(name, *told, ""))
    passes = ours.wall / least["one read-and-write pass"].wall
    bar(1, f"{passes:.1f} read-and-write passes (at most 6)", passes <= 6)
    if torch_times:
        ratio = min(torch_times).wall / ours.wall
        bar(1, f"{ratio:.0f} times faster than torch l1_unstructured (at least 50)", ratio >= 50)


def peer(python: str, name: str, side: int) -> tuple[str, str, str]:
    done = subprocess.run([python, HERE / "_peers.py", name, str(side)], capture_output=True, text=True, check=False)
    if done.returncode:
        return "fails", "", done.stderr.strip().splitlines()[-1][:60] if done.stderr.strip() else ""
    return f"{float(done.stdout.split()[-1]):.3f}", "", ""


def many_matrices(peers: dict[str, str], rounds: int) -> None:
    """Bar 2."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal((1024, 1024 * n), dtype=np.float32) for n in (1, 2, 4) * 33]
    total = sum(array.size for array in arrays)
    count = int(SPARSITY * total)
    outs = [np.empty_like(array) for array in arrays]
    works: dict[str, Callable[[], object]] = {
        "each on its own": lambda: [
            prune([a], [o], int(SPARSITY * a.size), 2) for a, o in zip(arrays, outs, strict=True)
        ],
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
    bar(2, f"global costs {together / local:.2f} of local (0.8 to 1.2)", 0.8 <= together / local <= 1.2)
    bar(2, f"{memory:.0f} MB beside the masks (under 64)", memory < 64)
    if importlib.util.find_spec("torch"):
        import torch
        from torch.nn.utils import prune as torch_prune

        torch.set_num_threads(2)

        def layers() -> list[tuple[torch.nn.Module, str]]:
            made = [torch.nn.Module() for _ in arrays]
            for layer, array in zip(made, arrays, strict=True):
                layer.weight = torch.nn.Parameter(torch.from_numpy(array))
            return [(layer, "weight") for layer in made]

        some = layers()
        alone = timed(lambda: [torch_prune.l1_unstructured(*layer, SPARSITY) for layer in some])
        row("torch l1_unstructured, each on its own", alone, f"{alone.wall / total * 1e9:.2f}")
        bar(2, f"{alone.wall / local:.0f} times faster than torch locally (at least 50)", alone.wall / local >= 50)
        del some


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
        "onnxprune prune, external data": [*command, external, "-o", folder / "out.onnx", *options],
        "onnxprune prune, a single file": [*command, single, "-o", folder / "out.onnx", *options],
        "load, np.partition, save; external data": [sys.executable, "-c", LOADED, external, folder / "out.onnx", "e"],
    }
    times: dict[str, list[Cost]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            clear(folder, "keep-")
            times[name].append(run(*work))
    clear(folder, "nothing")
    print(f"\na model of {size / GB:.2f} GB, whole processes")
    print(COLUMNS.format("", "s", "cpu s", "MB", "x cp"))
    found = {name: median(costs) for name, costs in times.items()}
    cp, ours, alone, loaded = found.values()
    for name, cost in found.items():
        row(name, cost, f"{cost.memory / 1e6:.0f}", f"{cost.wall / cp.wall:.1f}")
    for name, cost, times_ in (("external data", ours, 4), ("a single file", alone, 6)):
        limit = times_ * cp.wall + 0.6
        bar(3, f"{name}: {cost.wall:.2f} s, {times_} x cp + 0.6 s is {limit:.2f} s", cost.wall <= limit)
    bar(
        3,
        f"{loaded.wall / ours.wall:.1f} times faster than load-partition-save (at least 4)",
        loaded.wall >= 4 * ours.wall,
    )


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
        cost = median(times[work])
        row(work, cost, f"{cost.memory / 1e6:.0f}")
        if limit:
            bar(5, f"{work}: {cost.wall:.2f} s (under {limit})", cost.wall < limit)


def sizes(folder: Path, parameters: Sequence[float], rounds: int, picture: Path | None) -> None:
    """Bars 4 and 7."""
    small = folder / "keep-small.onnx"
    write_model(small, 1, True)
    print("\none process each: seconds without interpreter and imports; memory of all of it")
    print(COLUMNS.format("parameters", "s", "cpu s", "ns each", "MB"))
    found: dict[str, list[tuple[int, float]]] = {"onnxprune, each weight": [], "onnxprune, global": []}
    memory = []
    copies: list[tuple[int, float]] = []
    for wanted in parameters:
        matrices = max(1, round(wanted / ROWS**2))
        path = folder / "keep-large.onnx"
        count = write_model(path, matrices, True) // 4
        times = rounds if wanted < 5e8 else 1
        for name, allocation in (("onnxprune, each weight", "uniform"), ("onnxprune, global", "global")):
            costs = []
            for _ in range(times):
                clear(folder, "keep-")
                command = [sys.executable, "-c", CHILD, small, path, folder / "out.onnx", allocation]
                told = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout
                costs.append(Cost(*json.loads(told)))
            cost = median(costs)
            found[name].append((count, cost.wall / count * 1e9))
            memory.append(cost.memory / 1e6)
            each = f"{cost.wall / count * 1e9:.2f}"
            row(f"{count / 1e6:.0f} M, {allocation}", cost, each, f"{cost.memory / 1e6:.0f}")
        clear(folder, "keep-")
        copy = run("cp", f"{path}.data", folder / "copy")
        copies.append((count, copy.wall / count * 1e9))
        row(f"{count / 1e6:.0f} M, cp", copy, f"{copy.wall / count * 1e9:.2f}")
        if wanted <= 3e8:
            clear(folder, "keep-")
            loaded = run(sys.executable, "-c", LOADED, path, folder / "out.onnx", "e")
            found.setdefault("load, np.partition, save", []).append((count, loaded.wall / count * 1e9))
            each = f"{loaded.wall / count * 1e9:.2f}"
            row(f"{count / 1e6:.0f} M, load-partition-save", loaded, each, f"{loaded.memory / 1e6:.0f}")
        if wanted <= 1e8 and importlib.util.find_spec("torch"):
            found.setdefault("torch l1_unstructured, in memory", []).append((count, torch_each(matrices) / count * 1e9))
        clear(folder, "keep-small")
    clear(folder, "nothing")
    bar(4, f"at most {max(memory):.0f} MB (under 400)", max(memory) < 400)
    ours = [each for _, each in found["onnxprune, each weight"]]
    spread = max(ours) / min(ours)
    bar(7, f"time per parameter differs by {spread:.2f} between the sizes (at most 1.3)", spread <= 1.3)
    if picture is not None:
        plot({**found, "cp": copies}, picture)


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

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
    for name, points in lines.items():
        style = "-" if name.startswith("onnxprune") else "--"
        axes.loglog(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    axes.set_xlabel("parameters")
    axes.set_ylabel("ns per parameter")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    print(f"plotted: {path.name}")


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
    ours = median(updates)
    row("update_epoch", ours)
    exported = {}
    for name, export in EXPORTS.items():
        with quiet():
            try:
                exported[name] = median([timed(lambda export=export: export(model, inputs)) for _ in range(rounds)])  # type: ignore[misc]
            except Exception:
                continue
        row(f"export: {name}", exported[name], f"{exported[name].wall / ours.wall:.1f}")
    copy = case.build()
    layers = [(m, "weight") for m in copy.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]

    def globally() -> None:
        torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=SPARSITY)
        for layer in layers:
            torch_prune.remove(*layer)

    theirs = median([timed(globally) for _ in range(rounds)])
    row("torch global_unstructured", theirs, f"{theirs.wall / ours.wall:.1f}")
    bar(
        6,
        f"{theirs.wall / ours.wall:.0f} times faster than global_unstructured (at least 50)",
        theirs.wall >= 50 * ours.wall,
    )
    cheapest = min(cost.wall for cost in exported.values())
    bar(
        6,
        f"{cheapest / ours.wall:.0f} times faster than the cheapest re-export (at least 20)",
        cheapest >= 20 * ours.wall,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    tables = ["matrix", "matrices", "files", "start", "bridges", "sizes"]
    parser.add_argument("--only", action="append", choices=tables)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--folder", type=Path, help="where the files are made; the system's temporary folder")
    parser.add_argument("--largest", type=float, default=12, help="GB of the largest model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plot", type=Path, help="an SVG file to write; bench_files.svg beside this script")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PYTHON")
    options = parser.parse_args()
    chosen = options.only or tables
    peers = dict(text.split("=", 1) for text in options.peer_python)
    rounds = 2 if options.quick else options.rounds
    versions = [f"Python {platform.python_version()}"]
    from importlib.metadata import PackageNotFoundError, version

    for name in ("numpy", "onnx", "onnx-ir", "onnxruntime", "torch"):
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    for name, python in peers.items():
        code = f"from importlib.metadata import version; print(version('{PACKAGES.get(name, name)}'))"
        told = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False).stdout.strip()
        versions.append(f"{name} {told or '(not found)'}")
    print(f"{processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}; {', '.join(versions)}")
    print(f"load before: {os.getloadavg()[0]:.1f}", flush=True)
    if "matrix" in chosen:
        one_matrix(peers, 3 * rounds)
    if "matrices" in chosen:
        many_matrices(peers, rounds)
    if "start" in chosen:
        startup(2 * rounds)
    if "bridges" in chosen and importlib.util.find_spec("torch"):
        bridges(min(rounds, 3))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "files" in chosen:
            files(folder, 0.2 if options.quick else 1.0, rounds)
        if "sizes" in chosen:
            wanted = (
                [1e7, 3e7]
                if options.quick
                else [n for n in (1e7, 6e7, 2.5e8, 1e9, 3e9) if n * 4 <= options.largest * GB]
            )
            sizes(folder, wanted, rounds, options.plot or (None if options.quick else HERE / "bench_files.svg"))
    print(f"load after: {os.getloadavg()[0]:.1f}")


PACKAGES = {"tfmot": "tensorflow-model-optimization"}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--make"]:
        make_model(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "1")
    else:
        main()
