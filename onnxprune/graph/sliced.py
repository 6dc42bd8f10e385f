"""Tensors cut out of tensors in files: what is left is read, changed and put together when somebody reads it.

So a model whose tensors are cut is a model with external data like any other, though its data file does not exist until
it is saved, and no tensor of it is ever in memory as a whole.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, cast

import numpy as np

from onnxprune.graph.stored import CHUNK, Change, Extent, Source, fill

PAGE = 4096
"""Tensors of so many bytes start on a multiple of it, so that they can be mapped."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Slice:
    """What is left of a tensor in a file when positions of its axes go.

    Attributes:
        extent: the tensor's bytes.
        dtype: of its values; of one byte at least.
        alive: for each axis a boolean array, True where the position stays.
        change: a change of the tensor's values that comes before the cut.
    """

    extent: Extent
    dtype: np.dtype[Any]
    alive: tuple[Array, ...]
    change: Change | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is left."""
        return tuple(int(np.count_nonzero(stays)) for stays in self.alive)

    @property
    def length(self) -> int:
        """Bytes of what is left."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def _split(self) -> int:
        """How many leading axes make up rows: with the fewest of which a row is no more than a chunk."""
        sizes = [stays.size for stays in self.alive]
        splits = range(len(sizes) + 1)
        return next(k for k in splits if math.prod(sizes[k:]) * self.dtype.itemsize <= CHUNK or k == len(sizes))

    @cached_property
    def rows(self) -> Array:
        """The rows that stay, in whole or in part."""
        stays: Array = np.ones(1, np.bool_)
        for axis in self.alive[: self._split]:
            stays = np.logical_and.outer(stays, axis).reshape(-1)
        return np.flatnonzero(stays)

    @property
    def width(self) -> int:
        """Bytes of what is left of a row."""
        return math.prod(self.shape[self._split :]) * self.dtype.itemsize

    def cut(self, file: BinaryIO, first: int, last: int) -> Array:
        """What is left of the rows first to last of `rows`, as uint8.

        Args:
            file: the file that the tensor is in.
            first: where to begin.
            last: where to end; not included.

        Raises:
            PruneError: the file is not what it was.
        """
        inner = self.alive[self._split :]
        whole = math.prod(stays.size for stays in inner)
        rows = self.rows[first:last]
        out = np.empty((rows.size, self.width), np.uint8)
        step = max(1, CHUNK // max(whole * self.dtype.itemsize, 1))
        buffer = np.empty(step * whole * self.dtype.itemsize, np.uint8)
        done = 0
        while done < rows.size:
            start = int(rows[done])
            end = int(np.searchsorted(rows, start + step))
            count = int(rows[end - 1]) + 1 - start
            part = buffer[: count * whole * self.dtype.itemsize]
            file.seek(self.extent.offset + start * whole * self.dtype.itemsize)
            fill(file, part)
            values = part.view(self.dtype)
            if self.change is not None:
                self.change.part(values, start * whole)
            values = values.reshape(count, *(stays.size for stays in inner))[rows[done:end] - start]
            for axis, stays in enumerate(inner, 1):
                if not stays.all():
                    values = np.compress(stays, values, axis)
            out[done:end] = np.ascontiguousarray(values).view(np.uint8).reshape(end - done, self.width)
            done = end
        return out.reshape(-1)


Part = Slice | Extent


@dataclass(frozen=True, eq=False)
class Sliced:
    """A file that does not exist: tensors cut out of others, and whole ones, one after the other.

    Attributes:
        path: the file that they come from.
        parts: the tensors.
    """

    path: str
    parts: Sequence[Part]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each part starts."""
        offsets, at = [], 0
        for part in self.parts:
            at += -at % (PAGE if part.length >= PAGE else 16)
            offsets.append(at)
            at += part.length
        return tuple(offsets)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return self.offsets[-1] + self.parts[-1].length if self.parts else 0

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file opened for reading.

        Raises:
            PruneError: what it is made of is gone, or has been written to.
        """
        with contextlib.ExitStack() as stack:
            yield cast(BinaryIO, _Reader(self, stack))

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends.

        Raises:
            PruneError: see `open`.
        """
        out = np.empty(max(min(length, self.size - offset), 0), np.uint8)
        with self.open() as file:
            file.seek(offset)
            fill(file, out)
        return out.tobytes()


class _Reader(io.RawIOBase):
    """A place in a file that does not exist; the block made last is kept, since the next bytes are often of it."""

    def __init__(self, sliced: Sliced, stack: contextlib.ExitStack) -> None:
        self.sliced, self.stack = sliced, stack
        self.at = 0
        self.files: dict[Source, BinaryIO] = {}
        self.block, self.start = np.empty(0, np.uint8), 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        assert whence == io.SEEK_SET
        self.at = offset
        return offset

    def readinto(self, buffer: Any) -> int:
        """Read some bytes; none where the file ends."""
        view = np.frombuffer(buffer, np.uint8)
        if not self.start <= self.at < self.start + self.block.size:
            self.start, self.block = self.make(self.at)
        part = self.block[self.at - self.start :][: view.size]
        view[: part.size] = part
        self.at += part.size
        return int(part.size)

    def make(self, at: int) -> tuple[int, Array]:
        """A block that holds a byte, and where it starts."""
        offsets, parts = self.sliced.offsets, self.sliced.parts
        index = int(np.searchsorted(offsets, at, "right")) - 1
        if at >= self.sliced.size:
            return at, np.empty(0, np.uint8)
        part, start = parts[index], offsets[index]
        if at >= start + part.length:
            return start + part.length, np.zeros(offsets[index + 1] - start - part.length, np.uint8)
        file = self.file(part if isinstance(part, Extent) else part.extent)
        if isinstance(part, Extent):
            first = (at - start) // CHUNK * CHUNK
            block = np.empty(min(CHUNK, part.length - first), np.uint8)
            file.seek(part.offset + first)
            fill(file, block)
            return start + first, block
        count = max(1, CHUNK // part.width)
        row = (at - start) // part.width // count * count
        return start + row * part.width, part.cut(file, row, row + count)

    def file(self, extent: Extent) -> BinaryIO:
        """The file that an extent is in, opened once."""
        if extent.file not in self.files:
            self.files[extent.file] = self.stack.enter_context(extent.file.open())
        return self.files[extent.file]
