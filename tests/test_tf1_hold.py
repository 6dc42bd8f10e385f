"""Masks held in TensorFlow graphs: the forward pass is masked, and zeros stay through training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from onnxprune.converters.tensorflow import AGP_Pruner, AGPPruner, LevelPruner, SensitivityPruner
from tf1_nets import HALF, OPTIMIZERS, WEIGHTS, masks_hold, net, read, session, v1


def level(values: np.ndarray, sparsity: float, name: str) -> np.ndarray:
    """Level pruning by hand: the smallest of the role order go, the lower index first."""
    order = {"conv/kernel": (3, 2, 0, 1), "fc/kernel": (1, 0)}.get(name)
    role = values.reshape(3, 3, 1, 16).transpose(3, 2, 0, 1) if order is None else values.transpose(order)
    keep = np.ones(role.size, bool)
    keep[np.argsort(np.abs(role).reshape(-1), kind="stable")[: int(role.size * sparsity)]] = False
    keep = keep.reshape(role.shape)
    if order is None:
        return keep.transpose(2, 3, 1, 0).reshape(values.shape)
    return keep.transpose(np.argsort(order))


def logits_of(values: dict[str, np.ndarray]) -> np.ndarray:
    """The net's output with these values, in a graph of its own that nobody prunes."""
    plain = net()
    init = plain.init()
    with session(plain.graph) as sess:
        sess.run(init)
        for variable in plain.graph.get_collection("variables"):
            variable.load(values[variable.op.name], sess)
        return np.asarray(sess.run(plain.logits, plain.feed()))


TABLE = [(name, when, ref) for name in OPTIMIZERS for when in ("before", "after") for ref in (False, True)]
QUICK = {("momentum", "before", False), ("adam", "after", False), ("adam", "before", True), ("rmsprop", "after", True)}


@pytest.mark.parametrize(
    ("optimizer", "when", "ref"),
    [
        pytest.param(
            *row,
            id=f"{row[0]}-{row[1]}-{'ref' if row[2] else 'resource'}",
            marks=() if row in QUICK else pytest.mark.slow,
        )
        for row in TABLE
    ],
)
@pytest.mark.parametrize("step", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["counter", "no counter"])
def test_zeros_stay(optimizer: str, when: str, ref: bool, step: bool) -> None:
    built = net(ref=ref)
    train = built.train(optimizer, step=step) if when == "before" else None
    init = built.init() if when == "before" else None
    pruner = LevelPruner(HALF)
    pruner(built.graph)
    train = built.train(optimizer, step=step) if train is None else train
    init = built.init() if init is None else init
    names = [v.op.name for v in built.graph.get_collection("variables")]
    assert not [n for n in names if "onnxprune" in n]
    with session(built.graph) as sess:
        sess.run(init)
        before = read(sess)
        assert not pruner.masks
        logits = sess.run(built.logits, built.feed())
        for name in WEIGHTS:
            np.testing.assert_array_equal(pruner.masks[name], level(before[name], 0.5, name))
        formed = dict(pruner.masks)
        np.testing.assert_allclose(logits, logits_of(before | {n: before[n] * formed[n] for n in WEIGHTS}), atol=1e-6)
        losses = []
        for _ in range(4):
            losses.append(sess.run([train, built.loss], built.feed())[1])
            masks_hold(pruner, read(sess), dense=WEIGHTS if optimizer == "ftrl" else ())
        assert losses[-1] < losses[0]
        assert all(np.array_equal(formed[n], pruner.masks[n]) for n in WEIGHTS), "the masks of a level stay"
        assert (sess.graph.get_collection("global_step") == []) or sess.run(
            v1.train.get_global_step(built.graph)
        ) == 4 * step


