"""Shapes of what onnxruntime's operators compute: ONNX's own inference does not know them."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from onnxprune.structure.facts import Facts, Shape, ShapeRule, describe
from onnxprune.structure.rules.contrib import REFUSED
from onnxprune.structure.rules.standin import inferred, shaped

CONTRIB = "com.microsoft"
FLOAT = TensorProto.FLOAT

Found = list[Shape | None]


def _attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _shape(node: onnx.NodeProto, facts: Facts, operand: int) -> Shape | None:
    given = operand < len(node.input) and node.input[operand]
    return facts.shapes.get(node.input[operand]) if given else None


def _typed(node: onnx.NodeProto, facts: Facts, kind: int) -> None:
    facts.types.update({name: kind for name in node.output if name})


def _like(operand: int) -> ShapeRule:
    """One result, of an operand's shape."""

    def shapes(node: onnx.NodeProto, facts: Facts) -> Found:
        return [_shape(node, facts, operand)]

    return shapes


def _half(node: onnx.NodeProto, facts: Facts) -> Found:
    shape = _shape(node, facts, 0)
    return [None if shape is None else (*shape[:-1], shape[-1] // 2)]


def _layer_norm(node: onnx.NodeProto, facts: Facts) -> Found:
    shape = _shape(node, facts, 0)
    if shape is None:
        return [None]
    axis = int(_attribute(node, "axis", -1)) % len(shape)
    moments = shape[:axis] + (1,) * (len(shape) - axis)
    return [shape, moments, moments]


def _skip_norm(node: onnx.NodeProto, facts: Facts) -> Found:
    shape = _shape(node, facts, 0)
    return [None] * 4 if shape is None else [shape, (*shape[:-1], 1), (*shape[:-1], 1), shape]


def _embedded(node: onnx.NodeProto, facts: Facts) -> Found:
    ids, table = _shape(node, facts, 0), _shape(node, facts, 2)
    if ids is None or table is None:
        return [None]
    for index, name in enumerate(node.output):
        if name:
            real = facts.types.get(node.input[5], FLOAT) if node.op_type == "EmbedLayerNormalization" else FLOAT
            facts.types[name] = TensorProto.INT32 if index == 1 else real
    return [(*ids, table[-1]), (ids[0],), (*ids, table[-1])]


def _matmul(node: onnx.NodeProto, facts: Facts) -> Found:
    """FusedMatMul: the shape of the MatMul it stands for."""
    shapes = {}
    for operand, letter in enumerate("AB"):
        shape = _shape(node, facts, operand)
        if shape is None:
            return [None]
        order = list(shape)
        if _attribute(node, f"transBatch{letter}", 0) and len(order) > 2:
            order.insert(len(order) - 2, order.pop(0))
        if _attribute(node, f"trans{letter}", 0) and len(order) > 1:
            order[-2:] = order[:-3:-1]
        shapes["ab"[operand]] = tuple(order)
    return inferred(helper.make_node("MatMul", ["a", "b"], ["y"]), shapes)


def _blocked_product(node: onnx.NodeProto, facts: Facts) -> Found:
    shape = _shape(node, facts, 0)
    return [None if shape is None else (*shape[:-1], int(_attribute(node, "N")))]


def _attention(mask_free: int, past: int) -> ShapeRule:
    """Attention and QAttention.

    Args:
        mask_free: the operand whose type the results have.
        past: the operand that holds earlier keys and values.
    """

    def shapes(node: onnx.NodeProto, facts: Facts) -> Found:
        x, weight = _shape(node, facts, 0), _shape(node, facts, 1)
        if x is None or weight is None:
            return [None]
        _typed(node, facts, facts.types.get(node.input[mask_free], FLOAT))
        sizes = _attribute(node, "qkv_hidden_sizes") or [weight[1] // 3] * 3
        heads = int(_attribute(node, "num_heads"))
        before = _shape(node, facts, past)
        earlier = before[3] if before is not None else 0
        return [(*x[:2], int(sizes[2])), (2, x[0], heads, earlier + x[1], int(sizes[2]) // heads)]

    return shapes


def _multi_head(node: onnx.NodeProto, facts: Facts) -> Found:
    query, key, value = (_shape(node, facts, i) for i in range(3))
    if query is None:
        return [None]
    heads = int(_attribute(node, "num_heads"))
    last = next(shape for shape in (value, key, query) if shape is not None)
    width = last[2] if len(last) == 3 else heads * last[-1]
    length = {3: 1, 4: 2, 5: 1}[len(last)]
    before = _shape(node, facts, 6)
    total = last[length] + (before[2] if before is not None else 0)
    inner = query[-1] // heads if len(query) == 3 else query[-1]
    batch = query[0]
    return [
        (*query[:2], width),
        (batch, heads, total, inner),
        (batch, heads, total, width // heads),
        (batch, heads, query[1], total),
    ]


def _group_query(node: onnx.NodeProto, facts: Facts) -> Found:
    query, key = _shape(node, facts, 0), _shape(node, facts, 1)
    if query is None:
        return [None]
    heads, keys = int(_attribute(node, "num_heads")), int(_attribute(node, "kv_num_heads"))
    width = query[2] // (heads if key is not None else heads + 2 * keys)
    return [(*query[:2], heads * width)]


def _lstm(node: onnx.NodeProto, facts: Facts) -> Found:
    """DynamicQuantizeLSTM: an LSTM with transposed weights."""
    x, weight, recurrence = (_shape(node, facts, i) for i in range(3))
    if x is None or weight is None or recurrence is None:
        return [None]
    batch = (weight[0], x[1], recurrence[1])
    return [(x[0], weight[0], x[1], recurrence[1]), batch, batch]


def _gemm(node: onnx.NodeProto, facts: Facts) -> Found:
    full = len(node.input) <= 7 or not node.input[7]
    return list(shaped("Gemm", (0, 3), FLOAT if full else 0)(node, facts))


def _concat(node: onnx.NodeProto, facts: Facts) -> Found:
    return list(shaped("Concat", range(2, len(node.input), 3), like=2)(node, facts))


def _quantised(node: onnx.NodeProto, facts: Facts) -> Found:
    third = node.input[2] if len(node.input) > 2 else ""
    _typed(node, facts, facts.types.get(third, TensorProto.UINT8))
    return [_shape(node, facts, 0)]


def _dequantised(node: onnx.NodeProto, facts: Facts) -> Found:
    _typed(node, facts, facts.types.get(node.input[1], FLOAT))
    return [_shape(node, facts, 0)]


def _refused(why: str) -> ShapeRule:
    def shapes(node: onnx.NodeProto, facts: Facts) -> Found:
        facts.unknown.update({name: f"{describe(node)} {why}" for name in node.output if name})
        return [None]

    return shapes


SHAPES: dict[tuple[str, str], ShapeRule] = {
    **{key: _refused(why) for key, why in REFUSED.items()},
    ("", "LayerNormalization"): _layer_norm,  # onnxruntime fuses it in models older than the operator
    ("", "SimplifiedLayerNormalization"): _layer_norm,
    (CONTRIB, "FusedConv"): shaped("Conv", (0, 1)),
    (CONTRIB, "FusedGemm"): shaped("Gemm", (0, 1)),
    (CONTRIB, "FusedMatMul"): _matmul,
    (CONTRIB, "TransposeMatMul"): _matmul,
    **{(CONTRIB, op): _like(0) for op in ("Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasAdd", "RotaryEmbedding")},
    (CONTRIB, "BiasSplitGelu"): _half,
    (CONTRIB, "SkipLayerNormalization"): _skip_norm,
    (CONTRIB, "SkipSimplifiedLayerNormalization"): _skip_norm,
    **{(CONTRIB, op): _embedded for op in ("EmbedLayerNormalization", "QEmbedLayerNormalization")},
    (CONTRIB, "Attention"): _attention(0, 4),
    (CONTRIB, "QAttention"): _attention(3, 8),
    (CONTRIB, "MultiHeadAttention"): _multi_head,
    (CONTRIB, "GroupQueryAttention"): _group_query,
    (CONTRIB, "QuantizeLinear"): _quantised,
    (CONTRIB, "DequantizeLinear"): _dequantised,
    (CONTRIB, "QLinearConv"): shaped("Conv", (0, 3)),
    (CONTRIB, "DynamicQuantizeMatMul"): shaped("MatMul", (0, 1)),
    (CONTRIB, "MatMulIntegerToFloat"): shaped("MatMul", (0, 1), FLOAT),
    (CONTRIB, "MatMulNBits"): _blocked_product,
    (CONTRIB, "QGemm"): _gemm,
    (CONTRIB, "DynamicQuantizeLSTM"): _lstm,
    **{(CONTRIB, op): shaped("Add", (0, 3)) for op in ("QLinearAdd", "QLinearMul")},
    **{(CONTRIB, op): _like(0) for op in ("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax")},
    (CONTRIB, "QLinearAveragePool"): shaped("AveragePool", (0,)),
    (CONTRIB, "QLinearGlobalAveragePool"): shaped("GlobalAveragePool", (0,)),
    (CONTRIB, "QLinearWhere"): shaped("Where", (0, 1, 4), like=1),
    (CONTRIB, "QLinearConcat"): _concat,
}
"""(domain, operator) -> the shapes of its results."""
