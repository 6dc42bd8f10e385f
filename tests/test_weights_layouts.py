"""Every constant expression between a stored tensor and its operand: moves, chains of moves, scales."""

from __future__ import annotations

import numpy as np
import pytest
from nets import Net, Operand, parse, pi
from weight_oracle import check

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
    matmul("Identity", "V = Identity(W)", "0101 0100 1110", pi(3, 4)),
    matmul("Transpose", "V = Transpose(W)", "000 111 001 110", pi(4, 3)),
    matmul("Transpose perm", "V = Transpose<perm=[1, 0]>(W)", "000 111 001 110", pi(4, 3)),
    matmul("Reshape", "V = Reshape(W, s)", "010101 001110", pi(2, 6), s=ints(3, -1)),
    matmul("Reshape zero", "V = Reshape(W, s)", "0101 0100 1110", pi(3, 2, 2), s=ints(0, 4)),
    matmul("Squeeze", "V = Squeeze(W)", "0101 0100 1110", pi(1, 3, 1, 4)),
    matmul("Squeeze axes", "V = Squeeze(W, a)", "0101 0100 1110", pi(1, 3, 1, 4), a=ints(0, -2)),
    matmul("Squeeze attribute", "V = Squeeze<axes=[0]>(W)", "0101 0100 1110", pi(1, 3, 4), opset=11),
    matmul(
        "Unsqueeze", "U = Unsqueeze(W, a) V = Squeeze(U, b)", "0101 0100 1110", pi(3, 4), a=ints(0, -1), b=ints(0, 3)
    ),
    matmul(
        "Unsqueeze scalar axis",
        "U = Unsqueeze(W, a) V = Squeeze(U, b)",
        "0101 0100 1110",
        pi(3, 4),
        a=I64(1).reshape(()),
        b=ints(1),
    ),
    matmul(
        "Unsqueeze attribute",
        "U = Unsqueeze<axes=[0, 3]>(W) V = Squeeze<axes=[0, 3]>(U)",
        "0101 0100 1110",
        pi(3, 4),
        opset=11,
    ),
    matmul("Flatten", "V = Flatten(W)", "0101 0100 1110", pi(3, 2, 2)),
    matmul("Flatten axis", "V = Flatten<axis=-1>(W)", "0101 0100 1110", pi(1, 3, 4)),
    matmul("Flatten axis 0", "V = Flatten<axis=0>(W)", "110", pi(3), k=1, n=3),
    matmul("Slice", "V = Slice(W, b, e)", "11111 00011 10111 10101 11111", pi(5, 5), b=ints(1, 0), e=ints(4, 4)),
    matmul(
        "Slice axes", "V = Slice(W, b, e, a)", "1111 0100 0110 0111 1111", pi(5, 4), b=ints(-4), e=ints(-1), a=ints(-2)
    ),
    matmul(
        "Slice steps",
        "V = Slice(W, b, e, a, s)",
        "10111110 11101111 11101010",
        pi(3, 8),
        b=ints(1),
        e=ints(2**62),
        a=ints(1),
        s=ints(2),
    ),
    matmul(
        "Slice backwards",
        "V = Slice(W, b, e, a, s)",
        "1100 1100 1100",
        pi(3, 4),
        b=ints(-1),
        e=ints(-(2**62)),
        a=ints(1),
        s=ints(-1),
    ),
    matmul(
        "Slice backwards by two",
        "V = Slice(W, b, e, a, s)",
        "111111101 111111101 101010101",
        pi(3, 9),
        b=ints(7),
        e=ints(0),
        a=ints(1),
        s=ints(-2),
    ),
    matmul(
        "Slice backwards from before the start",
        "U = Slice(W, b, e, a, s) V = Concat<axis=1>(U, W)",
        "0101 0100 1110",
        pi(3, 4),
        b=ints(-9),
        e=ints(-(2**62)),
        a=ints(1),
        s=ints(-1),
        n=5,
    ),
    matmul(
        "Slice attribute", "V = Slice<starts=[1], ends=[4], axes=[0]>(W)", "1111 0100 0110 0111 1111", pi(5, 4), opset=9
    ),
    matmul(
        "Split equal", "U, V, Z = Split<axis=1, num_outputs=3>(W)", "111111001111 111101001111 111101111111", pi(3, 12)
    ),
    matmul(
        "Split uneven count",
        "U, Z, V = Split<axis=0, num_outputs=3>(W)",
        "1111 1111 1111 1111 1111 1111 0101",
        pi(7, 4),
        k=1,
    ),
    matmul("Split sizes", "U, V = Split<axis=-1>(W, s)", "110011 110110 110101", pi(3, 6), s=ints(2, 4)),
    matmul("Split attribute", "U, V = Split<axis=0, split=[2, 3]>(W)", "1111 1111 0110 0111 0100", pi(5, 4), opset=11),
    matmul(
        "Split equal without a count", "U, V = Split<axis=0>(W)", "1111 1111 1111 1111 0100 0001", pi(6, 4), opset=13
    ),
    matmul(
        "SplitToSequence sizes",
        "q = SplitToSequence<axis=-1>(W, s) V = SequenceAt(q, i)",
        "011111 001111 111111",
        pi(3, 6),
        n=2,
        s=ints(2, 4),
        i=I64(0).reshape(()),
    ),
    matmul(
        "SplitToSequence of one size, the rest smaller",
        "q = SplitToSequence(W, s) V = SequenceAt(q, i)",
        "1111 1111 1111 1111 1111 1111 0101",
        pi(7, 4),
        k=1,
        s=I64(3).reshape(()),
        i=I64(2).reshape(()),
    ),
    matmul(
        "SplitToSequence from the end",
        "q = SplitToSequence<axis=1>(W, s) V = SequenceAt(q, i)",
        "111111001111 111101001111 111101111111",
        pi(3, 12),
        s=I64(4).reshape(()),
        i=I64(-2).reshape(()),
    ),
    matmul(
        "SplitToSequence singles",
        "q = SplitToSequence(W) U = SequenceAt(q, i) V = Squeeze(U, a)",
        "0101 0100 1110 1111 1111 1111",
        pi(2, 3, 4),
        i=I64(0).reshape(()),
        a=ints(0),
    ),
    matmul(
        "SplitToSequence singles without their axis",
        "q = SplitToSequence<axis=1, keepdims=0>(W) V = SequenceAt(q, i)",
        "0101 1111 0100 1111 1110 1111",
        np.stack([pi(3, 4), pi(3, 4)], 1),
        i=I64(0).reshape(()),
    ),
    matmul(
        "SequenceConstruct",
        "U = Transpose(W) q = SequenceConstruct(U, U) V = SequenceAt(q, i)",
        "000 111 001 110",
        pi(4, 3),
        i=I64(1).reshape(()),
    ),
    matmul("Gather rows", "V = Gather(W, i)", "0101 1111 1111 0111 0100", pi(5, 4), i=ints(4, 0, -2)),
    matmul(
        "Gather columns", "V = Gather<axis=1>(W, i)", "10101 10101 10101", pi(3, 5), i=np.array([3, 1, 0, 4], np.int32)
    ),
    matmul("Gather one", "V = Gather(W, i)", "111111111111 111101000001", pi(2, 3, 4), i=I64(1).reshape(())),
    matmul("Gather repeated", "V = Gather<axis=1>(W, i)", "110 110 001", pi(3, 3), i=ints(2, 0, 2, 1)),
    matmul("Expand", "V = Expand(W, s)", "110", pi(3, 1), s=ints(3, 4)),
    matmul("Expand rank", "U = Expand(W, s) V = Squeeze(U)", "0101", pi(4), s=ints(1, 3, 1)),
    matmul("Tile", "V = Tile(W, r)", "01 01 01", pi(3, 2), r=ints(1, 2)),
    matmul("Cast", "V = Cast<to=1>(W)", "0101 0100 1110", pi(3, 4, dtype=np.float16)),
    matmul("CastLike", "V = CastLike(W, f)", "0101 0100 1110", pi(3, 4, dtype=np.float64), f=np.zeros(1, F32)),
    matmul(
        "Cast down ties what it rounds",
        "U = Cast<to=10>(W) V = Cast<to=1>(U)",
        "0101 0100 1110",
        pi(3, 4) + np.linspace(0, 1e-5, 12).reshape(3, 4)[::-1].astype(F32),
    ),
    matmul(
        "Transpose, Reshape, Slice",
        "T = Transpose<perm=[2, 0, 1]>(W) R = Reshape(T, r) V = Slice(R, b, e, a, s)",
        "111111111110 111001111000",
        pi(2, 4, 3),
        r=ints(3, 8),
        b=ints(7),
        e=ints(-9),
        a=ints(1),
        s=ints(-2),
    ),
    matmul(
        "the shape of an input",
        "s = Shape<start=1>(x) t = Concat<axis=0>(s, f) V = Reshape(W, t)",
        "010101001110",
        pi(12),
        f=ints(4),
    ),
    matmul("computed shape", "s = Shape(like) V = Reshape(W, s)", "010101001110", pi(12), like=np.zeros((3, 4), F32)),
    matmul(
        "computed indices",
        "r = Range(zero, four, one) i = Sub(three, r) V = Gather<axis=1>(W, i)",
        "1100 1100 1100",
        pi(3, 4),
        zero=I64(0).reshape(()),
        one=I64(1).reshape(()),
        three=I64(3).reshape(()),
        four=I64(4).reshape(()),
    ),
]

