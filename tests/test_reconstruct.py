"""Reconstruction: least squares held against numpy's, and what it promises held against onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from nets import parse
from onnx import numpy_helper

import onnxprune
from onnxprune import layerwise
from onnxprune.algorithms import reconstruct
from onnxprune.algorithms.reconstruct import Moments, choose_ridge, error, refit
from onnxprune.graph import companions
from onnxprune.graph.model import load
from onnxprune.runtime.stream import Stream


def sums(x: np.ndarray, d: np.ndarray | None = None) -> Moments:
    """Of rows (groups, rows, inputs)."""
    d = x if d is None else d
    return Moments(x.shape[1], x.sum(1), d.sum(1), x.swapaxes(1, 2) @ x, x.swapaxes(1, 2) @ d)


def case(seed: int, groups: int = 2, outputs: int = 7, inputs: int = 12, rows: int = 60):
    """Dense weights, which survive, the rows a layer reads now, and those it read before."""
    rng = np.random.default_rng(seed)
    d = rng.normal(size=(groups, rows, inputs)) @ (np.eye(inputs) + 0.3 * rng.normal(size=(inputs, inputs)))
    x = d + 0.3 * rng.normal(size=d.shape)
    return rng.normal(size=(groups, outputs, inputs)), rng.random((groups, outputs, inputs)) < 0.5, x, d


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("alike", [False, True])
def test_it_is_ridge_regression(seed, alike):
    """Row by row, numpy's least squares with the ridge as further equations."""
    dense, keep, x, d = case(seed)
    if alike:
        keep[:] = keep[:, :1]
    ridge, start = 0.03, dense * 0.9
    found = refit(dense, start, keep, sums(x, d), ridge)
    for group in range(len(dense)):
        strength = np.sqrt(ridge * np.square(x[group]).sum() / x.shape[2])
        for row in range(dense.shape[1]):
            kept = keep[group, row]
            left = np.concatenate([x[group][:, kept], strength * np.eye(kept.sum())])
            right = np.concatenate([d[group] @ dense[group, row], strength * start[group, row, kept]])
            np.testing.assert_allclose(found[group, row, kept], np.linalg.lstsq(left, right)[0], rtol=1e-8)
            assert not found[group, row, ~kept].any()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ridge", [0.0, *reconstruct.RIDGES])
