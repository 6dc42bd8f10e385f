"""Writing files as a transaction: complete and on disk beside their target first, then renamed into place."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from onnxprune.errors import PruneError

try:
    import fcntl
except ImportError:  # Windows: what a killed run leaves is left to the user
    fcntl = None  # type: ignore[assignment]

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
    with writing(target), contextlib.ExitStack() as stack:
        folder, lock = _folder(parent)
        stack.callback(lock.close)  # after the folder is gone
        stack.callback(_remove, folder)
        opened = stack.pop_all()
    with opened:
        yield folder


LOCK = ".lock"
"""The file in a hidden folder that is locked as long as the process that made it lives."""


def _folder(parent: Path | None) -> tuple[Path, IO[bytes]]:
    """A new hidden folder, and the lock on it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            lock = open(folder / LOCK, "wb")  # noqa: SIM115  (held as long as the folder)
        except FileNotFoundError:  # another run took the empty folder for one that was left
            continue
        except BaseException:
            _remove(folder)
            raise
        if _lock(lock) and (folder / LOCK).exists():
            return folder, lock
        lock.close()  # another run took it for one that was left before it was locked


def _lock(file: IO[bytes]) -> bool:
    """Whether a file could be locked, or there are no locks; False where somebody else has locked it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems have no locks
            pass
    return True


def _remove(folder: Path) -> None:
    """Remove a hidden folder, its lock last: whenever this is cut short, the next run can tell what it was."""
    for name in (*(name for name in _names(folder) if name != LOCK), LOCK):
        with contextlib.suppress(OSError):
            (folder / name).unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def _names(folder: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return os.listdir(folder)
    return []


@contextlib.contextmanager
def left(parent: Path) -> Iterator[list[Path]]:
    """The hidden folders that killed runs left in a folder; they are removed afterwards."""
    found: list[Path] = []
    with contextlib.ExitStack() as stack:
        for folder in sorted(parent.glob(f"{PREFIX}*")) if fcntl is not None else ():
            with contextlib.suppress(OSError):  # its run goes on, or it is gone
                if folder.stat().st_uid != os.getuid():
                    continue
                if not (folder / LOCK).exists():
                    folder.rmdir()  # killed before it could lock it; one that holds anything is not ours
                    continue
                lock = stack.enter_context(open(folder / LOCK, "rb"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                stack.callback(_remove, folder)
                found.append(folder)
        yield found


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself while files are renamed in it: runs that write there at once take turns."""
    with contextlib.ExitStack() as stack:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


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