SCALED = [
    matmul("Mul by a scalar", "V = Mul(W, s)", "0101 0100 1110", pi(3, 4), s=F32(-0.5).reshape(())),
    matmul("Mul per channel", "V = Mul(s, W)", "0011 0011 0011", pi(3, 4), s=np.array([1, 0.5, 2, -3], F32)),
    matmul("Mul per row", "V = Mul(W, s)", "0101 0000 1111", pi(3, 4), s=np.array([[1], [0.5], [2]], F32)),
    matmul("Div per channel", "V = Div(W, s)", "1100 1100 1100", pi(3, 4), s=np.array([1, 0.5, 2, -3], F32)),
    matmul(
        "Mul, then Transpose",
        "U = Mul(W, s) V = Transpose(U)",
        "001 101 001 101",
        pi(4, 3),
        s=np.array([1, 0.5, 2], F32),
    ),
    matmul(
        "Mul by a computed scale",
        "r = Sqrt(s) V = Mul(W, r)",
        "0001 0101 0111",
        pi(3, 4),
        s=np.array([1, 4, 9, 16], F32),
    ),
    matmul(
        "int8 by Cast and Mul",
        "U = Cast<to=1>(W) V = Mul(U, s)",
        "1010 1010 1010",
        pi(3, 4, dtype=np.int8),
        s=np.array([1, 0.5, 2, 0.25], F32),
    ),
    matmul(
        "uint8 by Cast, Sub and Mul",
        "U = Cast<to=1>(W) T = Sub(U, z) V = Mul(T, s)",
        "0101 0100 1110",
        pi(3, 4, dtype=np.uint8, offset=[9, 8, 7, 6]),
        z=np.array([9, 8, 7, 6], F32),
        s=F32(0.1).reshape(()),
    ),
    matmul("centred floats", "V = Sub(W, z)", "0101 0100 1110", pi(3, 4, offset=5), z=F32(5).reshape(())),
    matmul(
        "DequantizeLinear",
        "V = DequantizeLinear(W, s)",
        "0101 0100 1110",
        pi(3, 4, dtype=np.int8),
        s=F32(0.5).reshape(()),
    ),
    matmul(
        "DequantizeLinear uint8",
        "V = DequantizeLinear(W, s, z)",
        "0101 0100 1110",
        pi(3, 4, dtype=np.uint8, offset=128),
        s=F32(0.5).reshape(()),
        z=np.uint8(128).reshape(()),
    ),
    matmul(
        "DequantizeLinear per column",
        "V = DequantizeLinear(W, s, z)",
        "1010 1010 1010",
        pi(3, 4, dtype=np.uint8, offset=[4, 99, 128, 250]),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.array([4, 99, 128, 250], np.uint8),
    ),
    matmul(
        "DequantizeLinear per row",
        "V = DequantizeLinear<axis=-2>(W, s, z)",
        "0101 0000 1111",
        pi(3, 4, dtype=np.int8, offset=[[4], [-99], [0]]),
        s=np.array([1, 0.5, 2], F32),
        z=np.array([4, -99, 0], np.int8),
    ),
    matmul(
        "DequantizeLinear in blocks",
        "V = DequantizeLinear<axis=0, block_size=2>(W, s, z)",
        "001 101 011 010",
        pi(4, 3, dtype=np.uint8, offset=np.repeat([[9, 8, 7], [6, 5, 4]], 2, 0)),
        s=np.array([[1, 0.5, 2], [0.25, 3, 1]], F32),
        z=np.array([[9, 8, 7], [6, 5, 4]], np.uint8),
        k=4,
        n=3,
    ),
    matmul(
        "DequantizeLinear in uneven blocks",
        "V = DequantizeLinear<axis=1, block_size=3>(W, s)",
        "0000 1110 1110",
        pi(3, 4, dtype=np.int8),
        s=np.array([[1, 0.5], [2, 0.25], [3, 1]], F32),
    ),
    matmul(
        "DequantizeLinear contrib",
        "V = com.microsoft.DequantizeLinear<axis=1>(W, s, z)",
        "1010 1010 1010",
        pi(3, 4, dtype=np.uint8, offset=7),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.full(4, 7, np.uint8),
    ),
    matmul(
        "DequantizeLinear, then Transpose",
        "U = DequantizeLinear<axis=0>(W, s, z) V = Transpose(U)",
        "110 001 111 000",
        pi(4, 3, dtype=np.uint8, offset=[[9], [8], [7], [6]]),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.array([9, 8, 7, 6], np.uint8),
    ),
    matmul(
        "Transpose, then DequantizeLinear",
        "U = Transpose(W) V = DequantizeLinear<axis=1>(U, s, z)",
        "110 001 111 000",
        pi(4, 3, dtype=np.uint8, offset=[[9], [8], [7], [6]]),
        s=np.array([1, 0.5, 2, 0.25], F32),
        z=np.array([9, 8, 7, 6], np.uint8),
    ),
    matmul(
        "DequantizeLinear, then Mul",
        "U = DequantizeLinear(W, s) V = Mul(U, t)",
        "0101 0101 0101",
        pi(3, 4, dtype=np.int8),
        s=F32(0.5).reshape(()),
        t=np.array([1, 2, 0.5, 3], F32),
    ),
    matmul(
        "quantised and dequantised",
        "Q = QuantizeLinear(W, s, z) V = DequantizeLinear(Q, s, z)",
        "0101 0100 1110",
        pi(3, 4),
        s=F32(0.25).reshape(()),
        z=np.uint8(100).reshape(()),
    ),
    matmul(
        "quantised and dequantised per column",
        "Q = QuantizeLinear(W, s, z) V = DequantizeLinear(Q, s, z)",
        "0101 0100 1110",
        pi(3, 4),
        s=np.array([0.5, 0.25, 0.125, 1], F32),
        z=np.zeros(4, np.int8),
    ),
]


@pytest.mark.parametrize("net", MOVES + SCALED, ids=lambda net: net.id)
def test_layout(net):
    check(net)
