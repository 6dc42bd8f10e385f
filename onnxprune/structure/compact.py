"""What pruning has made dead: channels nobody feeds or nobody reads, cut out without any change of what is computed.

A channel whose weights are all zero carries a constant (its bias through an activation); what its readers make of that
constant goes into their biases. Whether it is a constant, and which, onnxruntime says.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model
from onnxprune.structure import verify
from onnxprune.structure.coupling import Coupling, Group
from onnxprune.structure.plan import Plan
from onnxprune.structure.site import Site
from onnxprune.structure.sizes import Sizes

SEEDS = (3, 4)
"""Of the random inputs on which a channel has to have one value."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A node that sums over channels with a stored weight.

    Attributes:
        site: the node.
        data: its operand that carries the channels.
        axis: the axis of that operand they lie along.
        weight: its operand that is stored.
        inputs: the axis of the weight that meets the channels.
    """

    site: Site
    data: int
    axis: int
    weight: int
    inputs: int

    def foldable(self, stored: Container[str]) -> bool:
        """Whether a constant channel adds the same to every position of the result, and its bias can take it."""
        site = self.site
        own = not site.has(2) or site.node.input[2] in stored
        if site.node.op_type == "Conv":
            padded = any(site.attribute("pads") or ()) or site.attribute("auto_pad", "NOTSET") not in (
                "NOTSET",
                "VALID",
            )
            return own and not padded and int(site.attribute("group", 1)) == 1
        if site.node.op_type == "Gemm":
            plain = float(site.attribute("alpha", 1.0)) == 1.0 and float(site.attribute("beta", 1.0)) == 1.0
            return own and plain and self.data == 0 and (not site.has(2) or len(site.axes(2)) == 1)
        return self.data == 0 and len(site.axes(self.weight)) == 2


@dataclass(eq=False)
class _Search:
    """Channels of a model that can go without a trace."""

    plan: Plan
    readers: list[Reader] = field(default_factory=list)
    values: dict[int, np.ndarray] = field(default_factory=dict)
    """Reader -> the constant of each position; NaN where it has none."""

    @property
    def coupling(self) -> Coupling:
        return self.plan.coupling

    def run(self) -> dict[str, np.ndarray]:
        found = {group.name: (self._silent(group), self._unheard(group)) for group in self.coupling.groups}
        quiet = self._dead({name: silent for name, (silent, _) in found.items()})
        self.readers = [r for r in _readers(self.coupling) if quiet[self._roots(r)].any()]
        self.values = _constants(self.coupling.model, self.readers, self.plan.sizes[0])
        moving = np.zeros(quiet.size, np.bool_)
        for index, reader in enumerate(self.readers):
            roots, value = self._roots(reader), self.values[index]
            moving[roots[np.isnan(value) | ((value != 0) & (not reader.foldable(self.coupling.flow.stored)))]] = True
        removed = {}
        for group in self.coupling.groups:
            silent, unheard = found[group.name]
            gone = (silent & ~moving[group.classes]) | unheard
            if gone.all():
                gone[0] = False
            removed[group.name] = gone
        return removed

    def fold(self, proto: onnx.ModelProto, removed: Mapping[str, np.ndarray]) -> None:
        """Add to the readers' biases what channels that go contributed.

        Args:
            proto: the model without them; changed.
            removed: group name -> True where a channel went.
        """
        dead = self._dead(removed)
        solution = self.coupling.solution
        stored = {
            str(v.name): v.const_value for g in self.coupling.model.graph.graphs() for v in g.initializers.values()
        }
        nodes = {node.output[0]: node for node in proto.graph.node if node.output}
        added: dict[str, onnx.NodeProto] = {}
        for index, reader in enumerate(self.readers):
            value = np.where(dead[self._roots(reader)], np.nan_to_num(self.values[index]), 0.0)
            if not value.any() or not reader.foldable(self.coupling.flow.stored):
                continue  # what goes all the same, nobody hears
            site = reader.site
            tensor = stored[site.node.input[reader.weight]]
            assert tensor is not None
            weight = np.moveaxis(self.coupling.model.current(tensor).astype(np.float64), reader.inputs, 0)
            extra = value @ weight.reshape(weight.shape[0], weight.shape[1], -1).sum(2)
            root = solution.root[site.outputs[0][-1 if site.node.op_type == "MatMul" else 1]]
            extra = extra[solution.pinned[root] | ~dead[root]].astype(tensor.dtype.numpy())
            _add(proto.graph, nodes[site.node.output[0]], extra, added)
        order = [
            copy for node in proto.graph.node for copy in (node, *([added[o] for o in node.output[:1] if o in added]))
        ]
        copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
        del proto.graph.node[:]
        proto.graph.node.extend(copied)

    def _dead(self, removed: Mapping[str, np.ndarray]) -> np.ndarray:
        return self.coupling.dead(removed)

    def _roots(self, reader: Reader) -> np.ndarray:
        root: np.ndarray = self.coupling.solution.root[reader.site.axes(reader.data)[reader.axis]]
        return root

    def _silent(self, group: Group) -> np.ndarray:
        """Channels whose weights are all zero, in every weight that produces them."""
        return self._zero(group, "output")

    def _unheard(self, group: Group) -> np.ndarray:
        """Channels that all their readers multiply by zero."""
        if not any(member.role == "input" for member in group.members):
            return np.zeros(group.size, np.bool_)
        return self._zero(group, "input")

    def _zero(self, group: Group, role: str) -> np.ndarray:
        zero = np.ones(group.size, np.bool_)
        for member in group.members:
            if member.role != role:
                continue
            weight = self.coupling.by_name[member.name]
            held = weight.stored(weight.values() == 0)
            lines = np.moveaxis(held, member.axis, 0).reshape(held.shape[member.axis], -1)
            zero &= lines[member.places].all((1, 2))
        return zero


def compact(
    model: Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    align: int = 1,
    together: Mapping[str, np.ndarray] | None = None,
) -> tuple[Model, Plan, float]:
    """Cut out the channels of a model that are dead; it computes what it did before.

    Args:
        model: any model; it is not changed.
        shapes: sizes of inputs with open dims.
        align: as many dead channels stay as it takes for counts to be multiples of it.
        together: weight -> (groups, size) outputs of groups that shall stay equally large: as many dead ones stay as
            that takes.

    Returns:
        The smaller model; the plan with what was removed; and the largest difference of the outputs from those of
        the model given, as a share of their scale.

    Raises:
        PruneError: the outputs are not the same.
    """
    plan = Plan.of(model, shapes)
    search = _Search(plan)
    plan.removed = search.run()
    for group in plan.coupling.groups:
        gone = plan.removed[group.name]
        for member in group.producers:
            if together and member.name in together and member.places.shape == (together[member.name].size, 1):
                _even(gone, member.places[:, 0], together[member.name], align)
        wanted = -(-(group.size - int(gone.sum())) * group.width // align) * align // group.width
        back = np.flatnonzero(gone)[: max(0, wanted - group.size + int(gone.sum()))]
        gone[back] = False
    ready = plan.coupling.model
    small = plan.cut()
    search.fold(small.proto, plan.removed)
    small = small.made(small.proto)
    worst = verify.difference(ready, small, *plan.sizes)
    if worst > verify.TOLERANCE and worst > verify.tolerance(ready, plan.sizes[0]):
        raise PruneError(
            f"without its dead channels the model's outputs differ by {worst:.2g} of their scale: nothing is written; "
            "leave --compact out, and report the model"
        )
    return small, plan, worst


def _even(gone: np.ndarray, places: np.ndarray, groups: np.ndarray, align: int) -> None:
    """Let as many dead channels stay as it takes for all groups of outputs to lose equally many."""
    channel = np.empty(places.size, np.int64)
    channel[places] = np.arange(places.size)
    dead = gone[channel[groups]]
    stay = min(-(-int((~dead).sum(1).max()) // align) * align, groups.shape[1])
    for members, lost in zip(channel[groups], dead, strict=True):
        gone[members[lost][: stay - int((~lost).sum())]] = False


def _readers(coupling: Coupling) -> Iterator[Reader]:
    main = {id(node) for node in coupling.flow.source.node}
    for site in coupling.flow.sites:
        kind = site.node.op_type
        if id(site.node) not in main or kind not in {"Conv", "Gemm", "MatMul"}:
            continue
        weight = 1 if site.constant[1] else 0
        data = 1 - weight
        if site.constant[data] or site.node.input[weight] not in coupling.flow.stored or (kind == "Conv" and data):
            continue
        if kind == "Conv":
            yield Reader(site, 0, 1, 1, 1)
        elif kind == "Gemm":
            a, b = int(site.attribute("transA", 0)), int(site.attribute("transB", 0))
            yield (
                Reader(site, 0, 0 if a else 1, 1, 1 if b else 0)
                if not data
                else Reader(site, 1, 1 if b else 0, 0, 0 if a else 1)
            )
        elif not data:
            yield Reader(site, 0, len(site.axes(0)) - 1, 1, max(len(site.axes(1)) - 2, 0))
        else:
            yield Reader(site, 1, max(len(site.axes(1)) - 2, 0), 0, len(site.axes(0)) - 1)


def _constants(model: Model, readers: Sequence[Reader], sizes: Sizes) -> dict[int, np.ndarray]:
    """For each position of what a reader reads, its value if that is the same everywhere, on all inputs; else NaN."""
    from onnxprune.runtime.feeds import random_feeds
    from onnxprune.runtime.session import open_session

    if not readers:
        return {}
    proto = model.to_proto()
    names = list(dict.fromkeys(reader.site.node.input[reader.data] for reader in readers))
    known = {value.name for value in (*proto.graph.input, *proto.graph.output)}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    session = open_session(proto)
    given = {value.name for value in session.inputs}
    low: dict[int, np.ndarray] = {}
    high: dict[int, np.ndarray] = {}
    for seed in SEEDS:
        feed, _ = random_feeds(proto, sizes, seed, inputs=session.inputs)
        results = dict(zip(session.outputs, session.run(feed), strict=True)) | {n: feed[n] for n in given & set(names)}
        for index, reader in enumerate(readers):
            array = np.asarray(results[reader.site.node.input[reader.data]], np.float64)
            lines = np.moveaxis(array, reader.axis, 0).reshape(array.shape[reader.axis], -1)
            low[index] = np.fmin(low.get(index, np.inf), lines.min(1))
            high[index] = np.fmax(high.get(index, -np.inf), lines.max(1))
    return {index: np.where(low[index] == high[index], low[index], np.nan) for index in low}


def _add(graph: onnx.GraphProto, node: onnx.NodeProto, extra: np.ndarray, added: dict[str, onnx.NodeProto]) -> None:
    """Add a constant to each output of a Conv, Gemm or MatMul; a MatMul gets a node behind it."""
    taken = {tensor.name for tensor in graph.initializer} | {name for n in graph.node for name in (*n.input, *n.output)}

    def fresh(near: str) -> str:
        return next(name for name in (f"{near}_folded{i or ''}" for i in range(10**6)) if name not in taken)

    if node.op_type == "MatMul":
        outer = node.output[0]
        inner, bias = fresh(outer), fresh(f"{outer}_bias")
        graph.initializer.append(numpy_helper.from_array(extra, bias))
        node.output[0] = inner
        added[inner] = helper.make_node("Add", [inner, bias], [outer], name=bias)
        return
    given = node.input[2] if len(node.input) > 2 else ""
    old = next((numpy_helper.to_array(t) for t in graph.initializer if given and t.name == given), None)
    bias = fresh(given or f"{node.output[0]}_bias")
    graph.initializer.append(numpy_helper.from_array(extra if old is None else old + extra, bias))
    node.input.extend([""] * (3 - len(node.input)))
    node.input[2] = bias