@pytest.mark.parametrize("rows", [5, 60])
def test_the_error_never_grows(seed, ridge, rows):
    dense, keep, x, d = case(seed, rows=rows)
    start = np.where(keep, dense, 0.0)
    total = sums(x, d)
    if ridge == 0 and rows < 12:
        return  # nothing to solve
    before, after = error(dense, start, total), error(dense, refit(dense, start, keep, total, ridge), total)
    assert after <= before + 1e-9 * abs(before)
    measured = np.square(x @ start.swapaxes(1, 2) - d @ dense.swapaxes(1, 2)).sum()
    constant = np.square(d @ dense.swapaxes(1, 2)).sum()
    assert before + constant == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_it_is_exact_where_the_survivors_span_the_output(seed):
    """Every input that went is a mixture of those that stay."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(1, 80, 5))
    x = np.concatenate([base, base @ rng.normal(size=(5, 4))], 2)
    dense, keep = rng.normal(size=(1, 6, 9)), np.zeros((1, 6, 9), np.bool_)
    keep[:, :, :5] = True
    halves = sums(x[:, :40]), sums(x[:, 40:])
    ridge = choose_ridge(dense, np.where(keep, dense, 0), keep, halves)
    found = refit(dense, np.where(keep, dense, 0), keep, sums(x), ridge)
    assert ridge == min(reconstruct.RIDGES)
    np.testing.assert_allclose(x[0] @ found[0].T, x[0] @ dense[0].T, atol=1e-5)


def test_the_strength_is_the_one_that_generalises():
    """With fewer rows than inputs the least ridge fits noise."""
    rng = np.random.default_rng(0)
    dense, keep = rng.normal(size=(1, 8, 40)), rng.random((1, 8, 40)) < 0.7
    x = rng.normal(size=(1, 60, 40))
    halves = sums(x[:, :30]), sums(x[:, 30:])
    chosen = choose_ridge(dense, np.where(keep, dense, 0), keep, halves)
    assert chosen > 1e-4
    nothing = Moments(0, *(np.zeros_like(a) for a in (halves[0].x, halves[0].d, halves[0].xx, halves[0].xd)))
    assert choose_ridge(dense, dense, keep, (nothing, halves[1])) == reconstruct.RIDGE


def test_without_a_signal_weights_stay():
    dense, keep, x, _ = case(0)
    np.testing.assert_array_equal(refit(dense, dense, keep, sums(x * 0), 0.1), np.where(keep, dense, 0))
    silent = x * np.array([0.0, 1.0]).reshape(2, 1, 1)  # one group reads nothing, the other one what it did
    found = refit(dense, dense, keep, sums(silent), 0.1)
    np.testing.assert_array_equal(found[0], np.where(keep, dense, 0)[0])
    np.testing.assert_array_equal(found[1], refit(dense, dense, keep, sums(x), 0.1)[1])
    assert not np.array_equal(found[1], np.where(keep, dense, 0)[1])


# ------------------------------------------------------------------------------------------------ through the door


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def computed(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(proto.SerializeToString()).run(None, feeds)[0]


def stored(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def pruned(proto: onnx.ModelProto, data: object, entries: object = 0.5, **options: object) -> onnxprune.Result:
    entries = [{"sparsity": entries}] if isinstance(entries, float) else entries
    config = {"reconstruct": True, "config_list": entries}
    config |= {key: options.pop(key) for key in ("score", "pruner", "pattern") if key in options}
    return onnxprune.prune(proto, config, calibration=data, threads=1, **options)


FLAT, IMAGE = "(float[N,10] x) => (float[A,B] y)", "(float[N,4,7,7] x) => (float[A,B,C,D] y)"
LAYERS = {  # graph, shape of the weight, of the input, and whether there is a bias
    "MatMul": (f"{FLAT} {{ y = MatMul(x, w) }}", (10, 6), (90, 10), False),
    "MatMul, Add": (f"{FLAT} {{ a = MatMul(x, w) y = Add(b, a) }}", (10, 6), (90, 10), True),
    "Gemm": (f"{FLAT} {{ y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b) }}", (6, 10), (90, 10), True),
    "Conv": (f"{IMAGE} {{ y = Conv<kernel_shape=[3,3], group=2>(x, w, b) }}", (6, 2, 3, 3), (9, 4, 7, 7), True),
    "ConvTranspose": (
        f"{IMAGE} {{ y = ConvTranspose<kernel_shape=[3,3], strides=[2,2]>(x, w, b) }}",
        (4, 6, 3, 3),
        (9, 4, 7, 7),
        True,
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", [{}, {"score": "wanda"}, {"pruner": "sparsegpt"}, {"pattern": "1:2"}])
def test_a_layer_comes_closer_and_keeps_its_zeros(name, how):
    text, shape, given, biased = LAYERS[name]
    rng = np.random.default_rng(3)
    mix = np.eye(given[1]) + 0.5 * rng.normal(size=(given[1], given[1]))
    x = np.moveaxis(np.moveaxis(normal(rng, *given), 1, -1) @ mix + 0.5, -1, 1).astype(np.float32)
    arrays = {"w": normal(rng, *shape)} | ({"b": normal(rng, 6)} if biased else {})
    proto = parse(text, **arrays)
    dense = computed(proto, {"x": x})
    without = onnxprune.prune(proto, {**how, "config_list": [{"sparsity": 0.5}]}, calibration={"x": x}, threads=1)
    result = pruned(proto, {"x": x}, **how)
    assert result.masks == without.masks
    found = stored(result.to_proto())["w"]
    assert not found[~result.masks["w"]].any()
    assert np.count_nonzero(found) == np.count_nonzero(result.masks["w"])
    before, after = (computed(r.to_proto(), {"x": x}) - dense for r in (without, result))
    assert np.square(after).sum() < np.square(before).sum()
    if biased:  # the means are those of the dense layer
        axes = tuple(a for a in range(dense.ndim) if a != 1)
        assert np.abs(after.mean(axes)).max() < 1e-5 < np.abs(before.mean(axes)).max()


TWINS = """(float[N,3,8,8] x) => (float[A,B,C,D] y) {{
    a = Conv<kernel_shape=[3,3]>(x, first, bias)
    {norm}
    c = Relu(b)
    y = Conv<kernel_shape=[3,3]>(c, second, last)
}}"""


@pytest.mark.parametrize("norm", ["b = Identity(a)", "b = BatchNormalization(a, scale, shift, mean, variance)"])
@pytest.mark.parametrize("keep_shape", [False, True])
def test_channels_that_have_a_twin_can_go_without_a_trace(norm, keep_shape):
    """Half of the channels are smaller copies of others: the consumer is refitted to read the larger ones alone."""
    rng = np.random.default_rng(5)
    half, shift = normal(rng, 8, 3, 3, 3), normal(rng, 8)
    arrays = {
        "first": np.concatenate([half, half / 4]), "bias": np.concatenate([shift, shift / 4]),
        "second": normal(rng, 5, 16, 3, 3), "last": normal(rng, 5),
    }  # fmt: skip
    if "Batch" in norm:
        mean, one = normal(rng, 8), np.ones(16, np.float32)
        arrays |= {"mean": np.concatenate([mean, mean / 4]), "variance": one, "scale": one, "shift": one * 0}
    proto = parse(TWINS.format(norm=norm), **arrays)
    x = normal(rng, 40, 3, 8, 8)
    entries = [{"sparsity": 0.5, "pattern": "channel", "op_names": ["first"]}]
    result = pruned(proto, {"x": x}, entries, align=1, keep_shape=keep_shape)
    np.testing.assert_array_equal(result.masks["first"].reshape(16, -1).all(1), np.arange(16) < 8)
    fresh = normal(rng, 10, 3, 8, 8)
    expected = computed(proto, {"x": fresh})
    plain = onnxprune.prune(proto, entries, align=1)
    scale = np.abs(expected).max()
    assert np.abs(computed(plain.to_proto(), {"x": fresh}) - expected).max() > 0.02 * scale
    assert np.abs(computed(result.to_proto(), {"x": fresh}) - expected).max() < 2e-4 * scale
    if not keep_shape:
        assert stored(result.to_proto())["second"].shape == (5, 8, 3, 3)


def test_a_norms_statistics_follow_its_input():
    rng = np.random.default_rng(7)
    text = """(float[N,4,8,8] x) => (float[A,B,C,D] y) {
        a = Conv<kernel_shape=[3,3]>(x, w)
        y = BatchNormalization(a, scale, shift, mean, variance)
    }"""
    arrays = {"w": normal(rng, 6, 4, 3, 3), "scale": normal(rng, 6) + 2, "shift": normal(rng, 6)}
    arrays |= {"mean": normal(rng, 6), "variance": np.abs(normal(rng, 6)) + 30}
    x = normal(rng, 60, 4, 8, 8) + 1
    proto = parse(text, **arrays)
    result = pruned(proto, {"x": x}, 0.7).to_proto()
    dense, after = computed(proto, {"x": x}), computed(result, {"x": x})
    axes = (0, 2, 3)
    np.testing.assert_allclose(after.mean(axes), dense.mean(axes), atol=1e-4)
    np.testing.assert_allclose(after.std(axes), dense.std(axes), rtol=1e-4)
    for name in ("scale", "shift"):
        np.testing.assert_array_equal(stored(result)[name], arrays[name])


DEEP = """(float[N,8] x) => (float[A,B] y) {
    a = Gemm(x, first, bias)
    b = Relu(a)
    c = MatMul(b, second)
    d = MatMul(b, third)
    e = Mul(c, d)
    y = Gemm<transB=1>(e, last, end)
}"""


def deep(rng: np.random.Generator) -> onnx.ModelProto:
    shapes = {"first": (8, 12), "bias": (12,), "second": (12, 10), "third": (12, 10), "last": (4, 10), "end": (4,)}
    return parse(DEEP, **{name: normal(rng, *shape) for name, shape in shapes.items()})


@pytest.mark.parametrize("pruner", ["level", "sparsegpt"])
def test_going_on_from_the_middle_is_going_from_the_start(monkeypatch, pruner):
    """Whether values inside the graph were kept or computed again does not matter."""
    rng = np.random.default_rng(1)
    proto, x = deep(rng), normal(rng, 80, 8)
    found = stored(pruned(proto, {"x": x}, pruner=pruner).to_proto())
    monkeypatch.setattr(layerwise.Calibration, "stream", lambda self, model: Stream(model, self.feeds, 0, self.threads))
    again = stored(pruned(proto, {"x": x}, pruner=pruner).to_proto())
    for name, array in found.items():
        np.testing.assert_allclose(again[name], array, rtol=1e-4, atol=1e-5)


def test_each_layer_is_fitted_to_what_the_pruned_ones_before_it_give(monkeypatch):
    """The last layer of three: numpy's least squares on the inputs that it has in the pruned model."""
    monkeypatch.setattr(reconstruct, "RIDGES", (1e-12,))
    rng = np.random.default_rng(2)
    proto, x = deep(rng), normal(rng, 200, 8)
    result = pruned(proto, {"x": x})
    after, before = stored(result.to_proto()), stored(proto)

    def inside(w: dict[str, np.ndarray]) -> np.ndarray:
        b = np.maximum(x @ w["first"] + w["bias"], 0)
        return (b @ w["second"]) * (b @ w["third"])

    wanted = inside(before) @ before["last"].T + before["end"]
    now = inside(after)
    for row in range(4):
        kept = result.masks["last"][row]
        best = np.linalg.lstsq(np.c_[now[:, kept], np.ones(200)], wanted[:, row])[0]
        least = np.square(np.c_[now[:, kept], np.ones(200)] @ best - wanted[:, row]).sum()
        found = np.square(now @ after["last"][row] + after["end"][row] - wanted[:, row]).sum()
        assert least <= found * (1 + 1e-5)
        assert found < 1.0001 * least


