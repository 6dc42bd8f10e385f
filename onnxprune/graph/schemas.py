"""Whether nodes are as their operators describe them: checked once, on loading, for operators that ONNX describes.

No more than what every runtime insists on: how many operands, which attributes and of what type, and that the bodies
of If, Loop and Scan take and return what the node does. So what comes later may rely on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache

import onnx
from onnx import AttributeProto, defs

from onnxprune.errors import PruneError

STANDARD = ("", "ai.onnx")

_FILLED = {AttributeProto.TENSOR: "t", AttributeProto.GRAPH: "g", AttributeProto.SPARSE_TENSOR: "sparse_tensor"}
"""Types of attributes that hold one message: in which field."""

_CONTROLS = {"If", "Loop", "Scan"}


def check_nodes(proto: onnx.ModelProto, what: str) -> None:
    """Every node of ai.onnx is one that its operator allows; every attribute holds what its type says.

    Raises:
        PruneError: with the first one that is not.
    """
    opsets = _versions(proto.opset_import)
    own = {(function.domain, function.name, function.overload): function for function in proto.functions}
    for function in proto.functions:
        _check(function, {**opsets, **_versions(function.opset_import)}, own, what)
    _check(proto.graph, opsets, own, what)


def _versions(imports: Iterator[onnx.OperatorSetIdProto]) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in imports}


def _check(
    graph: onnx.GraphProto | onnx.FunctionProto,
    opsets: Mapping[str, int],
    own: Mapping[tuple[str, str, str], onnx.FunctionProto],
    what: str,
) -> None:
    stack = [graph]
    while stack:
        for node in stack.pop().node:
            for attribute in node.attribute:
                field = _FILLED.get(attribute.type)
                if field is not None and not attribute.HasField(field) and not attribute.ref_attr_name:
                    raise PruneError(f"{what}: attribute '{attribute.name}' of {named(node)} is empty; export it again")
                stack += [attribute.g] if attribute.HasField("g") else attribute.graphs
            function = own.get((node.domain, node.op_type, node.overload))
            if function is not None:
                reason = _wrong_call(node, function)
            else:
                reason = _wrong(node, opsets) if node.domain in STANDARD else ""
            if reason:
                raise PruneError(f"{what}: {named(node)} {reason}, which no runtime accepts; export it again")


def _wrong_call(node: onnx.NodeProto, function: onnx.FunctionProto) -> str:
    """What is wrong with a call of one of the model's functions; empty where nothing is."""
    for count, most, what in (
        (len(node.input), len(function.input), "operands, and takes"),
        (len(node.output), len(function.output), "results, and gives"),
    ):
        if count > most:
            return f"has {count} {what} {most}"
    return ""


def named(node: onnx.NodeProto) -> str:
    """A node as messages call it."""
    return f"node '{node.name}' ({node.op_type})" if node.name else f"a {node.op_type} node"


def _wrong(node: onnx.NodeProto, opsets: Mapping[str, int]) -> str:
    """What is wrong with a node of ai.onnx; empty where nothing is, or its operator is not known."""
    if "" not in opsets:
        return "is of ai.onnx, but the model imports no version of it"
    if opsets[""] < 1:
        return f"is of version {opsets['']} of ai.onnx, which there is not"
    schema = _schema(node.op_type, opsets[""])
    if schema is None:
        return ""
    least, most, results = schema.min_input, schema.max_input, schema.max_output
    if not least <= len(node.input) <= most:
        return f"has {len(node.input)} operands, and takes {least if least == most else f'{least} to {most}'}"
    if not schema.min_output <= len(node.output) <= results:
        return f"has {len(node.output)} results, and gives {schema.min_output} to {results}"
    given = {attribute.name: attribute for attribute in node.attribute}
    for name, expected in schema.attributes.items():
        kind = str(expected.type).rpartition(".")[2]
        if name in given and AttributeProto.AttributeType.Name(given[name].type) != kind:
            return f"has an attribute '{name}' of another type than {kind}"
        if expected.required and name not in given:
            return f"lacks its attribute '{name}'"
    return _wrong_body(node, given, opsets[""]) if node.op_type in _CONTROLS else ""


@lru_cache(maxsize=4096)
def _schema(op_type: str, version: int) -> defs.OpSchema | None:
    try:
        return defs.get_schema(op_type, version, "")
    except defs.SchemaError:
        return None


def _wrong_body(node: onnx.NodeProto, given: Mapping[str, AttributeProto], version: int) -> str:
    """Whether the bodies of a node take and return as many values as it does."""
    count = len(node.output)
    if node.op_type == "If":
        for name in ("then_branch", "else_branch"):
            if len(given[name].g.output) != count:
                return f"has {count} results, and its {name} {len(given[name].g.output)}"
        return ""
    body, operands = given["body"].g, len(node.input)
    if node.op_type == "Loop":
        states, takes, gives = operands - 2, operands, count + 1
        taken, made = len(body.input), len(body.output)
    else:
        operands -= 1 if version < 9 else 0  # the lengths of sequences
        scans = given["num_scan_inputs"].i
        states, takes, gives = operands - scans, operands, count
        taken, made = len(body.input), len(body.output)
        axes = len(given["scan_input_axes"].ints) if "scan_input_axes" in given else scans
        stacked = len(given["scan_output_axes"].ints) if "scan_output_axes" in given else made - states
        if not 0 < scans <= operands or axes != scans or stacked != made - states:
            return f"runs along {scans} of {operands} operands, with {axes} axes, and stacks {stacked} results"
    if states < 0 or taken != takes or made != gives or count < states:
        return f"has {operands} operands and {count} results, and its body {taken} and {made}"
    return ""
