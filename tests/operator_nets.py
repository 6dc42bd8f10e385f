"""A net for every operator with a weight, with the mask that pruning it at 0.5 must give."""

from __future__ import annotations

import numpy as np
from nets import Net, Operand, parse, pi

F32 = np.float32


def rows(x: np.ndarray) -> np.ndarray:
    """(..., outputs, inputs)."""
    return np.concatenate(list(x)) if x.ndim == 3 else x


def columns(x: np.ndarray) -> np.ndarray:
    """(..., inputs, outputs)."""
    return np.concatenate([m.T for m in x]) if x.ndim == 3 else x.T


def transposed(groups: int):
    """(C, M/groups, *k) of a ConvTranspose, one output channel at a time."""

    def role(x: np.ndarray) -> np.ndarray:
        return np.stack([part[:, m] for part in np.split(x, groups) for m in range(x.shape[1])])

    return role


def shifted(zero: object, scale: object = 1.0):
    """Real numbers of a quantised operand."""
    return lambda x: (x - np.asarray(zero)) * np.asarray(scale)


def op(
    id: str,
    text: str,
    keeps: str,
    w: np.ndarray,
    role=lambda x: x,
    real=lambda x: x,
    opset: int = 21,
    **arrays: np.ndarray,
) -> Net:
    return Net(id, parse(text, opset, W=w, **arrays), {"W": keeps}, {"W": [Operand("W", role, real)]})


def two(
    id: str,
    text: str,
    keeps: tuple[str, str],
    w: np.ndarray,
    r: np.ndarray,
    role=rows,
    real=(lambda x: x,) * 2,
    **arrays: np.ndarray,
) -> Net:
    """A recurrent layer with its input and its recurrent weight."""
    seen = {"W": [Operand("W", role, real[0])], "R": [Operand("R", role, real[1])]}
    return Net(id, parse(text, W=w, R=r, **arrays), dict(zip("WR", keeps, strict=True)), seen)


EINSUMS = [
    op(
        "Einsum",
        '(float[2,4] x) => (float[2,3] y) { y = Einsum<equation="bi,io->bo">(x, W) }',
        "010 011 001 110",
        pi(4, 3),
        columns,
    ),
    op(
        "Einsum without a result",
        '(float[2,4] x) => (float[2,3] y) { y = Einsum<equation="bi, io">(x, W) }',
        "010 011 001 110",
        pi(4, 3),
        columns,
    ),
    op(
        "Einsum of W x",
        '(float[4,2] x) => (float[3,2] y) { y = Einsum<equation="oi,ib->ob">(W, x) }',
        "0001 1100 1110",
        pi(3, 4),
    ),
    op(
        "Einsum to heads",
        '(float[2,1,4] x) => (float[2,1,2,3] y) { y = Einsum<equation="abc,cde->abde">(x, W) }',
        "010111001110111101000000",
        pi(4, 2, 3),
        lambda x: x.reshape(4, 6).T,
    ),
    op(
        "Einsum from heads",
        '(float[2,1,2,3] x) => (float[2,1,4] y) { y = Einsum<equation="abcd,cde->abe">(x, W) }',
        "010111001110111101000000",
        pi(2, 3, 4),
        lambda x: x.reshape(6, 4).T,
    ),
    op(
        "Einsum per head",
        '(float[2,3,4] x) => (float[3,2,2] y) { y = Einsum<equation="bhi,oih->hbo">(x, W) }',
        "010111001110111101000000",
        pi(2, 4, 3),
        lambda x: np.concatenate([x[:, :, head] for head in range(3)]),
    ),
]