@pytest.mark.parametrize("ref", [False, True], ids=["resource", "ref"])
def test_every_update_waits_for_the_masks_to_form(ref: bool) -> None:
    """Otherwise it is a race that values before the first step nearly always win."""
    built = net(ref=ref)
    built.train("momentum")
    pruner = LevelPruner(HALF)
    pruner(built.graph)
    updates = [
        op for op in built.graph.get_operations() if "ApplyMomentum" in op.type and op.inputs[0].op.name in WEIGHTS
    ]
    assert len(updates) == len(WEIGHTS)
    for op in updates:
        assert [c.name for c in op.control_inputs if c.name.startswith("onnxprune/form")], op.name


def test_what_training_adds_gives_no_weight_a_role() -> None:
    """The gradient of a convolution is a transposed one."""
    built = net()
    built.train("sgd")
    weights = {w.name: w for w in LevelPruner(HALF)(built.graph).weights}
    assert {n: w.op_types for n, w in weights.items()} == {
        "conv/kernel": ("Conv", "Conv2D"),
        "dw/kernel": ("Conv", "DepthwiseConv2dNative"),
        "fc/kernel": ("MatMul",),
    }
    assert weights["conv/kernel"].names == {"conv/kernel", "conv/kernel:0", "conv", "conv/Conv2D"}


@pytest.mark.parametrize(
    ("entry", "pruned"),
    [
        ({"op_types": ["Conv2D"]}, {"conv/kernel"}),
        ({"op_types": ["Conv"]}, {"conv/kernel", "dw/kernel"}),
        ({"op_names": ["fc"]}, {"fc/kernel"}),
        ({"op_names": ["*/kernel:0"], "op_types": ["default"]}, set(WEIGHTS)),
        ({"op_names": ["conv/Conv2D"]}, {"conv/kernel"}),
    ],
    ids=str,
)
def test_weights_are_named_as_in_the_graph(entry: dict[str, Any], pruned: set[str]) -> None:
    built = net()
    init = built.init()
    pruner = LevelPruner([{"sparsity": 0.5, **entry}])
    pruner(built.graph)
    with session(built.graph) as sess:
        sess.run(init)
        sess.run(built.logits, built.feed())
    assert set(pruner.masks) == pruned


def test_the_first_run_may_be_a_step_whose_gradient_never_sees_the_forward_pass() -> None:
    for ref in (False, True):
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, (4, 10))
            w = v1.get_variable("w", (10, 10), use_resource=not ref)
            train = v1.train.MomentumOptimizer(100.0, 0.9).minimize(tf.reduce_sum(tf.matmul(x, w)))
            init = v1.global_variables_initializer()
        pruner = LevelPruner(HALF)
        pruner(graph)
        with session(graph) as sess:
            sess.run(init)
            expected = level(sess.run(w), 0.5, "fc/kernel")
            sess.run(train, {x: np.ones((4, 10), "f4")})
            np.testing.assert_array_equal(pruner.masks["w"], expected)
            masks_hold(pruner, read(sess))


def test_nni_ten_by_ten() -> None:
    """NNI's published case: W[j][i] = i + 0.1 j, 90 % pruned, fed with ones: the ten largest sum to 94.5."""
    with tf.Graph().as_default() as graph:
        w = v1.get_variable("w", initializer=np.array([[i + 0.1 * j for i in range(10)] for j in range(10)], "f4"))
        x = v1.placeholder(tf.float32, (1, 10))
        y = tf.reduce_sum(tf.matmul(x, w))
        LevelPruner([{"sparsity": 0.9, "op_types": "default"}])(v1.get_default_graph())
        with v1.Session() as sess:
            sess.run(v1.global_variables_initializer())
            assert sess.run(y, {x: np.ones((1, 10), "f4")}) == pytest.approx(94.5, abs=1e-4)
        assert graph is v1.get_default_graph()


