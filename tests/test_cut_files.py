"""Channels cut out of models whose tensors are in files: the same model, written without what went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from model_files import LAYOUTS, stored, tree, write_external
from onnx import TensorProto, helper, numpy_helper
from test_channels import LENET, residual

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.graph import model as models
from onnxprune.graph import wire
from onnxprune.graph.model import load
from onnxprune.structure import shrink
from onnxprune.structure.plan import Plan

CHANNELS = {"sparsity": 0.5, "op_types": "default", "pattern": "channel"}
CONFIGS: dict[str, Any] = {
    "channels": [CHANNELS],
    "channels, and entries of what stays": [CHANNELS, {"sparsity": 0.7, "op_names": ["fc", "w3", "out"]}],
    "channels, and blocks of what stays": [
        CHANNELS,
        {"sparsity": 0.5, "pattern": "2:4", "op_names": ["fc", "w3", "out"]},
    ],
}


def chain(dtype: type = np.float32) -> onnx.ModelProto:
    """MatMuls, a Gemm with its weight transposed and one that nothing is cut of, biases between them."""
    rng = np.random.default_rng(0)
    arrays = {f"w{i}": rng.standard_normal((48, 48)).astype(dtype) for i in range(4)}
    arrays |= {"out": rng.standard_normal((8, 48)).astype(dtype), "b": rng.standard_normal(48).astype(dtype)}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["b0"]),
        helper.make_node("Relu", ["b0"], ["c"]),
        helper.make_node("Gemm", ["c", "w1"], ["d"], transB=1),
        helper.make_node("Tanh", ["d"], ["e"]),
        helper.make_node("MatMul", ["e", "w2"], ["f"]),
        helper.make_node("Softmax", ["f"], ["g"]),
        helper.make_node("MatMul", ["g", "w3"], ["h"]),
        helper.make_node("Gemm", ["h", "out"], ["y"], transB=1),
    ]
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ports = [helper.make_tensor_value_info(name, kind, ["N", size]) for name, size in (("x", 48), ("y", 8))]
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


MODELS = {
    "residual": lambda: residual(width=32),
    "chain": chain,
    "chain, 16 bits": lambda: chain(np.float16),
    "LeNet-5": lambda: onnx.load(LENET),
}


FEW = ("a single file", "two files")


def write(model: onnx.ModelProto, folder: Path, layout: str) -> Path:
    path = folder / "model.onnx"
    if layout == "a single file":
        path.write_bytes(model.SerializeToString())
        return path
    return write_external(model, path, LAYOUTS[layout])


CASES = [
    *(("chain", "channels, and entries of what stays", layout) for layout in ("a single file", *LAYOUTS)),
    *((name, config, layout) for name in ("residual", "chain, 16 bits") for config in CONFIGS for layout in FEW),
    *(("LeNet-5", "channels", layout) for layout in FEW),
]


@pytest.mark.parametrize(("name", "config", "layout"), CASES)
def test_cut_from_files_as_in_memory(
    name: str, config: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "LARGE", 0)
    monkeypatch.setattr(wire, "LEAST", 100)
    entries = [
        {**entry, "op_names": [n for n in entry["op_names"] if n in names]} if "op_names" in entry else entry
        for names in [{t.name for t in MODELS[name]().graph.initializer}]
        for entry in CONFIGS[config]
    ]
    expected = onnxprune.prune(MODELS[name](), entries, align=1)
    (tmp_path / "in").mkdir()
    source = write(MODELS[name](), tmp_path / "in", layout)
    before = tree(tmp_path / "in")
    (tmp_path / "out").mkdir()
    result = onnxprune.prune(source, entries, tmp_path / "out" / "small.onnx", align=1)
    assert tree(tmp_path / "in") == before
    wanted = stored(expected.to_proto())
    assert stored(result.to_proto()) == wanted
    written = onnx.load(tmp_path / "out" / "small.onnx")
    assert stored(written) == wanted
    assert [node.SerializeToString() for node in written.graph.node] == [
        node.SerializeToString() for node in expected.to_proto().graph.node
    ]
    assert result.report.rows == expected.report.rows
    assert result.masks == expected.masks
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert size < written.ByteSize() + 10_000  # nothing of what went is left
    again = tmp_path / "out" / "again.onnx"
    result.save(again)
    assert stored(onnx.load(again)) == wanted


@pytest.mark.parametrize("layout", ["a single file", "two files"])
def test_zeroed_in_files_as_in_memory(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "LARGE", 0)
    monkeypatch.setattr(wire, "LEAST", 100)
    for config in CONFIGS.values():
        entries = [e for e in config if "op_names" not in e]
        expected = onnxprune.prune(chain(), entries, keep_shape=True, align=1)
        (tmp_path / "in").mkdir(exist_ok=True)
        for path in (tmp_path / "in").iterdir():
            path.unlink()
        source = write(chain(), tmp_path / "in", layout)
        onnxprune.prune(source, entries, tmp_path / "out.onnx", keep_shape=True, align=1)
        assert stored(onnx.load(tmp_path / "out.onnx")) == stored(expected.to_proto())


@pytest.mark.parametrize("layout", ["a single file", "two files"])
def test_a_cut_model_is_cut_on(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dead channels, and layers in groups: what comes after a cut reads from files that do not exist."""
    monkeypatch.setattr(models, "LARGE", 0)
    monkeypatch.setattr(wire, "LEAST", 100)
    proto = chain()
    dead = numpy_helper.to_array(proto.graph.initializer[1]).copy()
    dead[::3] = 0
    proto.graph.initializer[1].raw_data = dead.tobytes()
    (tmp_path / "in").mkdir()
    source = write(proto, tmp_path / "in", layout)
    entries = [{"sparsity": 0.3, "pattern": "channel", "op_names": ["w0"]}]
    expected = onnxprune.prune(proto, entries, compact=True, align=1)
    onnxprune.prune(source, entries, tmp_path / "out.onnx", compact=True, align=1)
    shapes = {tensor.name: tuple(tensor.dims) for tensor in expected.to_proto().graph.initializer}
    assert shapes["w1"] == (32, 34)
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(expected.to_proto())


