"""ONNX's sparse_initializer: made dense to work on, made sparse again to store."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph.valid import AXES, location

DENSE_LIMIT = 2**28
"""Bytes that the sparse initializers of any model may grow to."""

DENSE_RATIO = 100
"""How many times a model's size they may grow to beyond that: more is a file that lies about its shapes."""

STORABLE = {
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.INT8,
    TensorProto.UINT8,
}
"""Types of weights that onnxruntime reads from a sparse_initializer (4-bit ones it does not)."""


def densify(graphs: Iterable[onnx.GraphProto]) -> frozenset[str]:
    """Turn sparse initializers into dense ones, in place; returns their names.

    onnxruntime does the same at load, so nothing about the computation changes.

    Args:
        graphs: the model's graphs, at any depth; they were checked.
    """
    names: list[str] = []
    for graph in graphs:
        for item in graph.sparse_initializer:
            tensor = _dense(item)
            names.append(tensor.name)
            graph.initializer.append(tensor)
        graph.ClearField("sparse_initializer")
    return frozenset(names)


def check(proto: onnx.ModelProto, graphs: Iterable[onnx.GraphProto], what: str) -> None:
    """Sparse initializers are consistent, and not out of all proportion when they are made dense.

    Raises:
        PruneError: one is not; nothing was allocated for its shape.
    """
    budget = 0
    for graph in graphs:
        for item in graph.sparse_initializer:
            budget = budget or max(DENSE_LIMIT, DENSE_RATIO * proto.ByteSize())
            budget -= _check(item, budget, what)


def compress(graphs: Iterable[onnx.GraphProto], names: Collection[str] | None) -> None:
    """Store initializers sparsely, in place, where that takes fewer bytes and onnxruntime runs the result.

    An entry costs its value and an int64 index, so the break-even is a share of zeros of 2/3 for float32. What feeds an
    output of its graph stays dense, since onnxruntime would return it as a sparse tensor; so does what a caller may
    override (a graph input). Every operator can read one: onnxruntime makes them dense when it loads the model.

    Args:
        graphs: the graphs of a model, at any depth.
        names: the initializers to consider; None for all.
    """
    for graph in graphs:
        fixed = {value.name for value in (*graph.input, *graph.output)}
        for index in reversed(range(len(graph.initializer))):
            tensor = graph.initializer[index]
            if tensor.name in fixed or (names is not None and tensor.name not in names):
                continue
            item = _sparse(tensor)
            if item is not None:
                graph.sparse_initializer.insert(0, item)
                del graph.initializer[index]


def _sparse(tensor: TensorProto) -> onnx.SparseTensorProto | None:
    """A tensor as a sparse one; None where that is not smaller, or not possible."""
    if tensor.data_type not in STORABLE or tensor.data_location == TensorProto.EXTERNAL or not tensor.dims:
        return None
    flat = numpy_helper.to_array(tensor).reshape(-1)
    bits = flat.view(f"u{flat.itemsize}")  # -0.0 must come back as -0.0
    if np.count_nonzero(bits) * (flat.itemsize + 8) >= flat.nbytes:
        return None
    (indices,) = np.nonzero(bits)
    item = onnx.SparseTensorProto()
    item.values.CopyFrom(numpy_helper.from_array(flat[indices], tensor.name))
    item.indices.CopyFrom(numpy_helper.from_array(indices.astype(np.int64), f"{tensor.name}_indices"))
    item.dims.extend(tensor.dims)
    return item if item.ByteSize() < tensor.ByteSize() else None


def _check(item: onnx.SparseTensorProto, budget: int, what: str) -> int:
    """Bytes of a sparse tensor when it is dense, which are at most `budget`."""
    name, dims = item.values.name, list(item.dims)
    wrong = f"{what}: sparse initializer '{name}' of shape {dims[:AXES]}"
    for tensor in (item.values, item.indices):
        if tensor.data_location == TensorProto.EXTERNAL:
            raise PruneError(
                f"{wrong} keeps its data in another file ('{location(tensor)}'); load and save it dense first"
            )
    values, indices = numpy_helper.to_array(item.values), numpy_helper.to_array(item.indices)
    if any(d < 0 for d in dims) or len(dims) > AXES or values.dtype.kind == "O" or indices.dtype.kind not in "iu":
        raise PruneError(
            f"{wrong} is inconsistent: it needs a shape, numbers as values and integers as indices; export it again"
        )
    size: int = math.prod(dims)
    if size * values.itemsize > budget:
        raise PruneError(f"{wrong} takes more memory when dense than the file's size justifies; store it dense first")
    if indices.ndim == 2 and indices.shape[1] == len(dims):
        inside = bool(((indices >= 0) & (indices < np.array(dims, np.int64))).all())
    else:
        inside = indices.ndim == 1 and bool(((indices >= 0) & (indices < size)).all())
    if not inside or values.shape != indices.shape[:1]:
        raise PruneError(f"{wrong} is inconsistent: {values.shape} values at indices that do not fit; export it again")
    return size * values.itemsize


def _dense(item: onnx.SparseTensorProto) -> TensorProto:
    """A sparse tensor as a dense one."""
    dims = list(item.dims)
    values, indices = numpy_helper.to_array(item.values), numpy_helper.to_array(item.indices)
    if indices.ndim == 2:
        indices = indices @ np.array([math.prod(dims[i + 1 :]) for i in range(len(dims))], np.int64)
    flat = np.zeros(math.prod(dims), values.dtype)
    flat[indices] = values
    return numpy_helper.from_array(flat.reshape(dims), item.values.name)
