"""Whether a model's tensors and names are sound: checked once, on loading, from declarations and sizes alone."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Container, Iterable, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import onnx
import onnx_ir as ir
from onnx import TensorProto

from onnxprune.errors import PruneError
from onnxprune.graph.wire import OWN

DEPTH = 100
"""Levels of sub-graphs; protobuf reads fewer from a file."""

AXES = 32
"""Axes of an array in every version of numpy."""

CALLED = 500_000
"""Nodes that a model may have when its functions are written out wherever they are called."""


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


def location(tensor: TensorProto) -> str:
    """The file an external tensor is in, as the model spells it."""
    return next((entry.value for entry in reversed(tensor.external_data) if entry.key == "location"), "")


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
    if len(tensor.dims) > AXES:
        raise PruneError(
            f"{name} has {len(tensor.dims)} axes, and can have {AXES}: the file is damaged, export it again"
        )
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
        PruneError: with the first name for which that fails; nodes wait for each other.
    """
    for graph in (*proto.functions, proto.graph):
        _check_graph(graph, (), what)


Scopes = tuple[set[str], ...]
"""The names given in a graph and in those around it."""


def _check_graph(graph: onnx.GraphProto | onnx.FunctionProto, outer: Scopes, what: str) -> set[str]:
    """Check a graph and those within it; returns the names it reads, whoever gives them."""
    stored: set[str] = set()
    if isinstance(graph, onnx.GraphProto):
        for name in (*(t.name for t in graph.initializer), *(s.values.name for s in graph.sparse_initializer)):
            if name in stored:
                raise PruneError(f"{what} has two initializers named '{name}', and only one is meant; export it again")
            stored.add(name)
    given = stored | {i if isinstance(i, str) else i.name for i in graph.input}
    known = set(given)
    for node in graph.node:
        for name in filter(None, node.output):
            if name in known:
                raise PruneError(f"{what}: '{name}', an output of {_node(node)}, is given twice; export it again")
            known.add(name)
    scopes = (known, *outer)
    reads: list[set[str]] = []
    for node in graph.node:
        reads.append(set(filter(None, node.input)))
        for name in filter(None, node.input):
            if not any(name in scope for scope in scopes):
                raise PruneError(
                    f"{what}: {_node(node)} reads '{name}', which no input, initializer or node gives: "
                    "the model is incomplete, export it again"
                )
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                reads[-1] |= _check_graph(inner, scopes, what)
    results = {value if isinstance(value, str) else value.name for value in graph.output}
    for name in results:
        if not any(name in scope for scope in scopes):
            raise PruneError(
                f"{what}: no input, initializer or node gives the output '{name}' of graph '{graph.name}': "
                "the model is incomplete, export it again"
            )
    _check_order(graph, reads, given, known, what)
    return results.union(*reads) - known


def _check_order(
    graph: onnx.GraphProto | onnx.FunctionProto, reads: list[set[str]], given: set[str], known: set[str], what: str
) -> None:
    """Nodes can be put in an order in which none waits for a later one, be it within a sub-graph of its own."""
    for node, names in zip(graph.node, reads, strict=True):
        if not names & known <= given:
            break
        given.update(node.output)
    else:
        return
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    waits = {index: {makers[name] for name in names if name in makers} for index, names in enumerate(reads)}
    try:
        TopologicalSorter(waits).prepare()
    except CycleError as error:
        node = graph.node[error.args[1][0]]
        raise PruneError(
            f"{what}: {_node(node)} is part of a cycle, it waits for its own output {list(node.output)}: "
            "the model is invalid, export it again"
        ) from None


Function = tuple[str, str, str]
"""Domain, name and overload."""


def check_calls(proto: onnx.ModelProto, what: str) -> None:
    """No function calls itself, and functions do not call each other so often that nothing could hold what results.

    Raises:
        PruneError: one does, or they do.
    """
    functions = {(f.domain, f.name, f.overload): f for f in proto.functions}
    calls = {key: list(_operators(function, functions)) for key, function in functions.items()}
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        domain, name, _ = error.args[1][0]
        raise PruneError(
            f"{what}: function '{domain}.{name}' calls itself, which ONNX forbids: the model is invalid"
        ) from None
    sizes: dict[Function, int] = {}
    for key in order:
        sizes[key] = _count(functions[key]) + sum(sizes[called] for called in calls[key])
    count = sum(sizes[called] for called in _operators(proto.graph, functions))
    if count > CALLED:
        raise PruneError(
            f"{what}: its functions call each other so often that they stand for {count} nodes, and at most {CALLED} "
            "can be handled; export it without functions"
        )


def _operators(graph: onnx.GraphProto | onnx.FunctionProto, functions: Container[Function]) -> Iterator[Function]:
    """The functions that are called in a graph and those within it, as often as they are."""
    for node in graph.node:
        if (key := (node.domain, node.op_type, node.overload)) in functions:
            yield key
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from _operators(inner, functions)


def _count(graph: onnx.GraphProto | onnx.FunctionProto) -> int:
    inner = (g for n in graph.node for a in n.attribute for g in ([a.g] if a.HasField("g") else a.graphs))
    return len(graph.node) + sum(map(_count, inner))


def _node(node: onnx.NodeProto) -> str:
    return f"node '{node.name}' ({node.op_type})" if node.name else f"a {node.op_type} node"
