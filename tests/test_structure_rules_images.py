"""Rules of operators between convolutions: groups, pins, and shrunk against masked."""

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
    channels: int = 8,
    opset: int = 21,
    width: int = 8,
    batch: str = "N",
) -> Net:
    """A net of two convolutions, from 3 to `width` channels (`h`) and from `channels` (`z`) to 2."""
    return Net(
        name,
        f"(float[{batch},3,6,6] x) => (float[{batch},2,P,Q] y) {{ h = Conv(x, w1, b1) {text} y = Conv(z, w3) }}",
        {"w1": (width, 3, 1, 1), "b1": (width,), "w3": (2, channels, 1, 1), **(stored or {})},
        groups,
        {**OUT, **(pinned or {})},
        opset,
    )


SPATIAL = {"w1": "graph output"}

NETS = [
    between("relu", "z = Relu(h)"),
    between("sigmoid", "z = Sigmoid(h)"),
    between("log", "e = Exp(h) z = Log(e)"),
    between("log of what may be 0", "e = Abs(h) z = Log(e)", None, (), {"w1": "has no value at 0"}),
    between("residual", "a = Conv(h, w2) z = Add(a, h)", {"w2": (8, 8, 1, 1)}),
    between("three in a sum", "a = Conv(h, w2) s = Relu(h) z = Sum(a, h, s)", {"w2": (8, 8, 1, 1)}),
    between("mean", "s = Relu(h) z = Mean(h, s)"),
    between("max", "z = Max(h, c)", {"c": (8, 1, 1)}),
    between("chain", "r = Relu(h) z = Conv(r, w2)", {"w2": (6, 8, 1, 1)}, ("w1 8", "w2 6"), None, 6),
    between("grouped", "z = Conv<group = 2>(h, w2, b2)", {"w2": (8, 4, 1, 1), "b2": (8,)}, ("w1 4x2", "w2 4x2")),
    between("depthwise", "z = Conv<group = 8, pads = [1, 1, 1, 1]>(h, w2)", {"w2": (8, 1, 3, 3)}),
    between("depthwise with two", "z = Conv<group = 8>(h, w2)", {"w2": (16, 1, 1, 1)}, ("w1 8",), None, 16),
    between(
        "channel shuffle",
        "a = Conv<group = 2>(h, w2) r = Reshape(a, s1) t = Transpose<perm = [0, 2, 1, 3, 4]>(r)"
        " u = Reshape(t, s2) z = Conv<group = 8>(u, w4)",
        {"w2": (8, 4, 1, 1), "s1": ints(0, 2, 4, 6, 6), "s2": ints(0, 8, 6, 6), "w4": (8, 1, 1, 1)},
        ("w1 4x2", "w2 4x2"),
    ),
    between(
        "squeeze and excite",
        "p = GlobalAveragePool(h) a = Conv(p, w2, b2) r = Relu(a) b = Conv(r, w4, b4) s = Sigmoid(b) z = Mul(h, s)",
        {"w2": (4, 8, 1, 1), "b2": (4,), "w4": (8, 4, 1, 1), "b4": (8,)},
        ("w1 8", "w2 4"),
    ),
    between(
        "squeeze and excite by ReduceMean",
        "p = ReduceMean<keepdims = 0>(h, axes) a = Gemm(p, w2, b2) r = Relu(a) b = MatMul(r, w4)"
        " s = HardSigmoid(b) u = Unsqueeze(s, axes) z = Mul(u, h)",
        {"w2": (8, 4), "b2": (4,), "w4": (4, 8), "axes": ints(2, 3)},
        ("w1 8", "w2 4"),
    ),
    between(
        "dense",
        "a = Conv(h, w2) r = Relu(a) c = Concat<axis = 1>(h, r) b = Conv(c, w4) z = Concat<axis = 1>(c, b)",
        {"w2": (4, 8, 1, 1), "w4": (4, 12, 1, 1)},
        ("w1 8", "w2 4", "w4 4"),
        None,
        16,
    ),
    between("concat with input", "z = Concat<axis = -3>(x, h)", None, ("w1 8",), None, 11),
    between(
        "split",
        "a, b = Split<axis = 1, num_outputs = 2>(h) c = Conv(a, w2) z = Concat<axis = 1>(c, b)",
        {"w2": (3, 4, 1, 1)},
        ("w1 4", "w1#2 4", "w2 3"),
        None,
        7,
    ),
    between(
        "uneven split",
        "a, b = Split<axis = 1>(h, s) c = Sigmoid(a) z = Concat<axis = 1>(b, c)",
        {"s": ints(3, 5)},
    ),
    between("split with a short end", "a, b, c = Split<axis = 1, num_outputs = 3>(h) z = Concat<axis = 1>(c, a, b)"),
    between("split 11", "a, b = Split<axis = 1, split = [2, 6]>(h) r = Relu(a) z = Concat<axis = 1>(b, r)", opset=11),
    between(
        "split 11 even", "a, b = Split<axis = 1>(h) r = Relu(a) z = Add(b, r)", groups=("w1 4x2",), channels=4, opset=11
    ),
    between("slice", "z = Slice(h, b, e, a)", {"b": ints(2), "e": ints(7), "a": ints(1)}, ("w1 3", "w1#2 5"), None, 5),
    between(
        "slice of two axes by two and backwards",
        "a = Slice(h, f, e, l, s) r = Resize(a, , , t) z = Concat<axis = 1>(r, h)",
        {"f": ints(0, 7), "e": ints(6, 0), "l": ints(2, 1), "s": ints(2, -2), "t": ints(2, 4, 6, 6)},
        ("w1 4", "w1#2 4"),
        None,
        12,
        batch="2",
    ),
    between(
        "slice 9",
        "a = Slice<starts = [1], ends = [-1], axes = [1]>(h) z = Concat<axis = 1>(h, a)",
        groups=("w1 2", "w1#2 6"),
        channels=14,
        opset=9,
    ),
    between(
        "gather", "z = Gather<axis = 1>(h, i)", {"i": ints(7, 6, 5, 4, 3, 2, 1, 0, 0, -1)}, ("w1 2", "w1#2 6"), None, 10
    ),
    between(
        "gather of one",
        "g = Gather<axis = 1>(h, i) u = Unsqueeze(g, a) z = Mul(h, u)",
        {"i": np.array(3), "a": ints(1)},
        ("w1 7",),
        {"w1": "picks one entry"},
    ),
    between("pad", "z = Pad(h, p)", {"p": ints(0, 1, 0, 0, 0, 2, 0, 0)}, ("w1 8",), None, 11),
    between(
        "pad beside a wider one",
        "p = Pad(h, q) a = Conv(x, w2) z = Add(p, a)",
        {"q": ints(0, 2, 0, 0, 0, 1, 0, 0), "w2": (11, 3, 1, 1)},
        ("w1 8", "w2 3"),
        None,
        11,
    ),
    between("pad with axes", "z = Pad(h, p, , a)", {"p": ints(1, 1, 2, 0), "a": ints(1, 2)}, ("w1 8",), None, 11),
    between(
        "pad with a value, then a sum",
        "e = Pad(h, p, v) s = ReduceSum(e, one) z = Mul(e, s)",
        {"p": ints(0, 0, 1, 1, 0, 0, 1, 1), "v": np.array(2, np.float32), "one": ints(1)},
        (),
        {"w1": "ReduceSum 's' reduces axis 1"},
    ),
    between(
        "pad with a stored 0, then a sum",
        "e = Pad(h, p, v) s = ReduceSum(e, one) z = Mul(e, s)",
        {"p": ints(0, 0, 1, 1, 0, 0, 1, 1), "v": np.array(0, np.float32), "one": ints(1)},
    ),
    between(
        "pad 2 with a value, then a sum",
        "e = Pad<pads = [0, 0, 1, 1, 0, 0, 1, 1], value = 2.0>(h) s = ReduceSum<axes = [1]>(e) z = Mul(e, s)",
        None,
        (),
        {"w1": "ReduceSum 's' reduces axis 1"},
        opset=10,
    ),
    between("pad by reflection", 'z = Pad<mode = "reflect">(h, p)', {"p": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
    between("pad 2", "z = Pad<pads = [0, 1, 0, 0, 0, 1, 0, 0]>(h)", None, ("w1 8",), None, 10, 10),
    between("tile", "z = Tile(h, r)", {"r": ints(1, 2, 1, 1)}, ("w1 8",), None, 16),
    between("expand", "p = GlobalMaxPool(h) s = Shape(h) e = Expand(p, s) z = Add(h, e)"),
    between("transposes", "t = Transpose<perm = [0, 2, 3, 1]>(h) r = Tanh(t) z = Transpose<perm = [0, 3, 1, 2]>(r)"),
    between("squeeze", "u = Unsqueeze(h, a) r = Relu(u) z = Squeeze(r, a)", {"a": ints(1)}),
    between(
        "squeeze of all there is",
        "p = GlobalAveragePool(h) q = Squeeze(p) u = Unsqueeze(q, a) z = Mul(h, u)",
        {"a": ints(2, 3)},
        ("w1 2",),
        None,
        2,
        21,
        2,
        "2",
    ),
    between("resize by scales", 'z = Resize<mode = "nearest">(h, , s)', {"s": np.float32([1, 1, 2, 2])}),
    between(
        "resize by sizes",
        's = Shape(h) z1 = Resize<mode = "linear">(h, , , t) z = Relu(z1)',
        {"t": ints(2, 8, 9, 9)},
        batch="2",
    ),
    between("resize with axes", "z = Resize<axes = [2, 3]>(h, , , t)", {"t": ints(9, 3)}),
    between("resize 10", "z = Resize(h, s)", {"s": np.float32([1, 1, 2, 2])}, opset=10),
    between("upsample 9", "z = Upsample(h, s)", {"s": np.float32([1, 1, 2, 2])}, opset=9),
    between("upsample 8", "z = Upsample<scales = [1.0, 1.0, 2.0, 2.0]>(h)", opset=8),
    between(
        "upsample to the size of another",
        "p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(h) s = Shape(x) hw = Slice(s, two, four)"
        " t = Shape(p) nc = Slice(t, nought, two) sizes = Concat<axis = 0>(nc, hw) u = Resize(p, , , sizes)"
        " z = Concat<axis = 1>(u, h)",
        {"nought": ints(0), "two": ints(2), "four": ints(4)},
        channels=16,
    ),
    between("transposed", "z = ConvTranspose(h, w2, b2)", {"w2": (8, 5, 2, 2), "b2": (5,)}, ("w1 8", "w2 5"), None, 5),
    between(
        "transposed and grouped",
        "z = ConvTranspose<group = 2>(h, w2, b2)",
        {"w2": (8, 3, 2, 2), "b2": (6,)},
        ("w1 4x2", "w2 3"),
        None,
        6,
    ),
    between("transposed and depthwise", "z = ConvTranspose<group = 8>(h, w2)", {"w2": (8, 1, 2, 2)}),
    between("batch norm", "n = BatchNormalization(h, s, b, m, v) z = Relu(n)", {k: (8,) for k in "sbmv"}),
    between("batch norm 7", "n = BatchNormalization(h, s, b, m, v) z = Relu(n)", {k: (8,) for k in "sbmv"}, opset=7),
    between("instance norm", "z = InstanceNormalization(h, s, b)", {k: (8,) for k in "sb"}),
    between("group norm", "z = GroupNormalization<num_groups = 4>(h, s, b)", {k: (8,) for k in "sb"}, ("w1 4x2",)),
    between(
        "group norm 18",
        "z = GroupNormalization<num_groups = 4>(h, s, b)",
        {k: (4,) for k in "sb"},
        ("w1 4x2",),
        opset=18,
    ),
    between(
        "group norm of two", "z = GroupNormalization<num_groups = 2>(h, s, b)", {k: (8,) for k in "sb"}, ("w1 2x4",)
    ),
    between(
        "one group norm",
        "z = GroupNormalization<num_groups = 1>(h, s, b)",
        {k: (8,) for k in "sb"},
        (),
        {"w1": "normalises over"},
    ),
    between(
        "group norm as exported",
        "r = Reshape(h, s1) n = InstanceNormalization(r, one, nought) v = Shape(h) u = Reshape(n, v) a = Mul(u, s)"
        " z = Add(a, b)",
        {
            "s1": ints(0, 4, -1),
            "one": np.ones(4, np.float32),
            "nought": np.zeros(4, np.float32),
            "s": (8, 1, 1),
            "b": (8, 1, 1),
        },
        ("w1 4x2",),
    ),
    between("prelu", "z = PRelu(h, s)", {"s": (8, 1, 1)}),
    between("prelu with one slope", "z = PRelu(h, s)", {"s": (1,)}),
    between("scale and shift", "m = Mul(h, s) d = Div(m, v) z = Sub(d, b)", {k: (8, 1, 1) for k in "svb"}),
    between("where", "g = Greater(h, c) z = Where(g, h, s)", {"c": (8, 1, 1), "s": (8, 1, 1)}),
    between("clip above 0", "z = Clip(h, low)", {"low": np.array(0.25, np.float32)}),
    between("clip below 0", "z = Clip(h, , high)", {"high": np.array(-0.25, np.float32)}),
    between("clip", "z = Clip(h, low, high)", {"low": np.array(-0.5, np.float32), "high": np.array(0.5, np.float32)}),
    between("softmax over channels", "z = Softmax<axis = 1>(h)", None, (), {"w1": "mixes axis 1"}),
    between("softmax over rows", "z = Softmax(h)"),
    between("softmax 11", "z = Softmax<axis = 2>(h)", opset=11),
    between("softmax 11 over all", "z = Softmax(h)", None, (), {"w1": "mixes axis 1"}, opset=11),
    between("lrn", "z = LRN<size = 3>(h)", None, (), {"w1": "mixes neighbouring channels"}),
    between("lp pool", "z = LpPool<kernel_shape = [2, 2]>(h)"),
    between("global lp pool", "z = GlobalLpPool(h)"),
    between("max pool with places", "z, i = MaxPool<kernel_shape = [2, 2]>(h)", None, (), {"w1": "counts places"}),
    between("mean variance", "z = MeanVarianceNormalization(h)", None, (), {"w1": "variance"}),
    between("depth to space", "z = DepthToSpace<blocksize = 2>(h)", None, ("w1 2x4",), None, 2),
    between("depth to space CRD", 'z = DepthToSpace<blocksize = 2, mode = "CRD">(h)', None, ("w1 2x4",), None, 2),
    between("space to depth", "z = SpaceToDepth<blocksize = 2>(h)", None, ("w1 8",), None, 32),
    between("grid sample", "z = GridSample(h, g)", {"g": (2, 4, 4, 2)}, batch="2"),
    between("cumulative sum over rows", "z = CumSum(h, a)", {"a": np.array(2)}),
    between("cumulative sum over channels", "z = CumSum(h, a)", {"a": np.array(1)}, (), {"w1": "sums along it"}),
    between("trilu", "z = Trilu(h)"),
    between("top k of rows", "z, i = TopK(h, k)", {"k": ints(3)}),
    between(
        "gather elements", "z = GatherElements<axis = 3>(h, i)", {"i": np.zeros((2, 8, 6, 2), np.int64)}, batch="2"
    ),
    between(
        "scatter elements",
        "z = ScatterElements<axis = 2>(h, i, u)",
        {"i": np.ones((2, 8, 2, 6), np.int64), "u": (2, 8, 2, 6)},
        batch="2",
    ),
    between("crop", "z = CenterCropPad<axes = [2, 3]>(h, s)", {"s": ints(4, 8)}),
    between(
        "regions",
        "z = RoiAlign<output_height = 2, output_width = 2>(h, r, i)",
        {"r": np.float32([[0, 0, 4, 4], [1, 1, 5, 5]]), "i": ints(0, 0)},
    ),
    between("old regions", "z = MaxRoiPool<pooled_shape = [2, 2]>(h, r)", {"r": np.float32([[0, 0, 0, 4, 4]])}),
    between("dropout", "z = Dropout(h)"),
    between("dropout 10", "z, m = Dropout<ratio = 0.3>(h)", opset=10),
    between("cast", "c = Cast<to = 11>(h) z = Cast<to = 1>(c)"),
]

NETS += [
    Net(
        "divided by its own size",
        "(float[2,3,4,4] x) => (float[2,2,4,4] y)"
        " { h = Conv(x, w1) n = Size(h) f = Cast<to = 1>(n) g = Div(h, f) y = Conv(g, w3) }",
        {"w1": (8, 3, 1, 1), "w3": (2, 8, 1, 1)},
        (),
        {"w1": "computes with its size", "w3": "graph output"},
    ),
    Net(
        "a function called twice",
        """(float[N,3,6,6] x) => (float[N,2,6,6] y) {
            h = own.block <slope = 0.1> (x, w1, b1) z = own.block <slope = 0.2> (h, w2, b2) y = Conv(z, w3)
        }
        <domain: "own", opset_import: ["": 21]>
        block <slope> (a, w, b) => (d) { c = Conv(a, w, b) d = LeakyRelu <alpha: float = @slope> (c) }""",
        {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (6, 8, 1, 1), "b2": (6,), "w3": (2, 6, 1, 1)},
        ("w1 8", "w2 6"),
        OUT,
    ),
    Net(
        "images of any size",
        """(float[N,3,H,W] x) => (float[N,2,H2,W2] y) {
            h = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w1, b1) d = MaxPool<kernel_shape = [2, 2],
                strides = [2, 2]>(h)
            a = Conv(d, w2) s = Shape<start = 2>(h) n = Shape<end = 2>(a) t = Concat<axis = 0>(n, s)
            u = Resize<mode = "linear">(a, , , t) c = Concat<axis = 1>(u, h) k = Shape(c) r = Reshape(c, apart)
            m = Transpose<perm = [0, 2, 1, 3]>(r) b = Reshape(m, k) y = Conv(b, w3)
        }""",
        {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 1, 1), "w3": (2, 16, 1, 1), "apart": ints(0, 2, 8, -1)},
        ("w1 8",),
        OUT,
        shapes={"x": (1, 3, 16, 12)},
    ),
    Net(
        "constant nodes",
        """(float[N,3,6,6] x) => (float[N,2,6,6] y) {
            w = Constant<value = float[4,3,1,1] {1., 2., 3., -1., -2., 3., 4., 1., 1., -3., 2., 1.}>() h = Conv(x, w)
            s = Constant<value_ints = [0, 4, 1, 1]>() f = Constant<value_floats = [0.5, 1.5, 2.5, 3.5]>() t =
                Reshape(f, s1)
            z = Mul(h, t) y = Conv(z, w3)
        }""",
        {"w3": (2, 4, 1, 1), "s1": ints(1, 4, 1, 1)},
        ("w 4",),
        OUT,
    ),
    Net(
        "the size of what is pruned comes out",
        """(float[N,3,6,6] x) => (float[N,2,6,6] y, int64[4] s) { h = Conv(x, w1) s = Shape(h) y = Conv(h, w3) }""",
        {"w1": (8, 3, 1, 1), "w3": (2, 8, 1, 1)},
        (),
        {**OUT, "w1": "graph output 's' computes with its size"},
    ),
]


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.name)
def test_convolutions(net: Net) -> None:
    check(net)
