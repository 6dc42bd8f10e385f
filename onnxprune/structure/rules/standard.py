"""The rules of the operators of ai.onnx."""

from __future__ import annotations

import numpy as np
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


def _picked(node: onnx.NodeProto, facts: Facts) -> list[Shape | None]:
    """As many positions as a condition that is settled says, along one axis or of all."""
    shape, condition = facts.shapes.get(node.input[0]), facts.contents.get(node.input[1])
    if shape is None or condition is None:
        return [None]
    count, along = int(np.count_nonzero(condition)), next((a.i for a in node.attribute if a.name == "axis"), None)
    return [(count,) if along is None else (*shape[: along % len(shape)], count, *shape[along % len(shape) + 1 :])]


def _windows(node: onnx.NodeProto, facts: Facts) -> list[Shape | None]:
    """Windows of a signal, each transformed: ONNX's inference forgets that they are one-sided unless told otherwise."""
    signal, step = facts.shapes.get(node.input[0]), facts.contents.get(node.input[1])
    given = [*node.input, "", ""]
    length = facts.contents.get(given[3])
    if length is None and given[2] in facts.shapes:
        length = np.array(facts.shapes[given[2]][0])
    if signal is None or step is None or length is None:
        return [None]
    size, sides = int(length), next((a.i for a in node.attribute if a.name == "onesided"), 1)
    return [(signal[0], (signal[1] - size) // int(step) + 1, size // 2 + 1 if sides else size, 2)]


SHAPES: dict[tuple[str, str], ShapeRule] = {
    **{("", op): _like_first for op in ("GroupNormalization", "MeanVarianceNormalization")},
    ("", "Compress"): _picked,
    ("", "STFT"): _windows,
}
"""Operators whose shapes ONNX's inference does not know, or gets wrong: functions, and sizes that contents say."""
