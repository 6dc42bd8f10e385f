"""A model made ready for cutting: functions inlined, tensors of Constant nodes among the initializers."""

from __future__ import annotations

import itertools
import math

import onnx
from onnx import TensorProto, inliner

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, graphs, open_proto, subgraphs, tensors
from onnxprune.graph.shapes import SMALL


def prepare(model: Model) -> Model:
    """A model that computes the same, in the form that rules and cuts work on. The given one is not changed.

    Raises:
        PruneError: a function cannot be inlined.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    if proto.functions:
        try:
            proto = inliner.inline_local_functions(proto)
        except Exception as error:  # the inliner raises many kinds
            raise PruneError(
                f"the model's functions cannot be inlined: {' '.join(str(error).split())[:300]}"
            ) from error
    for graph in subgraphs(proto):
        kept = []
        for node in graph.node:
            given = node.attribute[0] if node.op_type == "Constant" and node.domain in ("", "ai.onnx") else None
            if given is None or given.name != "value" or given.ref_attr_name:
                kept.append(node)
                continue
            graph.initializer.add().CopyFrom(given.t)
            graph.initializer[-1].name = node.output[0]
        if len(kept) < len(graph.node):
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
            del graph.node[:]
            graph.node.extend(copies)
    _unshare(proto)
    proto.ir_version = max(proto.ir_version, 4)  # before, initializers had to be inputs too
    inside = {tensor.name for tensor in proto.graph.initializer}
    free = [value for value in proto.graph.input if value.name not in inside]
    if len(free) < len(proto.graph.input):
        copied = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in free]
        del proto.graph.input[:]
        proto.graph.input.extend(copied)
    for graph_ in graphs(proto):
        if isinstance(graph_, onnx.GraphProto):
            graph_.ClearField("value_info")
    _read_small(proto, model)
    return open_proto(proto, model.folder, model.path)


def _unshare(proto: onnx.ModelProto) -> None:
    """Give every reader of a vector its own copy: exporters merge equal ones, and that would tie what has it."""
    vectors = {t.name: (graph, t) for graph in subgraphs(proto) for t in graph.initializer if _is_vector(t)}
    taken = {name for graph in subgraphs(proto) for node in graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for graph in subgraphs(proto) for tensor in graph.initializer}
    seen: set[str] = {value.name for graph in subgraphs(proto) for value in graph.output}
    for graph in subgraphs(proto):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name not in vectors:
                    continue
                if name in seen:
                    home, tensor = vectors[name]
                    copy = next(c for c in (f"{name}_{i}" for i in itertools.count(2)) if c not in taken)
                    taken.add(copy)
                    home.initializer.add().CopyFrom(tensor)
                    home.initializer[-1].name = node.input[index] = copy
                seen.add(name)


def _is_vector(tensor: TensorProto) -> bool:
    return len(tensor.dims) == 1 and tensor.dims[0] > 1 and tensor.data_type in _REAL


_REAL = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def skeleton(model: Model) -> onnx.ModelProto:
    """A model's graph with the data of its large tensors left out."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in tensors(proto):
        if math.prod(tensor.dims) > SMALL:
            empty(tensor)
    return proto


def empty(tensor: TensorProto) -> None:
    """Drop a tensor's data; it can no longer be read."""
    dims, kind, name = list(tensor.dims), tensor.data_type, tensor.name
    tensor.Clear()
    tensor.dims.extend(dims)
    tensor.data_type, tensor.name = kind, name
    tensor.data_location = TensorProto.EXTERNAL


def _read_small(proto: onnx.ModelProto, model: Model) -> None:
    """Sizes and indices may be kept in external files, too."""
    for tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL and math.prod(tensor.dims) <= SMALL:
            content = model.content(tensor)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = content
