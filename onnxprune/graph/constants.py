"""What a node makes of inputs that are known, and how large that is.

The size is told before anything is made: a few bytes in a file can ask for all the memory there is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper

Array = np.ndarray[Any, Any]

QUICK = {
    "Abs", "Add", "And", "ArgMax", "ArgMin", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast",
    "CastLike", "Ceil", "Clip", "Compress", "Concat", "ConstantOfShape", "Cos", "CumSum", "DequantizeLinear", "Div",
    "Equal", "Exp", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "IsInf",
    "IsNaN", "Less", "LessOrEqual", "Log", "LogSoftmax", "LpNormalization", "Max", "Mean", "Min", "Mod", "Mul", "Neg",
    "NonZero", "Not", "OneHot", "Or", "Pad", "Pow", "QuantizeLinear", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "Reshape", "Round", "Shape", "Sigmoid", "Sign", "Sin", "Size", "Slice", "Softmax",
    "Softplus", "Split", "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unique",
    "Unsqueeze", "Where", "Xor",
}  # fmt: skip
"""Operators that are as much work as their operands and results are large."""

SLOW = {"GatherElements", "GatherND", "MatMul", "Gemm", "ScatterElements", "ScatterND"}
"""Operators that are more; ONNX's reference implementation goes through their elements one by one, or nearly so."""

FEW = 1 << 14
"""Elements up to which these are computed."""

FEWER = {"Compress", "NonZero", "Unique"}
"""Operators of which ONNX's inference cannot tell how many elements they pick of those they are given."""

TOLD = 1024
"""Elements of an operand that may say a shape."""


def compute(node: onnx.NodeProto, given: Mapping[str, Array], versions: Mapping[str, int], limit: int) -> list[Array]:
    """The results of a node by ONNX's reference implementation.

    Args:
        node: the node; without sub-graphs.
        given: its inputs by name.
        versions: domain -> version.
        limit: elements that no result may exceed, unless the inputs have half as many.

    Raises:
        Exception: a result is too large, or nothing says how large; or the reference implementation fails.
    """
    from onnx.reference import ReferenceEvaluator  # slow to import, and rarely needed

    if not is_computed(node):
        raise ValueError(f"{node.op_type} may be more work than a constant is worth")
    known = sum(array.size for array in given.values())
    made = 0 if node.op_type in FEWER else _largest(node, given, versions.get("", 1))
    if made > limit and made > 2 * known:
        raise ValueError(f"{node.op_type} would make {made} elements of {known}")
    if node.op_type in SLOW and known + made > FEW:
        raise ValueError(f"{node.op_type} of {known} elements is more work than a constant is worth")
    inputs = [onnx.ValueInfoProto(name=name) for name in given]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    opsets = [helper.make_opsetid(domain, version) for domain, version in versions.items()]
    values = ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets)).run(None, dict(given))
    if any(not isinstance(value, (np.ndarray, np.generic)) for value in values):
        raise TypeError(f"{node.op_type} gives no tensor")
    return [np.asarray(value) for value in values]


def is_computed(node: onnx.NodeProto) -> bool:
    """Whether a node is one whose results are computed before the model runs; a large one may not be."""
    return node.domain in ("", "ai.onnx") and node.op_type in QUICK | SLOW


def _largest(node: onnx.NodeProto, given: Mapping[str, Array], version: int) -> int:
    """Elements of the largest result of a node of ai.onnx, or more.

    Raises:
        Exception: that is not known, or the node is none of its operator.
    """
    types = {
        name: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given.items()
    }
    small = {name: array for name, array in given.items() if array.size <= TOLD}
    data = {name: numpy_helper.from_array(np.asarray(array, order="C"), name) for name, array in small.items()}
    found = onnx.shape_inference.infer_node_outputs(
        defs.get_schema(node.op_type, version, ""), node, types, data,
        opset_imports=[helper.make_opsetid("", version)], ir_version=10,
    )  # fmt: skip
    shapes = [kind.tensor_type.shape.dim for kind in found.values() if kind.tensor_type.HasField("shape")]
    if len(shapes) < sum(map(bool, node.output)) or not all(d.HasField("dim_value") for shape in shapes for d in shape):
        raise ValueError(f"how much {node.op_type} would make is not known")
    return max(math.prod(int(d.dim_value) for d in shape) for shape in shapes)


def moved(operator: str, shape: Sequence[int], sides: Sequence[Array | None], axis: int) -> int:
    """Elements of what Expand, Tile or Gather make of a tensor of a shape."""
    side = sides[0] if sides else None
    size = math.prod(shape)
    if side is None:
        return size
    if operator == "Expand":
        return math.prod(np.broadcast_shapes(tuple(shape), tuple(int(d) for d in side)))
    if operator == "Tile":
        return size * math.prod(int(r) for r in side)
    return size // max(shape[axis], 1) * side.size
