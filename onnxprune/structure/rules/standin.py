"""Operators that do to labels what a standard one does: with other attributes, or with further operands between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, defs, helper

from onnxprune.structure.facts import Facts, Shape, ShapeRule
from onnxprune.structure.rules.standard import STANDARD
from onnxprune.structure.site import Site

VERSION = 13
"""The operator set that stand-ins belong to: the last one in which sizes and axes may be attributes."""


def standard(node: onnx.NodeProto, op_type: str, operands: Sequence[int]) -> onnx.NodeProto:
    """The node of ai.onnx that a node stands for: it has the same name, results and attributes, and some operands."""
    given = [node.input[i] if i < len(node.input) else "" for i in operands]
    while given and not given[-1]:
        given.pop()
    made = helper.make_node(op_type, given, list(node.output), name=node.name)
    known = defs.get_schema(op_type, VERSION, "").attributes
    made.attribute.extend(a for a in node.attribute if a.name in known)
    return made


def stand_in(site: Site, op_type: str, operands: Sequence[int], version: int = VERSION) -> Site:
    """A site as the rule of a standard operator sees it.

    Args:
        site: the node.
        op_type: the standard operator.
        operands: which of the node's operands it has, in its order.
        version: of the operator set.
    """
    node = standard(site.node, op_type, operands)
    given = operands[: len(node.input)]
    there = [i < len(site.inputs) for i in given]
    return Site(
        node,
        site.labels,
        site.facts,
        [site.inputs[i] if ok else None for i, ok in zip(given, there, strict=True)],
        [site.nulls[i] if ok else () for i, ok in zip(given, there, strict=True)],
        [site.constant[i] if ok else True for i, ok in zip(given, there, strict=True)],
        version,
        site.second,
        inexact=site.inexact,
        title=site.what,
    )


def take(site: Site, seen: Site, operands: Sequence[int]) -> None:
    """What was said of a stand-in holds for the node."""
    site.outputs += seen.outputs
    site.null_outputs += seen.null_outputs
    site.solid += [operands[i] for i in seen.solid]


def alike(site: Site, op_type: str, operands: Sequence[int], version: int = VERSION) -> None:
    """Apply the rule of a standard operator."""
    seen = stand_in(site, op_type, operands, version)
    STANDARD["", op_type].tie(seen)
    take(site, seen, operands)


def shaped(op_type: str, operands: Sequence[int], result: int = 0, like: int = 0) -> ShapeRule:
    """The shapes of results that are those of a standard operator.

    Args:
        op_type: the standard operator.
        operands: which of the node's operands it has.
        result: element type of the results, where it is not that of an operand.
        like: the operand that has the results' type.
    """

    def shapes(node: onnx.NodeProto, facts: Facts) -> list[Shape | None]:
        kind = result or facts.types.get(node.input[like], 0)
        facts.types.update({name: kind for name in node.output if name})
        return inferred(standard(node, op_type, operands), facts.shapes)

    return shapes


def inferred(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> list[Shape | None]:
    """What ONNX's shape inference says of a node's results, whatever the types of its operands."""
    if any(name and name not in shapes for name in node.input):
        return [None] * len(node.output)
    kinds = {name: TensorProto.FLOAT for name in node.input if name}
    if node.op_type == "Where":
        kinds[node.input[0]] = TensorProto.BOOL
    types = {name: helper.make_tensor_type_proto(kind, shapes[name]) for name, kind in kinds.items()}
    opsets = [helper.make_opsetid("", VERSION)]
    schema = defs.get_schema(node.op_type, VERSION, "")
    found = onnx.shape_inference.infer_node_outputs(schema, node, types, opset_imports=opsets, ir_version=8)
    return [
        tuple(d.dim_value for d in found[name].tensor_type.shape.dim) if name in found else None for name in node.output
    ]
