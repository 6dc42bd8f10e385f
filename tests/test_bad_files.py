"""Files that hold no model, or not all of it: a PruneError that says so, and nothing written."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from bad_input import HALF, attempt, net, refused
from hostile_models import laughs
from nets import parse
from onnx import TensorProto, numpy_helper

from onnxprune import PruneError, benchmark, evaluate, inspect, prune
from onnxprune.graph import valid


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts in a folder with a good model, model.onnx, and must leave it as it was before the call."""
    monkeypatch.chdir(tmp_path)
    onnx.save(net(), "model.onnx")
    return tmp_path


# ------------------------------------------------------------------ the model file

NO_MODELS: dict[str, bytes] = {
    "text": b"This is a text, not a model.\n" * 20,
    "html": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
    "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x02\x00\x00\x00\x90wS\xde",
    "empty": b"",
    "a pointer to large file storage": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n",
    "a tensor": numpy_helper.from_array(np.ones(9)).SerializeToString(),
    "a graph": net().graph.SerializeToString(),
    "a zip": b"PK\x03\x04" + bytes(100),
    "zeros": bytes(1000),
    "a model without a graph": onnx.ModelProto(ir_version=8, producer_name="p").SerializeToString(),
}


@pytest.mark.parametrize("kind", NO_MODELS)
def test_no_model(kind: str) -> None:
    Path("bad.onnx").write_bytes(NO_MODELS[kind])
    for call in (
        lambda: prune("bad.onnx", HALF, "out.onnx"),
        lambda: inspect("bad.onnx"),
        lambda: benchmark("bad.onnx"),
        lambda: evaluate("bad.onnx", {"x": np.ones((2, 4), np.float32)}),
    ):
        refused(call, "'bad.onnx'", "is not an ONNX model, or is truncated", "export it again")


def test_no_such_file() -> None:
    refused(lambda: prune("none.onnx", HALF, "out.onnx"), "no such file: 'none.onnx'", "give the path of an existing")
    refused(lambda: prune("", HALF, "out.onnx"), "give the path")
    refused(lambda: prune(".", HALF, "out.onnx"), "'.' is a folder", "give the path")
    refused(lambda: prune("model.onnx/more", HALF, "out.onnx"), "model.onnx/more", "give the path")
    refused(lambda: prune("nul\0.onnx", HALF, "out.onnx"), "give the path")
    refused(lambda: prune("x" * 5000, HALF, "out.onnx"), "xxx': File name too long; check its name")


