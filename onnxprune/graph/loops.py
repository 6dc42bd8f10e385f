"""Loops: what a body gets from outside and hands on as it is."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir


def bodies(model: ir.Model) -> Iterator[tuple[int, ir.Node]]:
    """Each loop's body, by identity, with the loop."""
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in graph.all_nodes():
            if node.op_type in {"Loop", "Scan"} and node.domain in ("", "ai.onnx") and "body" in node.attributes:
                yield id(node.attributes["body"].as_graph()), node


def unchanged_state(value: ir.Value, loop: ir.Node) -> ir.Value | None:
    """What a loop was given for a state that its body hands on as it is; None for any other input of the body."""
    body = loop.attributes["body"].as_graph()
    index = next(i for i, v in enumerate(body.inputs) if v is value)
    if loop.op_type == "Loop":  # body: iteration, condition, states -> condition, states, scans
        place = index - 1
        state = index >= 2
    else:
        place = index
        state = index < len(body.inputs) - loop.attributes["num_scan_inputs"].as_int()
    if not state or place >= len(body.outputs) or index >= len(loop.inputs):
        return None
    end: ir.Value | None = body.outputs[place]
    while end is not None and end is not value:
        node = end.producer()
        end = node.inputs[0] if node is not None and node.op_type == "Identity" else None
    return loop.inputs[index] if end is value else None
