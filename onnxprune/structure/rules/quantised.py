"""Quantised operators: scales and zero points go along the axis they belong to.

Nulls and zeroes are meant as real numbers: a quantised value holds 0 where it holds its zero point.
"""

from __future__ import annotations

from collections.abc import Callable

from onnxprune.structure.labels import Axis
from onnxprune.structure.rules.contrib_attention import attention, resize_heads
from onnxprune.structure.rules.products import resize_group
from onnxprune.structure.rules.recurrent import recurrent
from onnxprune.structure.rules.standin import alike, stand_in, take
from onnxprune.structure.site import Cut, NoRule, Rule, Site

CONTRIB = "com.microsoft"
NCHW_ONLY = "keeps channels last, as made for one machine; prune before onnxruntime optimises for the machine"


# ---------------------------------------------------------------- scales and zero points


def beside(site: Site, axis: Axis, *operands: int) -> None:
    """Parameters with one entry for all, or one per position of an axis."""
    for operand in operands:
        if not site.has(operand):
            continue
        site.solid.append(operand)
        _alone(site, operand)
        long = [other for other in site.axes(operand) if other.size != 1]
        if not long:
            continue
        if len(long) > 1 or long[0].size != axis.size:
            raise NoRule(f"{site.what} has a scale or zero point of the shape {list(site.shape(operand))}")
        site.labels.tie(long[0], axis)


def single(site: Site, *operands: int) -> None:
    """Parameters with one entry for all."""
    for operand in operands:
        if site.has(operand):
            site.solid.append(operand)
            _alone(site, operand)
            if any(axis.size != 1 for axis in site.axes(operand)):
                raise NoRule(f"{site.what} has a scale or zero point of the shape {list(site.shape(operand))}")


def _alone(site: Site, operand: int) -> None:
    for axis in site.axes(operand):
        if axis.size == 1:
            site.pin(axis, "scales all entries by it")


def _shift(site: Site, operand: int, zero_point: int, axis: int = 0) -> None:
    """Say where the zero point of an operand is kept, for one that is stored."""
    if site.has(zero_point):
        site.shifted[operand] = (zero_point, axis)


def _ranged(site: Site, operand: int, axis: int) -> None:
    """Quantised by its own range, which always takes in 0: what is pruned does not matter where it is 0."""
    if not site.null(operand)[axis]:
        why = "takes its scale from the largest entry, and what is pruned is not 0 there"
        site.pin(site.axes(operand)[axis], why)


# ---------------------------------------------------------------- QuantizeLinear, DequantizeLinear


def _linear(site: Site) -> None:
    axes = site.axes()
    axis = site.axis("axis", 1) if len(axes) > 1 else 0
    block = int(site.attribute("block_size", 0))
    _shift(site, 0, 2, axis)
    if not axes:
        single(site, 1, 2)
    elif block:
        for operand in (1, 2):
            if site.has(operand):
                _blocks(site, axes, site.axes(operand), axis, block)
                site.solid.append(operand)
    else:
        beside(site, axes[axis], 1, 2)
    site.give(axes, site.null(0))


def _blocks(site: Site, axes: tuple[Axis, ...], scales: tuple[Axis, ...], axis: int, block: int) -> None:
    """Scales with one entry per block along one axis: blocks go as a whole."""
    for i, (long, short) in enumerate(zip(axes, scales, strict=True)):
        if i != axis:
            site.labels.tie(long, short)
        elif short.size * block == long.size:
            site.labels.relate(long, [short, site.fixed(block, "has a scale per block")], site.what)
        else:
            site.pin(long, "has a last block that is not full")
            site.pin(short, "has a last block that is not full")


def _dynamic(site: Site) -> None:
    for i in range(len(site.axes())):
        _ranged(site, 0, i)
    site.give(site.axes(), site.null(0))
    site.give([])
    site.give([])


# ---------------------------------------------------------------- products


def _conv(site: Site) -> None:
    """QLinearConv: the bias is of 32-bit integers, with no zero point."""
    if site.attribute("channels_last", 0):
        raise NoRule(f"{site.what} {NCHW_ONLY}")
    alike(site, "Conv", (0, 3, 8))
    beside(site, site.axes(3)[0], 4, 5)
    single(site, 1, 2, 6, 7)


def _resize_conv(site: Site, cut: Cut) -> None:
    resize_group(site, cut, 0, 3)


