"""A decision about channels carried out: zeroed in place, or cut out of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, encode, open_proto, subgraphs
from onnxprune.graph.weights import Weight
from onnxprune.structure.coupling import Coupling
from onnxprune.structure.cutting import Stuck, cut, keep

Removed = Mapping[str, np.ndarray]
"""Group name -> boolean array, True where the channel goes."""


def kept(coupling: Coupling, removed: Removed) -> dict[str, np.ndarray]:
    """Which entries of which stored tensors stay, in a model that keeps its shapes.

    Those are the weights in roles, outputs and inputs, and the biases, scales and constants that go along. What is
    divided by, raised to or compared with stays: a zero there would do harm.

    Returns:
        Tensor name -> boolean array of its stored shape; only tensors that lose entries.
    """
    dead = coupling.dead(removed)
    flow, solution = coupling.flow, coupling.solution
    masks = {}
    for name, tensor in flow.stored.items():
        if name not in coupling.by_name and (name not in flow.zeroed or name in flow.solid):
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


def zero(coupling: Coupling, masks: Mapping[str, np.ndarray]) -> None:
    """Put 0 where masks say so, in the coupling's own model."""
    model = coupling.model
    values = {str(v.name): v for graph in model.graph.graphs() for v in graph.initializers.values()}
    for name, mask in masks.items():
        tensor = values[name].const_value
        assert tensor is not None
        model.edit(tensor, partial(_zeroed, coupling.by_name.get(name), mask))


def _zeroed(weight: Weight | None, mask: np.ndarray, array: np.ndarray) -> np.ndarray:
    return np.where(mask, array, np.zeros((), array.dtype)) if weight is None else weight.pruned(mask, array)


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
    for graph in subgraphs(proto):
        graph.ClearField("value_info")
    return open_proto(proto, model.folder, model.path)
