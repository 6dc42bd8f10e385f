"""What a layer with a cover can be written as: nodes of the standard operators, each the same function of its data.

A form is one function from a layer to a `Piece`. Which one is fastest depends on the machine and on sizes, and is
measured; adding one is one function in FORMS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune.lowering.cover import Cover
from onnxprune.lowering.layers import CONVOLUTIONS, PRODUCTS, RECURRENT, Layer

BLOCK = 16
"""Channels that the kernels of convolutions take at once, at most."""


@dataclass
class Piece:
    """Nodes and the tensors they read; inner names are made from the layer's result.

    Attributes:
        stem: what inner names begin with.
        data: the name of what the layer works on.
        nodes: in order.
        tensors: name -> values.
    """

    stem: str
    data: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def add(self, op: str, inputs: list[str], tag: str = "", **attributes: Any) -> str:
        """Append a node; returns the name of its result."""
        name = f"{self.stem}/{tag or op.lower()}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def store(self, values: np.ndarray, tag: str) -> str:
        """Keep a tensor; returns its name."""
        name = f"{self.stem}/{tag}_{len(self.tensors)}"
        self.tensors[name] = np.ascontiguousarray(values)
        return name

    def end(self, result: str) -> Piece:
        """Give the last node's result the layer's name."""
        self.nodes[-1].output[0] = result
        return self


Form = Callable[[Layer], Piece]


def _start(layer: Layer) -> Piece:
    return Piece(f"{layer.result}/lowered", layer.node.input[0])


def packed(layer: Layer, cover: Cover) -> np.ndarray:
    """(groups, size, kept, *kernel): the weights that are left."""
    columns = cover.inputs % layer.weight.shape[1]
    found = layer.weight[cover.outputs[:, :, None], columns[:, None, :]]
    dead = ~cover.live[:, None, :].reshape(cover.groups, 1, cover.kept, *[1] * (found.ndim - 3))
    return np.where(dead, found.dtype.type(0), found)


def _order(piece: Piece, cover: Cover, value: str, axis: int) -> str:
    """Outputs back in their places."""
    if cover.ordered:
        return value
    back = np.argsort(cover.outputs.reshape(-1), kind="stable")
    return piece.add("Gather", [value, piece.store(back, "order")], "ordered", axis=axis)


# -------------------------------------------------------------------------------------------------- convolutions


def _attributes(layer: Layer, group: int) -> dict[str, Any]:
    kept = {a.name: helper.get_attribute_value(a) for a in layer.node.attribute if a.name != "group"}
    return {**kept, "group": group} if group > 1 else kept


def _kernel(layer: Layer, weights: np.ndarray) -> np.ndarray:
    """(groups, size, kept, *kernel) as the operator stores several groups."""
    if layer.node.op_type == "ConvTranspose":
        weights = weights.swapaxes(1, 2)
    return weights.reshape(-1, *weights.shape[2:])


def grouped(layer: Layer) -> Piece:
    """One Gather of all groups' channels, one convolution of so many groups."""
    return _grouped(layer, layer.cover)


def padded(layer: Layer) -> Piece:
    """The same, each group's channels filled up to whole blocks: the blocked kernels take no others."""
    return _grouped(layer, layer.cover.padded(BLOCK))


def _grouped(layer: Layer, cover: Cover) -> Piece:
    piece = _start(layer)
    gathered = piece.add("Gather", [piece.data, piece.store(cover.inputs.reshape(-1), "inputs")], "gathered", axis=1)
    operands = [gathered, piece.store(_kernel(layer, packed(layer, cover)), "weight")]
    if layer.bias is not None:
        operands.append(piece.store(layer.bias[cover.outputs.reshape(-1)], "bias"))
    out = piece.add(layer.node.op_type, operands, "grouped", **_attributes(layer, cover.groups))
    _order(piece, cover, out, 1)
    return piece.end(layer.result)


