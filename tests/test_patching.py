"""A pruned file is its source with other bytes where weights are, and nothing else but a record at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from model_files import HALF, LAYOUTS, many_small, net, stored, typed, values, write_external
from nets import parse, tensors
from onnx import TensorProto, numpy_helper

from onnxprune import PruneError, inspect, prune
from onnxprune.graph import model as loading
from onnxprune.graph import saving, wire


def read(content: bytes) -> tuple[wire.Read, int]:
    return (lambda offset, length: content[offset : offset + length]), len(content)


def branches() -> onnx.ModelProto:
    """Weights in sub-graphs two levels deep, read from the outside and their own."""
    model = parse(
        """(float[2, 30] x, bool c) => (float[2, 20] y) {
            y = If(c) <
                then_branch = t () => (float[2, 20] p) {
                    p = If(c) <then_branch = u () => (float[2, 20] q) { q = MatMul(x, inner) },
                               else_branch = v () => (float[2, 20] r) { r = MatMul(x, outer) }> },
                else_branch = e () => (float[2, 20] s) { s = MatMul(x, other) }> }""",
        outer=values(30, 20),
    )
    then, other = (a.g for a in model.graph.node[0].attribute)
    inner = next(a.g for a in then.node[0].attribute if a.name == "then_branch")
    inner.initializer.append(numpy_helper.from_array(values(30, 20, seed=1), "inner"))
    other.initializer.append(numpy_helper.from_array(values(30, 20, seed=2), "other"))
    return model


def function() -> onnx.ModelProto:
    """A weight in a Constant of a function body."""
    model = parse(
        """(float[2, 30] x) => (float[2, 20] y) { y = own.f(x) }
        <domain: "own", opset_import: ["" : 21]>
        f (a) => (b) { w = Constant<value = float[1] {0}>() b = MatMul(a, w) }"""
    )
    constant = next(n for n in model.functions[0].node if n.op_type == "Constant").attribute[0]
    constant.t.CopyFrom(numpy_helper.from_array(values(30, 20), "w"))
    return model


def shared() -> onnx.ModelProto:
    """A table read by a Gather and a transposed MatMul, and a weight of two readers."""
    return parse(
        """(int64[2] i) => (float[2, 40] y) {
            e = Gather(table, i) a = MatMul(e, w) b = MatMul(a, w)
            t = Transpose<perm = [1, 0]>(table) y = MatMul(b, t) }""",
        table=values(40, 25),
        w=values(25, 25, seed=1),
    )


def parts() -> onnx.ModelProto:
    """A weight cut into three by a Split, one scaled on its way, and one of four bits."""
    model = parse(
        """(float[2, 30] x) => (float[2, 8] y) <float s = {0.5}> {
            q, k, v = Split<axis = 1, num_outputs = 3>(w) a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v)
            d = Add(a, b) e = Add(d, c) h = Mul(small, s) f = MatMul(e, h)
            g = DequantizeLinear(four, s) y = MatMul(f, g) }""",
        w=values(30, 60),
        small=values(20, 10, seed=1),
    )
    four = model.graph.initializer.add(name="four", data_type=TensorProto.INT4, dims=[10, 8])
    four.raw_data = np.random.default_rng(5).integers(0, 256, 40, np.uint8).tobytes()
    return model


def dtypes() -> onnx.ModelProto:
    kinds = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f64": np.float64}
    numbers = {"f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "f64": TensorProto.DOUBLE}
    model = parse("(float16[2, 30] x) => (double[2, 30] y) { y = Identity(x) }")
    del model.graph.node[:]
    last = "x"
    for index, (name, dtype) in enumerate(kinds.items()):
        model.graph.initializer.append(numpy_helper.from_array(values(30, 30, dtype=dtype, seed=index), name))
        model.graph.node.append(onnx.helper.make_node("Cast", [last], [f"c{name}"], to=numbers[name]))
        last = "y" if name == "f64" else f"m{name}"
        model.graph.node.append(onnx.helper.make_node("MatMul", [f"c{name}", name], [last]))
    return model


def sparse() -> onnx.ModelProto:
    """An initializer stored sparsely beside a dense one."""
    model = parse("(float[2, 30] x) => (float[2, 20] y) { a = MatMul(x, s) y = MatMul(a, w) }", w=values(30, 20))
    flat = numpy_helper.from_array(values(40, seed=3), "s")
    at = numpy_helper.from_array(np.arange(0, 880, 22), "s_at")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(flat, at, [30, 30]))
    return model


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "net": net,
    "branches": branches,
    "function": function,
    "shared": shared,
    "parts": parts,
    "dtypes": dtypes,
}
OTHERS: dict[str, Callable[[], onnx.ModelProto]] = {
    "typed": lambda: typed(net()),
    "lists of floats": many_small,
    "sparse": sparse,
}
CONFIGS = {
    "uniform": HALF,
    "global": [{"sparsity": 0.7, "allocation": "global", "op_types": ["default", "Embedding"]}],
    "erk": [{"sparsity": 0.6, "allocation": "erk"}],
    "blocks": [{"sparsity": 0.5, "pattern": "block:2x1"}],
    "nothing": [{"sparsity": 0.0}],
}


@pytest.fixture(params=["whole", "left in the file"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a single file is loaded: as a whole, or with its tensors left where they are, as large ones are."""
    if request.param == "left in the file":
        monkeypatch.setattr(loading, "LARGE", 0)
        monkeypatch.setattr(wire, "LEAST", 100)
    return request.param


