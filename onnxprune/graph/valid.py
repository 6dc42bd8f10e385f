"""Whether a model's tensors and names are sound: checked once, on loading, from declarations and sizes alone."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph.wire import OWN

DEPTH = 100
"""Levels of sub-graphs; protobuf reads fewer from a file."""


class External(NamedTuple):
    """Where a tensor says its data are: a file relative to the model's folder, an offset, a length (None: not said)."""

    file: str
    offset: int
    length: int | None


def external(tensor: TensorProto) -> External:
    """The external data a tensor refers to.

    Raises:
        ValueError: a number is no number.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    length = entries.get("length")
    return External(entries.get("location", ""), int(entries.get("offset", 0)), None if length is None else int(length))


def nbytes(tensor: TensorProto) -> int:
    """Bytes of a tensor as raw data, from its declared type and shape."""
    bits: int = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
    return -(-bits // 8)


def check_tensor(tensor: TensorProto, what: str) -> None:
    """A tensor's type is known, and the values stored are as many as its shape says.

    Raises:
        PruneError: they are not; nothing was allocated for the shape.
    """
    name = f"{what}: tensor '{tensor.name}'"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        dtype = ir.DataType.UNDEFINED
    if dtype == ir.DataType.UNDEFINED:
        raise PruneError(
            f"{name} has the type {tensor.data_type}, which is not known; export it again or update onnx-ir"
        )
    if any(d < 0 for d in tensor.dims):
        raise PruneError(f"{name} has the negative shape {list(tensor.dims)}: the file is damaged, export it again")
    if tensor.data_location == TensorProto.EXTERNAL:
        if dtype == ir.DataType.STRING:
            raise PruneError(f"{name} keeps strings in another file, which ONNX forbids; export the model again")
        return
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data") and dtype != ir.DataType.STRING:
        have, need, unit = len(tensor.raw_data), nbytes(tensor), "bytes"
    else:
        stored = onnx.helper.tensor_dtype_to_field(dtype.value)
        have, need, unit = len(getattr(tensor, stored)), count, "values"
        if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
            need = 2 * count
        elif dtype != ir.DataType.STRING and dtype.bitwidth in (2, 4):  # packed, which 6-bit types are not
            need = nbytes(tensor)
    if have != need:
        raise PruneError(_wrong(name, tensor, need, unit, have))
    filled = [field for field in _FIELDS if len(getattr(tensor, field))] + ["segment"] * tensor.HasField("segment")
    if len(filled) > 1 or "segment" in filled:
        raise PruneError(f"{name} has values in several places ({', '.join(filled)}); export the model again")


_FIELDS = ("raw_data", "float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
"""Where a tensor may keep its values."""


def _wrong(name: str, tensor: TensorProto, need: int, unit: str, have: int | None) -> str:
    dtype = ir.DataType(tensor.data_type).name
    return (
        f"{name} of shape {list(tensor.dims)} and type {dtype} needs {need} {unit}, but {have} are stored: "
        "the file is damaged, export it again"
    )


def check_external(
    tensors: Iterable[TensorProto], roots: Sequence[Path], what: str, own: str | None = None
) -> dict[str, str]:
    """External data lie in regular files within the model's folder, and the files are long enough.

    Args:
        tensors: those with external data.
        roots: the folder that locations are relative to, and others that links may lead into; none for a model that
            was never a file.
        what: what messages call the model.
        own: the real path of the model's own file, where tensors may have been left.

    Returns:
        Location as the model spells it -> real path of the file.

    Raises:
        PruneError: a file is missing, outside, no regular file or too short; offset or length are no numbers.
    """
    real = [Path(os.path.realpath(root)) for root in roots]
    found: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = f"{what}: external data of tensor '{tensor.name}'"
        try:
            file, offset, length = external(tensor)
        except ValueError as error:
            raise PruneError(f"{name}: offset and length must be numbers ({error}); export the model again") from None
        if not roots:
            raise PruneError(
                f"{name} is in the file '{file}', but a ModelProto has no folder; pass the model's path, "
                "or load it with its external data"
            )
        if file not in found:
            found[file] = own if file == OWN and own is not None else _locate(file, roots[0], real, name)
            sizes[file] = os.stat(found[file]).st_size
        need, size = nbytes(tensor), sizes[file]
        if file == OWN and length != need:
            raise PruneError(_wrong(f"{what}: tensor '{tensor.name}'", tensor, need, "bytes", length))
        if offset < 0 or (length is not None and length < need) or offset + max(need, length or 0) > size:
            raise PruneError(
                f"{name} {list(tensor.dims)} needs {need} bytes at offset {offset} of '{file}', which has {size} "
                f"(declared length {'none' if length is None else length}): the file is truncated or the wrong one; "
                "copy it again"
            )
    return found


def _locate(file: str, folder: Path, real: Sequence[Path], name: str) -> str:
    if not file or "\0" in file or os.path.isabs(file):
        raise PruneError(f"{name} is at '{file}', outside the model's folder; move the data beside the model")
    path = Path(os.path.realpath(folder / file))
    if not any(path.is_relative_to(root) for root in real):
        raise PruneError(f"{name} is at '{file}', outside the model's folder; move the data beside the model")
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise PruneError(
            f"{name}: the file '{file}' is missing in '{folder}' ({error.strerror}); put it beside the model"
        ) from None
    if not stat.S_ISREG(mode):
        raise PruneError(f"{name} is at '{file}', which is no regular file; put the data beside the model")
    return str(path)


def check_depth(proto: onnx.ModelProto) -> None:
    """A model in memory is no deeper than a file can be; protobuf would crash on copying it.

    Raises:
        PruneError: it is.
    """
    level: list[onnx.GraphProto | onnx.FunctionProto] = [proto.graph, *proto.functions]
    for _ in range(DEPTH):
        attributes = [a for graph in level for node in graph.node for a in node.attribute]
        level = [g for a in attributes for g in ([a.g] if a.HasField("g") else a.graphs)]
        if not level:
            return
    raise PruneError(f"the model has sub-graphs more than {DEPTH} levels deep, which no ONNX file can hold; flatten it")


def check_names(proto: onnx.ModelProto, what: str) -> None:
    """Every name is given once, and every name that is read is given: by an input, an initializer or a node.

    Raises:
        PruneError: with the first name for which that fails.
    """
    stack: list[tuple[onnx.GraphProto | onnx.FunctionProto, tuple[set[str], ...]]]
    stack = [(graph, ()) for graph in (*proto.functions, proto.graph)]
    while stack:
        graph, outer = stack.pop()
        inputs = {i if isinstance(i, str) else i.name for i in graph.input}
        known: set[str] = set()
        if isinstance(graph, onnx.GraphProto):
            for name in (*(t.name for t in graph.initializer), *(s.values.name for s in graph.sparse_initializer)):
                if name in known:
                    raise PruneError(
                        f"{what} has two initializers named '{name}', and only one is meant; export it again"
                    )
                known.add(name)
        known |= inputs
        for node in graph.node:
            for name in filter(None, node.output):
                if name in known:
                    raise PruneError(f"{what}: '{name}', an output of {_node(node)}, is given twice; export it again")
                known.add(name)
        scopes = (known, *outer)
        for node in graph.node:
            for name in filter(None, node.input):
                if not any(name in scope for scope in scopes):
                    raise PruneError(
                        f"{what}: {_node(node)} reads '{name}', which no input, initializer or node gives: "
                        "the model is incomplete, export it again"
                    )
            for attribute in node.attribute:
                stack.extend((g, scopes) for g in ([attribute.g] if attribute.HasField("g") else attribute.graphs))
        for value in graph.output:
            name = value if isinstance(value, str) else value.name
            if not any(name in scope for scope in scopes):
                raise PruneError(
                    f"{what}: no input, initializer or node gives the output '{name}' of graph '{graph.name}': "
                    "the model is incomplete, export it again"
                )


def _node(node: onnx.NodeProto) -> str:
    return f"node '{node.name}' ({node.op_type})" if node.name else f"a {node.op_type} node"
