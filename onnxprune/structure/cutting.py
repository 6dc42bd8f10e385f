"""Carrying out a decision on a graph: tensors are cut, and what names a size is corrected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto

from onnxprune.graph.model import subgraphs
from onnxprune.structure.flow import Flow
from onnxprune.structure.labels import Solution
from onnxprune.structure.rules import RULES
from onnxprune.structure.site import Cut, NoRule, Site

Fill = Callable[[TensorProto, list[np.ndarray]], None]
"""Cuts a tensor's data: the tensor, and for each axis which positions stay."""


class Stuck(Exception):  # noqa: N818  (a finding, not an error)
    """A node that cannot be made smaller."""

    def __init__(self, site: Site, reason: str) -> None:
        """Which node, and why."""
        super().__init__(reason)
        self.site = site


def nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those of sub-graphs included, in order."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for sub in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from nodes(sub)


def cut(proto: onnx.ModelProto, flow: Flow, solution: Solution, dead: np.ndarray, fill: Fill) -> None:
    """Cut a copy of the graph that a flow belongs to.

    Args:
        proto: the copy; changed.
        flow: the labels of the original.
        solution: their classes.
        dead: class -> whether it goes.
        fill: cuts a tensor's data.

    Raises:
        Stuck: a node cannot be made smaller.
    """
    places = {id(node): place for place, node in enumerate(nodes(flow.source))}
    copies = list(nodes(proto.graph))
    taken = {name for node in copies for name in node.output} | set(flow.axes)
    work = Cut(solution, dead, taken, {name: site for site in flow.sites for name in site.node.output if name})
    inserted: dict[int, list[onnx.NodeProto]] = {}
    for site in flow.sites:
        rule = RULES.get((site.domain, site.node.op_type))
        resize = None if rule is None else rule.resize
        if resize is None or not work.touches([a for axes in (*site.inputs, *site.outputs) for a in axes or ()]):
            continue
        copy = copies[places[id(site.node)]]
        try:
            resize(replace(site, node=copy), work)
        except NoRule as error:
            raise Stuck(site, str(error)) from None
        if work.before:
            inserted[id(copy)] = list(work.before)
            work.before.clear()
    for graph in subgraphs(proto):
        for tensor in graph.initializer:
            axes = flow.axes.get(tensor.name) or ()  # what nodes without a rule keep to themselves has none
            if work.touches(axes):
                fill(tensor, [work.alive(axis) for axis in axes])
        if graph is not proto.graph:
            _declare(graph, flow, work)
    for graph in subgraphs(proto) if inserted else ():
        _insert(graph, inserted)
    proto.graph.initializer.extend(work.added)


def keep(array: np.ndarray, alive: list[np.ndarray]) -> np.ndarray:
    """The entries of an array whose positions stay along every axis."""
    for axis, stays in enumerate(alive):
        if not stays.all():
            array = np.compress(stays, array, axis)
    return array


def _declare(graph: onnx.GraphProto, flow: Flow, work: Cut) -> None:
    """Correct the sizes that a body declares for what goes in and out."""
    for value in (*graph.input, *graph.output):
        axes = flow.axes.get(value.name) or ()
        declared = value.type.tensor_type.shape.dim
        if len(declared) == len(axes) and work.touches(axes):
            for dim, axis in zip(declared, axes, strict=True):
                if dim.HasField("dim_value"):
                    dim.dim_value = work.count(axis)


def _insert(graph: onnx.GraphProto, inserted: dict[int, list[onnx.NodeProto]]) -> None:
    if not any(id(node) in inserted for node in graph.node):
        return
    order = [copy for node in graph.node for copy in (*inserted.get(id(node), ()), node)]
    copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in order]
    del graph.node[:]
    graph.node.extend(copied)
