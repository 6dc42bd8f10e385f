"""A model with zeros in groups made smaller and faster: every layer that gains is written in its fastest form."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph.companions import reads
from onnxprune.graph.model import Model
from onnxprune.graph.weights import Skipped
from onnxprune.lowering.forms import BLOCK, Piece, candidates
from onnxprune.lowering.hoist import hoist
from onnxprune.lowering.latency import DENSE, Latencies
from onnxprune.lowering.layers import Layer, layers
from onnxprune.lowering.merge import merge
from onnxprune.lowering.order import absorb
from onnxprune.runtime.feeds import random_feeds
from onnxprune.runtime.session import LoadError, open_session
from onnxprune.runtime.turns import in_turns
from onnxprune.structure import facts as known
from onnxprune.structure import verify
from onnxprune.structure.compact import compact
from onnxprune.structure.coupling import couple
from onnxprune.structure.prepare import prepare, skeleton
from onnxprune.structure.rules import SHAPES
from onnxprune.structure.sizes import Sizes, choose

GAIN = 0.97
"""A form is used where it takes at most this share of the dense layer's time."""

WHOLE = 0.3
"""Seconds for which each of the whole models is timed at the end, at least."""

PREFERRED = 0.93
"""A form other than the first is used where it takes at most this share of the first one's time: the first has the
fewest nodes, and in a network more is fused with them than on their own."""


@dataclass(frozen=True)
class LoweredRow:
    """One layer that was lowered.

    Attributes:
        name: of its weight.
        op_type: of its node.
        groups: of outputs.
        kept: inputs of each group.
        inputs: that each output had.
        form: what it was written as.
        dense: milliseconds of the layer before, on its own.
        lowered: and after.
        source: where these are from: 'measured', 'table' or 'estimated' (then they only compare).
    """

    name: str
    op_type: str
    groups: int
    kept: int
    inputs: int
    form: str
    dense: float
    lowered: float
    source: str


@dataclass(frozen=True)
class Lowering:
    """What lowering did.

    Attributes:
        rows: one per layer lowered.
        dense: layers with zeros that stay as they are, with reasons.
        difference: of the lowered model from the masked one, as a share of the outputs' scale; None where not checked.
    """

    rows: tuple[LoweredRow, ...]
    dense: tuple[Skipped, ...]
    difference: float | None = None


def lowered(
    model: Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    latencies: Latencies | None = None,
    check: bool = True,
) -> tuple[Model, Lowering]:
    """Write each layer whose zeros are in groups in its fastest form.

    Args:
        model: with zeros; it is not changed.
        shapes: sizes of inputs with open dims: what layers are timed at.
        latencies: where times come from; measured here unless given.
        check: hold the result against the model given, in onnxruntime.

    Returns:
        A new model, or the one given where no layer gains; and what was done.

    Raises:
        PruneError: the shapes do not fit, or the outputs differ by more than rounding does.
    """
    latencies = latencies or Latencies()
    masked = prepare(model)
    sizes = choose(masked, shapes)
    ready, facts = masked, _facts(masked, sizes)
    found, skipped = layers(ready, *facts)
    if any(layer.idle for layer in found) and (small := _compacted(masked, sizes, found)) is not None:
        ready, facts = small, _facts(small, sizes)
        found, skipped = layers(ready, *facts)
    if any(not layer.cover.ordered for layer in found):
        moved = absorb(couple(ready, *sizes), found)
        if moved is not None:
            ready, facts = moved, _facts(moved, sizes)
            found, skipped = layers(ready, *facts)
    rows: list[LoweredRow] = []
    pieces: dict[str, Piece] = {}
    for layer in found:
        times, source = latencies.of(layer)
        form = fastest(times)
        if times[form] > GAIN * times[DENSE]:
            slower = f"lowered it takes {times[form] / times[DENSE]:.2f} times as long ({source})"
            skipped.append(Skipped(layer.name, layer.node.op_type, slower))
            continue
        pieces[layer.result] = candidates(layer)[form](layer)
        rows.append(_row(layer, form, times, source))
    latencies.save()
    if not pieces and ready is masked:
        return model, Lowering((), tuple(skipped))
    result = _replaced(ready, pieces, facts[0])
    try:
        difference = _check(masked, result, sizes) if check else None
        ratio = _ratio(masked, result, sizes[0], latencies.threads) if latencies.timing else 0.0
    except LoadError as error:  # what its optimiser makes of valid nodes is not always valid
        with masked.stage(None) as before:
            open_session(before.path)
        reason = f"lowered, {error}"
        return model, Lowering((), (*skipped, *(Skipped(row.name, row.op_type, reason) for row in rows)))
    if ratio > 1:
        slower = f"with all layers lowered that gain on their own, the model takes {ratio:.2f} times as long"
        return model, Lowering((), (*skipped, *(Skipped(row.name, row.op_type, slower) for row in rows)))
    return result, Lowering(tuple(rows), tuple(skipped), difference)


