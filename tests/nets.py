"""Small nets for tests: ONNX text with arrays as initializers, and what onnxruntime makes of an operand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, parser

PI = "3141592653589793238462643383279502884197169399375105820974944592"

HEADER = '<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1, "own": 1]>'


def pi(*shape: int, dtype: object = np.float32, offset: object = 0) -> np.ndarray:
    """1 and 2 with alternating signs, after the digits of pi: exact in every type, full of ties, and never zero.

    Args:
        shape: of the array.
        dtype: of the array; unsigned ones need an offset.
        offset: added to every entry.
    """
    count = int(np.prod(shape))
    digits = np.array([int(c) for c in (PI * (count // len(PI) + 1))[:count]])
    signed = (digits % 2 + 1) * np.where(np.arange(count) % 2, -1, 1)
    return (signed.reshape(shape) + offset).astype(dtype)


def parse(text: str, opset: int = 21, ir_version: int = 10, **arrays: np.ndarray) -> onnx.ModelProto:
    """A model from the text of its graph (and functions), with arrays as raw initializers of the main graph."""
    header = HEADER.format(opset=opset).replace("10", str(ir_version), 1)
    model = parser.parse_model(f"{header} g {text}")
    if "own" not in {f.domain for f in model.functions}:
        del model.opset_import[2]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


View = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Operand:
    """An operand of an operator: a value of the main graph, how its axes read, and the real numbers it stands for.

    Attributes:
        value: the value's name.
        role: takes its array to (output, input, *kernel).
        real: takes its array to what the operator computes with, where that dequantises it.
        given: inputs of the net on which the operator runs, where not all do.
    """

    value: str
    role: View = lambda x: x
    real: View = lambda x: x
    given: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Net:
    """A net, and what is expected of pruning it at 0.5.

    Attributes:
        id: names the test.
        model: the net; every weight has fewer than 64 entries, none of them zero.
        masks: weight name -> the literal mask of its stored entries in C order, '1' kept; spaces are for the reader.
        seen: weight name -> the operands it feeds, in graph order.
        types: weight name -> operator types, where it is not the graph's last node alone.
        where: weight name -> (tensor name, which of the tensors of that name), where it is not the name itself.
        runs: whether onnxruntime's CPU kernels can run the whole net.
        op_types: what to prune.
    """

    id: str
    model: onnx.ModelProto
    masks: Mapping[str, str]
    seen: Mapping[str, Sequence[Operand]]
    types: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    where: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    runs: bool = True
    op_types: str | list[str] = "default"

    def tensor(self, name: str, model: onnx.ModelProto) -> TensorProto:
        """The tensor of a model like this one that holds a weight."""
        key, index = self.where.get(name, (name, 0))
        return [t for n, t in tensors(model) if n == key][index]


def tensors(model: onnx.ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """Every stored tensor with its name; a tensor attribute goes by its node's first output."""
    stack: list[onnx.GraphProto | onnx.FunctionProto] = [model.graph, *model.functions]
    for graph in stack:
        for tensor in getattr(graph, "initializer", ()):
            yield tensor.name, tensor
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield node.output[0], attribute.t
                stack.extend([attribute.g] if attribute.HasField("g") else [])


def changed(model: onnx.ModelProto, net: Net, name: str, array: np.ndarray) -> onnx.ModelProto:
    """A copy of a model with another array in a weight's place."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensor = net.tensor(name, copy)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return copy


def feeds(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """Inputs that every net can run on: floats are small whole numbers, integers are 1, unknown sizes 2."""
    stored = {t.name for t in model.graph.initializer}
    out = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        kind = value.type.tensor_type
        shape = tuple(d.dim_value or 2 for d in kind.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        out[value.name] = pi(*shape, dtype=dtype) if np.issubdtype(dtype, np.floating) else np.ones(shape, dtype)
    return out


def session(model: onnx.ModelProto):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # as `open_session(exact=True)`
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(model: onnx.ModelProto, given: Mapping[str, np.ndarray] | None = None) -> list[np.ndarray]:
    """A model's outputs in onnxruntime."""
    return list(session(model).run(None, dict(feeds(model) if given is None else given)))


def captured(node: onnx.NodeProto) -> set[str]:
    """Names that a node's sub-graphs read."""
    inner = [n for a in node.attribute if a.HasField("g") for n in a.g.node]
    outputs = {o.name for a in node.attribute if a.HasField("g") for o in a.g.output}
    return outputs.union(*(set(n.input) | captured(n) for n in inner))


def seen(model: onnx.ModelProto, operand: Operand) -> np.ndarray:
    """An operand's array as onnxruntime computes it, in float64; only the nodes it needs are run."""
    part = onnx.ModelProto()
    part.CopyFrom(model)
    needed, nodes = {operand.value}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.insert(0, node)
            needed |= set(node.input) | captured(node)
    del part.graph.node[:], part.graph.output[:]
    part.graph.node.extend(nodes)
    part.graph.node.append(onnx.helper.make_node("Cast", [operand.value], ["operand"], to=TensorProto.DOUBLE))
    part.graph.output.append(onnx.ValueInfoProto(name="operand"))
    kept = [v for v in part.graph.input if v.name in needed]
    del part.graph.input[:]
    part.graph.input.extend(kept)
    return run(part, feeds(part) | dict(operand.given))[0]


def keeps(text: str) -> np.ndarray:
    """The booleans of a literal mask."""
    return np.array([c == "1" for c in text if c in "01"])
