"""The weights of Keras layers: the same masks as those of the exported file, bit for bit."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras_nets import NETS, SLOW_NETS, Blocks, chain, scramble
from onnxprune.converters.tensorflow import AGPPruner, LevelPruner, SensitivityPruner, bind
from onnxprune.converters.tensorflow.layers import layer_weights

import onnxprune
from onnxprune import PruneError

L = keras.layers
EVERYTHING = [{"sparsity": 0.45, "op_types": ["default", "Embedding"]}]


@pytest.fixture(autouse=True)
def _fresh_names():
    keras.utils.clear_session(free_memory=False)


def check_like_file(
    model: keras.Model, config: object, example: object = None, mapped: bool = True, traced: bool = True
) -> None:
    binding = bind(model, example)
    result = onnxprune.prune(binding.pull(), config)
    assert result.masks
    if mapped:
        found = {w.name: w for w in layer_weights(model)[0]}
        assert {n: w.role_shape for n, w in found.items()} == {w.name: w.role_shape for w in binding.weights}
        assert {n: w.op_types for n, w in found.items()} == {w.name: w.op_types for w in binding.weights}
        pruner = LevelPruner(config)(model)
        assert pruner.masks == result.masks
        pruner.remove()
    if traced:
        pruner = LevelPruner(config)(model, example if example is not None else _zeros(model))
        assert pruner.masks == result.masks


def _zeros(model: keras.Model) -> object:
    structure = model._inputs_struct if hasattr(model, "_inputs_struct") else model.inputs[0]
    return keras.tree.map_structure(lambda t: np.zeros((1, *t.shape[1:]), t.dtype), structure)


@pytest.mark.parametrize(
    "name", [name for name in NETS if not name.endswith(("batchnorm", "3d", "dropout", "layernorm"))]
)
def test_masks_are_the_files(name):
    check_like_file(scramble(NETS[name]()), EVERYTHING, traced=name in {"separable2d", "nested", "embedding"})


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETS, *SLOW_NETS])
def test_masks_are_the_files_slow(name):
    check_like_file(scramble({**NETS, **SLOW_NETS}[name]()), EVERYTHING)


@pytest.mark.parametrize(
    "entry",
    [
        {"pattern": "2:4"},
        {"pattern": "block:2x1", "sparsity": 0.4},
        {"allocation": "global", "sparsity": 0.6},
        {"score": "magnitude", "sparsity": 1.0},
    ],
)
def test_patterns_and_allocations_are_the_files(entry):
    model = scramble(chain((8, 8, 4), L.Conv2D(8, 2), L.Conv2D(4, 2), L.Flatten(), L.Dense(8), L.Dense(4)))
    check_like_file(model, [entry], traced=False)


def test_a_variable_of_no_layer_is_found_in_the_graph():
    model = Blocks()
    example = np.ones((2, 5), np.float32)
    model(example)
    scramble(model)
    check_like_file(model, EVERYTHING, example, mapped=False)
    mapped, skipped, _ = layer_weights(model)
    assert [w.name for w in mapped] == ["blocks/dense/kernel", "blocks/dense_1/kernel"]
    assert [(s.name, s.op_type) for s in skipped] == [("blocks/own", "Blocks")]
    assert "example inputs" in skipped[0].reason
    assert "blocks/own" in LevelPruner(EVERYTHING)(model, example).masks


def test_an_unbuilt_model_needs_an_example():
    with pytest.raises(PruneError, match="build it, call it once, or give example inputs"):
        LevelPruner(EVERYTHING)(Blocks())
    assert len(LevelPruner(EVERYTHING)(Blocks(), np.ones((2, 5), np.float32)).masks) == 3


def test_convlstm_is_left_to_the_graph():
    model = scramble(chain((3, 5, 5, 2), L.ConvLSTM2D(2, 3), L.Flatten(), L.Dense(2)))
    pruner = LevelPruner(EVERYTHING)(model)
    assert list(pruner.masks) == ["dense/kernel"]
    assert {s.name.rpartition("/")[2] for s in pruner.skipped} == {"kernel", "recurrent_kernel"}
    assert all("example inputs" in s.reason for s in pruner.skipped)


@pytest.mark.slow
def test_convlstm_by_its_graph():
    model = scramble(chain((3, 5, 5, 2), L.ConvLSTM2D(2, 3)))
    check_like_file(model, EVERYTHING, np.zeros((1, 3, 5, 5, 2), np.float32), mapped=False)


def test_tied_embeddings_are_left_to_the_graph():
    table, x = L.ReversibleEmbedding(9, 4), keras.Input((3,), dtype="int32")
    model = scramble(keras.Model(x, table(L.Dense(4)(table(x)), reverse=True)))
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    assert [s.name for s in pruner.skipped] == ["reversible_embedding/embeddings"]
    pruner.remove()
    check_like_file(scramble(model), [{"sparsity": 0.5}], np.zeros((1, 3), np.int32), mapped=False)
    assert (
        "reversible_embedding/embeddings" in LevelPruner([{"sparsity": 0.5}])(model, np.zeros((1, 3), np.int32)).masks
    )


def test_other_pruners_are_the_files():
    model = scramble(chain((8,), L.Dense(16), L.Dense(4)))
    for kind, entry in ((SensitivityPruner, {"quality": 0.8}), (AGPPruner, {"final_sparsity": 0.7})):
        result = kind([entry]).prune(bind(model).pull())
        pruner = kind([entry])(model)
        pruner.update_epoch(5)
        assert pruner.masks == result.masks
        pruner.remove()


NAMED = {
    "Dense": ({"op_types": ["Dense"]}, ["inner/kernel", "outer/kernel"]),
    "two types": ({"op_types": ["Conv2D", "Embedding"]}, ["conv/kernel", "table/embeddings"]),
    "Conv": ({"op_types": "Conv"}, ["conv/kernel", "sep/depthwise_kernel", "sep/pointwise_kernel"]),
    "MatMul": ({"op_types": ["MatMul"], "op_names": ["*er/kernel"]}, ["inner/kernel", "outer/kernel"]),
    "LSTM": ({"op_types": ["LSTM"]}, ["lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"]),
    "layer name": ({"op_names": ["inner"]}, ["inner/kernel"]),
    "path": ({"op_names": ["lstm/lstm_cell/kernel"]}, ["lstm/lstm_cell/kernel"]),
    "parent": ({"op_names": ["lstm"]}, ["lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"]),
    "glob": ({"op_names": ["s?p/*_kernel"]}, ["sep/depthwise_kernel", "sep/pointwise_kernel"]),
    "default": (
        {"op_types": ["default"]},
        [
            *("conv/kernel", "inner/kernel", "lstm/lstm_cell/kernel", "lstm/lstm_cell/recurrent_kernel"),
            *("outer/kernel", "sep/depthwise_kernel", "sep/pointwise_kernel"),
        ],
    ),
}


@pytest.fixture(scope="module")
def named() -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    image, words = keras.Input((6, 6, 3)), keras.Input((4,), dtype="int32")
    x = L.SeparableConv2D(4, 2, name="sep")(L.Conv2D(5, 2, name="conv")(image))
    y = L.LSTM(3, name="lstm")(L.Embedding(9, 4, name="table")(words))
    z = L.Concatenate()([L.GlobalAveragePooling2D()(x), y])
    return keras.Model([image, words], L.Dense(2, name="outer")(L.Dense(3, name="inner")(z)))


@pytest.mark.parametrize("case", NAMED)
def test_names_and_types(named, case):
    entry, expected = NAMED[case]
    pruner = LevelPruner([{"sparsity": 0.5, **entry}])(named)
    assert sorted(pruner.masks) == expected
    pruner.remove()


def test_types_of_layers_around_a_layer():
    model = chain((4, 6), L.Bidirectional(L.GRU(3, return_sequences=True)), L.Dense(2))
    assert len(LevelPruner([{"sparsity": 0.5, "op_types": ["Bidirectional"]}])(model).masks) == 4
    x = keras.Input((4, 6))
    attention = keras.Model(x, L.Dense(2)(L.MultiHeadAttention(2, 3)(x, x)))
    assert len(LevelPruner([{"sparsity": 0.5, "op_types": ["MultiHeadAttention"]}])(attention).masks) == 4


def test_what_matches_nothing_is_an_error(named):
    with pytest.raises(PruneError, match=r"matches no weight.*Conv2D.*"):
        LevelPruner([{"sparsity": 0.5, "op_types": ["Conv3D"]}])(named)
    with pytest.raises(PruneError, match=r"no weights that can be pruned"):
        LevelPruner(EVERYTHING)(chain((4,), L.ReLU(), L.LayerNormalization()))
    with pytest.raises(PruneError, match=r"takes a keras.Model or a tf.Graph, not a builtins.int"):
        LevelPruner(EVERYTHING)(3)


def test_equal_names_are_told_apart():
    model = scramble(NETS["nested"]())
    assert len({v.path for v in model.weights}) < len(model.weights)
    masks = LevelPruner([{"sparsity": 0.5}])(model).masks
    assert sum(name.startswith("dense/kernel") for name in masks) == 2


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_low_rank_adapters_and_integers_are_refused_by_name():
    model = chain((6,), L.Dense(8), L.Dense(8), L.Dense(2))
    model.layers[1].enable_lora(2)
    model.layers[2].quantize("int8")
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    reasons = {s.name: s.reason for s in pruner.skipped}
    assert list(pruner.masks) == ["dense_2/kernel"]
    assert "LoRA" in reasons["dense/kernel"]
    assert "int8" in reasons["dense_1/kernel"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_types_of_weights(dtype):
    model = chain((6,), L.Dense(8, dtype=dtype), L.Dense(2, dtype=dtype))
    reference = LevelPruner([{"sparsity": 0.5}])(model)
    assert reference.weights[0].dtype.name == dtype
    for weight in reference.weights:
        values = np.abs(np.asarray(weight.storage.read(), np.float64))
        assert (values == 0).sum() == int(weight.size * 0.5)


def test_not_a_number_is_refused_and_nothing_changed():
    model = chain((6,), L.Dense(8), L.Dense(2))
    model.layers[1].kernel.assign(np.full((6, 8), np.nan))
    before = model.layers[2].kernel.numpy()
    with pytest.raises(PruneError, match=r"'dense/kernel'.*NaN"):
        LevelPruner([{"sparsity": 0.5}])(model)
    assert np.array_equal(model.layers[2].kernel.numpy(), before)
    assert model.layers[2].kernel.constraint is None
