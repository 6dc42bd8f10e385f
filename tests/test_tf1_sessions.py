"""Masks and sessions: checkpoints, resuming, removing, and what is refused or left alone with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from onnxprune.converters.tensorflow import AGPPruner, LevelPruner
from tf1_nets import HALF, WEIGHTS, Net, X, masks_hold, net, read, session, v1

from onnxprune.errors import PruneError


def test_a_checkpoint_knows_no_masks_and_another_session_goes_on(tmp_path: Path) -> None:
    built = net()
    train, init = built.train("adam"), built.init()
    with built.graph.as_default():
        names = {v.op.name for v in v1.global_variables()}
        pruner = LevelPruner(HALF)
        pruner(built.graph)
        saver = v1.train.Saver()
    with session(built.graph) as sess:
        sess.run(init)
        sess.run(train, built.feed())
        path = saver.save(sess, str(tmp_path / "model"), write_meta_graph=False)
        first = dict(pruner.masks)
    assert {name for name, _ in tf.train.list_variables(path)} == names
    with session(built.graph) as sess:
        saver.restore(sess, path)
        sess.run(train, built.feed())
        masks_hold(pruner, read(sess))
    assert all(np.array_equal(first[n], pruner.masks[n]) for n in WEIGHTS)


def test_interrupted_and_resumed_is_uninterrupted(tmp_path: Path) -> None:
    config = [{"final_sparsity": 0.9, "start_epoch": 0, "end_epoch": 4}]

    def run(epochs: range, pruner: Any, sess: Any, built: Net, train: Any) -> None:
        for epoch in epochs:
            pruner.update_epoch(epoch, sess)
            sess.run(train, built.feed())

    def start() -> tuple[Net, Any, Any, Any, Any]:
        built = net()
        train, init = built.train("adam"), built.init()
        with built.graph.as_default():
            saver = v1.train.Saver()
        pruner = AGPPruner(config)
        pruner(built.graph)
        return built, train, init, saver, pruner

    built, train, init, saver, whole = start()
    with session(built.graph) as sess:
        sess.run(init)
        path = saver.save(sess, str(tmp_path / "initial"), write_meta_graph=False)
        run(range(6), whole, sess, built, train)
        expected = read(sess)
    built, train, init, saver, pruner = start()
    with session(built.graph) as sess:
        saver.restore(sess, path)
        run(range(3), pruner, sess, built, train)
        path = saver.save(sess, str(tmp_path / "half"), write_meta_graph=False)
        state = pruner.state_dict()
    for order in ("before the graph", "before the session", "with the session"):
        built, train, init, saver, pruner = (
            start() if order != "before the graph" else (*start()[:4], AGPPruner(config))
        )
        if order == "before the graph":
            built = net()
            train = built.train("adam")
            with built.graph.as_default():
                saver = v1.train.Saver()
            pruner.load_state_dict(state)
            pruner(built.graph)
        if order == "before the session":
            pruner.load_state_dict(state)
        with session(built.graph) as sess:
            saver.restore(sess, path)
            if order == "with the session":
                pruner.load_state_dict(state, sess)
            run(range(3, 6), pruner, sess, built, train)
            values = read(sess)
        assert pruner.masks == whole.masks, order
        for name in expected:
            np.testing.assert_allclose(values[name], expected[name], atol=1e-5, err_msg=f"{order}: {name}")


def test_removed_it_is_plain_with_zeros(tmp_path: Path) -> None:
    for when in ("before", "after"):
        built = net()
        plain = {op.name: (list(op.inputs), list(op.control_inputs)) for op in built.graph.get_operations()}
        train = built.train("momentum") if when == "before" else None
        if when == "before":
            plain = {op.name: (list(op.inputs), list(op.control_inputs)) for op in built.graph.get_operations()}
        pruner = LevelPruner(HALF)
        pruner(built.graph)
        train = built.train("momentum") if train is None else train
        init = built.init()
        with built.graph.as_default():
            saver = v1.train.Saver()
        with session(built.graph) as sess:
            sess.run(init)
            sess.run(built.logits, built.feed())
            masks = dict(pruner.masks)
            kept = {
                n: v.constraint for n, v in ((v.op.name, v) for v in built.graph.get_collection("trainable_variables"))
            }
            assert any(kept.values())
            pruner.remove()
            values = read(sess)
            for name in WEIGHTS:
                assert not values[name][~masks[name]].any()
                assert values[name][masks[name]].all()
            path = saver.save(sess, str(tmp_path / when))
            for _ in range(2):
                sess.run(train, built.feed())
            assert all(np.count_nonzero(read(sess)[n] == 0) == 0 for n in ("conv/kernel", "fc/kernel"))
        for op in built.graph.get_operations():
            if op.name in plain:
                assert (list(op.inputs), list(op.control_inputs)) == plain[op.name], op.name
        assert not any(v.constraint for v in built.graph.get_collection("trainable_variables"))
        with tf.Graph().as_default() as other, session(other) as sess:
            v1.train.import_meta_graph(f"{path}.meta").restore(sess, path)
            assert sess.run("logits:0", {"x:0": X}).shape == (32, 10)
        again = LevelPruner([{"sparsity": 0.75}])
        again(built.graph)
        with session(built.graph) as sess:
            saver.restore(sess, path)
            sess.run(built.logits, built.feed())
        assert again.sparsity == pytest.approx(0.75, abs=0.001)


def test_a_checkpoint_of_something_else_is_pruned_again_and_said() -> None:
    built = net()
    pruner = LevelPruner(HALF)
    pruner(built.graph)
    init = built.init()
    with session(built.graph) as sess:
        sess.run(init)
        pruner.update_epoch(0, sess)
        masks_hold(pruner, read(sess))
        sess.run(init)
        with pytest.warns(UserWarning, match=r"pruned entries of conv/kernel, dw/kernel, fc/kernel were written"):
            pruner.update_epoch(1, sess)
        masks_hold(pruner, read(sess))


def refused(pattern: str, call: Callable[[], Any]) -> None:
    with pytest.raises(PruneError, match=pattern):
        call()


def test_a_session_that_ran_is_refused() -> None:
    built = net()
    train, init = built.train("sgd"), built.init()
    edges = {op.name: (list(op.inputs), list(op.control_inputs)) for op in built.graph.get_operations()}
    with session(built.graph) as sess:
        sess.run(built.graph.get_operation_by_name("conv/kernel/Initializer/random_uniform/shape"))  # anything at all
        refused("already run this graph.*open a new session", lambda: LevelPruner(HALF)(built.graph))
    ops = built.graph.get_operations()
    assert all((list(op.inputs), list(op.control_inputs)) == edges[op.name] for op in ops if op.name in edges)
    pruner = LevelPruner(HALF)
    with session(built.graph) as sess:  # made before, run after: fine
        pruner(built.graph)
        sess.run(init)
        sess.run(train, built.feed())
        masks_hold(pruner, read(sess))


def test_refusals() -> None:
    built = net()
    init = built.init()
    pruner = LevelPruner(HALF)
    operations = len(built.graph.get_operations())
    refused(
        r"config entry 1 .* matches no weight; types present: .*Conv2D",
        lambda: LevelPruner([{"sparsity": 0.5, "op_types": ["LSTM"]}])(built.graph),
    )
    assert len(built.graph.get_operations()) == operations, "nothing is edited for a configuration that matches nothing"
    pruner(built.graph)
    refused(r"another pruner holds masks.*remove", lambda: LevelPruner(HALF)(built.graph))
    refused(r"expected sess, a session of this graph.*None", lambda: pruner.update_epoch(1))
    with session(tf.Graph()) as sess:
        refused(r"not Session of another graph", lambda: pruner.update_epoch(1, sess))
    with session(built.graph) as sess:
        refused(r"no values yet; run their initialisers", lambda: pruner.update_epoch(1, sess))
        sess.run(init)
        pruner.update_epoch(1, sess)
    finalised = net()
    finalised.graph.finalize()
    refused(r"finalised; call the pruner before", lambda: LevelPruner(HALF)(finalised.graph))
    refused(r"no weights that can be pruned", lambda: LevelPruner(HALF)(tf.Graph()))
    with tf.Graph().as_default() as empty:
        tf.matmul(v1.placeholder(tf.float32, (2, 3)), v1.get_variable("w", (3, 3)))
    refused(
        r"leaves out all of w", lambda: LevelPruner([{"sparsity": 0.5}, {"op_names": ["w"], "exclude": True}])(empty)
    )


def test_what_is_left_alone_is_said() -> None:
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 6))
        loop, branch, scaled, product, factor, complex_, hidden, good = (
            v1.get_variable(n, initializer=np.ones((6, 6), "c8" if n == "complex" else "f4"), use_resource=True)
            for n in ("loop", "branch", "scaled", "product", "factor", "complex", "hidden", "good")
        )
        y = tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.matmul(h, loop)), (0, x))[1]
        y = tf.cond(tf.reduce_sum(y) > 0, lambda: tf.matmul(y, branch), lambda: y)
        y = tf.matmul(y, scaled * 2.0)
        y = tf.matmul(y, tf.matmul(product, factor))
        y = tf.math.real(tf.matmul(tf.cast(y, tf.complex64), complex_))
        y = tf.matmul(tf.matmul(y, hidden), good)
        for key in ("variables", "trainable_variables"):
            graph.get_collection_ref(key).remove(hidden)
        init = v1.global_variables_initializer()
    pruner = LevelPruner(HALF)
    pruner(graph)
    with session(graph) as sess:
        sess.run([init, hidden.initializer])
        sess.run(y, {x: np.ones((2, 6))})
    assert set(pruner.masks) == {"good"}
    reasons = {s.name: s.reason for s in pruner.report.skipped}
    expected = {
        "loop": "it is read inside",
        "branch": "it is read inside",
        "scaled": "the Mul 'mul' between it",
        "product": "both operands of MatMul",
        "factor": "both operands of MatMul",
        "complex": "complex64 cannot be pruned",
        "hidden": "none of the graph's collections",
    }
    assert set(reasons) == set(expected)
    for name, text in expected.items():
        assert text in reasons[name], (name, reasons[name])
