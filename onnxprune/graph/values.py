"""The values of a weight, part by part: from the file they lie in where its operator sees them as they are stored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from onnxprune.graph import expression as ex
from onnxprune.graph.assemble import MAX_THREADS
from onnxprune.graph.stored import CHUNK, Extent
from onnxprune.graph.weights import TensorStorage, Weight

SPAN = 1 << 22
"""Values given to a thread at a time."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Values:
    """The values of a weight in the order they lie in memory.

    Attributes:
        shape: in role order.
        axes: of that shape, from the slowest to the fastest in memory.
        dtype: of the values.
        source: where they are: in a file, or in memory (one-dimensional).
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    dtype: np.dtype[Any]
    source: Extent | Array

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def in_file(self) -> bool:
        """Whether they lie in a file, where what is in memory order is in the stored order, too."""
        return isinstance(self.source, Extent)

    def chunks(self, start: int, stop: int, buffer: Array) -> Iterator[Array]:
        """Values from start to stop in memory order, as many at a time as fit a buffer of uint8, which may be used.

        Raises:
            PruneError: their file is not what it was.
        """
        width = self.dtype.itemsize
        if isinstance(self.source, Extent):
            for part in self.source.chunks(start * width, stop * width, buffer[: buffer.size // width * width]):
                yield part.view(self.dtype)
        else:
            step = buffer.size // width
            for first in range(start, stop, step):
                yield self.source[first : min(first + step, stop)]

    def runs(self, starts: Iterable[int], length: int) -> Array:
        """Runs of neighbouring values, one after the other; they are shorter where the values end.

        Raises:
            PruneError: their file is not what it was.
        """
        width = self.dtype.itemsize
        if not isinstance(self.source, Extent):
            return np.concatenate([self.source[start : start + length] for start in starts])
        size = self.size
        return self.source.runs([(start * width, min(length, size - start) * width) for start in starts]).view(
            self.dtype
        )

    def places(self, at: Array) -> Array:
        """C-order indices in role order of elements in memory order."""
        if list(self.axes) == sorted(self.axes):
            return at
        coordinates = np.unravel_index(at, [self.shape[axis] for axis in self.axes])
        order = np.argsort(self.axes)
        return np.asarray(np.ravel_multi_index([coordinates[axis] for axis in order], self.shape))


def of(weight: Weight) -> Values:
    """The values of a weight, left in their file where its operator sees them as they are stored.

    Otherwise they are computed, and are in memory until they are forgotten.
    """
    if isinstance(weight.storage, TensorStorage) and isinstance(weight.uses[0].expression, (ex.Leaf, ex.Move)):
        extent = weight.storage.model.stored(weight.leaf.tensor)
        plain = not any(isinstance(e, ex.Scale) for e in _expressions(weight.uses[0].expression))
        if extent is not None and plain and weight.dtype.itemsize * weight.size == extent.length:
            probe = np.empty(weight.shape, np.bool_)  # never touched: only its addresses matter
            view = weight.role(probe)
            axes = _axes(view)
            if axes is not None and view.ctypes.data == probe.ctypes.data and view.size == probe.size:
                return Values(view.shape, axes, weight.dtype, extent)
    values = weight.values()
    axes = _axes(values)
    if axes is None:
        values, axes = np.ascontiguousarray(values), tuple(range(values.ndim))
    return Values(values.shape, axes, values.dtype, values.transpose(axes).reshape(-1))


def zeros(values: Values, threads: int | None = None, stays: Callable[[int, int], Array] | None = None) -> int:
    """How many of a weight's values are 0, or do not stay (of the values from one in memory order to another)."""
    size = values.size
    spans = [(start, min(start + SPAN, size)) for start in range(0, size, SPAN)]
    count = partial(_zeros, values, stays)
    if len(spans) < 4 or threads == 1:
        return sum(map(count, spans))
    with ThreadPoolExecutor(threads or min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        return sum(pool.map(count, spans))


def _zeros(values: Values, stays: Callable[[int, int], Array] | None, span: tuple[int, int]) -> int:
    found, at = 0, span[0]
    for part in values.chunks(*span, np.empty(CHUNK, np.uint8)):
        real = part.dtype.kind not in "iu"
        bits = np.left_shift(part.view(f"u{part.dtype.itemsize}"), 1) if real else part  # -0.0 is 0, too
        if stays is not None:
            bits = bits * stays(at, at + part.size)
        found += part.size - int(np.count_nonzero(bits))
        at += part.size
    return found


def _expressions(expression: ex.Expression) -> Iterator[ex.Expression]:
    yield expression
    if not isinstance(expression, ex.Leaf):
        for arg in expression.args if isinstance(expression, ex.Move) else (expression.arg,):
            yield from _expressions(arg)


def _axes(view: Array) -> tuple[int, ...] | None:
    """The axes of an array from the slowest to the fastest; None where it is not in one piece."""
    axes = tuple(int(axis) for axis in np.argsort([-stride for stride in view.strides], kind="stable"))
    return axes if view.transpose(axes).flags.c_contiguous else None
