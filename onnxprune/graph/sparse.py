"""ONNX's sparse_initializer: made dense to work on, made sparse again to store."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from onnxprune.errors import PruneError

DENSE_LIMIT = 2**31
"""Bytes a sparse initializer may grow to: more is a file that lies about its size."""

STORABLE = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT8, TensorProto.UINT8}
"""Types that onnxruntime reads from a sparse_initializer."""


def densify(proto: onnx.ModelProto) -> frozenset[str]:
    """Turn the main graph's sparse initializers into dense ones, in place; returns their names.

    onnxruntime does the same at load, so nothing about the computation changes.
    """
    graph = proto.graph
    names = frozenset(item.values.name for item in graph.sparse_initializer)
    for item in graph.sparse_initializer:
        graph.initializer.append(_dense(item))
    graph.ClearField("sparse_initializer")
    return names


def compress(proto: onnx.ModelProto, names: Collection[str] | None) -> None:
    """Store initializers of the main graph sparsely, in place, where that takes fewer bytes.

    Args:
        proto: the model; a sparse entry costs its value and an int64 index, so the break-even is a share of
            zeros of 2/3 for float32.
        names: the initializers to consider; None for all.
    """
    if names is not None and not names:
        return
    graph = proto.graph
    inputs = {value.name for value in graph.input}
    dense: list[TensorProto] = []
    for tensor in graph.initializer:
        wanted = (names is None or tensor.name in names) and tensor.name not in inputs
        packed = _sparse(tensor) if wanted and tensor.data_type in STORABLE else None
        if packed is None:
            dense.append(tensor)
        else:
            graph.sparse_initializer.append(packed)
    if len(dense) < len(graph.initializer):
        kept = [onnx.TensorProto.FromString(t.SerializeToString()) for t in dense]
        graph.ClearField("initializer")
        graph.initializer.extend(kept)


def _sparse(tensor: TensorProto) -> onnx.SparseTensorProto | None:
    if tensor.data_location == TensorProto.EXTERNAL or not tensor.dims:
        return None
    array = numpy_helper.to_array(tensor)
    flat = array.reshape(-1)
    (indices,) = np.nonzero(flat.view(f"u{flat.itemsize}"))  # by bits: -0.0 must come back as -0.0
    if indices.size * (flat.itemsize + 8) >= flat.nbytes:
        return None
    item = onnx.SparseTensorProto()
    item.values.CopyFrom(numpy_helper.from_array(flat[indices], tensor.name))
    item.indices.CopyFrom(numpy_helper.from_array(indices.astype(np.int64), f"{tensor.name}_indices"))
    item.dims.extend(tensor.dims)
    return item


def _dense(item: onnx.SparseTensorProto) -> TensorProto:
    name, dims = item.values.name, list(item.dims)
    size = int(np.prod(dims, dtype=object))
    if TensorProto.EXTERNAL in (item.values.data_location, item.indices.data_location):
        raise PruneError(f"sparse initializer '{name}' keeps its data in another file, which is not supported: load and save it dense first")
    try:
        values, indices = numpy_helper.to_array(item.values), numpy_helper.to_array(item.indices)
        if any(d < 0 for d in dims) or size * values.itemsize > DENSE_LIMIT:
            raise PruneError(f"sparse initializer '{name}' declares the shape {dims}, more than {DENSE_LIMIT} bytes when dense")
        flat = np.zeros(size, values.dtype)
        if indices.ndim == 2:
            indices = np.ravel_multi_index(tuple(indices.T), dims)
        flat[indices] = values
    except (ValueError, IndexError, TypeError) as error:
        if isinstance(error, PruneError):
            raise
        raise PruneError(f"sparse initializer '{name}' of shape {dims} is inconsistent: {error}") from error
    return numpy_helper.from_array(flat.reshape(dims), name)
