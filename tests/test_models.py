"""The shipped models and their test data are what they say, and the data sets are read as they are."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

MODELS = Path(__file__).parents[1] / "models"

PARAMETERS = {
    "lenet-300-100": {
        "fc1.weight": (300, 784),
        "fc1.bias": (300,),
        "fc2.weight": (100, 300),
        "fc2.bias": (100,),
        "fc3.weight": (10, 100),
        "fc3.bias": (10,),
    },
    "lenet5": {
        "conv1.weight": (20, 1, 5, 5),
        "conv1.bias": (20,),
        "conv2.weight": (50, 20, 5, 5),
        "conv2.bias": (50,),
        "fc1.weight": (500, 800),
        "fc1.bias": (500,),
        "fc2.weight": (10, 500),
        "fc2.bias": (10,),
    },
}
OPERATORS = {
    "lenet-300-100": ["Gemm", "Gemm", "Gemm"],
    "lenet5": ["Conv", "Conv", "Gemm", "Gemm"],
}
CORRECT = {"lenet-300-100": 975, "lenet5": 987}
"""Of the 1,000 test images. A rounding difference between machines may move an image or two."""

TEST_LABELS = {
    "mnist": [104, 113, 97, 86, 102, 109, 108, 105, 92, 84],
    "animal-mnist": [210, 197, 199, 196, 190, 213, 208, 188, 189, 210],
    "japanese-vowels": [31, 35, 88, 44, 29, 24, 40, 50, 29],
}
"""How many of each class; for the first two this states the split."""

both = pytest.mark.parametrize("name", sorted(PARAMETERS))


@pytest.fixture(scope="module")
def data() -> ModuleType:
    """The module models/_data.py, which is found by the scripts beside it and is not installed."""
    sys.path.insert(0, str(MODELS))
    try:
        import _data
    finally:
        sys.path.remove(str(MODELS))
    return _data


@pytest.fixture(scope="module")
def held_back() -> dict[str, np.ndarray]:
    with np.load(MODELS / "mnist-test.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def messages(message) -> Iterator[object]:
    """Yield a protobuf message and all the messages in it."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from messages(part)


@both
def test_model_is_one_valid_file(name):
    path = MODELS / f"{name}.onnx"
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert [opset.version for opset in model.opset_import] == [18]
    assert not any(initializer.external_data for initializer in model.graph.initializer)
    assert path.stat().st_size < 4 * sum(np.prod(shape) for shape in PARAMETERS[name].values()) + 4096


@both
def test_model_interface(name):
    graph = onnx.load(MODELS / f"{name}.onnx").graph
    (image,), (logits,) = graph.input, graph.output
    for value, value_name, shape in [(image, "image", ["N", 1, 28, 28]), (logits, "logits", ["N", 10])]:
        assert value.name == value_name
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        assert [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] == shape


@both
def test_initializers_are_the_state_dict(name):
    graph = onnx.load(MODELS / f"{name}.onnx").graph
    weights = {i.name: tuple(i.dims) for i in graph.initializer}
    assert weights == PARAMETERS[name]
    read = [(node.op_type, node.input[1], node.input[2]) for node in graph.node if len(node.input) == 3]
    layers = dict.fromkeys(parameter.split(".")[0] for parameter in PARAMETERS[name])
    expected = zip(OPERATORS[name], layers, strict=True)
    assert read == [(operator, f"{layer}.weight", f"{layer}.bias") for operator, layer in expected]
    assert all(np.isfinite(onnx.numpy_helper.to_array(i)).all() for i in graph.initializer)


@both
def test_model_tells_nothing_of_where_it_was_made(name):
    model = onnx.load(MODELS / f"{name}.onnx")
    for message in messages(model):
        assert not getattr(message, "doc_string", "")
        assert not getattr(message, "metadata_props", ())
    names = [text for node in model.graph.node for text in (node.name, *node.input, *node.output)]
    assert not [text for text in names if "/" in text or "\\" in text]
    raw = model.SerializeToString()
    assert not [text for text in (b".py", b"site-packages", b"File ") if text in raw]


@both
def test_accuracy_in_onnxruntime(name, held_back):
    import onnxruntime

    session = onnxruntime.InferenceSession(MODELS / f"{name}.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": held_back["image"].astype(np.float32)})
    correct = int((logits.argmax(1) == held_back["labels"]).sum())
    assert abs(correct - CORRECT[name]) <= 2


def test_test_images(held_back):
    assert (MODELS / "mnist-test.npz").stat().st_size < 400_000
    assert {key: (array.dtype.name, array.shape) for key, array in held_back.items()} == {
        "image": ("uint8", (1000, 1, 28, 28)),
        "labels": ("int64", (1000,)),
    }
    assert np.bincount(held_back["labels"]).tolist() == TEST_LABELS["mnist"]


