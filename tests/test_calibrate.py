"""Calibration: what is summed over a layer's inputs, held against torch and numpy; and the score made of it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from nets import parse

import onnxprune
from onnxprune import PruneError
from onnxprune.graph.model import load
from onnxprune.graph.weights import find
from onnxprune.runtime import calibrate
from onnxprune.runtime.feeds import load_data
from onnxprune.runtime.session import open_session
from onnxprune.runtime.stream import cut, parse_memory

RNG = np.random.default_rng(6)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def calibrated(proto: onnx.ModelProto, data: object, samples: int = 64):
    """The layers of all weights of a model, and its data, so many samples at a time at most."""
    model = load(proto)
    layers, reasons = calibrate.find_layers(model, find(model)[0])
    dataset = load_data(data, open_session(proto).inputs)
    cal = calibrate.calibration(model, dataset, layers, None, 1)
    feeds, half = cut(dataset, 1, samples)
    return model, layers, reasons, replace(cal, feeds=tuple(feeds), half=half)


def gram(proto: onnx.ModelProto, data: object, samples: int = 64) -> dict[str, np.ndarray]:
    """Weight -> (groups, inputs, inputs), summed feed by feed."""
    model, layers, reasons, cal = calibrated(proto, data, samples)
    assert not reasons
    found = {}
    for layer in layers:
        every = np.ones(layer.places.shape[0], np.bool_)
        halves = calibrate.moments([(layer, every)], cal.stream(model), None, cal, layer.place)
        total = halves[0] + halves[1]
        np.testing.assert_allclose(total.x, rows_of(layer, cal, model).sum(1), rtol=1e-6, atol=1e-6)
        found[layer.weight.name] = total.xx
    return found


def rows_of(layer, cal, model) -> np.ndarray:
    stream = cal.stream(model)
    parts = [b for arrays in stream.read(layer.inputs.values) for b in calibrate.blocks(layer, arrays)]
    return np.concatenate(parts, 1)


def outer(rows: np.ndarray) -> np.ndarray:
    """(groups, rows, inputs) to the Gram matrices."""
    wide = rows.astype(np.float64)
    return np.einsum("gni,gnj->gij", wide, wide)


CONVS = [
    # channels in and out, size, kernel, stride, pads (begin, end), dilation, group
    pytest.param(4, 6, (9, 8), (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, id="plain"),
    pytest.param(4, 6, (9, 8), (3, 2), (2, 3), ((1, 1), (0, 0)), (1, 1), 1, id="strides"),
    pytest.param(4, 6, (9, 8), (3, 3), (1, 2), ((2, 1), (0, 3)), (1, 1), 2, id="pads, groups"),
    pytest.param(4, 6, (11, 9), (3, 2), (2, 1), ((1, 2), (2, 0)), (2, 3), 2, id="dilations, groups"),
    pytest.param(5, 5, (7, 7), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 5, id="depthwise"),
    pytest.param(3, 4, (12,), (4,), (3,), ((2, 1),), (2,), 1, id="1-D"),
    pytest.param(2, 4, (5, 6, 4), (2, 3, 2), (1, 2, 1), ((1, 0), (1, 1), (0, 1)), (1, 1, 2), 2, id="3-D"),
    pytest.param(4, 4, (6, 6), (1, 1), (1, 1), ((0, 0), (0, 0)), (1, 1), 1, id="1x1"),
]


def unfolded(x: np.ndarray, kernel, stride, pads, dilation, group) -> np.ndarray:
    """(groups, windows, inputs * kernel) with torch alone: one position of the kernel after the other."""
    flat = [amount for begin, end in reversed(pads) for amount in (begin, end)]
    padded = torch.nn.functional.pad(torch.from_numpy(x), flat)
    counts = [
        (size - (k - 1) * d - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        where = [
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilation, counts, stride, strict=True)
        ]
        taps.append(padded[(slice(None), slice(None), *where)].reshape(*x.shape[:2], -1))
    rows = torch.stack(taps, -1)  # samples, inputs, windows, kernel
    samples, inputs, windows, size = rows.shape
    grouped = rows.reshape(samples, group, inputs // group, windows, size).permute(1, 0, 3, 2, 4)
    return grouped.reshape(group, samples * windows, -1).numpy()


@pytest.mark.parametrize(("inputs", "outputs", "size", "kernel", "stride", "pads", "dilation", "group"), CONVS)
def test_the_gram_matrix_of_a_convolution(inputs, outputs, size, kernel, stride, pads, dilation, group):
    flat = [*(p[0] for p in pads), *(p[1] for p in pads)]
    node = (
        f"Conv<kernel_shape={list(kernel)}, strides={list(stride)}, pads={flat}, dilations={list(dilation)}, "
        f"group={group}>(x, w)"
    )
    dims = ["N", inputs, *size]
    text = f"(float[{','.join(map(str, dims))}] x) => (float[{','.join('ABCDE'[: len(dims)])}] y) {{ y = {node} }}"
    proto = parse(text, w=normal(outputs, inputs // group, *kernel))
    x = normal(7, inputs, *size)
    rows = unfolded(x, kernel, stride, pads, dilation, group)
    np.testing.assert_allclose(gram(proto, {"x": x})["w"], outer(rows), rtol=1e-6, atol=1e-6)
    # the rows times the weight are the convolution's result
    w = onnx.numpy_helper.to_array(proto.graph.initializer[0])
    y = ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]
    product = np.einsum("gnk,gok->gon", rows, w.reshape(group, outputs // group, -1))
    expected = product.reshape(outputs, 7, -1).swapaxes(0, 1).reshape(y.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


def computed(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], name: str = "y") -> np.ndarray:
    return ort.InferenceSession(proto.SerializeToString()).run([name], feeds)[0]


TRANSPOSED = [
    pytest.param(4, 6, (5, 6), (3, 2), "strides=[2,1]", 1, id="strides"),
    pytest.param(4, 6, (5, 6), (3, 3), "strides=[2,3], pads=[1,0,0,2], output_padding=[1,2]", 2, id="pads, groups"),
    pytest.param(4, 4, (4, 5), (2, 3), "dilations=[2,1], strides=[3,2]", 4, id="dilations, depthwise"),
    pytest.param(2, 3, (7,), (4,), "strides=[3], output_shape=[21]", 1, id="output_shape"),
    pytest.param(2, 3, (5, 4), (3, 3), 'strides=[2,2], auto_pad="SAME_UPPER"', 1, id="SAME_UPPER"),
    pytest.param(2, 3, (5, 4), (3, 4), 'strides=[2,3], auto_pad="SAME_LOWER"', 1, id="SAME_LOWER"),
    pytest.param(2, 3, (3, 4, 2), (2, 3, 2), "strides=[2,1,2], pads=[0,1,0,1,0,0]", 1, id="3-D"),
]


@pytest.mark.parametrize(("inputs", "outputs", "size", "kernel", "attributes", "group"), TRANSPOSED)
def test_the_rows_of_a_transposed_convolution(inputs, outputs, size, kernel, attributes, group):
    dims, out = ",".join(map(str, ["N", inputs, *size])), ",".join("ABCDE"[: len(size) + 2])
    node = f"ConvTranspose<kernel_shape={list(kernel)}, group={group}, {attributes}>(x, w)"
    proto = parse(
        f"(float[{dims}] x) => (float[{out}] y) {{ y = {node} }}", w=normal(inputs, outputs // group, *kernel)
    )
    x = normal(3, inputs, *size)
    y = computed(proto, {"x": x})
    product = multiplied(proto, {"x": x})
    np.testing.assert_allclose(product.reshape(outputs, 3, -1).swapaxes(0, 1).reshape(y.shape), y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_the_rows_of_a_convolution_with_auto_pad(auto):
    node = f'Conv<auto_pad="{auto}", strides=[2,3], kernel_shape=[3,4]>(x, w)'
    proto = parse(f"(float[N,2,8,9] x) => (float[A,B,C,D] y) {{ y = {node} }}", w=normal(3, 2, 3, 4))
    x = normal(4, 2, 8, 9)
    y = computed(proto, {"x": x})
    product = multiplied(proto, {"x": x})
    np.testing.assert_allclose(product.reshape(3, 4, -1).swapaxes(0, 1).reshape(y.shape), y, rtol=1e-4, atol=1e-4)


def multiplied(proto: onnx.ModelProto, data: dict[str, np.ndarray]) -> np.ndarray:
    """(groups, outputs of a group, rows): the rows of a model's only weight times the weight."""
    model, layers, reasons, cal = calibrated(proto, data)
    (layer,) = layers
    assert not reasons
    w = layer.weight.storage.read().reshape(-1)[layer.places]
    return np.einsum("gnk,gok->gon", rows_of(layer, cal, model), w.astype(np.float64))


