"""Parts of tensors, tensors joined, tensors with several readers: what is one weight, and in which order it reads."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import onnx
import pytest
from nets import Net, Operand, parse, pi
from weight_oracle import check

from onnxprune import prune
from onnxprune.graph.model import load
from onnxprune.graph.weights import find

F32 = np.float32
I64 = np.int64


def columns(x: np.ndarray) -> np.ndarray:
    return x.T


def ints(*values: int) -> np.ndarray:
    return np.array(values, I64)


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
        {"W": "010 111 001 110 111 101 000 000", "R": "00 00 01 00 11 10 11 11"},
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
        {"W": "010 111 001 110 111 101 000 000", "R": "00 00 01 00 11 10 11 11"},
        {"W": [Operand("U", lambda x: x[0])], "R": [Operand("R", lambda x: x[0])]},
    ),
    Net(
        "NHWC kernel",
        parse(
            "(float[1,2,3,3] x) => (float[1,3,2,2] y) { V = Transpose<perm=[3, 2, 0, 1]>(W) y = Conv(x, V) }",
            W=pi(2, 2, 2, 3),
        ),
        {"W": "010111001110 111101000000"},
        {"W": [Operand("V")]},
    ),
    Net(
        "two initializers joined",
        parse("(float[2,3] x) => (float[2,4] y) { V = Concat<axis=1>(A, B) y = MatMul(x, V) }", A=pi(3, 1), B=pi(3, 3)),
        {"A": "110", "B": "010 111 001"},
        {"A": [Operand("V", columns)], "B": [Operand("V", columns)]},
    ),
    Net(
        "two directions joined",
        parse(
            "(float[2,1,3] x) => (float[2,2,1,2] y) { V = Concat<axis=0>(A, B) "
            'y = RNN<hidden_size=2, direction="bidirectional">(x, V, R) }',
            A=pi(1, 2, 3),
            B=pi(1, 2, 3),
            R=pi(2, 2, 2),
        ),
        {"A": "000 111", "B": "000 111", "R": "0101 1100"},
        {name: [Operand(value, np.concatenate)] for name, value in (("A", "V"), ("B", "V"), ("R", "R"))},
    ),
    Net(
        "joined from quantised parts",
        parse(
            "(float[2,3] x) => (float[2,4] y) "
            "{ a = DequantizeLinear(A, s, za) b = DequantizeLinear(B, s, zb) "
            "V = Concat<axis=1>(a, b) y = MatMul(x, V) }",
            A=pi(3, 2, dtype=np.uint8, offset=9),
            B=pi(3, 2, dtype=np.uint8, offset=200),
            s=F32(0.5).reshape(()),
            za=np.uint8(9).reshape(()),
            zb=np.uint8(200).reshape(()),
        ),
        {"A": "01 01 01", "B": "01 01 01"},
        {"A": [Operand("V", columns)], "B": [Operand("V", columns)]},
    ),
    Net(
        "joined with itself",
        parse("(float[2,3] x) => (float[2,4] y) { V = Concat<axis=1>(W, W) y = MatMul(x, V) }", W=pi(3, 2)),
        {"W": "01 01 01"},
        {"W": [Operand("V", columns)]},
    ),
    Net(
        "merged projection split in three",
        parse(
            "(float[2,3] x) => (float[2,6] y) { Q, K, V = Split<axis=1, num_outputs=3>(W) "
            "q = MatMul(x, Q) k = MatMul(x, K) v = MatMul(x, V) y = Concat<axis=1>(q, k, v) }",
            W=pi(3, 6),
        ),
        {"W": "000111 001110 001101"},
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
        {"W": "110 111 001 110 100 000"},
        {"W": [Operand(v) for v in "QKV"]},
        {"W": "Gemm"},
    ),
    Net(
        "one of the parts used",
        parse(
            "(float[2,3] x) => (float[2,2] y) { Q, K, V = Split<axis=1, num_outputs=3>(W) y = MatMul(x, K) }",
            W=pi(3, 6),
        ),
        {"W": "110111 110111 110111"},
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
        {"W": "000 011 001 110 111"},
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
        {"W": "000111 001110"},
        {"W": [Operand("W")] * 9},
    ),
    Net(
        "shared, and transposed the second time",
        parse("(float[2,3] x) => (float[2,3] y) { h = MatMul(x, W) y = Gemm<transB=1>(h, W) }", W=pi(3, 3)),
        {"W": "010 111 001"},
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
        {"W": "101 101 001"},
        {"W": [Operand("U", columns), Operand("W", columns)]},
        {"W": "MatMul"},
    ),
    Net(
        "shared in parts, and scaled the first time",
        parse(
            "(float[2,3] x) => (float[2,3] y) { U = Mul(W, s) A, B = Split<axis=1>(U, n) C, D = Split<axis=1>(W, n) "
            "a = MatMul(x, A) b = MatMul(x, B) h = Concat<axis=1>(a, b) "
            "c = MatMul(h, C) d = MatMul(h, D) y = Concat<axis=1>(c, d) }",
            W=pi(3, 3),
            s=np.array([1, 0.1, 5], F32),
            n=ints(1, 2),
        ),
        {"W": "101 101 001"},
        {"W": [Operand(v, columns) for v in "ABCD"]},
        {"W": "MatMul"},
    ),
    Net(
        "Embedding",
        parse("(int64[2,5] i) => (float[2,5,4] y) { y = Gather(W, i) }", W=pi(6, 4)),
        {"W": "0101 1100 1110 1111 0100 0000"},
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
        {"W": "0101 1100 1110 1111 0100 0000"},
        {"W": [Operand("V")]},
        {"W": "Embedding"},
        op_types=["Embedding"],
    ),
    Net(
        "Embedding by constant positions",
        parse("(float[1,4] x) => (float[3,4] y) { P = Gather(W, i) y = Add(x, P) }", W=pi(6, 4), i=ints(0, 1, 2)),
        {"W": "0101 1100 1110 1111 0100 0000"},
        {"W": [Operand("W")]},
        {"W": "Embedding"},
        op_types=["Embedding"],
    ),
    Net(
        "Embedding tied to a MatMul",
        parse("(int64[2] i) => (float[2,6] y) { h = Gather(W, i) V = Transpose(W) y = MatMul(h, V) }", W=pi(6, 4)),
        {"W": "0101 1100 1110 1111 0100 0000"},
        {"W": [Operand("V", columns), Operand("W")]},
        {"W": "MatMul"},
    ),
]


@pytest.mark.parametrize("net", PARTS, ids=lambda net: net.id)
def test_parts(net):
    check(net)


def shuffled(pieces: list[tuple[int, int]], order: list[int], whole: bool = False) -> onnx.ModelProto:
    """Products with column slices of one matrix, whose nodes stand in a given order."""
    nodes = []
    for i in order:
        nodes.append(f"V{i} = Slice(W, b{i}, e{i}, axes) y{i} = MatMul(x, V{i})")
    nodes.insert(len(nodes) // 2, "all = MatMul(x, W)" if whole else "")
    names = [f"y{i}" for i in range(len(pieces))] + ["all"] * whole
    outputs = ", ".join(f"float[2,n{name}] {name}" for name in names)
    bounds = {f"{end}{i}": ints(piece[k]) for i, piece in enumerate(pieces) for k, end in enumerate("be")}
    rng = np.random.default_rng(0)
    weight = rng.choice([-2, -1, 1, 2], (5, 9)).astype(F32)
    return parse(f"(float[2,5] x) => ({outputs}) {{ {' '.join(nodes)} }}", W=weight, axes=ints(1), **bounds)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "pieces",
    [
        [(0, 3), (3, 6), (6, 9)],
        [(0, 2), (2, 4), (7, 9)],
        [(0, 5), (3, 8), (6, 9)],  # overlapping
        [(0, 2), (0, 9), (4, 6)],  # one inside the other
    ],
    ids=str,
)
def test_ties_do_not_depend_on_the_order_of_operators(pieces, whole):
    config = [{"sparsity": 0.5}]
    models = [shuffled(pieces, list(order), whole) for order in permutations(range(3))]
    seen = [find(load(model))[0][0].values() for model in models]
    assert all(np.array_equal(other, seen[0]) for other in seen)
    masks = [prune(model, config).masks for model in models]
    assert all(other == masks[0] for other in masks)
    gone = masks[0]["W"].size - int(masks[0]["W"].sum())
    read = 9 if whole else len({c for piece in pieces for c in range(*piece)})
    assert gone == int(5 * read * 0.5)
