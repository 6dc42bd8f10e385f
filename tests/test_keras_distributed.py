"""Masks under MirroredStrategy: two logical CPU devices, which a process can only have from its start."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import keras, numpy as np, tensorflow as tf
sys.path.insert(0, {tests!r})
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from keras_nets import check_zeros, images, kept, loss, trained_net
from onnxprune.converters.tensorflow import AGPPruner, LevelPruner, Pruning

strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
x, y = images()

def check_replicas(pruner):
    check_zeros(pruner)
    holds = pruner._holder._holds
    for name, (variable, mask) in kept(pruner).items():
        values = [v.numpy() for v in strategy.experimental_local_results(variable.value)]
        masks = [m.numpy() for m in strategy.experimental_local_results(holds[name].mask)]
        assert len(values) == len(masks) == 2
        assert np.array_equal(values[0], values[1]) and np.array_equal(masks[0], masks[1])
        assert np.array_equal(masks[0], mask) and not values[0][~mask].any()

class Check(keras.callbacks.Callback):
    def __init__(self, pruner):
        super().__init__()
        self.pruner = pruner
    def on_train_batch_end(self, batch, logs=None):
        check_replicas(self.pruner)

def fit(jit, optimizer):
    with strategy.scope():
        model = trained_net()
        model.compile(optimizer(), loss(), jit_compile=jit)
    pruner = AGPPruner([{{"final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2}}])
    pruner(model)
    before = model.layers[1].kernel.numpy()
    model.fit(x, y, batch_size=8, epochs=4, verbose=0, callbacks=[Pruning(pruner), Check(pruner)])
    check_replicas(pruner)
    assert 0.78 < pruner.sparsity < 0.8
    assert (model.layers[1].kernel.numpy() != before).any()
    pruner.remove()

def loop():
    with strategy.scope():
        model, optimizer = trained_net(), keras.optimizers.SGD(0.1, momentum=0.9)
        optimizer.build(model.trainable_variables)
    pruner = LevelPruner([{{"sparsity": 0.5}}])(model)

    @tf.function
    def step(images, labels):
        def replica(images, labels):
            with tf.GradientTape() as tape:
                value = loss()(labels, model(images, training=True)) / 2
            optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        strategy.run(replica, (images, labels))

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
    before = model.layers[1].kernel.numpy()
    for batch in strategy.experimental_distribute_dataset(data):
        step(*batch)
        check_replicas(pruner)
    assert (model.layers[1].kernel.numpy() != before).any()

{calls}
print("held")
"""

CALLS = {
    "fit": "fit(False, lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1))",
    "loop": "loop()",
    "average": "fit(False, lambda: keras.optimizers.SGD(0.1, use_ema=True))",
    "jit auto": "fit('auto', lambda: keras.optimizers.Adam(0.01))",
}


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_replicas_hold_the_same_masks(call):
    script = SCRIPT.format(tests=str(Path(__file__).parent), calls=CALLS[call])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("held")
