"""Saving a model as one transaction: patched where its shapes are what they were, put together anew where not."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir
from google.protobuf.message import EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph import assemble, files, sparse, valid, wire
from onnxprune.graph.assemble import Changed, Made, Piece, Replacement
from onnxprune.graph.sliced import PAGE
from onnxprune.graph.stored import Change, Extent, Source
from onnxprune.graph.tensors import clear, encode, external_tensors, point, subgraphs, tensors

if TYPE_CHECKING:
    from onnxprune.graph.model import Model

PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes a single .onnx file can hold (protobuf's 2 GB, less room for the graph itself)."""

NOTE = "onnxprune"
"""The entry of metadata_props that says what was done."""


@dataclass(frozen=True)
class Staged:
    """A model written to a hidden folder, ready to run and to be renamed into place."""

    path: Path
    data: list[str]
    target: Path | None
    model: Model = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the model file and its data files."""
        return sum((self.path.parent / name).stat().st_size for name in (self.path.name, *self.data))

    @property
    def in_place(self) -> bool:
        """Whether the target is the model's own file."""
        return self.model.path is not None and os.path.realpath(self.model.path) == str(self.target)

    def commit(self) -> Path:
        """Rename the data files, then the model file, which is the moment the target changes.

        Data files that an earlier save of the target left, and nothing refers to any more, go. Where they were the
        model's own (it was pruned in place), the model goes on with the new ones.
        """
        assert self.target is not None
        target = self.target
        folder = target.parent
        in_place = self.in_place
        used = set() if in_place else {file.path for file in self.model.data.values()}
        with files.writing(target), files.locked(folder):
            stale = [path for path in _data_files(target) if os.path.realpath(path) not in used]
            if taken := [name for name in self.data if (folder / name).exists()]:
                raise PruneError(f"cannot write '{target}': '{taken[0]}' appeared in its folder meanwhile; run again")
            journal = {"target": target.name, "files": [*self.data, *(path.name for path in stale)]}
            (self.path.parent / JOURNAL).write_text(json.dumps(journal))
            files.sync(self.path.parent / JOURNAL)
            try:
                for name in self.data:
                    files.put(self.path.parent / name, folder / name, like=target)
                files.sync(folder)
                files.put(self.path, target)
            except BaseException:
                if self.path.exists():  # else the model is in place, and needs its data
                    for name in self.data:
                        (folder / name).unlink(missing_ok=True)
                raise
            files.sync(folder)
            for path in stale:
                with contextlib.suppress(OSError):
                    path.unlink()
            if in_place and self.model.data:
                self.model.reload(target)  # before another run takes its place
        return target


