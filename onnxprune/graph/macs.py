"""Multiply-accumulates of weights, from shapes that ONNX's own shape inference finds.

How often an operator multiplies each entry of its weight depends on shapes alone: a convolution once for every
output position, a matrix product once for every row, a recurrent layer once for every step and sequence. MACs are
that number times the entries of the operand.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.graph import expression as ex
from onnxprune.graph.model import Model
from onnxprune.graph.roles import ROLES
from onnxprune.graph.shapes import Shape, declared, infer
from onnxprune.graph.trace import Tracer, Use
from onnxprune.graph.weights import Weight

CONVOLUTIONS = {"Conv", "FusedConv", "QLinearConv", "ConvInteger"}
RECURRENT = {"LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"}
PROJECTIONS = {"Attention", "QAttention"}
BODIES = {"Loop", "Scan", "SequenceMap"}
_OPERATORS = {op for _, op in ROLES}


@dataclass(frozen=True)
class Site:
    """What shape inference knows about one node that reads weights."""

    names: tuple[str, ...]
    inputs: tuple[Shape | None, ...]
    output: str
    result: Shape | None
    body: str = ""
    """The loop it runs in."""
    branch: bool = False
    """Whether it runs in a branch of an If."""


class UnknownMacsError(Exception):
    """MACs that cannot be told from shapes; the text is the reason a user reads."""


def count(
    model: Model, weights: Sequence[Weight], inputs: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int | str], dict[str, Shape], bool]:
    """MACs of each weight for one run of the model.

    Args:
        model: the model the weights come from. Its large tensors are emptied: nothing else can be done with it then.
        weights: what `find` found.
        inputs: concrete shapes of the graph's inputs.

    Returns:
        Weight name -> MACs, or the reason why they are not known; the shapes of the graph's outputs; and whether some
        weights are in a branch of an If, which are counted as if every branch ran.
    """
    tracer = Tracer(model.graph)
    functions = model.graph.functions
    walk = ((node, scope) for node, scope in tracer.nodes() if node.op_identifier() not in functions)
    nodes = [(id(node), scope) for node, scope in walk if node.op_type in _OPERATORS]
    try:
        graph = infer(model, inputs).graph
    except Exception as error:  # whatever makes onnx refuse a graph, the weights can still be shown
        reason = f"ONNX's shape inference fails: {' '.join(str(error).split())[:200]}"
        return {weight.name: reason for weight in weights}, {}, False
    sites = list(_sites(graph, ChainMap()))
    if len(sites) != len(nodes):
        reason = "a function it is used in cannot be inlined"
        return {weight.name: reason for weight in weights}, {}, False
    at = dict(zip(nodes, sites, strict=True))
    outputs = {value.name for value in graph.output}
    found: dict[str, int | str] = {}
    branches = False
    for weight in weights:
        uses = {(id(use.site), use.scope, use.operand): use for use in weight.uses}
        try:
            found[weight.name] = sum(_macs(weight, use, at[site, scope]) for (site, scope, _), use in uses.items())
            branches |= any(at[site, scope].branch for site, scope, _ in uses)
        except UnknownMacsError as error:
            found[weight.name] = str(error)
        except (ValueError, IndexError):  # from shapes that no runtime accepts
            found[weight.name] = "the shapes around it do not fit together"
    return found, {name: shape for name, shape in declared(graph).items() if name in outputs}, branches


def _macs(weight: Weight, use: Use, site: Site) -> int:
    if use.op_type == "Gather":
        return 0
    if site.body:
        raise UnknownMacsError(f"it runs in the body of {site.body}, whose number of iterations is not known")
    operand = ex.push(use.expression, lambda leaf: np.broadcast_to(leaf.value is weight.leaf.value, leaf.shape))
    return _applications(use, site, operand.shape, use.view(operand).shape[1]) * int(np.count_nonzero(operand))


def _applications(use: Use, site: Site, operand: tuple[int, ...], width: int) -> int:
    """How often an operator multiplies each entry of its weight operand.

    Args:
        use: the operator.
        site: the shapes around it.
        operand: shape of the weight operand.
        width: its inputs, in role order: the length of the sums.
    """
    if use.op_type == "DeformConv":  # as many positions as there are offsets: ONNX does not infer its result
        offsets = _known(site.inputs[2], site.names[2])
        return offsets[0] * math.prod(offsets[2:])
    if use.op_type in CONVOLUTIONS:
        result = _known(site.result, site.output)
        return result[0] * math.prod(result[2:])
    other = 0 if use.operand else (3 if use.op_type == "QLinearMatMul" else 1)
    data = _known(site.inputs[other], site.names[other])
    if use.op_type == "ConvTranspose":
        if len(data) != len(operand):
            raise UnknownMacsError(f"'{site.names[other]}' of shape {list(data)} does not fit it")
        return data[0] * math.prod(data[2:])
    if use.op_type in RECURRENT:
        return data[0] * data[1]
    if use.op_type in PROJECTIONS:
        return math.prod(data[:-1])
    if use.op_type == "Einsum" and use.site is not None:
        terms = use.scope.attributes(use.site)["equation"].replace(" ", "").partition("->")[0].split(",")
        width = math.prod(n for n, letter in zip(operand, terms[use.operand], strict=True) if letter in terms[other])
        operand = operand[:2]
    if math.prod(data) % width:
        raise UnknownMacsError(f"'{site.names[other]}' of shape {list(data)} does not fit it")
    if len(operand) <= 2:
        return math.prod(data) // width
    if use.site is not None and {"transBatchA", "transBatchB"} & use.site.attributes.keys():
        raise UnknownMacsError("FusedMatMul with transBatchA or transBatchB has no rule")
    batches = math.prod(np.broadcast_shapes(operand[:-2], data[:-2])) // math.prod(operand[:-2])
    return batches * math.prod(data[-2:]) // width


def _known(shape: Shape | None, name: str) -> tuple[int, ...]:
    known = tuple(size for size in shape or () if size is not None)
    if shape is None or len(known) < len(shape):
        raise UnknownMacsError(f"ONNX's shape inference does not find the shape of '{name}'")
    return known


def _sites(graph: onnx.GraphProto, outer: ChainMap[str, Shape], body: str = "", branch: bool = False) -> Iterator[Site]:
    """The nodes that may read weights, in the order in which a Tracer walks them."""
    known = outer.new_child(declared(graph))
    for node in graph.node:
        if node.op_type in _OPERATORS:
            inputs = tuple(known.get(name) for name in node.input)
            output = node.output[0] if node.output else ""
            yield Site(tuple(node.input), inputs, output, known.get(output), body, branch)
        inner = f"{node.op_type} '{node.name}'" if node.op_type in BODIES else ""
        for attribute in node.attribute:
            for sub in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from _sites(sub, known, body or inner, branch or node.op_type == "If")
