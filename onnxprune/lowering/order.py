"""Outputs put into the order of their groups where the model allows it, so that nothing has to put them back.

The channels between a layer and its readers may stand in any order, as long as all tensors that carry them agree:
which these are, the labels of `onnxprune.structure` say. What works position by position carries any order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.graph.model import Model, encode, subgraphs
from onnxprune.lowering.layers import Layer
from onnxprune.structure.coupling import Coupling, Group, Member
from onnxprune.structure.rules import elementwise
from onnxprune.structure.site import Site

CARRIERS = {op for domain, op in elementwise.RULES if domain == ""} - {"SwiGLU"} | {
    *("BatchNormalization", "InstanceNormalization", "Concat", "Transpose", "Squeeze", "Unsqueeze", "MatMul", "Gemm"),
    *("GlobalAveragePool", "GlobalMaxPool", "AveragePool", "MaxPool", "LpPool", "GlobalLpPool"),
    *("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"),
}
"""Operators that treat all positions of an axis alike, or sum over them."""

UNMOVED = {"Reshape", "Flatten", "Resize", "Upsample", "Pad"}
"""Operators that do where the axis comes out as it went in, or each of its positions as a run."""


def absorb(coupling: Coupling, layers: Sequence[Layer]) -> Model | None:
    """The coupling's model with outputs in the order of groups, for every layer whose neighbours can follow.

    Where several layers feed the same channels, the one with the most outputs to move gets its order.

    Args:
        coupling: of the model that the layers are of.
        layers: with their covers.

    Returns:
        A model that computes the same; None where no layer gains.
    """
    wanted: dict[str, tuple[Group, np.ndarray]] = {}
    for layer in sorted(layers, key=lambda layer: -int(np.prod(layer.data))):
        if layer.cover.ordered:
            continue
        found = next((g for g in coupling.groups for m in g.producers if m.name == layer.name), None)
        if found is None or found.name in wanted:
            continue
        own = next(member for member in found.producers if member.name == layer.name)
        order = layer.cover.outputs.reshape(-1)
        if own.places.shape == (order.size, 1) and _carried(coupling, found):
            channel = np.empty(order.size, np.int64)  # position -> channel
            channel[own.places[:, 0]] = np.arange(order.size)
            take = np.empty(order.size, np.int64)
            take[channel] = channel[order]
            wanted[found.name] = (found, take)
    if not wanted:
        return None
    moves: dict[str, list[tuple[Member, np.ndarray]]] = {}
    for group, take in wanted.values():
        for member in group.members:
            moves.setdefault(member.name, []).append((member, take))
    return _moved(coupling.model, moves)


def _carried(coupling: Coupling, group: Group) -> bool:
    """Whether every node that the channels pass lets them stand in any order."""
    if group.heads:
        return False
    inside = np.zeros(coupling.solution.root.size, np.bool_)
    inside[group.classes] = True
    root = coupling.solution.root
    for site in (*coupling.flow.sites, *coupling.flow.refused):
        axes = [[a for a in operand or () if inside[root[a]].any()] for operand in site.inputs]
        results = [a for operand in site.outputs for a in operand if inside[root[a]].any()]
        if (any(axes) or results) and not _carries(site, [root[a] for found in axes for a in found], root, results):
            return False
    return True


def _carries(site: Site, given: Sequence[np.ndarray], root: np.ndarray, results: Sequence[np.ndarray]) -> bool:
    op = site.node.op_type
    if site.domain:
        return False
    if op in {"Conv", "ConvTranspose"}:
        group = int(site.attribute("group", 1))
        return group == 1 or (site.shape(1)[1] == 1 and site.shape(1)[0] == group)
    if op in UNMOVED:
        return all(
            any(a.size % g.size == 0 and np.array_equal(root[a], np.repeat(g, a.size // g.size)) for g in given)
            for a in results
        )
    return op in CARRIERS


def _moved(model: Model, moves: dict[str, list[tuple[Member, np.ndarray]]]) -> Model:
    """The model with tensors permuted along the axes of their members."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    values = {str(v.name): v.const_value for graph in model.graph.graphs() for v in graph.initializers.values()}
    for graph in subgraphs(proto):
        for tensor in graph.initializer:
            if tensor.name not in moves:
                continue
            stored = values[tensor.name]
            assert stored is not None
            array = model.current(stored)
            for member, take in moves[tensor.name]:
                index = np.arange(array.shape[member.axis])
                index[member.places] = member.places[take]
                array = np.take(array, index, member.axis)
            dims, kind, name = list(tensor.dims), tensor.data_type, tensor.name
            tensor.Clear()
            tensor.name, tensor.data_type = name, kind
            tensor.dims.extend(dims)
            tensor.raw_data = encode(array, ir.DataType(kind))
    return model.made(proto)
