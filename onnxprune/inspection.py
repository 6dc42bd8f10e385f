"""Looking into a model: its weights in their roles, their zeros, parameters and multiply-accumulates."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxprune import progress
from onnxprune.graph import macs, values
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.graph.tensors import stored_tensors
from onnxprune.graph.weights import FLOATS, INTEGERS, Skipped, Weight, find
from onnxprune.graph.wire import OWN
from onnxprune.runtime import feeds
from onnxprune.runtime.session import ModelInput

FLOAT8 = {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ}
PARAMETERS = FLOATS | INTEGERS | FLOAT8
"""Types that count as parameters: floats and quantised integers. Integers of 32 and 64 bits are shapes, indices and
the like."""


@dataclass(frozen=True)
class WeightInfo:
    """One weight: a stored tensor in its role.

    Attributes:
        name: the initializer's name, or that of a Constant node's output.
        op_types: operators that read it, the one that gives it its role first.
        shape: as stored.
        role_shape: (output, input, *kernel).
        dtype: as stored.
        size: entries that reach an operator.
        zeros: entries that the operator sees as exactly 0.
        macs: multiply-accumulates of one run; None where they are not known.
        macs_unknown: the reason; empty where they are known.
    """

    name: str
    op_types: tuple[str, ...]
    shape: tuple[int, ...]
    role_shape: tuple[int, ...]
    dtype: str
    size: int
    zeros: int
    macs: int | None
    macs_unknown: str = ""

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class Port:
    """An input or output of the model.

    Attributes:
        name: its name.
        dtype: its type.
        shape: as declared: sizes, names, or None for dims that are open; None where nothing is declared.
        taken: the sizes for which MACs are counted; of an output, as inferred from the inputs'. None where not known.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None
    taken: tuple[int | None, ...] | None


