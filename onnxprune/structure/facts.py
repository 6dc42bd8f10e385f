"""What is known of every value before anything is decided: its shape, and its content where it is small and settled.

ONNX's shape inference is asked node by node, so that what it lacks (contrib operators, sizes that go through several
nodes) can be filled in between. Shapes are concrete: open dims of the inputs get sizes, twice, and what differs
between the two is what varies from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, defs, helper, numpy_helper

from onnxprune.graph import constants
from onnxprune.graph.shapes import SMALL

Shape = tuple[int, ...]
STANDARD_DOMAINS = ("", "ai.onnx")


@dataclass(eq=False)
class Facts:
    """Concrete shapes, element types and small contents of the values of a graph and its sub-graphs, by name.

    Attributes:
        shapes: those that are known.
        types: TensorProto element types.
        contents: of small values that are the same at every run with these sizes.
        unknown: value -> why its shape is not known.
        guessed: whether how often a loop runs, and so a size, is only known when the model does.
    """

    shapes: dict[str, Shape] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    contents: dict[str, np.ndarray] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    guessed: bool = False


ShapeRule = Callable[[onnx.NodeProto, "Facts"], Sequence[Shape | None]]
"""Shapes of a node's outputs, for operators that ONNX's own inference does not know."""


def gather(
    model: onnx.ModelProto,
    sizes: Mapping[str, Sequence[int]],
    extra: Mapping[tuple[str, str], ShapeRule],
    more: int = 0,
) -> Facts:
    """The facts of a model whose functions are inlined.

    Args:
        model: only shapes of large tensors are looked at.
        sizes: the shape of each graph input.
        extra: (domain, operator) -> shapes of its outputs.
        more: turns by which a loop's guessed count is larger, where it is only known when the model runs.
    """
    facts = Facts()
    for value in model.graph.input:
        facts.types[value.name] = value.type.tensor_type.elem_type
        if value.name in sizes:
            facts.shapes[value.name] = tuple(sizes[value.name])
        else:
            facts.unknown[value.name] = f"the graph input '{value.name}' is no tensor of known rank"
    opsets = {"" if o.domain == "ai.onnx" else o.domain: o.version for o in model.opset_import}
    _Walk(facts, opsets, max(model.ir_version, 4), extra, more).graph(model.graph)
    return facts


def bodies(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The sub-graphs of a node with their attributes' names."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g


@dataclass(eq=False)
class _Walk:
    facts: Facts
    opsets: Mapping[str, int]
    ir_version: int
    extra: Mapping[tuple[str, str], ShapeRule]
    more: int

    def graph(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._store(tensor.name, tensor)
        for node in graph.node:
            self._node(node)

    def _store(self, name: str, tensor: TensorProto) -> None:
        self.facts.shapes[name] = tuple(tensor.dims)
        self.facts.types[name] = tensor.data_type
        inside = tensor.data_location != TensorProto.EXTERNAL
        if inside and math.prod(tensor.dims) <= SMALL and tensor.data_type != TensorProto.STRING:
            self.facts.contents[name] = numpy_helper.to_array(tensor)

    def _node(self, node: onnx.NodeProto) -> None:
        facts = self.facts
        if node.op_type in {"If", "Loop", "Scan"} and node.domain in STANDARD_DOMAINS:
            try:
                self._controlled(node)
            except (ArithmeticError, LookupError, ValueError) as error:
                for name in filter(None, node.output):
                    facts.unknown.setdefault(name, f"{describe(node)} cannot run as it is written: {error}")
            return
        if node.op_type == "Constant" and node.domain in STANDARD_DOMAINS:
            tensor = constant_tensor(node)
            if tensor is not None:
                self._store(node.output[0], tensor)
                return
        if node.op_type == "Shape" and node.input[0] in facts.shapes:
            shape = facts.shapes[node.input[0]]
            given = {a.name: a.i for a in node.attribute}
            content = np.array(shape[given.get("start", 0) : given.get("end", len(shape))], np.int64)
            self._known(node.output[0], content)
            return
        if node.op_type == "Size" and node.input[0] in facts.shapes:
            self._known(node.output[0], np.array(math.prod(facts.shapes[node.input[0]]), np.int64))
            return
        if self._is_settled(node) and self._compute(node):
            return
        rule = self.extra.get((node.domain, node.op_type))
        shapes: Sequence[Shape | None]
        try:
            shapes = rule(node, facts) if rule is not None else self._inferred(node)
        except Exception as error:  # the checker of shapes raises many kinds
            shapes = [None] * len(node.output)
            reason = f"ONNX's shape inference fails at {describe(node)}: {' '.join(str(error).split())[:200]}"
        else:
            reason = f"the shape of what {describe(node)} computes is not known"
        for name, found in zip(node.output, [*shapes, *[None] * len(node.output)], strict=False):
            if not name:
                continue
            if found is None:
                behind = next((facts.unknown[i] for i in node.input if i in facts.unknown), reason)
                facts.unknown.setdefault(name, behind)  # a rule may have said why
            else:
                facts.shapes[name] = found
                facts.types.setdefault(name, facts.types.get(node.input[0], 0) if node.input else 0)

    def _known(self, name: str, content: np.ndarray) -> None:
        self.facts.contents[name] = content
        self.facts.shapes[name] = content.shape
        self.facts.types[name] = helper.np_dtype_to_tensor_dtype(content.dtype)

    def _is_settled(self, node: onnx.NodeProto) -> bool:
        return (
            constants.is_computed(node)
            and bool(node.input)
            and all(name in self.facts.contents for name in node.input if name)
        )

    def _compute(self, node: onnx.NodeProto) -> bool:
        """Whether a node of small settled inputs could be computed."""
        given = {name: self.facts.contents[name] for name in node.input if name}
        values = compute(node, given, self.opsets.get("", 1))
        for name, value in zip((n for n in node.output if n), values or (), strict=False):
            self._known(name, value)
        return values is not None

    def _inferred(self, node: onnx.NodeProto) -> list[Shape | None]:
        facts = self.facts
        if node.domain not in STANDARD_DOMAINS:
            return [None] * len(node.output)
        schema = defs.get_schema(node.op_type, self.opsets[""], "")
        types, data = {}, {}
        for name in node.input:
            if not name:
                continue
            if name not in facts.shapes:
                return [None] * len(node.output)
            types[name] = helper.make_tensor_type_proto(facts.types.get(name) or TensorProto.FLOAT, facts.shapes[name])
            if name in facts.contents:
                data[name] = numpy_helper.from_array(np.asarray(facts.contents[name], order="C"), name)
        opsets = [helper.make_opsetid("", self.opsets[""])]
        found = onnx.shape_inference.infer_node_outputs(
            schema, node, types, data, opset_imports=opsets, ir_version=self.ir_version
        )
        shapes: list[Shape | None] = []
        for name in node.output:
            kind = found[name].tensor_type if name in found else None
            if kind is not None:
                facts.types[name] = kind.elem_type
            known = kind is not None and kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim)
            shapes.append(tuple(d.dim_value for d in kind.shape.dim) if kind is not None and known else None)
        return shapes

    def _controlled(self, node: onnx.NodeProto) -> None:
        """If, Loop and Scan: what is known of their outputs comes from their bodies."""
        if node.op_type == "If":
            branches = [body for _, body in bodies(node)]
            for body in branches:
                self.graph(body)
            condition = self.facts.contents.get(node.input[0])
            if condition is not None:
                wanted = "then_branch" if bool(condition.reshape(-1)[0]) else "else_branch"
                branches = [body for name, body in bodies(node) if name == wanted]
            for index, name in enumerate(node.output):
                ends = [body.output[index].name for body in branches]
                self._same(name, ends, apart(node, [self.facts.shapes.get(end) for end in ends]))
            return
        body = dict(bodies(node))["body"]
        if node.op_type == "Loop":
            trips = self.facts.contents.get(node.input[0]) if node.input[0] else None
            count = int(trips.reshape(-1)[0]) if trips is not None and trips.size == 1 else 0
            count = count if 0 < count < 2**20 else 0
            if not count or not self._runs_on(node, body):
                self.facts.guessed, count = True, max(count, 1) + self.more
            self._given(body.input[0].name, (), TensorProto.INT64)
            self._given(body.input[1].name, (), TensorProto.BOOL)
            for formal, actual in zip(body.input[2:], node.input[2:], strict=False):
                self._same(formal.name, [actual], "")
                self.facts.contents.pop(formal.name, None)
            states, results = len(node.input) - 2, list(body.output[1:])
        elif self.opsets.get("", 1) < 9:
            for name in node.output:
                self.facts.unknown[name] = f"{describe(node)} of operator set 8 has a batch of its own"
            return
        else:
            scans = next(a.i for a in node.attribute if a.name == "num_scan_inputs")
            states, results, count = len(node.input) - scans, list(body.output), 1
            for index, (formal, actual) in enumerate(zip(body.input, node.input, strict=False)):
                shape = self.facts.shapes.get(actual)
                if index >= states and shape is not None:
                    axis = _ints(node, "scan_input_axes", [0] * scans)[index - states] % len(shape)
                    count = shape[axis]
                    self._given(formal.name, shape[:axis] + shape[axis + 1 :], self.facts.types.get(actual, 0))
                else:
                    self._same(formal.name, [actual], "")
                    self.facts.contents.pop(formal.name, None)
        self.graph(body)
        for index, (name, end) in enumerate(zip(node.output, results, strict=False)):
            if not name:
                continue
            shape = self.facts.shapes.get(end.name)
            if index < states:
                given = node.input[index + (2 if node.op_type == "Loop" else 0)]
                self._same(name, [end.name, given], f"{describe(node)} changes the shape of its state '{given}'")
            elif shape is not None:
                axes = _ints(node, "scan_output_axes", [0] * len(results))
                axis = axes[index - states] % (len(shape) + 1) if node.op_type == "Scan" else 0
                self._given(name, (*shape[:axis], count, *shape[axis:]), self.facts.types.get(end.name, 0))
            else:
                self.facts.unknown[name] = self.facts.unknown.get(end.name, describe(node))

    def _runs_on(self, node: onnx.NodeProto, body: onnx.GraphProto) -> bool:
        """Whether a Loop's condition never ends it before its count does."""
        end = body.output[0].name
        source = next((n.input[0] for n in body.node if n.op_type == "Identity" and n.output[0] == end), end)
        same = source == body.input[1].name
        first = self.facts.contents.get(node.input[1]) if node.input[1] else np.array(True)
        stored = {t.name: numpy_helper.to_array(t) for t in body.initializer if t.name == source}
        known = stored.get(source, self.facts.contents.get(source))
        always = known is not None and bool(known.all())
        return (always or same) and first is not None and bool(first.all())

    def _given(self, name: str, shape: Shape, kind: int) -> None:
        self.facts.shapes[name], self.facts.types[name] = shape, kind

    def _same(self, name: str, ends: Sequence[str], reason: str) -> None:
        """What several values agree on holds for another one."""
        shapes = {self.facts.shapes.get(end) for end in ends}
        if not name:
            return
        shape = shapes.pop() if len(shapes) == 1 else None
        if shape is None:
            self.facts.unknown[name] = next((self.facts.unknown[e] for e in ends if e in self.facts.unknown), reason)
            return
        self._given(name, shape, self.facts.types.get(ends[0], 0))
        contents = [self.facts.contents.get(end) for end in ends]
        if contents[0] is not None and all(c is not None and np.array_equal(c, contents[0]) for c in contents):
            self.facts.contents[name] = contents[0]