JOURNAL = ".journal"
"""The file in a hidden folder that says which files a commit puts beside a model, and which it takes away."""


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A file to be written in a target's place; at the end of the block it is on disk, and takes it.

    Raises:
        PruneError: it cannot be written; what stood there is untouched.
    """
    target = files.resolve(target)
    if target.parent.is_dir():
        tidy(target.parent)
    with files.staging(target) as folder, files.writing(target):
        yield folder / target.name
        files.put(folder / target.name, target)
        files.sync(target.parent)


def tidy(folder: Path) -> None:
    """Remove what runs that were killed left in a folder: their hidden folders, and data that no model got to name."""
    with files.left(folder) as found, files.locked(folder) if found else contextlib.nullcontext():
        for hidden in found:
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
                journal = json.loads((hidden / JOURNAL).read_text())
                target = folder / journal["target"]
                used = {path.name for path in _data_files(target)}
                own = _own_data(target)
                if target.exists() and not used and not _is_model(target):
                    continue
                for name in journal["files"]:
                    if own.fullmatch(name) and name not in used:
                        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def stage(model: Model, target: Path | None, sparse_storage: bool) -> Iterator[Staged]:
    """Write a model beside a target; see `Model.stage`."""
    if target is not None:
        target = files.resolve(target)
    if str(target) in {file.path for location, file in model.data.items() if location != wire.OWN}:
        raise PruneError(f"the output '{target}' is the external data file of the input; choose another name")
    if target is not None and target.parent.is_dir():
        tidy(target.parent)
    with files.staging(target) as folder:
        name = "model.onnx" if target is None else target.name
        with files.writing(target):
            data = _write(model, folder, name, target, sparse_storage)
        yield Staged(folder / name, data, target, model)


def piece(model: Model, tensor: TensorProto) -> Piece:
    """What an external tensor of a model is to be, edits carried out."""
    extent = model.extent(tensor)
    found = model.edits.get(model.place(tensor))
    if found is None:
        return extent
    view, change = found
    if isinstance(change, Change):
        return Changed(extent, view.dtype.numpy(), change)
    return Made(extent.length, lambda: encode(change(model.read(view)), view.dtype))


def content(model: Model, tensor: TensorProto) -> bytes:
    """The bytes of an external tensor, edits carried out."""
    found = model.edits.get(model.place(tensor))
    if found is None:
        return model.content(tensor)
    return encode(found[1](model.read(found[0])), found[0].dtype)


def _write(model: Model, folder: Path, name: str, target: Path | None, sparse_storage: bool) -> list[str]:
    """Write graph and data files into `folder`; returns the names of the data files."""
    sparsely = sparse_storage or bool(model.sparse_names)
    if not sparsely and set(model.data) <= {wire.OWN} and (patched := _patched(model)) is not None:
        assemble.write(folder / name, patched)
        return []
    names = _data_names(name, target)
    proto = model.proto
    if model.data or sparsely:
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
    kept: dict[str, list[TensorProto]] = {}
    for tensor in external_tensors(proto):
        location = valid.external(tensor).file
        if location != wire.OWN:
            kept.setdefault(model.data[location].path, []).append(tensor)
    sources = {file.path: file for file in model.data.values()}
    copies = {path: next(names) for path in kept}
    for path, inside in kept.items():
        assemble.write(folder / copies[path], _patched_data(model, sources[path], inside, copies[path]))
    if sparsely:
        wanted = None if sparse_storage else model.sparse_names
        for tensor in [t for graph in subgraphs(proto) for t in graph.initializer]:
            if _own(tensor) and (wanted is None or tensor.name in wanted):
                inside_ = content(model, tensor)
                clear(tensor)
                tensor.raw_data = inside_
        sparse.compress(subgraphs(proto), wanted)
    pieces = _spliced(model, proto)
    if pieces is None or sum(map(assemble.length, pieces)) > PROTOBUF_LIMIT:
        if proto is model.proto:
            proto = onnx.ModelProto()
            proto.CopyFrom(model.proto)
        copies[""] = next(names)
        _move_out(model, proto, folder / copies[""])
        pieces = _spliced(model, proto)
        if pieces is None or sum(map(assemble.length, pieces)) > PROTOBUF_LIMIT:
            raise PruneError("the model is larger than 2 GB even without its tensors; it cannot be stored as ONNX")
    assemble.write(folder / name, pieces)
    return list(copies.values())


def _own(tensor: TensorProto) -> bool:
    """Whether a tensor's data lie in the model file, and not in memory."""
    return tensor.data_location == TensorProto.EXTERNAL and valid.external(tensor).file == wire.OWN


def _spliced(model: Model, proto: onnx.ModelProto) -> list[Piece] | None:
    """A model as a file; None where it is more than one can hold."""

    def place(tensor: TensorProto) -> tuple[Piece, int] | None:
        return (found := piece(model, tensor), assemble.length(found)) if _own(tensor) else None

    try:
        if wire.OWN not in model.data:
            return [proto.SerializeToString(deterministic=True)]
        return wire.splice(proto, place)
    except (EncodeError, ValueError):  # protobuf's implementations differ
        return None


def _patched(model: Model) -> list[Piece] | None:
    """The file a model came from, with other bytes for the tensors that changed, and the record of it at the end.

    None where more than that is different.
    """
    origin = model.origin
    if origin is None:
        return None
    try:
        fresh = model.fresh()
        spans = wire.spans(origin.read, origin.size)
        old = wire.notes(origin.read, origin.size, NOTE)
    except wire.Irregular:
        return None
    if _blank(fresh) != _blank(model.proto):
        return None
    replacements = [Replacement(*span, b"") for span in old]
    for (path, now), (_, before) in zip(wire.paths(model.proto), wire.paths(fresh), strict=True):
        if _own(now):
            changed = piece(model, now)
            if not isinstance(changed, Extent):
                replacements.append(Replacement(valid.external(now).offset, assemble.length(changed), changed))
        elif now.raw_data != before.raw_data:
            if path not in spans or spans[path].length != len(now.raw_data):
                return None
            replacements.append(Replacement(*spans[path], now.raw_data))
    notes = [wire.note(entry.key, entry.value) for entry in model.proto.metadata_props if entry.key == NOTE]
    return assemble.replaced(origin, replacements, notes)