def odd(model: onnx.ModelProto) -> bytes:
    """A model as bytes that no writer makes: fields it does not know, notes of others, fields out of order."""
    graph = onnx.ModelProto()
    graph.graph.CopyFrom(model.graph)
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    rest.metadata_props.add(key="author", value="someone")
    strange = (
        b"\xc2\x3e\x05hello" + b"\xc8\x3e\x81\x80\x00"
    )  # field 1000, bytes; field 1001, a number in too many bytes
    return strange + graph.SerializeToString() + rest.SerializeToString() + strange


def expected(content: bytes, before: onnx.ModelProto, after: dict[str, bytes]) -> bytes:
    """The source with the bytes of tensors replaced, found by looking for them."""
    out = bytearray(content)
    for name, tensor in tensors(before):
        raw = tensor.raw_data
        if raw and name in after and after[name] != raw:
            assert content.count(raw) == 1
            at = content.find(raw)
            out[at : at + len(raw)] = after[name]
    return bytes(out)


def note(path: Path) -> bytes:
    (entry,) = [p for p in onnx.load(path, load_external_data=False).metadata_props if p.key == "onnxprune"]
    return wire.note(entry.key, entry.value)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", NETS)
def test_single_files(kind: str, config: str, way: str, tmp_path: Path) -> None:
    model = NETS[kind]()
    content = odd(model)
    (tmp_path / "model.onnx").write_bytes(content)
    plain = onnx.ModelProto.FromString(content)
    twin = prune(plain, CONFIGS[config])
    result = prune(tmp_path / "model.onnx", CONFIGS[config], tmp_path / "out.onnx")
    assert (wire.OWN in result.model.data) == (way == "left in the file")
    assert result.masks == twin.masks
    assert result.report == twin.report
    after = stored(twin.to_proto())
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(result.to_proto()) == after
    assert (tmp_path / "out.onnx").read_bytes() == expected(content, plain, after) + note(tmp_path / "out.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == content
    assert inspect(tmp_path / "out.onnx").zeros == inspect(twin.to_proto()).zeros


@pytest.mark.parametrize("kind", OTHERS)
def test_what_cannot_be_patched_is_written_anew(kind: str, way: str, tmp_path: Path) -> None:
    model = OTHERS[kind]()
    (tmp_path / "model.onnx").write_bytes(odd(model))
    twin = prune(model, HALF)
    result = prune(tmp_path / "model.onnx", HALF, tmp_path / "out.onnx")
    assert result.masks == twin.masks
    twin.save(tmp_path / "twin.onnx")
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(onnx.load(tmp_path / "twin.onnx"))
    assert stored(result.to_proto()) == stored(twin.to_proto())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [*NETS, "typed"])