def _conv_integer(site: Site) -> None:
    alike(site, "Conv", (0, 1))
    single(site, 2)
    beside(site, site.axes(1)[0], 3)


def _product(a: int, b: int, left: tuple[int, ...], right: tuple[int, ...], alone: tuple[int, ...] = ()) -> Rule:
    """MatMul of quantised operands.

    Args:
        a: the left operand.
        b: the right operand.
        left: parameters of its rows.
        right: parameters of its columns.
        alone: further parameters.
    """

    def tie(site: Site) -> None:
        alike(site, "MatMul", (a, b))
        if len(site.axes(a)) > 1:
            beside(site, site.axes(a)[-2], *left)
        if len(site.axes(b)) > 1:
            beside(site, site.axes(b)[-1], *right)
        single(site, *alone)

    return Rule(tie)


def _biased(tie: Callable[[Site], None], operand: int, ranged: bool) -> Rule:
    """A product with a bias of its columns, whose left operand may be quantised by its own range."""

    def biased(site: Site) -> None:
        tie(site)
        if ranged:
            for i in range(len(site.axes())):
                _ranged(site, 0, i)
        if site.has(operand):
            columns, nulls = site.outputs[0][-1], site.null_outputs[0]
            site.labels.tie(site.axes(operand)[-1], columns)
            site.null_outputs[0] = (*(False for _ in nulls[:-1]), nulls[-1] and site.null(operand)[-1])

    return Rule(biased)


def _gemm(site: Site) -> None:
    alike(site, "Gemm", (0, 3, 6))
    beside(site, site.axes(3)[0 if site.attribute("transB", 0) else 1], 4, 5)
    single(site, 1, 2, 7, 8)


def _blocked_product(site: Site) -> None:
    """MatMulNBits: outputs go row by row, inputs block by block.

    Codes of several bits share a byte, and none of them need mean 0; in a masked model the scales are zeroed.
    """
    x, codes, scales = site.axes(0), site.axes(1), site.axes(2)
    outputs, inputs = int(site.attribute("N")), int(site.attribute("K"))
    bits, block = int(site.attribute("bits", 4)), int(site.attribute("block_size"))
    if site.attribute("weight_prepacked", 0) or site.has(4):
        raise NoRule(f"{site.what} has its weights in an order made for one machine")
    if len(codes) != 3 or len(scales) != 2 or codes[0].size != outputs or x[-1].size != inputs:
        raise NoRule(f"{site.what} has codes of the shape {list(site.shape(1))}, scales of {list(site.shape(2))}")
    rows, blocks = scales
    site.labels.tie(codes[0], rows)
    site.labels.tie(codes[1], blocks)
    site.pin(codes[2], "packs several weights in a byte")
    site.solid += [i for i in (1, 3) if site.has(i)]
    whole = blocks.size * block == inputs
    if whole:
        site.labels.relate(x[-1], [blocks, site.fixed(block, "has a scale per block")], site.what)
    else:
        site.pin(x[-1], "has a last block that is not full")
        site.pin(blocks, "has a last block that is not full")
    if site.has(3):
        zero_points = site.axes(3)
        if len(zero_points) != 2:
            raise NoRule(f"{site.what} has zero points of the shape {list(site.shape(3))}")
        site.labels.tie(zero_points[0], rows)
        if zero_points[1].size == blocks.size and (bits == 8 or blocks.size > 1):
            site.labels.tie(zero_points[1], blocks)
        else:
            site.pin(zero_points[1], "packs several zero points in a byte")
            site.pin(blocks, "packs several zero points in a byte")
    null = site.constant[2]
    if site.has(5):
        site.labels.tie(site.axes(5)[0], rows)
        null = null and site.constant[5]
    site.give([*x[:-1], rows], [*(False for _ in x[:-1]), null])


def _resize_blocked_product(site: Site, cut: Cut) -> None:
    cut.set_attribute(site, "N", cut.count(site.axes(1)[0]))
    cut.set_attribute(site, "K", cut.count(site.axes(0)[-1]))


def _attention(site: Site) -> None:
    attention(site, {"mask": 5}, 8)
    single(site, 3, 6)
    beside(site, site.axes(1)[1], 4, 7)


