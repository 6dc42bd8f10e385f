"""The tensors of a protobuf: found at any depth, stored, emptied, pointed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from onnxprune.graph import valid


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The main graph, every sub-graph of a node's attributes, and every function body."""
    stack: list[onnx.GraphProto | onnx.FunctionProto] = [*proto.functions, proto.graph]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def subgraphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """`graphs` without the bodies of functions, which hold no initializers."""
    return (graph for graph in graphs(proto) if isinstance(graph, onnx.GraphProto))


def tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor stored in the model: initializers and tensor attributes, at any depth."""
    for graph in graphs(proto):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for item in graph.sparse_initializer:
                yield item.values
                yield item.indices
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("sparse_tensor"):
                    yield attribute.sparse_tensor.values
                    yield attribute.sparse_tensor.indices


def stored_tensors(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initializers and Constant nodes' tensors, at any depth."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
        for node in graph:
            tensor = node.attributes.get("value")
            if node.op_type == "Constant" and tensor is not None and isinstance(tensor.value, ir.TensorProtocol):
                yield node.outputs[0], tensor.value


def external_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """The tensors whose data lies in other files."""
    return (t for t in tensors(proto) if t.data_location == TensorProto.EXTERNAL)


def encode(array: np.ndarray, dtype: ir.DataType) -> bytes:
    """The bytes ONNX stores for an array (little-endian, 4-bit types packed)."""
    return ir.Tensor(np.ascontiguousarray(array), dtype=dtype).tobytes()


def store(tensor: TensorProto, dtype: ir.DataType, array: np.ndarray) -> None:
    """Put an array into a TensorProto in place of its values: as raw data, where that is not larger."""
    content = encode(array, dtype)
    # int32_data spends one byte on a zero; as raw data, a 16-bit tensor of zeros would grow.
    small = bool(tensor.int32_data) and dtype.bitwidth == 16
    clear(tensor)
    if small:
        tensor.int32_data.extend(np.frombuffer(content, "<u2").astype(np.int32).tolist())
        if tensor.ByteSize() < len(content):
            return
        tensor.ClearField("int32_data")
    tensor.raw_data = content


def clear(tensor: TensorProto) -> None:
    """Drop a tensor's values, wherever they are."""
    typed = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    for name in (*typed, "raw_data", "external_data", "data_location"):
        tensor.ClearField(name)


def point(tensor: TensorProto, location: str, offset: int) -> None:
    """Make a tensor refer to a place in a file."""
    clear(tensor)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", valid.nbytes(tensor))):
        tensor.external_data.add(key=key, value=str(value))
