"""Where a model file keeps its tensors: a walk over protobuf's wire format that passes the data over.

A message is a row of fields, each a key (number and kind) and a value; a nested message is a value with its length in
front. So a tensor deep in a graph is found, and its data left out or put back, with nothing read but keys and lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import onnx
from onnx import TensorProto

OWN = "\0"
"""The location of data that lie in the model file itself: no file can have that name."""

LEAST = 4096
"""Bytes of data that are worth leaving out; less stays, since shapes and sizes are read from it."""

DEPTH = 100
"""Nested messages that protobuf reads at most."""

WINDOW = 1 << 16
"""Bytes read at a time where fields lie close together."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

MODEL, GRAPH, NODE, ATTRIBUTE, FUNCTION, TENSOR = "model", "graph", "node", "attribute", "function", "tensor"
INSIDE: dict[str, dict[int, str]] = {
    MODEL: {7: GRAPH, 25: FUNCTION},
    GRAPH: {1: NODE, 5: TENSOR},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH},
    FUNCTION: {7: NODE},
}
"""Message -> field number -> the message in it, where that leads to a tensor as `graph.model.tensors` visits them."""

ONCE = {(MODEL, 7), (ATTRIBUTE, 5), (ATTRIBUTE, 6), (TENSOR, 9)}
"""Fields that are no lists."""

DATA = {(ATTRIBUTE, 4), (ATTRIBUTE, 7), (ATTRIBUTE, 8), (ATTRIBUTE, 9), (ATTRIBUTE, 22), (GRAPH, 15)}
DATA |= {(TENSOR, number) for number in (4, 5, 6, 7, 10, 11)}
"""Fields that hold values, in addition to those that lead to tensors; all others describe."""

TEXT = 1 << 27
"""Bytes of description that a model may have."""

PARTS = 250_000
"""Nodes, tensors and other parts that a model may have: each takes two bytes in a file, and hundreds in memory."""

LISTED = 1000
"""Numbers in a list after which nothing but numbers is expected in it."""

METADATA, RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 14, 9, 13, 14

Path = tuple[tuple[int, int], ...]
"""Where a tensor is in a model: field number and place among the fields of that number, from the outside in."""

Read = Callable[[int, int], bytes]
"""Offset and length to bytes; fewer where the file ends."""

T = TypeVar("T")


class Irregular(ValueError):  # noqa: N818  (a finding, not an error)
    """No row of fields, or one that no writer of models makes, whatever protobuf makes of it."""


class Oversized(ValueError):  # noqa: N818
    """More than a model can have; the text says what."""


class Span(NamedTuple):
    """Bytes of a file."""

    offset: int
    length: int


class _Field(NamedTuple):
    """A field: its number and kind, where its key starts, and where its value starts and ends."""

    number: int
    kind: int
    key: int
    start: int
    end: int


def measure(read: Read, size: int) -> None:
    """See that a model file holds no more parts and no more text than any model needs, before anything is made of it.

    Parts are counted where they are many: in messages of `LEAST` bytes and more.

    Raises:
        Oversized: it does.
        Irregular: it is no row of fields.
    """
    walk = _Walk(read, size)
    parts = text = 0
    stack = [(0, size, MODEL)]
    while stack:
        start, end, message = stack.pop()
        inside, listed = INSIDE.get(message, {}), 0
        for field in walk.fields(start, end):
            if (message, field.number) in DATA:
                listed += 1
                if listed > LISTED:
                    break
                continue
            parts += 1
            if parts > PARTS:
                raise Oversized(f"has more than {PARTS} nodes, tensors and other parts")
            if field.number not in inside or field.kind != BYTES:
                if field.kind == BYTES and (message, field.number) != (TENSOR, RAW_DATA):
                    text += field.end - field.start
                if text > TEXT:
                    raise Oversized(f"has more than {TEXT >> 20} MB of text beside its tensors")
            elif field.end - field.start >= LEAST:
                stack.append((field.start, field.end, inside[field.number]))


def skeleton(read: Read, size: int) -> tuple[bytes, int]:
    """A model file with the larger tensors' data left out, and how many tensors those are.

    Such a tensor has external data instead, at the location `OWN`, where the data are in the file.

    Args:
        read: reads the file.
        size: its bytes.

    Raises:
        Irregular: the file has to be read as a whole to tell what it is.
    """
    walk = _Walk(read, size)
    return b"".join(walk.without_data(0, size, MODEL, 0)), walk.left_out


def spans(read: Read, size: int) -> dict[Path, Span]:
    """Where the raw data of every tensor of a model file are, however small; tensors stored otherwise are left out.

    Raises:
        Irregular: see `skeleton`.
    """
    return dict(_Walk(read, size).raw_data(0, size, MODEL, (), 0))


