"""A model made ready for cutting: functions inlined, tensors of Constant nodes among the initializers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping
from graphlib import CycleError, TopologicalSorter

import numpy as np
import onnx
from onnx import TensorProto, inliner, numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph.companions import reads
from onnxprune.graph.model import Model, graphs, subgraphs, tensors
from onnxprune.graph.shapes import SMALL
from onnxprune.structure.facts import STANDARD_DOMAINS, constant_tensor


def prepare(model: Model, shared: Container[str] = ()) -> Model:
    """A model that computes the same, in the form that rules and cuts work on. The given one is not changed.

    Args:
        model: any model.
        shared: initializers that stay one however many nodes read them: a framework holds them as one parameter.

    Raises:
        PruneError: a function cannot be inlined.
    """
    if model.edits:  # they belong to the tensors of that protobuf, and would be left behind
        proto = model.to_proto()
    else:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
    if proto.functions:
        try:
            proto = inliner.inline_local_functions(proto)
        except Exception as error:  # the inliner raises many kinds
            raise PruneError(
                f"the model's functions cannot be inlined: {' '.join(str(error).split())[:300]}"
            ) from error
    for graph in subgraphs(proto):
        _sort(graph)
        kept = []
        for node in graph.node:
            tensor = constant_tensor(node) if node.op_type == "Constant" and node.domain in STANDARD_DOMAINS else None
            if tensor is None or node.attribute[0].ref_attr_name:
                kept.append(node)
                continue
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
        if len(kept) < len(graph.node):
            copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
            del graph.node[:]
            graph.node.extend(copies)
    _distinct(proto.graph, {}, set())
    _read_small(proto, model)
    _unshare(proto, shared)
    for graph in subgraphs(proto):
        _slices(graph)
        _copy_fills(graph)
    proto.ir_version = max(proto.ir_version, 4)  # before, initializers had to be inputs too
    inside = {tensor.name for tensor in proto.graph.initializer}
    free = [value for value in proto.graph.input if value.name not in inside]
    if len(free) < len(proto.graph.input):
        copied = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in free]
        del proto.graph.input[:]
        proto.graph.input.extend(copied)
    for graph_ in graphs(proto):
        if isinstance(graph_, onnx.GraphProto):
            graph_.ClearField("value_info")
    return model.made(proto)


def _sort(graph: onnx.GraphProto) -> None:
    """Put each node behind what it reads where some are not: converters append Casts, and onnxruntime minds not."""
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    before = [[makers[name] for name in reads(node) if name in makers] for node in graph.node]
    if all(max(found, default=-1) < index for index, found in enumerate(before)):
        return
    try:
        order = list(TopologicalSorter(dict(enumerate(before))).static_order())
    except CycleError:
        return
    copies = [onnx.NodeProto.FromString(graph.node[index].SerializeToString()) for index in order]
    del graph.node[:]
    graph.node.extend(copies)


def _distinct(graph: onnx.GraphProto, outer: Mapping[str, str], taken: set[str]) -> None:
    """Give values of sub-graphs names of their own: the branches of an If may use the same ones."""
    own = [t.name for t in graph.initializer] + [v.name for v in graph.input]
    own += [name for node in graph.node for name in node.output if name]
    names = dict(outer)
    for name in dict.fromkeys(own):
        tries = (f"{name}_{i}" for i in itertools.count(2))
        names[name] = name if name not in taken else next(other for other in tries if other not in taken)
        taken.add(names[name])
    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _distinct(attribute.g, names, taken)


def _unshare(proto: onnx.ModelProto, shared: Container[str]) -> None:
    """Give every reader of a vector or of a fill its own copy: exporters merge equal ones, and that would tie what
    has it."""
    vectors = {t.name: (graph, t) for graph in subgraphs(proto) for t in graph.initializer if _is_plain(t)}
    vectors = {name: found for name, found in vectors.items() if name not in shared}
    taken = {name for graph in subgraphs(proto) for node in graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for graph in subgraphs(proto) for tensor in graph.initializer}
    seen: set[str] = {value.name for graph in subgraphs(proto) for value in graph.output}
    for graph in subgraphs(proto):
        for node in graph.node:
            for index, name in enumerate(node.input):
                if name not in vectors:
                    continue
                if name in seen:
                    home, tensor = vectors[name]
                    copy = next(c for c in (f"{name}_{i}" for i in itertools.count(2)) if c not in taken)
                    taken.add(copy)
                    home.initializer.add().CopyFrom(tensor)
                    home.initializer[-1].name = node.input[index] = copy
                seen.add(name)


def _is_plain(tensor: TensorProto) -> bool:
    """Whether it has several entries along one axis only, or the same one everywhere (the first state of an LSTM)."""
    if tensor.data_type not in _REAL or math.prod(tensor.dims) < 2:
        return False
    if sum(size > 1 for size in tensor.dims) == 1:
        return True
    if tensor.data_location == TensorProto.EXTERNAL:
        return False
    entries = numpy_helper.to_array(tensor).reshape(-1)
    return bool(entries[0] == entries[1] and (entries == entries[0]).all())


_REAL = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE}


def _slices(graph: onnx.GraphProto) -> None:
    """Put a Slice for each SequenceAt of a SplitToSequence: that is how some exporters say Split."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {value.name: [] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for split in [n for n in graph.node if n.op_type == "SplitToSequence" and len(n.input) == 2]:
        readers_ = readers.get(split.output[0], [])
        whole = bool(readers_) and all(n.op_type == "SequenceAt" and n.input[1] in stored for n in readers_)
        if not whole or split.input[1] not in stored:
            continue  # another graph reads it, or sizes are only known when it runs
        sizes = numpy_helper.to_array(stored[split.input[1]])
        axis = next((a.i for a in split.attribute if a.name == "axis"), 0)
        picked = [int(numpy_helper.to_array(stored[n.input[1]])) for n in readers_]
        if min(picked) < 0 and sizes.ndim == 0:
            continue
        for node, index in zip(readers_, picked, strict=True):
            start = index * int(sizes) if sizes.ndim == 0 else int(sizes[: index % sizes.size].sum())
            end = start + int(sizes if sizes.ndim == 0 else sizes[index])
            names = [f"{node.output[0]}_{what}" for what in ("start", "end", "axis")]
            for name, number in zip(names, (start, end, axis), strict=True):
                graph.initializer.append(numpy_helper.from_array(np.array([number], np.int64), name))
            node.op_type = "Slice"
            node.input[:] = [split.input[0], *names]
        graph.node.remove(split)


