"""Weights inside sub-graphs and functions, captured from outer scopes, and listed as graph inputs."""

from __future__ import annotations

import numpy as np
import pytest
from nets import Net, Operand, parse, pi
from weight_oracle import check

import onnxprune

COLUMNS = np.transpose
TRUE, FALSE = {"c": np.array(True)}, {"c": np.array(False)}
W1 = "<float[3,4] W = {3, -1, 2, -1, 1, -3, 2, -1, 3, -3, 1, -2}>"
W2 = "<float[3,4] W = {1, -1, 2, -2, 3, -3, 3, -2, 2, -1, 1, -1}>"
TENSOR1 = "float[3,4] {3, -1, 2, -1, 1, -3, 2, -1, 3, -3, 1, -2}"
TENSOR2 = "float[3,4] {1, -1, 2, -2, 3, -3, 3, -2, 2, -1, 1, -1}"
FUNCTION = '<domain: "own", opset_import: ["": 21, "own": 1]>'

NESTED = [
    Net(
        "both branches of an If, with the same names",
        parse(
            f"""(bool c, float[2,3] x) => (float[2,4] y, float[3,4] s) {{ y, s = If(c) <
            then_branch = t () => (float[2,4] a, float[3,4] b) {W1} {{ a = MatMul(x, W) b = Identity(W) }},
            else_branch = e () => (float[2,4] a, float[3,4] b) {W2} {{ a = MatMul(x, W) b = Identity(W) }} > }}"""
        ),
        {"W": "1000 0110 1101", "W.2": "0011 1111 0000"},
        {"W": [Operand("s", COLUMNS, given=TRUE)], "W.2": [Operand("s", COLUMNS, given=FALSE)]},
        {"W": "MatMul", "W.2": "MatMul"},
        {"W": ("W", 0), "W.2": ("W", 1)},
    ),
    Net(
        "captured by both branches",
        parse(
            """(bool c, float[2,3] x) => (float[2,4] y) { y = If(c) <
            then_branch = t () => (float[2,4] a) { a = MatMul(x, W) },
            else_branch = e () => (float[2,4] b) { V = Transpose(W) b = Gemm<transB=1>(x, V) } > }""",
            W=pi(3, 4),
        ),
        {"W": "0101 0100 1110"},
        {"W": [Operand("W", COLUMNS)]},
        {"W": "MatMul"},
    ),
    Net(
        "Loop, with a weight of its own and one captured",
        parse(
            f"""(float[2,3] x) => (float[2,3] y, float[2,3,4] s) {{
            c = Constant<value=bool {{1}}>() n = Constant<value=int64 {{2}}>()
            y, s = Loop(n, c, x) <body = b (int64 i, bool c0, float[2,3] h) =>
            (bool c1, float[2,3] k, float[3,4] s0) {W1} {{
            c1 = Identity(c0) m = MatMul(h, W) k = Gemm<transB=1>(m, V) s0 = Identity(W) }}> }}""",
            V=pi(3, 4),
        ),
        {"W": "1000 0110 1101", "V": "0001 1100 1110"},
        {"W": [Operand("s", lambda x: x[0].T)], "V": [Operand("V")]},
        {"W": "MatMul", "V": "Gemm"},
    ),
    Net(
        "Scan, captured through a Transpose",
        parse(
            """(float[2,3] x) => (float[2,4] y) { y = Scan<num_scan_inputs=1, body = b (float[3] h) => (float[4] k) {
            V = Transpose(W) k = MatMul(h, V) }>(x) }""",
            W=pi(4, 3),
        ),
        {"W": "000 111 001 110"},
        {"W": [Operand("W")]},
        {"W": "MatMul"},
    ),
    Net(
        "a state that a Loop hands on unchanged",
        parse(
            """(float[2,3] x) => (float[2,3] y, float[3,3] z) {
            c = Constant<value=bool {1}>() n = Constant<value=int64 {2}>() V = Transpose(W)
            y, z = Loop(n, c, x, V) <body = b (int64 i, bool c0, float[2,3] h, float[3,3] w) =>
            (bool c1, float[2,3] k, float[3,3] w1) { c1 = Identity(c0) k = MatMul(h, w) w1 = Identity(w) }> }""",
            W=pi(3, 3),
        ),
        {"W": "010 111 001"},
        {"W": [Operand("V", COLUMNS)]},
        {"W": "MatMul"},
    ),
    Net(
        "a state that a Scan hands on unchanged",
        parse(
            """(float[2,3] x) => (float[3,4] z, float[2,4] y) { z, y = Scan<num_scan_inputs=1,
            body = b (float[3,4] w, float[3] h) => (float[3,4] w1, float[4] k)
            { w1 = Identity(w) k = MatMul(h, w) }>(W, x) }""",
            W=pi(3, 4),
        ),
        {"W": "0101 0100 1110"},
        {"W": [Operand("W", COLUMNS)]},
        {"W": "MatMul"},
    ),
    Net(
        "an If inside a Loop, captured two scopes up",
        parse(
            """(float[2,3] x) => (float[2,3] y) { c = Constant<value=bool {1}>() n = Constant<value=int64 {2}>()
            y = Loop(n, c, x) <body = b (int64 i, bool c0, float[2,3] h) => (bool c1, float[2,3] k) {
            c1 = Identity(c0) k = If(c0) <then_branch = t () => (float[2,3] p) { p = MatMul(h, W) },
            else_branch = e () => (float[2,3] q) { q = Identity(h) }> }> }""",
            W=pi(3, 3),
        ),
        {"W": "010 111 001"},
        {"W": [Operand("W", COLUMNS)]},
        {"W": "MatMul"},
    ),
    Net(
        "a function called twice with two weights",
        parse(
            f"(float[2,3] x) => (float[2,3] y) {{ h = own.dense(x, A) y = own.dense(h, B) }} {FUNCTION} "
            "dense (x, w) => (y) { v = Transpose(w) y = MatMul(x, v) }",
            A=pi(4, 3),
            B=pi(3, 4),
        ),
        {"A": "000 111 001 110", "B": "0001 1100 1110"},
        {"A": [Operand("A")], "B": [Operand("B")]},
        {"A": "MatMul", "B": "MatMul"},
    ),
    Net(
        "a function called twice with the same weight",
        parse(
            f"(float[2,3] x) => (float[2,3] y) {{ h = own.dense(x, W) y = own.dense(h, W) }} {FUNCTION} "
            "dense (x, w) => (y) { y = MatMul(x, w) }",
            W=pi(3, 3),
        ),
        {"W": "010 111 001"},
        {"W": [Operand("W", COLUMNS)]},
        {"W": "MatMul"},
    ),
    Net(
        "a function with its own weight, called twice",
        parse(
            f"(float[2,3] x) => (float[2,4] y) {{ a, s = own.dense(x) b, t = own.dense(x) y = Add(a, b) }} {FUNCTION} "
            f"dense (x) => (y, s) {{ W = Constant<value={TENSOR1}>() y = MatMul(x, W) s = Identity(W) }}"
        ),
        {"W": "1000 0110 1101"},
        {"W": [Operand("s", COLUMNS)]},
        {"W": "MatMul"},
    ),
    Net(
        "an attribute reference decides the layout",
        parse(
            f"(float[1,4,3] x) => (float[1,6,4] y) {{ y = own.up<groups=2>(x, W) }} {FUNCTION} "
            "up <groups> (x, w) => (y) { y = ConvTranspose<group: int = @groups>(x, w) }",
            W=pi(4, 3, 2),
        ),
        {"W": "010111 001110 111101 000000"},
        {"W": [Operand("W", lambda x: np.stack([g[:, m] for g in np.split(x, 2) for m in range(3)]))]},
        {"W": "ConvTranspose"},
    ),
    Net(
        "an attribute's default decides the layout",
        parse(
            f"(float[2,3] x) => (float[2,4] y) {{ y = own.dense(x, W) }} {FUNCTION} "
            "dense <flip: int = 1> (x, w) => (y) { y = Gemm<transB: int = @flip>(x, w) }",
            W=pi(4, 3),
        ),
        {"W": "000 111 001 110"},
        {"W": [Operand("W")]},
        {"W": "Gemm"},
    ),
    Net(
        "weights given as attributes, through two functions",
        parse(
            f"""(float[2,3] x) => (float[2,8] y)
            {{ a, s = own.outer<t={TENSOR1}>(x) b, r = own.outer<t={TENSOR2}>(x) y = Concat<axis=1>(a, b) }}
            {FUNCTION} outer <t> (x) => (y, s) {{ y, s = own.inner<u: tensor = @t>(x) }}
            {FUNCTION} inner <u> (x) => (y, s)
            {{ W = Constant<value: tensor = @u>() y = MatMul(x, W) s = Identity(W) }}"""
        ),
        {"W": "1000 0110 1101", "outer/inner/W": "0011 1111 0000"},
        {"W": [Operand("s", COLUMNS)], "outer/inner/W": [Operand("r", COLUMNS)]},
        {"W": "MatMul", "outer/inner/W": "MatMul"},
        {"W": ("a", 0), "outer/inner/W": ("b", 0)},
    ),
    Net(
        "a function inside a branch, its weight captured",
        parse(
            f"""(bool c, float[2,3] x) => (float[2,4] y) {{ y = If(c) <
            then_branch = t () => (float[2,4] a) {{ a = own.dense(x, W) }},
            else_branch = e () => (float[2,4] b) {{ b = own.dense(x, V) }} > }}
            {FUNCTION} dense (x, w) => (y) {{ y = MatMul(x, w) }}""",
            W=pi(3, 4),
            V=pi(3, 4) * np.float32(2),
        ),
        {"W": "0101 0100 1110", "V": "0101 0100 1110"},
        {"W": [Operand("W", COLUMNS)], "V": [Operand("V", COLUMNS)]},
        {"W": "MatMul", "V": "MatMul"},
    ),
    Net(
        "a function makes the operand",
        parse(
            f"(float[2,3] x) => (float[2,4] y) {{ V = own.weight(W, s) y = MatMul(x, V) }} {FUNCTION} "
            "weight (w, s) => (v) { u = Transpose(w) v = Mul(u, s) }",
            W=pi(4, 3),
            s=np.array([1, 0.5, 3, 0.1], np.float32),
        ),
        {"W": "110 001 111 000"},
        {"W": [Operand("V", COLUMNS)]},
    ),
    Net(
        "initializers listed as inputs, IR version 3",
        parse("(float[2,3] x, float[3,4] W) => (float[2,4] y) { y = MatMul(x, W) }", 8, 3, W=pi(3, 4)),
        {"W": "0101 0100 1110"},
        {"W": [Operand("W", COLUMNS)]},
    ),
    Net(
        "initializers listed as inputs, IR version 10",
        parse("(float[2,3] x, float[3,4] W) => (float[2,4] y) { y = MatMul(x, W) }", W=pi(3, 4)),
        {"W": "0101 0100 1110"},
        {"W": [Operand("W", COLUMNS)]},
    ),
]


@pytest.mark.parametrize("net", NESTED, ids=lambda net: net.id)
def test_nested(net):
    check(net)


def test_names_of_a_weight_tell_where_it_is():
    """An op_names entry may name the initializer, the call or the node."""
    model = parse(
        "(float[2,3] x) => (float[2,8] y) { [one] a = own.dense(x) [two] b = own.dense(x) y = Concat<axis=1>(a, b) } "
        f"{FUNCTION} "
        f"dense (x) => (y) {{ W = Constant<value={TENSOR1}>() [product] y = MatMul(x, W) }}"
    )
    result = onnxprune.prune(model, [{"sparsity": 0.5, "op_names": ["product"]}])
    assert list(result.masks) == ["W"]