def notes(read: Read, size: int, key: str) -> list[Span]:
    """Where a model file has entries of metadata_props with a key: the whole fields.

    Raises:
        Irregular: see `skeleton`.
    """
    walk = _Walk(read, size)
    found = []
    for field in walk.fields(0, size):
        if field.number == METADATA and field.kind == BYTES and field.end - field.start < WINDOW:
            entry = onnx.StringStringEntryProto.FromString(walk.take(field.start, field.end))
            if entry.key == key:
                found.append(Span(field.key, field.end - field.key))
    return found


def note(key: str, value: str) -> bytes:
    """An entry of metadata_props: put at the end of a model file, it belongs to the model."""
    content = onnx.StringStringEntryProto(key=key, value=value).SerializeToString()
    return b"".join((_varint(METADATA << 3 | BYTES), _varint(len(content)), content))


def paths(proto: onnx.ModelProto) -> Iterator[tuple[Path, TensorProto]]:
    """Every tensor of a model that `spans` may find, by where it is."""
    stack: list[tuple[Path, onnx.GraphProto | onnx.FunctionProto]] = [(((7, 0),), proto.graph)]
    stack += [(((25, i),), function) for i, function in enumerate(proto.functions)]
    while stack:
        path, graph = stack.pop()
        function = isinstance(graph, onnx.FunctionProto)
        if isinstance(graph, onnx.GraphProto):
            yield from (((*path, (5, i)), tensor) for i, tensor in enumerate(graph.initializer))
        for i, node in enumerate(graph.node):
            for j, attribute in enumerate(node.attribute):
                inner = (*path, (7 if function else 1, i), (5, j))
                if attribute.HasField("t"):
                    yield (*inner, (5, 0)), attribute.t
                yield from (((*inner, (10, k)), tensor) for k, tensor in enumerate(attribute.tensors))
                if attribute.HasField("g"):
                    stack.append(((*inner, (6, 0)), attribute.g))
                stack += [((*inner, (11, k)), graph_) for k, graph_ in enumerate(attribute.graphs)]


def splice(proto: onnx.ModelProto, place: Callable[[TensorProto], tuple[T, int] | None]) -> list[bytes | T]:
    """A model as the bytes of a file with data put in that are kept elsewhere.

    Args:
        proto: the model.
        place: for a tensor with external data, whatever stands for its data, and how many bytes that is; None where
            the data stay outside.

    Returns:
        What makes up the file, one after the other.

    Raises:
        ValueError: the model is larger than protobuf can hold even so.
    """
    content = proto.SerializeToString(deterministic=True)
    walk = _Walk(lambda offset, length: content[offset : offset + length], len(content))
    return _joined(walk.with_data(0, len(content), MODEL, place)[0])


def _joined(pieces: list[bytes | T]) -> list[bytes | T]:
    """Neighbouring bytes put together."""
    out: list[bytes | T] = []
    run: list[bytes] = []
    for piece in pieces:
        if isinstance(piece, bytes):
            run.append(piece)
            continue
        out.extend((b"".join(run), piece))
        run = []
    return [*out, b"".join(run)]


