"""Walking a graph with its rules: labels for every axis of every value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto

from onnxprune.structure.facts import STANDARD_DOMAINS, Facts, bodies, describe
from onnxprune.structure.labels import Axes, Labels
from onnxprune.structure.rules import RULES
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
        zeroed: initializers whose pruned entries are 0 in a masked model, beside weights in roles.
        solid: initializers that a masked model must not touch.
    """

    source: onnx.GraphProto
    facts: Facts
    second: Facts | None
    opsets: Mapping[str, int]
    labels: Labels = field(default_factory=Labels)
    axes: dict[str, Axes | None] = field(default_factory=dict)
    nulls: dict[str, Nulls] = field(default_factory=dict)
    leaves: dict[str, frozenset[str]] = field(default_factory=dict)
    stored: dict[str, TensorProto] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    zeroed: set[str] = field(default_factory=set)
    solid: set[str] = field(default_factory=set)

    def graph(self, graph: onnx.GraphProto, outer: bool = True) -> None:
        """Apply the rules to the nodes of a graph in order."""
        if outer:
            for value in graph.input:
                self._fix(value.name, f"it is an axis of the graph input '{value.name}'")
        for tensor in graph.initializer:
            self.stored[tensor.name] = tensor
            self.axes[tensor.name] = tuple(self.labels.fresh(size) for size in tensor.dims)
            self.nulls[tensor.name] = (True,) * len(tensor.dims)
            self.leaves[tensor.name] = frozenset({tensor.name})
        for node in graph.node:
            self._node(node)
        if outer:
            for value in graph.output:
                for axis in self.axes.get(value.name) or ():
                    self.labels.pin(axis, f"it reaches the graph output '{value.name}'")

    def _fix(self, name: str, reason: str) -> None:
        """A value all of whose positions stay."""
        shape = self.facts.shapes.get(name)
        self.axes[name] = None if shape is None else tuple(self.labels.fixed(size, reason) for size in shape)
        self.nulls[name] = (False,) * len(shape or ())

    def _node(self, node: onnx.NodeProto) -> None:
        if node.op_type in {"If", "Loop", "Scan"} and node.domain in STANDARD_DOMAINS:
            self._controlled(node)
            return
        domain = "" if node.domain == "ai.onnx" else node.domain
        constant = [not name or name in self.leaves for name in node.input]
        site = Site(
            node,
            self.labels,
            self.facts,
            [self.axes.get(name) if name else None for name in node.input],
            [self.nulls.get(name, ()) for name in node.input],
            constant,
            self.opsets.get(domain, 1),
            self.second,
        )
        rule = RULES.get((domain, node.op_type))
        try:
            if rule is None:
                name = f"{node.domain}.{node.op_type}" if domain else node.op_type
                raise NoRule(f"{describe(node)} has no rule (operator {name})")
            rule.tie(site)
            outputs = [name for name in node.output if name]
            if len(site.outputs) < len(outputs):
                raise NoRule(f"{site.what} has results its rule does not know")
            for name, axes in zip(node.output, site.outputs, strict=False):
                shape = self.facts.shapes.get(name)
                if name and shape is not None and shape != tuple(axis.size for axis in axes):
                    raise NoRule(f"{site.what} does not give the shape {list(shape)} that its rule expects")
        except (NoRule, ValueError, IndexError, KeyError, TypeError, ZeroDivisionError) as error:
            reason = (
                str(error)
                if isinstance(error, NoRule)
                else f"{site.what} is not as its operator describes it: {error!r}"
            )
            for axes_ in site.inputs:
                for axis in axes_ or ():
                    self.labels.pin(axis, reason)
            for name in node.output:
                if name:
                    self._fix(name, reason)
            self._through(node, constant)
            return
        self.sites.append(site)
        for name, axes, nulls in zip(node.output, site.outputs, site.null_outputs, strict=False):
            if name:
                self.axes[name] = axes
                self.nulls[name] = nulls
                self.facts.shapes.setdefault(name, tuple(axis.size for axis in axes))
        self._through(node, constant)
        for operand in site.zeroed:
            self.zeroed |= self.leaves.get(node.input[operand], frozenset())
        for operand in site.solid:
            self.solid |= self.leaves.get(node.input[operand], frozenset())

    def _through(self, node: onnx.NodeProto, constant: Sequence[bool]) -> None:
        """What is computed from stored tensors only is as good as stored."""
        if not node.input or not all(constant):
            return
        read = node.input[:1] if node.op_type in {"DequantizeLinear", "Reshape", "Gather", "Slice"} else node.input
        leaves = frozenset().union(*(self.leaves.get(name, frozenset()) for name in read if name))
        for name in node.output:
            self.leaves[name] = leaves

    def _controlled(self, node: onnx.NodeProto) -> None:
        """If, Loop and Scan: bodies are walked where they stand, and what goes in and out is pinned."""
        reason = f"it goes through {describe(node)}"
        for name in node.input:
            for axis in self.axes.get(name) or ():
                self.labels.pin(axis, reason)
        for _, body in bodies(node):
            for value in body.input:
                self._fix(value.name, reason)
            self.graph(body, outer=False)
            for value in body.output:
                for axis in self.axes.get(value.name) or ():
                    self.labels.pin(axis, reason)
        for name in node.output:
            if name:
                self._fix(name, reason)


def walk(graph: onnx.GraphProto, facts: Facts, second: Facts | None, opsets: Mapping[str, int]) -> Flow:
    """The labels of a graph.

    Args:
        graph: functions inlined, no tensors in Constant nodes but small ones.
        facts: shapes and contents for one choice of open dims.
        second: for another choice, where there are open dims.
        opsets: domain -> version; the standard domain is "".
    """
    flow = Flow(graph, facts, second, opsets)
    flow.graph(graph)
    return flow
