"""Channels of Keras models: held in fit, exported smaller, and a model rebuilt without them."""

from __future__ import annotations

import keras
import numpy as np
import onnx
import pytest
from keras_nets import chain
from onnxprune.converters.tensorflow import AGPPruner, LevelPruner, Pruning, bind, shrinking

import onnxprune
from onnxprune import PruneError
from onnxprune.runtime.session import open_session

L = keras.layers
HALF = [{"sparsity": 0.5, "op_types": "default", "pattern": "channel"}]


def residual() -> keras.Model:
    """A stem, a separable convolution in a residual sum, a depthwise one, and two Dense layers."""
    x = inputs = keras.Input((8, 8, 3), name="x")
    x = L.ReLU()(L.BatchNormalization(name="norm")(L.Conv2D(16, 3, padding="same", use_bias=False, name="stem")(x)))
    y = L.BatchNormalization()(L.SeparableConv2D(16, 3, padding="same", name="separable")(x))
    x = L.DepthwiseConv2D(3, name="depthwise")(L.Add()([x, y]))
    x = L.PReLU(shared_axes=[1, 2], name="prelu")(L.Conv2D(8, 1, name="point")(x))
    x = L.Dense(12, activation="relu", name="inside")(L.Dropout(0.1)(L.Flatten()(x)))
    return keras.Model(inputs, L.Dense(5, name="last")(x))


def sequential() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((8, 8, 3), name="x"),
            L.Conv2D(8, 3, activation="relu", name="first"),
            L.Conv2DTranspose(8, 3, activation="relu", name="second"),
            L.GlobalAveragePooling2D(),
            L.Dense(12, activation="sigmoid", name="third"),
            L.Dense(5, name="last"),
        ]
    )


NETS = {
    "residual": (
        residual,
        {"stem/kernel": (16, 8), "point/kernel": (8, 4), "inside/kernel": (12, 6)},
        {
            "stem/kernel": (3, 3, 3, 8), "norm/moving_variance": (8,), "separable/depthwise_kernel": (3, 3, 8, 1),
            "separable/pointwise_kernel": (1, 1, 8, 8), "depthwise/bias": (8,), "point/kernel": (1, 1, 8, 4),
            "prelu/alpha": (1, 1, 4), "inside/kernel": (144, 6), "last/kernel": (6, 5),
        },
        {"stem": ("filters", 8), "separable": ("filters", 8), "point": ("filters", 4), "inside": ("units", 6)},
    ),
    "sequential": (
        sequential,
        {"first/kernel": (8, 4), "second/kernel": (8, 4), "third/kernel": (12, 6)},
        {"first/kernel": (3, 3, 3, 4), "second/kernel": (3, 3, 4, 4), "third/kernel": (4, 6), "last/kernel": (6, 5)},
        {"first": ("filters", 4), "second": ("filters", 4), "third": ("units", 6)},
    ),
}  # fmt: skip
"""Name -> the net; its groups, how many channels they have and keep; shapes of the smaller net; what its layers say."""


def build(name: str):
    keras.utils.set_random_seed(0)
    net, *expected = NETS[name]
    model = net()
    rng = np.random.default_rng(0)
    for variable in model.variables:
        if any(part in variable.path for part in ("moving", "gamma", "beta", "alpha", "bias")):
            values = rng.uniform(0.5, 2, variable.shape)
            variable.assign(values if "variance" in variable.path else values - 1.2)
    return model, *expected


def data() -> tuple[np.ndarray, np.ndarray]:
    return np.random.default_rng(1).normal(size=(16, 8, 8, 3)).astype(np.float32), np.arange(16) % 5


def compiled(model, **options):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, **options)
    return model


def short(masks):
    """Masks, or groups, by the ends of their names: Keras puts a Sequential's own name before them."""
    return {"/".join(name.split("/")[-2:]): value for name, value in masks.items()}


def close(a, b, allowed=1e-5):
    assert np.abs(a - b).max() <= allowed * np.abs(a).max()


