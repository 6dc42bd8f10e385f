"""What a table of small nets is held against: groups and pins stated literally, and shrunk against masked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from nets import run
from onnx import TensorProto, helper, numpy_helper, parser

from onnxprune.graph.model import Model, load
from onnxprune.runtime.feeds import random_feeds
from onnxprune.structure import shrink, verify
from onnxprune.structure.facts import Facts
from onnxprune.structure.plan import Plan

Stored = tuple[int, ...] | np.ndarray
"""The shape of a tensor of random numbers, or its content."""


UNRUN = {"channels last"}
"""Nets that onnxruntime does not run: why their weights stay is all that they show."""


@dataclass(frozen=True, eq=False)
class Net:
    """A small net, and what is to be found in it.

    Attributes:
        name: of the net.
        text: its graph, in ONNX's text form: `(inputs) => (outputs) { nodes }`.
        stored: its initializers.
        groups: '<weight> <channels>', or '<weight> <channels>x<width>' with ' heads' after it.
        pinned: weight -> what the reason says.
        opset: of the standard domain.
        shapes: of inputs with open dims.
    """

    name: str
    text: str
    stored: Mapping[str, Stored]
    groups: tuple[str, ...]
    pinned: Mapping[str, str] = field(default_factory=dict)
    opset: int = 21
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def model(self) -> onnx.ModelProto:
        """The net with its weights."""
        model = parser.parse_model(
            f'<ir_version: 10, opset_import: ["": {self.opset}, "com.microsoft": 1]> g {self.text}'
        )
        rng = np.random.default_rng(len(self.name))
        for name, stored in self.stored.items():
            array = stored if isinstance(stored, np.ndarray) else rng.uniform(0.2, 1, stored).astype(np.float32)
            if not isinstance(stored, np.ndarray) and len(stored) > 1:
                array = array * rng.choice(np.float32([-1, 1]), stored)
            model.graph.initializer.append(numpy_helper.from_array(array, name))
        return model


def ints(*values: int) -> np.ndarray:
    """A stored vector of int64."""
    return np.array(values, np.int64)


def found(plan: Plan) -> tuple[str, ...]:
    """The groups of a plan as a net states them."""
    return tuple(
        f"{g.name} {g.size}" + (f"x{g.width}" if g.width > 1 else "") + (" heads" if g.heads else "")
        for g in plan.coupling.groups
    )


def choose(plan: Plan, seed: int) -> None:
    """Some channels of every group go, at least one each, and at least one stays."""
    rng = np.random.default_rng(seed)
    for group in plan.coupling.groups:
        gone = np.zeros(group.size, np.bool_)
        gone[rng.permutation(group.size)[: rng.integers(1, group.size)]] = True
        plan.removed[group.name] = gone


def distance(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None = None, seeds: int = 2) -> float:
    """The largest relative difference between shrunk and masked for some decisions.

    It is checked as well that masking does something, and that what is cut is smaller.
    """
    worst = 0.0
    for seed in range(seeds):
        plan = Plan.of(load(model), shapes)
        dense = plan.coupling.model.proto.SerializeToString()
        choose(plan, seed)
        plan.zero(shrink.kept(plan.coupling, plan.removed))
        cut = plan.cut()
        assert count(cut.proto) < count(onnx.ModelProto.FromString(dense))
        assert unread(cut.proto) <= unread(onnx.ModelProto.FromString(dense))
        for sizes in plan.sizes:
            worst = max(worst, verify.difference(plan.coupling.model, cut, sizes))
        assert verify.difference(load(onnx.ModelProto.FromString(dense)), cut, plan.sizes[0]) > 0
    return worst


Arrays = Mapping[str, np.ndarray]


def values(model: Model, feed: Arrays) -> dict[str, np.ndarray]:
    """What every node of a model computes; those of sub-graphs left out."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    given = {value.name for value in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
    found = dict(zip([value.name for value in proto.graph.output], run(proto, feed), strict=True))
    return {name: array for name, array in found.items() if isinstance(array, np.ndarray)}


def check_known(facts: Facts, found: Arrays) -> None:
    """What is known of values before anything runs is so."""
    for name, array in found.items():
        known, kind = facts.shapes.get(name), facts.types.get(name)
        assert known is None or 0 in known or known == array.shape, name  # 0: of no importance, and not known
        assert not kind or helper.tensor_dtype_to_np_dtype(kind) == array.dtype, name
        exact = 0 if array.dtype.kind in "iub" else 1e-6  # onnxruntime rounds otherwise than numpy
        np.testing.assert_allclose(facts.contents.get(name, array), array, exact, exact, err_msg=name)