@pytest.mark.parametrize("first", ["train", "update"])
def test_nni_documentation(first: str) -> None:
    """As it is typed there; the loop in its second order is as valid, and prunes before it trains."""
    built = net()
    with built.graph.as_default():
        train_op = v1.train.AdamOptimizer(0.01).minimize(built.loss)

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
        pruner = AGP_Pruner(config_list)
        pruner(tf.compat.v1.get_default_graph())
        sparsities = []
        with v1.Session() as sess:
            sess.run(v1.global_variables_initializer())
            for epoch in range(1, 11):
                if first == "update":
                    pruner.update_epoch(epoch, sess)
                for _ in range(2):
                    sess.run(train_op, built.feed())
                if first == "train":
                    pruner.update_epoch(epoch, sess)
                sparsities.append(pruner.sparsity)
            values = read(sess)
    masks_hold(pruner, values)
    assert sparsities == sorted(sparsities)
    assert sparsities[0] == 0
    assert sparsities[-1] == pytest.approx(0.8, abs=0.001)
    assert len(set(sparsities)) == 10
    zeros = sum(np.count_nonzero(values[n] == 0) for n in WEIGHTS)
    assert zeros == pruner.report.zeros == sum(int(values[n].size * 0.8) for n in WEIGHTS)


def test_a_schedule_is_moved_in_a_finalised_graph(tmp_path: Path) -> None:
    built = net()
    train = built.train("momentum")
    pruner = AGPPruner([{"final_sparsity": 0.8, "start_epoch": 0, "end_epoch": 2}])
    pruner(built.graph)
    with built.graph.as_default():
        sess = v1.train.MonitoredTrainingSession(
            checkpoint_dir=str(tmp_path), save_checkpoint_secs=None, save_checkpoint_steps=2
        )
        with sess:
            for epoch in range(4):
                pruner.update_epoch(epoch, sess)
                sess.run(train, built.feed())
            values = {n: sess.run(f"{n}/Read/ReadVariableOp:0") for n in WEIGHTS}
            written = pruner.export(tmp_path / "net.onnx", sess=sess, outputs="logits")
    masks_hold(pruner, values)
    assert pruner.sparsity == pytest.approx(0.8, abs=0.001)
    assert written.sparsity == pruner.sparsity


def test_sensitivity_prunes_by_the_spread_of_the_values() -> None:
    built = net()
    pruner = SensitivityPruner([{"quality": 0.7}])
    pruner(built.graph)
    init = built.init()
    with session(built.graph) as sess:
        sess.run(init)
        sess.run(built.logits, built.feed())
        values = read(sess)
    for name in WEIGHTS:
        np.testing.assert_array_equal(
            pruner.masks[name], np.abs(values[name]) >= 0.7 * np.std(values[name].astype("f8"))
        )


@pytest.mark.parametrize("ref", [False, True], ids=["resource", "ref"])
def test_frozen_variables_are_pruned_as_well_and_several_optimizers_hold(ref: bool) -> None:
    for when in ("before", "after"):
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, (None, 12))
            a = v1.get_variable("a", (12, 8), trainable=False, use_resource=not ref)
            b, c = (v1.get_variable(n, s, use_resource=not ref) for n, s in (("b", (8, 8)), ("c", (8, 4))))
            loss = tf.reduce_mean(tf.square(tf.matmul(tf.matmul(tf.matmul(x, a), b), c) - 1))

            def training(loss: Any = loss, b: Any = b, c: Any = c) -> Any:
                one = v1.train.MomentumOptimizer(0.1, 0.9).minimize(loss, var_list=[b])
                return [one, v1.train.AdamOptimizer(0.01).minimize(loss, var_list=[c])]

            train = training() if when == "before" else None
            pruner = LevelPruner(HALF)
            pruner(graph)
            train = train or training()
            init = v1.global_variables_initializer()
        with session(graph) as sess:
            sess.run(init)
            frozen = sess.run(a)
            for _ in range(3):
                sess.run(train, {x: np.random.default_rng(0).normal(size=(8, 12))})
                masks_hold(pruner, read(sess))
            assert set(pruner.masks) == {"a", "b", "c"}
            assert np.array_equal(read(sess)["a"], frozen * pruner.masks["a"])