PRODUCTS = {  # graph, arrays, the expected result from the product (1, outputs, rows)
    "MatMul": ("(float[N,5,6] x) => (float[A,B,C] y) { y = MatMul(x, w) }", (6, 4), (7, 5, 6)),
    "MatMul, left": ("(float[N,6,5] x) => (float[A,B,C] y) { y = MatMul(w, x) }", (4, 6), (7, 6, 5)),
    "Gemm": ("(float[N,6] x) => (float[A,B] y) { y = Gemm<alpha=0.5>(x, w) }", (6, 4), (7, 6)),
    "Gemm transB": ("(float[N,6] x) => (float[A,B] y) { y = Gemm<transB=1>(x, w) }", (4, 6), (7, 6)),
    "Gemm transA": ("(float[6,7] x) => (float[A,B] y) { y = Gemm<transA=1, transB=1>(x, w) }", (4, 6), (6, 7)),
    "Gemm left": ("(float[6,7] x) => (float[A,B] y) { y = Gemm(w, x) }", (4, 6), (6, 7)),
    "Gemm left transA": ("(float[6,7] x) => (float[A,B] y) { y = Gemm<transA=1>(w, x) }", (6, 4), (6, 7)),
    "FusedMatMul": (
        "(float[N,6,5] x) => (float[A,B,C] y) { y = com.microsoft.FusedMatMul<transA=1, alpha=2.0>(x, w) }",
        (6, 4),
        (7, 6, 5),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_rows_of_a_matrix_product(name):
    text, shape, given = PRODUCTS[name]
    proto, x = parse(text, w=normal(*shape)), normal(*given)
    y = computed(proto, {"x": x})
    product = multiplied(proto, [{"x": x}])[0]
    outputs_last = y if y.shape[-1] == len(product) and "left" not in name else y.swapaxes(-1, -2)
    np.testing.assert_allclose(product.T, outputs_last.reshape(-1, len(product)), rtol=1e-4, atol=1e-4)


def test_each_matrix_of_a_batch_has_rows_of_its_own():
    proto = parse("(float[N,3,5,6] x) => (float[A,B,C,D] y) { y = MatMul(x, w) }", w=normal(3, 6, 4))
    x = normal(2, 3, 5, 6)
    product = multiplied(proto, {"x": x})  # (3, 4, 2 * 5)
    expected = computed(proto, {"x": x}).transpose(1, 3, 0, 2).reshape(3, 4, 10)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-4)


STEPS, LONGEST, HIDDEN, READ = 6, 3, 5, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@pytest.mark.parametrize("op", GATES)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("lengths", [False, True])
def test_the_rows_of_a_recurrent_layer(op, direction, lengths):
    """Inputs and states of a layer, run step by step with numpy, for sequences that end earlier too."""
    directions = 1 + (direction == "bidirectional")
    lines = np.array([6, 2, 4], np.int32) if lengths else np.full(3, 6, np.int32)
    given = "lengths" if lengths else '""'
    extra = "linear_before_reset=1, " if op == "GRU" else ""
    proto = parse(
        f"(float[6,N,4] x, float[{directions},N,5] h) => (float[A,B,C,D] y) "
        f'{{ y = {op}<{extra}direction="{direction}", hidden_size=5>(x, w, r, "", {given}, h) }}'.replace('""', ""),
        w=normal(directions, GATES[op] * HIDDEN, READ),
        r=normal(directions, GATES[op] * HIDDEN, HIDDEN),
        **({"lengths": lines} if lengths else {}),
    )
    x, h = normal(STEPS, LONGEST, READ), normal(directions, LONGEST, HIDDEN)
    states = computed(proto, {"x": x, "h": h})
    before = np.zeros((directions, sum(lines), HIDDEN))
    for d in range(directions):
        backwards = direction == "reverse" or d == 1
        row = 0
        for step in range(STEPS):
            for sequence in range(LONGEST):
                if step < lines[sequence]:
                    other = step + 1 if backwards else step - 1
                    at_start = other < 0 or other >= lines[sequence]
                    before[d, row] = h[d, sequence] if at_start else states[other, d, sequence]
                    row += 1
    read = np.concatenate([x[step, sequence][None] for step in range(STEPS) for sequence in range(LONGEST)
                           if step < lines[sequence]])  # fmt: skip
    found = gram(proto, [{"x": x, "h": h}])
    np.testing.assert_allclose(found["w"], outer(read[None]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found["r"], outer(before), rtol=1e-5, atol=1e-5)


NET = """(float[N,2,8,8] x) => (float[A,B] y) {
    a = Conv<pads=[1,1,1,1], kernel_shape=[3,3]>(x, first, bias)
    b = Relu(a)
    c = Conv<kernel_shape=[3,3], strides=[2,2], group=2>(b, second)
    d = Flatten(c)
    y = MatMul(d, third)
}"""


def net() -> onnx.ModelProto:
    return parse(NET, first=normal(6, 2, 3, 3), bias=normal(6), second=normal(4, 3, 3, 3), third=normal(36, 5))


@pytest.mark.parametrize("samples", [1, 7, 40])
def test_sums_do_not_depend_on_the_chunks(samples):
    proto, x = net(), normal(70, 2, 8, 8)
    expected, found = gram(proto, {"x": x}), gram(proto, {"x": x}, samples)
    assert expected.keys() == found.keys() == {"first", "second", "third"}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("samples", [1, 7, 40, 64, 1000])
def test_chunks_hold_no_more_than_memory_allows_and_halves_never_share_one(samples):
    x = normal(151, 2, 8, 8)
    cal = calibrated(net(), {"x": x}, samples)[3]
    counts = [len(feed["x"]) for feed in cal.feeds]
    assert max(counts) <= min(samples, 64)
    assert (sum(counts), sum(counts[: cal.half])) == (151, 75)
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in cal.feeds]), x)


