"""Which operand of which operator is a weight, and how its axes read as (output, input, *kernel).

One row per operator. The *role order* of a weight is that reading: outputs first, then inputs, then the
kernel's positions. Scores, patterns and ties all use it, so the same weights are pruned alike however a
file stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.graph.expression import per_axis

Array = np.ndarray
View = Callable[[Array, Mapping[str, Any]], Array]
"""Takes an operand and the operator's attributes, returns it in role order."""


Spread = Callable[[Array, Sequence[int], Mapping[str, Any]], Array]
"""Takes a quantisation parameter, the operand's shape and the attributes; returns it broadcast against the operand."""


def _per_output(parameter: Array, shape: Sequence[int], attributes: Mapping[str, Any]) -> Array:
    return per_axis(parameter, shape, 0)


def _per_column(parameter: Array, shape: Sequence[int], attributes: Mapping[str, Any]) -> Array:
    return per_axis(parameter, shape, -1)


def _per_row(parameter: Array, shape: Sequence[int], attributes: Mapping[str, Any]) -> Array:
    return per_axis(parameter, shape, -2)


def _per_gemm_output(parameter: Array, shape: Sequence[int], attributes: Mapping[str, Any]) -> Array:
    return per_axis(parameter, shape, 0 if attributes.get("transB", 0) else -1)


def _per_direction(parameter: Array, shape: Sequence[int], attributes: Mapping[str, Any]) -> Array:
    """(directions,) or (directions, columns) against (directions, inputs, columns)."""
    return parameter.reshape(parameter.shape[0], 1, -1)


@dataclass(frozen=True)
class Role:
    """One weight operand of an operator.

    Attributes:
        operand: index of the input.
        view: operand to role order.
        scale: index of the input that holds the scale, for operators on quantised weights; -1 where it plays no part.
        zero_point: index of the input that holds the zero point; None for plain operators.
        spread: broadcasts scale and zero point against the operand's shape.
    """

    operand: int
    view: View
    scale: int | None = None
    zero_point: int | None = None
    spread: Spread = _per_output


def _conv(x: Array, attributes: Mapping[str, Any]) -> Array:
    """(M, C/group, *k)."""
    if x.ndim < 3:
        raise ValueError(f"a kernel has at least 3 axes, and it has {x.ndim}")
    return x


