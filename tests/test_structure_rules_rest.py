"""Rules of operators that few models have, and operands and attributes that few nodes have."""

from __future__ import annotations

import numpy as np
import pytest
from structure_oracle import Net, check, ints
from test_structure_contrib import rows as sequences
from test_structure_quantised import LSTM, OUT
from test_structure_rules_images import between as images
from test_structure_rules_matrices import between as rows

TWO = np.array(2, np.float32)
SUMS = ("Sum", "L1", "L2", "SumSquare", "Mean")
ALL = {"w1": "reduces axis 1"}

NETS = [
    *(
        images(f"{op} over places", f"p = Sigmoid(h) r = Reduce{op}(p, places) z = Mul(h, r)", {"places": ints(2, 3)})
        for op in (*SUMS, "Max", "Min", "Prod", "LogSum", "LogSumExp")
    ),
    *(
        images(f"{op} over channels", f"r = Reduce{op}(h, one) z = Mul(h, r)", {"one": ints(1)})
        for op in ("Sum", "L1", "L2", "SumSquare")
    ),
    *(
        images(f"{op} over channels", f"r = Reduce{op}(h, one) z = Mul(h, r)", {"one": ints(1)}, (), ALL)
        for op in ("Max", "Min", "Prod", "LogSumExp")
    ),
    images(
        "the sum of an exponential",
        "e = Exp(h) r = ReduceSum<keepdims = 0>(e, one) u = Unsqueeze(r, one) z = Mul(h, u)",
        {"one": ints(1)},
        (),
        ALL,
    ),
    images("reduces nothing", "z = ReduceMax<noop_with_empty_axes = 1>(h)"),
    images(
        "a logarithm of sums",
        "a = Abs(h) r = ReduceLogSum(a, places) z = Mul(h, r)",
        {"places": ints(2, 3)},
        (),
        {"w1": "takes a logarithm, and pruned positions would hold 0"},
    ),
    images("average pool", "z = AveragePool<kernel_shape = [2, 2], pads = [1, 0, 1, 0], strides = [2, 1]>(h)"),
    images("log softmax over places", "z = LogSoftmax<axis = 3>(h)"),
    images("log softmax over channels", "z = LogSoftmax<axis = 1>(h)", None, (), {"w1": "mixes axis 1"}),
    images("softmax 11 over places", "z = Softmax<axis = 2>(h)", opset=11),
    images("softmax 11", "z = Softmax(h)", None, (), {"w1": "mixes axis 1"}, opset=11),
    images("least and powers", "a = Min(h, c) b = Pow(a, two) z = Add(a, b)", {"c": (8, 1, 1), "two": TWO}),
    images("remainders", "z = Mod<fmod = 1>(h, c)", {"c": (8, 1, 1)}),
    images("sums along rows", "z = CumSum<exclusive = 1, reverse = 1>(h, three)", {"three": np.array(3)}),
    images("sums along channels", "z = CumSum(h, one)", {"one": np.array(1)}, (), {"w1": "sums along it"}),
    images(
        "largest of columns",
        "v, i = TopK<axis = 2, largest = 0>(h, k) c = Cast<to = 1>(i) z = Add(v, c)",
        {"k": ints(4)},
    ),
    images("lower triangles", "z = Trilu<upper = 0>(h, k)", {"k": np.array(1)}),
    images("shifted and rectified", "z = Shrink<lambd = 0.3, bias = 0.1>(h)"),
    images("one over", "e = Exp(h) z = Reciprocal(e)"),
    images("one over what may be 0", "z = Reciprocal(h)", None, (), {"w1": "has no value at 0"}),
    images("turned back", "e = Sigmoid(h) a = Acos(e) b = Asin(e) z = Add(a, b)"),
    images("a gate of signs", "p = Greater(h, c) n = Not(p) f = Cast<to = 1>(n) z = Mul(h, f)", {"c": (8, 1, 1)}),
    images(
        "either sign",
        "p = Greater(h, c) q = Less(h, d) o = Or(p, q) a = And(o, p) e = Xor(a, q) n = Not(e)"
        " f = Cast<to = 1>(n) z = Mul(h, f)",
        {"c": (8, 1, 1), "d": (8, 1, 1)},
    ),
    images(
        "updates by place",
        "z = ScatterND(h, at, u)",
        {"at": ints(0, 1).reshape(1, 2), "u": (1, 6, 6)},
        (),
        {"w1": "puts entries by it"},
        batch="2",
    ),
    images(
        "updates of images",
        'z = ScatterND<reduction = "add">(h, at, u)',
        {"at": ints(1).reshape(1, 1), "u": (1, 8, 6, 6)},
        batch="2",
    ),
    images(
        "entries of each image",
        "t = Transpose<perm = [0, 2, 3, 1]>(h) g = GatherND<batch_dims = 1>(t, at) u = Unsqueeze(g, two)"
        " z = Transpose<perm = [0, 3, 1, 2]>(u)",
        {"at": np.array([[[0, 1], [2, 3], [5, 5]], [[1, 1], [4, 0], [3, 2]]]), "two": ints(2)},
        batch="2",
    ),
    images(
        "columns to images",
        "p = Reshape(h, apart) z = Col2Im<pads = [0, 0, 0, 0], strides = [2, 2]>(p, size, block)",
        {"apart": ints(0, 8, 36), "size": ints(12, 12), "block": ints(2, 2), "w3": (2, 2, 1, 1)},
        ("w1 2x4",),
    ),
    images(
        "transformed along rows",
        "t = Transpose<perm = [0, 1, 3, 2]>(h) u = Unsqueeze(t, last) d = DFT(u, , axis) r, i = Split<axis = 4,"
        " num_outputs = 2>(d) a = Mul(r, r) b = Mul(i, i) c = Add(a, b) z = Squeeze(c, last)",
        {"last": ints(4), "axis": np.array(3)},
    ),
    *(
        images(
            f"windows of signals, {how}",
            f"f = Reshape(h, flat) u = Unsqueeze(f, two) s = STFT{sides}(u, step, {windows}) r, i = Split<axis = 3,"
            " num_outputs = 2>(s) q = Squeeze(r, three) z = Reshape(q, apart)",
            {
                "flat": ints(16, 36),
                "two": ints(2),
                "three": ints(3),
                "step": np.array(6),
                "window": (12,),
                "length": np.array(9),
                "apart": ints(2, 8, *places),
            },
            batch="2",
        )
        for how, sides, windows, places in (
            ("one side", "<onesided = 1>", "window", (5, 7)),
            ("one side by default", "", "window", (5, 7)),
            ("both sides", "<onesided = 0>", "window", (5, 12)),
            ("of a length", "", ", length", (5, 5)),
        )
    ),
    images(
        "determinants",
        "d = Det(h) u = Unsqueeze(d, places) z = Mul(h, u)",
        {"places": ints(2, 3)},
    ),
    images(
        "a grid made of numbers",
        'g = AffineGrid<align_corners = 1>(theta, size) z = GridSample<mode = "nearest">(h, g)',
        {"theta": (2, 2, 3), "size": ints(2, 8, 4, 4)},
        batch="2",
    ),
    images(
        "statistics that are learned",
        "n, m, v = BatchNormalization<training_mode = 1>(h, s, b, m0, v0) u = Unsqueeze(m, places) e = Mul(n, u)"
        " w = Unsqueeze(v, places) z = Mul(e, w)",
        {"s": (8,), "b": (8,), "m0": (8,), "v0": (8,), "places": ints(0, 2, 3)},
        batch="2",
    ),
    rows(
        "linear attention without a past",
        "q = MatMul(h, wq) k = MatMul(h, wk) v = MatMul(h, wv)"
        ' z, s = LinearAttention<q_num_heads = 4, kv_num_heads = 4, update_rule = "linear">(q, k, v)',
        {"wq": (8, 12), "wk": (8, 12), "wv": (8, 8)},
        ("w1 8", "wq 4x3 heads"),
        opset=27,
        batch="2",
        length="5",
    ),
    rows(
        "entries of long rows",
        "z = GatherElements<axis = 1>(h, at)",
        {"at": np.tile(np.arange(5)[:, None], (2, 1, 300))},
        ("w1 300",),
        width=300,
        batch="2",
        length="5",
    ),
    rows("pool of columns", "z = MaxPool<kernel_shape = [1]>(h)", None, (), {"w1": "MaxPool 'z' pools axis 2"}),
    rows(
        "GRU with all it may have",
        't = Transpose<perm = [1, 0, 2]>(h) r, last = GRU<hidden_size = 4, direction = "bidirectional", clip = 3.0>'
        "(t, w2, w4, b2, l, h0) z = Transpose<perm = [1, 0, 2]>(last)",
        {
            "w2": (2, 12, 8),
            "w4": (2, 12, 4),
            "b2": (2, 24),
            "l": np.array([5, 3], np.int32),
            "h0": (2, 2, 4),
        },
        ("w1 8", "w2 4x3"),
        last=4,
        batch="2",
        length="5",
    ),
    rows(
        "RNN with a state that is not 0",
        "t = Transpose<perm = [1, 0, 2]>(h) s = ReduceMean<keepdims = 1>(t, nought) h0 = Exp(s)"
        " r, last = RNN<hidden_size = 8>(t, w2, w4, , , h0) z = Transpose<perm = [1, 0, 2]>(last)",
        {"w2": (1, 8, 8), "w4": (1, 8, 8), "nought": ints(0)},
    ),
    *(
        images(
            f"conv {activation}, summed",
            f'e = com.microsoft.FusedConv<activation = "{activation}", activation_params = {parameters}>(h, w2, b2)'
            " s = ReduceSum(e, one) z = Mul(e, s)",
            {"w2": (5, 8, 1, 1), "b2": (5,), "one": ints(1)},
            ("w1 8", "w2 5") if keeps else ("w1 8",),
            None if keeps else {"w2": "ReduceSum 's' reduces axis 1"},
            5,
        )
        for activation, parameters, keeps in (
            ("Clip", [-1.0, 6.0], True),
            ("Clip", [1.0, 6.0], False),
            ("LeakyRelu", [0.1], True),
            ("HardSigmoid", [0.2, 0.5], False),
            ("Sigmoid", [0.0], False),
            ("Tanh", [0.0], True),
        )
    ),
    images(
        "conv and another's result, summed",
        'd = Sigmoid(h) e = com.microsoft.FusedConv<activation = "Relu">(h, w2, b2, d) s = ReduceSum(e, one)'
        " z = Mul(e, s)",
        {"w2": (8, 8, 1, 1), "b2": (8,), "one": ints(1)},
        (),
        {"w1": "ReduceSum 's' reduces axis 1", "w2": "ReduceSum 's' reduces axis 1"},
    ),
    sequences(
        "words, sentences and places",
        "e, c = MS.EmbedLayerNormalization<epsilon = 0.1>(ids, parts, word, place, part, g, b, mask, at) z = Add(h, e)",
        {
            "word": (20, 8),
            "place": (9, 8),
            "part": (2, 8),
            "g": (8,),
            "b": (8,),
            "parts": np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], np.int32),
            "mask": np.ones((2, 5), np.int32),
            "at": np.array([[1, 2, 3, 4, 5], [0, 1, 2, 3, 4]], np.int32),
        },
        (),
        {"w1": "normalises over the last axis"},
        given=", int32[2,5] ids",
    ),
    sequences(
        "heads that skip padding",
        "q = MatMul(h, wq) k = MatMul(h, wk) v = MatMul(h, wv)"
        " z = MS.MultiHeadAttention<num_heads = 3>(q, k, v, b2, padding)",
        {
            "wq": (8, 12),
            "wk": (8, 12),
            "wv": (8, 12),
            "b2": (36,),
            "padding": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32),
        },
        ("w1 8", "wq 3x4 heads"),
        None,
        12,
    ),
    Net(
        "a quantised LSTM whose state is not 0",
        "(float[4,2,6] x, float[1,2,5] s) => (float[1,2,3] y) { m = MatMul(x, w1) p = Add(m, b1) h = Relu(p)"
        " h0 = Sigmoid(s) v, last = com.microsoft.DynamicQuantizeLSTM<hidden_size = 5>"
        "(h, w2, r2, b2, , h0, , , sw, zw, sw, zw) y = MatMul(last, w3) }",
        LSTM,
        ("w1 8",),
        {**OUT, "w2": "graph input 's'", "r2": "graph input 's'"},
    ),
    Net(
        "a quantised LSTM whose state is made of what is pruned",
        "(float[4,2,6] x) => (float[1,2,3] y) { m = MatMul(x, w1) p = Add(m, b1) h = Relu(p)"
        " f = MatMul(x, w4) t = ReduceMean(f, nought) h0 = Sigmoid(t)"
        " v, last = com.microsoft.DynamicQuantizeLSTM<hidden_size = 5>"
        "(h, w2, r2, b2, , h0, , , sw, zw, sw, zw) y = MatMul(last, w3) }",
        {**LSTM, "w4": (6, 5), "nought": ints(0)},
        ("w1 8",),
        {**OUT, **dict.fromkeys(("w2", "r2", "w4"), "the largest entry")},
    ),
    Net(
        "quantised LSTM with all it may have",
        "(float[4,2,6] x) => (float[1,2,3] y) { m = MatMul(x, w1) p = Add(m, b1) h = Relu(p)"
        " v, last, cell = com.microsoft.DynamicQuantizeLSTM<hidden_size = 5>"
        "(h, w2, r2, b2, l, h0, c0, peep, sw, zw, sw, zw) s = Add(last, cell) y = MatMul(s, w3) }",
        {
            **LSTM,
            "l": np.array([4, 3], np.int32),
            "h0": (1, 2, 5),
            "c0": (1, 2, 5),
            "peep": (1, 15),
        },
        ("w1 8", "w2 5x4"),
        OUT,
    ),
]

