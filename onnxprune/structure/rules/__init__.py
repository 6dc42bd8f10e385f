"""The rules: for each operator, what it ties, what it pins, and which of its attributes name sizes."""

from __future__ import annotations

from onnxprune.structure.facts import ShapeRule
from onnxprune.structure.rules import elementwise, moving, norms, products, quantised, recurrent
from onnxprune.structure.site import Rule

RULES: dict[tuple[str, str], Rule] = {
    **elementwise.RULES,
    **moving.RULES,
    **products.RULES,
    **norms.RULES,
    **recurrent.RULES,
    **quantised.RULES,
}
"""(domain, operator) -> its rule. What a newer or older version of an operator does otherwise, its rule knows."""

SHAPES: dict[tuple[str, str], ShapeRule] = {}
"""(domain, operator) -> the shapes of its results, where ONNX's own inference does not know the operator."""
