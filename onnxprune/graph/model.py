"""Model files in, model files out: loading without touching the source, saving as one transaction."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph import files, sparse, valid

ModelSource = Union[str, "os.PathLike[str]", onnx.ModelProto, ir.Model]

PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes a single .onnx file can hold (protobuf's 2 GB, less room for the graph itself)."""

PAGE = 4096
"""Tensors that have to leave a model above the limit start on a page, so that they can be mapped; smaller ones stay."""

Edit = Callable[[np.ndarray], np.ndarray]
"""Takes a tensor's stored array, returns the array to store instead (same shape and type)."""


class Place(NamedTuple):
    """Where a tensor kept in an external file lies: two tensors may share bytes, not names as well."""

    path: str
    offset: int
    name: str


@dataclass(eq=False)
class Model:
    """A model that is ours to change: the protobuf that will be written, and onnx-ir's view of the same graph.

    The view shares its tensors with the protobuf, so replacing a tensor's bytes there changes what is
    saved. Tensors kept in external files are never read as a whole: a change to one is held as an
    edit and carried out, tensor by tensor, on the copy of its file that a save makes.

    Attributes:
        proto: the model; sparse initializers are dense here.
        graph: onnx-ir's view of it.
        folder: what external locations are relative to.
        path: the file it came from.
        sparse_names: the initializers that came sparse, and are stored so again.
        data: location of each external data file, as the model spells it -> its real path.
        edits: changes to external tensors.
    """

    proto: onnx.ModelProto
    graph: ir.Model
    folder: Path | None = None
    path: Path | None = None
    sparse_names: frozenset[str] = frozenset()
    data: dict[str, str] = field(default_factory=dict)
    edits: dict[Place, tuple[ir.ExternalTensor, Edit]] = field(default_factory=dict)

    @property
    def external_files(self) -> list[str]:
        """Locations (relative to the model's folder) of the external data files, in order of appearance."""
        return list(self.data)

    def read(self, tensor: ir.TensorProtocol) -> np.ndarray:
        """A tensor's stored array; read-only, memory-mapped where the data is external, edits not applied."""
        with _reading():
            array = tensor.numpy()
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def current(self, tensor: ir.TensorProtocol) -> np.ndarray:
        """A tensor's stored array, edits applied."""
        array = self.read(tensor)
        if isinstance(tensor, ir.ExternalTensor):
            place = Place(os.fspath(tensor.location), tensor.offset or 0, tensor.name or "")
            if place in self.edits:
                return self.edits[place][1](array)
        return array

    def content(self, tensor: TensorProto) -> bytes:
        """The bytes of an external tensor of `proto`, edits not applied."""
        location = valid.external(tensor)
        with _reading(), open(self.data[location.file], "rb") as file:
            file.seek(location.offset)
            content = file.read(valid.nbytes(tensor))
            if len(content) < valid.nbytes(tensor):
                raise ValueError(f"'{location.file}' is shorter than when it was loaded")
        return content

    def edit(self, tensor: ir.TensorProtocol, change: Edit) -> None:
        """Replace a tensor's stored values: at once in the protobuf, at the next save where it is external."""
        if isinstance(tensor, ir.ExternalTensor):
            place = Place(os.fspath(tensor.location), tensor.offset or 0, tensor.name or "")
            if place in self.edits and self.edits[place][0] is not tensor:
                raise PruneError(
                    f"two tensors named '{place.name}' share the same bytes of '{place.path}'; export the model again"
                )
            self.edits[place] = (tensor, change)
            return
        if not isinstance(tensor, ir.serde.TensorProtoTensor):  # every inline tensor of a deserialised graph is one
            raise PruneError(f"tensor '{tensor.name}' is stored as {type(tensor).__name__}, which cannot be rewritten")
        store(tensor.raw, tensor.dtype, change(self.read(tensor)))

    def to_proto(self) -> onnx.ModelProto:
        """A copy of the model as one protobuf with all data inside, edits applied."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for tensor in list(external_tensors(proto)):
            edited = self._edited(tensor)
            content = self.content(tensor) if edited is None else edited
            _clear(tensor)
            tensor.raw_data = content
        return proto

    @contextlib.contextmanager
    def stage(self, target: Path | None, *, sparse_storage: bool = False) -> Iterator[Staged]:
        """Write the model beside `target` (or in the system's temporary folder) without touching `target` itself.

        The files carry their final names inside a hidden folder, so the staged model can be run before
        `Staged.commit` renames it into place. Leaving the context uncommitted removes every trace.
        """
        if target is not None:
            target = files.resolve(target)
        if str(target) in self.data.values():
            raise PruneError(f"the output '{target}' is the external data file of the input; choose another name")
        with files.staging(target) as folder:
            name = "model.onnx" if target is None else target.name
            with files.writing(target):
                data = self._write(folder, name, target, sparse_storage)
            yield Staged(folder / name, data, target, self)

    def _write(self, folder: Path, name: str, target: Path | None, sparse_storage: bool) -> list[str]:
        """Write graph and data files into `folder`; returns the names of the data files."""
        names = _data_names(name, target)
        proto = self.proto
        if self.data or sparse_storage or self.sparse_names:
            proto = onnx.ModelProto()
            proto.CopyFrom(self.proto)
        kept: dict[str, list[TensorProto]] = {}
        for tensor in external_tensors(proto):
            kept.setdefault(self.data[valid.external(tensor).file], []).append(tensor)
        copies = {path: next(names) for path in kept}
        for path, inside in kept.items():
            with _reading():  # a missing source is not the target's fault
                os.stat(path)
            shutil.copyfile(path, folder / copies[path])
            self._patch(inside, folder / copies[path])
        if sparse_storage or self.sparse_names:
            sparse.compress(subgraphs(proto), None if sparse_storage else self.sparse_names)
        content = _serialize(proto)
        if content is None:
            if proto is self.proto:
                proto = onnx.ModelProto()
                proto.CopyFrom(self.proto)
            copies[""] = next(names)
            _move_out(proto, folder / copies[""])
            content = _serialize(proto)
            if content is None:
                raise PruneError("the model is larger than 2 GB even without its tensors; it cannot be stored as ONNX")
        (folder / name).write_bytes(content)
        return list(copies.values())

    def _patch(self, tensors: list[TensorProto], copy: Path) -> None:
        """Carry out the edits on the copy of a data file, and point its tensors there.

        An edited tensor that shares bytes with one that becomes something else moves to the end of the file.
        """
        groups: dict[tuple[int, int], list[TensorProto]] = {}
        for tensor in tensors:
            start = valid.external(tensor).offset
            groups.setdefault((start, start + valid.nbytes(tensor)), []).append(tensor)
        spans = sorted(groups)
        ends = [0, *itertools.accumulate((end for _, end in spans), max)]
        with open(copy, "r+b") as file:
            for i, (start, end) in enumerate(spans):
                group = groups[start, end]
                contents = [self._edited(tensor) for tensor in group]
                overlaps = ends[i] > start or (i + 1 < len(spans) and spans[i + 1][0] < end)
                alone = not overlaps and all(content == contents[0] for content in contents)
                for tensor, content in zip(group, contents, strict=True):
                    offset = start
                    if content is not None:
                        offset = file.seek(start) if alone else file.seek(0, os.SEEK_END)
                        file.write(content)
                    _point(tensor, copy.name, offset)

    def _edited(self, tensor: TensorProto) -> bytes | None:
        """The bytes an external tensor is to have; None where they stay as they are."""
        location = valid.external(tensor)
        edit = self.edits.get(Place(self.data[location.file], location.offset, tensor.name))
        if edit is None:
            return None
        view, change = edit
        content = encode(change(self.read(view)), view.dtype)
        with contextlib.suppress(BufferError):  # somebody still looks at it
            view.release()
        return content


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

    def commit(self) -> Path:
        """Rename the data files, then the model file, which is the moment the target changes.

        Data files that an earlier save of the target left, and nothing refers to any more, go. Where they were the
        model's own (it was pruned in place), the model goes on with the new ones.
        """
        assert self.target is not None
        target = self.target
        folder = target.parent
        in_place = self.model.path is not None and os.path.realpath(self.model.path) == str(target)
        used = set() if in_place else {os.path.realpath(path) for path in self.model.data.values()}
        stale = [path for path in _data_files(target) if os.path.realpath(path) not in used]
        with files.writing(target):
            if taken := [name for name in self.data if (folder / name).exists()]:
                raise PruneError(f"cannot write '{target}': '{taken[0]}' appeared in its folder meanwhile; run again")
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
            vars(self.model).update(vars(load(target)))
        return target


def load(source: ModelSource) -> Model:
    """Open a model without changing it: a path, an onnx.ModelProto or an onnx_ir.Model.

    Raises:
        PruneError: the file is missing, truncated or no ONNX model; external data is missing, too short or
            outside the model's folder; a tensor or a name is invalid.
    """
    if isinstance(source, onnx.ModelProto):
        valid.check_depth(source)
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        return open_proto(proto, None, None)
    if isinstance(source, ir.Model):
        folders = {os.fspath(t.base_dir) for t in _ir_external(source)}
        folders = folders - {""} or folders  # onnx-ir forgets the folder of tensors in functions
        if len(folders) > 1:
            raise PruneError(
                f"the model keeps external data in several folders ({sorted(folders)}); save it to one file first"
            )
        try:
            proto = ir.to_proto(source)
        except Exception as error:  # onnx-ir raises many kinds
            raise PruneError(f"the onnx_ir.Model cannot be serialised: {_reason(error)}") from error
        return open_proto(proto, Path(folders.pop()).absolute() if folders else None, None)
    if not isinstance(source, (str, os.PathLike)):
        raise PruneError(
            f"a model is a path, an onnx.ModelProto or an onnx_ir.Model, not {type(source).__name__}; "
            "torch and Keras models go through onnxprune.converters"
        )
    path = Path(source)
    proto = _parse(path)
    if not proto.HasField("graph") or not proto.opset_import:
        raise PruneError(
            f"'{path}' is not an ONNX model, or is truncated: it parses, but holds no graph and operator set; {_AGAIN}"
        )
    return open_proto(proto, path.absolute().parent, path)


_AGAIN = "give the path of an .onnx file, or export it again"


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if not path.exists():
            raise PruneError(f"no such file: '{path}'; give the path of an existing .onnx model")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise PruneError(f"'{path}' is {kind}; give the path of an .onnx model")
        content = path.read_bytes()
    except PruneError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise PruneError(f"cannot read '{path}': {reason}; check its name and permissions") from error
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError:
        raise PruneError(
            f"'{path}' is not an ONNX model, or is truncated ({len(content)} bytes): protobuf cannot parse it; {_AGAIN}"
        ) from None
    return proto


def open_proto(proto: onnx.ModelProto, folder: Path | None, path: Path | None) -> Model:
    """Take over a protobuf as a Model: checked, sparse initializers made dense, external data found in `folder`.

    Raises:
        PruneError: as for `load`.
    """
    what = "the model" if path is None else f"'{path}'"
    try:
        for tensor in tensors(proto):
            valid.check_tensor(tensor, what)
        valid.check_names(proto, what)
        roots = [p for p in (folder, None if path is None else Path(os.path.realpath(path)).parent) if p is not None]
        data = valid.check_external(list(external_tensors(proto)), roots, what)
        names = sparse.densify(proto, subgraphs(proto))
        for graph in graphs(proto):
            for node in graph.node:
                given = node.attribute[0] if node.op_type == "Constant" and node.attribute else None
                if given is not None and given.name == "value_floats" and not given.ref_attr_name:
                    _floats_to_tensor(node)
        # The view looks external tensors up by their real paths: they are checked, and onnx-ir refuses the hard links
        # and the linked folders that package managers and model caches make.
        located = [(e, e.value) for t in external_tensors(proto) for e in t.external_data if e.key == "location"]
        for entry, location in located:
            entry.value = data[location]
        view = ir.from_proto(proto)
        for entry, location in located:
            entry.value = location
    except PruneError:
        raise
    except Exception as error:  # a hostile file makes the parsers raise anything
        raise PruneError(f"{what} cannot be read as an ONNX graph: {_reason(error)}; {_AGAIN}") from error
    return Model(proto, view, folder, path, names, data)


def graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto | onnx.FunctionProto]:
    """The main graph, every sub-graph of a node's attributes, and every function body."""
    stack: list[onnx.GraphProto | onnx.FunctionProto] = [*proto.functions, proto.graph]
    while stack:
        graph = stack.pop()
        yield graph
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    stack.append(attribute.g)
                stack.extend(attribute.graphs)


def subgraphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """`graphs` without the bodies of functions, which hold no initializers."""
    return (graph for graph in graphs(proto) if isinstance(graph, onnx.GraphProto))


def tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """Every tensor stored in the model: initializers and tensor attributes, at any depth."""
    for graph in graphs(proto):
        if isinstance(graph, onnx.GraphProto):
            yield from graph.initializer
            for item in graph.sparse_initializer:
                yield item.values
                yield item.indices
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("sparse_tensor"):
                    yield attribute.sparse_tensor.values
                    yield attribute.sparse_tensor.indices


def external_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """The tensors whose data lies in other files."""
    return (t for t in tensors(proto) if t.data_location == TensorProto.EXTERNAL)


def encode(array: np.ndarray, dtype: ir.DataType) -> bytes:
    """The bytes ONNX stores for an array (little-endian, 4-bit types packed)."""
    return ir.Tensor(np.ascontiguousarray(array), dtype=dtype).tobytes()


def store(tensor: TensorProto, dtype: ir.DataType, array: np.ndarray) -> None:
    """Put an array into a TensorProto in place of its values: as raw data, where that is not larger."""
    content = encode(array, dtype)
    # int32_data spends one byte on a zero; as raw data, a 16-bit tensor of zeros would grow.
    small = bool(tensor.int32_data) and dtype.bitwidth == 16
    _clear(tensor)
    if small:
        tensor.int32_data.extend(np.frombuffer(content, "<u2").astype(np.int32).tolist())
        if tensor.ByteSize() < len(content):
            return
        tensor.ClearField("int32_data")
    tensor.raw_data = content


def _clear(tensor: TensorProto) -> None:
    typed = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
    for name in (*typed, "raw_data", "external_data", "data_location"):
        tensor.ClearField(name)


def _point(tensor: TensorProto, location: str, offset: int) -> None:
    """Make a tensor refer to a place in a file."""
    _clear(tensor)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", valid.nbytes(tensor))):
        tensor.external_data.add(key=key, value=str(value))


def _move_out(proto: onnx.ModelProto, path: Path) -> None:
    """Move the data of every larger tensor into a file."""
    with open(path, "wb") as file:
        for tensor in tensors(proto):
            inline = tensor.data_location != TensorProto.EXTERNAL and tensor.data_type != TensorProto.STRING
            if not inline or valid.nbytes(tensor) < PAGE:
                continue
            offset = file.seek(-(-file.tell() // PAGE) * PAGE)
            file.write(ir.serde.TensorProtoTensor(tensor).tobytes())
            _point(tensor, path.name, offset)


def _serialize(proto: onnx.ModelProto) -> bytes | None:
    """The bytes of a model; None where they are more than a file can hold."""
    try:
        content = proto.SerializeToString(deterministic=True)
    except (EncodeError, ValueError):  # protobuf's implementations differ
        return None
    return content if len(content) <= PROTOBUF_LIMIT else None


def _ir_external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    bodies = [body for function in model.functions.values() for body in (function, *function.subgraphs())]
    for graph in (*model.graphs(), *bodies):
        for value in graph.initializers.values() if isinstance(graph, ir.Graph) else ():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def _floats_to_tensor(node: onnx.NodeProto) -> None:
    values = np.array(node.attribute[0].floats, np.float32)
    node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(values)))


def _data_files(model: Path) -> list[Path]:
    """The external data files of an existing model that a save of it made (none if it is no model)."""
    own = re.compile(rf"{re.escape(model.name)}\.(\d+\.)?data")
    try:
        locations = {valid.external(t).file for t in external_tensors(_parse(model))}
    except Exception:
        return []
    return [model.parent / name for name in sorted(locations) if own.fullmatch(name)]


def _data_names(model: str, target: Path | None) -> Iterator[str]:
    """Names for the data files of a model, free in the target's folder: model.data, model.1.data, ..."""
    taken = set() if target is None else set(os.listdir(target.parent))
    names = (f"{model}.{i}.data" for i in itertools.count(1))
    return (name for name in itertools.chain([f"{model}.data"], names) if name not in taken)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Say that a model's data changed under our hands: they were there, and long enough, when it was loaded."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise PruneError(f"the model's data can no longer be read ({_reason(error)}); load the model again") from error


def _reason(error: BaseException) -> str:
    """The innermost cause on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:500] or type(error).__name__
