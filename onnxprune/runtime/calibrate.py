"""What calibration data say about weights: sums over the inputs that each weight is multiplied with.

onnxruntime runs the model with the inputs of the weights' operators as extra outputs; here they become the norms and
the Gram matrices that scores, second-order pruning and refitting are made of. Sums are taken in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune.algorithms.reconstruct import Moments
from onnxprune.errors import PruneError
from onnxprune.graph import expression as ex
from onnxprune.graph import inputs as rows
from onnxprune.graph.model import Model
from onnxprune.graph.roles import ROLES
from onnxprune.graph.trace import Tracer, Use
from onnxprune.graph.weights import Weight
from onnxprune.runtime.feeds import Dataset, Feed
from onnxprune.runtime.stream import Flat, Stream, cut, parse_memory

Array = np.ndarray

BLOCK = 1 << 22
"""Elements of activations laid out as rows at a time."""

OPERATORS = {op for _, op in ROLES}


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight at one of the operators that read it.

    Attributes:
        weight: the weight.
        use: the operator's operand.
        node: the operator, in the graph that is run.
        place: of the node in that graph.
        inputs: the rows it multiplies the weight with.
        places: (groups, outputs, inputs * kernel positions): stored position of each entry of the operand; negative
            where another tensor stands.
        positions: number of kernel positions.
    """

    weight: Weight
    use: Use
    node: onnx.NodeProto
    place: int
    inputs: rows.Inputs
    places: np.ndarray
    positions: int

    @property
    def where(self) -> str:
        """The operator, for messages."""
        return f"{self.node.op_type} '{self.node.name}'" if self.node.name else self.node.op_type


