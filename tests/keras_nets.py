"""Small Keras nets for tests: every kind of layer with weights, a net to train, and its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np

L = keras.layers


def chain(shape: tuple[int, ...], *layers: Any, dtype: str = "float32") -> keras.Model:
    """A functional model of one input."""
    x = inputs = keras.Input(shape, dtype=dtype)
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, x)


def _attention(layer: Any) -> keras.Model:
    x = keras.Input((7, 8))
    return keras.Model(x, layer(x, x))


def _multi() -> keras.Model:
    a, b = keras.Input((5,), name="a"), keras.Input((6,), name="b")
    return keras.Model({"a": a, "b": b}, [L.Dense(3)(a) + L.Dense(3)(b), L.Dense(2)(b)])


def _shared() -> keras.Model:
    dense, x = L.Dense(5), keras.Input((5,))
    return keras.Model(x, dense(L.ReLU()(dense(x))))


def _nested() -> keras.Model:
    x = keras.Input((5,))
    first = chain((5,), L.Dense(4, name="dense"), L.Dense(5, name="between"))
    second = chain((5,), L.Dense(4, name="dense"))
    return keras.Model(x, L.Dense(2, name="last")(second(first(x))))


def _frozen() -> keras.Model:
    model = chain((5,), L.Dense(4), L.Dense(3))
    model.layers[1].trainable = False
    return model


NETS: dict[str, Callable[[], keras.Model]] = {
    "dense": lambda: chain((5,), L.Dense(4, activation="relu"), L.Dense(3)),
    "dense on sequences": lambda: chain((7, 5), L.Dense(4)),
    "conv1d": lambda: chain((9, 4), L.Conv1D(6, 3)),
    "conv2d": lambda: chain((9, 9, 4), L.Conv2D(6, 3, padding="same", strides=2)),
    "grouped conv2d": lambda: chain((9, 9, 4), L.Conv2D(6, 3, groups=2)),
    "dilated conv2d": lambda: chain((9, 9, 4), L.Conv2D(6, 3, dilation_rate=2)),
    "conv3d": lambda: chain((7, 7, 7, 4), L.Conv3D(6, 3)),
    "conv1d transpose": lambda: chain((9, 4), L.Conv1DTranspose(6, 3)),
    "conv2d transpose": lambda: chain((9, 9, 4), L.Conv2DTranspose(6, 3, strides=2)),
    "conv3d transpose": lambda: chain((5, 5, 5, 4), L.Conv3DTranspose(6, 3)),
    "depthwise1d": lambda: chain((9, 4), L.DepthwiseConv1D(3, depth_multiplier=2)),
    "depthwise2d": lambda: chain((9, 9, 4), L.DepthwiseConv2D(3, depth_multiplier=2)),
    "separable1d": lambda: chain((9, 4), L.SeparableConv1D(6, 3)),
    "separable2d": lambda: chain((9, 9, 4), L.SeparableConv2D(6, 3)),
    "conv and batchnorm": lambda: chain((9, 9, 4), L.Conv2D(6, 3), L.BatchNormalization(), L.ReLU()),
    "depthwise and batchnorm": lambda: chain((9, 9, 4), L.DepthwiseConv2D(3), L.BatchNormalization()),
    "dense and batchnorm": lambda: chain((9,), L.Dense(6), L.BatchNormalization(), L.ReLU()),
    "einsum": lambda: chain((7, 5), L.EinsumDense("abc,cd->abd", output_shape=(None, 6), bias_axes="d")),
    "einsum to heads": lambda: chain((7, 5), L.EinsumDense("abc,cde->abde", output_shape=(None, 2, 3))),
    "einsum transposed": lambda: chain((7, 5), L.EinsumDense("abc,dc->abd", output_shape=(None, 6))),
    "einsum from heads": lambda: chain((7, 2, 5), L.EinsumDense("abcd,cde->abe", output_shape=(None, 6))),
    "embedding": lambda: chain((7,), L.Embedding(11, 5), L.GlobalAveragePooling1D(), L.Dense(3), dtype="int32"),
    "lstm": lambda: chain((7, 5), L.LSTM(4)),
    "two inputs": _multi,
    "shared": _shared,
    "nested": _nested,
    "frozen": _frozen,
    "dropout": lambda: chain((9,), L.Dense(6), L.Dropout(0.5), L.Dense(3)),
    "time distributed": lambda: chain((3, 6, 6, 2), L.TimeDistributed(L.Conv2D(3, 3))),
    "prelu and layernorm": lambda: chain((5,), L.Dense(4), L.LayerNormalization(), L.PReLU()),
    "sequential": lambda: keras.Sequential([keras.Input((5,)), L.Dense(4), L.Dense(3)]),
}
"""Name -> builder; a second or less each to export."""

SLOW_NETS: dict[str, Callable[[], keras.Model]] = {
    "attention": lambda: _attention(L.MultiHeadAttention(2, 4)),
    "grouped attention": lambda: _attention(L.GroupQueryAttention(4, 4, 2)),
    "lstm sequences": lambda: chain((7, 5), L.LSTM(4, return_sequences=True)),
    "gru": lambda: chain((7, 5), L.GRU(4)),
    "gru reset before": lambda: chain((7, 5), L.GRU(4, reset_after=False)),
    "simple rnn": lambda: chain((7, 5), L.SimpleRNN(4)),
    "bilstm": lambda: chain((7, 5), L.Bidirectional(L.LSTM(4))),
    "unrolled lstm": lambda: chain((7, 5), L.LSTM(4, unroll=True)),
    "stacked cells": lambda: chain((7, 5), L.RNN([L.GRUCell(3), L.LSTMCell(4)])),
}
"""Several seconds each."""


class Blocks(keras.Model):
    """A subclassed model with a weight that only its graph explains."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = L.Dense(4)
        self.outside = L.Dense(3)

    def build(self, shape: Any) -> None:
        self.own = self.add_weight(shape=(4, 6), name="own")
        self.inside.build(shape)
        self.outside.build((shape[0], 6))

    def call(self, x: Any) -> Any:
        return self.outside(keras.ops.relu(keras.ops.matmul(self.inside(x), self.own)))


