"""A model with tensors of many kinds, ways to lay out its data in files, and what is in a file afterwards."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from nets import feeds, parse, tensors
from onnx import TensorProto, numpy_helper

HALF = [{"sparsity": 0.5}]


def values(*shape: int, dtype: object = np.float32, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 20).astype(dtype)


def net() -> onnx.ModelProto:
    """Weights of four types, a shape and a bias; every tensor above a few bytes can live in a file."""
    model = parse(
        """(float[1, 3, 8, 8] x) => (float[1, 6] y, float[1, 5] z)
        <float s = {0.1}, int8 zero = {0}> {
            a = Conv(x, conv, bias) b = Reshape(a, flat)
            c = Cast<to = 1>(half) d = MatMul(b, c)
            e = DequantizeLinear(quantised, s, zero) f = MatMul(d, e)
            g = Cast<to = 1>(brain) y = MatMul(f, g)
            k = Constant<value = float[1] {0}>() z = Gemm(y, k) }""",
        conv=values(4, 3, 3, 3),
        bias=values(4, seed=1),
        flat=np.array([1, 144]),
        half=values(144, 9, dtype=np.float16, seed=2),
        quantised=values(9, 7, dtype=np.int8, seed=3),
        brain=values(7, 6, dtype=ml_dtypes.bfloat16, seed=4),
    )
    constant = next(n for n in model.graph.node if n.op_type == "Constant").attribute[0]
    constant.t.CopyFrom(numpy_helper.from_array(values(6, 5, seed=5), "k"))
    return model


def stored(model: onnx.ModelProto) -> dict[str, bytes]:
    """The raw bytes of every tensor of a model with its data inside."""
    return {name: ir.serde.TensorProtoTensor(tensor).tobytes() for name, tensor in tensors(model)}


def places(path: Path) -> dict[str, tuple[str, int, int]]:
    """Where a model file says its tensors are: file, offset, length."""
    out = {}
    for name, tensor in tensors(onnx.load(path, load_external_data=False)):
        if tensor.data_location == TensorProto.EXTERNAL:
            told = {entry.key: entry.value for entry in tensor.external_data}
            assert told.keys() == {"location", "offset", "length"}
            out[name] = (told["location"], int(told["offset"]), int(told["length"]))
    return out


def run(path: Path, model: onnx.ModelProto) -> list[bytes]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    return [output.tobytes() for output in session.run(None, feeds(model))]


def tree(folder: Path) -> dict[str, str]:
    """Every file under a folder with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


Layout = Callable[[int, str], str]

LAYOUTS: dict[str, Layout] = {
    "one file": lambda index, name: "weights.bin",
    "a file for each tensor": lambda index, name: f"{name}.bin",
    "two files": lambda index, name: f"part{index % 2}",
    "a sub-folder": lambda index, name: "data/deep/weights.bin",
    "files of one name": lambda index, name: f"{index % 3}/weights.bin",
    "the exporter's name": lambda index, name: "model.onnx.data",
    "spelt in two ways": lambda index, name: "weights.bin" if index % 2 else "./weights.bin",
}


def write_external(model: onnx.ModelProto, path: Path, layout: Layout) -> Path:
    """Save a model with its data in files, at odd offsets, with other bytes between and behind."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for index, (name, tensor) in enumerate(tensors(copy)):
        if tensor.data_type == TensorProto.INT64:  # onnxruntime wants to see shapes
            continue
        content = ir.serde.TensorProtoTensor(tensor).tobytes()
        file = path.parent / layout(index, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "ab") as out:
            out.write(bytes([0xA5]) * (index * 3 + 1))
            offset = out.tell()
            out.write(content)
            out.write(bytes([0x5A]) * (index + 2))
        for field in ("raw_data", "float_data", "int32_data", "int64_data"):
            tensor.ClearField(field)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", layout(index, name)), ("offset", offset), ("length", len(content))):
            tensor.external_data.add(key=key, value=str(value))
    path.write_bytes(copy.SerializeToString())
    return path


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every tensor in the typed field of its type instead of raw_data."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for _, tensor in tensors(copy):
        array = numpy_helper.to_array(tensor)
        if array.dtype.itemsize == 2:
            flat = array.reshape(-1).view(np.uint16).astype(np.int32).tolist()
            tensor.ClearField("raw_data")
            tensor.int32_data.extend(flat)
        else:
            tensor.CopyFrom(onnx.helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, array.reshape(-1)))
    assert not any(tensor.HasField("raw_data") for _, tensor in tensors(copy))
    return copy


def many_small() -> onnx.ModelProto:
    model = parse("(float[2, 3] x) => (float[2, 3] y) { y = Identity(x) }")
    del model.graph.node[:]
    last = "x"
    for index in range(300):
        if index % 3 == 0:
            model.graph.initializer.append(numpy_helper.from_array(values(3, 3, seed=index), f"w{index}"))
        elif index % 3 == 1:
            array = numpy_helper.from_array(values(3, 3, seed=index))
            model.graph.node.append(onnx.helper.make_node("Constant", [], [f"w{index}"], value=array))
        else:
            flat = values(3, 3, seed=index).reshape(-1).tolist()
            model.graph.node.extend(
                [
                    onnx.helper.make_node("Constant", [], [f"f{index}"], value_floats=flat),
                    onnx.helper.make_node("Reshape", [f"f{index}", "shape"], [f"w{index}"]),
                    onnx.helper.make_node("Constant", [], [f"one{index}"], value_floats=[1.0]),
                    onnx.helper.make_node("Mul", [last, f"one{index}"], [f"m{index}"]),
                ]
            )
            last = f"m{index}"
        model.graph.node.append(onnx.helper.make_node("MatMul", [last, f"w{index}"], [f"y{index}"]))
        last = f"y{index}"
    model.graph.initializer.append(numpy_helper.from_array(np.array([3, 3]), "shape"))
    model.graph.node.append(onnx.helper.make_node("Identity", [last], ["y"]))
    return model
