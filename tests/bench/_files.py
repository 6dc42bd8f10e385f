"""What benchmarks of files share: timing whole processes, the table of ratios, models of any size."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

HERE = Path(__file__).parent
ROWS = 2048
"""Of the matrices that the models are made of, 4.2 M entries each."""
GB = 1e9
COLUMNS = "{:52}{:>10}{:>10}{:>10}{:>10}"

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


STARTED = """
import os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
child.returncode = status
print(status, time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)
"""


def run(*command: object) -> Cost:
    """A whole process, started by a small one: the peak memory of a child is at least its parent's."""
    starter = [sys.executable, "-I", "-c", STARTED, *map(str, command)]
    told = subprocess.run(starter, capture_output=True, text=True, check=True)
    status, wall, cpu, memory = map(float, told.stdout.split())
    if status:
        raise SystemExit(f"{command} failed: {told.stderr.strip()}")
    return Cost(wall, cpu, memory)


def timed(work: Callable[[], object]) -> Cost:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu, 0.0)


def least(costs: Sequence[Cost]) -> Cost:
    """The run that other work on the machine disturbed least."""
    return min(costs)


def row(name: str, cost: Cost, *more: str) -> None:
    print(COLUMNS.format(name, f"{cost.wall:.3f}", f"{cost.cpu:.3f}", *more, *[""] * (2 - len(more))), flush=True)


BARS: dict[str, list[tuple[int, str, str, str, bool]]] = {}
"""The table of ratios, part by part: the bar's number, what is measured, the figure, its limit, whether that holds."""


def bar(number: int, what: str, figure: float, limit: float, least: bool = False, unit: str = "x") -> None:
    met = figure >= limit if least else figure <= limit
    at = f"{'at least' if least else 'at most'} {limit:.3g} {unit}"
    BARS[list(BARS)[-1]].append((number, what, f"{figure:.3g} {unit}", at, met))
    print(f"bar {number}: {what}: {figure:.3g} {unit} ({at}): {'met' if met else 'NOT MET'}", flush=True)


def table() -> None:
    print("\n| bar | what | measured | bar | met |\n|---|---|---|---|---|")
    for number, what, figure, limit, met in sorted(itertools.chain(*BARS.values()), key=lambda row: row[0]):
        print(f"| {number} | {what} | {figure} | {limit} | {'yes' if met else 'NO'} |")


def write_model(path: Path, matrices: int, external: bool) -> int:
    """A chain of MatMuls with random weights, made by another process: the memory of this one counts for its children.

    Returns:
        The bytes of the weights.
    """
    subprocess.run([sys.executable, __file__, path, str(matrices), str(int(external))], check=True)
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


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