def _blank(proto: onnx.ModelProto) -> bytes:
    """Everything about a model but its raw data and the record of what was done."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in tensors(copy):
        if tensor.HasField("raw_data"):
            tensor.raw_data = b""
    for entry in [entry for entry in copy.metadata_props if entry.key == NOTE]:
        copy.metadata_props.remove(entry)
    blank: bytes = copy.SerializeToString(deterministic=True)
    return blank


def _patched_data(model: Model, source: Source, tensors: list[TensorProto], name: str) -> list[Piece]:
    """A data file with the edits carried out; its tensors are pointed to the new one, of the given name.

    An edited tensor that shares bytes with one that becomes something else moves to the end of the file.
    """
    groups: dict[tuple[int, int], list[TensorProto]] = {}
    for tensor in tensors:
        start = valid.external(tensor).offset
        groups.setdefault((start, start + valid.nbytes(tensor)), []).append(tensor)
    spans = sorted(groups)
    ends = [0, *itertools.accumulate((end for _, end in spans), max)]
    replacements: list[Replacement] = []
    more: list[Piece] = []
    size = source.size
    for i, (start, end) in enumerate(spans):
        group = groups[start, end]
        overlaps = ends[i] > start or (i + 1 < len(spans) and spans[i + 1][0] < end)
        pieces: list[Piece] = [piece(model, tensor) for tensor in group]
        alone = not overlaps
        if len(group) > 1 and any(not isinstance(p, Extent) for p in pieces):
            contents = [content(model, tensor) for tensor in group]
            alone &= all(one == contents[0] for one in contents)
            pieces = [p if isinstance(p, Extent) else one for p, one in zip(pieces, contents, strict=True)]
        if alone and not isinstance(pieces[0], Extent):
            replacements.append(Replacement(start, end - start, pieces[0]))
        for tensor, new in zip(group, pieces, strict=True):
            offset = start
            if not alone and not isinstance(new, Extent):
                offset = size
                more.append(new)
                size += assemble.length(new)
            point(tensor, name, offset)
    return assemble.replaced(source, replacements, more)


def _move_out(model: Model, proto: onnx.ModelProto, path: Path) -> None:
    """Move the data of every larger tensor into a file."""
    pieces: list[Piece] = []
    moved: list[tuple[TensorProto, int]] = []
    at = 0
    for tensor in tensors(proto):
        inline = tensor.data_location != TensorProto.EXTERNAL and tensor.data_type != TensorProto.STRING
        if not (inline or _own(tensor)) or valid.nbytes(tensor) < PAGE:
            continue
        pieces.append(bytes(-at % PAGE))
        at += -at % PAGE
        pieces.append(Made(valid.nbytes(tensor), partial(_bytes, tensor)) if inline else piece(model, tensor))
        moved.append((tensor, at))
        at += valid.nbytes(tensor)
    assemble.write(path, pieces)
    for tensor, offset in moved:
        point(tensor, path.name, offset)


def _bytes(tensor: TensorProto) -> bytes:
    return ir.serde.TensorProtoTensor(tensor).tobytes()


def _data_files(model: Path) -> list[Path]:
    """The external data files of an existing model that a save of it made (none if it is no model)."""
    from onnxprune.graph.model import parse

    try:
        locations = {valid.external(t).file for t in external_tensors(parse(model)[0])}
    except Exception:
        return []
    return [model.parent / name for name in sorted(locations) if _own_data(model).fullmatch(name)]


def _is_model(path: Path) -> bool:
    from onnxprune.graph.model import parse

    try:
        return bool(parse(path)[0].HasField("graph"))
    except Exception:
        return False


def _own_data(model: Path) -> re.Pattern[str]:
    """The names of a model's data files."""
    return re.compile(rf"{re.escape(model.name)}\.(\d+\.)?data")


def _data_names(model: str, target: Path | None) -> Iterator[str]:
    """Names for the data files of a model, free in the target's folder: model.data, model.1.data, ..."""
    taken = set() if target is None else set(os.listdir(target.parent))
    names = (f"{model}.{i}.data" for i in itertools.count(1))
    return (name for name in itertools.chain([f"{model}.data"], names) if name not in taken)
