"""TensorFlow graphs for tests, their ONNX files with every variable in its own layout, and sessions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import tensorflow as tf
from nets import pi
from onnx import numpy_helper
from onnxprune.converters.tensorflow.graph_export import convert

v1 = tf.compat.v1
X = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("f4")
Y = (np.arange(32) % 10).astype("i4")

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: v1.train.GradientDescentOptimizer(0.1),
    "momentum": lambda: v1.train.MomentumOptimizer(0.1, 0.9),
    "adam": lambda: v1.train.AdamOptimizer(0.01),
    "rmsprop": lambda: v1.train.RMSPropOptimizer(0.01),
    "adagrad": lambda: v1.train.AdagradOptimizer(0.1),
    "ftrl": lambda: v1.train.FtrlOptimizer(0.1),
}

HALF = [{"sparsity": 0.5, "op_types": "default"}]
WEIGHTS = ("conv/kernel", "dw/kernel", "fc/kernel")


@dataclass(frozen=True, eq=False)
class Net:
    """A small classifier: convolution, depthwise convolution, dense layer; L2 loss on the latter."""

    graph: Any
    x: Any
    y: Any
    logits: Any
    loss: Any

    def train(self, optimizer: str, *, step: bool = True) -> Any:
        """Add a training op to the graph."""
        with self.graph.as_default():
            counter = v1.train.get_or_create_global_step() if step else None
            return OPTIMIZERS[optimizer]().minimize(self.loss, global_step=counter)

    def init(self) -> Any:
        """Add an op that initialises all variables there are."""
        with self.graph.as_default():
            return v1.global_variables_initializer()

    def feed(self) -> dict[Any, Any]:
        """Inputs and labels."""
        return {self.x: X, self.y: Y}


def net(*, ref: bool = False, seed: int = 1) -> Net:
    """A new graph with the classifier in it; with `ref`, variables of the old kind."""
    graph = tf.Graph()
    with graph.as_default():
        v1.set_random_seed(seed)

        def variable(name: str, *shape: int) -> Any:
            init = v1.glorot_uniform_initializer() if len(shape) > 1 else v1.zeros_initializer()
            return v1.get_variable(name, shape, initializer=init, use_resource=not ref)

        x = v1.placeholder(tf.float32, (None, 8, 8, 3), name="x")
        y = v1.placeholder(tf.int32, (None,), name="y")
        h = tf.nn.conv2d(x, variable("conv/kernel", 3, 3, 3, 8), 1, "VALID", name="conv/Conv2D") + variable(
            "conv/bias", 8
        )
        h = tf.nn.relu(h)
        h = tf.nn.relu(tf.nn.depthwise_conv2d(h, variable("dw/kernel", 3, 3, 8, 2), (1, 1, 1, 1), "VALID"))
        fc = variable("fc/kernel", 256, 10)
        logits = tf.add(tf.matmul(tf.reshape(h, (-1, 256)), fc), variable("fc/bias", 10), name="logits")
        loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=logits))
        loss += 1e-3 * tf.nn.l2_loss(fc)
    return Net(graph, x, y, logits, loss)


def session(graph: Any) -> Any:
    """A session with one thread."""
    return v1.Session(
        graph=graph, config=v1.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
    )


def read(sess: Any) -> dict[str, np.ndarray]:
    """The values of all variables in a session, by name; makes new ops."""
    with sess.graph.as_default():
        return {v.op.name: np.asarray(sess.run(v)) for v in v1.global_variables()}


def masks_hold(pruner: Any, values: dict[str, np.ndarray], *, dense: tuple[str, ...] = ()) -> None:
    """Every pruned entry is +0.0, and no other entry is 0."""
    assert pruner.masks
    for name, keep in pruner.masks.items():
        gone = values[name][~keep]
        assert not gone.any(), f"{name}: {np.count_nonzero(gone)} of {gone.size} pruned entries live"
        assert not np.signbit(gone).any(), f"{name}: -0.0"
        if name not in dense:
            assert values[name][keep].all(), f"{name}: an entry died"


def tied(name: str, *shape: int, ref: bool = False, dtype: Any = np.float32) -> Any:
    """A variable of 1, 2 and 3 with signs: full of ties."""
    return v1.get_variable(name, initializer=pi(*shape, dtype=dtype), use_resource=not ref)


def lifted(graph: Any, outputs: Sequence[str], values: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The ONNX model of a graph, with every variable as an initializer of its own name and layout."""
    source = v1.graph_util.extract_sub_graph(graph.as_graph_def(), [o.split(":")[0] for o in outputs])
    target = v1.GraphDef(versions=source.versions, library=source.library)
    for node in source.node:
        new = target.node.add()
        new.name = node.name
        if node.op in {"VarHandleOp", "VariableV2"}:
            new.op = "Placeholder"
            for key in ("dtype", "shape"):
                new.attr[key].CopyFrom(node.attr[key])
        elif node.op == "ReadVariableOp":
            new.op = "Identity"
            new.input.append(node.input[0])
            new.attr["T"].CopyFrom(node.attr["dtype"])
        elif node.op == "ResourceGather":
            axis = target.node.add(op="Const", name=f"{node.name}/axis")
            axis.attr["dtype"].type = tf.int32.as_datatype_enum
            axis.attr["value"].tensor.CopyFrom(v1.make_tensor_proto(0, tf.int32))
            new.op = "GatherV2"
            new.input.extend([*node.input[:2], axis.name])
            new.attr["Tparams"].CopyFrom(node.attr["dtype"])
            new.attr["Tindices"].CopyFrom(node.attr["Tindices"])
            new.attr["Taxis"].type = tf.int32.as_datatype_enum
        else:
            new.CopyFrom(node)
    proto = convert(target, list(outputs))
    for value in list(proto.graph.input):
        name = value.name.removesuffix(":0")
        if name in values:
            proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values[name]), value.name))
            proto.graph.input.remove(value)
    onnx.checker.check_model(proto)
    return proto