def _conv_transpose(x: Array, attributes: Mapping[str, Any]) -> Array:
    """(C, M/group, *k): a group's inputs lie along axis 0, its outputs along axis 1."""
    group = int(attributes.get("group", 1))
    inputs, outputs = x.shape[0], x.shape[1]
    grouped = x.reshape(group, inputs // group, outputs, *x.shape[2:]).swapaxes(1, 2)
    return grouped.reshape(group * outputs, inputs // group, *x.shape[2:])


def _right(x: Array, attributes: Mapping[str, Any]) -> Array:
    """(..., K, N) of a MatMul's second operand."""
    if x.ndim == 1:
        return x[None, :]
    return x.swapaxes(-1, -2) if x.ndim == 2 else x.swapaxes(-1, -2).reshape(-1, x.shape[-2])


def _left(x: Array, attributes: Mapping[str, Any]) -> Array:
    """(..., M, K) of a MatMul's first operand."""
    return x.reshape(-1, x.shape[-1])


def _einsum(index: int) -> View:
    """An operand of an Einsum of two, as the MatMul's right one that it stands for.

    Axes that it shares with the other operand alone are summed over: inputs. Those it shares with the result alone are
    outputs, after those that all three have: each of these positions has outputs of its own, as in a batch of matrices.
    """

    def view(x: Array, attributes: Mapping[str, Any]) -> Array:
        equation = str(attributes["equation"]).replace(" ", "")
        left, arrow, result = equation.partition("->")
        terms = left.split(",")
        if len(terms) != 2:
            raise ValueError(f"Einsum '{equation}' has {len(terms)} operands, and only two of them make a product")
        ours, other = terms[index], terms[1 - index]
        if not arrow:
            result = "".join(letter for letter in left if left.count(letter) == 1)
        shared, inputs, outputs = (
            [axis for axis, letter in enumerate(ours) if (letter in other, letter in result) == where]
            for where in ((True, True), (True, False), (False, True))
        )
        if "." in ours or len(set(ours)) < len(ours) or len(shared + inputs + outputs) < len(ours):
            raise ValueError(f"Einsum '{equation}' does not multiply its operand {index} as a matrix")
        moved = x.transpose(shared + inputs + outputs)
        batch, rows = moved.shape[: len(shared)], moved.shape[len(shared) : len(shared + inputs)]
        size = int(np.prod(rows, dtype=np.int64))
        return _right(
            moved.reshape(*batch, size, int(np.prod(moved.shape[len(shared + inputs) :], dtype=np.int64))), {}
        )

    return view


def _fused(flag: str, batch_flag: str, plain: View, swapped: View) -> View:
    def view(x: Array, attributes: Mapping[str, Any]) -> Array:
        if attributes.get(batch_flag, 0) and x.ndim > 2:  # (K, ..., N) stands for (..., K, N)
            x = np.moveaxis(x, 0, -2)
        return (swapped if attributes.get(flag, 0) else plain)(x, attributes)

    return view


def _rows(x: Array, attributes: Mapping[str, Any]) -> Array:
    """(..., outputs, inputs), as a recurrent layer's (directions, gates * hidden, inputs)."""
    return x.reshape(-1, x.shape[-1])


_RECURRENT = (Role(1, _rows), Role(2, _rows))
_GEMM = (Role(1, _fused("transB", "", _right, _left)), Role(0, _fused("transA", "", _left, _right)))
_MATMUL = (Role(1, _right), Role(0, _left))

CONTRIB = "com.microsoft"

ROLES: dict[tuple[str, str], tuple[Role, ...]] = {
    ("", "Conv"): (Role(1, _conv),),
    ("", "ConvTranspose"): (Role(1, _conv_transpose),),
    ("", "DeformConv"): (Role(1, _conv),),
    ("", "Gemm"): _GEMM,
    ("", "MatMul"): _MATMUL,
    ("", "Einsum"): (Role(1, _einsum(1)), Role(0, _einsum(0)), Role(2, _einsum(2))),
    ("", "LSTM"): _RECURRENT,
    ("", "GRU"): _RECURRENT,
    ("", "RNN"): _RECURRENT,
    ("", "Gather"): (Role(0, _rows),),
    ("", "QLinearConv"): (Role(3, _conv, 4, 5),),
    ("", "ConvInteger"): (Role(1, _conv, -1, 3),),
    ("", "QLinearMatMul"): (Role(3, _right, 4, 5, _per_column), Role(0, _left, 1, 2, _per_row)),
    ("", "MatMulInteger"): (Role(1, _right, -1, 3, _per_column), Role(0, _left, -1, 2, _per_row)),
    (CONTRIB, "FusedConv"): (Role(1, _conv),),
    (CONTRIB, "FusedMatMul"): (
        Role(1, _fused("transB", "transBatchB", _right, _left)),
        Role(0, _fused("transA", "transBatchA", _left, _right)),
    ),
    (CONTRIB, "FusedGemm"): _GEMM,
    (CONTRIB, "TransposeMatMul"): (
        Role(1, _fused("transB", "", _right, _left)),
        Role(0, _fused("transA", "", _left, _right)),
    ),
    (CONTRIB, "Attention"): (Role(1, _right),),
    (CONTRIB, "QAttention"): (Role(1, _right, 4, 7, _per_column),),
    (CONTRIB, "QLinearConv"): (Role(3, _conv, 4, 5),),
    (CONTRIB, "QGemm"): (Role(3, _fused("transB", "", _right, _left), 4, 5, _per_gemm_output),),
    (CONTRIB, "DynamicQuantizeMatMul"): (Role(1, _right, 2, 3, _per_column),),
    (CONTRIB, "MatMulIntegerToFloat"): (Role(1, _right, 3, 5, _per_column),),
    (CONTRIB, "DynamicQuantizeLSTM"): (
        Role(1, _right, 8, 9, _per_direction),
        Role(2, _right, 10, 11, _per_direction),
    ),
}
"""(domain, operator) -> its weight operands. A constant in a Gather's data operand is an embedding."""

DEFAULT_TYPES = frozenset(op for _, op in ROLES) - {"Gather"}
"""What op_types 'default' means: every row but embeddings, which are pruned only when named."""

OPAQUE: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {
    (CONTRIB, "MatMulNBits"): (
        (1,),
        "its weights are packed in 2 to 8 bits per block, where no entry is exactly 0.0; prune before quantising",
    ),
    (CONTRIB, "MatMulBnb4"): ((1,), "its weights are packed 4-bit codes; prune before quantising"),
    (CONTRIB, "MatMulFpQ4"): ((1,), "its weights are packed 4-bit codes; prune before quantising"),
    (CONTRIB, "MatMulInteger16"): ((1,), "its weights have no rule yet"),
    (CONTRIB, "GemmFloat8"): ((1,), "8-bit float weights have no rule yet"),
    (CONTRIB, "QOrderedMatMul"): ((3,), "its weights are in a hardware order; prune before quantising"),
    (CONTRIB, "QOrderedAttention"): ((2, 3, 4), "its weights are in a hardware order; prune before quantising"),
    (CONTRIB, "GatherBlockQuantized"): ((0,), "its table is packed in blocks; prune before quantising"),
    (CONTRIB, "QMoE"): ((2, 5), "its experts are packed in blocks; prune before quantising"),
    (CONTRIB, "MoE"): ((2, 4), "expert weights have no rule yet"),
    (CONTRIB, "DecoderMaskedSelfAttention"): ((1,), "its merged projection has no rule yet"),
    (CONTRIB, "LongformerAttention"): ((1, 4), "its merged projections have no rule yet"),
    (CONTRIB, "NhwcConv"): ((1,), "its channels-last kernel has no rule yet"),
    (CONTRIB, "NhwcFusedConv"): ((1,), "its channels-last kernel has no rule yet"),
}
"""Operators with weights that are left alone: operand indices and the reason a user reads."""