@pytest.mark.parametrize("ref", [False, True], ids=["resource", "ref"])
def test_a_run_without_training_leaves_the_zeros_in_the_variables(ref: bool, tmp_path: Path) -> None:
    """So that a checkpoint holds what the forward pass computed with."""
    built = net(ref=ref)
    init = built.init()
    pruner = LevelPruner(HALF)
    pruner(built.graph)
    with built.graph.as_default():
        saver = v1.train.Saver()
    with session(built.graph) as sess:
        sess.run(init)
        for _ in range(2):
            logits = sess.run(built.logits, built.feed())
            masks_hold(pruner, read(sess))
        path = saver.save(sess, str(tmp_path / "model"), write_meta_graph=False)
    saved = tf.train.load_checkpoint(path)
    values = {name: saved.get_tensor(name) for name, _ in tf.train.list_variables(path)}
    masks_hold(pruner, values)
    np.testing.assert_allclose(logits, logits_of(values), atol=1e-6)


def test_gradients_clipped_accumulated_and_a_user_constraint() -> None:
    """Optimizers are driven by hand; a constraint of the user's own is applied first."""
    for when in ("before", "after"):
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, (None, 12))
            w = v1.get_variable("w", (12, 6), constraint=lambda v: tf.clip_by_norm(v, 1.0, axes=[0]))
            sums = v1.get_variable("sums", (12, 6), initializer=v1.zeros_initializer(), trainable=False)
            loss = tf.reduce_mean(tf.square(tf.matmul(x, w) - 1))

            def training(loss: Any = loss, w: Any = w, sums: Any = sums) -> tuple[Any, Any]:
                optimizer = v1.train.MomentumOptimizer(0.5, 0.9)
                clipped, _ = tf.clip_by_global_norm([g for g, _ in optimizer.compute_gradients(loss, [w])], 1.0)
                return sums.assign_add(clipped[0]), optimizer.apply_gradients([(sums.read_value(), w)])

            ops = training() if when == "before" else None
            pruner = LevelPruner(HALF)
            pruner(graph)
            accumulate, train = ops or training()
            init = v1.global_variables_initializer()
        with session(graph) as sess:
            sess.run(init)
            for _ in range(3):
                for _ in range(2):
                    sess.run(accumulate, {x: np.random.default_rng(0).normal(size=(8, 12))})
                sess.run(train)
                value = sess.run(w)
                masks_hold(pruner, {"w": value})
                assert np.linalg.norm(value, axis=0).max() <= 1 + 1e-6


@pytest.mark.parametrize("ref", [False, True], ids=["resource", "ref"])
def test_steps_written_by_hand_are_held(ref: bool) -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 12))
        a, b, c = (v1.get_variable(n, (12, 6), use_resource=not ref) for n in "abc")
        loss = tf.reduce_mean(sum(tf.square(tf.matmul(x, w) - 1) for w in (a, b, c)))
        ga, gb, gc = tf.gradients(loss, [a, b, c])
        steps = [
            a.assign_sub(0.1 * ga),
            b.assign(b - 0.1 * gb),
            v1.scatter_sub(c, [0, 1, 2], 0.1 * tf.gather(gc, [0, 1, 2])),
        ]
        init = v1.global_variables_initializer()
    pruner = LevelPruner(HALF)
    pruner(graph)
    with session(graph) as sess:
        sess.run(init)
        for _ in range(2):
            sess.run([*steps, loss], {x: np.random.default_rng(0).normal(size=(8, 12))})
        values = read(sess)
        for name in "abc":
            assert not values[name][~pruner.masks[name]].any(), name


