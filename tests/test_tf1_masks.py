"""Masks of a TensorFlow graph are those of its ONNX file, ties included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from onnxprune.converters.tensorflow import LevelPruner
from tf1_nets import WEIGHTS, lifted, net, read, session, tied, v1

import onnxprune

f4 = tf.float32


def _conv1d(ref: bool) -> Any:
    return tf.nn.conv1d(v1.placeholder(f4, (2, 9, 4)), tied("w", 3, 4, 5, ref=ref), 1, "VALID")


def _conv2d_grouped(ref: bool) -> Any:
    return tf.nn.conv2d(v1.placeholder(f4, (2, 9, 9, 4)), tied("w", 3, 3, 2, 6, ref=ref), 1, "VALID")


def _conv3d(ref: bool) -> Any:
    return tf.nn.conv3d(
        v1.placeholder(f4, (2, 5, 5, 5, 2)), tied("w", 2, 3, 2, 2, 3, ref=ref), (1, 1, 1, 1, 1), "VALID"
    )


def _conv2d_transpose(ref: bool) -> Any:
    return tf.nn.conv2d_transpose(
        v1.placeholder(f4, (2, 5, 5, 4)), tied("w", 3, 3, 2, 4, ref=ref), (2, 10, 10, 2), 2, "SAME"
    )


def _conv3d_transpose(ref: bool) -> Any:
    x = v1.placeholder(f4, (1, 3, 3, 3, 4))
    return tf.nn.conv3d_transpose(x, tied("w", 2, 2, 2, 3, 4, ref=ref), (1, 6, 6, 6, 3), 2, "SAME")


def _depthwise(ref: bool) -> Any:
    return tf.nn.depthwise_conv2d(
        v1.placeholder(f4, (2, 7, 7, 4)), tied("w", 3, 3, 4, 3, ref=ref), (1, 1, 1, 1), "VALID"
    )


def _separable(ref: bool) -> Any:
    x = v1.placeholder(f4, (2, 7, 7, 4))
    return tf.nn.separable_conv2d(
        x, tied("d", 3, 3, 4, 2, ref=ref), tied("p", 1, 1, 8, 5, ref=ref), (1, 1, 1, 1), "VALID"
    )


def _dense(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(f4, (None, 7)), tied("w", 7, 5, ref=ref)) + tied("b", 5, ref=ref)


def _dense_adjoint(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(f4, (None, 7)), tied("w", 5, 7, ref=ref), transpose_b=True)


def _dense_left(ref: bool) -> Any:
    return tf.matmul(tied("w", 7, 5, ref=ref), v1.placeholder(f4, (7, 3)), transpose_a=True)


def _batch(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(f4, (3, 2, 7)), tied("w", 3, 5, 7, ref=ref), transpose_b=True)


def _tensordot(ref: bool) -> Any:
    return tf.tensordot(v1.placeholder(f4, (2, 3, 7)), tied("w", 7, 5, ref=ref), [[2], [0]])


def _einsum(ref: bool) -> Any:
    return tf.einsum("bij,jkl->bikl", v1.placeholder(f4, (2, 3, 5)), tied("w", 5, 2, 3, ref=ref))


def _einsum_both(ref: bool) -> Any:
    return tf.einsum("bihd,hdk->bik", v1.placeholder(f4, (2, 3, 2, 4)), tied("w", 2, 4, 5, ref=ref))


def _einsum_swapped(ref: bool) -> Any:
    return tf.einsum("bij,kj->bik", v1.placeholder(f4, (2, 3, 5)), tied("w", 4, 5, ref=ref))


def _einsum_left(ref: bool) -> Any:
    return tf.einsum("kj,bji->bki", tied("w", 4, 5, ref=ref), v1.placeholder(f4, (2, 5, 3)))


def _moved(ref: bool) -> Any:
    w = tf.reshape(tf.transpose(tied("w", 5, 2, 3, ref=ref), (1, 2, 0)), (6, 5))
    return tf.matmul(v1.placeholder(f4, (2, 6)), w)


def _cut(ref: bool) -> Any:
    # no ties: among equals, which piece goes first depends on the order of operators, which tf2onnx changes
    w = v1.get_variable(
        "w", initializer=np.random.default_rng(0).normal(size=(6, 12)).astype("f4"), use_resource=not ref
    )
    parts = tf.split(w, 3, 1)
    a = tf.matmul(v1.placeholder(f4, (2, 6)), parts[0])
    return a + tf.matmul(v1.placeholder(f4, (2, 6)), parts[2])


def _sliced(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(f4, (2, 4)), tied("w", 6, 9, ref=ref)[1:5, ::2])


def _sliced_off(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(f4, (2, 4)), tf.slice(tied("w", 6, 9, ref=ref), (1, 2), (4, -1)))


def _joined(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(f4, (2, 6)), tf.concat([tied("w", 6, 4, ref=ref), tied("v", 6, 3, ref=ref)], 1))


def _stacked(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(f4, (2, 3, 6)), tf.stack([tied("w", 6, 4, ref=ref), tied("v", 6, 4, ref=ref)]))


def _unstacked(ref: bool) -> Any:
    first, second = tf.unstack(tied("w", 2, 5, 4, ref=ref))
    return tf.matmul(tf.matmul(v1.placeholder(f4, (2, 5)), first), second, transpose_b=True)


def _half(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(tf.float16, (2, 6)), tied("w", 6, 4, ref=ref, dtype=np.float16))


def _cast(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(tf.float16, (2, 6)), tf.cast(tied("w", 6, 4, ref=ref), tf.float16))


def _double(ref: bool) -> Any:
    return tf.matmul(v1.placeholder(tf.float64, (2, 6)), tied("w", 6, 4, ref=ref, dtype=np.float64))


def _shared(ref: bool) -> Any:
    w = tied("w", 6, 6, ref=ref)
    return tf.matmul(tf.nn.relu(tf.matmul(v1.placeholder(f4, (2, 6)), w)), w)


def _embedding(ref: bool) -> Any:
    table = tied("w", 20, 6, ref=ref)
    rows = tf.reduce_sum(tf.nn.embedding_lookup(table, v1.placeholder(tf.int32, (2, 3))), 1)
    return tf.matmul(rows, tied("v", 6, 5, ref=ref))


def _tied_embedding(ref: bool) -> Any:
    table = tied("w", 20, 6, ref=ref)
    return tf.matmul(tf.nn.embedding_lookup(table, v1.placeholder(tf.int32, (3,))), table, transpose_b=True)


def _tied_embedding_across(ref: bool) -> Any:
    """The table is looked up first; it is the MatMul that gives it its role."""
    table = tied("w", 7, 6, ref=ref)
    rows = tf.nn.embedding_lookup(table, v1.placeholder(tf.int32, (3,)))
    return rows + tf.matmul(v1.placeholder(f4, (3, 7)), table)


GRAPHS: list[Callable[[bool], Any]] = [
    _conv1d, _conv2d_grouped, _conv3d, _conv2d_transpose, _conv3d_transpose, _depthwise, _separable, _dense,
    _dense_adjoint, _dense_left, _batch, _tensordot, _einsum, _einsum_both, _einsum_swapped, _einsum_left, _moved, _cut,
    _sliced, _sliced_off, _joined, _stacked, _unstacked, _half, _cast, _double, _shared, _embedding, _tied_embedding,
    _tied_embedding_across,
]  # fmt: skip


@pytest.mark.parametrize("ref", [False, True], ids=["resource", "ref"])
def test_masks_are_those_of_the_file(ref: bool) -> None:
    """Every kind of operator and of way to it, in one graph."""
    config = [{"sparsity": 0.55, "op_types": ["default", "Embedding"]}]
    graph = tf.Graph()
    with graph.as_default():
        outputs = []
        for build in GRAPHS:
            with v1.variable_scope(build.__name__.strip("_")):
                outputs.append(tf.identity(build(ref), name="y"))
        init = v1.global_variables_initializer()
        feed = {
            p: np.ones([2 if d is None else d for d in p.shape.as_list()], p.dtype.as_numpy_dtype)
            for p in _placeholders(graph)
        }
    with session(graph) as sess:
        sess.run(init)
        values = read(sess)
    expected = onnxprune.prune(lifted(graph, [y.name for y in outputs], values), config).masks
    pruner = LevelPruner(config)
    pruner(graph)
    with session(graph) as sess:
        sess.run(init)
        sess.run(outputs, feed)
    assert {f"{name}:0" for name in pruner.masks} == set(expected)
    wrong = [name for name in pruner.masks if not np.array_equal(pruner.masks[name], expected[f"{name}:0"])]
    assert not wrong
    assert not [name for name in pruner.masks if pruner.masks[name].all()]
    assert {name.split("/")[0] for name in pruner.masks} == {build.__name__.strip("_") for build in GRAPHS}


def test_bfloat16() -> None:
    """No ONNX file to hold it against: tf2onnx has no bfloat16 MatMul; the float32 graph has the same ties."""
    masks = []
    for dtype in (ml_dtypes.bfloat16, np.float32):
        with tf.Graph().as_default() as graph:
            y = tf.matmul(tf.ones((2, 6), dtype), tied("w", 6, 4, dtype=dtype))
            init = v1.global_variables_initializer()
        pruner = LevelPruner([{"sparsity": 0.5}])
        pruner(graph)
        with session(graph) as sess:
            sess.run(init)
            sess.run(y)
        masks.append(pruner.masks["w"])
    np.testing.assert_array_equal(*masks)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_a_net_is_pruned_as_its_file(allocation: str, pattern: str) -> None:
    config = [{"sparsity": 0.5, "allocation": allocation, "pattern": pattern}]
    built = net()
    init = built.init()
    with session(built.graph) as sess:
        sess.run(init)
        values = read(sess)
        proto = lifted(built.graph, ["logits:0"], values)
    result = onnxprune.prune(proto, config)
    pruner = LevelPruner(config)
    pruner(built.graph)
    with session(built.graph) as sess:
        sess.run(init)
        for v in built.graph.get_collection("variables"):
            v.load(values[v.op.name], sess)
        sess.run(built.logits, built.feed())
    assert {f"{n}:0" for n in pruner.masks} == set(result.masks)
    for name in pruner.masks:
        np.testing.assert_array_equal(pruner.masks[name], result.masks[f"{name}:0"])
    assert pruner.report.zeros == result.report.zeros
    assert {s.name for s in pruner.skipped} == {s.name.removesuffix(":0") for s in result.report.skipped}
    assert len(WEIGHTS) == len(pruner.masks) + len(pruner.skipped)


def _placeholders(graph: Any) -> list[Any]:
    return [op.outputs[0] for op in graph.get_operations() if op.type == "Placeholder"]
