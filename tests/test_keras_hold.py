"""Masks held in Keras while it trains: exact zeros after every step, whoever takes it."""

from __future__ import annotations

import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_nets import L, chain, check_zeros, images, kept, loss, trained_net
from onnxprune.converters.tensorflow import AGP_Pruner, AGPPruner, LevelPruner, Pruning

from onnxprune import PruneError

HALF = [{"sparsity": 0.5}]
RISING = [{"final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 3}]


@pytest.fixture(autouse=True)
def _fresh_names():
    keras.utils.clear_session(free_memory=False)


class Check(keras.callbacks.Callback):
    """After every batch: pruned entries are zero, and the others move."""

    def __init__(self, pruner):
        super().__init__()
        self.pruner, self.batches = pruner, 0

    def on_train_begin(self, logs=None):
        self.start = {name: variable.numpy() for name, (variable, _) in kept(self.pruner).items()}

    def on_train_batch_end(self, batch, logs=None):
        check_zeros(self.pruner)
        self.batches += 1

    def on_train_end(self, logs=None):
        check_zeros(self.pruner)
        moved = [(v.numpy() != self.start[name])[mask] for name, (v, mask) in kept(self.pruner).items()]
        assert np.concatenate(moved).mean() > 0.9


OPTIMIZERS = {
    "sgd": lambda **k: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, **k),
    "adam": lambda **k: keras.optimizers.Adam(0.01, **k),
    "adamw": lambda **k: keras.optimizers.AdamW(0.01, weight_decay=0.1, **k),
    "rmsprop": lambda **k: keras.optimizers.RMSprop(0.01, **k),
}
EXTRAS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "clipping": {"clipnorm": 1.0},
    "average": {"use_ema": True, "ema_overwrite_frequency": 2},
    "average at the end": {"use_ema": True},
}


def check_fit(optimizer, jit) -> None:
    model = trained_net()
    model.compile(optimizer, loss(), jit_compile=jit)
    pruner = LevelPruner(HALF)(model)
    check = Check(pruner)
    model.fit(*images(), batch_size=8, epochs=1, verbose=0, callbacks=[check])
    compiled = model.train_function
    state = pruner.state_dict()
    rng = np.random.default_rng(1)
    state["masks"] = {name: mask & (rng.random(mask.shape) < 0.5) for name, mask in state["masks"].items()}
    pruner.load_state_dict(state)  # other masks: seen by the function that is compiled
    check_zeros(pruner)
    model.fit(*images(), batch_size=8, epochs=1, verbose=0, callbacks=[check])
    assert model.train_function is compiled
    assert check.batches == 8
    assert pruner.sparsity > 0.7


@pytest.mark.parametrize(
    ("optimizer", "extra", "jit"),
    [
        ("adamw", "plain", True),
        ("sgd", "average", False),
        pytest.param("adam", "average at the end", False, marks=pytest.mark.slow),
        ("adam", "accumulation", False),
        pytest.param("rmsprop", "clipping", False, marks=pytest.mark.slow),
    ],
)
def test_fit(optimizer, extra, jit):
    check_fit(OPTIMIZERS[optimizer](**EXTRAS[extra]), jit)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fit_everything(optimizer, extra, jit):
    check_fit(OPTIMIZERS[optimizer](**EXTRAS[extra]), jit)


def check_loop(wrap, raw: bool = False, applying: str = "apply") -> None:
    model = trained_net()
    pruner = LevelPruner(HALF)(model)
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    variables = [v.value for v in model.trainable_variables] if raw else model.trainable_variables
    optimizer.build(variables)

    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss()(y, model(x, training=True))
        gradients = tape.gradient(value, variables)
        if applying == "apply":
            optimizer.apply(gradients, variables)
        else:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))

    step = wrap(step)
    x, y = images()
    before = model.layers[1].kernel.numpy()
    for _ in range(3):
        step(tf.constant(x[:8]), tf.constant(y[:8]))
        check_zeros(pruner)
    assert (model.layers[1].kernel.numpy() != before).mean() > 0.4