def test_a_recurrent_layer_is_refitted():
    rng = np.random.default_rng(4)
    text = "(float[6,N,5] x) => (float[A,B,C,D] y) { y = LSTM<hidden_size=4>(x, w, r, b) }"
    arrays = {"w": normal(rng, 1, 16, 5), "r": normal(rng, 1, 16, 4), "b": normal(rng, 1, 32)}
    proto, x = parse(text, **arrays), normal(rng, 6, 50, 2) @ normal(rng, 2, 5) + 0.2 * normal(rng, 6, 50, 5)
    data = [{"x": x[:, :25]}, {"x": x[:, 25:]}]
    result = pruned(proto, data, [{"sparsity": 0.4}])
    after = stored(result.to_proto())
    assert [row.name for row in result.report.rows] == ["w", "r"]
    for name in ("w", "r"):
        assert not after[name][~result.masks[name]].any()
        assert (after[name] != arrays[name])[result.masks[name]].mean() > 0.9
    plain = onnxprune.prune(proto, [{"sparsity": 0.4}]).to_proto()
    dense = computed(proto, {"x": x})
    assert (
        np.square(computed(result.to_proto(), {"x": x}) - dense).sum()
        < np.square(computed(plain, {"x": x}) - dense).sum()
    )


def test_a_weight_of_two_operators_is_fitted_to_both():
    rng = np.random.default_rng(4)
    text = "(float[N,8] x, float[N,8] z) => (float[A,B] y) { a = MatMul(x, w) b = MatMul(z, w) y = Add(a, b) }"
    proto = parse(text, w=normal(rng, 8, 5))
    x, z = normal(rng, 60, 8) @ normal(rng, 8, 8), normal(rng, 60, 8)
    result = pruned(proto, {"x": x, "z": z})
    one = pruned(parse("(float[N,8] x) => (float[A,B] y) { y = MatMul(x, w) }", w=stored(proto)["w"]),
                 [{"x": np.concatenate([x[:30], z[:30]])}, {"x": np.concatenate([x[30:], z[30:]])}])  # fmt: skip
    np.testing.assert_allclose(stored(result.to_proto())["w"], stored(one.to_proto())["w"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layer", [1, 3])
def test_an_interrupted_run_leaves_everything_as_it_was(tmp_path, monkeypatch, layer):
    rng = np.random.default_rng(6)
    proto, x = deep(rng), normal(rng, 60, 8)
    onnx.save(proto, tmp_path / "model.onnx")
    (tmp_path / "out.onnx").write_bytes(b"of an earlier run")
    before = (tmp_path / "model.onnx").read_bytes()
    calls = []

    def interrupted(*given: object) -> np.ndarray:
        calls.append(given)
        if len(calls) > 15 * layer:  # 7 strengths on two halves, and the fit
            raise KeyboardInterrupt
        return refit(*given)

    monkeypatch.setattr(layerwise.least_squares, "refit", interrupted)
    config = {"reconstruct": True, "config_list": [{"sparsity": 0.5}]}
    with pytest.raises(KeyboardInterrupt):
        onnxprune.prune(tmp_path / "model.onnx", config, tmp_path / "out.onnx", calibration={"x": x}, threads=1)
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert (tmp_path / "out.onnx").read_bytes() == b"of an earlier run"
    assert len(list(tmp_path.iterdir())) == 2


def test_external_data_and_constants_are_refitted_too(tmp_path):
    rng = np.random.default_rng(6)
    proto, x = deep(rng), normal(rng, 60, 8)
    expected = stored(pruned(proto, {"x": x}).to_proto())
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0, location="data")
    result = onnxprune.prune(
        tmp_path / "in.onnx", {"reconstruct": True, "config_list": [{"sparsity": 0.5}]}, tmp_path / "out.onnx",
        calibration={"x": x}, threads=1,
    )  # fmt: skip
    assert result.path is not None
    for name, array in stored(onnx.load(tmp_path / "out.onnx")).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-4, atol=1e-5)
    assert stored(onnx.load(tmp_path / "in.onnx"))["first"].all()