def test_test_images_are_held_back(data, held_back):
    split = data.mnist()
    np.testing.assert_array_equal(split.x_test, held_back["image"])
    np.testing.assert_array_equal(split.y_test, held_back["labels"])
    assert split.x_train.shape == (4000, 1, 28, 28)
    assert np.bincount(np.concatenate([split.y_train, split.y_test])).tolist() == [500] * 10
    assert not _rows(split.x_train) & _rows(split.x_test)


def test_animal_mnist(data):
    split = data.animal_mnist()
    assert [(a.dtype.name, a.shape) for a in split] == [
        ("uint8", (7716, 1, 28, 28)),
        ("int64", (7716,)),
        ("uint8", (2000, 1, 28, 28)),
        ("int64", (2000,)),
    ]
    assert len(_rows(split.x_train) | _rows(split.x_test)) == 9716
    assert np.bincount(split.y_test).tolist() == TEST_LABELS["animal-mnist"]


def test_japanese_vowels(data):
    series = data.japanese_vowels()
    assert [(a.dtype.name, a.shape) for a in series] == [
        ("float32", (270, 29, 12)),
        ("int64", (270,)),
        ("float32", (370, 29, 12)),
        ("int64", (370,)),
        ("int64", (270,)),
        ("int64", (370,)),
    ]
    assert np.bincount(series.y_train).tolist() == [30] * 9
    assert np.bincount(series.y_test).tolist() == TEST_LABELS["japanese-vowels"]
    np.testing.assert_array_equal(series.x_train[0, [0, 19], 0], np.float32([1.860936, 1.261441]))
    for x, lengths in [(series.x_train, series.lengths_train), (series.x_test, series.lengths_test)]:
        assert (lengths.min(), lengths.max()) == ((7, 26) if x is series.x_train else (7, 29))
        np.testing.assert_array_equal(x.any(axis=2), np.arange(29) < lengths[:, None])


def test_pickles_may_name_nothing_but_arrays(data):
    array = np.arange(6).reshape(2, 3)
    # numpy's own name for it, under which numpy 1 and 2 read it, is the one in the data
    pickled = pickle.dumps(array, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    np.testing.assert_array_equal(data._unpickle_array(io.BytesIO(pickled)), array)
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print in a file that should hold a numpy array only"):
        data._unpickle_array(io.BytesIO(pickle.dumps(print)))


def test_affine_moves_turns_and_zooms(data):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 1, 9, 9), dtype=np.uint8)
    none, one = np.zeros(4), np.ones(4)
    np.testing.assert_array_equal(data.affine(images, none, none, none, one), images)
    moved = np.zeros_like(images)
    moved[:, :, 2:, :-1] = images[:, :, :-2, 1:]
    np.testing.assert_array_equal(data.affine(images, none, 2 * one, -one, one), moved)
    turned = np.rot90(images, axes=(2, 3))
    np.testing.assert_allclose(data.affine(images, np.pi / 2 * one, none, none, one), turned, atol=1e-2)
    np.testing.assert_array_equal(data.affine(images, none, 20 * one, none, one), np.zeros_like(images))
    larger = data.affine(images, none, none, none, 2 * one)
    np.testing.assert_array_equal(larger[:, :, ::2, ::2], images[:, :, 2:7, 2:7])


def test_augmented_batches_are_an_epoch(data):
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(28, 2).repeat(28, 3)
    batches = list(data.augmented_batches(images, np.arange(10), np.random.default_rng(0), 3))
    assert [(x.shape, x.dtype, y.shape) for x, y in batches] == [((3, 1, 28, 28), np.float32, (3,))] * 3
    assert len({label for _, y in batches for label in y}) == 9
    for x, y in batches:
        np.testing.assert_allclose(x[:, 0, 14, 14], y, rtol=1e-5)


@pytest.mark.slow
def test_training_script_writes_the_three_files(tmp_path):
    script = [sys.executable, MODELS / "train_lenet.py", "--epochs", "1", "--output", tmp_path]
    subprocess.run(script, check=True, capture_output=True, timeout=300)
    assert (tmp_path / "mnist-test.npz").read_bytes() == (MODELS / "mnist-test.npz").read_bytes()
    for name in PARAMETERS:
        made, shipped = (onnx.load(folder / f"{name}.onnx") for folder in (tmp_path, MODELS))
        for model in (made, shipped):
            model.producer_version = ""
            for initializer in model.graph.initializer:
                initializer.ClearField("raw_data")
        assert made == shipped


def _rows(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}
