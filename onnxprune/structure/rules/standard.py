"""The rules of the operators of ai.onnx."""

from __future__ import annotations

import onnx

from onnxprune.structure.facts import Facts, Shape, ShapeRule
from onnxprune.structure.rules import attention, elementwise, images, moving, norms, picking, products, recurrent
from onnxprune.structure.site import Rule

STANDARD: dict[tuple[str, str], Rule] = {
    **elementwise.RULES,
    **moving.RULES,
    **picking.RULES,
    **images.RULES,
    **products.RULES,
    **norms.RULES,
    **recurrent.RULES,
    **attention.RULES,
}


def _like_first(node: onnx.NodeProto, facts: Facts) -> list[Shape | None]:
    """The shape of the only result is that of the first operand."""
    return [facts.shapes.get(node.input[0])]


SHAPES: dict[tuple[str, str], ShapeRule] = {
    ("", op): _like_first for op in ("GroupNormalization", "MeanVarianceNormalization")
}
"""Operators that ONNX defines as functions, whose shapes its inference does not know."""
