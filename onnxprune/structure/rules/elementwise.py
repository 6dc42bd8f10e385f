"""Operators that work position by position: results live where their operands do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from onnxprune.structure.labels import Axis
from onnxprune.structure.site import NoRule, Rule, Site

ZERO_TO_ZERO = [
    "Abs",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitCast",
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
    "Cos",
    "Cosh",
    "Exp",
    "HardSigmoid",
    "IsInf",
    "IsNaN",
    "Not",
    "BitwiseNot",
    "Sigmoid",
    "Softplus",
]
"""Functions of one operand that take 0 to something else, and something finite."""

NOT_AT_ZERO = ["Acosh", "Log", "Reciprocal"]
"""Functions of one operand that are not finite at 0."""


def meet(site: Site, axes: Sequence[Axis]) -> Axis:
    """Axes that meet in numpy's broadcasting: the labels of the result's axis. One of a single position repeats."""
    long = [axis for axis in axes if axis.size != 1]
    for axis in axes if long else ():
        if axis.size == 1:
            site.pin(axis, "repeats its only position")
    long = long or list(axes)
    for other in long[1:]:
        site.labels.tie(long[0], other)
    return next((axis for axis in long if not site.labels.is_fixed(axis)), long[0])


def aligned(site: Site, operands: Sequence[int]) -> list[list[int | None]]:
    """For each operand and each axis of a broadcast result, the operand's axis that meets there."""
    ranks = [len(site.axes(i)) for i in operands]
    rank = max(ranks)
    starts = [rank - own for own in ranks]
    if site.version < 7 and len(operands) == 2 and site.attribute("broadcast", 0):
        named = site.attribute("axis")
        starts = [0, rank - ranks[1] if named is None else int(named) % rank]
    return [
        [i - start if 0 <= i - start < own else None for i in range(rank)]
        for start, own in zip(starts, ranks, strict=True)
    ]


def broadcast(site: Site, operands: Sequence[int]) -> list[Axis]:
    """The axes of numpy's broadcasting; before operator set 7, of ONNX's own."""
    places = zip(*aligned(site, operands), strict=True)
    return [meet(site, [site.axes(o)[p] for o, p in zip(operands, at, strict=True) if p is not None]) for at in places]


def carried(site: Site, operands: Sequence[int], result: Sequence[Axis]) -> list[list[bool]]:
    """Operands' nulls along the axes of a broadcast result; False along those that an operand repeats on."""
    found = []
    for operand, places in zip(operands, aligned(site, operands), strict=True):
        axes, nulls = site.axes(operand), site.null(operand)
        found.append(
            [p is not None and nulls[p] and axes[p].size == to.size for p, to in zip(places, result, strict=True)]
        )
    return found


def hold(site: Site, operand: int, why: str) -> None:
    """An operand that holds sizes, places or settings: it stays as it is."""
    if site.has(operand):
        for axis in site.inputs[operand] or ():
            site.pin(axis, why)


def finite(site: Site, operand: int, why: str) -> None:
    """An operand that must not be 0: a constant is left as it is, and what a masked model would null stays."""
    if site.constant[operand]:
        site.solid.append(operand)
        return
    for axis, null in zip(site.axes(operand), site.null(operand), strict=True):
        if null:
            site.pin(axis, why)


def _unary(keeps: bool) -> Callable[[Site], None]:
    def tie(site: Site) -> None:
        site.give(site.axes(), site.null(0) if keeps else ())

    return tie


def _not_at_zero(site: Site) -> None:
    finite(site, 0, "has no value at 0, which pruned positions would hold")
    site.give(site.axes())


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


def _together(combine: Callable[[list[bool]], bool]) -> Callable[[Site], None]:
    """Operators on any number of operands, all alike."""

    def tie(site: Site) -> None:
        operands = list(range(len(site.node.input)))
        axes = broadcast(site, operands)
        site.give(axes, [combine(list(part)) for part in zip(*carried(site, operands, axes), strict=True)])

    return tie


def _divide(site: Site) -> None:
    """Operators whose result is 0 where the first operand is, and that have no result where the second one is."""
    axes = broadcast(site, [0, 1])
    finite(site, 1, "divides by it, and pruned positions would hold 0")
    site.give(axes, carried(site, [0, 1], axes)[0])


def _pow(site: Site) -> None:
    axes = broadcast(site, [0, 1])
    exponent = site.content(1)
    positive = exponent is not None and bool((exponent > 0).all())
    if not positive:
        finite(site, 0, "raises it to a power that 0 may not have")
    site.give(axes, carried(site, [0, 1], axes)[0] if positive else ())
    site.solid.append(1)


def _where(site: Site) -> None:
    axes = broadcast(site, [0, 1, 2])
    _, *both = carried(site, [0, 1, 2], axes)
    site.give(axes, [a and b for a, b in zip(*both, strict=True)])


def _compare(site: Site) -> None:
    site.give(broadcast(site, list(range(len(site.node.input)))))


def _prelu(site: Site) -> None:
    axes = site.axes()
    if site.version < 7:  # one slope for each channel
        if len(site.axes(1)) != 1:
            raise NoRule(f"{site.what} has slopes of {len(site.axes(1))} axes, which operator set 7 brought")
        meet(site, [axes[min(1, len(axes) - 1)], site.axes(1)[0]])
    else:
        axes = tuple(broadcast(site, [0, 1]))
    site.give(axes, site.null(0))


def _dropout(site: Site) -> None:
    site.give(site.axes(), site.null(0))
    if len(site.node.output) > 1:
        site.give(site.axes())


def _swiglu(site: Site) -> None:
    axes = broadcast(site, [0, 1])
    site.give(axes, [any(part) for part in zip(*carried(site, [0, 1], axes), strict=True)])


RULES: dict[tuple[str, str], Rule] = {
    **{("", op): Rule(_unary(True)) for op in ZERO_TO_ZERO},
    **{("", op): Rule(_unary(False)) for op in OTHERS},
    **{("", op): Rule(_not_at_zero) for op in NOT_AT_ZERO},
    ("", "Clip"): Rule(_clip),
    **{("", op): Rule(_together(all)) for op in ["Add", "Sub", "Sum", "Mean", "Max", "Min"]},
    ("", "Mul"): Rule(_together(any)),
    **{("", op): Rule(_divide) for op in ["Div", "Mod"]},
    ("", "PRelu"): Rule(_prelu),
    ("", "Pow"): Rule(_pow),
    ("", "Where"): Rule(_where),
    ("", "SwiGLU"): Rule(_swiglu),
    ("", "Dropout"): Rule(_dropout),
    ("", "CastLike"): Rule(_unary(True)),
    **{
        ("", op): Rule(_compare)
        for op in ["And", "Or", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"]
    },
    **{("", op): Rule(_compare) for op in ["BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor"]},
}
