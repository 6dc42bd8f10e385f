"""Every constant expression between a stored tensor and its operand: moves, chains of moves, scales, parts of tensors."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from nets import Net, Operand, parse, pi
from weight_oracle import check

import onnxprune

F32 = np.float32
I64 = np.int64


def columns(x: np.ndarray) -> np.ndarray:
    return x.T


def ints(*values: int) -> np.ndarray:
    return np.array(values, I64)


def matmul(
    id: str, expression: str, keeps: str, w: np.ndarray, opset: int = 21, k: int = 3, n: int = 4, **arrays: np.ndarray
) -> Net:
    """x @ V, where the expression makes V (k by n) from W."""
    model = parse(f"(float[2,{k}] x) => (float[2,{n}] y) {{ {expression} y = MatMul(x, V) }}", opset, W=w, **arrays)
    return Net(id, model, {"W": keeps}, {"W": [Operand("V", columns)]})


MOVES = [
    matmul("Identity", "V = Identity(W)", "0001 1010 1011", pi(3, 4)),
    matmul("Transpose", "V = Transpose(W)", "000 110 101 011", pi(4, 3)),
    matmul("Transpose perm", "V = Transpose<perm=[1, 0]>(W)", "000 110 101 011", pi(4, 3)),
    matmul("Reshape", "V = Reshape(W, s)", "000110 101011", pi(2, 6), s=ints(3, -1)),
    matmul("Reshape zero", "V = Reshape(W, s)", "0001 1010 1011", pi(3, 2, 2), s=ints(0, 4)),
    matmul("Squeeze", "V = Squeeze(W)", "0001 1010 1011", pi(1, 3, 1, 4)),
    matmul("Squeeze axes", "V = Squeeze(W, a)", "0001 1010 1011", pi(1, 3, 1, 4), a=ints(0, -2)),
    matmul("Squeeze attribute", "V = Squeeze<axes=[0]>(W)", "0001 1010 1011", pi(1, 3, 4), opset=11),
    matmul(
        "Unsqueeze", "U = Unsqueeze(W, a) V = Squeeze(U, b)", "0001 1010 1011", pi(3, 4), a=ints(0, -1), b=ints(0, 3)
    ),
    matmul(
        "Unsqueeze scalar axis",
        "U = Unsqueeze(W, a) V = Squeeze(U, b)",
        "0001 1010 1011",
        pi(3, 4),
        a=I64(1).reshape(()),
        b=ints(1),
    ),
    matmul(
        "Unsqueeze attribute",
        "U = Unsqueeze<axes=[0, 3]>(W) V = Squeeze<axes=[0, 3]>(U)",
        "0001 1010 1011",
        pi(3, 4),
        opset=11,
    ),
    matmul("Flatten", "V = Flatten(W)", "0001 1010 1011", pi(3, 2, 2)),
    matmul("Flatten axis", "V = Flatten<axis=-1>(W)", "0001 1010 1011", pi(1, 3, 4)),
    matmul("Flatten axis 0", "V = Flatten<axis=0>(W)", "011", pi(3), k=1, n=3),
    matmul("Slice", "V = Slice(W, b, e)", "11111 01011 11001 01011 11111", pi(5, 5), b=ints(1, 0), e=ints(4, 4)),
    matmul(
        "Slice axes", "V = Slice(W, b, e, a)", "1111 1010 1011 0100 1111", pi(5, 4), b=ints(-4), e=ints(-1), a=ints(-2)
    ),
    matmul(
        "Slice steps",
        "V = Slice(W, b, e, a, s)",
        "10111010 10111110 10111111",
        pi(3, 8),
        b=ints(1),
        e=ints(2**62),
        a=ints(1),
        s=ints(2),
    ),
    matmul(
        "Slice backwards",
        "V = Slice(W, b, e, a, s)",
        "0100 1010 1011",
        pi(3, 4),
        b=ints(-1),
        e=ints(-(2**62)),
        a=ints(1),
        s=ints(-1),
    ),
    matmul(
        "Slice backwards by two",
        "V = Slice(W, b, e, a, s)",
        "111110101 111010111 111110101",
        pi(3, 9),
        b=ints(7),
        e=ints(0),
        a=ints(1),
        s=ints(-2),
    ),
    matmul(
        "Slice backwards from before the start",
        "U = Slice(W, b, e, a, s) V = Concat<axis=1>(U, W)",
        "0001 1010 1011",
        pi(3, 4),
        b=ints(-9),
        e=ints(-(2**62)),
        a=ints(1),
        s=ints(-1),
        n=5,
    ),
    matmul(
        "Slice attribute", "V = Slice<starts=[1], ends=[4], axes=[0]>(W)", "1111 1010 1011 0100 1111", pi(5, 4), opset=9
    ),
    matmul(
        "Split equal", "U, V, Z = Split<axis=1, num_outputs=3>(W)", "111110101111 111110101111 111110011111", pi(3, 12)
    ),
    matmul(
        "Split uneven count",
        "U, Z, V = Split<axis=0, num_outputs=3>(W)",
        "1111 1111 1111 1111 1111 1111 0011",
        pi(7, 4),
        k=1,
    ),
    matmul("Split sizes", "U, V = Split<axis=-1>(W, s)", "110110 111011 110010", pi(3, 6), s=ints(2, 4)),
    matmul("Split attribute", "U, V = Split<axis=0, split=[2, 3]>(W)", "1111 1111 1011 0000 1011", pi(5, 4), opset=11),
    matmul(
        "Split equal without a count", "U, V = Split<axis=0>(W)", "1111 1111 1111 0100 1011 0101", pi(6, 4), opset=13
    ),
    matmul("Gather rows", "V = Gather(W, i)", "0011 1111 1111 0100 1011", pi(5, 4), i=ints(4, 0, -2)),
    matmul(
        "Gather columns", "V = Gather<axis=1>(W, i)", "01101 01110 11100", pi(3, 5), i=np.array([3, 1, 0, 4], np.int32)
    ),
    matmul("Gather one", "V = Gather(W, i)", "111111111111 010010110101", pi(2, 3, 4), i=I64(1).reshape(())),
    matmul("Gather repeated", "V = Gather<axis=1>(W, i)", "010 110 101", pi(3, 3), i=ints(2, 0, 2, 1)),
    matmul("Expand", "V = Expand(W, s)", "011", pi(3, 1), s=ints(3, 4)),
    matmul("Expand rank", "U = Expand(W, s) V = Squeeze(U)", "0011", pi(4), s=ints(1, 3, 1)),
    matmul("Tile", "V = Tile(W, r)", "01 01 10", pi(3, 2), r=ints(1, 2)),
    matmul("Cast", "V = Cast<to=1>(W)", "0001 1010 1011", pi(3, 4, dtype=np.float16)),
    matmul("CastLike", "V = CastLike(W, f)", "0001 1010 1011", pi(3, 4, dtype=np.float64), f=np.zeros(1, F32)),
    matmul(
        "Cast down ties what it rounds",
        "U = Cast<to=10>(W) V = Cast<to=1>(U)",
        "0001 1010 1011",
        pi(3, 4) + np.linspace(0, 1e-5, 12).reshape(3, 4)[::-1].astype(F32),
    ),
    matmul(
        "Transpose, Reshape, Slice",
        "T = Transpose<perm=[2, 0, 1]>(W) R = Reshape(T, r) V = Slice(R, b, e, a, s)",
        "111110111011 111010111100",
        pi(2, 4, 3),
        r=ints(3, 8),
        b=ints(7),
        e=ints(-9),
        a=ints(1),
        s=ints(-2),
    ),
    matmul("computed shape", "s = Shape(like) V = Reshape(W, s)", "000110101011", pi(12), like=np.zeros((3, 4), F32)),
    matmul(
        "computed indices",
        "r = Range(zero, four, one) i = Sub(three, r) V = Gather<axis=1>(W, i)",
        "0100 1010 1011",
        pi(3, 4),
        zero=I64(0).reshape(()),
        one=I64(1).reshape(()),
        three=I64(3).reshape(()),
        four=I64(4).reshape(()),
    ),
]

SCALED = [
    matmul("Mul by a scalar", "V = Mul(W, s)", "0001 1010 1011", pi(3, 4), s=F32(-0.5).reshape(())),
    matmul("Mul per channel", "V = Mul(s, W)", "0011 0011 0011", pi(3, 4), s=np.array([1, 0.5, 2, -3], F32)),
    matmul("Mul per row", "V = Mul(W, s)", "0011 0000 1111", pi(3, 4), s=np.array([[1], [0.5], [2]], F32)),
    matmul("Div per channel", "V = Div(W, s)", "0100 1100 1110", pi(3, 4), s=np.array([1, 0.5, 2, -3], F32)),
    matmul(
        "Mul, then Transpose",
        "U = Mul(W, s) V = Transpose(U)",
        "001 101 101 001",
        pi(4, 3),
        s=np.array([1, 0.5, 2], F32),
    ),
    matmul(
        "Mul by a computed scale",
        "r = Sqrt(s) V = Mul(W, r)",
        "0011 0011 0011",
        pi(3, 4),
        s=np.array([1, 4, 9, 16], F32),
    ),
    matmul(
        "int8 by Cast and Mul",
        "U = Cast<to=1>(W) V = Mul(U, s)",
        "0110 1010 1010",
        pi(3, 4, dtype=np.int8),
        s=np.array([1, 0.5, 2, 0.25], F32),
    ),
    matmul(
        "uint8 by Cast, Sub and Mul",
        "U = Cast<to=1>(W) T = Sub(U, z) V = Mul(T, s)",
        "0001 1010 1011",
        pi(3, 4, dtype=np.uint8, offset=[9, 8, 7, 6]),
        z=np.array([9, 8, 7, 6], F32),
        s=F32(0.1).reshape(()),
    ),
    matmul("centred floats", "V = Sub(W, z)", "0001 1010 1011", pi(3, 4, offset=5), z=F32(5).reshape(())),
    matmul(
        "DequantizeLinear",
        "V = DequantizeLinear(W, s)",
        "0001 1010 1011",
        pi(3, 4, dtype=np.int8),
        s=F32(0.5).reshape(()),
    ),
    matmul(
        "DequantizeLinear uint8",
        "V = DequantizeLinear(W, s, z)",
        "0001 1010 1011",
        pi(3, 4, dtype=np.uint8, offset=128),
        s=F32(0.5).reshape(()),
        z=np.uint8(128).reshape(()),
    ),
    matmul(
        "DequantizeLinear per column",
        "V = DequantizeLinear(W, s, z)",
        "0110 1010 1010",
        pi(3, 4, dtype=np.uint8, offset=[4, 99, 128, 250]),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.array([4, 99, 128, 250], np.uint8),
    ),
    matmul(
        "DequantizeLinear per row",
        "V = DequantizeLinear<axis=-2>(W, s, z)",
        "0011 0000 1111",
        pi(3, 4, dtype=np.int8, offset=[[4], [-99], [0]]),
        s=np.array([1, 0.5, 2], F32),
        z=np.array([4, -99, 0], np.int8),
    ),
    matmul(
        "DequantizeLinear in blocks",
        "V = DequantizeLinear<axis=0, block_size=2>(W, s, z)",
        "001 001 011 011",
        pi(4, 3, dtype=np.uint8, offset=np.repeat([[9, 8, 7], [6, 5, 4]], 2, 0)),
        s=np.array([[1, 0.5, 2], [0.25, 3, 1]], F32),
        z=np.array([[9, 8, 7], [6, 5, 4]], np.uint8),
        k=4,
        n=3,
    ),
    matmul(
        "DequantizeLinear in uneven blocks",
        "V = DequantizeLinear<axis=1, block_size=3>(W, s)",
        "0000 1010 1111",
        pi(3, 4, dtype=np.int8),
        s=np.array([[1, 0.5], [2, 0.25], [3, 1]], F32),
    ),
    matmul(
        "DequantizeLinear contrib",
        "V = com.microsoft.DequantizeLinear<axis=1>(W, s, z)",
        "0110 1010 1010",
        pi(3, 4, dtype=np.uint8, offset=7),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.full(4, 7, np.uint8),
    ),
    matmul(
        "DequantizeLinear, then Transpose",
        "U = DequantizeLinear<axis=0>(W, s, z) V = Transpose(U)",
        "011 010 111 000",
        pi(4, 3, dtype=np.uint8, offset=[[9], [8], [7], [6]]),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.array([9, 8, 7, 6], np.uint8),
    ),
    matmul(
        "Transpose, then DequantizeLinear",
        "U = Transpose(W) V = DequantizeLinear<axis=1>(U, s, z)",
        "011 010 111 000",
        pi(4, 3, dtype=np.uint8, offset=[[9], [8], [7], [6]]),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.array([9, 8, 7, 6], np.uint8),
    ),
    matmul(
        "DequantizeLinear, then Mul",
        "U = DequantizeLinear(W, s) V = Mul(U, t)",
        "0101 1001 1001",
        pi(3, 4, dtype=np.int8),
        s=F32(0.5).reshape(()),
        t=np.array([1, 2, 0.5, 3], F32),
    ),
    matmul(
        "quantised and dequantised",
        "Q = QuantizeLinear(W, s, z) V = DequantizeLinear(Q, s, z)",
        "0001 1010 1011",
        pi(3, 4),
        s=F32(0.25).reshape(()),
        z=np.uint8(100).reshape(()),
    ),
    matmul(
        "quantised and dequantised per column",
        "Q = QuantizeLinear(W, s, z) V = DequantizeLinear(Q, s, z)",
        "0001 1010 1011",
        pi(3, 4),
        s=np.array([0.5, 0.25, 0.125, 1], F32),
        z=np.zeros(4, np.int8),
    ),
]

GATES = (
    "i = Slice(W, b0, b1, a) f = Slice(W, b1, b2, a) c = Slice(W, b2, b3, a) o = Slice(W, b3, b4, a) "
    "V = Concat<axis=1>(i, o, f, c) "
)

PARTS = [
    Net(
        "LSTM gates in another order",
        parse(
            f"(float[2,1,3] x) => (float[2,1,1,2] y) {{ {GATES} y = LSTM<hidden_size=2>(x, V, R) }}",
            W=pi(1, 8, 3),
            R=pi(1, 8, 2),
            a=ints(1),
            b0=ints(0),
            b1=ints(2),
            b2=ints(4),
            b3=ints(6),
            b4=ints(8),
        ),
        {"W": "000 110 101 011 010 010 110 101", "R": "00 11 10 10 10 11 01 00"},
        {"W": [Operand("V", lambda x: x[0])], "R": [Operand("R", lambda x: x[0])]},
    ),
    Net(
        "LSTM from torch",
        parse(
            "(float[2,1,3] x) => (float[2,1,1,2] y) { i = Slice(W, b0, b1) o = Slice(W, b3, b4) m = Slice(W, b1, b3) "
            "V = Concat<axis=0>(i, o, m) U = Unsqueeze(V, b0) y = LSTM<hidden_size=2>(x, U, R) }",
            W=pi(8, 3),
            R=pi(1, 8, 2),
            b0=ints(0),
            b1=ints(2),
            b3=ints(6),
            b4=ints(8),
        ),
        {"W": "000 110 101 011 010 010 110 101", "R": "00 11 10 10 10 11 01 00"},
        {"W": [Operand("U", lambda x: x[0])], "R": [Operand("R", lambda x: x[0])]},
    ),
    Net(
        "NHWC kernel",
        parse(
            "(float[1,2,3,3] x) => (float[1,3,2,2] y) { V = Transpose<perm=[3, 2, 0, 1]>(W) y = Conv(x, V) }",
            W=pi(2, 2, 2, 3),
        ),
        {"W": "001010101011 010010110101"},
        {"W": [Operand("V")]},
    ),
    Net(
        "two initializers joined",
        parse("(float[2,3] x) => (float[2,4] y) { V = Concat<axis=1>(A, B) y = MatMul(x, V) }", A=pi(3, 1), B=pi(3, 3)),
        {"A": "011", "B": "011 010 101"},
        {"A": [Operand("V", columns)], "B": [Operand("V", columns)]},
    ),
    Net(
        "two directions joined",
        parse(
            '(float[2,1,3] x) => (float[2,2,1,2] y) { V = Concat<axis=0>(A, B) y = RNN<hidden_size=2, direction="bidirectional">(x, V, R) }',
            A=pi(1, 2, 3),
            B=pi(1, 2, 3),
            R=pi(2, 2, 2),
        ),
        {"A": "001 110", "B": "001 110", "R": "0011 1010"},
        {name: [Operand(value, np.concatenate)] for name, value in (("A", "V"), ("B", "V"), ("R", "R"))},
    ),
    Net(
        "joined from quantised parts",
        parse(
            "(float[2,3] x) => (float[2,4] y) "
            "{ a = DequantizeLinear(A, s, za) b = DequantizeLinear(B, s, zb) V = Concat<axis=1>(a, b) y = MatMul(x, V) }",
            A=pi(3, 2, dtype=np.uint8, offset=9),
            B=pi(3, 2, dtype=np.uint8, offset=200),
            s=F32(0.5).reshape(()),
            za=np.uint8(9).reshape(()),
            zb=np.uint8(200).reshape(()),
        ),
        {"A": "01 01 10", "B": "01 01 10"},
        {"A": [Operand("V", columns)], "B": [Operand("V", columns)]},
    ),
    Net(
        "joined with itself",
        parse("(float[2,3] x) => (float[2,4] y) { V = Concat<axis=1>(W, W) y = MatMul(x, V) }", W=pi(3, 2)),
        {"W": "01 01 10"},
        {"W": [Operand("V", columns)]},
    ),
    Net(
        "merged projection split in three",
        parse(
            "(float[2,3] x) => (float[2,6] y) { Q, K, V = Split<axis=1, num_outputs=3>(W) "
            "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V) y = Concat<axis=1>(q, k, v) }",
            W=pi(3, 6),
        ),
        {"W": "001110 101011 010010"},
        {"W": [Operand(v, columns) for v in "QKV"]},
        {"W": "MatMul"},
    ),
    Net(
        "merged projection split and transposed, in float64",
        parse(
            "(double[2,3] x) => (double[2,6] y) { Q, K, V = Split<axis=0>(W, s) q = Gemm<transB=1>(x, Q) "
            "k = Gemm<transB=1>(x, K) v = Gemm<transB=1>(x, V) y = Concat<axis=1>(q, k, v) }",
            W=pi(6, 3, dtype=np.float64) * (1 - np.arange(18).reshape(6, 3) * 1e-13),
            s=ints(1, 2, 3),
        ),
        {"W": "011 110 101 011 000 010"},
        {"W": [Operand(v) for v in "QKV"]},
        {"W": "Gemm"},
    ),
    Net(
        "one of the parts used",
        parse(
            "(float[2,3] x) => (float[2,2] y) { Q, K, V = Split<axis=1, num_outputs=3>(W) y = MatMul(x, K) }",
            W=pi(3, 6),
        ),
        {"W": "111111 111011 110011"},
        {"W": [Operand("K", columns)]},
    ),
    Net(
        "overlapping parts",
        parse(
            "(float[2,3] x) => (float[2,3] y) { A = Slice(W, b0, b2) B = Slice(W, b1, b3) "
            "a = Gemm<transB=1>(x, A) b = Gemm<transB=1>(x, B) y = Add(a, b) }",
            W=pi(5, 3),
            b0=ints(0),
            b1=ints(2),
            b2=ints(3),
            b3=ints(5),
        ),
        {"W": "001 110 101 011 010"},
        {"W": [Operand("A"), Operand("B")]},
        {"W": "Gemm"},
    ),
    Net(
        "shared by nine Convs",
        parse(
            "(float[1,2,20] x0) => (float[1,2,2] x9) { "
            + " ".join(f"x{i + 1} = Conv(x{i}, W)" for i in range(9))
            + " }",
            W=pi(2, 2, 3),
        ),
        {"W": "000110 101011"},
        {"W": [Operand("W")] * 9},
    ),
    Net(
        "shared, and transposed the second time",
        parse("(float[2,3] x) => (float[2,3] y) { h = MatMul(x, W) y = Gemm<transB=1>(h, W) }", W=pi(3, 3)),
        {"W": "011 010 101"},
        {"W": [Operand("W", columns)]},
        {"W": "MatMul"},
    ),
    Net(
        "shared, and scaled the first time",
        parse(
            "(float[2,3] x) => (float[2,3] y) { U = Mul(W, s) h = MatMul(x, U) y = MatMul(h, W) }",
            W=pi(3, 3),
            s=np.array([1, 0.1, 5], F32),
        ),
        {"W": "001 101 101"},
        {"W": [Operand("U", columns), Operand("W", columns)]},
        {"W": "MatMul"},
    ),
    Net(
        "shared in parts, and scaled the first time",
        parse(
            "(float[2,3] x) => (float[2,3] y) { U = Mul(W, s) A, B = Split<axis=1>(U, n) C, D = Split<axis=1>(W, n) "
            "a = MatMul(x, A) b = MatMul(x, B) h = Concat<axis=1>(a, b) c = MatMul(h, C) d = MatMul(h, D) y = Concat<axis=1>(c, d) }",
            W=pi(3, 3),
            s=np.array([1, 0.1, 5], F32),
            n=ints(1, 2),
        ),
        {"W": "001 101 101"},
        {"W": [Operand(v, columns) for v in "ABCD"]},
        {"W": "MatMul"},
    ),
    Net(
        "Embedding",
        parse("(int64[2,5] i) => (float[2,5,4] y) { y = Gather(W, i) }", W=pi(6, 4)),
        {"W": "0001 1010 1011 0100 1011 0101"},
        {"W": [Operand("W")]},
        {"W": "Embedding"},
        op_types=["Embedding"],
    ),
    Net(
        "Embedding dequantised",
        parse(
            "(int64[2,5] i) => (float[2,5,4] y) { V = DequantizeLinear(W, s, z) y = Gather(V, i) }",
            W=pi(6, 4, dtype=np.uint8, offset=9),
            s=F32(0.5).reshape(()),
            z=np.uint8(9).reshape(()),
        ),
        {"W": "0001 1010 1011 0100 1011 0101"},
        {"W": [Operand("V")]},
        {"W": "Embedding"},
        op_types=["Embedding"],
    ),
    Net(
        "Embedding by constant positions",
        parse("(float[1,4] x) => (float[3,4] y) { P = Gather(W, i) y = Add(x, P) }", W=pi(6, 4), i=ints(0, 1, 2)),
        {"W": "0001 1010 1011 0100 1011 0101"},
        {"W": [Operand("W")]},
        {"W": "Embedding"},
        op_types=["Embedding"],
    ),
    Net(
        "Embedding tied to a MatMul",
        parse("(int64[2] i) => (float[2,6] y) { h = Gather(W, i) V = Transpose(W) y = MatMul(h, V) }", W=pi(6, 4)),
        {"W": "0001 1010 1011 0100 1011 0101"},
        {"W": [Operand("V", columns), Operand("W")]},
        {"W": "MatMul"},
    ),
]


@pytest.mark.parametrize("net", MOVES + SCALED + PARTS, ids=lambda net: net.id)
def test_layout(net):
    check(net)
