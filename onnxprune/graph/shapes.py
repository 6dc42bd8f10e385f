"""Shapes of all values of a model for concrete inputs, by ONNX's own shape inference.

That follows the values of shapes through a few operators only. Where it stops, the small constants behind the shapes
are computed with ONNX's reference implementation, and it starts again.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.graph.constants import is_computed
from onnxprune.graph.model import Model, graphs, tensors

Shape = tuple[int | None, ...]
"""Sizes; None where one is not known."""

SMALL = 1024
"""Elements of the largest tensor whose values may say a shape (the target of a Reshape, the sizes of a Resize)."""

STANDARD = {"FusedConv": "Conv", "FusedGemm": "Gemm"}
"""Contrib operators that shape inference knows under another name."""

ROUNDS = 100
DONE = " (computed)"


def infer(model: Model, inputs: Mapping[str, Sequence[int]]) -> onnx.ModelProto:
    """The model as a graph whose values have shapes: calls of functions inlined, large tensors empty.

    Shapes that the file declares for anything but its inputs are not believed.

    Args:
        model: its large tensors are emptied: nothing else can be done with it afterwards.
        inputs: concrete shapes of the graph's inputs.

    Raises:
        Exception: whatever onnx raises at a graph it refuses.
    """
    proto = model.proto
    proto.ir_version = max(proto.ir_version, 4)  # before, initializers had to be inputs too
    for tensor in tensors(proto):
        _empty(tensor, model)
    for graph in graphs(proto):
        graph.ClearField("value_info")
        for node in graph.node:
            if node.domain == "com.microsoft" and node.op_type in STANDARD:
                node.domain, node.op_type = "", STANDARD[node.op_type]
        if isinstance(graph, onnx.GraphProto):
            _forget([*graph.output] if graph is proto.graph else [*graph.input, *graph.output])
    for value in proto.graph.input:
        if value.name in inputs and value.type.HasField("tensor_type"):
            _forget([value])
            dims = [onnx.TensorShapeProto.Dimension(dim_value=size) for size in inputs[value.name]]
            value.type.tensor_type.shape.dim.extend(dims)
    if proto.functions:
        from onnx import inliner

        proto = inliner.inline_local_functions(proto)
    opsets = proto.opset_import
    for _ in range(ROUNDS):
        proto = _infer_once(proto)
        if not _fold(proto.graph, ChainMap(), ChainMap(), opsets):
            break
        for graph in graphs(proto):
            graph.ClearField("value_info")
    return proto


def declared(graph: onnx.GraphProto) -> dict[str, Shape]:
    """Shapes of a graph's values, as far as they are known; those of its sub-graphs are not among them."""
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type") and kind.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
    return shapes


def _infer_once(proto: onnx.ModelProto) -> onnx.ModelProto:
    try:
        return onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # following the values of shapes is the part that may fail
        return onnx.shape_inference.infer_shapes(proto)


def _empty(tensor: TensorProto, model: Model) -> None:
    """Drop the values of a large tensor, and read a small one in."""
    external = tensor.data_location == TensorProto.EXTERNAL
    if math.prod(tensor.dims) <= SMALL:
        if external:
            content = model.content(tensor)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = content
        return
    for name in ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data", "raw_data"):
        tensor.ClearField(name)
    if not external:
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="emptied")


def _forget(values: Iterable[onnx.ValueInfoProto]) -> None:
    for value in values:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")


def _fold(
    graph: onnx.GraphProto,
    outer_shapes: ChainMap[str, Shape],
    outer_constants: ChainMap[str, TensorProto],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> bool:
    """Make initializers of the small values that are the same at every run; whether there were any.

    Their nodes stay, with outputs nobody reads, so that the order of nodes is that of the model.
    """
    shapes = outer_shapes.new_child(declared(graph))
    constants = outer_constants.new_child({t.name: t for t in graph.initializer if math.prod(t.dims) <= SMALL})
    results: list[TensorProto] = []
    nodes: list[onnx.NodeProto] = []
    computed: set[str] = set()
    progress = False
    for node in graph.node:
        for attribute in node.attribute:
            for sub in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                progress |= _fold(sub, shapes, constants, opsets)
        if not all(_is_small(shapes.get(name)) for name in node.output if name) or node.domain not in ("", "ai.onnx"):
            continue
        if all(name.endswith(DONE) for name in node.output):
            continue
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            constants[node.output[0]] = node.attribute[0].t
        elif node.op_type == "Shape":
            sizes = shapes.get(node.input[0])
            if sizes is not None and None not in sizes:
                bounds = {a.name: a.i for a in node.attribute}
                part = sizes[bounds.get("start", 0) : bounds.get("end", len(sizes))]
                results.append(numpy_helper.from_array(np.array(part, np.int64), node.output[0]))
                constants[node.output[0]] = results[-1]
        elif _is_pure(node) and all(name in constants or name in computed for name in node.input if name):
            nodes.append(node)
            computed.update(name for name in node.output if name)
    results += _compute(nodes, constants, computed, opsets)
    names = {tensor.name for tensor in results}
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name in names:
                node.output[index] = name + DONE
    graph.initializer.extend(results)
    return progress or bool(results)


def _compute(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, TensorProto],
    names: set[str],
    opsets: Sequence[onnx.OperatorSetIdProto],
) -> list[TensorProto]:
    if not nodes:
        return []
    from onnx.reference import ReferenceEvaluator  # slow to import, and rarely needed

    read = {name for node in nodes for name in node.input if name} - names
    given = [numpy_helper.from_array(numpy_helper.to_array(constants[name]), name) for name in sorted(read)]
    outputs = [onnx.ValueInfoProto(name=name) for name in sorted(names)]
    graph = onnx.helper.make_graph(nodes, "constants", [], outputs, given)
    try:
        values = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(None, {})
        pairs = zip(sorted(names), values, strict=True)
        return [numpy_helper.from_array(np.asarray(value), name) for name, value in pairs]
    except Exception:  # an operator it lacks: these shapes stay unknown
        return []


def _is_small(shape: Shape | None) -> bool:
    return shape is not None and math.prod(SMALL + 1 if size is None else size for size in shape) <= SMALL


def _is_pure(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" or (bool(node.input) and is_computed(node))
