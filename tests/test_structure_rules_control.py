"""If, Loop and Scan: weights in bodies, weights captured, states tied, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from structure_oracle import Net, check, ints

from onnxprune.graph.model import load
from onnxprune.structure.plan import Plan

SCALAR = {"yes": np.array(True), "three": np.array(3)}
BODY = "g1 (int64 i, bool c, float[P,8] s) => (bool d, float[P,8] t) {"

NETS = [
    Net(
        "weights wholly inside a branch",
        """(float[N,3,4,4] x, bool c) => (float[N,2,4,4] y) {
            y = If (c) <
                then_branch = g1 () => (float[N,2,4,4] a) { h = Conv(x, w1, b1) r = Relu(h) a = Conv(r, w2) },
                else_branch = g2 () => (float[N,2,4,4] b) { k = Conv(x, w3) s = Sigmoid(k) b = Conv(s, w4) }>
        }""",
        {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (2, 8, 1, 1), "w3": (6, 3, 1, 1), "w4": (2, 6, 1, 1)},
        ("w1 8", "w3 6"),
        {"w2": "graph output 'y'", "w4": "graph output 'y'"},
    ),
    Net(
        "branches tied through their result",
        """(float[N,3,4,4] x, bool c) => (float[N,2,4,4] y) {
            z = If (c) <
                then_branch = g1 () => (float[N,8,4,4] a) { h = Conv(x, w1) a = Relu(h) },
                else_branch = g2 () => (float[N,8,4,4] a) { h = Conv(x, w2, b2) a = Tanh(h) }>
            y = Conv(z, w3)
        }""",
        {"w1": (8, 3, 1, 1), "w2": (8, 3, 1, 1), "b2": (8,), "w3": (2, 8, 1, 1)},
        ("w1 8",),
        {"w3": "graph output 'y'"},
    ),
    Net(
        "a branch that returns what it was given",
        """(float[N,3] x, bool c) => (float[N,2] y) {
            h = Gemm(x, w1, b1)
            z, u = If (c) <
                then_branch = g1 () => (float[N,8] a, float[N,4] p) { k = MatMul(h, w2) a = Add(k, h) p =
                    MatMul(h, w4) },
                else_branch = g2 () => (float[N,8] b, float[N,4] q) { b = Identity(h) q = MatMul(x, w5) }>
            v = MatMul(z, w3) o = MatMul(u, w6) y = Add(v, o)
        }""",
        {"w1": (3, 8), "b1": (8,), "w2": (8, 8), "w3": (8, 2), "w4": (8, 4), "w5": (3, 4), "w6": (4, 2)},
        ("w1 8", "w4 4"),
        {"w3": "graph output 'y'", "w6": "graph output 'y'"},
    ),
    Net(
        "branches of different shapes",
        """(float[1,3] x, bool c) => (float[1,2] y) {
            h = MatMul(x, w1)
            z = If (c) <
                then_branch = g1 () => (float[1,8] a) { a = Identity(h) },
                else_branch = g2 () => (float[2,8] b) { b = Concat<axis = 0>(h, h) }>
            r = ReduceMax<keepdims = 1>(z, rows) y = MatMul(r, w2)
        }""",
        {"w1": (3, 8), "w2": (8, 2), "rows": ints(0)},
        (),
        dict.fromkeys(
            ("w1", "w2"), "If 'z' returns a value of shape [1, 8] or [2, 8], depending on the branch it takes"
        ),
    ),
    Net(
        "a loop over a state",
        f"""(float[N,3] x) => (float[N,2] y) {{
            h = Gemm(x, w1, b1)
            z = Loop (three, yes, h) <body = {BODY} d = Identity(c) k = MatMul(s, w2) a = Add(k, b2) t = Tanh(a) }}>
            y = MatMul(z, w3)
        }}""",
        {"w1": (3, 8), "b1": (8,), "w2": (8, 8), "b2": (8,), "w3": (8, 2), **SCALAR},
        ("w1 8",),
        {"w3": "graph output 'y'"},
    ),
    Net(
        "weights inside a loop",
        f"""(float[N,3] x) => (float[N,2] y) {{
            h = MatMul(x, w1)
            z = Loop (three, yes, h) <body = {BODY} d = Identity(c) k = MatMul(s, w2) r = Relu(k) t = MatMul(r, w4) }}>
            y = MatMul(z, w3)
        }}""",
        {"w1": (3, 8), "w2": (8, 6), "w3": (8, 2), "w4": (6, 8), **SCALAR},
        ("w1 8", "w2 6"),
        {"w3": "graph output 'y'"},
    ),
    Net(
        "weights handed on from step to step",
        """(float[N,3] x) => (float[N,2] y) {
            h = Gemm(x, w1, b1)
            z, wo, bo = Loop (three, yes, h, w2, b2) <body = g1
                (int64 i, bool c, float[P,8] s, float[8,8] w, float[8] b)
                => (bool d, float[P,8] t, float[8,8] v, float[8] e)
                { d = Identity(c) k = MatMul(s, w) a = Add(k, b) t = Tanh(a) u = Identity(w) v = Identity(u)
                  e = Identity(b) }>
            y = MatMul(z, w3)
        }""",
        {"w1": (3, 8), "b1": (8,), "w2": (8, 8), "b2": (8,), "w3": (8, 2), **SCALAR},
        ("w1 8",),
        {"w3": "graph output 'y'"},
    ),
    Net(
        "weights that change from step to step",
        """(float[N,3] x) => (float[N,2] y) {
            h = Gemm(x, w1)
            z, wo = Loop (three, yes, h, w2) <body = g1 (int64 i, bool c, float[P,8] s, float[8,8] w)
                => (bool d, float[P,8] t, float[8,8] v)
                { d = Identity(c) k = MatMul(s, w) t = Tanh(k) v = Cos(w) }>
            y = MatMul(z, w3)
        }""",
        {"w1": (3, 8), "w2": (8, 8), "w3": (8, 2), **SCALAR},
        (),
        {"w1": "sums over it, and what is pruned is not 0 there", "w3": "graph output 'y'"},
    ),
    Net(
        "a loop that stops by itself and stacks",
        """(float[N,3] x) => (float[N,2] y) {
            h = MatMul(x, w1)
            z, all = Loop (, yes, h) <body = g1 (int64 i, bool c, float[P,8] s) => (bool d, float[P,8] t, float[P,8] u)
                { d = Less(i, three) k = MatMul(s, w2) t = Tanh(k) u = Relu(t) }>
            m = ReduceMean<keepdims = 0>(all, nought) a = Add(m, z) y = MatMul(a, w3)
        }""",
        {"w1": (3, 8), "w2": (8, 8), "w3": (8, 2), "nought": ints(0), **SCALAR},
        ("w1 8",),
        {"w3": "graph output 'y'"},
    ),
    Net(
        "a state that grows",
        """(float[1,3] x) => (float[1,2] y) {
            h = MatMul(x, w1)
            z = Loop (three, yes, h) <body = g1 (int64 i, bool c, float[Q,8] s) => (bool d, float[R,8] t)
                { d = Identity(c) k = MatMul(h, w2) t = Concat<axis = 0>(s, k) }>
            m = ReduceMean<keepdims = 1>(z, nought) y = MatMul(m, w3)
        }""",
        {"w1": (3, 8), "w2": (8, 8), "w3": (8, 2), "nought": ints(0), **SCALAR},
        (),
        dict.fromkeys(("w1", "w2", "w3"), "changes the shape of"),
    ),
    Net(
        "a state that grows by what comes from outside",
        """(float[1,3] x) => (float[1,2] y) {
            o = MatMul(x, w1)
            z = Loop (three, yes, x) <body = g1 (int64 i, bool c, float[Q,3] s) => (bool d, float[R,3] t)
                { d = Identity(c) k = MatMul(o, w2) t = Concat<axis = 0>(s, k) }>
            m = ReduceMean<keepdims = 1>(z, nought) y = MatMul(m, w3)
        }""",
        {"w1": (3, 8), "w2": (8, 3), "w3": (3, 2), "nought": ints(0), **SCALAR},
        (),
        dict.fromkeys(("w1", "w2", "w3"), "changes the shape of"),
    ),
    Net(
        "an initial state of zeros",
        """(float[T,1,3] x) => (float[1,2] y) {
            z, all = Scan (s0, x) <num_scan_inputs = 1, body = g1 (float[P,8] s, float[P,3] e) => (float[P,8]
                t, float[P,8] u)
                { i = MatMul(e, w1) k = MatMul(s, w2) a = Add(i, k) t = Tanh(a) u = Identity(t) }>
            m = ReduceMax<keepdims = 0>(all, nought) a2 = Add(m, z) y = MatMul(a2, w3)
        }""",
        {"w1": (3, 8), "w2": (8, 8), "w3": (8, 2), "s0": np.zeros((1, 8), np.float32), "nought": ints(0)},
        ("w1 8",),
        {"w3": "graph output 'y'"},
        shapes={"x": (5, 1, 3)},
    ),
    Net(
        "a scan along other axes, backwards",
        """(float[2,4,3] x) => (float[2,2,4] y) {
            h = MatMul(x, w1)
            z, all = Scan (s0, h) <num_scan_inputs = 1, scan_input_axes = [1], scan_input_directions = [1],
                scan_output_axes = [-1], body = g1 (float[2,6] s, float[2,8] e) => (float[2,6] t, float[2,8] u)
                { k = MatMul(e, w2) t = Add(s, k) u = Relu(e) }>
            a = Transpose<perm = [0, 2, 1]>(all) b = MatMul(a, w3) c = MatMul(z, w4) d = Unsqueeze(c, one)
            f = Add(b, d) y = Transpose<perm = [0, 2, 1]>(f)
        }""",
        {"w1": (3, 8), "w2": (8, 6), "w3": (8, 2), "w4": (6, 2), "s0": (2, 6), "one": ints(1)},
        ("w1 8", "w2 6"),
        {"w3": "graph output 'y'", "w4": "graph output 'y'"},
    ),
    Net(
        "a scan of two values along different axes",
        """(float[2,4,3] x) => (float[4,2,2] y) {
            h = MatMul(x, w1) g = Transpose<perm = [1, 0, 2]>(h)
            z, all = Scan (s0, h, g) <num_scan_inputs = 2, scan_input_axes = [1, 0],
                body = g1 (float[2,6] s, float[2,8] e, float[2,8] f) => (float[2,6] t, float[2,8] u)
                { k = MatMul(e, w2) t = Add(s, k) u = Add(e, f) }>
            b = MatMul(all, w3) c = MatMul(z, w4) y = Add(b, c)
        }""",
        {"w1": (3, 8), "w2": (8, 6), "w3": (8, 2), "w4": (6, 2), "s0": (2, 6)},
        ("w1 8", "w2 6"),
        {"w3": "graph output 'y'", "w4": "graph output 'y'"},
    ),
    Net(
        "a loop in a branch, and a reshape in it",
        """(float[N,3] x, bool c) => (float[N,2] y) {
            h = MatMul(x, w1)
            z = If (c) <
                then_branch = g1 () => (float[N,8] a) {
                    a = Loop (three, yes, h) <body = g3 (int64 i, bool c2, float[N,8] s) => (bool d, float[N,8] t)
                        { d = Identity(c2) r = Reshape(s, apart) p = Relu(r) q = Reshape(p, whole) t =
                            MatMul(q, w2) }> },
                else_branch = g2 () => (float[N,8] b) { b = Neg(h) }>
            y = MatMul(z, w3)
        }""",
        {"w1": (3, 8), "w2": (8, 8), "w3": (8, 2), "apart": ints(-1, 4, 2), "whole": ints(-1, 8), **SCALAR},
        ("w1 4x2",),
        {"w3": "graph output 'y'"},
    ),
    Net(
        "a weight shared by a body and the graph",
        f"""(float[N,8] x) => (float[N,2] y) {{
            h = MatMul(x, w1)
            z = Loop (three, yes, h) <body = {BODY} d = Identity(c) k = MatMul(s, w2) t = Tanh(k) }}>
            k2 = MatMul(h, w2) a = Mul(k2, z) y = MatMul(a, w3)
        }}""",
        {"w1": (8, 8), "w2": (8, 8), "w3": (8, 2), **SCALAR},
        ("w1 8",),
        {"w3": "graph output 'y'"},
    ),
    Net(
        "a state that meets the graph's input",
        f"""(float[N,8] x) => (float[N,2] y) {{
            z = Loop (three, yes, x) <body = {BODY} d = Identity(c) k = MatMul(s, w1) t = Tanh(k) }}>
            y = MatMul(z, w3)
        }}""",
        {"w1": (8, 8), "w3": (8, 2), **SCALAR},
        (),
        {"w1": "graph input 'x'", "w3": "graph output 'y'"},
    ),
]


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_bodies(net: Net) -> None:
    check(net)


@pytest.mark.parametrize(
    ("condition", "guessed"),
    [
        ("d = Identity(c)", False),  # as it was given: true
        ("d = Identity(yes)", False),
        ("d = Identity(no)", True),
        ("d = Less(i, three)", True),
    ],
)
@pytest.mark.parametrize(("trips", "first"), [("three", "yes"), ("", "yes"), ("three", "no")])
def test_how_often_a_loop_runs(condition: str, guessed: bool, trips: str, first: str) -> None:
    """Its count is taken for what it is only where its condition does not end it before."""
    text = f"""(float[2,8] x) => (float[2,8] y, float[T,2,8] all) {{
        y, all = Loop ({trips}, {first}, x) <body = g1 (int64 i, bool c, float[2,8] s)
            => (bool d, float[2,8] t, float[2,8] u) {{ {condition} t = MatMul(s, w1) u = Tanh(t) }}>
    }}"""
    model = Net("", text, {"w1": (8, 8), "no": np.array(False), **SCALAR}, (), {}).model()
    facts = Plan.of(load(model)).coupling.flow.facts
    assert facts.guessed == (guessed or not trips or first == "no")
    assert facts.guessed or facts.shapes["all"] == (3, 2, 8)
