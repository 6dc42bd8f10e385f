"""Bytes in files: read piecewise, and only as long as a file is what it was when a model was loaded from it."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np

from onnxprune.errors import PruneError

CHUNK = 1 << 21
"""Bytes read, worked on and written at a time: they stay in cache, and memory stays flat; with fewer, threads would
often wait for the interpreter."""


class Source(Protocol):
    """Whatever bytes can be read from as from a file."""

    @property
    def size(self) -> int:
        """In bytes."""

    def open(self) -> contextlib.AbstractContextManager[BinaryIO]:
        """The file opened for reading."""

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends."""


@runtime_checkable
class Change(Protocol):
    """A change of the values of a tensor that can be made part by part."""

    def part(self, values: np.ndarray[Any, Any], start: int) -> None:
        """Change, in place, the values of a flat part of the tensor as stored that begins at an element."""


@dataclass(frozen=True)
class File:
    """A file and what told it from any other version of it.

    Attributes:
        path: its real path.
        size: in bytes.
        stamp: its inode, and the time it was last written, in ns.
    """

    path: str
    size: int
    stamp: tuple[int, int]

    @classmethod
    def of(cls, path: str) -> File:
        """The file as it is now.

        Raises:
            OSError: there is none.
        """
        found = os.stat(path)
        return cls(path, found.st_size, (found.st_ino, found.st_mtime_ns))

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file opened for reading, unbuffered.

        Raises:
            PruneError: it is gone, or has been written to.
        """
        with contextlib.ExitStack() as stack:
            with reading():
                file = stack.enter_context(open(self.path, "rb", buffering=0))
                found = os.fstat(file.fileno())
                if (found.st_size, (found.st_ino, found.st_mtime_ns)) != (self.size, self.stamp):
                    raise ValueError(f"'{self.path}' has changed since it was loaded")
            yield file

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends.

        Raises:
            PruneError: see `open`.
        """
        parts = []
        with self.open() as file, reading():
            file.seek(offset)
            while length > 0 and (part := file.read(length)):
                parts.append(part)
                length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass(frozen=True)
class Memory:
    """A file that was small enough to be kept."""

    content: bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content)

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """The file opened for reading."""
        yield io.BytesIO(self.content)

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the file; fewer where it ends."""
        return self.content[offset : offset + length]


@dataclass(frozen=True)
class Extent:
    """A part of a file."""

    file: Source
    offset: int
    length: int

    def array(self) -> np.ndarray[Any, Any]:
        """All of it, as uint8.

        Raises:
            PruneError: it is not there any more.
        """
        content = np.empty(self.length, np.uint8)
        for _ in self.chunks(0, self.length, content):
            pass
        content.flags.writeable = False
        return content

    def chunks(self, start: int, stop: int, buffer: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
        """Its bytes from start to stop, as often as needed into a buffer of uint8, whose parts are given.

        Raises:
            PruneError: they are not there any more.
        """
        with self.file.open() as file:
            file.seek(self.offset + start)
            while start < stop:
                part = buffer[: min(buffer.size, stop - start)]
                with reading():
                    fill(file, part)
                yield part
                start += part.size

    def runs(self, parts: Sequence[tuple[int, int]]) -> np.ndarray[Any, Any]:
        """Several parts of it, as offsets and lengths, one after the other as uint8.

        Raises:
            PruneError: they are not there any more.
        """
        out = np.empty(sum(length for _, length in parts), np.uint8)
        at = 0
        with self.file.open() as file, reading():
            for offset, length in parts:
                file.seek(self.offset + offset)
                fill(file, out[at : at + length])
                at += length
        return out


def fill(file: BinaryIO, part: np.ndarray[Any, Any]) -> None:
    """Read as many bytes as a buffer has.

    Raises:
        ValueError: the file ends before.
    """
    view = part.data
    while view:
        count = file.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("a file is shorter than when it was loaded")
        view = view[count:]


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """Say that a model's data changed under our hands: they were there, and long enough, when it was loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise PruneError(f"the model's data can no longer be read ({reason(error)}); load the model again") from error


def reason(error: BaseException) -> str:
    """The innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:500] or type(error).__name__
