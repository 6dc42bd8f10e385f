"""A Gather in front of what works on each channel alone, which then has fewer channels to work on.

Where layers share what they read and each has a norm and an activation of its own (DenseNet, pre-activation ResNets),
nothing is fused with these, and they take the time that the layer saves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx

from onnxprune.lowering.merge import ALIKE, axis_of
from onnxprune.structure.facts import STANDARD_DOMAINS, Shape

BINARY = {"Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu", "Pow"}
"""Operators on each position, here with one constant operand."""

FUSED = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators into which onnxruntime fuses the norm and the activation behind them: it must find them there."""

Chain = list[tuple[onnx.NodeProto, int, dict[int, int]]]
"""Nodes from last to first; of each which input is the data, and the constant operands that have channels: which
inputs, and the axes these lie along."""

Constant = Callable[[str], np.ndarray | None]
"""The values of an initializer; None for other names."""


def hoist(
    nodes: Sequence[onnx.NodeProto],
    tensors: dict[str, np.ndarray],
    shapes: Mapping[str, Shape],
    constant: Constant,
    outputs: Sequence[str],
) -> list[onnx.NodeProto]:
    """Put Gathers that leave positions out in front of what only they read and what treats positions alike.

    Args:
        nodes: of a graph, in order; those that change are changed.
        tensors: the indices of Gathers that may move, by name; parts of constants are added.
        shapes: of values.
        constant: of the graph.
        outputs: names that have to stay: of the graph, and what sub-graphs read.

    Returns:
        The nodes in order.
    """
    makers = {name: node for node in nodes for name in node.output if name}
    readers = Counter([*(name for node in nodes for name in node.input), *outputs])
    before: dict[int, onnx.NodeProto] = {}  # of a node -> the Gather that is put in front of it
    for node in nodes:
        if node.op_type != "Gather" or (taken := tensors.get(node.input[1])) is None or taken.ndim != 1:
            continue
        shape, axis = shapes.get(node.input[0]), axis_of(node)
        if shape is None or taken.size >= shape[axis]:
            continue
        chain = _chain(node.input[0], shape, axis, makers, readers, shapes, constant)
        for member, _, operands in chain:
            for index, place in operands.items():
                values = constant(member.input[index])
                assert values is not None
                member.input[index] = f"{node.output[0]}/{member.output[0]}/{index}"
                tensors[member.input[index]] = values.take(taken, place)
        if chain:
            tail, (head, data, _) = chain[0][0], chain[-1]
            result, node.output[0] = node.output[0], f"{node.output[0]}/first"
            node.input[0], head.input[data] = head.input[data], node.output[0]
            tail.output[0] = result
            before[id(head)] = node
    moved = {id(node) for node in before.values()}
    ordered = []
    for node in nodes:
        if id(node) in before:
            ordered.append(before[id(node)])
        if id(node) not in moved:
            ordered.append(node)
    return ordered


def _chain(
    name: str,
    shape: Shape,
    axis: int,
    makers: Mapping[str, onnx.NodeProto],
    readers: Mapping[str, int],
    shapes: Mapping[str, Shape],
    constant: Constant,
) -> Chain:
    """What a Gather of a value's axis can move in front of."""
    chain: Chain = []
    while (node := makers.get(name)) is not None and readers[name] == 1:
        found = _operands(node, shape, axis, constant)
        if found is None or shapes.get(node.input[found[0]]) != shape:
            break
        chain.append((node, *found))
        name = node.input[found[0]]
    if (
        chain
        and node is not None
        and (node.op_type in FUSED or (node.op_type == "Add" and chain[-1][0].op_type in ALIKE))
    ):
        return []
    return chain


def _operands(node: onnx.NodeProto, shape: Shape, axis: int, constant: Constant) -> tuple[int, dict[int, int]] | None:
    """Which input is the data, and the constant operands that have channels; None where channels are not alone."""
    if node.domain not in STANDARD_DOMAINS or len(node.output) != 1:
        return None
    if node.op_type in ALIKE:
        return 0, {}
    values = [constant(name) for name in node.input]
    if node.op_type == "BatchNormalization" and axis == 1 and all(value is not None for value in values[1:]):
        return 0, dict.fromkeys(range(1, 5), 0)
    if node.op_type not in BINARY or (values[0] is None) == (values[1] is None):
        return None
    index = 0 if values[1] is None else 1
    other = values[index]
    assert other is not None
    place = axis - len(shape) + other.ndim
    return 1 - index, {index: place} if place >= 0 and other.shape[place] > 1 else {}
