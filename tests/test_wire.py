"""The walk over protobuf's wire format finds what protobuf reads, in whole, odd and damaged files."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from model_files import many_small, net, typed
from onnx import TensorProto, helper, numpy_helper
from test_patching import NETS, odd, read, sparse

from onnxprune import PruneError, prune
from onnxprune.graph import model as loading
from onnxprune.graph import wire


def long_names() -> onnx.ModelProto:
    """Tensors of little and of much data, each with a name that makes it a large message."""
    tensors = [helper.make_tensor(100 * str(i), TensorProto.FLOAT, [n], np.ones(n)) for i, n in enumerate([4, 90] * 2)]
    for tensor in tensors:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    return helper.make_model(helper.make_graph([], "g", [], [], tensors))


def graphs_of_a_node() -> onnx.ModelProto:
    """Tensors in graphs that an attribute lists, and in one that it holds."""
    tensors = [numpy_helper.from_array(np.full(90, i, np.float32), f"w{i}") for i in range(3)]
    first, second, third = (helper.make_graph([], f"g{i}", [], [], [tensor]) for i, tensor in enumerate(tensors))
    node = helper.make_node("Many", [], ["y"], domain="own", bodies=[first, second], body=third)
    return helper.make_model(helper.make_graph([node], "g", [], []))


FILES: dict[str, Callable[[], bytes]] = {
    **{name: (lambda make=make: make().SerializeToString()) for name, make in NETS.items()},  # type: ignore[misc]
    "odd": lambda: odd(net()),
    "typed": lambda: typed(net()).SerializeToString(),
    "many small": lambda: many_small().SerializeToString(),
    "sparse": lambda: sparse().SerializeToString(),
    "graphs of a node": lambda: graphs_of_a_node().SerializeToString(),
    "long names": lambda: long_names().SerializeToString(),
}


def filled(content: bytes) -> onnx.ModelProto:
    """The skeleton of a file with the data put back from where it says they are."""
    proto = onnx.ModelProto.FromString(wire.skeleton(*read(content))[0])

    def place(tensor: TensorProto) -> tuple[bytes, int] | None:
        told = {entry.key: entry.value for entry in tensor.external_data}
        if told.get("location") != wire.OWN:
            return None
        start, length = int(told["offset"]), int(told["length"])
        return content[start : start + length], length

    return onnx.ModelProto.FromString(b"".join(wire.splice(proto, place)))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "LEAST", 100)


@pytest.mark.parametrize("window", [64, 1 << 16])
@pytest.mark.parametrize("name", FILES)
def test_a_skeleton_filled_is_the_file(name: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "WINDOW", window)
    content = FILES[name]()
    model = onnx.ModelProto.FromString(content)
    assert filled(content) == model
    skeleton, left_out = wire.skeleton(*read(content))
    large = [t for _, t in wire.paths(model) if len(t.raw_data) >= 100]
    assert left_out == len(large)
    assert len(skeleton) <= len(content) - sum(len(t.raw_data) for t in large) + 100 * len(large)


@pytest.mark.parametrize("name", FILES)
def test_spans_are_where_the_data_are(name: str) -> None:
    content = FILES[name]()
    spans = wire.spans(*read(content))
    found = {path: content[s.offset : s.offset + s.length] for path, s in spans.items()}
    model = onnx.ModelProto.FromString(content)
    assert found == {path: tensor.raw_data for path, tensor in wire.paths(model) if tensor.HasField("raw_data")}


def test_data_are_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of text holds for names, not for what tensors hold."""
    content = FILES["long names"]()
    text, data = 4 * 100, 4 * 2 * (4 + 90)
    monkeypatch.setattr(wire, "TEXT", text + 100)
    assert data > wire.TEXT
    wire.measure(*read(content))
    monkeypatch.setattr(wire, "TEXT", text - 1)
    with pytest.raises(wire.Oversized, match="of text beside its tensors"):
        wire.measure(*read(content))


NUMBERS = {
    "float_data": TensorProto(float_data=[1.0] * 900),
    "int32_data": TensorProto(int32_data=[1] * 900),
    "string_data": TensorProto(string_data=[b"text"] * 900),
    "int64_data": TensorProto(int64_data=[1] * 900),
    "raw_data": TensorProto(raw_data=b"1" * 900),
    "double_data": TensorProto(double_data=[1.0] * 900),
    "uint64_data": TensorProto(uint64_data=[1] * 900),
    "s": helper.make_attribute("a", "text" * 300),
    "floats": helper.make_attribute("a", [1.0] * 900),
    "ints": helper.make_attribute("a", [1] * 900),
    "strings": helper.make_attribute("a", ["text"] * 900),
    "sparse_tensor": helper.make_attribute(
        "a", helper.make_sparse_tensor(TensorProto(raw_data=b"1" * 900), TensorProto(dims=[9]), [9])
    ),
}