OLD = [
    images("squeeze 11", "u = Unsqueeze<axes = [1, -1]>(h) r = Relu(u) z = Squeeze<axes = [1, -1]>(r)", opset=11),
    images(
        "squeeze 11 of all there is",
        "g = GlobalAveragePool(h) q = Squeeze(g) r = Relu(q) z = Unsqueeze<axes = [2, 3]>(r)",
        opset=11,
        batch="2",
    ),
    images(
        "reduce 11",
        "a = ReduceMax<axes = [2, 3], keepdims = 0>(h) b = ReduceMean<axes = [-1, -2]>(h)"
        " c = Unsqueeze<axes = [2, 3]>(a) z = Add(b, c)",
        opset=11,
    ),
    images("reduce 11 over all", "a = ReduceMax(h) z = Mul(h, a)", None, (), {"w1": "reduces axis 1"}, opset=11),
    images("clip 10", "z = Clip<min = -0.5, max = 0.5>(h)", opset=10, batch="2"),
    images(
        "clip 10 above 0, summed",
        "c = Clip<min = 0.5, max = 2.5>(h) s = ReduceSum<axes = [1]>(c) z = Mul(c, s)",
        None,
        (),
        {"w1": "reduces axis 1"},
        opset=10,
        batch="2",
    ),
    images(
        "clip 10 from below", "c = Clip<min = -0.5>(h) s = ReduceSum<axes = [1]>(c) z = Mul(c, s)", opset=10, batch="2"
    ),
    images(
        "clip 11 above 0, summed",
        "c = Clip(h, low, high) s = ReduceSum<axes = [1]>(c) z = Mul(c, s)",
        {"low": np.array(0.5, np.float32), "high": np.array(2.5, np.float32)},
        (),
        {"w1": "reduces axis 1"},
        opset=11,
    ),
    images(
        "clip 11 below 0, summed",
        "c = Clip(h, , high) s = ReduceSum<axes = [1]>(c) z = Mul(c, s)",
        {"high": np.array(-0.5, np.float32)},
        (),
        {"w1": "reduces axis 1"},
        opset=11,
    ),
    images(
        "clip 11 around 0, summed",
        "c = Clip(h, low) s = ReduceSum<axes = [1]>(c) z = Mul(c, s)",
        {"low": np.array(-0.5, np.float32)},
        opset=11,
    ),
    images(
        "top 9",
        "k = Constant<value_ints = [3]>() v, i = TopK<axis = 3>(h, k) z = Relu(v)",
        opset=12,
    ),
    images("average pool 7", "z = AveragePool<kernel_shape = [2, 2], count_include_pad = 1>(h)", opset=7, batch="2"),
    images(
        "pad 2 by a value", "p = Pad<pads = [0, 0, 1, 0, 0, 0, 0, 1], value = 0.5>(h) z = Relu(p)", opset=8, batch="2"
    ),
    images("cumulative 11", "z = CumSum(h, last)", {"last": np.array(-1)}, opset=11),
    images("hardmax 11", "z = Hardmax<axis = 3>(h)", opset=11),
    images("hardmax 13", "z = Hardmax<axis = 2>(h)", opset=13),
    images(
        "gemm 7",
        "g = GlobalMaxPool(h) f = Flatten(g) m = Gemm<transB = 1>(f, w2, c) z = Unsqueeze<axes = [2, 3]>(m)",
        {"w2": (5, 8), "c": (5,)},
        ("w1 8", "w2 5"),
        None,
        5,
        opset=7,
        batch="2",
    ),
    images(
        "tile 7",
        "t = Tile(h, times) z = Conv(t, w2)",
        {"times": ints(1, 2, 1, 1), "w2": (5, 16, 1, 1)},
        ("w1 8", "w2 5"),
        None,
        5,
        opset=7,
        batch="2",
    ),
    images(
        "group norm 18 of pairs",
        "z = GroupNormalization<num_groups = 2>(h, s, b)",
        {"s": (2,), "b": (2,)},
        ("w1 2x4",),
        opset=18,
    ),
]
"""Attributes that became operands, and operators that were others once."""


@pytest.mark.parametrize("net", [*NETS, *OLD], ids=lambda net: net.name)
def test_nets(net: Net) -> None:
    check(net)