def _copy_fills(graph: onnx.GraphProto) -> None:
    """Give every reader of a tensor that repeats one number its own node: exporters make one for several layers."""
    single = {tensor.name for tensor in graph.initializer if math.prod(tensor.dims) == 1}
    fills = {
        node.output[0]: node
        for node in graph.node
        if node.op_type == "ConstantOfShape" or (node.op_type == "Expand" and node.input[0] in single)
    }
    if not fills:
        return
    nodes: list[onnx.NodeProto] = []
    read = dict.fromkeys(fills, 0)
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name not in fills:
                continue
            read[name] += 1
            if read[name] > 1:
                copy = onnx.NodeProto.FromString(fills[name].SerializeToString())
                copy.output[0] = node.input[index] = f"{name}_copy{read[name]}"
                copy.name = copy.name and f"{copy.name}_copy{read[name]}"
                nodes.append(copy)
        nodes.append(node)
    if len(nodes) > len(graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def skeleton(model: Model) -> onnx.ModelProto:
    """A model's graph with the data of its large tensors left out."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in tensors(proto):
        if math.prod(tensor.dims) > SMALL:
            empty(tensor)
    return proto


def empty(tensor: TensorProto) -> None:
    """Drop a tensor's data; it can no longer be read."""
    dims, kind, name = list(tensor.dims), tensor.data_type, tensor.name
    tensor.Clear()
    tensor.dims.extend(dims)
    tensor.data_type, tensor.name = kind, name
    tensor.data_location = TensorProto.EXTERNAL


def _read_small(proto: onnx.ModelProto, model: Model) -> None:
    """Sizes and indices may be kept in external files, too."""
    for tensor in tensors(proto):
        if tensor.data_location == TensorProto.EXTERNAL and math.prod(tensor.dims) <= SMALL:
            content = model.content(tensor)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = content