@pytest.mark.parametrize("holder", NUMBERS)
def test_values_are_neither_text_nor_parts(holder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever field holds them, in a tensor or an attribute, packed or one by one."""
    held = NUMBERS[holder]
    graph = helper.make_graph([helper.make_node("N", [], ["y"])], "g", [], [])
    if isinstance(held, TensorProto):
        graph.initializer.append(held)
    else:
        graph.node[0].attribute.append(held)
    content = helper.make_model(graph).SerializeToString()
    monkeypatch.setattr(wire, "TEXT", 100)
    monkeypatch.setattr(wire, "PARTS", 100)
    wire.measure(*read(content))
    graph.node[0].doc_string = "text" * 300
    with pytest.raises(wire.Oversized, match="of text beside its tensors"):
        wire.measure(*read(helper.make_model(graph).SerializeToString()))


def test_notes_are_found_whole() -> None:
    content = wire.note("onnxprune", "1") + odd(net()) + wire.note("other", "2") + wire.note("onnxprune", "x" * 300)
    first, second = wire.notes(*read(content), "onnxprune")
    assert content[: first.length] == wire.note("onnxprune", "1")
    assert first.offset == 0
    assert content[second.offset :] == wire.note("onnxprune", "x" * 300)
    assert second.offset + second.length == len(content)


def test_damaged_files_are_read_as_protobuf_does_or_not_at_all() -> None:
    """Bytes changed, taken out, put in, cut off: where the walk finds its way, so does protobuf, to the same model."""
    agreed = refused = 0
    rng = random.Random(0)
    files = [FILES[name]() for name in ("branches", "odd", "function")]
    for trial in range(3000):
        content = bytearray(files[trial % 3])
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(content))
            at = at if rng.random() < 0.3 else min(at, rng.randrange(400))  # where the structure is
            kind = rng.randrange(4)
            if kind == 0:
                content[at] = rng.randrange(256)
            elif kind == 1:
                content[at] ^= 1 << rng.randrange(8)
            elif kind == 2:
                del content[at : at + rng.randrange(1, 9)]
            else:
                content[at:at] = rng.randbytes(rng.randrange(1, 9))
        damaged = bytes(content)
        try:
            model = onnx.ModelProto.FromString(damaged)
        except DecodeError:
            model = None
        try:
            found = filled(damaged)
        except (wire.Irregular, DecodeError):
            refused += 1
            continue
        if model is not None:
            agreed += 1
            assert found == model
    assert agreed > 300
    assert refused > 300


@pytest.mark.parametrize("cut", [1, 5, 40, 1000])
def test_a_truncated_file(cut: int) -> None:
    content = FILES["net"]()[:-cut]
    with pytest.raises(wire.Irregular):
        wire.skeleton(*read(content))


@pytest.mark.parametrize("field", ["graph", "raw_data", "t"])
def test_a_field_given_twice(field: str) -> None:
    """protobuf merges such messages; no writer makes them, and nothing is left out of them."""
    model = net()
    if field == "graph":
        content = model.SerializeToString() + onnx.ModelProto(graph=model.graph).SerializeToString()
    elif field == "raw_data":
        tensor = TensorProto(name="conv", data_type=1, dims=[30], raw_data=bytes(120))
        twice = tensor.SerializeToString() + TensorProto(raw_data=bytes(120)).SerializeToString()
        graph = wire._varint(5 << 3 | 2) + wire._varint(len(twice)) + twice
        content = wire._varint(7 << 3 | 2) + wire._varint(len(graph)) + graph
    else:
        tensor = TensorProto(name="k", data_type=1, dims=[30], raw_data=bytes(120))
        twice = onnx.AttributeProto(name="value", t=tensor).SerializeToString() * 2
        node = wire._varint(5 << 3 | 2) + wire._varint(len(twice)) + twice
        graph = wire._varint(1 << 3 | 2) + wire._varint(len(node)) + node
        content = wire._varint(7 << 3 | 2) + wire._varint(len(graph)) + graph
    with pytest.raises(wire.Irregular):
        wire.skeleton(*read(content))


def test_a_file_cannot_claim_data_of_its_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The location that stands for the model file itself comes from nowhere but the walk."""
    for large in (0, loading.LARGE):
        monkeypatch.setattr(loading, "LARGE", large)
        model = net()
        half = next(t for t in model.graph.initializer if t.name == "half")
        half.ClearField("raw_data")
        half.data_location = TensorProto.EXTERNAL
        for key, value in (("location", wire.OWN), ("offset", "0"), ("length", str(144 * 9 * 2))):
            half.external_data.add(key=key, value=value)
        (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(PruneError, match=r"at places that are no files|outside the model's folder"):
            prune(tmp_path / "model.onnx", [{"sparsity": 0.5}], tmp_path / "out.onnx")
        with pytest.raises(PruneError, match="has no folder"):
            prune(model, [{"sparsity": 0.5}])
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("by", [-1, 4])
def test_data_of_the_wrong_length(by: int, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    half = next(t for t in model.graph.initializer if t.name == "half")
    half.raw_data = bytes(144 * 9 * 2 + by)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    for large in (0, loading.LARGE):
        monkeypatch.setattr(loading, "LARGE", large)
        with pytest.raises(PruneError, match=rf"'half' of shape \[144, 9\] .* needs 2592 bytes, but {2592 + by} are"):
            prune(tmp_path / "model.onnx", [{"sparsity": 0.5}])