LOOPS = {
    "eager": lambda step: step,
    "function": tf.function,
    "compiled": lambda step: tf.function(step, jit_compile=True),
}


@pytest.mark.parametrize("wrap", LOOPS)
def test_loops_of_ones_own(wrap):
    check_loop(LOOPS[wrap])


@pytest.mark.parametrize("wrap", ["eager", "function", pytest.param("compiled", marks=pytest.mark.slow)])
def test_loops_over_plain_tensorflow_variables(wrap):
    check_loop(LOOPS[wrap], raw=True, applying="apply_gradients")


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_half_precision(jit):
    keras.mixed_precision.set_global_policy("mixed_float16")
    try:
        check_fit(keras.optimizers.SGD(0.01, use_ema=True), jit)  # inside a LossScaleOptimizer
    finally:
        keras.mixed_precision.set_global_policy("float32")


def test_a_model_that_was_trained_before():
    model = trained_net()
    model.compile("adam", loss(), jit_compile=False)
    model.fit(*images(), verbose=0)
    pruner = LevelPruner(HALF)(model)
    model.fit(*images(), verbose=0, callbacks=[Check(pruner)])


def test_masks_appear_in_the_middle_of_training():
    model = trained_net()
    model.compile("adam", loss(), jit_compile=False)

    class Late(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.pruner = LevelPruner(HALF)(model)

        def on_train_batch_end(self, batch, logs=None):
            if hasattr(self, "pruner"):
                check_zeros(self.pruner)

    model.fit(*images(), epochs=2, verbose=0, callbacks=[Late()])


def test_a_constraint_of_the_users_own_stays():
    model = trained_net(kernel_constraint=keras.constraints.MaxNorm(0.3))
    kernel = model.layers[1].kernel
    own = kernel.constraint
    pruner = LevelPruner(HALF)(model)
    model.compile(keras.optimizers.SGD(2.0), loss(), jit_compile=False)
    model.fit(*images(), verbose=0, epochs=2)
    check_zeros(pruner)
    assert (np.sqrt((kernel.numpy() ** 2).sum(0)) <= 0.3001).all()
    pruner.remove()
    assert kernel.constraint is own


def test_not_a_number_and_minus_zero_become_zero():
    model = chain((4,), L.Dense(6))
    pruner = LevelPruner(HALF)(model)
    kernel, mask = next(iter(kept(pruner).values()))
    kernel.assign(kernel.constraint(tf.constant(np.where(mask, -3.0, np.nan), tf.float32)))
    check_zeros(pruner)
    kernel.assign(kernel.constraint(tf.constant(np.where(mask, -3.0, -1.0), tf.float32)))
    check_zeros(pruner)


def test_what_escapes_is_said_and_zeroed_again():
    model = trained_net()
    pruner = AGPPruner(RISING)(model)
    for epoch in range(1, 4):
        pruner.update_epoch(epoch)
    model.layers[1].kernel.assign(np.ones((3, 3, 3, 6)))
    with pytest.warns(UserWarning, match="'conv2d/kernel' were no longer zero"):
        pruner.update_epoch(4)
    check_zeros(pruner)


def test_a_function_traced_before_the_call_is_noticed():
    model = trained_net()
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            value = loss()(y, model(x, training=True))
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)

    x, y = images()
    step(tf.constant(x), tf.constant(y))
    pruner = LevelPruner(HALF)(model)
    step(tf.constant(x), tf.constant(y))
    with pytest.warns(UserWarning, match="trace it again"):
        pruner.update_epoch(1)
    check_zeros(pruner)


