"""Writing a file from pieces: bytes in memory, parts of other files, and parts of other files with changes in them.

What is taken over is copied by the kernel where it can; what is changed is read, changed and written a chunk at a time,
several threads side by side. So a file costs little more than its copy, and memory stays flat.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from onnxprune import progress
from onnxprune.graph.stored import CHUNK, Change, Extent, File, Source

SPAN = 1 << 24
"""Bytes given to a thread at a time."""

MAX_THREADS = 8

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Changed:
    """Values in a file, to be changed on the way."""

    extent: Extent
    dtype: np.dtype[Any]
    change: Change

    @property
    def length(self) -> int:
        """Bytes of it."""
        return self.extent.length


@dataclass(frozen=True, eq=False)
class Made:
    """Bytes that are made when their turn comes, and then forgotten."""

    length: int
    make: Callable[[], bytes]


Piece = bytes | Extent | Changed | Made


@dataclass(frozen=True)
class Replacement:
    """What stands in a file in place of some of its bytes."""

    offset: int
    length: int
    piece: Piece


def replaced(file: Source, replacements: Iterable[Replacement], end: Sequence[Piece] = ()) -> list[Piece]:
    """A file with parts replaced, and something more at its end; parts must not overlap."""
    pieces: list[Piece] = []
    at = 0
    for part in sorted(replacements, key=lambda part: part.offset):
        pieces += [Extent(file, at, part.offset - at), part.piece]
        at = part.offset + part.length
    return [*pieces, Extent(file, at, file.size - at), *end]


def length(piece: Piece) -> int:
    """Bytes of a piece."""
    return len(piece) if isinstance(piece, bytes) else piece.length


def write(path: Path, pieces: Sequence[Piece]) -> None:
    """Write a new file, one piece after the other.

    Raises:
        OSError: it cannot be written.
        PruneError: what it is made from cannot be read.
    """
    jobs: list[tuple[int, Piece, int, int]] = []
    at = 0
    for piece in pieces:
        size = length(piece)
        whole = isinstance(piece, (bytes, Made))
        step = max(size, 1) if whole else SPAN
        jobs += [(at + start, piece, start, min(start + step, size)) for start in range(0, size, step)]
        at += size
    with progress.task(f"writing {path.name}", at) as advance:

        def run(job: tuple[int, Piece, int, int]) -> None:
            with open(path, "r+b", buffering=0) as file:
                file.seek(job[0])
                _put(file, *job[1:])
                _begin(file, job[0], job[3] - job[2])
            advance(job[3] - job[2])

        with open(path, "wb") as file:
            file.truncate(at)
        if len(jobs) < 3:
            for job in jobs:
                run(job)
            return
        with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
            running = [pool.submit(run, job) for job in jobs]
            try:
                for done in running:
                    done.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _put(file: BinaryIO, piece: Piece, start: int, stop: int) -> None:
    if isinstance(piece, (bytes, Made)):
        content = memoryview(piece if isinstance(piece, bytes) else piece.make())
        while content:
            content = content[file.write(content) :]
        return
    if isinstance(piece, Extent) and _copied(file, piece, start, stop):
        return
    extent = piece if isinstance(piece, Extent) else piece.extent
    for part in extent.chunks(start, stop, np.empty(CHUNK, np.uint8)):
        if isinstance(piece, Changed):
            piece.change.part(part.view(piece.dtype), start // piece.dtype.itemsize)
            start += part.size
        view = part.data
        while view:
            view = view[file.write(view) :]


def _begin(file: BinaryIO, offset: int, length: int) -> None:
    """Have the kernel begin to put on disk what was written: the sync that has to follow then finds little left."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):  # it is advice
            os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


UNABLE = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY, errno.EPERM}
"""What the kernel says where it cannot copy between two files."""


def _copied(file: BinaryIO, extent: Extent, start: int, stop: int) -> bool:
    """Let the kernel copy, if it can: some file systems then share the bytes."""
    if not hasattr(os, "copy_file_range") or not isinstance(extent.file, File):
        return False
    target = file.tell()
    with extent.file.open() as source:
        done = 0
        while done < stop - start:
            try:
                count = os.copy_file_range(
                    source.fileno(), file.fileno(), stop - start - done, extent.offset + start + done, target + done
                )
            except OSError as error:
                if error.errno not in UNABLE:
                    raise
                count = 0
            if count == 0:
                return False
            done += count
    return True
