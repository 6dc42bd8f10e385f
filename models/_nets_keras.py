"""The nets of `finetune.py` in Keras 3 on TensorFlow, and how they are trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from onnxprune.converters.tensorflow import AGPPruner

version = keras.__version__
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)

__all__ = ["AGPPruner", "accuracy", "load", "make", "trainer", "version", "weights"]


def _images(*body: layers.Layer) -> keras.Model:
    """A net on images [N, 1, 28, 28] with values 0..255, channels first as in the other framework."""
    head = [layers.Input((1, 28, 28)), layers.Rescaling(1 / 255), layers.Permute((2, 3, 1))]
    return keras.Sequential([*head, *body])


def _lenet300100() -> keras.Model:
    return _images(
        layers.Flatten(),
        layers.Dense(300, activation="relu", name="fc1"),
        layers.Dense(100, activation="relu", name="fc2"),
        layers.Dense(10, name="fc3"),
    )


def _lenet5() -> keras.Model:
    return _images(
        layers.Conv2D(20, 5, name="conv1"),
        layers.MaxPooling2D(2),
        layers.Conv2D(50, 5, name="conv2"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(500, activation="relu", name="fc1"),
        layers.Dense(10, name="fc2"),
    )


def _bilstm() -> keras.Model:
    return keras.Sequential(
        [
            layers.Input((29, 12)),
            layers.Bidirectional(layers.LSTM(64, return_sequences=True)),
            layers.GlobalAveragePooling1D(),
            layers.Dense(9),
        ]
    )


def _animal_cnn() -> keras.Model:
    body: list[layers.Layer] = []
    for channels in (16, 32, 64):
        body += [layers.Conv2D(channels, 3, padding="same", activation="relu"), layers.MaxPooling2D(2)]
    return _images(*body, layers.Flatten(), layers.Dense(120, activation="relu"), layers.Dense(10))


NETS = {"lenet-300-100": _lenet300100, "lenet5": _lenet5, "bilstm": _bilstm, "animal-cnn": _animal_cnn}


def make(name: str, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    net = NETS[name]()
    net.compile(
        optimizer=keras.optimizers.Adam(),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=False,
    )
    return net


def trainer(
    net: keras.Model, teacher: keras.Model | None = None, temperature: float = 1.0, soft: float = 0.0
) -> Callable[[Any, Any, float], None]:
    """A function that takes one optimizer step (Adam, its state fresh) at a learning rate.

    `soft` is the share that the outputs of a teacher have in the loss.
    """
    for variable in net.optimizer.variables:
        variable.assign(np.zeros(variable.shape, variable.dtype))
    if teacher is not None:
        hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

        def loss(y: Any, outputs: Any) -> Any:
            """Labels stand in the first column of y, the teacher's outputs in the others."""
            wanted = keras.ops.softmax(y[:, 1:] / temperature)
            distilled = keras.losses.categorical_crossentropy(wanted, outputs / temperature, from_logits=True)
            return (1 - soft) * hard(y[:, 0], outputs) + soft * temperature**2 * keras.ops.mean(distilled)

        net.compile(optimizer=net.optimizer, loss=loss, jit_compile=False)

    def step(x: Any, y: Any, learning_rate: float) -> None:
        net.optimizer.learning_rate.assign(learning_rate)
        if teacher is not None:
            y = np.concatenate([y[:, None].astype("float32"), teacher.predict_on_batch(x)], 1)
        net.train_on_batch(x, y)

    return step


def weights(net: keras.Model) -> list[Any]:
    return net.get_weights()


def load(net: keras.Model, state: list[Any]) -> None:
    net.set_weights(state)


def accuracy(net: keras.Model, x: Any, y: Any) -> float:
    return float((net.predict(x.astype("float32"), verbose=0, batch_size=500).argmax(1) == y).mean())
