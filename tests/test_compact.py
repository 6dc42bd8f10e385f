"""Channels that zeros have made dead are cut out, and nothing that is computed changes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import onnxprune
from onnxprune import PruneError
from onnxprune.structure import compact

DENSE = [{"sparsity": 0.0}]

NETS = {
    "gemm": (
        "g (float[N,6] x) => (float[N,4] y) {h = Gemm<transB=1>(x, a, b) a1 = %s(h) y = Gemm<transB=1>(a1, c, d)}",
        {"a": (8, 6), "b": (8,), "c": (4, 8), "d": (4,)},
    ),
    "gemm without a bias": (
        "g (float[N,6] x) => (float[N,4] y) {h = Gemm<transB=1>(x, a, b) a1 = %s(h) y = Gemm(a1, c)}",
        {"a": (8, 6), "b": (8,), "c": (8, 4)},
    ),
    "matmul": (
        "g (float[N,3,6] x) => (float[N,3,4] y) {m = MatMul(x, a) h = Add(m, b) a1 = %s(h) y = MatMul(a1, c)}",
        {"a": (6, 8), "b": (8,), "c": (8, 4)},
    ),
    "conv": (
        "g (float[N,3,9,9] x) => (float[N,4,7,7] y) {h = Conv(x, a, b) a1 = %s(h) y = Conv(a1, c, d)}",
        {"a": (8, 3, 3, 3), "b": (8,), "c": (4, 8, 1, 1), "d": (4,)},
    ),
    "two readers": (
        "g (float[N,6] x) => (float[N,4] y) {h = Gemm<transB=1>(x, a, b) a1 = %s(h) "
        "u = Gemm<transB=1>(a1, c, d) v = MatMul(a1, e) y = Add(u, v)}",
        {"a": (8, 6), "b": (8,), "c": (4, 8), "d": (4,), "e": (8, 4)},
    ),
}
OUT = {"gemm": 0, "gemm without a bias": 0, "matmul": 1, "conv": 0, "two readers": 0}


def net(name: str, activation: str = "Sigmoid", seed: int = 0, dead: tuple[int, ...] = ()) -> onnx.ModelProto:
    text, weights = NETS[name]
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text % activation}')
    rng = np.random.default_rng(seed)
    for key, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        if key == "a":
            np.moveaxis(array, OUT[name], 0)[list(dead)] = 0
        model.graph.initializer.append(numpy_helper.from_array(array, key))
    return model


def run(model: onnx.ModelProto, seed: int) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString())
    shape = [d if isinstance(d, int) else 3 for d in session.get_inputs()[0].shape]
    return session.run(None, {"x": np.random.default_rng(seed).standard_normal(shape).astype(np.float32)})[0]


def size(model: onnx.ModelProto, name: str) -> int:
    return next(int(np.prod(t.dims)) for t in model.graph.initializer if t.name == name)


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "Tanh", "Exp"])
@pytest.mark.parametrize("name", NETS)
def test_silent_channels_leave_their_constant_behind(name, activation):
    model = net(name, activation, dead=(1, 4, 5))
    result = onnxprune.prune(model, DENSE, compact=True)
    small = result.to_proto()
    assert [(g.size, g.kept) for g in result.report.groups] == [(8, 5)]
    assert size(small, "a") == size(model, "a") * 5 // 8
    assert size(small, "c") == size(model, "c") * 5 // 8
    for seed in range(3):
        before, after = run(model, seed), run(small, seed)
        assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()


@pytest.mark.parametrize("name", NETS)
def test_channels_nobody_reads_go(name):
    model = net(name)
    for tensor in model.graph.initializer:
        if tensor.name in {"c", "e"}:
            array = numpy_helper.to_array(tensor).copy()
            axis = 0 if tensor.name == "e" or name in {"matmul", "gemm without a bias"} else 1
            np.moveaxis(array, axis, 0)[[0, 7]] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    result = onnxprune.prune(model, DENSE, compact=True)
    assert [(g.size, g.kept) for g in result.report.groups] == [(8, 6)]
    assert run(result.to_proto(), 0) == pytest.approx(run(model, 0), rel=1e-5, abs=1e-6)


def test_nothing_dead_nothing_changed():
    model = net("gemm")
    result = onnxprune.prune(model, DENSE, compact=True)
    assert [(g.size, g.kept) for g in result.report.groups] == [(8, 8)]
    assert np.array_equal(run(model, 0), run(result.to_proto(), 0))


def test_a_constant_at_a_padded_edge_is_no_constant():
    """Sigmoid(0) = 0.5 inside and 0 in the padding: no bias does the same, so the channel stays; Relu(-1) = 0 goes."""
    text = "g (float[1,3,9,9] x) => (float[1,4,9,9] y) {h = Conv(x, a, b) a1 = %s(h) y = Conv<pads=[2,2,2,2]>(a1, c)}"
    for activation, kept in (("Sigmoid", 8), ("Relu", 7)):
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text % activation}')
        rng = np.random.default_rng(0)
        arrays = {"a": rng.standard_normal((8, 3, 3, 3)), "b": -np.ones(8), "c": rng.standard_normal((4, 8, 3, 3))}
        arrays["a"][2] = 0
        model.graph.initializer.extend(numpy_helper.from_array(a.astype(np.float32), k) for k, a in arrays.items())
        result = onnxprune.prune(model, DENSE, compact=True)
        assert [(g.size, g.kept) for g in result.report.groups] == [(8, kept)]


def test_all_dead_leaves_one():
    result = onnxprune.prune(net("gemm", dead=tuple(range(8))), DENSE, compact=True)
    assert [(g.size, g.kept) for g in result.report.groups] == [(8, 1)]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("align", [1, 4])
def test_groups_of_outputs_lose_equally_many(seed, align):
    """Some dead channels stay, no live one goes, and no more stay than that takes."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(24).reshape(3, 8)
    places = rng.permutation(24)  # channel -> output
    gone = rng.random(24) < rng.random()
    before = gone.copy()
    compact._even(gone, places, groups, align)
    live = [int(np.isin(places, members)[~gone].sum()) for members in groups]
    assert not (gone & ~before).any()
    most = max(int(np.isin(places, members)[~before].sum()) for members in groups)
    assert live == [min(-(-most // align) * align, 8)] * 3


def test_counts_can_be_kept_aligned():
    result = onnxprune.prune(net("gemm", dead=(0, 1, 2)), DENSE, compact=True, align=4)
    assert [(g.size, g.kept) for g in result.report.groups] == [(8, 8)]
    result = onnxprune.prune(net("gemm", dead=(0, 1, 2)), DENSE, compact=True, align=2)
    assert [(g.size, g.kept) for g in result.report.groups] == [(8, 6)]


def test_unstructured_pruning_and_what_it_made_dead(tmp_path):
    """Small rows go first: pruning at 50 % kills those that are a hundred times smaller."""
    model = net("gemm", "Relu")
    for tensor in model.graph.initializer:
        if tensor.name == "a":
            array = numpy_helper.to_array(tensor).copy()
            array[:4] /= 100
            tensor.CopyFrom(numpy_helper.from_array(array, "a"))
    plain = onnxprune.prune(model, [{"sparsity": 0.5, "op_names": ["a"]}])
    small = onnxprune.prune(model, [{"sparsity": 0.5, "op_names": ["a"]}], compact=True)
    assert small.masks == plain.masks
    assert [(g.size, g.kept) for g in small.report.groups] == [(8, 4)]
    assert run(small.to_proto(), 0) == pytest.approx(run(plain.to_proto(), 0), rel=1e-5, abs=1e-6)
    onnx.save(model, tmp_path / "m.onnx")
    arguments = [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "s.onnx"), "--compact", "--no-benchmark", "--json"]
    done = subprocess.run([sys.executable, "-m", "onnxprune", "prune", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [g["kept"] for g in json.loads(done.stdout)["report"]["groups"]] == [8]


def test_a_wrong_constant_is_refused(monkeypatch):
    real = compact._constants
    monkeypatch.setattr(compact, "_constants", lambda *given: {k: v + 0.1 for k, v in real(*given).items()})
    with pytest.raises(PruneError, match="without its dead channels"):
        onnxprune.prune(net("gemm", dead=(1,)), DENSE, compact=True)


def test_a_constant_channel_that_is_not_read_leaves_a_depthwise_convolution():
    """It is constant where the depthwise convolution reads it, which could not take it into its bias, and need not."""
    text = (
        "g (float[N,3,9,9] x) => (float[N,4,9,9] y) {h = Conv(x, a, b) r = Relu(h) "
        "d = Conv<group=8, pads=[1,1,1,1]>(r, e) y = Conv(d, c)}"
    )
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s) for n, s in [("a", (8, 3, 1, 1)), ("e", (8, 1, 3, 3)), ("c", (4, 8, 1, 1))]}
    arrays["b"] = np.full(8, 2.0)
    arrays["a"][[1, 5]] = arrays["c"][:, [1, 5]] = 0
    for name, array in arrays.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    small = onnxprune.prune(model, DENSE, compact=True).to_proto()
    assert [size(small, name) for name in "aec"] == [18, 54, 24]
    np.testing.assert_allclose(run(model, 0), run(small, 0), rtol=1e-5, atol=1e-5)