@dataclass(frozen=True)
class Inspection:
    """What a model consists of.

    Attributes:
        path: the file; None for a model in memory.
        weights: every weight in its role, in graph order.
        skipped: the weights that pruning leaves alone, with reasons.
        inputs: the graph's inputs.
        outputs: the graph's outputs.
        parameters: entries of all stored tensors (initializers and Constant nodes at any depth, each once) of floating
            or of 4- to 16-bit integer type, read by an operator or not.
        nonzero: parameters that are not 0; in a weight, that its operator does not see as 0.
        file_bytes: of the file and its external data; None for a model in memory.
        opsets: domain -> version.
        ir_version: of the file format.
        producer: what wrote the file.
        notes: what was assumed.
    """

    path: str | None
    weights: tuple[WeightInfo, ...]
    skipped: tuple[Skipped, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    parameters: int
    nonzero: int
    file_bytes: int | None
    opsets: Mapping[str, int]
    ir_version: int
    producer: str
    notes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Entries of all weights."""
        return sum(weight.size for weight in self.weights)

    @property
    def zeros(self) -> int:
        """Zeros of all weights."""
        return sum(weight.zeros for weight in self.weights)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all weights."""
        return self.zeros / self.size if self.size else 0.0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all weights for which they are known."""
        return sum(weight.macs or 0 for weight in self.weights)

    @property
    def macs_complete(self) -> bool:
        """Whether they are known for every weight."""
        return all(weight.macs is not None for weight in self.weights)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        totals = {name: getattr(self, name) for name in ("size", "zeros", "sparsity", "macs", "macs_complete")}
        fields = asdict(self) | totals
        fields["weights"] = [asdict(weight) | {"sparsity": weight.sparsity} for weight in self.weights]
        return fields


def inspect(model: ModelSource, shapes: Mapping[str, Sequence[int]] | None = None) -> Inspection:
    """Look into a model; onnxruntime is not needed for it.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model; it is not changed.
        shapes: sizes of inputs with dynamic dims, by input name, as `benchmark` takes them; others are assumed, and
            noted. Only MACs depend on them.

    Raises:
        PruneError: the model cannot be read, or a shape does not fit an input.
    """
    loaded = load(model)
    graph = loaded.graph.graph
    weights, skipped = find(loaded)
    inputs = [_model_input(value, graph) for value in graph.inputs if isinstance(value.type, ir.TensorType)]
    required = [value for value in inputs if value.required]
    sizes, notes = feeds.resolve_shapes(required, dict(shapes or {}))
    undeclared = {str(v.name) for v in graph.inputs if v.shape is None} - (shapes or {}).keys()
    sizes = {name: shape for name, shape in sizes.items() if name not in undeclared}
    zeros = _weight_zeros(weights, {})
    parameters, nonzero = _count_parameters(loaded, weights, zeros)
    file_bytes = None if loaded.path is None else stored_bytes(loaded.path)
    ports = [*graph.inputs], [*graph.outputs]
    known, results, branches = macs.count(loaded, weights, sizes)
    if branches:
        notes.append("weights in the branches of an If are counted as if every branch ran")
    return Inspection(
        path=None if loaded.path is None else str(loaded.path),
        weights=tuple(_info(weight, zeros[weight.name], known[weight.name]) for weight in weights),
        skipped=tuple(skipped),
        inputs=tuple(_port(value, sizes) for value in ports[0] if value.name not in graph.initializers),
        outputs=tuple(_port(value, results) for value in ports[1]),
        parameters=parameters,
        nonzero=nonzero,
        file_bytes=file_bytes,
        opsets=dict(loaded.graph.opset_imports),
        ir_version=loaded.proto.ir_version,
        producer=" ".join(filter(None, (loaded.proto.producer_name, loaded.proto.producer_version))),
        notes=tuple(notes),
    )


def parameters(model: Model, known: Mapping[str, int]) -> tuple[int, int]:
    """The parameters of a model, and how many of them are not 0; the zeros of some weights are known by their names."""
    weights, _ = find(model)
    zeros = _weight_zeros(weights, known)
    return _count_parameters(model, weights, zeros)


def _weight_zeros(weights: Sequence[Weight], known: Mapping[str, int]) -> dict[str, int]:
    """The zeros of each weight, counted where they are not known."""
    zeros = dict(known)
    unknown = [weight for weight in weights if weight.name not in known]
    with progress.task("counting zeros", sum(w.size * w.dtype.itemsize for w in unknown)) as advance:
        for weight in unknown:
            zeros[weight.name] = values.zeros(values.of(weight))
            advance(weight.size * weight.dtype.itemsize)
    return zeros


def stored_bytes(path: str | os.PathLike[str]) -> int:
    """Bytes of a model file and the external data files it refers to.

    Raises:
        PruneError: it is no model, or they are not there.
    """
    model = load(path)
    return sum({file.path: file.size for file in model.data.values()}.values()) + (
        0 if OWN in model.data else os.path.getsize(path)
    )


def _info(weight: Weight, zeros: int, known: int | str) -> WeightInfo:
    return WeightInfo(
        name=weight.name,
        op_types=weight.op_types,
        shape=weight.shape,
        role_shape=weight.role_shape,
        dtype=weight.dtype.name,
        size=weight.size,
        zeros=zeros,
        macs=known if isinstance(known, int) else None,
        macs_unknown="" if isinstance(known, int) else known,
    )


def _count_parameters(model: Model, weights: Sequence[Weight], zeros: Mapping[str, int]) -> tuple[int, int]:
    """Parameters, and those that are not 0."""
    in_roles = {id(weight.leaf.value): zeros[weight.name] for weight in weights}
    total = gone = 0
    for value, tensor in stored_tensors(model.graph):
        if tensor.dtype in PARAMETERS:
            size = int(tensor.size)
            total += size
            gone += in_roles[id(value)] if id(value) in in_roles else _zeros(model, tensor)
    return total, total - gone


def _zeros(model: Model, tensor: ir.TensorProtocol) -> int:
    extent = model.stored(tensor)
    if extent is None or tensor.dtype not in FLOATS:
        return int(tensor.size) - int(np.count_nonzero(model.read(tensor)))
    return values.zeros(values.Values((int(tensor.size),), (0,), np.dtype(tensor.dtype.numpy()), extent))


def _model_input(value: ir.Value, graph: ir.Graph) -> ModelInput:
    known = value.dtype not in (None, ir.DataType.UNDEFINED)
    dtype = np.dtype(value.dtype.numpy()) if known and value.dtype is not None else np.dtype(np.float32)
    return ModelInput(str(value.name), dtype, _dims(value) or (), value.name not in graph.initializers)


def _port(value: ir.Value, taken: Mapping[str, Sequence[int | None]]) -> Port:
    dtype = "" if value.dtype is None else value.dtype.name.lower()
    if not isinstance(value.type, ir.TensorType):
        dtype = "" if value.type is None else str(value.type)
    sizes = taken.get(str(value.name))
    return Port(str(value.name), dtype, _dims(value), None if sizes is None else tuple(sizes))


def _dims(value: ir.Value) -> tuple[int | str | None, ...] | None:
    """A declared shape; exporters write 0, -1 or an empty name where they mean any size."""
    if value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return tuple(dim if dim and (isinstance(dim, str) or dim > 0) else None for dim in dims)


__all__ = ["Inspection", "Port", "WeightInfo", "inspect", "parameters", "stored_bytes"]
