"""The same weights in a file, a torch module, a Keras model and a TensorFlow graph: the same masks, to the bit."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from nets import pi
from onnxprune.converters import tensorflow as of_tensorflow
from onnxprune.converters import torch as of_torch
from tf1_nets import session, v1
from torch import nn

import onnxprune

L = keras.layers
KINDS = {"level": "LevelPruner", "agp": "AGPPruner", "sensitivity": "SensitivityPruner"}

ROLES = {  # torch's shape, and Keras' and TensorFlow's axes in torch's order
    "table": ((11, 4), (0, 1)),
    "conv": ((8, 4, 3, 3), (3, 2, 0, 1)),
    "depth": ((16, 1, 3, 3), None),
    "dense": ((12, 16), (1, 0)),
    "last": ((5, 12), (1, 0)),
}
"""Layer -> how its weight lies; a depthwise one is (*kernel, channels, multiplier)."""

CONFIGS = {
    "level": ("level", {"sparsity": 0.55}),
    "half of a tie": ("level", {"sparsity": 0.3}),
    "global": ("level", {"sparsity": 0.6, "allocation": "global"}),
    "blocks": ("level", {"sparsity": 0.5, "pattern": "block:2x1"}),
    "2:4": ("level", {"pattern": "2:4", "op_names": ["last*"]}),
    "agp": ("agp", {"initial_sparsity": 0.2, "final_sparsity": 0.7, "start_epoch": 0, "end_epoch": 4}),
    "sensitivity": ("sensitivity", {"quality": 0.8}),
}


def values() -> dict[str, np.ndarray]:
    """1 and 2 with signs, full of ties, in torch's layout; no two layers alike."""
    return {name: np.roll(pi(*shape), i, -1) for i, (name, (shape, _)) in enumerate(ROLES.items())}


def channels_last(name: str, x: np.ndarray) -> np.ndarray:
    """torch's layout to Keras' and TensorFlow's."""
    if name == "depth":
        return x.reshape(8, 2, 3, 3).transpose(2, 3, 0, 1)
    return x.transpose(np.argsort(ROLES[name][1]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.conv, self.depth = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 16, 3, groups=8)
        self.dense, self.last = nn.Linear(16, 12), nn.Linear(12, 5)
        with torch.no_grad():
            for name, array in values().items():
                getattr(self, name).weight.copy_(torch.from_numpy(array))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depth(self.conv(self.table(x).permute(0, 3, 1, 2)).relu()).mean((2, 3))
        return self.last(self.dense(x).relu())


def keras_net() -> keras.Model:
    keras.utils.clear_session(free_memory=False)
    x = inputs = keras.Input((7, 7), dtype="int32")
    x = L.Conv2D(8, 3, activation="relu", name="conv")(L.Embedding(11, 4, name="table")(x))
    x = L.GlobalAveragePooling2D()(L.DepthwiseConv2D(3, depth_multiplier=2, name="depth")(x))
    model = keras.Model(inputs, L.Dense(5, name="last")(L.Dense(12, activation="relu", name="dense")(x)))
    for name, array in values().items():
        next(v for v in model.get_layer(name).weights if v.ndim > 1).assign(channels_last(name, array))
    return model


def graph_masks(pruner: object, epoch: int | None) -> dict[str, np.ndarray]:
    """The masks of the net as a graph with sessions; without an epoch they form in the first run."""
    with tf.Graph().as_default() as graph:
        w = {
            name: v1.get_variable(name, initializer=np.ascontiguousarray(channels_last(name, array)))
            for name, array in values().items()
        }
        x = v1.placeholder(tf.int32, (None, 7, 7))
        y = tf.nn.relu(tf.nn.conv2d(tf.nn.embedding_lookup(w["table"], x), w["conv"], 1, "VALID"))
        y = tf.reduce_mean(tf.nn.depthwise_conv2d(y, w["depth"], (1, 1, 1, 1), "VALID"), (1, 2))
        y = tf.matmul(tf.nn.relu(tf.matmul(y, w["dense"])), w["last"])
        init = v1.global_variables_initializer()
    pruner(graph)
    with session(graph) as sess:
        sess.run(init)
        if epoch is None:
            sess.run(y, {x: np.zeros((1, 7, 7))})
        else:
            pruner.update_epoch(epoch, sess)
    return dict(pruner.masks)


def in_role_order(masks: dict[str, np.ndarray], last: bool) -> dict[str, np.ndarray]:
    """Masks by layer, in torch's layout."""
    found = {}
    for name, mask in masks.items():
        layer = next(key for key in ROLES if name.startswith(key))
        if last and layer == "depth":
            mask = mask.transpose(2, 3, 0, 1).reshape(ROLES[layer][0])
        elif last:
            mask = mask.transpose(ROLES[layer][1])
        found[layer] = mask
    return found


@pytest.fixture(scope="module")
def files() -> tuple[object, object]:
    """The file that torch exports, and the one that Keras does."""
    of = of_torch.bind(Net(), torch.zeros(1, 7, 7, dtype=torch.int64)).model.to_proto()
    return of, of_tensorflow.bind(keras_net()).pull()


@pytest.mark.parametrize("config", CONFIGS)
def test_masks_are_identical_in_all_four(files, config):
    kind, entry = CONFIGS[config]
    epoch = 2 if kind == "agp" else None
    config = [{"op_types": ["default", "Embedding"], **entry}]
    make = KINDS[kind]
    results = {
        "torch's file": in_role_order(dict(onnxprune.prune(files[0], config, pruner=kind, epoch=epoch).masks), False),
        "Keras' file": in_role_order(dict(onnxprune.prune(files[1], config, pruner=kind, epoch=epoch).masks), True),
    }
    for name, bridge, model, last in (
        ("torch", of_torch, Net(), False),
        ("Keras", of_tensorflow, keras_net(), True),
    ):
        pruner = getattr(bridge, make)(config)(model)
        if epoch is not None:
            pruner.update_epoch(epoch)
        results[name] = in_role_order(dict(pruner.masks), last)
        pruner.remove()
    results["a graph"] = in_role_order(graph_masks(getattr(of_tensorflow, make)(config), epoch), True)
    first = results.pop("torch's file")
    assert len(first) == (1 if "op_names" in entry else len(ROLES))
    assert not any(mask.all() for mask in first.values())
    for name, masks in results.items():
        assert masks.keys() == first.keys(), name
        wrong = [layer for layer in first if not np.array_equal(first[layer], masks[layer])]
        assert not wrong, f"{name}: {wrong}"
