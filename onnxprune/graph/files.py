"""Writing files as a transaction: complete and on disk beside their target first, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from onnxprune.errors import PruneError

PREFIX = ".onnxprune-"
"""Of the hidden folders that files are written in."""


def resolve(target: Path) -> Path:
    """The file a target leads to: what a link points at is replaced, not the link.

    Raises:
        PruneError: no file can have that name.
    """
    try:
        return Path(os.path.realpath(target))
    except ValueError as error:
        raise PruneError(f"cannot write {str(target)!r}: {error}; give another name") from error


@contextlib.contextmanager
def staging(target: Path | None) -> Iterator[Path]:
    """A hidden folder beside a target (None: in the system's temporary folder), removed with all it holds.

    Raises:
        PruneError: the target's folder does not exist or cannot be written.
    """
    parent = None if target is None else target.parent
    if parent is not None and not parent.is_dir():
        raise PruneError(f"cannot write '{target}': the folder '{parent}' does not exist; create it first")
    with writing(target):
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(target: Path | None) -> Iterator[None]:
    """Say which target the operating system refused to write, and why."""
    try:
        yield
    except OSError as error:
        what = "a temporary file" if target is None else f"'{target}'"
        raise PruneError(
            f"cannot write {what}: {error.strerror or error}; make room or choose another folder. Nothing was changed"
        ) from error


def put(staged: Path, target: Path, like: Path | None = None) -> None:
    """Rename a complete file over its target, with the permissions of an existing file (the target, unless given)."""
    sync(staged)
    like = target if like is None else like
    if like.exists():
        shutil.copymode(like, staged)
    os.replace(staged, target)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    if path.is_dir():
        with contextlib.suppress(OSError):  # Windows and some network file systems cannot, and need not
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