def test_external_data(kind: str, config: str, tmp_path: Path) -> None:
    model = {**NETS, **OTHERS}[kind]()
    path = write_external(model, tmp_path / "model.onnx", LAYOUTS["one file"])
    content = (tmp_path / "weights.bin").read_bytes()
    twin = prune(model, CONFIGS[config])
    result = prune(path, CONFIGS[config], tmp_path / "out.onnx")
    assert result.masks == twin.masks
    after = stored(twin.to_proto())
    assert stored(onnx.load(tmp_path / "out.onnx")) == after
    plain = onnx.load(path)
    assert (tmp_path / "out.onnx.data").read_bytes() == expected(content, plain, after)


def test_a_weight_at_the_start_of_its_file_stays_there(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    model = parse("(float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }", w=weight)
    onnx.save(model, tmp_path / "a.onnx", save_as_external_data=True, location="a.data", size_threshold=0)
    prune(tmp_path / "a.onnx", HALF, tmp_path / "b.onnx")
    assert (tmp_path / "b.onnx.data").stat().st_size == weight.nbytes


def test_the_record_is_replaced(way: str, tmp_path: Path) -> None:
    """Pruned three times, in place and not, a file has one record, and is what pruning once makes it."""
    content = odd(net())
    (tmp_path / "model.onnx").write_bytes(content)
    prune(tmp_path / "model.onnx", [{"sparsity": 0.2}], tmp_path / "a.onnx")
    prune(tmp_path / "a.onnx", [{"sparsity": 0.3}], tmp_path / "a.onnx", force=True)
    result = prune(tmp_path / "a.onnx", HALF, tmp_path / "b.onnx")
    prune(tmp_path / "model.onnx", HALF, tmp_path / "once.onnx")
    assert (tmp_path / "b.onnx").read_bytes() == (tmp_path / "once.onnx").read_bytes()
    # Somebody put something behind the record.
    last = onnx.ModelProto()
    last.metadata_props.add(key="last", value="word")
    with open(tmp_path / "b.onnx", "ab") as file:
        file.write(last.SerializeToString())
    prune(tmp_path / "b.onnx", HALF, tmp_path / "c.onnx")
    whole = (tmp_path / "once.onnx").read_bytes()
    cut = whole[: -len(note(tmp_path / "once.onnx"))]
    assert (tmp_path / "c.onnx").read_bytes() == cut + last.SerializeToString() + note(tmp_path / "c.onnx")
    assert result.masks == prune(net(), HALF).masks


def test_in_place_and_saved_again(way: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(odd(net()))
    twin = prune(onnx.load(path), HALF)
    result = prune(path, HALF, path, force=True)
    assert stored(onnx.load(path)) == stored(twin.to_proto()) == stored(result.to_proto())
    assert result.masks == twin.masks
    result.save(tmp_path / "again.onnx")
    assert stored(onnx.load(tmp_path / "again.onnx")) == stored(twin.to_proto())


def test_single_and_external_together(way: str, tmp_path: Path) -> None:
    """Some tensors in the model file, others outside: the file has to name the new data."""
    model = net()
    path = write_external(model, tmp_path / "model.onnx", LAYOUTS["one file"])
    proto = onnx.load(path, load_external_data=False)
    conv, kept = (next(t for t in m.graph.initializer if t.name == "half") for m in (proto, model))
    conv.CopyFrom(kept)
    path.write_bytes(proto.SerializeToString())
    result = prune(path, HALF, tmp_path / "out.onnx")
    twin = prune(model, HALF)
    assert result.masks == twin.masks
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(twin.to_proto())


@pytest.mark.parametrize("sparse_", [False, True])
def test_sparse_storage(sparse_: bool, way: str, tmp_path: Path) -> None:
    onnx.save(net(), tmp_path / "model.onnx")
    config = [{"sparsity": 0.9}]
    prune(tmp_path / "model.onnx", config, tmp_path / "out.onnx", sparse=sparse_)
    prune(net(), config, tmp_path / "twin.onnx", sparse=sparse_)
    ours, theirs = onnx.load(tmp_path / "out.onnx"), onnx.load(tmp_path / "twin.onnx")
    assert [t.values.name for t in ours.graph.sparse_initializer] == [
        t.values.name for t in theirs.graph.sparse_initializer
    ]
    assert stored(ours) == stored(theirs)


def test_above_the_limit_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file that does not fit any more moves its tensors out, from where they are."""
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(wire, "LEAST", 100)
    (tmp_path / "model.onnx").write_bytes(odd(parts()))
    monkeypatch.setattr(saving, "PROTOBUF_LIMIT", 4000)
    monkeypatch.setattr(saving, "PAGE", 128)
    monkeypatch.setattr(saving, "_patched", lambda model: None)
    prune(tmp_path / "model.onnx", HALF, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(prune(parts(), HALF).to_proto())


def test_a_source_that_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "LARGE", 0)
    monkeypatch.setattr(wire, "LEAST", 100)
    onnx.save(net(), tmp_path / "model.onnx")
    result = prune(tmp_path / "model.onnx", HALF)
    onnx.save(net(), tmp_path / "model.onnx")
    for use in (lambda: result.save(tmp_path / "out.onnx"), result.to_proto):
        with pytest.raises(PruneError, match=r"model\.onnx' has changed since it was loaded\); load the model"):
            use()
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


# ------------------------------------------------------------------ bugs these tests see

BUGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {}


def bug(function: Callable[[pytest.MonkeyPatch], None]) -> Callable[[pytest.MonkeyPatch], None]:
    BUGS[function.__name__] = function
    return function


@bug
def a_number_ends_one_byte_late(patch: pytest.MonkeyPatch) -> None:
    whole = wire._Walk.varint
    patch.setattr(
        wire._Walk, "varint", lambda self, start, end: (whole(self, start, end)[0], whole(self, start, end)[1] + 1)
    )


@bug
def seven_bits_are_six(patch: pytest.MonkeyPatch) -> None:
    def varint(self: wire._Walk, start: int, end: int) -> tuple[int, int]:
        value = 0
        for index, byte in enumerate(self.take(start, min(start + 10, end))):
            value |= (byte & 0x7F) << (6 * index)
            if byte < 0x80:
                return value, start + index + 1
        raise wire.Irregular

    patch.setattr(wire._Walk, "varint", varint)


@bug
def data_start_one_byte_late(patch: pytest.MonkeyPatch) -> None:
    whole = wire._Walk.data

    def data(self: wire._Walk, start: int, end: int) -> object:
        found = whole(self, start, end)
        return found and found._replace(start=found.start + 1, end=min(found.end + 1, end))

    patch.setattr(wire._Walk, "data", data)


@bug
def places_are_counted_from_one(patch: pytest.MonkeyPatch) -> None:
    whole = wire._Walk.nested
    patch.setattr(
        wire._Walk, "nested", lambda self, *a: ((field, inner, index + 1) for field, inner, index in whole(self, *a))
    )


@bug
def the_window_is_not_moved(patch: pytest.MonkeyPatch) -> None:
    whole = wire._Walk.take

    def take(self: wire._Walk, start: int, end: int) -> bytes:
        return whole(self, start, end) if not self.window else self.window[start - self.first : end - self.first]

    patch.setattr(wire._Walk, "take", take)
    patch.setattr(wire, "WINDOW", 64)


@bug
def old_records_are_kept(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(wire, "notes", lambda read, size, key: [])


def _all(tmp_path: Path, patch: pytest.MonkeyPatch) -> None:
    for number, kind in enumerate(("branches", "net")):
        folder = tmp_path / str(number)
        folder.mkdir()
        test_single_files(kind, "uniform", "whole", folder)
        (folder / "again").mkdir()
        test_the_record_is_replaced("whole", folder / "again")


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "right").mkdir()
    (tmp_path / "wrong").mkdir()
    _all(tmp_path / "right", monkeypatch)
    BUGS[name](monkeypatch)
    with pytest.raises(Exception):  # noqa: B017, PT011  (whatever goes wrong)
        _all(tmp_path / "wrong", monkeypatch)