def test_weights_in_functions_are_refitted():
    rng = np.random.default_rng(8)
    text = """(float[N,6] x) => (float[A,B] y) { a = own.f(x, w) y = own.f(a, v) }
    <domain: "own", opset_import: ["": 21]> f (x, m) => (y) { a = MatMul(x, m) y = Relu(a) }"""
    flat = "(float[N,6] x) => (float[A,B] y) { a = MatMul(x, w) b = Relu(a) c = MatMul(b, v) y = Relu(c) }"
    arrays, x = {"w": normal(rng, 6, 5), "v": normal(rng, 5, 4)}, normal(rng, 40, 6)
    found, expected = (stored(pruned(parse(t, **arrays), {"x": x}).to_proto()) for t in (text, flat))
    for name in arrays:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_what_cannot_change_is_said():
    rng = np.random.default_rng(9)
    text = """(int64[N,3] t) => (float[A,B,C] y) { e = Gather(table, t) u = Transpose<perm=[1,0]>(table)
        y = MatMul(e, u) }"""
    proto = parse(text, table=normal(rng, 12, 6))
    tokens = rng.integers(0, 12, (30, 3))
    result = pruned(proto, {"t": tokens})
    assert result.report.notes == ("'table' is not refitted: it is an embedding too, whose rows are not to change",)
    expected = np.where(result.masks["table"], stored(proto)["table"], 0)
    np.testing.assert_array_equal(stored(result.to_proto())["table"], expected)


