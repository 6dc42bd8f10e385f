"""Model files in: loading without touching the source, and without reading what can stay where it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Union

import numpy as np
import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph import saving, schemas, sparse, valid, wire
from onnxprune.graph.saving import PROTOBUF_LIMIT, Staged
from onnxprune.graph.sliced import PAGE, Sliced
from onnxprune.graph.stored import Change, Extent, File, Memory, reading, reason
from onnxprune.graph.tensors import clear, encode, external_tensors, graphs, store, subgraphs, tensors

ModelSource = Union[str, "os.PathLike[str]", onnx.ModelProto, ir.Model]

LARGE = 1 << 26
"""Bytes from which a single .onnx file is not read as a whole: its tensors stay in it, as if they were external."""

Edit = Callable[[np.ndarray], np.ndarray]
"""Takes a tensor's stored array, returns the array to store instead (same shape and type). One that is a `Change` too
is carried out part by part."""


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
        data: location of each external data file, as the model spells it -> the file, or what is to become of it. A
            tensor that was left in the model file itself is external too, at the location `wire.OWN`.
        edits: changes to external tensors.
        origin: the model file as it was loaded; None for a model that was never one.
    """

    proto: onnx.ModelProto
    graph: ir.Model
    folder: Path | None = None
    path: Path | None = None
    sparse_names: frozenset[str] = frozenset()
    data: dict[str, File | Sliced] = field(default_factory=dict)
    edits: dict[Place, tuple[ir.ExternalTensor, Edit]] = field(default_factory=dict)
    origin: File | Memory | None = None

    @property
    def external_files(self) -> list[str]:
        """Locations (relative to the model's folder) of the external data files, in order of appearance."""
        return list(self.data)

    def read(self, tensor: ir.TensorProtocol) -> np.ndarray:
        """A tensor's stored array; read-only, read from its file where the data is external, edits not applied."""
        found = self.stored(tensor)
        if found is not None and tensor.dtype.bitwidth >= 8:
            return found.array().view(tensor.dtype.numpy()).reshape(tensor.shape.numpy())
        if found is not None:
            packed = TensorProto(
                data_type=tensor.dtype.value, dims=tensor.shape.numpy(), raw_data=found.array().tobytes()
            )
            tensor = ir.serde.TensorProtoTensor(packed)
        with reading():
            array = tensor.numpy()
        array = array.view() if array.flags.c_contiguous else np.ascontiguousarray(array)
        array.flags.writeable = False
        return array

    def stored(self, tensor: ir.TensorProtocol) -> Extent | None:
        """Where a tensor's bytes are in a file; None where they are in memory."""
        if not isinstance(tensor, ir.ExternalTensor):
            return None
        file = next((file for file in self.data.values() if file.path == os.fspath(tensor.location)), None)
        size = -(-int(tensor.size) * tensor.dtype.bitwidth // 8)
        return None if file is None else Extent(file, tensor.offset or 0, size)

    def current(self, tensor: ir.TensorProtocol) -> np.ndarray:
        """A tensor's stored array, edits applied."""
        array = self.read(tensor)
        if isinstance(tensor, ir.ExternalTensor):
            place = Place(os.fspath(tensor.location), tensor.offset or 0, tensor.name or "")
            if place in self.edits:
                return self.edits[place][1](array)
        return array

    def place(self, tensor: TensorProto) -> Place:
        """Where an external tensor of `proto` lies."""
        location = valid.external(tensor)
        return Place(self.data[location.file].path, location.offset, tensor.name)

    def extent(self, tensor: TensorProto) -> Extent:
        """The bytes of an external tensor of `proto`."""
        location = valid.external(tensor)
        return Extent(self.data[location.file], location.offset, valid.nbytes(tensor))

    def content(self, tensor: TensorProto) -> bytes:
        """The bytes of an external tensor of `proto`, edits not applied."""
        return self.extent(tensor).array().tobytes()

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
        self.embed(proto)
        return proto

    def embed(self, proto: onnx.ModelProto) -> None:
        """Put the data of external tensors, edits applied, into a protobuf made of parts of this one."""
        for tensor in list(external_tensors(proto)):
            content = saving.content(self, tensor)
            clear(tensor)
            tensor.raw_data = content

    def stage(self, target: Path | None, *, sparse_storage: bool = False) -> contextlib.AbstractContextManager[Staged]:
        """Write the model beside `target` (or in the system's temporary folder) without touching `target` itself.

        The files carry their final names inside a hidden folder, so the staged model can be run before
        `Staged.commit` renames it into place. Leaving the context uncommitted removes every trace.
        """
        return saving.stage(self, target, sparse_storage)

    def fresh(self) -> onnx.ModelProto:
        """The model as it was loaded, once more.

        Raises:
            wire.Irregular: it is not what it was.
        """
        origin = self.origin
        assert origin is not None
        kept = origin.content if isinstance(origin, Memory) else wire.skeleton(origin.read, origin.size)[0]
        proto: onnx.ModelProto = onnx.ModelProto.FromString(kept)
        _constants_to_tensors(proto)
        return proto

    def made(self, proto: onnx.ModelProto) -> Model:
        """A protobuf made of parts of this one, which becomes its own, as a model; edits are not taken along.

        Raises:
            PruneError: as for `load`.
        """
        return open_proto(proto, self.folder, self.path, self.data)

    def reload(self, path: Path) -> None:
        """Go on with the file that has replaced the model's own."""
        vars(self).update(vars(load(path)))


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
            raise PruneError(f"the onnx_ir.Model cannot be serialised: {reason(error)}") from error
        return open_proto(proto, Path(folders.pop()).absolute() if folders else None, None)
    if not isinstance(source, (str, os.PathLike)):
        raise PruneError(
            f"a model is a path, an onnx.ModelProto or an onnx_ir.Model, not {type(source).__name__}; "
            "torch and Keras models go through onnxprune.converters"
        )
    path = Path(source)
    proto, origin = _model_at(path)
    model = open_proto(proto, path.absolute().parent, path)
    model.origin = origin
    if wire.OWN in model.data:
        assert isinstance(origin, File)
        model.data[wire.OWN] = origin
    return model


_AGAIN = "give the path of an .onnx file, or export it again"


def _model_at(path: Path) -> tuple[onnx.ModelProto, File | Memory]:
    """A model file that holds a model; see `parse`."""
    proto, origin = parse(path)
    if not proto.HasField("graph") or not proto.opset_import:
        raise PruneError(
            f"'{path}' is not an ONNX model, or is truncated: it parses, but holds no graph and operator set; {_AGAIN}"
        )
    return proto, origin


def parse(path: Path) -> tuple[onnx.ModelProto, File | Memory]:
    """Read a model file, but for the larger tensors of a large one, which become external at `wire.OWN`.

    Raises:
        PruneError: there is none, or it is damaged.
    """
    try:
        if not path.exists():
            raise PruneError(f"no such file: '{path}'; give the path of an existing .onnx model")
        if not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise PruneError(f"'{path}' is {kind}; give the path of an .onnx model")
        file = File.of(os.path.realpath(path))
        if file.size >= 2**31:
            raise PruneError(
                f"'{path}' is not an ONNX model: it has {file.size} bytes, and one has less than 2 GB; {_AGAIN}"
            )
        content = path.read_bytes() if file.size < LARGE else None
        opened = file if content is None else Memory(content)
        wire.measure(opened.read, opened.size)
        left_out = 0
        if content is None and file.size <= PROTOBUF_LIMIT:
            with contextlib.suppress(wire.Irregular):
                content, left_out = wire.skeleton(file.read, file.size)
        if content is None:
            content = path.read_bytes()
    except PruneError:
        raise
    except wire.Oversized as error:
        raise PruneError(f"'{path}' {error}, which no model needs; export it again, without metadata") from None
    except wire.Irregular:
        raise PruneError(f"'{path}' is not an ONNX model, or is truncated ({file.size} bytes); {_AGAIN}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        told = getattr(error, "strerror", None) or error
        raise PruneError(f"cannot read '{path}': {told}; check its name and permissions") from error
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError:
        raise PruneError(
            f"'{path}' is not an ONNX model, or is truncated ({file.size} bytes): protobuf cannot parse it; {_AGAIN}"
        ) from None
    given = [entry.value for tensor in external_tensors(proto) for entry in tensor.external_data]
    if given.count(wire.OWN) != left_out:  # a file may claim it, or give a tensor twice
        raise PruneError(f"'{path}' keeps data of its tensors at places that are no files; export the model again")
    return proto, file if left_out else Memory(content)


def open_proto(
    proto: onnx.ModelProto, folder: Path | None, path: Path | None, known: Mapping[str, File | Sliced] | None = None
) -> Model:
    """Take over a protobuf as a Model: checked, sparse initializers made dense, external data found in `folder`.

    What lies at a known location is not looked for.

    Raises:
        PruneError: as for `load`.
    """
    what = "the model" if path is None else f"'{path}'"
    known = known or {}
    places = _checked(proto, folder, path, known)
    try:
        locations = dict.fromkeys(map(valid.location, external_tensors(proto)))
        data = {at: known[at] if at in known else File.of(places[at]) for at in locations}
        names = sparse.densify(subgraphs(proto))
        _constants_to_tensors(proto)
        # The view looks external tensors up by their real paths: they are checked, and onnx-ir refuses the hard links
        # and the linked folders that package managers and model caches make.
        located = [(e, e.value) for t in external_tensors(proto) for e in t.external_data if e.key == "location"]
        for entry, location in located:
            entry.value = data[location].path
        view = ir.from_proto(proto)
        for entry, location in located:
            entry.value = location
    except PruneError:
        raise
    except Exception as error:  # a hostile file makes the parsers raise anything
        raise PruneError(f"{what} cannot be read as an ONNX graph: {reason(error)}; {_AGAIN}") from error
    return Model(proto, view, folder, path, names, data)


def examine(path: Path) -> None:
    """Find what makes a model file one that `load` refuses, for a reader that would crash on it or follow it anywhere.

    Raises:
        PruneError: as for `load`.
    """
    _checked(_model_at(path)[0], path.absolute().parent, path, ())


def _checked(proto: onnx.ModelProto, folder: Path | None, path: Path | None, known: Container[str]) -> dict[str, str]:
    """Check tensors, names and functions; returns location of each external data file not known -> its real path."""
    what = "the model" if path is None else f"'{path}'"
    try:
        for tensor in tensors(proto):
            valid.check_tensor(tensor, what)
        valid.check_names(proto, what)
        schemas.check_nodes(proto, what)
        if proto.functions:
            valid.check_calls(proto, what)
        roots = [p for p in (folder, None if path is None else Path(os.path.realpath(path)).parent) if p is not None]
        own = None if path is None else os.path.realpath(path)
        unknown = [tensor for tensor in external_tensors(proto) if valid.location(tensor) not in known]
        places = valid.check_external(unknown, roots, what, own)
        sparse.check(proto, subgraphs(proto), what)
    except PruneError:
        raise
    except Exception as error:  # a hostile file makes them raise anything
        raise PruneError(f"{what} cannot be read as an ONNX graph: {reason(error)}; {_AGAIN}") from error
    return places


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


def _constants_to_tensors(proto: onnx.ModelProto) -> None:
    """Make tensors of the lists of floats that Constant nodes hold."""
    for graph in graphs(proto):
        for node in graph.node:
            given = node.attribute[0] if node.op_type == "Constant" and node.attribute else None
            if given is not None and given.name == "value_floats" and not given.ref_attr_name:
                values = np.array(given.floats, np.float32)
                given.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(values)))


__all__ = [
    "PAGE",
    "PROTOBUF_LIMIT",
    "Change",
    "Edit",
    "Model",
    "ModelSource",
    "Place",
    "Staged",
    "encode",
    "external_tensors",
    "graphs",
    "load",
    "open_proto",
    "parse",
    "store",
    "subgraphs",
    "tensors",
]