class _Walk:
    """A file under examination; what was read last is kept, since fields follow each other."""

    def __init__(self, read: Read, size: int) -> None:
        self.read = read
        self.size = size
        self.first = 0
        self.window = b""
        self.left_out = 0

    def take(self, start: int, end: int) -> bytes:
        """Bytes of the file.

        Raises:
            Irregular: it ends before them.
        """
        if not self.first <= start <= end <= self.first + len(self.window):
            if end - start > WINDOW:
                content = self.read(start, end - start)
                if len(content) < end - start:
                    raise Irregular(f"the file ends within {end} bytes")
                return content
            self.first, self.window = start, self.read(start, WINDOW)
            if start + len(self.window) < end:
                raise Irregular(f"the file ends within {end} bytes")
        return self.window[start - self.first : end - self.first]

    def varint(self, start: int, end: int) -> tuple[int, int]:
        """The number at a place, and where it ends."""
        value = 0
        for index, byte in enumerate(self.take(start, min(start + 10, end))):
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value, start + index + 1
        raise Irregular(f"no number ends within 10 bytes from {start}")

    def fields(self, start: int, end: int) -> Iterator[_Field]:
        """The fields of a message."""
        at = start
        while at < end:
            tag, value = self.varint(at, end)
            number, kind = tag >> 3, tag & 7
            if kind == VARINT:
                after = self.varint(value, end)[1]
            elif kind == BYTES:
                length, value = self.varint(value, end)
                after = value + length
            elif kind in (FIXED32, FIXED64):
                after = value + (4 if kind == FIXED32 else 8)
            else:
                raise Irregular(f"a field of kind {kind} at {at}")
            if number == 0 or after > end:
                raise Irregular(f"the field at {at} does not end within its message")
            yield _Field(number, kind, at, value, after)
            at = after

    def nested(self, start: int, end: int, message: str) -> Iterator[tuple[_Field, str, int]]:
        """The fields that lead to tensors, with the message in each and its place among those of its number."""
        inside = INSIDE[message]
        seen = dict.fromkeys(inside, 0)
        for field in self.fields(start, end):
            if field.number not in inside:
                continue
            count = seen[field.number]
            if field.kind != BYTES or (count and (message, field.number) in ONCE):
                raise Irregular(f"field {field.number} of a {message} at {field.key} is not as expected")
            seen[field.number] = count + 1
            yield field, inside[field.number], count

    def data(self, start: int, end: int) -> _Field | None:
        """The raw data of a tensor that has all its values there."""
        found = None
        for field in self.fields(start, end):
            if field.number in (EXTERNAL_DATA, DATA_LOCATION):
                return None
            if field.number == RAW_DATA:
                if found is not None or field.kind != BYTES:
                    raise Irregular(f"raw data at {field.key} are not as expected")
                found = field
        return found

    def raw_data(self, start: int, end: int, message: str, path: Path, depth: int) -> Iterator[tuple[Path, Span]]:
        """Path and place of all raw data in a message."""
        if depth > DEPTH:
            raise Irregular("too deep")
        for field, inner, index in self.nested(start, end, message):
            inside = (*path, (field.number, index))
            if inner != TENSOR:
                yield from self.raw_data(field.start, field.end, inner, inside, depth + 1)
            elif (found := self.data(field.start, field.end)) is not None:
                yield inside, Span(found.start, found.end - found.start)

    def without_data(self, start: int, end: int, message: str, depth: int) -> list[bytes]:
        """A message with the larger raw data in it replaced by where they are."""
        if depth > DEPTH:
            raise Irregular("too deep")
        out = []
        copied = start
        for field, inner, _ in self.nested(start, end, message):
            if field.end - field.start < LEAST:
                continue
            if inner == TENSOR:
                found = self.data(field.start, field.end)
                if found is None or found.end - found.start < LEAST:
                    continue
                new = [self.take(field.start, found.key), self.take(found.end, field.end)]
                self.left_out += 1
                new.append(_outside(OWN, found.start, found.end - found.start))
            else:
                new = self.without_data(field.start, field.end, inner, depth + 1)
            head = [_varint(field.number << 3 | BYTES), _varint(sum(map(len, new)))]
            out += [self.take(copied, field.key), *head, *new]
            copied = field.end
        out.append(self.take(copied, end))
        return out

    def with_data(
        self, start: int, end: int, message: str, place: Callable[[TensorProto], tuple[T, int] | None]
    ) -> tuple[list[bytes | T], int]:
        """A message with data put in, and how long it is."""
        out: list[bytes | T] = []
        length = 0
        copied = start
        for field, inner, _ in self.nested(start, end, message):
            own = inner == TENSOR
            put = self.filled(field, place) if own else self.with_data(field.start, field.end, inner, place)
            if put is None or (len(put[0]) == 1 and isinstance(put[0][0], bytes)):
                continue
            head = self.take(copied, field.key) + _varint(field.number << 3 | BYTES) + _varint(put[1])
            out += [head, *put[0]]
            length += len(head) + put[1]
            copied = field.end
        rest = self.take(copied, end)
        return [*out, rest], length + len(rest)

    def filled(
        self, field: _Field, place: Callable[[TensorProto], tuple[T, int] | None]
    ) -> tuple[list[bytes | T], int] | None:
        """A tensor with its data put in; None where it has them, or they stay outside."""
        if not any(inner.number == EXTERNAL_DATA for inner in self.fields(field.start, field.end)):
            return None
        tensor = TensorProto.FromString(self.take(field.start, field.end))
        put = place(tensor)
        if put is None:
            return None
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        head = tensor.SerializeToString(deterministic=True) + _varint(RAW_DATA << 3 | BYTES) + _varint(put[1])
        return [head, put[0]], len(head) + put[1]


def _outside(location: str, offset: int, length: int) -> bytes:
    """The fields of a tensor that say where its data are."""
    tensor = TensorProto(data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    content: bytes = tensor.SerializeToString(deterministic=True)
    return content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
