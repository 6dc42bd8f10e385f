"""Accuracy and agreement where every label and output is known by construction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from onnxprune.errors import PruneError
from onnxprune.runtime import evaluate as module
from onnxprune.runtime.evaluate import evaluate
from onnxprune.runtime.session import available_cpus, open_session


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')


def linear(*, batch: int | str = "N", weight: str = "1,0,0, 0,1,0, 0,0,1") -> onnx.ModelProto:
    """y = x W with 3 features and 3 classes: one-hot rows are their own class."""
    return parse(
        f"g (float[{batch}, 3] x) => (float[{batch}, 3] y) <float[3, 3] w = {{{weight}}}> {{ y = MatMul(x, w) }}"
    )


def identity(kind: str = "float[?]", op: str = "Identity") -> onnx.ModelProto:
    """The output is the input: a test writes the outputs it wants as data."""
    return parse(f"g ({kind} x) => ({kind} y) {{ y = {op}(x) }}")


def one_hot(classes: list[int], count: int = 3) -> np.ndarray:
    return np.eye(count, dtype=np.float32)[classes]


NO_CLASS_2 = "1,0,0, 0,1,0, 0.5,0,0"  # class 2's feature goes to class 0
CLASSES = [0, 1, 2, 2, 1, 0, 2, 2]
X = one_hot(CLASSES)
LABELS = np.array([0, 1, 2, 2, 1, 0, 2, 0])  # the last one is wrong on purpose


def test_accuracy_agreement_and_drop_are_literal() -> None:
    result = evaluate(linear(weight=NO_CLASS_2), {"x": X, "labels": LABELS}, linear())
    assert result.samples == 8
    assert result.metric == "top-1"
    assert result.score == 5 / 8
    assert result.baseline_score == 7 / 8
    assert result.drop == 2 / 8
    assert result.agreement is not None
    assert result.agreement.top1 == 4 / 8
    assert result.agreement.cosine == 4 / 8  # class 2's rows are orthogonal to what they were
    assert result.agreement.largest_difference == 1.0
    assert result.notes == ()


@pytest.mark.parametrize("batch", ["N", 1, 3, 8])
def test_a_fixed_batch_changes_nothing(batch: int | str) -> None:
    data = {"x": X, "labels": LABELS}
    assert evaluate(linear(batch=batch, weight=NO_CLASS_2), data, linear()) == evaluate(
        linear(weight=NO_CLASS_2), data, linear(batch=batch)
    )
    assert evaluate(linear(batch=batch), data).score == 7 / 8


def test_equal_models_agree_exactly() -> None:
    x = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    x[50] = 0  # a vector of zeros has no direction, and is still like itself
    result = evaluate(linear(weight="0.1,2,3, 4,-5,6, 7,8,9"), {"x": x}, linear(weight="0.1,2,3, 4,-5,6, 7,8,9"))
    assert result.agreement == module.Agreement(1.0, 1.0, 0.0, 0.0)
    assert result.metric is result.score is result.baseline_score is result.drop is None


def test_models_of_every_kind(tmp_path: Path) -> None:
    proto = linear()
    onnx.save(proto, tmp_path / "model.onnx")
    before = proto.SerializeToString()
    for model in (proto, ir.from_proto(proto), tmp_path / "model.onnx", str(tmp_path / "model.onnx")):
        assert evaluate(model, {"x": X, "labels": LABELS}).score == 7 / 8
    assert evaluate(open_session(proto), {"x": X, "labels": LABELS}, open_session(proto, threads=1)).drop == 0
    assert proto.SerializeToString() == before


def test_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    ir.save(ir.from_proto(linear()), path, external_data="weights", size_threshold_bytes=0)
    assert (tmp_path / "weights").stat().st_size == 36
    data = {"x": X, "labels": LABELS}
    assert evaluate(path, data).score == 7 / 8
    assert evaluate(ir.load(path), data).score == 7 / 8
    with pytest.raises(PruneError, match="a ModelProto has no folder"):
        evaluate(onnx.load(path, load_external_data=False), data)


def test_a_generator_serves_both_models() -> None:
    feeds = (({"x": X[i : i + 2]}, LABELS[i : i + 2]) for i in range(0, 8, 2))
    result = evaluate(linear(weight=NO_CLASS_2), feeds, linear())
    assert (result.samples, result.score, result.baseline_score) == (8, 5 / 8, 7 / 8)


def test_several_inputs_integers_and_dynamic_axes() -> None:
    model = parse(
        """g (int64[N, T] ids, bool[N] flip, string[N] name) => (float[N, 2] y, string[N] z)
        <float[4, 2] table = {1,0, 0,1, 3,0, 0,3}, int64[1] one = {1}>
        {
            rows = Gather(table, ids)
            sums = ReduceSum<keepdims = 0>(rows, one)
            mask = Unsqueeze(flip, one)
            negative = Neg(sums)
            y = Where(mask, negative, sums)
            z = Identity(name)
        }"""
    )
    data = {
        "ids": [[0, 0, 0], [1, 2, 2], [3, 0, 0], [1, 1, 2]],
        "flip": [False, False, True, False],
        "name": ["a", "b", "c", "d"],
        "labels": [0, 0, 0, 1],
    }
    result = evaluate(model, data, model)  # sums: (3,0) (6,1) -(2,3) (3,2)
    assert result.score == 3 / 4
    assert result.agreement == module.Agreement(1.0, 1.0, 0.0, 0.0)
    assert result.notes == ("output 'z' is not numeric: no cosine, no difference",)
    lengths = [({"ids": [[0] * n], "flip": [False], "name": ["a"]}, 0) for n in (1, 5, 9)]
    assert evaluate(model, lengths).score == 1


@pytest.mark.parametrize(
    ("kind", "outputs", "labels", "score"),
    [
        ("float[?, ?]", one_hot([0, 1, 2]), [0, 1, 1], 2 / 3),
        ("float[?, ?]", one_hot([0, 1, 2]), [[0], [1], [1]], 2 / 3),
        ("float[?, ?]", one_hot([0, 1, 2]), [0.0, 1.0, 1.0], 2 / 3),
        ("float[?, ?]", one_hot([0, 1, 2]), one_hot([0, 1, 1]), 2 / 3),
        ("float[?, ?, 1, 1]", one_hot([0, 1, 2])[:, :, None, None], [0, 1, 1], 2 / 3),
        ("float[?, 1, ?]", one_hot([0, 1, 2])[:, None], [0, 1, 1], 2 / 3),
        # one score per sample: probabilities, then logits
        ("float[?, 1]", [[0.2], [0.7], [0.6]], [0, 1, 0], 2 / 3),
        ("float[?]", [0.2, 0.7, 0.6], [False, True, False], 2 / 3),
        ("float[?]", [-0.2, 0.3, 0.4, 0.1], [0, 1, 1, 0], 3 / 4),
        # several predictions per sample: [N, T, C] and [N, C, H, W]
        ("float[?, ?, ?]", one_hot([0, 1, 2, 0]).reshape(2, 2, 3), [[0, 1], [2, 1]], 3 / 4),
        (
            "float[?, ?, ?, ?]",
            one_hot([0, 1, 2, 0]).reshape(1, 2, 2, 3).transpose(0, 3, 1, 2),
            [[[0, 1], [2, 1]]],
            3 / 4,
        ),
        ("float[?, ?, ?]", one_hot([0, 1, 2, 0]).reshape(2, 2, 3).transpose(0, 2, 1), [[0, 1], [2, 1]], 3 / 4),
        # as many positions as classes: the last axis of three
        ("float[?, ?, ?]", one_hot([0, 1, 1])[None], [[0, 1, 2]], 2 / 3),
        # the output is the prediction
        ("int64[?]", [7, 8, -1], [7, 8, 9], 2 / 3),
        ("int64[?]", [7, 8, -1], [7, 8, -1], 1),
        ("bool[?]", [True, False], [1, 1], 1 / 2),
        ("string[?]", ["cat", "dog"], ["cat", "cow"], 1 / 2),
        ("uint8[?, ?]", [[200, 100], [0, 1]], [0, 0], 1 / 2),
    ],
)
def test_top1_by_the_shape_of_output_and_labels(kind: str, outputs: Any, labels: Any, score: float) -> None:
    result = evaluate(identity(kind), {"x": outputs, "labels": labels}, identity(kind))
    assert result.score == result.baseline_score == score
    assert result.agreement is not None
    assert result.agreement.top1 == 1


def test_a_feed_may_be_one_sample_without_a_batch_axis() -> None:
    feeds = [({"x": row}, label) for row, label in zip(X, LABELS, strict=True)]
    result = evaluate(identity("float[3]"), feeds, identity("float[3]"))
    assert (result.samples, result.score) == (8, 7 / 8)
    assert result.agreement == module.Agreement(1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("kind", "outputs", "labels", "message"),
    [
        ("float[?, ?]", one_hot([0, 1]), [1, 3], "labels reach from 1 to 3, but output 'y' .* 3 classes, 0 to 2"),
        ("float[?, ?]", one_hot([0, 1]), [-100, 1], "labels reach from -100 to 1"),
        ("float[?, ?]", one_hot([0, 1]), [0.5, 1], "not class numbers, .* give a metric"),
        ("float[?, ?]", one_hot([0, 1]), ["a", "b"], "not class numbers"),
        (
            "float[?, ?]",
            one_hot([0, 1]),
            [[0, 1], [1, 0]],
            r"not defined for output 'y' float32\[2, 3\] and labels int64",
        ),
        ("float[?, ?]", one_hot([0, 1]), [[1, 1, 0], [1, 0, 0]], "top-1 is not defined"),
        ("float[?]", [0.1, 0.2], [0, 2], "has 2 classes, 0 to 1"),
        ("float[?]", [0.1, 3.5], [0.3, 3.1], "labels .float64. are not class numbers"),
        ("string[?]", ["a", "b"], [[0, 1], [1, 0]], "top-1 is not defined for output 'y' object"),
    ],
)
def test_top1_that_is_not_defined(kind: str, outputs: Any, labels: Any, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        evaluate(identity(kind), {"x": outputs, "labels": labels})


def test_agreement_without_classes_is_said() -> None:
    result = evaluate(identity("float[?]", "Neg"), {"x": [1.5, -2.5]}, identity())
    assert result.agreement == module.Agreement(None, -1.0, 5.0, 4.0)
    assert result.notes == ("no top-1 agreement: without labels, output 'y' may be a regression's",)
    result = evaluate(identity("float[?, ?, ?]"), {"x": np.ones((2, 3, 4))}, identity("float[?, ?, ?]"))
    assert result.notes == ("top-1 is taken over the 4 classes of output 'y' [2, 3, 4]",)


def test_a_metric_sees_all_outputs_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metric.py").write_text(
        "def total(outputs, labels):\n    [y] = outputs\n    return float(y[:, 0].sum()) + len(labels)\n"
    )
    monkeypatch.chdir(tmp_path)
    data = {"x": np.ones((100, 3)), "labels": np.zeros(100)}
    result = evaluate(linear(batch=3, weight="2,0,0, 0,0,0, 0,0,0"), data, linear(), metric="own_metric:total")
    assert (result.metric, result.score, result.baseline_score, result.drop) == ("own_metric:total", 300, 200, -100)

    def count(outputs: list[Any], labels: Any) -> int:
        assert labels is None
        return len(outputs[0])

    result = evaluate(linear(), [{"x": X}, {"x": X[:2]}], metric=count)
    assert (result.metric, result.score, result.agreement) == ("count", 10, None)


def test_a_metric_gets_lists_where_feeds_do_not_stack() -> None:
    def shapes(outputs: list[Any], labels: Any) -> float:
        assert [array.shape for array in outputs[0]] == [(1, 2), (1, 5)]
        np.testing.assert_array_equal(labels, [4, 5])
        return 0.5

    feeds = [({"x": np.ones((1, 2))}, 4), ({"x": np.ones((1, 5))}, 5)]
    assert evaluate(identity("float[?, ?]"), feeds, metric=shapes).score == 0.5


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda outputs, labels: 1 / 0, "the metric '<lambda>' raised ZeroDivisionError"),
        (lambda outputs, labels: math.nan, "gives nan on the model; it must give a finite number"),
        (lambda outputs, labels: None, "raised TypeError"),
        ("accuracy", "metric 'accuracy' is neither 'top-1' nor a callable nor 'module:function'"),
        ("no_such_module:f", "cannot load 'no_such_module:f'"),
    ],
)
def test_metrics_that_fail(metric: Any, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        evaluate(linear(), {"x": X, "labels": LABELS}, metric=metric)


NAN_FOR_CLASS_2 = parse(
    """g (float[N, 3] x) => (float[N, 3] y) <float[3] w = {1, 1, -1}>
    { z = Mul(x, w) r = Sqrt(z) y = Identity(r) }"""
)


def test_nan_counts_as_wrong_and_is_said() -> None:
    result = evaluate(NAN_FOR_CLASS_2, {"x": X, "labels": CLASSES}, linear())
    assert result.score == 4 / 8
    assert result.agreement is not None
    assert result.agreement.top1 == 4 / 8
    assert result.agreement.cosine == 4 / 8
    assert result.agreement.largest_difference == math.inf
    assert result.notes == ("output 'y' of the model is NaN for some samples: wrong, whatever it is compared to",)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["agreement"]["largest_difference"] is None


def test_nan_scores_are_wrong_for_either_class() -> None:
    model = identity("float[?]", "Sqrt")
    assert evaluate(model, {"x": [-1.0, -1.0, 0.04], "labels": [0, 1, 0]}).score == 1 / 3


def test_nan_in_the_baseline_is_refused() -> None:
    with pytest.raises(PruneError, match="the baseline computes NaN in output 'y'"):
        evaluate(linear(), {"x": X, "labels": CLASSES}, NAN_FOR_CLASS_2)


def test_an_output_of_another_shape_agrees_with_nothing() -> None:
    wider = parse(
        "g (float[N, 3] x) => (float[N, M] y) <float[3, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0}> { y = MatMul(x, w) }"
    )
    result = evaluate(wider, {"x": X, "labels": CLASSES}, linear())
    assert (result.score, result.baseline_score) == (0, 1)
    assert result.agreement == module.Agreement(0.0, 0.0, math.inf, 1.0)
    assert result.notes == ("output 'y' is [8, 4] where the baseline's is [8, 3]",)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_the_error_is_the_share_of_squares(batch: int) -> None:
    """A literal case: what is not finite counts as if it were 0; outputs count equally, whatever their scale."""
    pair = "g (float[N, 2] x, float[N, 1] z) => (float[N, 2] y, float[N, 1] u) { y = Identity(x) u = Identity(z) }"
    broken = pair.replace("y = Identity(x)", "y = Sqrt(x)").replace("Identity(z)", "Neg(z)")
    x, z = np.array([[1, 4], [9, 0], [-1, 16], [1, 1]]), np.full((4, 1), 1e6)
    feeds = [{"x": x[i : i + batch], "z": z[i : i + batch]} for i in range(0, 4, batch)]
    result = evaluate(parse(broken), feeds, parse(pair))
    lost, whole = np.array([4, 36, 1 + 256, 0]), np.array([17, 81, 257, 2])  # (1, 2) for (1, 4), (3, 0) for (9, 0), NaN
    assert result.agreement is not None
    assert result.agreement.error == pytest.approx((lost.sum() / whole.sum() + 4) / 2, rel=1e-6)


def test_empty_outputs_agree() -> None:
    nothing = parse(
        """g (float[N, 3] x) => (int64[2, M] y, float[N, K] z) <int64[1] from = {0}, int64[1] axis = {1}>
        { y = NonZero(x) z = Slice(x, from, from, axis) }"""
    )
    result = evaluate(nothing, {"x": np.zeros((2, 3))}, nothing)
    assert result.agreement == module.Agreement(None, 1.0, None, 0.0)
    assert "top-1 is not defined for output 'y' int64[2, 0] and no labels" in result.notes[0]


def test_outputs_are_weighed_by_their_samples() -> None:
    text = "g (float[N, 3] x) => (float[3, N] y) {{ a = {op}(x) y = Transpose(a) }}"
    feeds = [{"x": np.ones((2, 3))}, {"x": -np.ones((1, 3))}]
    result = evaluate(parse(text.format(op="Identity")), feeds, parse(text.format(op="Abs")))
    assert result.agreement is not None
    assert result.agreement.cosine == pytest.approx(1 / 3)


def test_declared_output_shapes_are_not_believed() -> None:
    lying = parse("g (float[N, 3] x) => (float[1, 9, N] y) { y = Identity(x) }")
    assert evaluate(lying, {"x": X, "labels": LABELS}).score == 7 / 8


@pytest.mark.parametrize(
    ("model", "data", "baseline", "message"),
    [
        (linear(), {"x": X}, None, "no 'labels' and no baseline is given; add labels, a baseline"),
        (linear(), {"x": X}, identity("float[N, 4]"), "take different inputs: 'x' .*3. and 'x' .*4.; compare a model"),
        (linear(batch=2), {"x": X}, linear(batch=3), "take different inputs"),
        (linear(), {"x": X}, identity("double[N, 3]"), "take different inputs"),
        (
            linear(),
            {"x": X},
            parse("g (float[N, 3] x) => (float[N, 3] y, float[N, 3] z) { y = Identity(x) z = Neg(x) }"),
            "has 1 outputs and the baseline 2",
        ),
        (
            parse("g (float[3, 3] x) => (float[] y) { y = ReduceSum<keepdims = 0>(x) }"),
            {"x": X},
            parse("g (float[3, 3] x) => (float[] y) { y = ReduceSum<keepdims = 0>(x) }"),
            r"last 2 samples do not fill .* batch of 3, .* output 'y', which is of shape \[\]; give a multiple of 3",
        ),
        (
            parse("g (float[N, 3] x) => (float[N, 3] y) <int64[2] s = {1, 3}> { y = Reshape(x, s) }"),
            {"x": X, "labels": LABELS},
            None,
            r"the model fails in onnxruntime on inputs 'x' float32\[8, 3\]: .*Reshape",
        ),
    ],
)
def test_bad_input(model: onnx.ModelProto, data: Any, baseline: onnx.ModelProto | None, message: str) -> None:
    with pytest.raises(PruneError, match=message):
        evaluate(model, data, baseline)


def test_top1_asked_for_without_labels() -> None:
    with pytest.raises(PruneError, match="top-1 needs labels: add an array 'labels'"):
        evaluate(linear(), {"x": X}, linear(), metric="top-1")


def test_models_that_do_not_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PruneError, match="no such file"):
        open_session(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model at all")
    with pytest.raises(PruneError, match=r"text\.onnx' is not an ONNX model"):
        open_session(tmp_path / "text.onnx")
    custom = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "own" : 1]> g (float[N] x) => (float[N] y) { y = own.Thing(x) }'
    )
    with pytest.raises(
        PruneError, match=r"onnxruntime [\d.]+ cannot load the model: .*own:Thing.* is not a registered"
    ):
        open_session(custom)
    with pytest.raises(PruneError, match=r"input 'x' is a tensor\(bfloat16\), which onnxruntime cannot be given"):
        open_session(identity("bfloat16[N]"))
    with pytest.raises(PruneError, match=r"a model is a path, an onnx\.ModelProto or an onnx_ir\.Model, not dict"):
        open_session({})  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="threads is 0"):
        open_session(linear(), threads=0)
    assert capfd.readouterr() == ("", "")


def test_sessions_state_their_threads_and_inputs() -> None:
    assert open_session(linear()).threads == available_cpus()
    old = parse(
        "g (float[N, 3] x, float[3, 3] w) => (float[N, 3] y) <float[3, 3] w = {1,0,0,0,1,0,0,0,1}> { y = MatMul(x, w) }"
    )
    assert [(value.name, value.required) for value in open_session(old).inputs] == [("x", True), ("w", False)]
    assert evaluate(old, {"x": X, "labels": LABELS}, old).score == 7 / 8


def test_the_bar_shows_only_when_slow_and_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    data = {"x": np.repeat(X, 5, axis=0), "labels": np.repeat(LABELS, 5)}
    evaluate(linear(batch=1), data)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(module, "PROGRESS_AFTER", 0.0)
    evaluate(linear(batch=1), data, progress=False)
    assert capsys.readouterr() == ("", "")
    evaluate(linear(batch=1), data)
    out, err = capsys.readouterr()
    assert out == ""
    assert "evaluating" in err
    assert "/40" in err


def test_the_bar_ends_with_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "PROGRESS_AFTER", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1")
    feeds = [({"x": X}, LABELS), ({"x": X}, LABELS), ({"x": X}, LABELS + 5)]
    with pytest.raises(PruneError, match="labels reach"):
        evaluate(linear(), feeds)
    assert "\x1b[?25h" in capsys.readouterr().err  # the cursor is back