def test_remove_leaves_a_plain_model_with_zeros():
    model = trained_net()
    model.compile("adam", loss(), jit_compile=False)
    pruner = LevelPruner(HALF)(model)
    model.fit(*images(), verbose=0)
    old = model.train_function
    zeros = {name: variable.numpy() == 0 for name, (variable, _) in kept(pruner).items()}
    report = pruner.report
    pruner.remove()
    assert pruner.report == report
    assert all(v.constraint is None and v.value.constraint is None for v in model.weights)
    assert all((variable.numpy() == 0)[zeros[name]].all() for name, (variable, _) in kept(pruner).items())
    pruner.update_epoch(3)
    model.fit(*images(), verbose=0, epochs=2)
    assert all((variable.numpy() != 0).mean() > 0.9 for variable, _ in kept(pruner).values())
    model.train_function = old  # a function that was traced with the masks holds nothing either
    model.fit(*images(), verbose=0)
    assert all((variable.numpy() != 0).mean() > 0.9 for variable, _ in kept(pruner).values())


def test_frozen_layers_are_pruned_once_and_held_when_they_thaw():
    model = trained_net()
    model.layers[1].trainable = False
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), loss(), jit_compile=False)
    pruner = LevelPruner(HALF)(model)
    check_zeros(pruner)
    frozen = model.layers[1].kernel.numpy()
    model.fit(*images(), verbose=0)
    assert np.array_equal(model.layers[1].kernel.numpy(), frozen)
    model.layers[1].trainable = True
    model.compile(keras.optimizers.AdamW(0.01, weight_decay=0.1), loss(), jit_compile=False)
    model.fit(*images(), verbose=0, callbacks=[Check(pruner)])
    assert (model.layers[1].kernel.numpy() != frozen).mean() > 0.4


def test_a_layer_that_is_used_twice_and_an_embedding():
    table, dense, x = L.Embedding(11, 5), L.Dense(5), keras.Input((7,), dtype="int32")
    model = keras.Model(x, L.Dense(4)(L.GlobalAveragePooling1D()(dense(L.ReLU()(dense(table(x)))))))
    model.compile(keras.optimizers.Adam(0.01), loss(), jit_compile=False)
    pruner = LevelPruner([{"sparsity": 0.5, "op_types": ["default", "Embedding"]}])(model)
    assert len(pruner.masks) == 3
    tokens = np.random.default_rng(0).integers(0, 11, (32, 7))
    model.fit(tokens, images()[1], batch_size=8, verbose=0, callbacks=[Check(pruner)])


def test_two_optimizers_in_a_loop_of_ones_own():
    model = trained_net()
    pruner = LevelPruner(HALF)(model)
    halves = model.trainable_variables[:2], model.trainable_variables[2:]
    optimizers = keras.optimizers.SGD(0.1, momentum=0.9), keras.optimizers.AdamW(0.01, weight_decay=0.1)
    x, y = images()
    before = [v.numpy() for v in model.trainable_variables]
    for _ in range(3):
        with tf.GradientTape() as tape:
            value = loss()(y, model(x, training=True))
        gradients = tape.gradient(value, model.trainable_variables)
        for optimizer, chosen, part in zip(optimizers, halves, (gradients[:2], gradients[2:]), strict=True):
            optimizer.apply([tf.clip_by_norm(g, 1.0) for g in part], chosen)
        check_zeros(pruner)
    assert all((v.numpy() != b).any() for v, b in zip(model.trainable_variables, before, strict=True))


