"""What stands beside a weight: the bias that is added to its product, and the norm that follows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxprune.graph.model import Model

BIASED = {"Conv": 2, "ConvTranspose": 2, "FusedConv": 2, "Gemm": 2, "FusedGemm": 2, "Attention": 2}
"""Operators that add a bias themselves, and which input it is."""


@dataclass(frozen=True)
class Bias:
    """A stored vector with an entry for each output, that one operator adds to its product.

    Attributes:
        name: of the tensor.
        factor: what the operator multiplies it with.
    """

    name: str
    factor: float = 1.0


def stored(model: Model) -> dict[str, ir.TensorProtocol]:
    """The tensors of a model's main graph by the name of their value: initializers, and those of Constant nodes."""
    graph = model.graph.graph
    found = {name: v.const_value for name, v in graph.initializers.items() if v.const_value is not None}
    for node in graph:
        if node.op_type == "Constant" and "value" in node.attributes:
            tensor = node.attributes["value"].value
            if isinstance(tensor, ir.TensorProtocol):
                found[str(node.outputs[0].name)] = tensor
    return found


def reads(node: onnx.NodeProto) -> list[str]:
    """The values a node reads, in its sub-graphs too."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
            inside = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
            inner = [name for sub in graph.node for name in reads(sub)] + [value.name for value in graph.output]
            inside |= {name for sub in graph.node for name in sub.output}
            names += [name for name in inner if name not in inside]
    return names


def readers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto | None]]:
    """Value -> the nodes that read it; None for the graph's outputs."""
    found: dict[str, list[onnx.NodeProto | None]] = {}
    for node in graph.node:
        for name in reads(node):
            found.setdefault(name, []).append(node)
    for value in graph.output:
        found.setdefault(value.name, []).append(None)
    return found


def bias(
    node: onnx.NodeProto,
    operand: int,
    outputs: int,
    tensors: Mapping[str, ir.TensorProtocol],
    read: Mapping[str, list[onnx.NodeProto | None]],
) -> Bias | None:
    """The bias of a node's product; None where there is none that is its own.

    Args:
        node: the operator that multiplies the weight.
        operand: which input the weight is.
        outputs: how many the weight has.
        tensors: those of the model, see `stored`.
        read: see `readers`.
    """
    name, factor = "", 1.0
    if node.op_type in BIASED and operand == 1:
        place = BIASED[node.op_type]
        name = node.input[place] if len(node.input) > place else ""
        if node.op_type in {"Gemm", "FusedGemm"}:
            factor = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
    elif node.op_type in {"MatMul", "FusedMatMul", "TransposeMatMul"} and operand == 1:
        after = only_reader(node, read)
        if after is not None and after.op_type == "Add":
            name = next((n for n in after.input if n != node.output[0]), "")
    tensor = tensors.get(name)
    if tensor is None or len(read.get(name, ())) != 1 or factor == 0.0:
        return None
    shape = tuple(tensor.shape.numpy())
    return Bias(name, factor) if shape and shape[-1] == outputs == tensor.size else None


def only_reader(node: onnx.NodeProto, read: Mapping[str, list[onnx.NodeProto | None]]) -> onnx.NodeProto | None:
    """The one node that reads a node's first output; None where there are several, or it is an output of the graph."""
    found = read.get(node.output[0], [])
    return found[0] if len(found) == 1 else None
