"""prune() as a whole: report, evaluation, gate, output."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper

from onnxprune import PruneError, SensitivityPruner, evaluate, prune

MODELS = Path(__file__).parents[1] / "models"
LENET, DATA = MODELS / "lenet5.onnx", MODELS / "mnist-test.npz"
LEVEL = [{"sparsity": 0.7, "op_types": "default"}]


def stored(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def test_the_four_front_doors_are_one(tmp_path):
    proto = onnx.load(LENET)
    results = [
        prune(LENET, LEVEL),
        prune(str(LENET), LEVEL),
        prune(proto, LEVEL),
        prune(onnx_ir.load(LENET), LEVEL),
    ]
    weights = [stored(r.to_proto()) for r in results]
    for result, other in zip(results[1:], weights[1:], strict=True):
        assert result.masks == results[0].masks
        assert all(np.array_equal(other[name], weights[0][name]) for name in weights[0])


def test_the_report_counts_what_is_there():
    result = prune(LENET, LEVEL)
    weights = stored(result.to_proto())
    assert [row.name for row in result.report.rows] == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    for row in result.report.rows:
        assert row.zeros == np.count_nonzero(weights[row.name] == 0) == int(row.size * 0.7)
        assert row.shape == weights[row.name].shape
        assert row.sparsity == row.zeros / row.size
    assert result.sparsity == result.report.zeros / result.report.size == 301350 / 430500
    assert json.loads(json.dumps(result.report.to_dict()))["sparsity"] == result.sparsity


def test_zeros_that_were_there_are_counted_once():
    half = prune(LENET, [{"sparsity": 0.5}])
    again = prune(half.to_proto(), [{"sparsity": 0.3}, {"sparsity": 0.8, "op_names": ["fc1"]}])
    rows = {row.name: row for row in again.report.rows}
    assert rows["conv2.weight"].zeros == rows["conv2.weight"].zeros_before == 12500
    assert (rows["fc1.weight"].zeros_before, rows["fc1.weight"].zeros) == (200000, 320000)


def test_evaluation_is_evaluates(tmp_path):
    result = prune(LENET, LEVEL, tmp_path / "out.onnx", DATA)
    assert result.evaluation == evaluate(tmp_path / "out.onnx", DATA, baseline=LENET)
    assert result.path == tmp_path / "out.onnx"
    assert result.accepted


@pytest.mark.parametrize("labelled", [True, False])
def test_the_gate_writes_only_what_passes(tmp_path, labelled):
    with np.load(DATA) as arrays:
        data = {name: arrays[name][:300] for name in (arrays.files if labelled else ["image"])}
    probe = prune(LENET, [{"sparsity": 0.9}], data=data)
    assert probe.evaluation is not None
    assert probe.evaluation.agreement is not None
    lost = probe.evaluation.drop if labelled else 1 - probe.evaluation.agreement.top1
    assert lost > 0.05
    failed = prune(LENET, [{"sparsity": 0.9}], tmp_path / "out.onnx", data, max_drop=lost - 1e-6)
    assert (failed.accepted, failed.path) == (False, None)
    assert list(tmp_path.iterdir()) == []
    passed = prune(LENET, [{"sparsity": 0.9}], tmp_path / "out.onnx", data, max_drop=lost)
    assert (passed.accepted, passed.path) == (True, tmp_path / "out.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_a_failed_gate_leaves_the_old_file(tmp_path):
    target = tmp_path / "out.onnx"
    target.write_bytes(b"precious")
    assert not prune(LENET, [{"sparsity": 0.99}], target, DATA, max_drop=0.0).accepted
    assert target.read_bytes() == b"precious"


def test_data_given_as_a_generator_serve_everything():
    """Measuring sensitivity, the dense model and the pruned one all read the data; a generator is read once."""
    with np.load(DATA) as arrays:
        image, labels = arrays["image"][:64].astype(np.float32), arrays["labels"][:64]
    entries = [{"sparsity": 0.8, "op_names": ["fc2", "conv2"]}]
    batches = (({"image": image[i : i + 16]}, labels[i : i + 16]) for i in range(0, 64, 16))
    once = prune(LENET, SensitivityPruner(entries), data=batches)
    whole = prune(LENET, SensitivityPruner(entries), data={"image": image, "labels": labels})
    assert once.masks == whole.masks
    assert once.evaluation is not None
    assert whole.evaluation is not None
    assert once.evaluation.score == whole.evaluation.score


def test_a_metric_of_ones_own_gates(tmp_path):
    def mean(outputs, labels):
        return float(np.mean(outputs[0]))

    result = prune(LENET, LEVEL, data=DATA, metric=mean)
    assert result.evaluation is not None
    assert result.evaluation.metric == "mean"


def test_what_was_done_is_on_record():
    proto = prune(
        prune(LENET, LEVEL).to_proto(), {"pruner": "agp", "config_list": [{"sparsity": 0.9}]}, epoch=3
    ).to_proto()
    records = [json.loads(p.value) for p in proto.metadata_props if p.key == "onnxprune"]
    assert len(records) == 1
    assert records[0]["pruner"] == "agp"
    assert records[0]["epoch"] == 3
    assert records[0]["config_list"] == [{"sparsity": 0.9}]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_drop": 0.01}, "max_drop needs data"),
        ({"max_drop": float("nan"), "data": DATA}, "max_drop is nan"),
        ({"pruner": "agp", "config": SensitivityPruner([{"sparsity": 0.5}])}, "belong to the pruner object"),
    ],
)
def test_options_that_make_no_sense(options, words):
    with pytest.raises(PruneError, match=words):
        prune(LENET, **{"config": LEVEL, **options})


def test_a_framework_model_is_pointed_to_the_bridges():
    with pytest.raises(PruneError, match=r"not object; torch and Keras models go through onnxprune.converters"):
        prune(object(), LEVEL)
