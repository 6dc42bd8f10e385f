"""A decision about channels carried out: zeroed in place, or cut out of the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph.expression import per_axis
from onnxprune.graph.model import Model, encode, open_proto, subgraphs
from onnxprune.graph.weights import Weight
from onnxprune.structure.coupling import Coupling
from onnxprune.structure.cutting import Stuck, cut, keep

Removed = Mapping[str, np.ndarray]
"""Group name -> boolean array, True where the channel goes."""


def kept(coupling: Coupling, removed: Removed) -> dict[str, np.ndarray]:
    """Which entries of which stored tensors stay, in a model that keeps its shapes.

    Those are the weights in roles, outputs and inputs, and all biases, scales and constants that go along, but for what
    is divided by or raised to: a zero there would do harm.

    Returns:
        Tensor name -> boolean array of its stored shape; only tensors that lose entries.
    """
    dead = coupling.dead(removed)
    flow, solution = coupling.flow, coupling.solution
    masks = {}
    for name, tensor in flow.stored.items():
        if name in flow.solid:
            continue
        keep_: np.ndarray | None = None
        for axis, labels in enumerate(flow.axes[name] or ()):
            root = solution.root[labels]
            gone = ~solution.pinned[root] & dead[root]
            if gone.any():
                keep_ = np.ones(tuple(tensor.dims), np.bool_) if keep_ is None else keep_
                np.moveaxis(keep_, axis, 0)[gone] = False
        if keep_ is not None:
            masks[name] = keep_
    return masks


def alive(coupling: Coupling, removed: Removed, name: str) -> list[np.ndarray]:
    """Which positions of a stored tensor stay, axis by axis, when channels are cut out."""
    dead, solution = coupling.dead(removed), coupling.solution
    roots = [solution.root[axis] for axis in coupling.flow.axes[name] or ()]
    return [solution.pinned[root] | ~dead[root] for root in roots]


def gone(coupling: Coupling, live: Callable[[str], np.ndarray | None]) -> dict[str, np.ndarray]:
    """The channels of which nothing is left.

    Args:
        coupling: the groups.
        live: stored tensor -> which of its entries are left (stored shape); None where that does not count.

    Returns:
        Group name -> True where no entry of any tensor that goes along is left; one channel always stays.
    """
    removed = {}
    for group in coupling.groups:
        empty = np.ones(group.size, np.bool_)
        told = [(member, live(member.name)) for member in group.members if member.name not in coupling.flow.solid]
        for member, entries in told:
            if entries is not None:
                lines = np.moveaxis(entries, member.axis, 0).reshape(entries.shape[member.axis], -1)
                empty &= ~lines[member.places].any((1, 2))
        if empty.all():  # or nothing was told
            empty[: 1 if any(entries is not None for _, entries in told) else None] = False
        removed[group.name] = empty
    return removed


def zero(coupling: Coupling, masks: Mapping[str, np.ndarray]) -> None:
    """Put 0 where masks say so, in the coupling's own model."""
    model = coupling.model
    values = {str(v.name): v for graph in model.graph.graphs() for v in graph.initializers.values()}
    for name, mask in masks.items():
        tensor = values[name].const_value
        assert tensor is not None
        nought: np.ndarray = np.zeros((), tensor.dtype.numpy())
        if name in coupling.flow.shifted:
            zero_point, axis = coupling.flow.shifted[name]
            stored = values[zero_point].const_value
            assert stored is not None
            nought = model.current(stored)
            block = -(-mask.shape[axis] // nought.shape[axis]) if nought.ndim > 1 else 0
            nought = per_axis(nought, mask.shape, axis, block)
        model.edit(tensor, partial(_zeroed, coupling.by_name.get(name), nought, mask))


def _zeroed(weight: Weight | None, nought: np.ndarray, mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    return np.where(mask, array, nought).astype(array.dtype) if weight is None else weight.pruned(mask, array)


def shrink(coupling: Coupling, removed: Removed) -> Model:
    """A model without the channels that go; edits of the coupling's model are kept.

    Raises:
        PruneError: a node cannot be made smaller.
    """
    model = coupling.model
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    values = {str(v.name): v.const_value for graph in model.graph.graphs() for v in graph.initializers.values()}

    def fill(tensor: TensorProto, alive: list[np.ndarray]) -> None:
        stored = values[tensor.name]
        assert stored is not None
        array = keep(model.current(stored), alive)
        kind, name = tensor.data_type, tensor.name
        tensor.Clear()
        tensor.name, tensor.data_type = name, kind
        tensor.dims.extend(array.shape)
        tensor.raw_data = encode(array, ir.DataType(kind))

    try:
        cut(proto, coupling.flow, coupling.solution, coupling.dead(removed), fill)
    except Stuck as error:
        raise PruneError(f"the model cannot be made smaller: {error}; leave the layers around it out") from None
    before = _read(model.proto)
    after = _read(proto)
    for graph in subgraphs(proto):
        graph.ClearField("value_info")
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name in before - after:  # sizes and indices that others have taken the place of
                del graph.initializer[index]
    return open_proto(proto, model.folder, model.path)


def _read(proto: onnx.ModelProto) -> set[str]:
    """The names that nodes and outputs refer to."""
    names = {name for graph in subgraphs(proto) for node in graph.node for name in node.input}
    return names | {value.name for graph in subgraphs(proto) for value in graph.output}