def test_zeros_that_were_put_in_stay_in_what_is_left(tmp_path: Path) -> None:
    """More is zeroed than is cut."""
    source = write_external(chain(), tmp_path / "model.onnx", LAYOUTS["one file"])
    found = []
    for model in (chain(), source):
        plan = Plan.of(load(model))
        for share in (2, 8):
            plan.removed = {group.name: np.arange(group.size) < group.size // share for group in plan.coupling.groups}
            if share == 2:
                plan.zero(shrink.lines(plan.coupling, plan.removed))
        found.append(stored(plan.cut().to_proto()))
    assert found[0] == found[1]
    w1 = np.frombuffer(found[1]["w1"], np.float32)
    assert w1.size == 42 * 42
    assert np.count_nonzero(w1) == 24 * 24


def test_packed_integers_are_cut_in_memory(tmp_path: Path) -> None:
    """Entries of four bits cannot be taken out of bytes one by one."""
    rng = np.random.default_rng(0)
    scale = numpy_helper.from_array(np.array(0.1, np.float32), "s")
    floats = [numpy_helper.from_array(rng.standard_normal((48, 48)).astype(np.float32), n) for n in ("w0", "w2")]
    packed = helper.make_tensor("w1", TensorProto.INT4, [48, 48], rng.integers(-8, 8, 48 * 48).tolist())
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"]),
        helper.make_node("DequantizeLinear", ["w1", "s"], ["q"]),
        helper.make_node("MatMul", ["a", "q"], ["b"]),
        helper.make_node("MatMul", ["b", "w2"], ["y"]),
    ]
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 48]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ports[:1], ports[1:], [*floats, packed, scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    expected = onnxprune.prune(model, [CHANNELS], align=1, verify=False)  # onnxruntime rounds activations to 8 bits
    source = write_external(model, tmp_path / "model.onnx", LAYOUTS["one file"])
    onnxprune.prune(source, [CHANNELS], tmp_path / "out.onnx", align=1, verify=False)
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(expected.to_proto())


def test_a_source_that_changes_before_it_is_cut_is_told(tmp_path: Path) -> None:
    source = write_external(chain(), tmp_path / "model.onnx", LAYOUTS["one file"])
    result = onnxprune.prune(source, [CHANNELS], align=1)
    with open(tmp_path / "weights.bin", "ab") as file:
        file.write(b"more")
    with pytest.raises(PruneError, match="has changed since it was loaded"):
        result.save(tmp_path / "out.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]
