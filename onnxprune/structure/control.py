"""If, Loop and Scan: bodies are walked where they stand, and what goes in and out is tied.

A state of a loop is one value: what it is at first, what the body is given, what the body returns and what comes out.
So are the results of the branches of an If.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import onnx

from onnxprune.structure.facts import apart, bodies
from onnxprune.structure.site import Site

if TYPE_CHECKING:
    from onnxprune.structure.flow import Flow

CONTROLS = {"If", "Loop", "Scan"}


def control(flow: Flow, node: onnx.NodeProto) -> None:
    """Apply the rule of an If, Loop or Scan."""
    site = flow.site(node)
    if node.op_type == "If":
        _if(flow, site)
    else:
        loop = _loop(site) if node.op_type == "Loop" else _scan(site)
        reason = f"it goes through {site.what}, which changes the shape of a state" if loop is not None else ""
        if loop is None or any(not _constant_shape(flow, state) for state in loop.states):
            _closed(flow, site, reason or f"it goes through {site.what} of operator set {site.version}")
            return
        _repeat(flow, site, loop)
    flow.soft |= frozenset().union(*(flow.leaves.get(name, frozenset()) for name in node.input))
    flow.sites.append(site)


class _Parts:
    """The parts of a Loop or Scan: names of values in the graph around it and in its body.

    `states` are (first value, body input, body output, result), `scanned` (value, body input, axis), `stacked`
    (body output, result, axis) and `plain` the inputs of the body, and its outputs, that count steps.
    """

    def __init__(self, body: onnx.GraphProto) -> None:
        self.body = body
        self.states: list[tuple[str, str, str, str]] = []
        self.scanned: list[tuple[str, str, int]] = []
        self.stacked: list[tuple[str, str, int]] = []
        self.plain: list[str] = []


def _loop(site: Site) -> _Parts:
    node, body = site.node, dict(bodies(site.node))["body"]
    parts = _Parts(body)
    count = len(node.input) - 2
    results = [*node.output, *[""] * len(body.output)]
    ends = [value.name for value in body.output[1:]]
    formals = [value.name for value in body.input[2:]]
    parts.states = list(zip(node.input[2:], formals, ends, results, strict=False))
    parts.stacked = [(end, result, 0) for end, result in zip(ends[count:], results[count:], strict=False)]
    parts.plain = [value.name for value in (*body.input[:2], body.output[0])]
    return parts


def _scan(site: Site) -> _Parts | None:
    if site.version < 9:  # with a batch of its own
        return None
    node, body = site.node, dict(bodies(site.node))["body"]
    parts = _Parts(body)
    scans = int(site.attribute("num_scan_inputs"))
    count = len(node.input) - scans
    inputs, outputs = [value.name for value in body.input], [value.name for value in body.output]
    results = [*node.output, *[""] * len(outputs)]
    along = site.attribute("scan_input_axes") or [0] * scans
    made = site.attribute("scan_output_axes") or [0] * (len(outputs) - count)
    parts.states = list(zip(node.input[:count], inputs, outputs, results, strict=False))
    parts.scanned = list(zip(node.input[count:], inputs[count:], along, strict=True))
    parts.stacked = list(zip(outputs[count:], results[count:], made, strict=False))
    return parts


def _constant_shape(flow: Flow, state: Sequence[str]) -> bool:
    """Whether a state has the same shape at every step."""
    for facts in (flow.facts, flow.second):
        if facts is not None:
            shapes = {facts.shapes.get(name) for name in state[:3]}
            if len(shapes) != 1 or shapes == {None}:
                return False
    return flow.axes.get(state[0]) is not None


def _if(flow: Flow, site: Site) -> None:
    site.pin_all("decides by it")
    branches = [body for _, body in bodies(site.node)]
    for body in branches:
        flow.graph(body, outer=False)
    for index, name in enumerate(site.node.output):
        _join(flow, site, name, [body.output[index].name for body in branches])


def _repeat(flow: Flow, site: Site, loop: _Parts) -> None:
    for axes in site.inputs[:2] if site.node.op_type == "Loop" else ():
        for axis in axes or ():
            site.pin(axis, "counts by it")
    for value in loop.body.input:
        if value.name in loop.plain:
            flow.fix(value.name, f"{site.what} counts by it")
    for given, formal, end, _ in loop.states:
        axes = flow.axes[given] or ()
        flow.axes[formal] = axes
        flow.nulls[formal] = tuple(flow.labels.is_fixed(axis) for axis in axes)
        if _same(loop.body, end) == formal:  # a weight that is handed on from step to step
            flow.nulls[formal] = flow.nulls[given]
            if given in flow.leaves:
                flow.leaves[formal] = flow.leaves[given]
    for given, formal, along in loop.scanned:
        axes = flow.axes[given] or ()
        if not axes:
            flow.fix(formal, flow.facts.unknown.get(given, f"{site.what} runs along it"))
            continue
        place = along % len(axes)
        site.pin(axes[place], "runs along it")
        flow.axes[formal] = axes[:place] + axes[place + 1 :]
        flow.nulls[formal] = flow.nulls[given][:place] + flow.nulls[given][place + 1 :]
    flow.graph(loop.body, outer=False)
    for name in loop.plain:
        for axis in flow.axes.get(name) or ():
            site.pin(axis, "counts by it")
    results = dict.fromkeys(site.node.output)
    for given, _, end, result in loop.states:
        _join(flow, site, result, [given, end])
    for end, result, along in loop.stacked:
        if result in results:
            _stack(flow, site, result, end, along)


def _same(body: onnx.GraphProto, name: str) -> str:
    """The value that a value is, before Identity nodes."""
    source = {node.output[0]: node.input[0] for node in body.node if node.op_type == "Identity"}
    while name in source:
        name = source[name]
    return name


def _join(flow: Flow, site: Site, name: str, ends: Sequence[str]) -> None:
    """A result that is one of several values."""
    found = [flow.axes.get(end) for end in ends]
    first = found[0]
    shapes = [None if axes is None else tuple(axis.size for axis in axes) for axes in found]
    known = not name or name not in flow.facts.unknown
    if first is None or len(set(shapes)) > 1 or not known:
        reason = apart(site.node, shapes) or flow.facts.unknown.get(name) or f"{site.what} returns what is not known"
        for axes in found:
            for axis in axes or ():
                flow.labels.pin(axis, reason)
        if name:
            flow.fix(name, reason)
        site.give(flow.axes.get(name) or ())
        return
    joined = []
    for i in range(len(first)):
        meeting = [axes[i] for axes in found if axes is not None]
        for other in meeting[1:]:
            flow.labels.tie(meeting[0], other)
        joined.append(next((axis for axis in meeting if not flow.labels.is_fixed(axis)), meeting[0]))
    site.give(joined, [all(flow.nulls[end][i] for end in ends) for i in range(len(first))])
    if name:
        flow.axes[name], flow.nulls[name] = site.outputs[-1], site.null_outputs[-1]


def _stack(flow: Flow, site: Site, name: str, end: str, along: int) -> None:
    """A result with what every step returned, along a new axis."""
    axes, shape = flow.axes.get(end), flow.facts.shapes.get(name)
    if axes is None or shape is None or len(shape) != len(axes) + 1:
        reason = flow.facts.unknown.get(name) or f"{site.what} stacks values of unknown shape"
        for axis in axes or ():
            flow.labels.pin(axis, reason)
        flow.fix(name, reason)
        site.give(flow.axes.get(name) or ())
        return
    place = along % (len(axes) + 1)
    made, nulls = list(axes), list(flow.nulls[end])
    made.insert(place, site.fixed(shape[place], "runs along it"))
    nulls.insert(place, True)
    site.give(made, nulls)
    flow.axes[name], flow.nulls[name] = site.outputs[-1], site.null_outputs[-1]


def _closed(flow: Flow, site: Site, reason: str) -> None:
    """Nothing in a body, and nothing that it reads or returns, loses positions."""
    for _, body in bodies(site.node):
        for value in body.input:
            flow.fix(value.name, reason)
        flow.graph(body, outer=False)
        for name in _names(body):
            for axis in flow.axes.get(name) or ():
                flow.labels.pin(axis, reason)
    for axes in site.inputs:
        for axis in axes or ():
            flow.labels.pin(axis, reason)
    for name in site.node.output:
        if name:
            flow.fix(name, reason)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """Every value that a graph and its sub-graphs define, read or return."""
    yield from (tensor.name for tensor in graph.initializer)
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        yield from node.output
        for _, body in bodies(node):
            yield from _names(body)
