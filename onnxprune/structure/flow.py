"""Walking a graph with its rules: labels for every axis of every value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto

from onnxprune.structure.control import CONTROLS, control
from onnxprune.structure.facts import STANDARD_DOMAINS, Facts, Shape, bodies, describe
from onnxprune.structure.labels import Axes, Axis, Labels, Misfit
from onnxprune.structure.rules import RULES
from onnxprune.structure.rules.without import WITHOUT
from onnxprune.structure.site import NoRule, Nulls, Site


@dataclass(eq=False)
class Flow:
    """The labels of a graph.

    Attributes:
        source: the graph.
        labels: all ties and pins.
        axes: value -> labels of its axes; None where its shape is not known.
        stored: initializers by name, at any depth.
        sites: the nodes whose rules have been applied.
        refused: the others.
        solid: initializers that a masked model must not touch.
        soft: initializers that are read as what may be 0.
        shifted: initializer -> the initializer that holds its zero point, and the axis that one runs along.
    """

    source: onnx.GraphProto
    facts: Facts
    second: Facts | None
    opsets: Mapping[str, int]
    inexact: bool = False
    labels: Labels = field(default_factory=Labels)
    axes: dict[str, Axes | None] = field(default_factory=dict)
    nulls: dict[str, Nulls] = field(default_factory=dict)
    leaves: dict[str, frozenset[str]] = field(default_factory=dict)
    stored: dict[str, TensorProto] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    refused: list[Site] = field(default_factory=list)
    solid: set[str] = field(default_factory=set)
    soft: set[str] = field(default_factory=set)
    shifted: dict[str, tuple[str, int]] = field(default_factory=dict)

    def graph(self, graph: onnx.GraphProto, outer: bool = True) -> None:
        """Apply the rules to the nodes of a graph in order."""
        if outer:
            for value in graph.input:
                self.fix(value.name, f"it is an axis of the graph input '{value.name}'")
        for tensor in graph.initializer:
            self.stored[tensor.name] = tensor
            self.axes[tensor.name] = self._axes(tensor.name, tuple(tensor.dims), self.labels.fresh)
            self.nulls[tensor.name] = (True,) * len(tensor.dims)
            self.leaves[tensor.name] = frozenset({tensor.name})
        for node in graph.node:
            self._node(node)
        if outer:
            for value in graph.output:
                for axis in self.axes.get(value.name) or ():
                    self.labels.pin(axis, f"it reaches the graph output '{value.name}'")

    def site(self, node: onnx.NodeProto) -> Site:
        """A node as its rule sees it."""
        return Site(
            node,
            self.labels,
            self.facts,
            [self.axes.get(name) if name else None for name in node.input],
            [self.nulls.get(name, ()) for name in node.input],
            [not name or name in self.leaves for name in node.input],
            self.opsets.get("" if node.domain == "ai.onnx" else node.domain, 1),
            self.second,
            self.inexact,
        )

    def fix(self, name: str, reason: str) -> None:
        """A value all of whose positions stay."""
        shape = self.facts.shapes.get(name)
        self.axes[name] = self._axes(name, shape, lambda size: self.labels.fixed(size, reason))
        self.nulls[name] = (True,) * len(shape or ())

    def _axes(self, name: str, shape: Shape | None, label: Callable[[int], Axis]) -> Axes | None:
        """Labels of a value's axes; none where its shape is not known, or is one that no memory holds."""
        try:
            return None if shape is None else tuple(label(size) for size in shape)
        except Misfit as error:
            self.facts.unknown[name] = f"'{name}' has the shape {list(self.facts.shapes.pop(name))}: {error}"
            return None

    def _node(self, node: onnx.NodeProto) -> None:
        if node.op_type in CONTROLS and node.domain in STANDARD_DOMAINS:
            control(self, node)
            return
        site = self.site(node)
        rule = RULES.get((site.domain, node.op_type))
        try:
            if rule is None:
                name = f"{node.domain}.{node.op_type}" if site.domain else node.op_type
                why = "" if site.domain else WITHOUT.get(node.op_type, "")
                raise NoRule(f"{describe(node)} {why or f'has no rule (operator {name})'}")
            rule.tie(site)
            outputs = [name for name in node.output if name]
            if len(site.outputs) < len(outputs):
                raise NoRule(f"{site.what} has results its rule does not know")
            for name, axes in zip(node.output, site.outputs, strict=False):
                shape = self.facts.shapes.get(name)
                if name and shape is not None and shape != tuple(axis.size for axis in axes):
                    raise NoRule(f"{site.what} does not give the shape {list(shape)} that its rule expects")
        except (NoRule, ValueError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
            reason = _why(site, error)
            for axes_ in site.inputs:
                for axis in axes_ or ():
                    self.labels.pin(axis, reason)
            for name in node.output:
                if name:
                    self.fix(name, reason)
            for _, body in bodies(node):
                self._shut(body, reason)
            self._through(site)
            self.refused.append(site)
            return
        self.sites.append(site)
        for name, axes, nulls in zip(node.output, site.outputs, site.null_outputs, strict=False):
            if name:
                self.axes[name] = axes
                self.nulls[name] = nulls
                self.facts.shapes.setdefault(name, tuple(axis.size for axis in axes))
        self._through(site)
        for operand in site.solid:
            self.solid |= self.leaves.get(node.input[operand], frozenset())
        for operand, (zero_point, along) in site.shifted.items():
            self._shift(node.input[operand], node.input[zero_point], along)

    def _shut(self, graph: onnx.GraphProto, reason: str) -> None:
        """Nothing in a body that is not followed, and nothing that it reads, loses positions."""
        for tensor in graph.initializer:
            self.stored[tensor.name] = tensor
            self.axes[tensor.name] = self._axes(
                tensor.name, tuple(tensor.dims), lambda size: self.labels.fixed(size, reason)
            )
            self.leaves[tensor.name] = frozenset({tensor.name})
        for name in (*(name for node in graph.node for name in node.input), *(value.name for value in graph.output)):
            for axis in self.axes.get(name) or ():
                self.labels.pin(axis, reason)
        for node in graph.node:
            for _, body in bodies(node):
                self._shut(body, reason)

    def _shift(self, name: str, zero_point: str, axis: int) -> None:
        """A stored tensor holds 0 where it holds its zero point."""
        if name not in self.stored:
            return
        if zero_point not in self.stored or self.shifted.setdefault(name, (zero_point, axis)) != (zero_point, axis):
            self.solid.add(name)  # no one value is 0 to all that read it

    def _through(self, site: Site) -> None:
        """What is computed from stored tensors only is as good as stored."""
        node = site.node
        soft = [(i, name) for i, name in enumerate(node.input) if name in self.leaves and i not in site.solid]
        read = {i: self.leaves[name] for i, name in soft}
        if not node.input or not all(site.constant):
            self.soft |= frozenset().union(*read.values())
            return
        first = node.op_type in {"DequantizeLinear", "Reshape", "Gather", "Slice"}
        leaves = frozenset().union(*(found for i, found in read.items() if i == 0 or not first))
        for name in node.output:
            self.leaves[name] = leaves


def _why(site: Site, error: Exception) -> str:
    """Why a rule cannot be applied, for a user."""
    if isinstance(error, NoRule):
        return str(error)
    if isinstance(error, Misfit):  # in a branch that is for other inputs, for instance
        return f"{site.what} does not run with these sizes of the inputs: {error}"
    return f"{site.what} is not as its operator describes it: {error!r}"


def walk(
    graph: onnx.GraphProto, facts: Facts, second: Facts | None, opsets: Mapping[str, int], inexact: bool = False
) -> Flow:
    """The labels of a graph.

    Args:
        graph: functions inlined, no tensors in Constant nodes but small ones.
        facts: shapes and contents for one choice of open dims.
        second: for another choice, where there are open dims.
        opsets: domain -> version; the standard domain is "".
        inexact: whether norms over channels let them go.
    """
    flow = Flow(graph, facts, second, opsets, inexact)
    flow.graph(graph)
    for name in flow.solid & flow.soft:
        for axis in flow.axes[name] or ():
            flow.labels.pin(axis, f"'{name}' must not be 0 for one of its readers, and may be 0 for another one")
    return flow