def nulls(plan: Plan, feed: Arrays) -> Iterator[tuple[str, int, bool, bool]]:
    """Values with channels that go, and the axis: whether they are said to hold 0 there, and do; the model is changed.

    Only real numbers are looked at.
    """
    coupling = plan.coupling
    choose(plan, 0)
    plan.zero(shrink.kept(coupling, plan.removed))
    dead, root = coupling.dead(plan.removed), coupling.solution.root
    for name, array in values(coupling.model, feed).items():
        axes = coupling.flow.axes.get(name)
        if axes is None or array.dtype.kind != "f":
            continue
        for index, (labels, null) in enumerate(zip(axes, coupling.flow.nulls[name], strict=True)):
            gone = dead[root[labels]]
            if labels.size == array.shape[index] and gone.any():
                yield name, index, null, not array.take(np.flatnonzero(gone), index).any()


SIZES = {"int32", "int64", "bool"}
"""Types of sizes, places and what is asked of them."""

COUNTING = {"ArgMax", "Dropout", "EmbedLayerNormalization", "Greater", "MaxPool", "TopK"}
COUNTING |= {"And", "ConvInteger", "Less", "MatMulInteger", "Not", "Or", "Xor"}
"""Operators that make such values of real or of quantised numbers."""


def check_facts(plan: Plan) -> None:
    """What is known of values before anything runs is so, and of all shapes and sizes something is."""
    flow, model = plan.coupling.flow, plan.coupling.model
    makers = {name: node.op_type for node in model.proto.graph.node for name in node.output}
    for facts, shapes in zip((flow.facts, flow.second), plan.sizes, strict=True):
        if facts is None or facts.guessed:
            continue
        found = values(model, random_feeds(model.proto, shapes)[0])
        check_known(facts, found)
        for name, array in found.items():
            assert name in facts.shapes or facts.unknown[name].startswith(("If ", "Loop ")), name
            assert name in facts.contents or array.dtype.name not in SIZES or makers[name] in COUNTING, name


SILENT = {
    "Attention",
    "ConstantOfShape",
    "GroupNormalization",
    "GroupQueryAttention",
    "LinearAttention",
    "Log",
    "LpNormalization",
    "RNN",
    "Scan",
}
"""Operators whose rules do not say of everything that is 0 in these nets that it is; nor of what is made of it."""


def check_zeros(plan: Plan) -> None:
    """Where real numbers are said to be 0 when channels go, they are, and nowhere else. The plan's model is changed."""
    silent: set[str] = set()
    for node in plan.coupling.model.proto.graph.node:
        merged = node.op_type == "Reshape" and not all(plan.coupling.flow.nulls[node.input[0]])  # one says nothing
        if merged or node.op_type in SILENT or not silent.isdisjoint(node.input):
            silent.update(node.output)
    for name, index, null, zeros in nulls(plan, random_feeds(plan.coupling.model.proto, plan.sizes[0])[0]):
        assert null == zeros or (zeros and name in silent), (name, index)


def unread(proto: onnx.ModelProto) -> set[str]:
    """Tensors that no node reads and no graph returns."""
    stored, read, graphs = set(), set(), [proto.graph]
    while graphs:
        graph = graphs.pop()
        stored.update(tensor.name for tensor in graph.initializer)
        read.update(name for node in graph.node for name in node.input)
        read.update(value.name for value in graph.output)
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return stored - read


def count(proto: onnx.ModelProto) -> int:
    """Entries of all tensors but of sizes and places, those of bodies included."""
    graphs, total = [proto.graph], 0
    while graphs:
        graph = graphs.pop()
        total += sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type != TensorProto.INT64)
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return total


def check(net: Net) -> None:
    """Groups and pins are those stated, and all decisions compute what the masked model does."""
    model = net.model()
    plan = Plan.of(load(model), net.shapes or None)
    reasons = {pinned.name: pinned.reason for pinned in plan.coupling.pinned}
    stated = {
        name: net.pinned.get(name, "?") if net.pinned.get(name, "?") in why else why for name, why in reasons.items()
    }
    assert (found(plan), stated) == (net.groups, dict(net.pinned))
    if net.groups:
        assert distance(model, net.shapes or None) < 1e-4
    if net.name not in UNRUN:
        check_facts(plan)
        check_zeros(plan)