@pytest.mark.parametrize("name", NETS)
def test_held_in_fit_exported_and_rebuilt(name, tmp_path):
    model, groups, shapes, said = build(name)
    x, y = data()
    pruner = LevelPruner(HALF)(compiled(model), align=1)
    assert short({g.name: (g.size, g.kept) for g in pruner.report.groups}) == groups
    model.fit(x, y, epochs=2, verbose=0)
    values = {v.path: v.numpy() for v in model.variables}
    for key, mask in pruner.masks.items():
        if "moving" not in key:
            assert not values[key][~mask].any(), key
            assert np.count_nonzero(values[key][mask]) == mask.sum(), key
    masked = model(x, training=False).numpy()
    pruner.export(tmp_path / "small.onnx", x)
    close(masked, open_session(tmp_path / "small.onnx").run({"x": x})[0])
    small = pruner.shrink()
    close(masked, small(x, training=False).numpy())
    found = short({v.path: tuple(v.shape) for v in small.variables})
    assert {key: found[key] for key in shapes} == shapes
    assert {key: (what, getattr(small.get_layer(key), what)) for key, (what, _) in said.items()} == said
    # As small as the file, and it trains.
    stored = [t for t in onnx.load(tmp_path / "small.onnx").graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert sum(int(np.prod(t.dims)) for t in stored) <= small.count_params() + 10
    assert small.count_params() < 0.5 * model.count_params()
    compiled(small).fit(x, y, epochs=2, verbose=0)
    assert np.abs(small(x, training=False).numpy() - masked).max() > 1e-3
    pruner.remove()


def test_the_masks_are_those_of_the_file():
    model, _, _, _ = build("residual")
    exported = bind(model).pull()
    file = onnxprune.prune(exported, HALF, keep_shape=True, align=1)
    pruner = LevelPruner(HALF)(model, align=1)
    paths = {v.path for v in model.variables}
    assert set(pruner.masks) == set(file.masks) & paths
    assert len(pruner.masks) == 18
    for key, mask in pruner.masks.items():
        assert np.array_equal(mask, file.masks[key]), key
    pruner.remove()


def test_agp_in_fit_is_resumed():
    config = [{"final_sparsity": 0.75, "start_epoch": 0, "end_epoch": 4, "pattern": "channel"}]
    model, _, _, _ = build("sequential")
    x, y = data()
    pruner = AGPPruner(config)(compiled(model), align=1)
    compiled(model).fit(x, y, epochs=2, verbose=0, callbacks=[Pruning(pruner)])
    assert [g.kept for g in pruner.report.groups] == [3, 3, 5]
    state = pruner.state_dict()
    pruner.remove()
    again = AGPPruner(config)
    again.load_state_dict(state)
    again(model, align=1)
    assert [g.kept for g in again.report.groups] == [3, 3, 5]
    again.update_epoch(4)
    assert [g.kept for g in again.report.groups] == [2, 2, 3]
    assert all((again.masks[key] <= mask).all() for key, mask in state["masks"].items())
    again.remove()


def test_channels_beside_single_entries():
    model, _, _, _ = build("sequential")
    config = [{"sparsity": 0.8, "op_types": ["Dense"]}, {"sparsity": 0.5, "op_types": ["Conv2D"], "pattern": "channel"}]
    pruner = LevelPruner(config)(model, align=1)
    assert short({g.name: (g.size, g.kept) for g in pruner.report.groups}) == {"first/kernel": (8, 4)}
    small = pruner.shrink()
    assert tuple(small.get_layer("second").kernel.shape) == (3, 3, 8, 4)
    assert np.count_nonzero(small.get_layer("last").kernel.numpy() == 0) == 48
    pruner.remove()


def recurrent() -> keras.Model:
    both = L.Bidirectional(L.LSTM(8, return_sequences=True), name="both")
    layers = [both, L.GRU(12, return_sequences=True, name="gru"), L.SimpleRNN(6, name="rnn"), L.Dense(5, name="last")]
    return keras.Sequential([keras.Input((7, 5), name="x"), *layers])


def attention() -> keras.Model:
    x = keras.Input((7, 5), name="x")
    h = L.Dense(16, name="first")(x)
    h = L.MultiHeadAttention(4, 4, name="attention")(h, h)
    h = L.GroupQueryAttention(4, 4, 2, name="shared")(h, h)
    return keras.Model(x, L.Dense(3, name="last")(L.GlobalAveragePooling1D()(h)))


SEQUENCES = {
    "recurrent": (
        recurrent,
        {"forward_lstm": (8, 4), "backward_lstm": (8, 4), "gru": (12, 6), "rnn": (6, 3)},
        {"forward_lstm": 4, "backward_lstm": 4, "gru": 6, "rnn": 3},
    ),
    "attention": (
        attention,
        {"first": (16, 8), "attention": (4, 2), "attention_output": (16, 8), "shared": (2, 1)},
        {"attention": 2, "shared": 2},
    ),
}
"""Name -> the net; its groups of units and heads, and how many are kept; units or heads of the smaller layers."""


@pytest.mark.parametrize("name", SEQUENCES)
def test_units_and_heads_of_layers_for_sequences(name, tmp_path):
    """A recurrent layer is a loop that hands its weights on; an attention layer's kernels have an axis of heads."""
    keras.utils.set_random_seed(0)
    net, groups, left = SEQUENCES[name]
    model, rng = net(), np.random.default_rng(0)
    for variable in model.variables:
        variable.assign(variable + rng.uniform(-0.3, 0.3, variable.shape))
    x = rng.normal(size=(3, 7, 5)).astype(np.float32)
    pruner = LevelPruner(HALF)(model, x, align=1)
    assert {_owner(g.name, groups): (g.size, g.kept) for g in pruner.report.groups if _owner(g.name, groups)} == groups
    masked = model(x, training=False).numpy()
    pruner.export(tmp_path / "small.onnx", x)
    close(masked, open_session(tmp_path / "small.onnx").run({"x": x})[0])
    small = pruner.shrink()
    close(masked, small(x, training=False).numpy())
    assert small.count_params() < 0.5 * model.count_params()
    layers = {layer.name: layer for layer in small.layers}
    if "both" in layers:
        layers |= {"forward_lstm": layers["both"].forward_layer, "backward_lstm": layers["both"].backward_layer}
    counts = ("units", "num_heads", "num_query_heads")
    said = {key: layers[key].get_config() for key in left}
    assert {key: next(config[c] for c in counts if c in config) for key, config in said.items()} == left
    pruner.remove()


def _owner(name: str, owners) -> str | None:
    """The innermost part of a variable's path that is one of some names."""
    return next((part for part in reversed(name.split("/")) if part in owners), None)


def test_what_cannot_be_rebuilt_is_refused_by_name():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.inside, self.last = L.Dense(8), L.Dense(3)

        def call(self, x):
            return self.last(keras.ops.relu(self.inside(x)))

    x = np.ones((2, 5), np.float32)
    model = Own()
    model(x)
    pruner = LevelPruner(HALF)(model, x, align=1)
    with pytest.raises(PruneError, match=r"is a Own, whose code.*Only functional and Sequential"):
        pruner.shrink()
    pruner.remove()

    class Mine(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 8), name="kernel")

        def call(self, x):
            return keras.ops.matmul(x, self.kernel)

    pruner = LevelPruner(HALF)(chain((5,), Mine(name="mine"), L.ReLU(), L.Dense(3)), align=1)
    with pytest.raises(PruneError, match=r"layer 'mine' \(Mine\) cannot be rebuilt.*\[5, 8\] where \[5, 4\]"):
        pruner.shrink()
    pruner.remove()
    wired = chain((4, 4, 3), L.Conv2D(8, 1), L.Reshape((128,), name="flat"), L.Dense(3))
    pruner = LevelPruner(HALF)(wired, align=1)
    with pytest.raises(PruneError, match=r"layer 'flat' \(Reshape\) cannot be rebuilt.*-1"):
        pruner.shrink()
    pruner.remove()
    with pytest.raises(PruneError, match="no channels to cut out"):
        LevelPruner([{"sparsity": 0.5}])(chain((5,), L.Dense(3))).shrink()


def test_wrong_positions_are_seen(monkeypatch):
    model, _, _, _ = build("sequential")
    pruner = LevelPruner(HALF)(model, align=1)
    real = shrinking.keep
    monkeypatch.setattr(
        shrinking, "keep", lambda array, alive: real(array, [np.roll(a, 1) if array.ndim == 2 else a for a in alive])
    )
    with pytest.raises(PruneError, match="computes something else"):
        pruner.shrink()
    pruner.remove()