FLOAT = [
    *EINSUMS,
    op(
        "DeformConv",
        "(float[1,2,3,3] x, float[1,8,2,2] o) => (float[1,3,2,2] y) { y = DeformConv<kernel_shape=[2, 2]>(x, W, o) }",
        "01011100 11101111 01000000",
        pi(3, 2, 2, 2),
    ),
    op("Conv1d", "(float[1,2,5] x) => (float[1,3,3] y) { y = Conv(x, W) }", "000001 001110 111101", pi(3, 2, 3)),
    op(
        "Conv2d",
        "(float[1,2,4,4] x) => (float[1,3,3,3] y) { y = Conv(x, W) }",
        "01011100 11101111 01000000",
        pi(3, 2, 2, 2),
    ),
    op(
        "Conv3d",
        "(float[1,2,3,3,3] x) => (float[1,2,2,2,2] y) { y = Conv(x, W) }",
        "0000110011101111 0100000011010111",
        pi(2, 2, 2, 2, 2),
    ),
    op(
        "Conv grouped",
        "(float[1,4,3] x) => (float[1,4,2] y) { y = Conv<group=2>(x, W) }",
        "0000 0100 1110 1111",
        pi(4, 2, 2),
    ),
    op(
        "Conv depthwise", "(float[1,4,3] x) => (float[1,4,2] y) { y = Conv<group=4>(x, W) }", "01 01 11 00", pi(4, 1, 2)
    ),
    op(
        "ConvTranspose",
        "(float[1,3,3] x) => (float[1,2,4] y) { y = ConvTranspose(x, W) }",
        "0001 1100 1110",
        pi(3, 2, 2),
        transposed(1),
    ),
    op(
        "ConvTranspose grouped",
        "(float[1,4,3] x) => (float[1,6,4] y) { y = ConvTranspose<group=2>(x, W) }",
        "010111 001110 111101 000000",
        pi(4, 3, 2),
        transposed(2),
    ),
    op("Gemm", "(float[2,3] x) => (float[2,4] y) { y = Gemm(x, W) }", "0101 0100 1110", pi(3, 4), columns),
    op(
        "Gemm transB",
        "(float[2,3] x) => (float[2,4] y) { y = Gemm<transB=1>(x, W) }",
        "000 111 001 110",
        pi(4, 3),
        rows,
    ),
    op("Gemm of W x", "(float[3,2] x) => (float[4,2] y) { y = Gemm(W, x) }", "000 111 001 110", pi(4, 3), rows),
    op(
        "Gemm transA of W x",
        "(float[3,2] x) => (float[4,2] y) { y = Gemm<transA=1>(W, x) }",
        "0101 0100 1110",
        pi(3, 4),
        columns,
    ),
    op("MatMul right", "(float[2,3] x) => (float[2,4] y) { y = MatMul(x, W) }", "0101 0100 1110", pi(3, 4), columns),
    op("MatMul left", "(float[3,2] x) => (float[4,2] y) { y = MatMul(W, x) }", "000 111 001 110", pi(4, 3), rows),
    op(
        "MatMul right batched",
        "(float[2,2,3] x) => (float[2,2,4] y) { y = MatMul(x, W) }",
        "010111001110 111101000000",
        pi(2, 3, 4),
        columns,
    ),
    op(
        "MatMul left batched",
        "(float[2,3,2] x) => (float[2,4,2] y) { y = MatMul(W, x) }",
        "010111001110 111101000000",
        pi(2, 4, 3),
        rows,
    ),
    op("MatMul right vector", "(float[2,5] x) => (float[2] y) { y = MatMul(x, W) }", "01011", pi(5), lambda x: x[None]),
    op("MatMul left vector", "(float[5,2] x) => (float[2] y) { y = MatMul(W, x) }", "01011", pi(5), lambda x: x[None]),
    two(
        "RNN",
        "(float[2,1,3] x) => (float[2,1,1,2] y) { y = RNN<hidden_size=2>(x, W, R) }",
        ("000 111", "01 01"),
        pi(1, 2, 3),
        pi(1, 2, 2),
    ),
    two(
        "GRU",
        "(float[2,1,3] x) => (float[2,1,1,2] y) { y = GRU<hidden_size=2>(x, W, R) }",
        ("000 001 001 110 111 101", "00 01 11 00 11 10"),
        pi(1, 6, 3),
        pi(1, 6, 2),
    ),
    two(
        "LSTM",
        "(float[2,1,3] x) => (float[2,1,1,2] y) { y = LSTM<hidden_size=2>(x, W, R) }",
        ("010 111 001 110 111 101 000 000", "00 00 01 00 11 10 11 11"),
        pi(1, 8, 3),
        pi(1, 8, 2),
    ),
    two(
        "LSTM bidirectional",
        '(float[2,1,3] x) => (float[2,2,1,2] y) { y = LSTM<hidden_size=2, direction="bidirectional">(x, W, R) }',
        ("000000001110111101000000 110101110000011110111111", "0000110011101111 0100000011010111"),
        pi(2, 8, 3),
        pi(2, 8, 2),
    ),
    op(
        "FusedConv",
        '(float[1,2,5] x) => (float[1,3,3] y) { y = com.microsoft.FusedConv<activation="Relu">(x, W) }',
        "000001 001110 111101",
        pi(3, 2, 3),
    ),
    op(
        "FusedMatMul",
        "(float[2,3] x) => (float[2,4] y) { y = com.microsoft.FusedMatMul<alpha=0.5>(x, W) }",
        "0101 0100 1110",
        pi(3, 4),
        columns,
    ),
    op(
        "FusedMatMul transB",
        "(float[2,3] x) => (float[2,4] y) { y = com.microsoft.FusedMatMul<transB=1>(x, W) }",
        "000 111 001 110",
        pi(4, 3),
        rows,
    ),
    op(
        "FusedMatMul left",
        "(float[3,2] x) => (float[4,2] y) { y = com.microsoft.FusedMatMul(W, x) }",
        "000 111 001 110",
        pi(4, 3),
        rows,
    ),
    op(
        "FusedMatMul transA",
        "(float[3,2] x) => (float[4,2] y) { y = com.microsoft.FusedMatMul<transA=1>(W, x) }",
        "0101 0100 1110",
        pi(3, 4),
        columns,
    ),
    op(
        "FusedMatMul transBatchB",
        "(float[2,2,3] x) => (float[2,2,4] y) { y = com.microsoft.FusedMatMul<transBatchB=1>(x, W) }",
        "01011100 11101111 01000000",
        pi(3, 2, 4),
        lambda x: columns(np.stack([x[:, b] for b in range(2)])),
    ),
    op(
        "FusedMatMul transB transBatchB",
        "(float[2,2,3] x) => (float[2,2,4] y) { y = com.microsoft.FusedMatMul<transB=1, transBatchB=1>(x, W) }",
        "010111 001110 111101 000000",
        pi(4, 2, 3),
        lambda x: rows(np.stack([x[:, b] for b in range(2)])),
    ),
    op(
        "FusedMatMul transBatchA",
        "(float[2,3,2] x) => (float[2,4,2] y) { y = com.microsoft.FusedMatMul<transBatchA=1>(W, x) }",
        "010111 001110 111101 000000",
        pi(4, 2, 3),
        lambda x: rows(np.stack([x[:, b] for b in range(2)])),
    ),
    op(
        "FusedGemm",
        '(float[2,3] x) => (float[2,4] y) { y = com.microsoft.FusedGemm<activation="Relu", transB=1>(x, W) }',
        "000 111 001 110",
        pi(4, 3),
        rows,
    ),
    op(
        "TransposeMatMul",
        "(float[2,3] x) => (float[2,4] y) { y = com.microsoft.TransposeMatMul<transB=1>(x, W) }",
        "000 111 001 110",
        pi(4, 3),
        rows,
    ),
    op(
        "Attention",
        "(float[1,2,3] x) => (float[1,2,2] y) { y = com.microsoft.Attention<num_heads=1>(x, W, b) }",
        "000111 001110 001101",
        pi(3, 6),
        columns,
        b=np.zeros(6, F32),
    ),
]

