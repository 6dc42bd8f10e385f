"""The ONNX file of a TensorFlow graph: what its outputs need, with a session's values in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import tensorflow as tf

from onnxprune.errors import PruneError
from onnxprune.graph.model import load
from onnxprune.graph.weights import Weight

from ..deploy import Candidate
from .convert import OPSET, check_operators, quiet
from .graph_edit import Edits

v1 = tf.compat.v1


def candidate(
    session: Any,
    edits: Edits,
    weights: Sequence[Weight],
    kept: Mapping[str, np.ndarray],
    example_inputs: Any,
    outputs: Any,
) -> Candidate:
    """Frozen and converted; see `GraphHolder.candidate`."""
    from onnxprune.runtime.feeds import random_feeds

    graph = session.graph
    names = _outputs(graph, outputs)
    frozen = v1.graph_util.convert_variables_to_constants(
        session, edits.plain(), [name.rpartition(":")[0] for name in names]
    )
    proto = convert(frozen, names)
    inputs = [value.name for value in proto.graph.input]
    if example_inputs is None:
        feeds = random_feeds(proto)[0]
    else:
        feeds = {_tensor(graph, key, "example input").name: np.asarray(value) for key, value in example_inputs.items()}
        if set(feeds) != set(inputs):
            given = ", ".join(sorted(feeds)) or "nothing"
            raise PruneError(f"the outputs need example inputs for {', '.join(inputs)}; they are given for {given}")
    return Candidate(load(proto), weights, kept, feeds, session.run(names, feeds))


def convert(definition: Any, outputs: list[str]) -> onnx.ModelProto:
    """The ONNX model of a GraphDef without variables; its inputs are the placeholders, by their tensors' names.

    Raises:
        PruneError: the graph holds an operator that ONNX does not have.
    """
    try:
        import tf2onnx
    except ImportError as error:
        raise PruneError("exporting from TensorFlow needs tf2onnx: pip install 'onnxprune[keras]'") from error

    inputs = [f"{node.name}:0" for node in definition.node if node.op == "Placeholder"]
    with quiet():
        try:
            proto, _ = tf2onnx.convert.from_graph_def(definition, input_names=inputs, output_names=outputs, opset=OPSET)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:600]
            raise PruneError(f"tf2onnx cannot convert the graph to {', '.join(outputs)}: {reason}") from error
    check_operators(proto)
    result: onnx.ModelProto = proto
    return result


def _outputs(graph: Any, outputs: Any) -> list[str]:
    """Names of the tensors to compute."""
    if outputs is None:
        raise PruneError(
            "a graph does not say what its outputs are; name them: export(path, sess=sess, outputs=['logits'])"
        )
    listed = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    return [str(_tensor(graph, output, "output").name) for output in listed]


def _tensor(graph: Any, key: Any, what: str) -> Any:
    """A tensor of the graph, given itself or its name, with or without ':0'."""
    name = str(key if isinstance(key, str) else getattr(key, "name", key))
    try:
        return graph.get_tensor_by_name(name if ":" in name else f"{name}:0")
    except (KeyError, ValueError) as error:
        raise PruneError(
            f"the {what} {key!r} is no tensor of the graph; give a tensor, or its name such as 'logits:0'"
        ) from error
