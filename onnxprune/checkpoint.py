"""Measurements that survive an interruption: a JSON file, replaced as a whole after each one."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.errors import PruneError
from onnxprune.graph import saving

WHAT = {"model": "another model", "data": "other data", "options": "other options", "version": "another version"}


@dataclass(eq=False)
class Checkpoint:
    """Records by name, of one model, data and options.

    Attributes:
        path: the file; None keeps the records in memory only.
        key: what the records hold for: digests and options.
        records: JSON values by name.
    """

    path: Path | None
    key: Mapping[str, Any]
    records: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, key: Mapping[str, Any]) -> Checkpoint:
        """Take up what an interrupted run has left, if anything.

        Raises:
            PruneError: the file is no checkpoint, or that of another model, other data or other options.
        """
        if path is None:
            return cls(None, key)
        file = Path(path)
        key = json.loads(json.dumps(key))  # as it comes back from a file
        if not file.parent.is_dir():
            raise PruneError(f"cannot write '{file}': the folder '{file.parent}' does not exist; create it first")
        if not file.exists():
            return cls(file, key)
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            theirs, records = dict(content["key"]), dict(content["records"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PruneError(
                f"'{file}' is no checkpoint ({type(error).__name__}: {error}); delete it, or name another output"
            ) from error
        if differing := [what for name, what in WHAT.items() if theirs.get(name) != key.get(name)]:
            raise PruneError(
                f"'{file}' is the checkpoint of an interrupted run with {' and '.join(differing)}; run that one again "
                "to finish it, delete the file to begin anew, or name another output"
            )
        return cls(file, key, records)

    def add(self, name: str, record: Any, arrays: Mapping[str, np.ndarray] | None = None) -> None:
        """Keep a record, and arrays that go with it; they are on disk when this returns."""
        if self.path is not None and arrays is not None:
            index = json.dumps([[key, array.nbytes] for key, array in arrays.items()]).encode()
            content = b"".join(array.tobytes() for array in arrays.values())  # numpy's files know no bfloat16
            with saving.replacing(self._beside(name)) as draft, open(draft, "wb") as file:
                np.savez(file, index=np.frombuffer(index, np.uint8), content=np.frombuffer(content, np.uint8))
        self.records[name] = record
        if self.path is None:
            return
        with saving.replacing(self.path) as draft:
            draft.write_text(json.dumps({"key": self.key, "records": self.records}), encoding="utf-8")

    def arrays(self, name: str) -> dict[str, bytes] | None:
        """The bytes of the arrays that were kept with a record; None where it has to be made again."""
        if self.path is None or name not in self.records:
            return None
        try:
            with np.load(self._beside(name), allow_pickle=False) as stored:
                index, content = json.loads(stored["index"].tobytes()), stored["content"].tobytes()
            ends = list(itertools.accumulate(length for _, length in index))
            return {key: content[end - length : end] for (key, length), end in zip(index, ends, strict=True)}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None

    def done(self) -> None:
        """Nothing is left to resume."""
        if self.path is not None:
            for name in self.records:
                self._beside(name).unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)

    def _beside(self, name: str) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.{hashlib.sha256(name.encode()).hexdigest()[:16]}.npz")