def apart(node: onnx.NodeProto, shapes: Sequence[Shape | None]) -> str:
    """Why results of the branches of an If cannot be one; empty where they are alike as far as is known."""
    known = [str(list(shape)) for shape in dict.fromkeys(shapes) if shape is not None]
    if len(known) < 2:
        return ""
    return f"{describe(node)} returns a value of shape {' or '.join(known)}, depending on the branch it takes"


def compute(node: onnx.NodeProto, given: Mapping[str, np.ndarray], version: int) -> list[np.ndarray] | None:
    """The results of one node of ai.onnx on small arrays; None where they are not small, or cannot be computed."""
    try:
        values = constants.compute(node, given, {"": version}, SMALL)
    except Exception:  # an operator it lacks, or a graph no runtime accepts
        return None
    return values if all(value.size <= SMALL for value in values) else None


def describe(node: onnx.NodeProto) -> str:
    """A node as messages name it."""
    return f"{node.op_type} '{node.name or next(iter(node.output), '')}'"


def constant_tensor(node: onnx.NodeProto) -> TensorProto | None:
    """What a Constant node holds; None where that is text, or sparse."""
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor: TensorProto = attribute.t
        return tensor
    value: Any = helper.get_attribute_value(attribute)
    if attribute.name in {"value_float", "value_floats"}:
        return numpy_helper.from_array(np.array(value, np.float32))
    if attribute.name in {"value_int", "value_ints"}:
        return numpy_helper.from_array(np.array(value, np.int64))
    return None


def _ints(node: onnx.NodeProto, name: str, default: list[int]) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == name), default)