def _lstm(site: Site) -> None:
    """DynamicQuantizeLSTM: weights are (directions, inputs, gates and units), inputs and states quantised by range."""
    operands = tuple(range(8))
    seen = stand_in(site, "LSTM", operands)
    for i in (1, 2):
        ways, inputs, units = site.axes(i)
        seen.inputs[i] = (ways, units, inputs)
        seen.nulls[i] = tuple(site.null(i)[axis] for axis in (0, 2, 1))
    recurrent(seen)
    take(site, seen, operands)
    for i in range(3):
        _ranged(site, 0, i)
    for weight, parameters in ((1, (8, 9)), (2, (10, 11))):
        for operand in parameters:
            axes = site.axes(operand)
            site.solid.append(operand)
            site.pin(axes[0], "has one entry per direction")
            if len(axes) > 1 and axes[1].size != 1:
                site.labels.tie(axes[1], site.axes(weight)[2])
    if not all(nulls[-1] for nulls, name in zip(site.null_outputs, site.node.output, strict=False) if name):
        site.pin(site.axes(2)[1], "takes the scale of its state from the largest entry")


def _resize_lstm(site: Site, cut: Cut) -> None:
    cut.set_attribute(site, "hidden_size", cut.count(site.axes(2)[1]))


# ---------------------------------------------------------------- position by position


def _entries(op_type: str, operands: tuple[tuple[int, int], ...], others: tuple[int, ...] = ()) -> Rule:
    """Operators of quantised operands that do what a standard one does.

    Args:
        op_type: the standard operator.
        operands: (operand, its zero point); -1 where it has none.
        others: further operands with one entry.
    """

    def tie(site: Site) -> None:
        if site.attribute("channels_last", 0):
            raise NoRule(f"{site.what} {NCHW_ONLY}")
        version = int(site.attribute("opset", 13)) if op_type == "Softmax" else 13
        alike(site, op_type, tuple(operand for operand, _ in operands), min(version, 13))
        for operand, zero_point in operands:
            if zero_point >= 0:
                single(site, zero_point - 1, zero_point)
                _shift(site, operand, zero_point)
        single(site, *others)

    return Rule(tie)


def _concat(site: Site) -> None:
    operands = tuple(range(2, len(site.node.input), 3))
    alike(site, "Concat", operands)
    for operand in operands:
        single(site, operand + 1, operand + 2)
        _shift(site, operand, operand + 2)
    single(site, 0, 1)


ONE = ((0, 2),)
TWO = ((0, 2), (3, 5))

RULES: dict[tuple[str, str], Rule] = {
    **{(domain, op): Rule(_linear) for domain in ("", CONTRIB) for op in ("QuantizeLinear", "DequantizeLinear")},
    ("", "DynamicQuantizeLinear"): Rule(_dynamic),
    **{(domain, "QLinearConv"): Rule(_conv, _resize_conv) for domain in ("", CONTRIB)},
    ("", "ConvInteger"): Rule(_conv_integer, resize_group),
    ("", "QLinearMatMul"): _product(0, 3, (1, 2), (4, 5), (6, 7)),
    ("", "MatMulInteger"): _product(0, 1, (2,), (3,)),
    (CONTRIB, "DynamicQuantizeMatMul"): _biased(_product(0, 1, (), (2, 3)).tie, 4, True),
    (CONTRIB, "MatMulIntegerToFloat"): _biased(_product(0, 1, (2, 4), (3, 5)).tie, 6, False),
    (CONTRIB, "QGemm"): Rule(_gemm),
    (CONTRIB, "MatMulNBits"): Rule(_blocked_product, _resize_blocked_product),
    (CONTRIB, "QAttention"): Rule(_attention, resize_heads),
    (CONTRIB, "DynamicQuantizeLSTM"): Rule(_lstm, _resize_lstm),
    (CONTRIB, "QLinearAdd"): _entries("Add", TWO, (6, 7)),
    (CONTRIB, "QLinearMul"): _entries("Mul", TWO, (6, 7)),
    (CONTRIB, "QLinearSigmoid"): _entries("Sigmoid", ONE, (3, 4)),
    (CONTRIB, "QLinearLeakyRelu"): _entries("LeakyRelu", ONE, (3, 4)),
    (CONTRIB, "QLinearSoftmax"): _entries("Softmax", ONE, (3, 4)),
    (CONTRIB, "QLinearAveragePool"): _entries("AveragePool", ONE, (3, 4)),
    (CONTRIB, "QLinearGlobalAveragePool"): _entries("GlobalAveragePool", ONE, (3, 4)),
    (CONTRIB, "QLinearWhere"): _entries("Where", ((0, -1), (1, 3), (4, 6)), (7, 8)),
    (CONTRIB, "QLinearConcat"): Rule(_concat),
}