@pytest.mark.parametrize("levels", [0, 1, 5])
def test_how_many_nodes_functions_stand_for(levels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each calls the next one twice; the last one is a node."""
    laughs(levels)(tmp_path)
    proto, nodes = onnx.load(tmp_path / "model.onnx"), 3 * 2**levels - 2
    monkeypatch.setattr(valid, "CALLED", nodes)
    valid.check_calls(proto, "it")
    monkeypatch.setattr(valid, "CALLED", nodes - 1)
    refused(lambda: valid.check_calls(proto, "it"), f"stand for {nodes} nodes, and at most {nodes - 1}")


def test_no_regular_file() -> None:
    os.mkfifo("pipe.onnx")
    for path in ("pipe.onnx", "/dev/zero"):
        with pytest.raises(PruneError, match="no regular file; give the path"):
            prune(path, HALF, "out.onnx")
    assert not Path("out.onnx").exists()


def test_no_permission() -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    os.chmod("model.onnx", 0)
    with pytest.raises(
        PruneError, match=r"cannot read 'model\.onnx': Permission denied; check its name and permissions"
    ):
        prune("model.onnx", HALF, "out.onnx")


@pytest.mark.parametrize("model", [None, 3, b"bytes", [], object(), np.ones(3), {"w": np.ones(3)}], ids=repr)
def test_no_model_at_all(model: Any) -> None:
    refused(lambda: prune(model, HALF, "out.onnx"), "a path, an onnx.ModelProto or an onnx_ir.Model, not")


def test_truncated_anywhere() -> None:
    """A file cut off anywhere is refused, but between the entries behind its graph: it is a model with fewer then."""
    model = net()
    for key in ("author", "licence"):
        model.metadata_props.add(key=key, value="someone")
    content = model.SerializeToString()
    whole = prune(model, HALF).to_proto().graph
    passed = []
    for length in range(len(content)):
        Path("cut.onnx").write_bytes(content[:length])
        told, result = attempt(lambda: prune("cut.onnx", HALF))
        assert (result is None) == ("'cut.onnx'" in told)
        if result is not None:
            assert result.to_proto().graph == whole
            passed.append(length)
    assert len(passed) == 3  # behind each of two operator sets, and behind one of two entries of metadata
    assert min(passed) > len(model.graph.SerializeToString())


def test_damaged_anywhere() -> None:
    """A file with one byte changed is refused, or is another model that is pruned as such: never anything else."""
    model = parse(
        """(float[2, 4] x, bool c) => (float[2, 3] y) { k = Constant<value = float[3] {1, 2, 3}>()
        h = If(c) <then_branch = t () => (float[2, 3] a) { a = MatMul(x, w) },
                   else_branch = e () => (float[2, 3] b) { b = MatMul(x, v) }> y = own.f(h, k) }
        <domain: "own", opset_import: ["": 21]> f (p, q) => (r) { r = Add(p, q) }""",
        w=np.ones((4, 3), np.float32),
        v=np.arange(12, dtype=np.float16).reshape(4, 3),
    )
    content = bytearray(model.SerializeToString())
    generator = random.Random(0)
    outcomes = {True: 0, False: 0}
    for place in range(len(content)):
        for value in (content[place] ^ (1 << generator.randrange(8)), generator.randrange(256)):
            damaged = content.copy()
            damaged[place] = value
            Path("damaged.onnx").write_bytes(damaged)
            told, _ = attempt(lambda: prune("damaged.onnx", HALF))
            outcomes[not told] += 1
    assert outcomes[False] > 100
    assert outcomes[True] > 100


# ------------------------------------------------------------------ external data


def external(**entries: object) -> None:
    """model.onnx with its weight in the file w.bin, described by the entries."""
    model = net()
    tensor = model.graph.initializer[0]
    content = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    onnx.save(model, "model.onnx")
    Path("w.bin").write_bytes(content)


def pruned() -> object:
    return prune("model.onnx", HALF, "out.onnx")


TENSOR = "external data of tensor 'w'"


def test_external_data_missing() -> None:
    external()
    os.unlink("w.bin")
    refused(pruned, "'model.onnx'", TENSOR, "'w.bin' is missing in", "put it beside the model")


@pytest.mark.parametrize(
    ("entries", "size"),
    [
        ({}, 47),
        ({}, 0),
        ({"offset": 1}, 48),
        ({"offset": 49}, 48),
        ({"offset": -1}, 48),
        ({"offset": -48}, 480),
        ({"length": 47}, 48),
        ({"length": 0}, 48),
        ({"length": 49}, 48),
        ({"length": -1}, 48),
        ({"offset": 10**30}, 48),
        ({"length": 10**30}, 48),
        ({"offset": 2**63, "length": 48}, 48),
    ],
    ids=str,
)
def test_external_data_too_short(entries: dict[str, object], size: int) -> None:
    external(**entries)
    Path("w.bin").write_bytes(bytes(size))
    refused(pruned, "'model.onnx'", TENSOR, "needs 48 bytes", f"which has {size}", "copy it again")


@pytest.mark.parametrize(
    "entries", [{"offset": "zero"}, {"length": "1e3"}, {"offset": ""}, {"length": "0x10"}], ids=str
)
def test_external_data_described_wrongly(entries: dict[str, object]) -> None:
    external(**entries)
    refused(pruned, "'model.onnx'", TENSOR, "offset and length must be numbers", "export the model again")


@pytest.mark.parametrize(
    "location",
    ["../w.bin", "sub/../../w.bin", "{}/w.bin", "{}/inside/w.bin", "", "../outside/w.bin", "/dev/zero", "a\0b"],
)
def test_external_data_outside(location: str, folder: Path) -> None:
    (folder / "inside").mkdir()
    (folder / "inside/sub").mkdir()
    external(location=location.format(folder))
    os.rename("model.onnx", "inside/model.onnx")
    refused(lambda: prune("inside/model.onnx", HALF, "out.onnx"), TENSOR, "outside the model's folder", "move the data")


def test_external_data_behind_a_link() -> None:
    external(location="link.bin")
    os.mkdir("inside")
    os.rename("model.onnx", "inside/model.onnx")
    os.symlink("../w.bin", "inside/link.bin")
    refused(lambda: prune("inside/model.onnx", HALF, "out.onnx"), TENSOR, "outside the model's folder")
    os.unlink("inside/link.bin")
    os.mkdir("elsewhere")
    os.rename("w.bin", "elsewhere/link.bin")
    os.symlink("../elsewhere", "inside/sub")
    model = onnx.load("inside/model.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "sub/link.bin"
    onnx.save(model, "inside/model.onnx")
    refused(lambda: prune("inside/model.onnx", HALF, "out.onnx"), TENSOR, "outside the model's folder")


@pytest.mark.parametrize("kind", ["a pipe", "a folder", "a device", "a dangling link", "a link to itself"])
def test_external_data_no_regular_file(kind: str) -> None:
    external()
    os.unlink("w.bin")
    if kind == "a pipe":
        os.mkfifo("w.bin")
    elif kind == "a folder":
        os.mkdir("w.bin")
    else:
        os.symlink({"a device": "/dev/zero", "a dangling link": "none"}.get(kind, "w.bin"), "w.bin")
    for call in (pruned, lambda: inspect("model.onnx")):
        with pytest.raises(PruneError, match=r"external data of tensor 'w'.*(beside the model|move the data)"):
            call()
    assert not Path("out.onnx").exists()


def test_external_data_of_a_model_in_memory() -> None:
    external()
    model = onnx.load("model.onnx", load_external_data=False)
    refused(lambda: prune(model, HALF, "out.onnx"), TENSOR, "'w.bin'", "pass the model's path")


def test_external_strings() -> None:
    external()
    model = onnx.load("model.onnx", load_external_data=False)
    model.graph.initializer[0].data_type = TensorProto.STRING
    onnx.save(model, "model.onnx")
    refused(pruned, "tensor 'w'", "strings in another file", "export the model again")


def test_onnx_ir_models() -> None:
    view = ir.from_proto(net())
    weight = view.graph.initializers["w"]
    weight.const_value = ir.ExternalTensor(
        "w.bin", 0, 48, ir.DataType.FLOAT, shape=ir.Shape([4, 3]), name="w", base_dir="none"
    )
    refused(lambda: prune(view, HALF, "out.onnx"), TENSOR, "is missing")

    def fail() -> ir.TensorProtocol:
        raise RuntimeError("no such luck")

    weight.const_value = ir.LazyTensor(fail, ir.DataType.FLOAT, ir.Shape([4, 3]), name="w")
    refused(lambda: prune(view, HALF, "out.onnx"), "no such luck")
