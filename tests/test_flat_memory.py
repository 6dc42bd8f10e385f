"""Memory does not grow with a model: measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxprune.graph import wire

SIDE = 4096

PEAK = """
import sys
import onnxprune
source, target, allocation, pattern, shape = sys.argv[1:]
entry = {"sparsity": 0.5, "allocation": allocation, "pattern": pattern, "op_types": ["default", "Embedding"]}
result = onnxprune.prune(source, [entry], target, verify=False, keep_shape=shape == "kept")
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024, result.report.zeros, result.report.size)
"""


def write(path: Path, matrices: int, external: bool) -> None:
    """Matrices of 64 MB that take room on disk for their first rows only; the others are zero."""
    names = ["x", *(f"y{i}" for i in range(matrices))]
    nodes = [helper.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(matrices)]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", SIDE]) for name in ("x", names[-1])]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    size = SIDE * SIDE * 4
    some = np.random.default_rng(0).standard_normal(min(1 << 20, SIDE * SIDE), dtype=np.float32).tobytes()
    for i in range(matrices):
        tensor = model.graph.initializer.add(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[SIDE, SIDE])
        tensor.data_location = TensorProto.EXTERNAL
        location = "data" if external else wire.OWN
        for key, value in (("location", location), ("offset", i * size), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
    pieces = [model.SerializeToString()] if external else wire.splice(model, lambda tensor: (None, size))
    with open(path, "wb") as file, open(path.with_name("data"), "wb") as data:
        for piece in pieces:
            if piece is not None:
                file.write(piece)
            else:
                file.write(some)
                file.seek(size - len(some), 1)
        for i in range(matrices if external else 0):
            data.seek(i * size)
            data.write(some)
        data.truncate(matrices * size if external else 0)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("external", [False, True], ids=["a single file", "external data"])
@pytest.mark.parametrize(
    ("allocation", "pattern"), [("uniform", "unstructured"), ("global", "unstructured"), ("erk", "unstructured")]
)
def test_memory_is_flat(allocation: str, pattern: str, external: bool, tmp_path: Path) -> None:
    """A model of 1.3 GB takes as much as one of 130 MB, and less than 200 MB."""
    peaks = []
    for matrices in (2, 20):
        path = tmp_path / "model.onnx"
        write(path, matrices, external)
        command = [sys.executable, "-c", PEAK, path, tmp_path / "out.onnx", allocation, pattern, "kept"]
        peak, zeros, size = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
        assert size == matrices * SIDE * SIDE
        assert zeros == size - matrices * (1 << 20)  # as many as there were: the rest is untouched
        peaks.append(peak)
    assert max(peaks) < 200
    assert peaks[1] - peaks[0] < 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(("shape", "external"), [("kept", False), ("cut", True)])
def test_channels_take_the_memory_of_one_layer(shape: str, external: bool, tmp_path: Path) -> None:
    """A model of 1.3 GB takes as much as one of 130 MB, and less than a third of itself: its layers have 64 MB."""
    peaks = []
    for matrices in (2, 20):
        path = tmp_path / "model.onnx"
        write(path, matrices, external)
        command = [sys.executable, "-c", PEAK, path, tmp_path / "out.onnx", "global", "channel", shape]
        peak, _, size = map(int, subprocess.run(command, capture_output=True, check=True).stdout.split())
        assert size == matrices * SIDE * SIDE
        left = sum(file.stat().st_size for file in tmp_path.glob("out.onnx*"))
        assert left < (1.01 if shape == "kept" else 0.5 if matrices == 20 else 0.76) * matrices * SIDE * SIDE * 4
        peaks.append(peak)
        for file in tmp_path.iterdir():
            file.unlink()
    assert max(peaks) < 400
    assert peaks[1] - peaks[0] < 40


ANON = """
import sys, threading, time
import onnxprune
from onnxprune.runtime import stream

stream._machine = lambda: 1 << 30
peak, done = 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
        peak = max(peak, int(line.split()[1]) // 1024)
        time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
result = onnxprune.prune(sys.argv[1], [{"sparsity": 0.5, "pattern": "channel"}], sys.argv[2])
done.set()
thread.join()
print(peak, result.report.difference)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_model_larger_than_memory_is_checked(tmp_path: Path) -> None:
    """onnxruntime runs the zeroed and the cut model with their weights mapped: nothing else would fit."""
    write(tmp_path / "model.onnx", 20, external=True)
    command = [sys.executable, "-c", ANON, tmp_path / "model.onnx", tmp_path / "out.onnx"]
    peak, difference = subprocess.run(command, capture_output=True, check=True).stdout.split()
    assert int(peak) < 400  # of 1,340 MB
    assert 0 < float(difference) < 1e-5


def test_the_written_models_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SIDE", 600)
    for external in (False, True):
        write(tmp_path / "model.onnx", 2, external)
        model = onnx.load(tmp_path / "model.onnx")
        assert [len(t.raw_data) for t in model.graph.initializer] == [600 * 600 * 4] * 2