def split(layer: Layer) -> Piece:
    """A Gather and a convolution for each group, and a Concat."""
    piece, cover = _start(layer), layer.cover
    weights = packed(layer, cover)
    results = []
    for group in range(cover.groups):
        chosen = cover.live[group]
        indices = piece.store(cover.inputs[group][chosen], "inputs")
        gathered = piece.add("Gather", [piece.data, indices], "gathered", axis=1)
        operands = [gathered, piece.store(_kernel(layer, weights[group : group + 1][:, :, chosen]), "weight")]
        if layer.bias is not None:
            operands.append(piece.store(layer.bias[cover.outputs[group]], "bias"))
        results.append(piece.add(layer.node.op_type, operands, "group", **_attributes(layer, 1)))
    out = piece.add("Concat", results, axis=1)
    _order(piece, cover, out, 1)
    return piece.end(layer.result)


# ---------------------------------------------------------------------------------------------- matrix products


def _columns(layer: Layer, piece: Piece) -> tuple[str, list[str]]:
    """The data with channels before positions, where a Gather moves whole rows; and its shape where it is flattened.

    The matrices of a batch lie one under the other; their shape is that before they are transposed back.
    """
    rank, data = len(layer.data), piece.data
    if layer.batch > 1 or (rank > 2 and layer.single):
        columns = piece.add("Transpose", [data], "columns", perm=[*range(rank - 2), rank - 1, rank - 2])
        if layer.batch == 1:
            return columns, []
        flat = piece.store(np.array([layer.batch * layer.data[-1], -1], np.int64), "flat")
        ends = np.array([*layer.data[:-2], layer.weight.shape[0] // layer.batch, -1], np.int64)
        return piece.add("Reshape", [columns, flat], "flat"), [piece.store(ends, "shape")]
    shape: list[str] = []
    if rank != 2:
        shape = [piece.store(np.array([layer.weight.shape[0]], np.int64), "outputs")]
        if rank > 2:
            whole = piece.add("Shape", [data])
            limits = [piece.store(np.array([i], np.int64), "limit") for i in (0, -1)]
            shape = [piece.add("Concat", [piece.add("Slice", [whole, *limits], "lead"), *shape], "shape", axis=0)]
        data = piece.add("Reshape", [data, piece.store(np.array([-1, layer.data[-1]], np.int64), "flat")], "flat")
    return piece.add("Transpose", [data], "columns", perm=[1, 0]), shape


def _back(layer: Layer, piece: Piece, value: str, shape: list[str]) -> Piece:
    """Channels last again, in their order, with the bias."""
    rank = 2 if shape else len(layer.data)
    value = _order(piece, layer.cover, value, rank - 2)
    if layer.batch > 1:
        value, shape, rank = piece.add("Reshape", [value, *shape], "batch"), [], len(layer.data)
    value = piece.add("Transpose", [value], "rows", perm=[*range(rank - 2), rank - 1, rank - 2])
    return _finish(layer, piece, value, shape)


def _finish(layer: Layer, piece: Piece, value: str, shape: list[str], bias: bool = True) -> Piece:
    if bias and layer.bias is not None:
        value = piece.add("Add", [value, piece.store(layer.bias, "bias")], "biased")
    if shape:
        piece.add("Reshape", [value, *shape], "unflat")
    return piece.end(layer.result)


def batched(layer: Layer) -> Piece:
    """One Gather of rows of the transposed data, one batched MatMul."""
    piece, cover = _start(layer), layer.cover
    columns, shape = _columns(layer, piece)
    rank = 2 if shape else len(layer.data)
    gathered = piece.add("Gather", [columns, piece.store(cover.inputs, "inputs")], "gathered", axis=rank - 2)
    out = piece.add("MatMul", [piece.store(packed(layer, cover), "weight"), gathered], "grouped")
    merged = piece.store(np.array([0] * (rank - 2) + [layer.weight.shape[0], -1], np.int64), "merged")
    return _back(layer, piece, piece.add("Reshape", [out, merged], "merged"), shape)


def pointwise(layer: Layer) -> Piece:
    """One Gather of rows of the transposed data, one 1x1 convolution of so many groups: its kernels are blocked."""
    piece, cover = _start(layer), layer.cover.padded(BLOCK)
    columns, shape = _columns(layer, piece)
    rank = 2 if shape else len(layer.data)
    indices = piece.store(cover.inputs.reshape(-1), "inputs")
    gathered = piece.add("Gather", [columns, indices], "gathered", axis=rank - 2)
    image = piece.store(np.array([1, cover.inputs.size, -1, 1], np.int64), "image")
    weights = packed(layer, cover)
    operands = [
        piece.add("Reshape", [gathered, image], "image"),
        piece.store(weights.reshape(-1, cover.kept, 1, 1), "weight"),
    ]
    out = piece.add("Conv", operands, "grouped", **({"group": cover.groups} if cover.groups > 1 else {}))
    merged = piece.store(np.array([1] * (rank - 2) + [layer.weight.shape[0], -1], np.int64), "merged")
    return _back(layer, piece, piece.add("Reshape", [out, merged], "merged"), shape)


def products(layer: Layer) -> Piece:
    """A Gather of rows of the transposed data and a Gemm for each group, and a Concat."""
    piece, cover = _start(layer), layer.cover
    weights = packed(layer, cover)
    rank = len(layer.data)
    columns, shape = _columns(layer, piece)
    if rank > 2 and not shape:  # the positions in front are one
        flat = piece.store(np.array([layer.data[-1], -1], np.int64), "flat")
        columns = piece.add("Reshape", [columns, flat], "flat")
        ends = np.array([1] * (rank - 2) + [-1, layer.weight.shape[0]], np.int64)
        shape = [piece.store(ends, "shape")]
    results = []
    for group in range(cover.groups):
        chosen = cover.live[group]
        gathered = piece.add("Gather", [columns, piece.store(cover.inputs[group][chosen], "inputs")], axis=0)
        operands = [gathered, piece.store(weights[group][:, chosen].T, "weight")]
        if layer.bias is not None:
            operands.append(piece.store(layer.bias[cover.outputs[group]], "bias"))
        results.append(piece.add("Gemm", operands, "group", transA=1))
    out = _order(piece, cover, piece.add("Concat", results, axis=1), 1)
    return _finish(layer, piece, out, shape, bias=False)


def narrowed(layer: Layer) -> Piece:
    """A Gather of the inputs that are read, and the recurrent operator with as many fewer: it has no groups."""
    piece, inputs = _start(layer), layer.cover.inputs[0]
    node = onnx.NodeProto.FromString(layer.node.SerializeToString())
    node.input[0] = piece.add("Gather", [piece.data, piece.store(inputs, "inputs")], "gathered", axis=2)
    node.input[1] = piece.store(layer.operand[..., inputs], "weight")
    piece.nodes.append(node)
    return piece


FORMS: dict[str, dict[str, Form]] = {
    "Conv": {"grouped": grouped, "padded": padded, "split": split},
    "ConvTranspose": {"grouped": grouped, "split": split},
    "MatMul": {"batched": batched, "pointwise": pointwise, "products": products},
    "Gemm": {"batched": batched, "pointwise": pointwise, "products": products},
    **{op: {"narrowed": narrowed} for op in sorted(RECURRENT)},
}
"""Operator -> the names and functions of its forms."""


def candidates(layer: Layer) -> dict[str, Form]:
    """The forms that differ for a layer."""
    forms = dict(FORMS[layer.node.op_type])
    if layer.node.op_type in CONVOLUTIONS:
        if layer.cover.kept % BLOCK == 0 or layer.cover.kept < BLOCK // 2:
            forms.pop("padded", None)
        if layer.cover.groups == 1:
            forms.pop("split")
    if layer.batch > 1:
        forms.pop("products", None)
    if layer.node.op_type in PRODUCTS and layer.weight.dtype == np.float16:
        return {"products": products}  # onnxruntime 1.32 crashes at a MatMul behind the others' last Transpose
    return forms