def test_an_embedding_is_masked_when_named() -> None:
    config = [{"sparsity": 0.5, "op_types": ["Embedding"]}]
    for ref in (False, True):
        for when in ("before", "after"):
            with tf.Graph().as_default() as graph:
                ids = v1.placeholder(tf.int32, (None, 3))
                table = v1.get_variable("table", (20, 4), use_resource=not ref)
                rows = tf.nn.embedding_lookup(table, ids)
                loss = tf.reduce_mean(tf.square(rows - 1))
                make = lambda loss=loss: v1.train.AdamOptimizer(0.1).minimize(loss)  # noqa: E731
                train = make() if when == "before" else None
                pruner = LevelPruner(config)
                pruner(graph)
                train = make() if train is None else train
                init = v1.global_variables_initializer()
            with session(graph) as sess:
                sess.run(init)
                dense = sess.run(table)
                feed = {ids: np.arange(18).reshape(6, 3)}
                got = sess.run(rows, feed)
                np.testing.assert_array_equal(got, (dense * pruner.masks["table"])[feed[ids]])
                for _ in range(3):
                    sess.run(train, feed)
                    masks_hold(pruner, {"table": sess.run(table)})


def test_a_weight_read_outside_an_old_loop_is_masked_inside() -> None:
    second = v1.control_flow_v2_enabled()
    v1.disable_control_flow_v2()
    try:
        with tf.Graph().as_default() as graph:
            x = v1.placeholder(tf.float32, (2, 6))
            w = v1.get_variable("w", (6, 6), use_resource=False)
            y = v1.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.matmul(h, w)), (0, x))[1]
            train = v1.train.MomentumOptimizer(0.1, 0.9).minimize(tf.reduce_sum(tf.square(y)))
            init = v1.global_variables_initializer()
        pruner = LevelPruner(HALF)
        pruner(graph)
    finally:
        if second:
            v1.enable_control_flow_v2()
    with session(graph) as sess:
        sess.run(init)
        dense, fed = sess.run(w), np.ones((2, 6), "f4")
        got = sess.run(y, {x: fed})
        kept = dense * pruner.masks["w"]
        np.testing.assert_allclose(got, fed @ kept @ kept @ kept, rtol=1e-5)
        sess.run(train, {x: fed})
        masks_hold(pruner, {"w": sess.run(w)})


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["test_tf1_hold.py", "test_tf1_sessions.py", "test_tf1_masks.py", "test_tf1_export.py"]
)
def test_without_the_second_version_of_tensorflow(file: str) -> None:
    """The same tests under disable_v2_behavior: other variables, other control flow, no eager execution."""
    run = (
        "import sys, pytest, tensorflow as tf; tf.compat.v1.disable_v2_behavior(); sys.exit(pytest.main(sys.argv[1:]))"
    )
    path = Path(__file__).parent / file
    command = [sys.executable, "-c", run, "-q", "-m", "not slow", "-p", "no:cacheprovider", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=path.parent.parent, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_schedule_counted_in_steps() -> None:
    built = net()
    train, init = built.train("sgd"), built.init()
    pruner = AGPPruner([{"final_sparsity": 0.6, "start_step": 2, "end_step": 6, "frequency": 2}])
    pruner(built.graph)
    sparsities = []
    with session(built.graph) as sess:
        sess.run(init)
        for _ in range(8):
            sess.run(train, built.feed())
            pruner.step(sess=sess)
            sparsities.append(round(pruner.sparsity, 3))
        masks_hold(pruner, read(sess))
    assert sparsities == pytest.approx([0, 0, 0, 0.525, 0.525, 0.6, 0.6, 0.6], abs=0.002)


def test_values_without_meaning_are_refused_by_name() -> None:
    with tf.Graph().as_default() as graph:
        w = v1.get_variable("w", initializer=np.full((3, 3), np.nan, "f4"))
        y = tf.matmul(tf.ones((1, 3)), w)
        init = v1.global_variables_initializer()
    pruner = LevelPruner(HALF)
    pruner(graph)
    with session(graph) as sess:
        sess.run(init)
        with pytest.raises(tf.errors.OpError, match=r"PruneError: weight 'w' \[3, 3\] .* 9 entries that are NaN"):
            sess.run(y)
        w.load(np.arange(9, dtype="f4").reshape(3, 3), sess)
        assert sess.run(y).tolist() == [[6, 7 + 4, 8 + 5]]
