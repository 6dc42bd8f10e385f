"""Keras models as ONNX files: bound, exported, pruned elsewhere and taken back."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tensorflow as tf
from keras_nets import NETS, SLOW_NETS, Blocks, L, chain, check_zeros, images, loss, scramble, trained_net
from onnx import numpy_helper
from onnxprune.converters.tensorflow import AGPPruner, LevelPruner, bind, binding, export, reimport
from onnxprune.converters.tensorflow.binding import signature
from onnxprune.converters.tensorflow.convert import convert

import onnxprune
from onnxprune import PruneError
from onnxprune.graph.model import graphs, load
from onnxprune.graph.weights import find

HALF = [{"sparsity": 0.5, "op_types": ["default", "Embedding"]}]


@pytest.fixture(autouse=True)
def _fresh_names():
    keras.utils.clear_session(free_memory=False)


def run(model: onnx.ModelProto | str, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    source = str(model) if not isinstance(model, onnx.ModelProto) else model.SerializeToString()
    return ort.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, feeds)


def feeds_of(model: keras.Model, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made = {}
    for tensor in model.inputs:
        shape = (3, *(5 if d is None else d for d in tensor.shape[1:]))
        made[tensor.name] = (
            rng.integers(0, 5, shape).astype(tensor.dtype)
            if "int" in tensor.dtype
            else rng.normal(size=shape).astype(tensor.dtype)
        )
    return made


def called(model: keras.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    inputs = [feeds[t.name] for t in model.inputs]
    structured = inputs[0] if len(inputs) == 1 else dict(feeds) if isinstance(model._inputs_struct, dict) else inputs
    return [t.numpy() for t in tf.nest.flatten(model(structured, training=False))]


def ordinary(model: keras.Model) -> onnx.ModelProto:
    """As anyone exports it: folded, names lost to scopes."""
    specs = signature(model)
    flat = tf.nest.flatten(specs)

    def call(*args):
        return tf.nest.flatten(model(tf.nest.pack_sequence_as(specs, list(args)), training=False))

    return convert(call, [tf.TensorSpec(s.shape, s.dtype, name=f"x{i}") for i, s in enumerate(flat)])


def check_bound_and_exported(model: keras.Model, folder: object) -> None:
    for variable in model.weights:  # a BatchNormalization that folds into something
        if "gamma" in variable.path:
            variable.assign(np.linspace(0.5, 2, variable.shape[0]))
    feeds = feeds_of(model)
    binding = bind(model)
    assert {t.name for t in binding.model.proto.graph.initializer} >= set(binding.variables)
    for name, variable in binding.variables.items():
        stored = next(t for t in binding.model.proto.graph.initializer if t.name == name)
        assert np.array_equal(numpy_helper.to_array(stored), variable.numpy())
    for mine, theirs in zip(run(binding.pull(), feeds), called(model, feeds), strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())
    pruner = LevelPruner(HALF)(model)
    exported = pruner.export(folder / "model.onnx")
    assert exported.difference <= 1e-5
    assert exported.zeros == sum(row.zeros for row in pruner.report.rows)
    for mine, theirs in zip(run(exported.path, feeds), called(model, feeds), strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5 * max(1, np.abs(theirs).max())
    file = find(load(exported.path))[0]
    assert sum(int((w.values() == 0).sum()) for w in file) >= exported.zeros


FEW = ["grouped conv2d", "conv and batchnorm", "embedding", "two inputs", "lstm"]


@pytest.mark.parametrize("name", FEW)
def test_bound_and_exported(name, tmp_path):
    check_bound_and_exported(scramble(NETS[name]()), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(NETS.keys() - set(FEW)), *SLOW_NETS])
def test_bound_and_exported_everything(name, tmp_path):
    check_bound_and_exported(scramble({**NETS, **SLOW_NETS}[name]()), tmp_path)


def test_binding_follows_the_weights():
    model = trained_net()
    binding = bind(model)
    model.compile("adam", loss(), jit_compile=False)
    x, y = images()
    model.fit(x, y, verbose=0)
    (output,) = run(binding.pull(), {model.inputs[0].name: x})
    assert np.abs(output - model(x, training=False).numpy()).max() < 1e-5
    model.layers[1].kernel.assign(np.zeros((3, 3, 3, 6)))
    copy = binding.pull()
    model.layers[1].kernel.assign(np.ones((3, 3, 3, 6)))
    stored = next(t for t in copy.graph.initializer if t.name == "conv2d/kernel")
    assert not numpy_helper.to_array(stored).any()


def test_pruned_elsewhere_and_pushed(tmp_path):
    model = trained_net()
    binding = bind(model)
    onnxprune.prune(binding.pull(), HALF, tmp_path / "pruned.onnx")
    x, _ = images()
    (expected,) = run(tmp_path / "pruned.onnx", {model.inputs[0].name: x})
    masks = binding.push(tmp_path / "pruned.onnx")
    assert np.abs(expected - model(x, training=False).numpy()).max() < 1e-5
    assert masks == LevelPruner(HALF)(model).masks
    with pytest.raises(PruneError, match="not the bound graph"):
        binding.push(ordinary(model))
    broken = binding.pull()
    tensor = next(t for t in broken.graph.initializer if t.name == "conv2d/kernel")
    tensor.CopyFrom(numpy_helper.from_array(np.full((3, 3, 3, 6), np.nan, np.float32), tensor.name))
    before = model.get_weights()
    with pytest.raises(PruneError, match=r"'conv2d/kernel' \[3, 3, 3, 6\] holds NaN"):
        binding.push(broken)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


def test_reimported_and_trained_on(tmp_path):
    model = trained_net()
    binding = bind(model)
    result = onnxprune.prune(binding.pull(), HALF, tmp_path / "pruned.onnx")
    fresh = keras.models.clone_model(model)
    pruner = reimport(fresh, tmp_path / "pruned.onnx")
    assert {n: pruner.masks[n].tolist() for n in pruner.masks} == {n: m.tolist() for n, m in result.masks.items()}
    check_zeros(pruner)
    fresh.compile("adam", loss(), jit_compile=False)
    fresh.fit(*images(), verbose=0)
    check_zeros(pruner)
    pruner.update_epoch(1)
    assert pruner.sparsity == result.sparsity


def several() -> keras.Model:
    """Convolutions with a BatchNormalization to fold, two directions to merge, and layers of equal shape."""
    keras.utils.set_random_seed(0)
    image, words = keras.Input((10, 10, 3)), keras.Input((6, 5))
    x = image
    for _ in range(2):
        x = L.ReLU()(L.BatchNormalization()(L.Conv2D(8, 3, use_bias=False, padding="same")(x)))
    x = L.GlobalAveragePooling2D()(L.SeparableConv2D(8, 3)(x))
    y = L.Bidirectional(L.LSTM(4))(words)
    z = L.Concatenate()([x, y])
    for _ in range(2):
        z = L.Dense(16, activation="relu")(z)
    model = keras.Model([image, words], L.Dense(3)(z))
    rng = np.random.default_rng(0)
    for variable in model.weights:
        if variable.dtype == "float32":
            variable.assign(variable.numpy() + 0.1 * rng.normal(size=variable.shape))
        if "variance" in variable.path:
            variable.assign(np.abs(variable.numpy()) + 0.3)
    return model


@pytest.mark.parametrize("names", ["kept", "lost"])
def test_an_ordinary_file_pruned_elsewhere(names, tmp_path):
    model = several()
    file = ordinary(model)
    if names == "lost":
        for graph in graphs(file):
            table = {t.name: f"c{i}" for i, t in enumerate(file.graph.initializer)}
            for node in graph.node:
                node.input[:] = [table.get(name, name) for name in node.input]
        for tensor in file.graph.initializer:
            tensor.name = table[tensor.name]
    result = onnxprune.prune(file, [{"sparsity": 0.5}])
    proto = result.to_proto()
    before = {v.path: v.numpy() for v in model.weights}
    pruner = reimport(model, proto)
    check_zeros(pruner)
    assert len(pruner.masks) == 2 + 2 + 4 + 3
    values = {v.path: v.numpy() for v in model.weights}
    for name, mask in ((n, pruner.masks[n]) for n in pruner.masks):
        assert np.array_equal(values[name][mask], before[name][mask]), name
    feeds = feeds_of(model)
    inputs = [feeds[t.name] for t in model.inputs]
    (expected,) = run(proto, {value.name: a for value, a in zip(proto.graph.input, inputs, strict=True)})
    assert np.abs(expected - model(inputs, training=False).numpy()).max() < 1e-4 * np.abs(expected).max()
    dense = {"dense/kernel", "dense_1/kernel"}
    assert all((values[n] == 0).mean() == pytest.approx(0.5, abs=0.01) for n in dense)


@pytest.mark.parametrize("given", [False, True])
def test_reimport_exports_the_graph_once(given, monkeypatch):
    model = NETS["dense"]()
    proto = onnxprune.prune(bind(model).pull(), [{"sparsity": 0.5}]).to_proto()
    calls, once = [], binding.convert
    monkeypatch.setattr(binding, "convert", lambda *a: calls.append(a) or once(*a))
    pruner = reimport(model, proto, np.ones((2, 5), np.float32) if given else None)
    assert len(calls) == 1
    assert pruner.sparsity == 0.5


def test_of_a_folded_weight_that_was_trained_on_only_zeros_come_back():
    model = chain((8, 8, 3), L.Conv2D(8, 3, use_bias=False), L.BatchNormalization(), L.ReLU(), L.Flatten(), L.Dense(3))
    rng = np.random.default_rng(0)
    for name in ("gamma", "moving_variance"):
        variable = next(v for v in model.weights if v.name == name)
        variable.assign(rng.uniform(0.5, 2, 8))
    file = ordinary(model)
    for tensor in file.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.ndim > 1:
            moved = (values * rng.uniform(0.9, 1.1, values.shape)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))
    kernel, dense = (layer.kernel.numpy() for layer in model.layers if hasattr(layer, "kernel"))
    pruner = reimport(model, onnxprune.prune(file, [{"sparsity": 0.5}]).to_proto())
    mask = pruner.masks["conv2d/kernel"]
    assert (~mask).mean() == 0.5
    assert np.array_equal(model.layers[1].kernel.numpy(), np.where(mask, kernel, 0))
    taken, mask = model.layers[-1].kernel.numpy(), pruner.masks["dense/kernel"]
    assert np.isclose(taken, dense, rtol=0.11)[mask].all()
    assert (taken != dense)[mask].all()


def test_a_file_of_another_model_is_refused():
    model, other = chain((5,), L.Dense(4), L.Dense(3)), chain((5,), L.Dense(7), L.Dense(3))
    proto = onnxprune.prune(ordinary(other), [{"sparsity": 0.5}]).to_proto()
    before = model.get_weights()
    with pytest.raises(PruneError, match="cannot be found in the file"):
        reimport(model, proto)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert reimport(model, ordinary(model)).sparsity == 0


def test_other_biases_are_noticed():
    model = chain((5,), L.Dense(4), L.Dense(3))
    other = keras.models.clone_model(model)
    other.set_weights(model.get_weights())
    other.layers[2].bias.assign([1, 2, 3])
    proto = onnxprune.prune(ordinary(other), [{"sparsity": 0.5}]).to_proto()
    before = model.get_weights()
    with pytest.raises(PruneError, match="biases or statistics"):
        reimport(model, proto)
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    assert all(v.constraint is None for v in model.weights)


def test_pruned_on_after_reimport():
    model = trained_net()
    result = onnxprune.prune(bind(model).pull(), [{"sparsity": 0.4, "op_names": ["dense/*", "conv2d/*"]}])
    schedule = [{"final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2, "op_types": ["Dense"]}]
    pruner = reimport(model, result.to_proto(), config_list={"pruner": "agp", "config_list": schedule})
    assert isinstance(pruner, AGPPruner)
    assert all(np.array_equal(pruner.masks[n], result.masks[n]) for n in pruner.masks)
    pruner.update_epoch(2)
    sparsity = {row.name: row.sparsity for row in pruner.report.rows}
    assert sparsity == pytest.approx({"conv2d/kernel": 0.4, "dense/kernel": 0.8}, abs=0.01)


def test_export_in_the_middle_of_a_schedule(tmp_path):
    model = trained_net()
    pruner = AGPPruner([{"final_sparsity": 0.9, "start_epoch": 0, "end_epoch": 4}])(model)
    pruner.update_epoch(2)
    first = pruner.export(tmp_path / "model.onnx", np.ones((2, 8, 8, 3), np.float32))
    pruner.update_epoch(4)
    second = pruner.export(tmp_path / "model.onnx")
    assert 0.6 < first.sparsity < second.sparsity == pytest.approx(0.9, abs=0.01)
    assert "sparsity 0.8" in str(second) or "sparsity 0.9" in str(second)
    metadata = {p.key: p.value for p in onnx.load(second.path).metadata_props}
    assert '"pruner": "agp"' in metadata["onnxprune"]
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    with pytest.raises(PruneError, match="no model to export"):
        AGPPruner([{"final_sparsity": 0.9}]).export(tmp_path / "model.onnx")
    with pytest.raises(PruneError, match="a Keras model, which has none"):
        pruner.export(tmp_path / "model.onnx", sess=object())


def test_a_file_that_lost_zeros_or_computes_otherwise_is_not_written(tmp_path, monkeypatch):
    model = trained_net()
    pruner = LevelPruner(HALF)(model)
    target = tmp_path / "model.onnx"
    target.write_bytes(b"old")
    original = export.load

    def spoiled(proto, name, change):
        loaded = original(proto)
        weight = next(w for w in find(loaded)[0] if w.role_shape[:2] == name)
        loaded.edit(weight.leaf.tensor, change)
        return loaded

    def one_back(values):
        values = values.copy()
        values.reshape(-1)[np.flatnonzero(values == 0)[0]] = 1e-9
        return values

    monkeypatch.setattr(export, "load", lambda proto: spoiled(proto, (6, 3), one_back))
    with pytest.raises(PruneError, match=r"lost zeros of weight 'conv2d/kernel' \[3, 3, 3, 6\]: 1 of its 6 outputs"):
        pruner.export(target)
    monkeypatch.setattr(export, "load", lambda proto: spoiled(proto, (6, 3), lambda values: values * 1.01))
    with pytest.raises(PruneError, match="outputs for the exported model differ from the framework's by"):
        pruner.export(target)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_a_subclassed_model(tmp_path):
    model, example = Blocks(), np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    pruner = LevelPruner([{"sparsity": 0.5}])(model, example)
    exported = pruner.export(tmp_path / "model.onnx")
    assert exported.sparsity == 0.5
    (output,) = run(exported.path, {"input_0": example})
    assert np.abs(output - model(example).numpy()).max() < 1e-5
    model.inside.bias.assign([1, 2, 3, 4])
    fresh = Blocks()
    taken = reimport(fresh, bind(model, example).pull(), example)
    assert np.array_equal(fresh(example).numpy(), model(example).numpy())
    assert [m.tolist() for m in taken.masks.values()] == [m.tolist() for m in pruner.masks.values()]
    without = LevelPruner([{"sparsity": 0.5}])(fresh)
    with pytest.raises(PruneError, match="give example inputs"):
        without.export(tmp_path / "other.onnx")


@pytest.mark.parametrize("net", ["dense", "conv and batchnorm"])
def test_half_precision_exports(net, tmp_path):
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        model = NETS[net]()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    exported = LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "model.onnx")
    assert exported.sparsity == pytest.approx(0.5, abs=0.02)


def test_bfloat16_is_refused_with_the_way_out_and_that_works(tmp_path):
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        model = NETS["conv2d"]()
    finally:
        keras.mixed_precision.set_global_policy("float32")
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    with pytest.raises(PruneError, match=r"compute in bfloat16, which .* set dtype_policy = 'float32' on the model"):
        pruner.export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    for part in (model, *model.layers):
        part.dtype_policy = "float32"
    exported = pruner.export(tmp_path / "model.onnx")
    assert exported.sparsity == 0.5
    assert exported.difference < 1e-5


def test_names_are_those_of_the_model(tmp_path):
    model = NETS["two inputs"]()
    exported = LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "model.onnx")
    proto = onnx.load(exported.path)
    assert [i.name for i in proto.graph.input] == ["a", "b"]
    assert [o.name for o in proto.graph.output] == model.output_names