def test_two_pruners_on_one_model():
    model = trained_net()
    first = LevelPruner([{"sparsity": 0.5, "op_types": ["Dense"]}])(model)
    second = LevelPruner([{"sparsity": 0.7, "op_types": ["Dense"]}])(model)
    model.compile("adam", loss(), jit_compile=False)
    model.fit(*images(), verbose=0)
    check_zeros(second)
    first.remove()
    model.fit(*images(), verbose=0)
    check_zeros(second)


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_the_model_is_not_kept_alive_or_changed(tmp_path):
    model = trained_net()
    model.compile("adam", loss(), jit_compile=False)
    paths = [v.path for v in model.weights]
    config, layers = model.to_json(), [layer.name for layer in model.layers]
    pruner = LevelPruner(HALF)(model)
    model.fit(*images(), verbose=0)
    assert [v.path for v in model.weights] == paths
    assert model.to_json() == config
    assert [layer.name for layer in model.layers] == layers
    copy = keras.models.clone_model(model)
    assert all(v.constraint is None for v in copy.weights)
    model.save_weights(tmp_path / "held.weights.h5")
    keras.utils.clear_session(free_memory=False)
    plain = trained_net()
    plain.compile("adam", loss(), jit_compile=False)
    plain.fit(*images(), verbose=0)
    saved = [
        [name for name, _ in tf.train.list_variables(tf.train.Checkpoint(model=m).save(str(tmp_path / str(i))))]
        for i, m in enumerate((model, plain))
    ]
    assert saved[0] == saved[1]
    pruner.remove()
    reference = weakref.ref(model)
    del model, pruner, copy
    gc.collect()
    assert reference() is None


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
def test_saved_and_loaded(tmp_path):
    model = trained_net()
    model.compile("adam", loss(), jit_compile=False)
    LevelPruner(HALF)(model)
    model.fit(*images(), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for a, b in zip(model.weights, loaded.weights, strict=True):
        assert np.array_equal(a.numpy(), b.numpy())
        assert a.path == b.path
        assert b.constraint is None


@pytest.mark.parametrize("average", [False, True])
def test_callback(average):
    model = trained_net()
    model.compile(keras.optimizers.Adam(use_ema=average), loss(), jit_compile=False)
    pruner = AGPPruner([{"final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 5}])
    history = model.fit(*images(), epochs=5, verbose=0, callbacks=[Pruning(pruner)]).history
    check_zeros(pruner)  # where the average replaces the weights at the very end as well
    expected = [0.8 - 0.8 * (1 - k / 4) ** 3 for k in range(5)]
    assert history["sparsity"] == pytest.approx(expected, abs=0.01)


def test_callback_is_the_loop_of_the_documentation():
    config = [{"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 10, "frequency": 1}]
    data = {"batch_size": 16, "shuffle": False, "verbose": 0}
    nets, pruners, reached = [], [AGPPruner(config), AGPPruner(config)], []
    for _ in range(2):
        keras.utils.clear_session(free_memory=False)
        nets.append(trained_net())
        nets[-1].compile(keras.optimizers.SGD(0.05, momentum=0.9), loss(), jit_compile=False)
    history = nets[0].fit(*images(), epochs=10, callbacks=[Pruning(pruners[0])], **data).history
    pruners[1](nets[1])
    for epoch in range(1, 11):
        nets[1].fit(*images(), epochs=1, **data)
        pruners[1].update_epoch(epoch)
        reached.append(pruners[1].sparsity)
    assert history["sparsity"] == reached
    assert reached[0] == 0
    assert reached[-1] == pytest.approx(0.8, abs=0.002)
    assert [row.zeros for row in pruners[0].report.rows] == [int(row.size * 0.8) for row in pruners[0].report.rows]
    assert pruners[0].masks == pruners[1].masks
    assert all(np.array_equal(a, b) for a, b in zip(nets[0].get_weights(), nets[1].get_weights(), strict=True))


def test_the_code_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keras_model = trained_net()
    keras_model.compile(keras.optimizers.AdamW(0.01), loss(), jit_compile=False)
    example_inputs = images()[0][:4]
    train = lambda model: model.fit(*images(), batch_size=16, verbose=0)  # noqa: E731

    config_list = [
        {
            "initial_sparsity": 0,
            "final_sparsity": 0.8,
            "start_epoch": 1,
            "end_epoch": 10,
            "frequency": 1,
            "op_types": "default",
        }
    ]
    pruner = AGPPruner(config_list)
    pruner(keras_model)
    reached = []
    for epoch in range(1, 11):
        train(keras_model)
        pruner.update_epoch(epoch)
        reached.append(pruner.sparsity)
    exported = pruner.export("pruned.onnx", example_inputs)

    expected = [0.8 - 0.8 * (1 - (epoch - 1) / 9) ** 3 for epoch in range(1, 11)]
    assert reached == pytest.approx(expected, abs=0.01)
    check_zeros(pruner)
    assert exported.zeros == sum(row.zeros for row in pruner.report.rows)
    assert AGP_Pruner is AGPPruner


def test_callback_validates_the_pruned_model():
    model = trained_net()
    model.compile(keras.optimizers.SGD(0.05), loss(), jit_compile=False)
    pruner = AGPPruner([{"final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2}])
    x, y = images()
    history = model.fit(x, y, epochs=2, verbose=0, validation_data=(x, y), callbacks=[Pruning(pruner)]).history
    assert model.evaluate(x, y, verbose=0) == pytest.approx(history["val_loss"][-1])
    assert pruner.clock.epoch == 2


@pytest.mark.parametrize(("accumulation", "execution"), [(2, 1), (None, 2)])
def test_callback_counts_optimizer_steps(accumulation, execution):
    model = trained_net()
    optimizer = keras.optimizers.Adam(0.01, gradient_accumulation_steps=accumulation)
    model.compile(optimizer, loss(), steps_per_execution=execution, jit_compile=False)
    pruner = AGPPruner([{"final_sparsity": 0.8, "start_step": 0, "end_step": 100}])
    model.fit(*images(), epochs=2, batch_size=8, verbose=0, callbacks=[Pruning(pruner)])
    assert pruner.clock.step == (4 if accumulation else 8)
    assert pruner.clock.epoch == 2
    assert 0 < pruner.sparsity < 0.8
    check_zeros(pruner)


@pytest.mark.parametrize("jit", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_interrupted_training_gives_the_same_masks(jit):
    config = [{"final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 4}]

    def training(model, pruner, first, last):
        model.fit(
            *images(),
            initial_epoch=first,
            epochs=last,
            batch_size=8,
            shuffle=False,
            verbose=0,
            callbacks=[Pruning(pruner)],
        )

    def built():
        keras.utils.clear_session(free_memory=False)
        model = trained_net()
        model.compile(keras.optimizers.SGD(0.05), loss(), jit_compile=jit)
        return model

    whole, straight = built(), AGPPruner(config)
    training(whole, straight, 0, 5)
    half, before = built(), AGPPruner(config)
    training(half, before, 0, 2)
    state, weights = before.state_dict(), half.get_weights()
    rest, after = built(), AGPPruner(config)
    rest.set_weights(weights)
    after.load_state_dict(state)
    after(rest)
    training(rest, after, 2, 5)
    assert 0.3 < before.sparsity < straight.sparsity
    assert after.masks == straight.masks
    assert all(np.array_equal(a, b) for a, b in zip(whole.get_weights(), rest.get_weights(), strict=True))


def test_masks_loaded_into_another_model_are_refused():
    state = LevelPruner(HALF)(chain((4,), L.Dense(6, name="a"))).state_dict()
    other = LevelPruner(HALF)
    other.load_state_dict(state)
    with pytest.raises(PruneError, match=r"'a/kernel' has the shape \[4, 6\], but the weight .*\[5, 6\]"):
        other(chain((5,), L.Dense(6, name="a")))


def test_published_cases():
    """NNI's: W[j][i] = i + 0.1 j of 10 by 10, at 0.9, fed with ones, sums to 94.5."""
    model = chain((10,), L.Dense(10, use_bias=False))
    model.layers[1].kernel.assign(np.arange(10)[None, :] + 0.1 * np.arange(10)[:, None])
    LevelPruner([{"sparsity": 0.9, "op_types": "default"}])(model)
    assert float(tf.reduce_sum(model(np.ones((1, 10))))) == pytest.approx(94.5)
    net = chain((8, 8, 1), L.Conv2D(4, 3), L.Flatten(), L.Dense(10))
    net.compile("sgd", loss(), jit_compile=False)
    pruner = LevelPruner([{"sparsity": 0.5, "op_types": ["default"]}])(net)
    x, y = images()
    net.fit(x[..., :1], y, verbose=0)
    for variable, _ in kept(pruner).values():
        zeros = int((variable.numpy() == 0).sum())
        assert abs(zeros - variable.numpy().size * 0.5) <= 1
