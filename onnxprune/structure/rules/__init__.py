"""The rules: for each operator, what it ties, what it pins, and which of its attributes name sizes."""

from __future__ import annotations

from onnxprune.structure.facts import ShapeRule
from onnxprune.structure.rules import (
    contrib,
    contrib_attention,
    contrib_shapes,
    quantised,
    standard,
)
from onnxprune.structure.site import Rule

RULES: dict[tuple[str, str], Rule] = {
    **standard.STANDARD,
    **quantised.RULES,
    **contrib.RULES,
    **contrib_attention.RULES,
}
"""(domain, operator) -> its rule. What a newer or older version of an operator does otherwise, its rule knows."""

SHAPES: dict[tuple[str, str], ShapeRule] = {**standard.SHAPES, **contrib_shapes.SHAPES}
"""(domain, operator) -> the shapes of its results, where ONNX's own inference does not know the operator."""
