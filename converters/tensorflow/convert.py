"""tf2onnx, with what it needs to be led around."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
from onnx import helper, numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph.model import graphs

OPSET = 18


@contextmanager
def quiet() -> Iterator[None]:
    """tf2onnx logs an error for every rewriter that would like constants; nested functions must be traced inline."""
    log = logging.getLogger("tf2onnx")
    level, eager = log.level, tf.config.functions_run_eagerly()
    log.setLevel(logging.CRITICAL)
    tf.config.run_functions_eagerly(True)  # a compiled function inside, as Keras' grouped convolutions are, has no ONNX
    try:
        yield
    finally:
        log.setLevel(level)
        tf.config.run_functions_eagerly(eager)


def convert(call: Callable[..., Any], signature: Sequence[Any]) -> onnx.ModelProto:
    """The ONNX model of a TensorFlow function.

    Args:
        call: takes tensors, returns a list of tensors.
        signature: one TensorSpec with a name per argument; the names become those of the graph's inputs.

    Raises:
        PruneError: the function holds an operator that ONNX does not have.
    """
    try:
        import tf2onnx
    except ImportError as error:
        raise PruneError("exporting from TensorFlow needs tf2onnx: pip install 'onnxprune[keras]'") from error

    _add_erfc()
    with quiet():
        function = tf.function(call)
        # Traced while nested functions run inline; tf2onnx finds it cached.
        captures = function.get_concrete_function(*signature).graph.captures
        try:
            proto, _ = tf2onnx.convert.from_function(function, input_signature=list(signature), opset=OPSET)
        except Exception as error:
            raise PruneError(f"tf2onnx cannot convert the model: {_line(error)}") from error
    _store(proto.graph, {inner.name: outer for outer, inner in captures if outer.dtype != tf.resource})
    check_operators(proto)
    result: onnx.ModelProto = proto
    return result


def _store(graph: onnx.GraphProto, captured: Mapping[str, Any]) -> None:
    """Make initializers of inputs that are tensors a layer holds; tf2onnx leaves them where there is no variable."""
    for index in reversed(range(len(graph.input))):
        name = graph.input[index].name
        if name in captured:
            graph.initializer.append(numpy_helper.from_array(captured[name].numpy(), name))
            del graph.input[index]


@cache
def _add_erfc() -> None:
    """Teach tf2onnx the operator that TensorFlow computes GELU with: 1 - Erf."""
    from tf2onnx.handler import tf_op

    class Erfc:
        @classmethod
        def version_9(cls, ctx: Any, node: Any, **_: Any) -> None:
            shape, dtype = ctx.get_shape(node.output[0]), ctx.get_dtype(node.output[0])
            one = ctx.make_const(f"{node.name}_one", np.array(1, helper.tensor_dtype_to_np_dtype(dtype)))
            erf = ctx.make_node("Erf", [node.input[0]], shapes=[shape], dtypes=[dtype])
            inputs = [one.output[0], erf.output[0]]
            ctx.remove_node(node.name)
            ctx.make_node("Sub", inputs, name=node.name, outputs=node.output, shapes=[shape], dtypes=[dtype])

    tf_op("Erfc")(Erfc)


def check_operators(proto: onnx.ModelProto) -> None:
    """Refuse a graph in which tf2onnx left operators of TensorFlow, which it does silently."""
    nodes = {node.op_type for graph in graphs(proto) for node in graph.node if node.domain in ("", "ai.onnx")}
    foreign = sorted(op for op in nodes if not onnx.defs.has(op, OPSET))
    if foreign:
        raise PruneError(
            f"tf2onnx has no ONNX for the TensorFlow operators {', '.join(foreign)}; replace the layers that use them"
        )


def rename(graph: onnx.GraphProto, table: Mapping[str, str]) -> None:
    """Rename values wherever they are named, sub-graphs included."""
    for node in graph.node:
        node.output[:] = [table.get(name, name) for name in node.output]
    for info in (*graph.input, *graph.value_info, *graph.initializer):
        info.name = table.get(info.name, info.name)
    for inner in _subgraphs(graph):
        rename(inner, table)
    for node in graph.node:
        node.input[:] = [table.get(name, name) for name in node.input]
    for output in graph.output:
        output.name = table.get(output.name, output.name)


def _subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield attribute.g


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:600]