SCALES = np.array([1, 0.5, 0.5, 1], F32)  # equal ones, so that ties reach across channels
ZEROS = [20, 120, 128, 250]
LINEAR = "(uint8[1,2,4] x) => (uint8[1,4,2] y) { y = QLinearConv(x, one, two, W, s, wz, one, z) }"
ONE = {"one": np.float32(1).reshape(()), "z": np.uint8(0).reshape(())}
TWO = ONE | {"two": np.uint8(2).reshape(())}  # as the zero point of x, makes ones of it negative

QUANTISED = [
    op(
        "QLinearConv",
        LINEAR,
        "010111 001110 111101 000000",
        pi(4, 2, 3, dtype=np.uint8, offset=100),
        real=shifted(100, 3),
        **TWO,
        s=F32(3).reshape(()),
        wz=np.uint8(100).reshape(()),
    ),
    op(
        "QLinearConv int8 per channel",
        LINEAR,
        "110111 000000 000001 111111",
        pi(4, 2, 3, dtype=np.int8),
        real=shifted(0, SCALES.reshape(4, 1, 1)),
        **TWO,
        s=SCALES,
        wz=np.zeros(4, np.int8),
    ),
    op(
        "QLinearConv com.microsoft",
        LINEAR.replace("QLinearConv", "com.microsoft.QLinearConv"),
        "010111 001110 111101 000000",
        pi(4, 2, 3, dtype=np.int8),
        real=shifted(0, 3),
        **TWO,
        s=F32(3).reshape(()),
        wz=np.int8(0).reshape(()),
    ),
    op(
        "ConvInteger",
        "(uint8[1,2,4] x) => (int32[1,4,3] y) { y = ConvInteger(x, W, z, wz) }",
        "0000 0100 1110 1111",
        pi(4, 2, 2, dtype=np.uint8, offset=7),
        real=shifted(7),
        z=ONE["z"],
        wz=np.uint8(7).reshape(()),
    ),
    op(
        "ConvInteger without zero point",
        "(uint8[1,2,4] x) => (int32[1,4,3] y) { y = ConvInteger(x, W) }",
        "1010 1010 1010 1010",
        pi(4, 2, 2, dtype=np.uint8, offset=10),
    ),
    op(
        "QLinearMatMul",
        "(uint8[2,3] x) => (uint8[2,4] y) { y = QLinearMatMul(x, one, z, W, s, wz, one, z) }",
        "1001 1001 1001",
        pi(3, 4, dtype=np.int8),
        columns,
        shifted(0, SCALES),
        **ONE,
        s=SCALES,
        wz=np.zeros(4, np.int8),
    ),
    op(
        "QLinearMatMul left",
        "(uint8[3,2] x) => (uint8[4,2] y) { y = QLinearMatMul(W, s, wz, x, one, z, one, z) }",
        "000 111 001 110",
        pi(4, 3, dtype=np.uint8, offset=50),
        rows,
        shifted(50, 0.5),
        **ONE,
        s=F32(0.5).reshape(()),
        wz=np.uint8(50).reshape(()),
    ),
    op(
        "MatMulInteger",
        "(uint8[2,3] x) => (int32[2,4] y) { y = MatMulInteger(x, W, z, wz) }",
        "0101 0100 1110",
        pi(3, 4, dtype=np.uint8, offset=[20, 30, 40, 50]),
        columns,
        shifted([20, 30, 40, 50]),
        z=ONE["z"],
        wz=np.array([20, 30, 40, 50], np.uint8),
    ),
    op(
        "MatMulInteger left",
        "(uint8[3,2] x) => (int32[4,2] y) { y = MatMulInteger(W, x, wz) }",
        "000 111 001 110",
        pi(4, 3, dtype=np.uint8, offset=9),
        rows,
        shifted(9),
        wz=np.uint8(9).reshape(()),
    ),
    op(
        "DynamicQuantizeMatMul",
        "(float[2,3] x) => (float[2,4] y) { y = com.microsoft.DynamicQuantizeMatMul(x, W, s, wz) }",
        "1001 1001 1001",
        pi(3, 4, dtype=np.uint8, offset=ZEROS),
        columns,
        shifted(ZEROS, SCALES),
        s=SCALES,
        wz=np.array(ZEROS, np.uint8),
    ),
    op(
        "MatMulIntegerToFloat",
        "(uint8[2,3] x) => (float[2,4] y) { y = com.microsoft.MatMulIntegerToFloat(x, W, one, s, z, wz) }",
        "1001 1001 1001",
        pi(3, 4, dtype=np.int8),
        columns,
        shifted(0, SCALES),
        **ONE,
        s=SCALES,
        wz=np.zeros(4, np.int8),
    ),
    op(
        "QGemm",
        "(uint8[2,3] x) => (float[2,4] y) { y = com.microsoft.QGemm(x, one, z, W, s, wz) }",
        "1001 1001 1001",
        pi(3, 4, dtype=np.int8),
        columns,
        shifted(0, SCALES),
        **ONE,
        s=SCALES,
        wz=np.zeros(4, np.int8),
    ),
    op(
        "QGemm transB",
        "(uint8[2,3] x) => (float[2,4] y) { y = com.microsoft.QGemm<transB=1>(x, one, z, W, s, wz) }",
        "110 000 001 111",
        pi(4, 3, dtype=np.int8),
        rows,
        shifted(0, SCALES[:, None]),
        **ONE,
        s=SCALES,
        wz=np.zeros(4, np.int8),
    ),
    op(
        "QAttention",
        "(uint8[1,2,3] x) => (float[1,2,2] y) { y = com.microsoft.QAttention<num_heads=1>(x, W, b, one, s, , z, wz) }",
        "000111 001110 001101",
        pi(3, 6, dtype=np.uint8, offset=128),
        columns,
        shifted(128, 0.5),
        **ONE,
        b=np.zeros(6, F32),
        s=F32(0.5).reshape(()),
        wz=np.uint8(128).reshape(()),
    ),
    two(
        "DynamicQuantizeLSTM",
        "(float[2,1,3] x) => (float[2,1,1,2] y) "
        "{ y = com.microsoft.DynamicQuantizeLSTM<hidden_size=2>(x, W, R, , , , , , s, wz, s, wz) }",
        ("01011100 11101111 01000000", "00011100 00101111"),
        pi(1, 3, 8, dtype=np.int8),
        pi(1, 2, 8, dtype=np.int8),
        columns,
        s=np.array([0.5], F32),
        wz=np.zeros(1, np.int8),
    ),
    two(
        "DynamicQuantizeLSTM bidirectional",
        "(float[2,1,3] x) => (float[2,2,1,2] y) "
        '{ y = com.microsoft.DynamicQuantizeLSTM<hidden_size=2, direction="bidirectional">'
        "(x, W, R, , , , , , s, wz, s, rz) }",
        ("110111001110111101000000 000001110000011100011111", "1101110011101111 0000000000010111"),
        pi(2, 3, 8, dtype=np.uint8, offset=[[[20]], [[200]]]),
        pi(2, 2, 8, dtype=np.uint8, offset=[[[100]], [[30]]]),
        columns,
        (shifted([[[20]], [[200]]], [[[0.5]], [[0.375]]]), shifted([[[100]], [[30]]], [[[0.5]], [[0.375]]])),
        s=np.array([0.5, 0.375], F32),
        wz=np.array([20, 200], np.uint8),
        rz=np.array([100, 30], np.uint8),
    ),
]
