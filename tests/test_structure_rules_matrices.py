"""Rules of matrix products, norms, attention, recurrent layers and reshapes: groups, pins, shrunk against masked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from structure_oracle import Net, Stored, check, ints

OUT = {"w3": "graph output 'y'"}


def between(
    name: str,
    text: str,
    stored: Mapping[str, Stored] | None = None,
    groups: tuple[str, ...] = ("w1 8",),
    pinned: Mapping[str, str] | None = None,
    width: int = 8,
    opset: int = 21,
    last: int | None = None,
    batch: str = "N",
    length: str = "T",
) -> Net:
    """A net of two products, from 3 to `width` columns (`h`) and from `last` (`z`) to 2."""
    return Net(
        name,
        f"(float[{batch},{length},3] x) => (float[A,B,2] y) {{ p1 = MatMul(x, w1) h = Add(p1, b1) {text} y ="
        f" MatMul(z, w3) }}",
        {"w1": (3, width), "b1": (width,), "w3": (width if last is None else last, 2), **(stored or {})},
        groups,
        {**OUT, **(pinned or {})},
        opset,
        {"x": (2 if batch == "N" else int(batch), 5 if length == "T" else int(length), 3)},
    )


SPLIT = {"s1": ints(0, 0, 4, 2), "s2": ints(0, 0, 8)}

NETS = [
    between("gelu", "z = Gelu(h)", {}),
    between("gated", "g = MatMul(x, w2) a = Sigmoid(g) s = Mul(g, a) z = Mul(s, h)", {"w2": (3, 8)}),
    between("two products", "r = Relu(h) z = MatMul(r, w2)", {"w2": (8, 6)}, ("w1 8", "w2 6"), last=6),
    between("a stack of matrices", "z = MatMul(h, w2)", {"w2": (2, 8, 6)}, ("w1 8", "w2 6"), last=6, batch="2"),
    between("a vector", "v = MatMul(h, w2) u = Unsqueeze(v, a) z = Mul(u, h)", {"w2": (8,), "a": ints(-1)}),
    between(
        "picked by a condition",
        "c = Compress<axis = -1>(h, which) z = Relu(c)",
        {"which": np.array([True, False, True, True, True, True, False])},
        ("w1 5", "w1#2 3"),
        last=5,
    ),
    between(
        "weights on the left",
        "t = Transpose<perm = [0, 2, 1]>(h) m = MatMul(w2, t) z = Transpose<perm = [0, 2, 1]>(m)",
        {"w2": (6, 8)},
        ("w1 8", "w2 6"),
        last=6,
    ),
    between(
        "parts of a sequence",
        "q = SplitToSequence<axis = 2>(h, s) u = SequenceAt(q, i) v = SequenceAt(q, j) a = Relu(u) z = Mul(a, v)",
        {"s": ints(2, 3, 3), "i": np.array(2), "j": np.array(1)},
        ("w1 2", "w1#2 3x2"),
        last=3,
    ),
    between("reshaped and back", "r = Reshape(h, s1) a = Relu(r) z = Reshape(a, s2)", SPLIT, ("w1 4x2",)),
    between(
        "reshaped with -1",
        "r = Reshape(h, s1) t = Transpose<perm = [0, 2, 1, 3]>(r) z = Reshape(t, s2)",
        {"s1": ints(0, -1, 4, 2), "s2": ints(0, -1, 2)},
        ("w1 2x4",),
        last=2,
    ),
    between(
        "reshape with allowzero",
        "r = Reshape<allowzero = 1>(h, s1) z = Reshape(r, s2)",
        {"s1": ints(-1, 4, 2), "s2": ints(2, 5, 8)},
        ("w1 4x2",),
        batch="2",
        length="5",
    ),
    between(
        "reshape by computed sizes",
        "s = Shape(h) n = Gather(s, i0) t = Gather(s, i1) c = Gather(s, i2) d = Div(c, two) nu = Unsqueeze(n, a0)"
        " tu = Unsqueeze(t, a0) du = Unsqueeze(d, a0) s4 = Concat<axis = 0>(nu, tu, du, twos) r = Reshape(h,"
        " s4) a = Tanh(r)"
        " z = Reshape(a, s)",
        {"i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "two": np.array(2), "twos": ints(2), "a0": ints(0)},
        ("w1 4x2",),
    ),
    between(
        "flatten",
        "f = Flatten<axis = 2>(h) g = Gemm(f, w2, b2) z = Reshape(g, s)",
        {"w2": (8, 6), "b2": (6,), "s": ints(2, -1, 6)},
        ("w1 8", "w2 6"),
        last=6,
        batch="2",
    ),
    Net(
        "flatten of images",
        "(float[N,3,4,4] x) => (float[N,2] y) { c = Conv(x, w1, b1) r = Relu(c) f = Flatten(r) g = Gemm<transB"
        " = 1>(f, w2, b2)"
        " t = Tanh(g) y = Gemm<alpha = 0.5, beta = 2.0>(t, w3, b3) }",
        {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (6, 128), "b2": (6,), "w3": (6, 2), "b3": (2,)},
        ("w1 8", "w2 6"),
        OUT,
    ),
    Net(
        "flatten by computed sizes",
        "(float[N,3,H,W] x) => (float[N,2] y) { c = Conv(x, w1, b1) p = GlobalAveragePool(c) s = Shape(p) n ="
        " Slice(s, zero, one)"
        " t = Concat<axis = 0>(n, minus) f = Reshape(p, t) y = Gemm(f, w3) }",
        {"w1": (8, 3, 1, 1), "b1": (8,), "w3": (8, 2), "zero": ints(0), "one": ints(1), "minus": ints(-1)},
        ("w1 8",),
        OUT,
    ),
    Net(
        "flatten in channels last",
        "(float[N,4,4,3] x) => (float[N,2] y) { a = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv(a, w1, b1) r = Relu(c)"
        " b = Transpose<perm = [0, 2, 3, 1]>(r) d = Mul(b, s) f = Reshape(d, t) y = MatMul(f, w3) }",
        {"w1": (8, 3, 1, 1), "b1": (8,), "s": (8,), "w3": (128, 2), "t": ints(-1, 128)},
        ("w1 8",),
        OUT,
    ),
    Net(
        "a bias of rows",
        "(float[4,3] x) => (float[2,4] y) { a = Gemm<transB = 1>(w1, x, b1) r = Relu(a) y = MatMul(w3, r) }",
        {"w1": (8, 3), "b1": (8, 1), "w3": (2, 8)},
        ("w1 8",),
        OUT,
    ),
    between(
        "layer norm pins",
        "z = LayerNormalization(h, s, b)",
        {"s": (8,), "b": (8,)},
        (),
        {"w1": "normalises over axis 2"},
    ),
    between(
        "feed forward beside a layer norm",
        "n = LayerNormalization(h, s, b) f = MatMul(n, w2) g = Gelu(f) k = MatMul(g, w4) z = Add(k, h)",
        {"s": (8,), "b": (8,), "w2": (8, 6), "w4": (6, 8)},
        ("w2 6",),
        {"w1": "normalises over axis 2", "w4": "normalises over axis 2"},
    ),
    between("RMS norm", "z = RMSNormalization(h, s)", {"s": (8,)}, (), {"w1": "normalises over axis 2"}, opset=23),
    between(
        "layer norm spelt out",
        "m = ReduceMean(h, last) d = Sub(h, m) q = Mul(d, d) v = ReduceMean(q, last) e = Add(v, eps) r = Sqrt(e)"
        " k = Div(d, r) z = Mul(k, s)",
        {"last": ints(-1), "eps": np.array(1e-5, np.float32), "s": (8,)},
        (),
        {"w1": "reduces axis 2"},
    ),
    between(
        "RMS norm by a sum",
        "q = Mul(h, h) v = ReduceSum(q, last) e = Add(v, eps) r = Sqrt(e) z = Div(h, r)",
        {"last": ints(-1), "eps": np.array(1e-5, np.float32)},
    ),
    between(
        "a mean over what is 0",
        "m = ReduceMean(h, last) z = Mul(h, m)",
        {"last": ints(-1)},
        (),
        {"w1": "reduces axis 2"},
    ),
    between(
        "a sum over what is not 0",
        "e = Exp(h) s = ReduceSum(e, last) z = Div(e, s)",
        {"last": ints(-1)},
        (),
        {"w1": "reduces axis 2"},
    ),
    between("a norm along rows", "z = LpNormalization<axis = 1>(h)"),
    between("einsum", 'z = Einsum<equation = "btc,dc->btd">(h, w2)', {"w2": (6, 8)}, ("w1 8", "w2 6"), last=6),
    between(
        "einsum with an ellipsis",
        'z = Einsum<equation = "...c,cd->...d">(h, w2)',
        {"w2": (8, 6)},
        ("w1 8", "w2 6"),
        last=6,
    ),
    between(
        "einsum of heads",
        'a = Einsum<equation = "btc,chd->bthd">(h, w2) r = Relu(a) z = Einsum<equation = "bthd,hdz">(r, w4)',
        {"w2": (8, 4, 3), "w4": (4, 3, 6)},
        ("w1 8", "w2 4", "w2#2 3", "w4 6"),
        last=6,
    ),
    between(
        "einsum of a stack",
        'z = Einsum<equation = "nbc,ncd->nbd">(h, w2)',
        {"w2": (2, 8, 6)},
        ("w1 8", "w2 6"),
        last=6,
        batch="2",
    ),
    between(
        "queries and keys",
        "q = MatMul(h, w2) k = MatMul(h, w4) t = Transpose<perm = [0, 2, 1]>(k) a = MatMul(q, t) p = Softmax(a)"
        " z = MatMul(p, h)",
        {"w2": (8, 6), "w4": (8, 6)},
        ("w1 8", "w2 6"),
    ),
    between(
        "products that are not 0 where pruned",
        "q = MatMul(h, w2) e = Exp(q) t = Transpose<perm = [0, 2, 1]>(e) a = MatMul(e, t) z = MatMul(a, h)",
        {"w2": (8, 6)},
        ("w1 8",),
        {"w2": "sums over it"},
    ),
    between(
        "a scale computed from a size",
        "q = MatMul(h, w2) k = MatMul(h, w4) t = Transpose<perm = [0, 2, 1]>(k) a = MatMul(q, t) s = Shape(q)"
        " d = Gather(s, minus) f = Cast<to = 1>(d) r = Sqrt(f) b = Div(a, r) p = Softmax(b) z = MatMul(p, h)",
        {"w2": (8, 6), "w4": (8, 6), "minus": np.array(-1)},
        ("w1 8",),
        {"w2": "computes with its size", "w4": "computes with its size"},
    ),
    between(
        "one hot",
        "i = ArgMax<axis = 1, keepdims = 0>(h) o = OneHot<axis = 1>(i, five, v) z = Add(h, o)",
        {"five": ints(5), "v": np.float32([0, 1])},
        length="5",
    ),
    between(
        "gather ND",
        "z = GatherND<batch_dims = 1>(h, i)",
        {"i": np.array([[[0], [4]], [[1], [1]]])},
        batch="2",
        length="5",
    ),
    between(
        "scatter ND", "z = ScatterND(h, i, u)", {"i": np.array([[0, 1], [1, 3]]), "u": (2, 8)}, batch="2", length="5"
    ),
    between(
        "reversed", "z = ReverseSequence<time_axis = 1, batch_axis = 0>(h, l)", {"l": ints(2, 4)}, batch="2", length="5"
    ),
    between(
        "an embedding",
        "i = ArgMax<axis = 2, keepdims = 0>(h) e = Gather(w2, i) z = Add(e, e)",
        {"w2": (8, 6)},
        (),
        {"w1": "looks for the largest", "w2": "looks entries up"},
        last=6,
    ),
    between(
        "expand to computed sizes",
        "s = Shape(h) c = ConstantOfShape(s) u = Expand(b2, s) a = Add(c, u) z = Mul(h, a)",
        {"b2": (8,)},
    ),
    between("shared vectors", "a = Add(h, b1) m = MatMul(a, w2) z = Add(m, b1)", {"w2": (8, 8)}, ("w1 8", "w2 8")),
    between("a constant node", "k = Constant<value_floats = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>() z = Mul(h, k)"),
    between(
        "a divisor that is a factor as well",
        "a = Mul(h, k) k2 = Identity(k) d = Div(a, k2) z = Mul(d, k)",
        {"k": (5, 8)},
        (),
        {"w1": "must not be 0 for one of its readers"},
        length="5",
    ),
    between("a weight used twice", "a = MatMul(h, w2) r = Relu(a) z = MatMul(r, w2)", {"w2": (8, 8)}),
    *(
        between(
            f"{op}, {direction}",
            f't = Transpose<perm = [1, 0, 2]>(h) r, last = {op}<hidden_size = 4, direction = "{direction}">'
            "(t, w2, w4, b2) a = Transpose<perm = [2, 0, 1, 3]>(r) z = Reshape(a, s)",
            {"w2": (ways, gates * 4, 8), "w4": (ways, gates * 4, 4), "b2": (ways, 2 * gates * 4), "s": ints(0, 0, -1)},
            ("w1 8", "w2 4" + f"x{gates}" * (gates > 1)),
            last=4 * ways,
        )
        for op, gates in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
        for direction, ways in (("forward", 1), ("bidirectional", 2))
    ),
    between(
        "LSTM with all it may have",
        't = Transpose<perm = [1, 0, 2]>(h) r, last, c = LSTM<hidden_size = 4, direction = "bidirectional", clip = 3.0>'
        "(t, w2, w4, b2, l, h0, c0, p) m = Add(last, c) z = Transpose<perm = [1, 0, 2]>(m)",
        {
            "w2": (2, 16, 8),
            "w4": (2, 16, 4),
            "b2": (2, 32),
            "l": np.array([5, 3], np.int32),
            "h0": (2, 2, 4),
            "c0": (2, 2, 4),
            "p": (2, 12),
        },
        ("w1 8", "w2 4x4"),
        last=4,
        batch="2",
        length="5",
    ),
    between(
        "LSTM with other activations",
        't = Transpose<perm = [1, 0, 2]>(h) r = LSTM<hidden_size = 4, activations = ["Sigmoid", "Sigmoid",'
        ' "Relu"]>(t, w2, w4)'
        " a = Squeeze(r, one) z = Transpose<perm = [1, 0, 2]>(a)",
        {"w2": (1, 16, 8), "w4": (1, 16, 4), "one": ints(1)},
        ("w1 8", "w2 4x4"),
        last=4,
    ),
    between(
        "a stack of GRUs",
        "t = Transpose<perm = [1, 0, 2]>(h) r = GRU<hidden_size = 4, linear_before_reset = 1>(t, w2, w4, b2) a"
        " = Squeeze(r, one)"
        " r2, l2 = GRU<hidden_size = 6>(a, w5, w6) b = Squeeze(r2, one) z = Transpose<perm = [1, 0, 2]>(b)",
        {"w2": (1, 12, 8), "w4": (1, 12, 4), "b2": (1, 24), "w5": (1, 18, 4), "w6": (1, 18, 6), "one": ints(1)},
        ("w1 8", "w2 4x3", "w5 6x3"),
        last=6,
    ),
]

HEADS = """q = MatMul(h, wq) k = MatMul(h, wk) v = MatMul(h, wv)"""
SUMMED = {"w1": "ReduceSum 'all' reduces axis 1"}
ATTENTION = [
    between(
        "attention in parts",
        f"{HEADS} q4 = Reshape(q, s) k4 = Reshape(k, s) v4 = Reshape(v, s) qt = Transpose<perm = [0, 2, 1, 3]>(q4)"
        " kt = Transpose<perm = [0, 2, 3, 1]>(k4) vt = Transpose<perm = [0, 2, 1, 3]>(v4) a = MatMul(qt, kt) p"
        " = Softmax(a)"
        " o = MatMul(p, vt) ot = Transpose<perm = [0, 2, 1, 3]>(o) z = Reshape(ot, s2)",
        {"wq": (8, 12), "wk": (8, 12), "wv": (8, 12), "s": ints(0, 0, 4, 3), "s2": ints(0, 0, 12)},
        ("w1 8", "wq 4x3 heads"),
        last=12,
    ),
    between(
        "attention with heads and batch in one axis, by computed sizes",
        f"{HEADS} q4 = Reshape(q, s) k4 = Reshape(k, s) v4 = Reshape(v, s) qt = Transpose<perm = [0, 2, 1, 3]>(q4)"
        " kt = Transpose<perm = [0, 2, 1, 3]>(k4) vt = Transpose<perm = [0, 2, 1, 3]>(v4) sh = Shape(qt)"
        " bh = Gather(sh, i01) n = ReduceProd<keepdims = 1>(bh) e = Gather(sh, i3) t3 = Concat<axis = 0>(n, rest, e)"
        " q3 = Reshape(qt, t3) k3 = Reshape(kt, t3) v3 = Reshape(vt, t3) ks = Transpose<perm = [0, 2, 1]>(k3)"
        " a = MatMul(q3, ks) p = Softmax(a) o3 = MatMul(p, v3) t4 = Concat<axis = 0>(bh, rest, e)"
        " o = Reshape(o3, t4) ot = Transpose<perm = [0, 2, 1, 3]>(o) z = Reshape(ot, s2)",
        {
            "wq": (8, 12),
            "wk": (8, 12),
            "wv": (8, 12),
            "s": ints(0, 0, 4, 3),
            "s2": ints(0, 0, 12),
            "i01": ints(0, 1),
            "i3": ints(3),
            "rest": ints(-1),
        },
        ("w1 8", "wq 4x3 heads"),
        last=12,
    ),
    between(
        "attention of 3 axes",
        f"{HEADS} z = Attention<q_num_heads = 4, kv_num_heads = 4, is_causal = 1>(q, k, v)",
        {"wq": (8, 12), "wk": (8, 12), "wv": (8, 8)},
        ("w1 8", "wq 4x3 heads"),
        last=8,
        opset=23,
    ),
    between(
        "attention with shared keys",
        f"{HEADS} z = Attention<q_num_heads = 6, kv_num_heads = 2>(q, k, v, m)",
        {"wq": (8, 18), "wk": (8, 6), "wv": (8, 8), "m": (1, 6, 5, 5)},
        ("w1 8", "wq 2x9 heads"),
        last=24,
        opset=23,
        length="5",
    ),
    between(
        "attention with one key",
        f"{HEADS} z = Attention<q_num_heads = 6, kv_num_heads = 1>(q, k, v)",
        {"wq": (8, 18), "wk": (8, 3), "wv": (8, 4)},
        ("w1 8", "wq 6x3 heads"),
        {"wk": "takes products", "wv": "holds 6 heads of 4 positions, which go as a whole"},
        last=24,
        opset=23,
    ),
    between(
        "linear attention",
        f"{HEADS} e = MatMul(h, we) d = Neg(e) f = MatMul(h, wf) b = Sigmoid(f) z, s = LinearAttention<q_num_heads = 8,"
        ' kv_num_heads = 4, update_rule = "gated_delta">(q, k, v, past, d, b)',
        {"wq": (8, 24), "wk": (8, 12), "wv": (8, 8), "we": (8, 4), "wf": (8, 4), "past": (2, 4, 3, 2)},
        ("w1 8", "wq 4x6 heads"),
        last=16,
        opset=27,
        batch="2",
        length="5",
    ),
    between(
        "linear attention with a past only",
        f'{HEADS} z, s = LinearAttention<q_num_heads = 4, kv_num_heads = 4, update_rule = "linear">(q, k, v, past)',
        {"wq": (8, 12), "wk": (8, 12), "wv": (8, 8), "past": (2, 4, 3, 2)},
        ("w1 8", "wq 4x3 heads"),
        opset=27,
        batch="2",
        length="5",
    ),
    between(
        "causal convolution",
        't = Transpose<perm = [0, 2, 1]>(h) c, s = CausalConvWithState<activation = "silu">(t, w2, b2, past)'
        " all = ReduceSum(c, one) d = Mul(c, all) z = Transpose<perm = [0, 2, 1]>(d)",
        {"w2": (8, 1, 3), "b2": (8,), "past": (2, 8, 2), "one": ints(1)},
        opset=27,
        batch="2",
    ),
    between(
        "causal convolution with a computed kernel",
        "t = Transpose<perm = [0, 2, 1]>(h) part = Slice(t, nought, three, two) m = ReduceMean<keepdims = 0>(part,"
        " nought) u = Sigmoid(m) k = Unsqueeze(u, one) c, s = CausalConvWithState(t, k, b2) all = ReduceSum(c, one)"
        " d = Mul(c, all) z = Transpose<perm = [0, 2, 1]>(d)",
        {"b2": (8,), "nought": ints(0), "one": ints(1), "two": ints(2), "three": ints(3)},
        (),
        SUMMED,
        opset=27,
        batch="2",
        length="5",
    ),
    between(
        "causal convolution with a computed past",
        "t = Transpose<perm = [0, 2, 1]>(h) part = Slice(t, nought, two, two) e = Sigmoid(part)"
        " c, s = CausalConvWithState(t, w2, , e) all = ReduceSum(s, one) m = ReduceMean(all) d = Mul(c, m)"
        " z = Transpose<perm = [0, 2, 1]>(d)",
        {"w2": (8, 1, 3), "nought": ints(0), "one": ints(1), "two": ints(2)},
        (),
        SUMMED,
        opset=27,
        batch="2",
        length="5",
    ),
    between(
        "attention of 4 axes with a past",
        f"{HEADS} q4 = Reshape(q, s) k4 = Reshape(k, s) v4 = Reshape(v, s) qt = Transpose<perm = [0, 2, 1, 3]>(q4)"
        " kt = Transpose<perm = [0, 2, 1, 3]>(k4) vt = Transpose<perm = [0, 2, 1, 3]>(v4)"
        " o, pk, pv = Attention(qt, kt, vt, , past_k, past_v) ot = Transpose<perm = [0, 2, 1, 3]>(o) z ="
        " Reshape(ot, s2)",
        {
            "wq": (8, 12),
            "wk": (8, 12),
            "wv": (8, 12),
            "s": ints(0, 0, 4, 3),
            "s2": ints(0, 0, 12),
            "past_k": (2, 4, 3, 3),
            "past_v": (2, 4, 3, 3),
        },
        ("w1 8", "wq 4x3 heads"),
        last=12,
        opset=23,
        batch="2",
        length="5",
    ),
    between(
        "rotary positions",
        f"{HEADS} qr = RotaryEmbedding<num_heads = 2>(q, cos, sin, ids) kr = RotaryEmbedding<num_heads = 2>(k,"
        f" cos, sin, ids)"
        " z = Attention<q_num_heads = 2, kv_num_heads = 2>(qr, kr, v)",
        {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "cos": (5, 2), "sin": (5, 2), "ids": np.tile(np.arange(5), (2, 1))},
        ("w1 8", "wq 2x4 heads"),
        opset=23,
        batch="2",
        length="5",
    ),
]


@pytest.mark.parametrize("net", [*NETS, *ATTENTION], ids=lambda net: net.name)
def test_matrices(net: Net) -> None:
    check(net)