def test_few_data_and_idle_layers_are_said_and_it_goes_on():
    rng = np.random.default_rng(9)
    text = "(float[N,20] x) => (float[A,B] y) { y = MatMul(x, w) z = MatMul(x, idle) }"
    proto = parse(text, w=normal(rng, 20, 4), idle=normal(rng, 20, 4))
    for options in ({}, {"pruner": "sparsegpt"}):
        result = pruned(proto, {"x": normal(rng, 6, 20)}, **options)
        idle, few = result.report.notes
        assert idle == "the model's outputs do not depend on weight 'idle': pruning it changes nothing"
        assert few.startswith("the calibration data are few: 2 weights have more inputs than rows")
        assert "20 inputs, 6 rows" in few
        assert np.isfinite(stored(result.to_proto())["w"]).all()
    assert result.report.to_dict()["notes"] == list(result.report.notes)


def test_gram_matrices_that_do_not_fit_into_memory_are_an_error(tmp_path):
    rng = np.random.default_rng(0)
    proto = parse("(float[N,300] x) => (float[A,B] y) { y = MatMul(x, wide) }", wide=normal(rng, 300, 2))
    with pytest.raises(
        onnxprune.PruneError, match=r"'wide' \(300 inputs\) take 4 MB, and max_memory is 2 MB; allow more"
    ):
        pruned(proto, {"x": normal(rng, 4, 300)}, max_memory="2MB", output=tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_what_runs_in_a_branch_is_pruned_and_not_refitted():
    rng = np.random.default_rng(0)
    text = """(float[N,6] x, bool c) => (float[A,B] y) {
        y = If(c) <then_branch = g () => (float[P,Q] t) { t = MatMul(x, v) },
                   else_branch = g () => (float[P,Q] t) { t = Identity(x) }>
    }"""
    proto = parse(text, v=normal(rng, 6, 6))
    result = pruned(proto, [{"x": normal(rng, 4, 6), "c": np.array(True)}])
    assert result.report.notes == (
        "'v' is not refitted: it is used inside a loop or a branch, whose values are not handed out",
    )
    np.testing.assert_array_equal(
        stored(result.to_proto())["v"], np.where(result.masks["v"], stored(proto)["v"], np.float32(0))
    )


def test_a_bridge_has_no_graph_to_reconstruct_in():
    from onnxprune.algorithms.pruner import decide
    from onnxprune.config import load
    from onnxprune.graph.model import load as load_model
    from onnxprune.graph.weights import find

    weights = find(load_model(deep(np.random.default_rng(0))))[0]
    with pytest.raises(onnxprune.PruneError, match="prune the exported file"):
        decide(load({"reconstruct": True, "config_list": [{"sparsity": 0.5}]}), weights)


@pytest.mark.parametrize("seed", ["zeros", "order", "bias"])
def test_seeded_bugs_are_caught(monkeypatch, seed):
    if seed == "zeros":  # what was pruned comes back
        monkeypatch.setattr(layerwise.least_squares, "refit", lambda dense, *rest: dense)
        check = lambda: test_a_layer_comes_closer_and_keeps_its_zeros("MatMul", {})  # noqa: E731
    elif seed == "order":  # every layer is fitted to the inputs it had in the dense model
        monkeypatch.setattr(layerwise, "moments", lambda la, now, dense, *rest: MOMENTS(la, dense or now, dense, *rest))
        check = lambda: test_each_layer_is_fitted_to_what_the_pruned_ones_before_it_give(monkeypatch)  # noqa: E731
    else:
        monkeypatch.setattr(layerwise, "bias", lambda *_: None)
        check = lambda: test_a_layer_comes_closer_and_keeps_its_zeros("Gemm", {})  # noqa: E731
    with pytest.raises((AssertionError, ValueError)):
        check()


MOMENTS = layerwise.moments


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("also", ["", ", float[2,3] m"])
def test_a_product_that_is_given_out_has_no_bias_of_its_own(also, constant):
    made, stored = (
        ("c = Constant<value = float[3] {1, 2, 3}>()", {}) if constant else ("", {"c": np.ones(3, np.float32)})
    )
    text = f"(float[2,4] x) => (float[2,3] y{also}) {{ {made} m = MatMul(x, w) y = Add(m, c) }}"
    model = parse(text, w=np.ones((4, 3), np.float32), **stored)
    tensors, product = companions.stored(load(model)), next(n for n in model.graph.node if n.op_type == "MatMul")
    found = companions.bias(product, 1, 3, tensors, companions.readers(model.graph))
    assert found == (None if also else companions.Bias("c", 1.0))