def scramble(model: keras.Model, seed: int = 0) -> keras.Model:
    """Weights in steps of 1/8, full of ties, none of them zero; moving variances positive."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        if variable.dtype == "float32":
            steps = rng.integers(1, 6, variable.shape) * rng.choice([-1, 1], variable.shape)
            variable.assign(np.abs(steps) / 8 if "variance" in variable.path else steps / 8)
    return model


def trained_net(**options: Any) -> keras.Model:
    """A net with a layer of most kinds, for (8, 8, 3) images of 4 classes."""
    keras.utils.set_random_seed(0)
    x = inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(6, 3, **options)(x)
    x = L.SeparableConv2D(5, 3, use_bias=False, activation="relu")(x)
    return keras.Model(inputs, L.Dense(4)(L.Flatten()(x)))


def images() -> tuple[np.ndarray, np.ndarray]:
    """32 images and their classes."""
    return np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype(np.float32), np.arange(32) % 4


def loss() -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def kept(pruner: Any) -> dict[str, tuple[Any, np.ndarray]]:
    """Weight name -> its variable and its mask."""
    variables = {w.name: w.storage.variable for w in pruner.weights}
    return {name: (variables[name], pruner.masks[name]) for name in pruner.masks}


def check_zeros(pruner: Any) -> None:
    """Every pruned entry is +0.0, and the others live."""
    for name, (variable, mask) in kept(pruner).items():
        values = np.asarray(variable.numpy(), np.float64)
        assert not values[~mask].any(), name
        assert not np.signbit(values[~mask]).any(), name
        assert (values[mask] != 0).mean() > 0.9, name
