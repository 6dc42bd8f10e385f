"""Model files in, model files out: loading without touching the source, saving as one transaction."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Union

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model

from onnxprune.errors import PruneError
from onnxprune.graph import sparse

ModelSource = Union[str, "os.PathLike[str]", onnx.ModelProto, ir.Model]

PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes a single .onnx file can hold (protobuf's 2 GB, less room for the graph itself)."""

Edit = Callable[[np.ndarray], np.ndarray]
"""Takes a tensor's stored array, returns the array to store instead (same shape and type)."""


@dataclass(eq=False)
class Model:
    """A model that is ours to change: the protobuf that will be written, and onnx-ir's view of the same graph.

    The view shares its tensors with the protobuf, so replacing a tensor's bytes there changes what is
    saved. Tensors kept in external files are never read as a whole: a change to one is held as an
    edit and carried out, tensor by tensor, on the copy of its file that a save makes.
    """

    proto: onnx.ModelProto
    graph: ir.Model
    folder: Path | None = None
    path: Path | None = None
    sparse_names: frozenset[str] = frozenset()
    edits: dict[tuple[str, int], tuple[ir.ExternalTensor, Edit]] = field(default_factory=dict)

    @property
    def external_files(self) -> list[str]:
        """Locations (relative to the model's folder) of the external data files, in order of appearance."""
        return list(dict.fromkeys(ExternalDataInfo(t).location for t in external_tensors(self.proto)))

    def read(self, tensor: ir.TensorProtocol) -> np.ndarray:
        """A tensor's stored array; read-only, memory-mapped where the data is external, edits not applied."""
        array = tensor.numpy()
        return array if array.flags.c_contiguous else np.ascontiguousarray(array)

    def edit(self, tensor: ir.TensorProtocol, change: Edit) -> None:
        """Replace a tensor's stored values: now where it lives in the protobuf, at the next save where it is external."""
        if isinstance(tensor, ir.ExternalTensor):
            self.edits[os.fspath(tensor.location), tensor.offset or 0] = (tensor, change)
            return
        if not isinstance(tensor, ir.serde.TensorProtoTensor):  # every inline tensor of a deserialised graph is one
            raise PruneError(f"tensor '{tensor.name}' is stored as {type(tensor).__name__}, which cannot be rewritten")
        store(tensor.raw, tensor.dtype, change(self.read(tensor)))

    def to_proto(self) -> onnx.ModelProto:
        """A copy of the model as one protobuf with all data inside, edits applied."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        if self.external_files:
            infos = [(t, ExternalDataInfo(t)) for t in external_tensors(proto)]
            assert self.folder is not None
            load_external_data_for_model(proto, str(self.folder))
            for tensor, info in infos:
                edit = self.edits.get((info.location, info.offset or 0))
                if edit is not None:
                    store(tensor, edit[0].dtype, edit[1](self.read(edit[0])))
        return proto

    @contextlib.contextmanager
    def stage(self, target: Path | None, *, sparse_storage: bool = False) -> Iterator[Staged]:
        """Write the model beside `target` (or in the system's temporary folder) without touching `target` itself.

        The files carry their final names inside a hidden folder, so the staged model can be run before
        `Staged.commit` renames it into place. Leaving the context uncommitted removes every trace.
        """
        target = None if target is None else Path(os.path.realpath(target))  # a link's file is replaced, not the link
        parent = None if target is None else target.parent
        if parent is not None and not parent.is_dir():
            raise PruneError(f"cannot write '{target}': the folder '{parent}' does not exist; create it first")
        try:
            folder = Path(tempfile.mkdtemp(prefix=".onnxprune-", dir=parent))
        except OSError as error:
            raise PruneError(f"cannot write to the folder '{parent}': {error.strerror}") from error
        try:
            name = "model.onnx" if target is None else target.name
            data = self._write(folder, name, target, sparse_storage)
            yield Staged(folder / name, data, target)
        except OSError as error:
            raise PruneError(f"cannot write '{target}': {error.strerror or error}") from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, folder: Path, name: str, target: Path | None, sparse_storage: bool) -> list[str]:
        """Write graph and data files into `folder`; returns the names of the data files."""
        renamed: dict[str, str] = {}
        taken = set() if target is None else {p.name for p in target.parent.iterdir()}
        for location in self.external_files:
            renamed[location] = _data_name(name, location, len(self.external_files) == 1, taken | set(renamed.values()))
            assert self.folder is not None
            copy = folder / renamed[location]
            shutil.copyfile(self.folder / location, copy)
            os.chmod(copy, 0o644)
            with open(copy, "r+b") as file:
                for (where, offset), (tensor, change) in self.edits.items():
                    if where == location:
                        file.seek(offset)
                        file.write(encode(change(self.read(tensor)), tensor.dtype))
                        tensor.release()
                file.flush()
                os.fsync(file.fileno())
        proto = self.proto
        inline = sum(len(t.raw_data) for t in tensors(proto))
        if renamed or sparse_storage or self.sparse_names or inline > PROTOBUF_LIMIT:
            proto = onnx.ModelProto()
            proto.CopyFrom(self.proto)
            for tensor in external_tensors(proto):
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = renamed[entry.value]
                    elif entry.key == "checksum":
                        entry.value = ""
        sparse.compress(proto, None if sparse_storage else self.sparse_names)
        if inline > PROTOBUF_LIMIT:
            data = _data_name(name, "", True, taken | set(renamed.values()))
            onnx.save_model(proto, str(folder / name), save_as_external_data=True, location=data, size_threshold=1024)
            renamed[""] = data
        else:
            (folder / name).write_bytes(proto.SerializeToString(deterministic=True))
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        return list(renamed.values())


@dataclass(frozen=True)
class Staged:
    """A model written to a hidden folder, ready to run and to be renamed into place."""

    path: Path
    data: list[str]
    target: Path | None

    @property
    def size(self) -> int:
        """Bytes of the model file and its data files."""
        return sum((self.path.parent / name).stat().st_size for name in (self.path.name, *self.data))

    def commit(self) -> Path:
        """Rename the data files, then the model file, which is the moment the target changes."""
        assert self.target is not None
        target = self.target
        replaced = _data_files(target) - set(self.data) if target.exists() else set()
        for name in self.data:
            os.replace(self.path.parent / name, target.parent / name)
        os.replace(self.path, target)
        for name in replaced:  # written by an earlier save of this target, and referenced by nothing any more
            if name.startswith(f"{target.name}.") and name.endswith(".data"):
                (target.parent / name).unlink(missing_ok=True)
        return target


def load(source: ModelSource) -> Model:
    """Open a model without changing it: a path, an onnx.ModelProto or an onnx_ir.Model.

    Raises:
        PruneError: the file is missing, truncated or no ONNX model; external data is missing, too short or
            outside the model's folder.
    """
    if isinstance(source, onnx.ModelProto):
        proto = onnx.ModelProto()
        proto.CopyFrom(source)
        return _open(proto, None, None)
    if isinstance(source, ir.Model):
        folders = {os.fspath(t.base_dir) for t in _ir_external(source)}
        if len(folders) > 1:
            raise PruneError(f"the model keeps external data in several folders ({sorted(folders)}); save it to one file first")
        return _open(ir.to_proto(source), Path(folders.pop()) if folders else None, None)
    if not isinstance(source, (str, os.PathLike)):
        raise PruneError(
            f"a model is a path, an onnx.ModelProto or an onnx_ir.Model, not {type(source).__name__}; "
            "torch and Keras models go through onnxprune.converters"
        )
    path = Path(source)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise PruneError(f"no such file: '{path}'; give the path of an existing .onnx model") from None
    except OSError as error:
        raise PruneError(f"cannot read '{path}': {error.strerror}") from error
    try:
        proto = onnx.ModelProto.FromString(content)
    except DecodeError:
        raise PruneError(f"'{path}' is not an ONNX model, or is truncated ({len(content)} bytes): protobuf cannot parse it") from None
    if not proto.HasField("graph") or not proto.opset_import:
        raise PruneError(f"'{path}' is not an ONNX model, or is truncated: it parses, but holds no graph and operator set")
    return _open(proto, path.absolute().parent, path)


def _open(proto: onnx.ModelProto, folder: Path | None, path: Path | None) -> Model:
    _check_external(proto, folder, "the model" if path is None else f"'{path}'")
    names = sparse.densify(proto)
    for graph in graphs(proto):
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value_floats":
                _floats_to_tensor(node)
    try:
        view = ir.from_proto(proto)
    except Exception as error:
        root = error.__cause__ or error
        raise PruneError(f"{'the model' if path is None else repr(str(path))} is not a valid ONNX graph: {root}") from error
    if folder is not None:
        for tensor in _ir_external(view):
            tensor.base_dir = folder
    return Model(proto, view, folder, path, names)


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


def external_tensors(proto: onnx.ModelProto) -> Iterator[TensorProto]:
    """The tensors whose data lies in other files."""
    return (t for t in tensors(proto) if t.data_location == TensorProto.EXTERNAL)


def encode(array: np.ndarray, dtype: ir.DataType) -> bytes:
    """The bytes ONNX stores for an array (little-endian, 4-bit types packed)."""
    return ir.Tensor(np.ascontiguousarray(array), dtype=dtype).tobytes()


def store(tensor: TensorProto, dtype: ir.DataType, array: np.ndarray) -> None:
    """Put an array into a TensorProto as raw data, in place of whatever holds its values now."""
    for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "external_data", "data_location"):
        tensor.ClearField(name)  # type: ignore[arg-type]
    tensor.raw_data = encode(array, dtype)


def _ir_external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value


def _floats_to_tensor(node: onnx.NodeProto) -> None:
    values = np.array(node.attribute[0].floats, np.float32)
    node.attribute[0].CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(values)))


def _check_external(proto: onnx.ModelProto, folder: Path | None, what: str) -> None:
    for tensor in external_tensors(proto):
        try:
            info = ExternalDataInfo(tensor)
            offset, length = int(info.offset or 0), int(info.length or 0)
        except (ValueError, TypeError) as error:
            raise PruneError(f"{what}: external data of tensor '{tensor.name}' is described wrongly: {error}") from None
        if folder is None:
            raise PruneError(
                f"{what}: tensor '{tensor.name}' keeps its data in the file '{info.location}', but a ModelProto has no folder; "
                "pass the path of the model, or load it with its external data"
            )
        path = folder / info.location
        inside = os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)
        if not info.location or os.path.isabs(info.location) or not inside:
            raise PruneError(
                f"{what}: external data of tensor '{tensor.name}' is at '{info.location}', outside the model's folder; "
                "that is refused: move the data beside the model"
            )
        if not path.is_file():
            raise PruneError(f"{what}: the external data file '{info.location}' of tensor '{tensor.name}' is missing in '{folder}'")
        dtype = ir.DataType(tensor.data_type)
        need = -(-int(np.prod(tensor.dims, dtype=object)) * dtype.bitwidth // 8)
        size = path.stat().st_size
        if offset < 0 or length < 0 or (length and length < need) or offset + max(need, length) > size:
            raise PruneError(
                f"{what}: external data of tensor '{tensor.name}' {list(tensor.dims)} needs {need} bytes at offset {offset} of "
                f"'{info.location}', which has {size} (declared length {length or 'none'}): the file is truncated or the wrong one"
            )


def _data_files(model: Path) -> set[str]:
    """Names of the external data files an existing model file refers to (none if it is no model)."""
    try:
        proto = onnx.load_model(str(model), load_external_data=False)
    except Exception:
        return set()
    return {ExternalDataInfo(t).location for t in external_tensors(proto)}


def _data_name(model: str, location: str, only: bool, taken: set[str]) -> str:
    """A free name for a data file of `model`: the first of model.data, model.1.data, ... that nothing has yet."""
    stem = model if only else f"{model}.{Path(location).name}"
    names = (f"{stem}.data" if i == 0 else f"{stem}.{i}.data" for i in range(1_000_000))
    return next(name for name in names if name not in taken)