def _compacted(masked: Model, sizes: tuple[Sizes, Sizes], found: Sequence[Layer]) -> Model | None:
    """The model without the channels that no layer reads any more; None where that cannot be."""
    together = {layer.name: layer.cover.outputs for layer in found if layer.cover.groups > 1}
    try:
        return compact(masked, sizes[0], BLOCK, together)[0]
    except PruneError:
        return None


def fastest(times: Mapping[str, float]) -> str:
    """The form to use."""
    names = [name for name in times if name != DENSE]
    best = min(names, key=times.__getitem__)
    return best if times[best] <= PREFERRED * times[names[0]] else names[0]


def _facts(ready: Model, sizes: tuple[Sizes, Sizes]) -> tuple[known.Facts, known.Facts]:
    bare = skeleton(ready)
    return known.gather(bare, sizes[0], SHAPES), known.gather(bare, sizes[1], SHAPES, more=1)


def _row(layer: Layer, form: str, times: Mapping[str, float], source: str) -> LoweredRow:
    cover = layer.cover
    return LoweredRow(
        layer.name,
        layer.node.op_type,
        cover.groups,
        cover.kept,
        layer.weight.shape[1],
        form,
        times[DENSE],
        times[form],
        source,
    )


def _ratio(masked: Model, result: Model, shapes: Sizes, threads: int) -> float:
    """How many times as long the result takes as the model did."""
    with masked.stage(None) as before, result.stage(None) as after:
        feed, _ = random_feeds(before.path, shapes)
        first, second = in_turns([before.path, after.path], feed, threads, WHOLE)
    return second / first


def _replaced(ready: Model, pieces: Mapping[str, Piece], facts: known.Facts) -> Model:
    """The model with nodes replaced; what nobody reads any more is left out."""
    stored = {str(value.name): value.const_value for value in ready.graph.graph.initializers.values()}

    @functools.cache
    def constant(name: str) -> np.ndarray | None:
        tensor = stored.get(name)
        return None if tensor is None else ready.current(tensor)

    proto = onnx.ModelProto()
    proto.CopyFrom(ready.proto)
    graph = proto.graph
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        piece = next((pieces[name] for name in node.output if name in pieces), None)
        nodes.extend([node] if piece is None else piece.nodes)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    tensors = {name: values for piece in pieces.values() for name, values in piece.tensors.items()}
    inner = {name for node in copies for name in reads(node) if name not in node.input}
    outputs = [*(value.name for value in graph.output), *inner]
    copies, merged = merge(copies, tensors, outputs)
    tensors.update(merged)
    copies = hoist(copies, tensors, facts.shapes, constant, outputs)
    del graph.node[:]
    graph.node.extend(copies)
    graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in tensors.items())
    _drop_unread(graph)
    return ready.made(proto)


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Remove nodes and initializers of which nothing is read."""
    wanted = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            wanted.update(reads(node))
            kept.append(node)
    if len(kept) < len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(kept)]
        del graph.node[:]
        graph.node.extend(copies)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in wanted:
            del graph.initializer[index]


def _check(masked: Model, result: Model, sizes: tuple[Sizes, Sizes]) -> float:
    worst = verify.difference(masked, result, *sizes)
    if worst > verify.TOLERANCE and worst > (allowed := verify.tolerance(masked, sizes[0])):
        raise PruneError(
            f"the lowered model differs from the masked one by {worst:.2g} of its outputs' scale, more than "
            f"{allowed:.1g}: nothing is written. Keep the masked model (--keep-shape), and report it"
        )
    return worst