def test_the_chunks_follow_what_the_layers_read():
    text = "(float[N,2,90,90] x) => (float[A,B,C,D] y) { y = Conv<kernel_shape=[3,3]>(x, w) }"  # 64,800 bytes a sample
    proto, x = parse(text, w=normal(4, 2, 3, 3)), normal(40, 2, 90, 90)
    model, layers, _, _ = calibrated(proto, {"x": x})
    dataset = load_data({"x": x}, open_session(proto).inputs)
    for memory, most in ((2**20, 4), (2**21, 8)):  # a quarter of it
        cal = calibrate.calibration(model, dataset, layers, memory, 1)
        assert max(len(feed["x"]) for feed in cal.feeds) == most


def test_the_norms_of_wanda_are_those_of_its_formula():
    proto, x = net(), normal(20, 2, 8, 8)
    model, layers, _, cal = calibrated(proto, {"x": x})
    norms = calibrate.norms(model, layers, cal)
    for layer in layers:
        rows = rows_of(layer, cal, model)  # (groups, rows, columns)
        expected = np.sqrt((rows.astype(np.float64) ** 2).sum(1))
        assert norms[layer.weight.name].shape == layer.weight.role_shape
        spread = norms[layer.weight.name].reshape(*layer.places.shape)
        np.testing.assert_allclose(spread, np.broadcast_to(expected[:, None], layer.places.shape), rtol=1e-6)