@dataclass(frozen=True, eq=False)
class Calibration:
    """Data to calibrate a model on, cut to what memory allows.

    Attributes:
        feeds: one for each run of the model.
        half: how many of them are the first half of the samples; 0 where they cannot be parted.
        samples: their number.
        memory: bytes that may be used.
        threads: of onnxruntime.
    """

    feeds: tuple[Feed, ...]
    half: int
    samples: int
    memory: int
    threads: int | None

    def stream(self, model: Model) -> Stream:
        """A model on these data, from its inputs on."""
        return Stream(model, self.feeds, self.memory // 4, self.threads)


def calibration(
    model: Model, dataset: Dataset, layers: Sequence[Layer], memory: str | float | None, threads: int | None
) -> Calibration:
    """Prepare calibration data for some layers: feeds in which all their inputs take a quarter of the memory.

    Args:
        model: the model.
        dataset: the data; labels are not used.
        layers: whose inputs will be read.
        memory: bytes to use, or a text such as '2GB'; a quarter of the machine's unless given.
        threads: of onnxruntime.

    Raises:
        PruneError: the model does not run on the data.
    """
    limit = parse_memory(memory)
    first, _ = cut(dataset, 1, 1)  # one sample says what each takes
    names = sorted({name for layer in layers for name in layer.inputs.values})
    sizes = [sum(value.nbytes for value in values) for values in Stream(model, first[:1], 0, threads).read(names)]
    feeds, half = cut(dataset, sum(sizes), limit // 4)
    return Calibration(tuple(feeds), half, dataset.samples, limit, threads)


def find_layers(model: Model, weights: Iterable[Weight]) -> tuple[list[Layer], dict[str, str]]:
    """The layers of some weights in the order in which they run; and weights whose inputs cannot be read, and why."""
    flat = Flat.of(model)
    tracer = Tracer(model.graph)
    functions = model.graph.functions
    walk = ((node, scope) for node, scope in tracer.nodes() if node.op_identifier() not in functions)
    own = [(id(node), scope) for node, scope in walk if node.op_type in OPERATORS]
    nodes = [node for node in _nodes(flat.proto.graph) if node.op_type in OPERATORS]
    at = dict(zip(own, nodes, strict=True)) if len(own) == len(nodes) else {}
    places = {id(node): place for place, node in enumerate(flat.proto.graph.node)}
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for weight in weights:
        uses = {(id(use.site), use.scope, use.operand): use for use in weight.uses if use.op_type != "Gather"}
        found = []
        for (site, scope, _), use in uses.items():
            try:
                node = at.get((site, scope))
                if node is None:
                    raise rows.NoRowsError("a function it is used in cannot be inlined")
                if id(node) not in places:
                    raise rows.NoRowsError("it is used inside a loop or a branch, whose values are not handed out")
                found.append(_layer(weight, use, node, places[id(node)]))
            except rows.NoRowsError as error:
                reasons[weight.name] = str(error)
        if not uses:
            reasons[weight.name] = "an embedding is looked up, and multiplied with nothing"
        if weight.name not in reasons:
            layers += found
    return sorted(layers, key=lambda layer: (layer.place, layer.use.operand)), reasons


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node in the order of a Tracer."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for sub in [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs:
                yield from _nodes(sub)


def _layer(weight: Weight, use: Use, node: onnx.NodeProto, place: int) -> Layer:
    operand = ex.push(use.expression, lambda leaf: np.broadcast_to(np.bool_(False), leaf.shape))
    inputs = rows.of(node, use.operand, operand.shape)
    places = weight.places(use)
    groups = _groups(inputs.layout)
    flat = places.reshape(groups, places.shape[0] // groups, -1)
    return Layer(weight, use, node, place, inputs, flat, math.prod(places.shape[2:]))


def _groups(layout: rows.Layout) -> int:
    if isinstance(layout, (rows.Patches, rows.Turned)):
        return layout.group
    if isinstance(layout, rows.States):
        return len(layout.reverse)
    return math.prod(layout.batch) if isinstance(layout, rows.Rows) else 1


def blocks(layer: Layer, arrays: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The rows a layer reads, in float64.

    Raises:
        PruneError: they are not finite; with the node and the value.
    """
    for name, array in zip(layer.inputs.values, arrays, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            bad = int(np.count_nonzero(~np.isfinite(array)))
            raise PruneError(
                f"on the calibration data, the input '{name}' {list(array.shape)} of {layer.where} holds {bad} entries "
                "that are NaN or infinite; leave such samples out, or repair the model"
            )
    for block in layer.inputs.blocks(arrays, BLOCK):
        yield block.astype(np.float64, copy=False)


def norms(model: Model, layers: Sequence[Layer], data: Calibration) -> dict[str, np.ndarray]:
    """The L2 norm of the input that each entry of each weight is multiplied with, over all samples and positions.

    Where several operators read an entry, their squares add up.

    Returns:
        Weight name -> array in role order.
    """
    distinct = {layer.inputs: layer for layer in layers}
    sums: dict[rows.Inputs, np.ndarray] = {}
    names = sorted({name for inputs in distinct for name in inputs.values})
    for values in data.stream(model).read(names):
        by_name = dict(zip(names, values, strict=True))
        for inputs, layer in distinct.items():
            for block in blocks(layer, [by_name[name] for name in inputs.values]):
                squares = np.einsum("gnk,gnk->gk", block, block)
                sums[inputs] = sums[inputs] + squares if inputs in sums else squares
    totals: dict[str, tuple[Weight, np.ndarray]] = {}
    for layer in layers:
        _, flat = totals.setdefault(layer.weight.name, (layer.weight, np.zeros(math.prod(layer.weight.shape))))
        ours = layer.places >= 0
        spread = np.broadcast_to(sums[layer.inputs][:, None, :], layer.places.shape)
        np.add.at(flat, layer.places[ours], spread[ours])
    return {name: weight.role(np.sqrt(flat).reshape(weight.shape)) for name, (weight, flat) in totals.items()}


def moments(
    layer_rows: Sequence[tuple[Layer, Array]], now: Stream, dense: Stream | None, data: Calibration, reach: int
) -> tuple[Moments, Moments]:
    """The sums over the rows of some layers that share a weight, for the first and the second half of the data.

    Args:
        layer_rows: the layers, each with the groups that count: a boolean array.
        now: the model as it is.
        dense: the dense model on the same data; where there is none, its rows are those of `now`.
        data: what both run on.
        reach: the streams go on from this node from now on.
    """
    names = sorted({name for layer, _ in layer_rows for name in layer.inputs.values})
    streams = [now] if dense is None else [now, dense]
    halves = (_Sums(), _Sums())
    for index, found in enumerate(zip(*(stream.read(names, reach) for stream in streams), strict=True)):
        by_name = [dict(zip(names, values, strict=True)) for values in found]
        for layer, groups in layer_rows:
            given = [blocks(layer, [values[name] for name in layer.inputs.values]) for values in by_name]
            for seen in zip(*given, strict=True):
                halves[int(index >= data.half)].add(*(rows_ if groups.all() else rows_[groups] for rows_ in seen))
    return halves[0].moments(halves[1]), halves[1].moments(halves[0])


class _Sums:
    """Moments in the making: what is added is added in place."""

    def __init__(self) -> None:
        self.count = 0
        self.arrays: list[Array] = []

    def add(self, x: Array, d: Array | None = None) -> None:
        self.count += x.shape[1]
        turned = x.swapaxes(1, 2)
        new = [x.sum(1), turned @ x] if d is None else [x.sum(1), turned @ x, d.sum(1), turned @ d]
        if self.arrays:
            for total, part in zip(self.arrays, new, strict=True):
                total += part
        else:
            self.arrays = new

    def moments(self, other: _Sums) -> Moments:
        """As a value; of no rows, with the shapes of another."""
        arrays = self.arrays or [np.zeros_like(array) for array in other.arrays]
        x, xx, d, xd = arrays if len(arrays) == 4 else (*arrays, *arrays)
        return Moments(self.count, x, d, xx, xd)
