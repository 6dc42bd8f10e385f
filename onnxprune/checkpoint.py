"""Measurements that survive an interruption: a JSON file, replaced as a whole after each one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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

    def add(self, name: str, record: Any) -> None:
        """Keep a record; it is on disk when this returns."""
        self.records[name] = record
        if self.path is None:
            return
        with saving.replacing(self.path) as draft:
            draft.write_text(json.dumps({"key": self.key, "records": self.records}), encoding="utf-8")

    def done(self) -> None:
        """Nothing is left to resume."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