def pruned(proto: onnx.ModelProto, data: object, **config: object) -> onnxprune.Result:
    entries = config.pop("config_list", [{"sparsity": config.pop("sparsity", 0.5)}])
    return onnxprune.prune(proto, {**config, "config_list": entries}, calibration=data, threads=1)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.77])
def test_wanda_takes_the_least_of_every_output(sparsity):
    """A literal reading of the paper: |w| times the norm of its input, ranked within each output."""
    w, x = normal(12, 7), normal(40, 12) * np.linspace(0.1, 4, 12).astype(np.float32)
    proto = parse("(float[N,12] x) => (float[A,B] y) { y = MatMul(x, w) }", w=w)
    keep = pruned(proto, {"x": x}, score="wanda", sparsity=sparsity).masks["w"]
    scores = np.abs(w.T.astype(np.float64)) * np.sqrt((x.astype(np.float64) ** 2).sum(0))  # (outputs, inputs)
    total = int(84 * sparsity)
    counts = [total // 7 + (row < total % 7) for row in range(7)]
    for row, count in enumerate(counts):
        expected = np.ones(12, np.bool_)
        expected[np.argsort(scores[row])[:count]] = False
        np.testing.assert_array_equal(keep.T[row], expected)


def test_wanda_with_a_pattern_ranks_within_its_groups():
    w, x = normal(16, 6), normal(40, 16) * np.linspace(0.1, 4, 16).astype(np.float32)
    proto = parse("(float[N,16] x) => (float[A,B] y) { y = MatMul(x, w) }", w=w)
    scores = np.abs(w.T) * np.sqrt((x**2).sum(0))
    keep = pruned(proto, {"x": x}, score="wanda", pattern="2:4").masks["w"].T
    order = np.argsort(scores.reshape(6, 4, 4), -1)
    expected = np.ones((6, 4, 4), np.bool_)
    np.put_along_axis(expected, order[..., :2], False, -1)
    np.testing.assert_array_equal(keep, expected.reshape(6, 16))
    blocks = pruned(proto, {"x": x}, score="wanda", pattern="block:2x4").masks["w"].T
    means = scores.reshape(3, 2, 4, 4).sum((1, 3))
    kept = blocks.reshape(3, 2, 4, 4)
    for row in range(3):
        assert {tuple(np.unique(kept[row, :, b])) for b in np.argsort(means[row])[:2]} == {(False,)}
        assert {tuple(np.unique(kept[row, :, b])) for b in np.argsort(means[row])[2:]} == {(True,)}


@pytest.mark.parametrize(
    "pattern", ["unstructured", "2:4", "1:2", "3:4", "block:2x2", "block:4x1", "block:3x3", "grouped:4", "channel"]
)
def test_wanda_does_not_depend_on_the_units_of_the_inputs(pattern):
    """Inputs twice as large and weights half as large compute the same: the same entries go, whatever the pattern."""
    text = """(float[N,8,7,7] x) => (float[A,B,C,D] y) {
        a = Conv<kernel_shape=[3,3]>(x, first)
        b = Relu(a)
        y = Conv<kernel_shape=[1,1]>(b, second)
    }"""
    first, second, x = normal(16, 8, 3, 3), normal(4, 16, 1, 1), normal(20, 8, 7, 7)
    units = 2.0 ** RNG.integers(-6, 7, (8, 1, 1)).astype(np.float32)
    entries = [{"sparsity": 0.25 if pattern == "3:4" else 0.5, "pattern": pattern, "op_names": ["first"]}]
    plain, scaled = (
        onnxprune.prune(
            parse(text, first=w, second=second), entries, score="wanda", calibration={"x": given}, align=1,
            keep_shape=True, threads=1,
        ).masks["first"]
        for w, given in ((first, x), (first / units, x * units))
    )  # fmt: skip
    np.testing.assert_array_equal(plain, scaled)
    magnitude = onnxprune.prune(parse(text, first=first / units, second=second), entries, align=1, keep_shape=True)
    assert (magnitude.masks["first"] != scaled).any()
    assert 0.2 < 1 - scaled.mean() < 0.55


def test_wanda_scores_channels_by_the_mean_of_their_entries():
    first, x = normal(8, 3, 3, 3), normal(30, 3, 9, 9) * np.array([4, 0.1, 1], np.float32)[:, None, None]
    text = """(float[N,3,9,9] x) => (float[A,B,C,D] y) {
        a = Conv<kernel_shape=[3,3]>(x, first)
        b = Relu(a)
        y = Conv<kernel_shape=[1,1]>(b, second)
    }"""
    proto = parse(text, first=first, second=normal(4, 8, 1, 1))
    entries = [{"sparsity": 0.5, "pattern": "channel", "score": "wanda", "op_names": ["first"]}]
    result = onnxprune.prune(proto, entries, calibration={"x": x}, align=1, keep_shape=True, threads=1)
    rows = unfolded(x, (3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)[0]
    scores = (np.abs(first.reshape(8, -1)) * np.sqrt((rows**2).sum(0))).mean(1)
    expected = np.sort(np.argsort(scores)[:4])
    gone = np.flatnonzero(~result.masks["first"].reshape(8, -1).any(1))
    np.testing.assert_array_equal(gone, expected)


def test_a_weight_of_two_operators_has_the_inputs_of_both():
    w = normal(6, 6)
    proto = parse("(float[N,6] x) => (float[A,B] y) { a = MatMul(x, w) b = Relu(a) y = MatMul(b, w) }", w=w)
    x = normal(11, 6)
    model, layers, _, cal = calibrated(proto, {"x": x})
    hidden = np.maximum(x @ w, 0)
    expected = np.sqrt((x.astype(np.float64) ** 2).sum(0) + (hidden.astype(np.float64) ** 2).sum(0))
    np.testing.assert_allclose(calibrate.norms(model, layers, cal)["w"], np.broadcast_to(expected, (6, 6)), rtol=1e-5)


def test_weights_in_functions_have_inputs_too():
    text = """(float[N,6] x) => (float[A,B] y) { a = own.f(x, w) y = own.f(a, v) }
    <domain: "own", opset_import: ["": 21]> f (x, m) => (y) { a = MatMul(x, m) y = Relu(a) }"""
    w, v, x = normal(6, 5), normal(5, 4), normal(9, 6)
    found = gram(parse(text, w=w, v=v), {"x": x})
    np.testing.assert_allclose(found["w"], outer(x[None]), rtol=1e-5)
    np.testing.assert_allclose(found["v"], outer(np.maximum(x @ w, 0)[None]), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_measured_is_left_alone_with_the_reason():
    text = """(float[N,6] x, bool c) => (float[A,B] y) {
        a = MatMul(x, w)
        y = If(c) <then_branch = g () => (float[P,Q] t) { t = MatMul(a, v) },
                   else_branch = g () => (float[P,Q] t) { t = Identity(a) }>
    }"""
    proto = parse(text, w=normal(6, 6), v=normal(6, 6))
    result = pruned(proto, [{"x": normal(4, 6), "c": np.array(True)}], score="wanda")
    assert [row.name for row in result.report.rows] == ["w"]
    assert [(s.name, s.reason) for s in result.report.skipped] == [
        ("v", "it is used inside a loop or a branch, whose values are not handed out")
    ]


@pytest.mark.parametrize("config", [{"score": "wanda"}, {"pruner": "sparsegpt"}, {"reconstruct": True}])
def test_nonfinite_activations_are_an_error_that_names_the_node(tmp_path, config):
    proto = parse("(float[N,4] x) => (float[A,B] y) { a = Log(x) [last] y = MatMul(a, w) }", w=normal(4, 3))
    x = np.abs(normal(5, 4)) + 0.1
    x[2, 1] = 0
    with pytest.raises(PruneError, match=r"input 'a' \[3, 4\] of MatMul 'last' holds 1 entries that are NaN or inf"):
        onnxprune.prune(proto, {**config, "config_list": [{"sparsity": 0.5}]}, tmp_path / "out.onnx",
                        calibration={"x": x})  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_without_data_there_is_nothing_to_calibrate_on():
    for config in ({"score": "wanda"}, {"reconstruct": True}, {"pruner": "sparsegpt"}):
        with pytest.raises(PruneError, match="asks for calibration data"):
            onnxprune.prune(net(), {**config, "config_list": [{"sparsity": 0.5}]})


def test_labels_that_do_not_fit_are_an_error(tmp_path):
    data = {"x": normal(10, 2, 8, 8), "labels": np.zeros(9, np.int64)}
    with pytest.raises(PruneError, match="its lengths differ: 'x' 10, 'labels' 9"):
        onnxprune.prune(net(), {"score": "wanda", "config_list": [{"sparsity": 0.5}]}, tmp_path / "out.onnx", data)
    data["labels"] = np.full(10, 7)
    with pytest.raises(PruneError, match="labels reach from 7 to 7, but output 'y'"):
        onnxprune.prune(net(), {"score": "wanda", "config_list": [{"sparsity": 0.5}]}, tmp_path / "out.onnx", data)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "expected"), [("2GB", 2**31), ("500m", 500 * 2**20), (2**22, 2**22), ("1.5 GiB", 1.5 * 2**30)]
)
def test_memory_is_a_number_or_a_text(given, expected):
    assert parse_memory(given) == expected


@pytest.mark.parametrize("given", ["", "much", "-1GB", 12, "nan"])
def test_other_memory_is_an_error(given):
    with pytest.raises(PruneError, match="max_memory is"):
        parse_memory(given)


@pytest.mark.parametrize(("seed", "expected"), [("no pads", "AssertionError"), ("flip", "AssertionError")])
def test_seeded_bugs_are_caught(monkeypatch, seed, expected):
    from onnxprune.graph import inputs

    if seed == "no pads":
        monkeypatch.setattr(inputs, "_padded", lambda x, pads: x)
        with pytest.raises(AssertionError):
            test_the_gram_matrix_of_a_convolution(*CONVS[2].values)
    else:
        windows = inputs._windows
        monkeypatch.setattr(inputs, "_windows", lambda x, shape, most, flip=False: windows(x, shape, most))
        with pytest.raises(AssertionError):
            test_the_rows_of_a_transposed_convolution(*TRANSPOSED[0].values)


def test_python_a_file_and_the_command_line_are_one_door(tmp_path, capsys):
    from onnxprune.cli import main

    onnx.save(net(), tmp_path / "in.onnx")
    x = normal(30, 2, 8, 8)
    np.savez(tmp_path / "cal.npz", x=x)
    (tmp_path / "config.yaml").write_text(
        "score: wanda\nallocation: erk\nreconstruct: true\nconfig_list: [{sparsity: 0.6}]\n"
    )
    config = {"score": "wanda", "allocation": "erk", "reconstruct": True, "config_list": [{"sparsity": 0.6}]}
    result = onnxprune.prune(tmp_path / "in.onnx", config, tmp_path / "a.onnx", calibration={"x": x}, threads=1)
    common = ["--threads", "1", "--max-memory", "1GB", "--no-benchmark", "--calibration", str(tmp_path / "cal.npz")]
    given = {
        "b": ["--sparsity", "0.6", "--score", "wanda", "--allocation", "erk", "--reconstruct"],
        "c": ["--config", str(tmp_path / "config.yaml")],
    }
    for name, options in given.items():
        target = tmp_path / f"{name}.onnx"
        assert main(["prune", str(tmp_path / "in.onnx"), "-o", str(target), *options, *common]) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "the calibration data are few: one weight has more inputs than rows" in text
        for found, expected in zip(
            onnx.load(target).graph.initializer, result.to_proto().graph.initializer, strict=True
        ):
            np.testing.assert_allclose(
                onnx.numpy_helper.to_array(found), onnx.numpy_helper.to_array(expected), rtol=1e-5, atol=1e-6
            )


def test_data_alone_are_calibrated_on_and_compared_on():
    labels = np.arange(40) % 5
    for data in ({"x": normal(40, 2, 8, 8)}, {"x": normal(40, 2, 8, 8), "labels": labels}):
        result = onnxprune.prune(net(), {"score": "wanda", "config_list": [{"sparsity": 0.5}]}, data=data, threads=1)
        assert result.evaluation is not None
        assert result.evaluation.samples == 40
        assert (result.evaluation.score is not None) == ("labels" in data)
        assert result.evaluation.agreement is not None


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"pruner": "sensitivity", "score": "wanda", "config_list": [{"sparsity": 0.5}]}, "ranks by its own"),
        ({"reconstruct": "yes", "config_list": [{"sparsity": 0.5}]}, "'reconstruct' is 'yes'; expected true or false"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_an_error(config, says):
    with pytest.raises(PruneError, match=says):
        onnxprune.prune(net(), config, calibration={"x": normal(4, 2, 8, 8)})
