"""Seeded mutations: of bytes, of protobuf messages, of configurations, of archives."""

from __future__ import annotations

import contextlib
import io
import json
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
from google.protobuf.message import DecodeError

Mutate = Callable[[random.Random, bytes], bytes]

INTS = (0, 1, -1, 2, 3, 4, 7, 16, 100, 2**20, 2**31 - 1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, 0.5, -1.0, 1e-45, 3e38, float("inf"), float("-inf"), float("nan"))
TEXTS = ("", "ai.onnx", "com.microsoft", "a", "../x", "\x1b[2J", "é" * 300, "[red]", "NOTSET", "0", "-1", "nan")
LONGEST = 1 << 20


def plain(rng: random.Random, data: bytes) -> bytes:
    """Bits flipped, bytes set, pieces dropped, doubled, swapped or inserted."""
    out = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.randrange(len(out)), rng.choice((1, 1, 2, 4, 8, 32))
        kind = rng.randrange(6)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            other = rng.randrange(len(out))
            out[at : at + size] = out[other : other + size]
        else:
            out[at:at] = rng.randbytes(size)
        out = out or bytearray(b"\0")
    return bytes(out[:LONGEST])


def model(rng: random.Random, data: bytes) -> bytes:
    """One to four fields of the model's messages changed, dropped, doubled or exchanged; rarely bytes of the file."""
    try:
        proto = onnx.ModelProto.FromString(data)
    except DecodeError:
        return plain(rng, data)
    if rng.random() < 0.03:
        return plain(rng, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        messages = list(walk(proto))
        change(rng, rng.choice(messages), messages)
    try:
        out: bytes = proto.SerializeToString()
    except ValueError:  # beyond what protobuf writes
        return plain(rng, data)
    return out if len(out) <= LONGEST else data


def walk(message: Any) -> Iterator[Any]:
    """A message and all those inside of it."""
    stack = [message]
    while stack:
        message = stack.pop()
        yield message
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                stack += value if repeated(field) else [value]


def repeated(field: Any) -> bool:
    """Whether a field is a list."""
    return bool(field.is_repeated) if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED


def change(rng: random.Random, message: Any, others: Sequence[Any]) -> None:
    """Change one field of a message: mostly one that is given."""
    fields = [field for field, _ in message.ListFields()]
    field = rng.choice(fields if fields and rng.random() < 0.85 else list(message.DESCRIPTOR.fields))
    value, kind = getattr(message, field.name), rng.randrange(4)
    is_message = field.type == field.TYPE_MESSAGE
    donors = [other for other in others if is_message and other.DESCRIPTOR is field.message_type]
    try:
        if not repeated(field):
            if kind == 0:
                message.ClearField(field.name)
            elif not is_message:
                setattr(message, field.name, scalar(rng, field, value, others))
            elif donors:
                value.MergeFrom(rng.choice(donors)) if kind == 1 else value.CopyFrom(copied(rng.choice(donors)))
            else:
                value.SetInParent()
            return
        at = rng.randrange(len(value)) if len(value) else 0
        if kind == 0 and len(value):
            del value[at]
        elif is_message:
            entries = [copied(entry) for entry in value]
            if kind == 1 and entries:
                entries.insert(rng.randrange(len(entries) + 1), entries[at])
            elif donors and (kind == 2 or not entries):
                entries.insert(at, copied(rng.choice(donors)))
            elif entries:
                other = rng.randrange(len(entries))
                entries[at], entries[other] = entries[other], entries[at]
            del value[:]
            value.extend(entries)
        elif kind == 1 or not len(value):
            entry = value[at] if len(value) else None
            value.insert(at, scalar(rng, field, entry, others))
        else:
            value[at] = scalar(rng, field, value[at], others)
    except (ValueError, TypeError):  # no value of that field
        return


def copied(message: Any) -> Any:
    """A copy of a message, which may not be given to its own children."""
    return type(message).FromString(message.SerializeToString())


def scalar(rng: random.Random, field: Any, value: Any, others: Sequence[Any]) -> Any:
    if field.type == field.TYPE_BYTES:
        return plain(rng, value or b"")
    if field.type == field.TYPE_STRING:
        if rng.random() < 0.3:
            return rng.choice(TEXTS)
        names = [n for o in rng.sample(others, min(8, len(others))) for n in texts(o)]
        return rng.choice(names or TEXTS)
    if field.type in (field.TYPE_FLOAT, field.TYPE_DOUBLE):
        return rng.choice((*FLOATS, (value or 0.0) * 2, -(value or 0.0)))
    if field.type == field.TYPE_ENUM:
        return rng.choice(field.enum_type.values).number
    wide = field.type not in (field.TYPE_INT32, field.TYPE_UINT32)
    found = rng.choice((*INTS, (value or 0) + 1, (value or 0) - 1, rng.randrange(64), rng.randrange(64)))
    return found if wide else (found + 2**31) % 2**32 - 2**31


def texts(message: Any) -> list[str]:
    """The strings that stand in a message itself."""
    found = []
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            found += value if repeated(field) else [value]
    return found


def config(rng: random.Random, data: bytes) -> bytes:
    """A JSON tree with a branch exchanged, or bytes changed."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return plain(rng, data)
    if rng.random() < 0.3:
        return plain(rng, data)
    text = json.dumps(branch(rng, tree))
    return (text + " " * rng.randrange(3)).encode()  # the form goes by the length


KEYS = (
    *("sparsity", "op_types", "op_names", "exclude", "score", "pattern", "allocation", "initial_sparsity", "quality"),
    *("final_sparsity", "start_epoch", "end_epoch", "start_step", "end_step", "frequency", "config_list", "pruner"),
    *("inexact", "reconstruct", "x"),
)
LEAVES: tuple[Any, ...] = (
    *(None, True, False, "", [], {}, "default", "Conv", "fc*", "[", "**", "magnitude", "wanda", "l1", "bn_scale"),
    *("unstructured", "2:4", "0:4", "4:2", "1:99999999999", "block:2x2", "block:0x1", "block:-1x2", "block:9x9"),
    *("channel", "head", "grouped", "grouped:0", "grouped:3", "global", "erk", "sensitivity", "agp", "level"),
    *("sparsegpt", 10**400, *INTS, *FLOATS, 0.25, 0.99, "²:④", "a" * 500),
)


def branch(rng: random.Random, tree: Any) -> Any:
    if isinstance(tree, dict) and tree and rng.random() < 0.8:
        out = dict(tree)
        key = rng.choice(list(out))
        kind = rng.randrange(4)
        if kind == 0:
            out[rng.choice(KEYS)] = rng.choice(LEAVES)
        elif kind == 1:
            out[rng.choice(KEYS)] = out.pop(key)
        else:
            out[key] = branch(rng, out[key])
        return out
    if isinstance(tree, list) and tree and rng.random() < 0.8:
        at = rng.randrange(len(tree))
        kind = rng.randrange(4)
        if kind == 0:
            return [*tree, *tree[: at + 1]]
        return [*tree[:at], *([] if kind == 1 else [branch(rng, tree[at])]), *tree[at + 1 :]]
    return rng.choice(LEAVES)


def archive(rng: random.Random, data: bytes) -> bytes:
    """Bytes of the members of an archive changed, and packed again; or bytes of the file itself."""
    if rng.random() < 0.4:
        return plain(rng, data)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = [i for i in archive.infolist() if i.file_size < LONGEST]
            members = [(i.filename, archive.read(i)) for i in infos]
    except Exception:  # what zipfile raises for damaged files is of many kinds
        return plain(rng, data)
    if not members:
        return plain(rng, data)
    at = rng.randrange(len(members))
    name, content = members[at]
    kind = rng.randrange(8)
    if kind == 0:
        del members[at]
    elif kind == 1:
        members.append((rng.choice((name, name + "2", "labels.npy", "x.npy", "../a.npy", "bits.npy")), content))
    else:
        members[at] = (name, plain(rng, content))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that is there already
        for name, content in members:
            with contextlib.suppress(ValueError, UnicodeError):
                archive.writestr(name, content)
    return out.getvalue()
