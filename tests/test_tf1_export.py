"""ONNX files written from TensorFlow graphs that are being pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tensorflow as tf
from onnxprune.converters.tensorflow import LevelPruner
from tf1_nets import WEIGHTS, X, net, read, session, v1

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.runtime.session import open_session


@pytest.mark.parametrize("ref", [False, True], ids=["resource", "ref"])
def test_the_file_has_the_zeros_and_computes_the_same(tmp_path: Path, ref: bool) -> None:
    built = net(ref=ref)
    train, init = built.train("momentum"), built.init()
    pruner = LevelPruner([{"sparsity": 0.7}])
    pruner(built.graph)
    with session(built.graph) as sess:
        sess.run(init)
        for _ in range(2):
            sess.run(train, built.feed())
        definition = built.graph.as_graph_def()
        written = pruner.export(tmp_path / "a.onnx", {"x": X}, outputs=built.logits, sess=sess)
        expected = sess.run(built.logits, built.feed())
        assert built.graph.as_graph_def() == definition, "the graph is as it was"
        values = read(sess)
        pruner.export(tmp_path / "b.onnx", outputs=["logits:0"], sess=sess)  # on random inputs
        sess.run(train, built.feed())
        assert all(not read(sess)[n][~pruner.masks[n]].any() for n in WEIGHTS)
    assert written.path == tmp_path / "a.onnx"
    assert written.sparsity == pruner.sparsity == pytest.approx(0.7, abs=0.001)
    model = onnx.load(written.path)
    assert [i.name for i in model.graph.input] == ["x:0"]
    assert not [n for n in model.graph.node if "onnxprune" in n.name]
    (result,) = open_session(written.path).run({"x:0": X})
    np.testing.assert_allclose(result, expected, atol=1e-5)
    rows = onnxprune.inspect(written.path).weights
    zeros = sorted((r.size, r.zeros) for r in rows)
    assert zeros == sorted((values[n].size, np.count_nonzero(values[n] == 0)) for n in WEIGHTS)
    onnx.checker.check_model(model, full_check=True)


def test_a_restored_session_exports_without_having_run(tmp_path: Path) -> None:
    """The masks form at the export: a file with the sparsity asked for, whatever ran before."""
    built = net()
    init = built.init()
    pruner = LevelPruner([{"sparsity": 0.6}])
    pruner(built.graph)
    with session(built.graph) as sess:
        sess.run(init)
        written = pruner.export(tmp_path / "a.onnx", outputs="logits", sess=sess)
    assert written.sparsity == pytest.approx(0.6, abs=0.001)


def test_a_part_of_the_graph_is_exported(tmp_path: Path) -> None:
    """Only the placeholders that an output needs become inputs; the weights of the rest are not asked for."""
    with tf.Graph().as_default() as graph:
        x, z = (v1.placeholder(tf.float32, (None, 6), name=n) for n in "xz")
        rate = v1.placeholder_with_default(0.5, (), name="rate")
        a = tf.matmul(x, v1.get_variable("a", (6, 4)), name="a_out")
        tf.matmul(z, v1.get_variable("b", (6, 4)), name="b_out")
        tf.multiply(a, rate, name="y")
        init = v1.global_variables_initializer()
    pruner = LevelPruner([{"sparsity": 0.5, "op_names": ["a"]}])
    pruner(graph)
    with session(graph) as sess:
        sess.run(init)
        pruner.export(tmp_path / "a.onnx", outputs="y", sess=sess)
    assert onnx.load(tmp_path / "a.onnx").graph.input[0].name == "x:0"


def test_refusals(tmp_path: Path) -> None:
    built = net()
    with built.graph.as_default():
        tf.numpy_function(lambda v: v, [built.logits], tf.float32, name="python")
    init = built.init()
    pruner = LevelPruner([{"sparsity": 0.5}])
    pruner(built.graph)
    path = tmp_path / "a.onnx"
    with session(built.graph) as sess:
        sess.run(init)

        def refused(match: str, *args: Any, **options: Any) -> None:
            with pytest.raises(PruneError, match=match):
                pruner.export(path, *args, **{"sess": sess, "outputs": "logits", **options})

        refused(r"does not say what its outputs are; name them", outputs=None)
        refused(r"the output 'softmax' is no tensor of the graph", outputs=["softmax"])
        refused(r"example input 'z' is no tensor", {"z": X})
        refused(r"need example inputs for x:0; they are given for y:0", {"y": np.zeros(3)})
        refused(r"expected sess, a session of this graph", sess=None)
        refused(r"tf2onnx (has no ONNX|cannot convert)", outputs="python")
        path.write_bytes(b"mine")
        refused(r"does not say", outputs=None)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]
