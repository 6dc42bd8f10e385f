"""One Gather in place of two: outputs are not put back into an order in which nobody but Gathers reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnxprune.structure.facts import STANDARD_DOMAINS

ALIKE = {
    *("Abs", "Cast", "Celu", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu"),
    *("Mish", "Neg", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Tanh"),
}
"""Operators that do the same to every position of their first input."""

CHANNELWISE = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool", "MaxPool"}
"""And to every position of its axis 1."""


def merge(
    nodes: Sequence[onnx.NodeProto], tensors: Mapping[str, np.ndarray], outputs: Sequence[str]
) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Leave out each Gather whose result, through operators that treat positions alike, only Gathers read.

    Args:
        nodes: of a graph, in order; those that change are changed.
        tensors: the indices of Gathers that may change or go, by name; none is read by anything else.
        outputs: names that have to stay: of the graph, and what sub-graphs read.

    Returns:
        The nodes that stay, and the indices that changed.
    """
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    gone: set[int] = set()
    changed: dict[str, np.ndarray] = {}
    for node in nodes:
        if node.op_type != "Gather" or node.input[1] not in tensors or tensors[node.input[1]].ndim != 1:
            continue
        last = _gathers(node, readers, tensors, set(outputs))
        if not last:
            continue
        order = changed.get(node.input[1], tensors[node.input[1]])
        for reader in last:
            name = reader.input[1]
            changed[name] = order[changed.get(name, tensors[name])]
        for reader in readers[node.output[0]]:
            reader.input[0] = node.input[0]
        readers[node.input[0]] = [r for r in readers[node.input[0]] if r is not node] + readers[node.output[0]]
        gone.add(id(node))
    return [node for node in nodes if id(node) not in gone], changed


def _gathers(
    first: onnx.NodeProto,
    readers: Mapping[str, Sequence[onnx.NodeProto]],
    tensors: Mapping[str, np.ndarray],
    outputs: set[str],
) -> list[onnx.NodeProto]:
    """The Gathers of one axis that read a Gather's result; none where anything else does."""
    axis, found, names = axis_of(first), [], [first.output[0]]
    while names:
        name = names.pop()
        if name in outputs or not readers.get(name):
            return []
        for node in readers[name]:
            if node.domain not in STANDARD_DOMAINS or node.input[0] != name or name in node.input[1:]:
                return []
            if node.op_type == "Gather" and node.input[1] in tensors and axis_of(node) == axis:
                found.append(node)
            elif node.op_type in ALIKE or (node.op_type in CHANNELWISE and axis == 1):
                names.extend(output for output in node.output if output)
            else:
                return []
    return found


def axis_of(node: onnx.NodeProto) -> int:
    """The axis that a Gather takes positions of."""
    return next((int(a.i) for a in node.attribute if a.name == "axis"), 0)
