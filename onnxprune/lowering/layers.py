"""The layers of a model that can be lowered: a node, its weight in role order, and what it works on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from onnxprune.graph import expression as ex
from onnxprune.graph.model import Model
from onnxprune.graph.trace import Tracer, Untraceable, Use
from onnxprune.graph.weights import Skipped, Weight, find
from onnxprune.lowering.cover import Cover, cover
from onnxprune.structure.facts import Facts

CONVOLUTIONS = {"Conv", "ConvTranspose"}
PRODUCTS = {"MatMul", "Gemm"}
RECURRENT = {"LSTM", "GRU", "RNN"}


@dataclass(frozen=True, eq=False)
class Layer:
    """One node with a constant weight that has a cover.

    Attributes:
        name: of the weight.
        node: as it stands in the graph.
        weight: (outputs, inputs of a part, *kernel), in the type it is computed in.
        operand: the weight as the node reads it.
        bias: (outputs,) or None; for MatMul always None.
        data: shape of what the node works on.
        single: whether all axes of the data but the last two have one position, whatever the open sizes.
        cover: what its zeros allow.
        opset: of the standard operators.
        parts: equal runs of outputs that read inputs of their own: groups that a convolution has, matrices of a batch.
    """

    name: str
    node: onnx.NodeProto
    weight: np.ndarray = field(repr=False)
    operand: np.ndarray = field(repr=False)
    bias: np.ndarray | None
    data: tuple[int, ...]
    single: bool
    cover: Cover
    opset: int
    parts: int = 1

    @property
    def result(self) -> str:
        """The node's first output that is read."""
        return next(str(name) for name in self.node.output if name)

    @property
    def batch(self) -> int:
        """Matrices that a product has; 1 for what is none."""
        return self.parts if self.node.op_type in PRODUCTS else 1

    @property
    def idle(self) -> bool:
        """Whether none of its outputs reads some of its inputs."""
        cover = self.cover
        read: int = np.unique(cover.inputs[cover.live]).size
        return read < int(self.weight.shape[1]) * self.parts

    def attribute(self, name: str, default: int = 0) -> int:
        """An integer attribute."""
        return next((int(a.i) for a in self.node.attribute if a.name == name), default)


def layers(model: Model, facts: Facts, others: Facts) -> tuple[list[Layer], list[Skipped]]:
    """What can be lowered, and which weights with many zeros cannot, with the reason.

    Args:
        model: as `structure.prepare` makes it.
        facts: shapes of its values.
        others: the same with another choice for what is open.
    """
    opset = next(o.version for o in model.proto.opset_import if o.domain in ("", "ai.onnx"))
    nodes = {name: node for node in model.proto.graph.node for name in node.output if name}
    tracer = Tracer(model.graph)
    found: list[Layer] = []
    skipped: list[Skipped] = []
    for weight in find(model)[0]:
        for use in weight.uses:
            if use.op_type == "Gather":
                continue
            values = _values(model, use)
            rows = use.view(values)
            live = np.asarray(rows.reshape(*rows.shape[:2], -1).any(2))
            if live.mean() > 0.85 or min(live.shape) < 2:
                continue
            layer = _layer(model, (facts, others), weight, use, tracer, nodes, live, rows, values, opset)
            if isinstance(layer, Layer):
                found.append(layer)
            else:
                skipped.append(Skipped(weight.name, use.op_type, layer))
    return found, skipped


def _layer(
    model: Model,
    facts: tuple[Facts, Facts],
    weight: Weight,
    use: Use,
    tracer: Tracer,
    nodes: Mapping[str, onnx.NodeProto],
    live: np.ndarray,
    rows: np.ndarray,
    values: np.ndarray,
    opset: int,
) -> Layer | str:
    """A layer, or the reason why it stays dense."""
    node = None if use.site is None else next((nodes[str(o.name)] for o in use.site.outputs if o.name in nodes), None)
    reason = _obstacle(use, node)
    if node is None or reason:
        return reason
    name = node.input[0 if use.operand else 1]
    shape, other = (f.shapes.get(name) for f in facts)
    if shape is None:
        return f"the shape of its data is not known: {facts[0].unknown.get(name, 'no inference')}"
    bias = _bias(model, use, tracer, rows.shape[0])
    if isinstance(bias, str):
        return bias
    batch = values.shape[:-2] if node.op_type in PRODUCTS else ()
    parts = weight.parts if node.op_type in CONVOLUTIONS else math.prod(batch)
    if batch and not (shape[:-2] == batch == (other or ())[:-2] or (parts == 1 and len(shape) >= values.ndim)):
        return f"its batch of {_by(batch)} matrices multiplies one of {_by(shape[:-2])}; only equal ones have a form"
    if node.op_type in PRODUCTS and parts > 1 and values.dtype == np.float16:
        return "onnxruntime crashes at what follows a lowered batch of 16-bit matrices"
    found = cover(live, parts, joint=node.op_type in RECURRENT)
    if found is None:
        return "no groups of its outputs share enough zero inputs"
    single = other is not None and math.prod(shape[:-2]) * math.prod(other[:-2]) == 1
    return Layer(weight.name, node, rows, values, bias, shape, single, found, opset, parts)


def _values(model: Model, use: Use) -> np.ndarray:
    return ex.compute(use.expression, lambda leaf: model.current(leaf.tensor))


def _scaled(expression: ex.Expression) -> bool:
    """Whether values are computed, so that storing the result would store something larger."""
    if isinstance(expression, ex.Leaf):
        return False
    if isinstance(expression, ex.Scale):
        return not expression.keeps or _scaled(expression.arg)
    return any(_scaled(arg) for arg in expression.args)


def _by(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes)) or "one"


def _obstacle(use: Use, node: onnx.NodeProto | None) -> str:
    """Why a use stays as it is; empty where nothing is against it."""
    known = CONVOLUTIONS | PRODUCTS | RECURRENT
    if use.op_type not in known or (use.site is not None and use.site.domain not in ("", "ai.onnx")):
        return f"{use.op_type} has no lowered form"
    if use.op_type in RECURRENT and use.operand != 1:
        return f"what the {use.op_type} multiplies it by is its own last state, of which nothing can be left out"
    if node is None:
        return f"the {use.op_type} is in a sub-graph"
    if _scaled(use.expression):
        return "it is quantised; lower the model before quantising it"
    if use.op_type in PRODUCTS:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if use.operand != 1 or attributes.get("transA", 0):
            return f"the {use.op_type} multiplies it from the other side"
        if attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return "the Gemm scales what it multiplies"
    return ""


def _bias(model: Model, use: Use, tracer: Tracer, outputs: int) -> np.ndarray | str | None:
    """What the operator adds, an entry for each output; or why it stays dense."""
    node = use.site
    if node is None or node.op_type == "MatMul" or node.op_type in RECURRENT or len(node.inputs) < 3:
        return None
    value = node.inputs[2]
    if value is None:
        return None
    what = f"the bias '{value.name}' of its {node.op_type}"
    if not tracer.is_constant(value, use.scope):
        return f"{what} is computed"
    try:
        values = ex.compute(tracer.trace(value, use.scope), lambda leaf: model.current(leaf.tensor))
    except Untraceable as reason:
        return f"{what} is computed: {reason}"
    if values.size != outputs:
        return f"{what} has the shape {list(values.shape)}"
    return values.reshape(-1)
