"""Operators that work position by position: results live where their operands do."""

from __future__ import annotations

from collections.abc import Callable

from onnxprune.structure.labels import Axis
from onnxprune.structure.site import Rule, Site

ZERO_TO_ZERO = [
    "Abs",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "Cast",
    "Ceil",
    "Celu",
    "Elu",
    "Erf",
    "Floor",
    "Gelu",
    "HardSwish",
    "Identity",
    "LeakyRelu",
    "Mish",
    "Neg",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sign",
    "Sin",
    "Sinh",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
"""Functions of one operand that take 0 to 0."""

OTHERS = [
    "Acos",
    "Acosh",
    "Cos",
    "Cosh",
    "Exp",
    "HardSigmoid",
    "IsInf",
    "IsNaN",
    "Log",
    "Not",
    "BitwiseNot",
    "Reciprocal",
    "Sigmoid",
    "Softplus",
]
"""Functions of one operand that take 0 to something else."""


def broadcast(site: Site, operands: list[int]) -> list[Axis]:
    """The axes of numpy's broadcasting: operands meet from the right, an axis of one position repeats."""
    shapes = [site.axes(i) for i in operands]
    rank = max(len(axes) for axes in shapes)
    result: list[Axis] = []
    for back in range(rank, 0, -1):
        meeting = [axes[-back] for axes in shapes if len(axes) >= back]
        long = [axis for axis in meeting if axis.size != 1] or meeting[:1]
        open_ = [axis for axis in long if not site.labels.is_fixed(axis)]
        for other in long[1:]:
            site.labels.tie(long[0], other)
        result.append(open_[0] if open_ else long[0])
    return result


def carried(site: Site, operand: int, rank: int) -> list[bool]:
    """An operand's nulls, for the axes of a broadcast result; False along those that it repeats on."""
    axes, nulls = site.axes(operand), site.null(operand)
    missing = rank - len(axes)
    result = site.facts.shapes.get(site.node.output[0])
    kept = [
        null and (result is None or axis.size == result[missing + i])
        for i, (axis, null) in enumerate(zip(axes, nulls, strict=True))
    ]
    return [False] * missing + kept


def _unary(keeps: bool) -> Callable[[Site], None]:
    def tie(site: Site) -> None:
        site.give(site.axes(), site.null(0) if keeps else ())

    return tie


def _clip(site: Site) -> None:
    bounds = [site.attribute("min"), site.attribute("max")]
    for i in (1, 2):
        content = site.content(i)
        if site.has(i) and content is None:
            site.give(site.axes())
            return
        if content is not None and content.size:
            bounds[i - 1] = float(content.reshape(-1)[0])
    low, high = bounds
    site.give(site.axes(), site.null(0) if (low is None or low <= 0) and (high is None or high >= 0) else ())


def _together(combine: Callable[[list[bool]], bool], zeroed: bool) -> Callable[[Site], None]:
    """Operators on any number of operands, all alike."""

    def tie(site: Site) -> None:
        operands = list(range(len(site.node.input)))
        axes = broadcast(site, operands)
        parts = [carried(site, i, len(axes)) for i in operands]
        site.give(axes, [combine(list(part)) for part in zip(*parts, strict=True)])
        if zeroed:
            site.zeroed += operands

    return tie


def _left(zeroed: bool) -> Callable[[Site], None]:
    """Operators whose result is 0 where the first operand is: a second one that is zeroed would do harm."""

    def tie(site: Site) -> None:
        axes = broadcast(site, [0, 1])
        site.give(axes, carried(site, 0, len(axes)))
        if zeroed:
            site.zeroed += [0, 1]
        else:
            site.solid.append(1)

    return tie


def _pow(site: Site) -> None:
    axes = broadcast(site, [0, 1])
    exponent = site.content(1)
    positive = exponent is not None and bool((exponent > 0).all())
    site.give(axes, carried(site, 0, len(axes)) if positive else ())
    site.solid.append(1)


def _where(site: Site) -> None:
    axes = broadcast(site, [0, 1, 2])
    both = zip(carried(site, 1, len(axes)), carried(site, 2, len(axes)), strict=True)
    site.give(axes, [a and b for a, b in both])


def _compare(site: Site) -> None:
    site.give(broadcast(site, list(range(len(site.node.input)))))
    site.solid += range(len(site.node.input))


def _prelu(site: Site) -> None:
    axes = broadcast(site, [0, 1])
    site.give(axes, carried(site, 0, len(axes)))
    site.zeroed.append(1)


def _dropout(site: Site) -> None:
    site.give(site.axes(), site.null(0))
    if len(site.node.output) > 1:
        site.give(site.axes())


def _cast_like(site: Site) -> None:
    site.give(site.axes(), site.null(0))


RULES: dict[tuple[str, str], Rule] = {
    **{("", op): Rule(_unary(True)) for op in ZERO_TO_ZERO},
    **{("", op): Rule(_unary(False)) for op in OTHERS},
    ("", "Clip"): Rule(_clip),
    ("", "Add"): Rule(_together(all, True)),
    ("", "Sub"): Rule(_together(all, True)),
    ("", "Sum"): Rule(_together(all, True)),
    ("", "Mean"): Rule(_together(all, True)),
    ("", "Max"): Rule(_together(all, False)),
    ("", "Min"): Rule(_together(all, False)),
    ("", "Mul"): Rule(_together(any, True)),
    ("", "Div"): Rule(_left(False)),
    ("", "Mod"): Rule(_left(False)),
    ("", "PRelu"): Rule(_prelu),
    ("", "Pow"): Rule(_pow),
    ("", "Where"): Rule(_where),
    ("", "Dropout"): Rule(_dropout),
    ("", "CastLike"): Rule(_cast_like),
    **{
        ("", op): Rule(_compare)
        for op in ["And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
    },
    **{("", op): Rule(_compare) for op in ["BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"]},
}
