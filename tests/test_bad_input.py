"""Bad input: a PruneError that names what is wrong and what to do, and nothing written."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nets import parse
from onnx import TensorProto, numpy_helper

from onnxprune import Masks, PruneError, benchmark, evaluate, inspect, prune
from onnxprune.graph.model import load

HALF = [{"sparsity": 0.5}]


def net(**options: Any) -> onnx.ModelProto:
    weight = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    return parse("(float[N, 4] x) => (float[N, 3] y) { y = MatMul(x, w) }", **{"w": weight, **options})


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Every test starts in a folder with a good model, model.onnx, and must leave it as it was before the call."""
    monkeypatch.chdir(tmp_path)
    onnx.save(net(), "model.onnx")
    return tmp_path


def listing() -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(Path().rglob("*"))}


def attempt(call: Callable[[], Any]) -> tuple[str, Any]:
    """The text of a PruneError, or what the call returns; any other exception is let through."""
    try:
        return "", call()
    except PruneError as error:
        return str(error), None


def refused(call: Callable[[], object], *parts: str) -> str:
    """The text of the PruneError a call raises: one paragraph with all the parts, and no file changed."""
    before = listing()
    with pytest.raises(PruneError) as caught:
        call()
    text = str(caught.value)
    assert type(caught.value) is PruneError
    assert "\n" not in text
    for part in parts:
        assert part in text
    assert listing() == before
    return text


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
    refused(lambda: prune("x" * 5000, HALF, "out.onnx"), "xxx")


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


# ------------------------------------------------------------------ tensors and names


def changed(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    model = net()
    change(model)
    return model


def tensor(**fields: Any) -> Callable[[onnx.ModelProto], object]:
    return lambda model: model.graph.initializer[0].CopyFrom(TensorProto(name="w", **fields))


def again(model: onnx.ModelProto) -> object:
    return model.graph.initializer.append(model.graph.initializer[0])


def second(op_type: str, inputs: list[str], outputs: list[str]) -> Callable[[onnx.ModelProto], object]:
    return lambda model: model.graph.node.append(onnx.helper.make_node(op_type, inputs, outputs, name="late"))


INVALID: dict[str, tuple[onnx.ModelProto, tuple[str, ...]]] = {
    "too little raw data": (
        changed(tensor(data_type=1, dims=[4, 3], raw_data=bytes(44))),
        ("tensor 'w'", "48 bytes, but 44"),
    ),
    "too much raw data": (
        changed(tensor(data_type=1, dims=[4, 3], raw_data=bytes(52))),
        ("tensor 'w'", "48 bytes, but 52"),
    ),
    "too few values": (
        changed(tensor(data_type=1, dims=[4, 3], float_data=[1] * 11)),
        ("tensor 'w'", "12 values, but 11"),
    ),
    "no values": (changed(tensor(data_type=1, dims=[4, 3])), ("tensor 'w'", "12 values, but 0")),
    "values in the wrong field": (
        changed(tensor(data_type=10, dims=[4, 3], float_data=[1] * 12)),
        ("tensor 'w'", "12 values"),
    ),
    "a huge shape": (
        changed(tensor(data_type=1, dims=[2**40, 2**20], raw_data=bytes(48))),
        ("tensor 'w'", "but 48 are stored"),
    ),
    "a huge shape of nibbles": (
        changed(tensor(data_type=22, dims=[2**62], int32_data=[1])),
        ("tensor 'w'", "but 1 are stored"),
    ),
    "a negative shape": (
        changed(tensor(data_type=1, dims=[-4, -3], raw_data=bytes(48))),
        ("tensor 'w'", "negative shape [-4, -3]"),
    ),
    "no type": (changed(tensor(dims=[4, 3], raw_data=bytes(48))), ("tensor 'w'", "type 0")),
    "an unknown type": (changed(tensor(data_type=999, dims=[4, 3], raw_data=bytes(48))), ("tensor 'w'", "type 999")),
    "a name twice": (changed(again), ("two initializers named 'w'",)),
    "an output twice": (changed(second("Relu", ["x"], ["y"])), ("'y'", "node 'late' (Relu)", "given twice")),
    "an output over a weight": (changed(second("Relu", ["x"], ["w"])), ("'w'", "node 'late' (Relu)", "given twice")),
    "an output over an input": (changed(second("Relu", ["w"], ["x"])), ("'x'", "node 'late' (Relu)", "given twice")),
    "an input from nowhere": (changed(second("Relu", ["nothing"], ["z"])), ("node 'late' (Relu) reads 'nothing'",)),
    "no weight": (changed(lambda m: m.graph.ClearField("initializer")), ("a MatMul node reads 'w'",)),
    "a result from nowhere": (changed(lambda m: m.graph.ClearField("node")), ("the output 'y' of graph",)),
    "a branch that reads from nowhere": (
        parse(
            """(float[2] x, bool c) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] a) { a = Neg(x) },
            else_branch = e () => (float[2] b) { b = Neg(a) }> }"""
        ),
        ("a Neg node reads 'a'",),
    ),
    "a function that reads from nowhere": (
        parse(
            """(float[2] x) => (float[2] y) { y = own.f(x) }
            <domain: "own", opset_import: ["": 21]> f (a) => (b) { b = Neg(x) }"""
        ),
        ("a Neg node reads 'x'",),
    ),
}


@pytest.mark.parametrize("kind", INVALID)
def test_an_invalid_model(kind: str) -> None:
    model, parts = INVALID[kind]
    Path("bad.onnx").write_bytes(model.SerializeToString())
    refused(lambda: prune("bad.onnx", HALF, "out.onnx"), "'bad.onnx'", *parts, "export it again")
    refused(lambda: prune(model, HALF, "out.onnx"), "the model", *parts, "export it again")
    refused(lambda: inspect("bad.onnx"), *parts)


def test_text_that_is_no_unicode() -> None:
    content = net().SerializeToString().replace(b"MatMul", b"Mat\xff\xfel")
    Path("bad.onnx").write_bytes(content)
    refused(lambda: prune("bad.onnx", HALF, "out.onnx"))


def test_types_unknown_outside_tensors() -> None:
    model = net()
    model.graph.input[0].type.tensor_type.elem_type = 999
    refused(lambda: prune(model, HALF, "out.onnx"), "the model cannot be read as an ONNX graph", "export it again")
    cast = parse(
        "(float[N, 4] x) => (float[N, 3] y) { c = Cast<to = 999>(w) y = MatMul(x, c) }", w=np.ones((4, 3), np.float16)
    )
    with pytest.raises(PruneError):
        prune(cast, HALF, "out.onnx")


def test_a_cycle() -> None:
    model = parse("(float[2, 4] x) => (float[2, 4] y) { a = Identity(b) b = Identity(a) y = MatMul(x, a) }")
    refused(lambda: prune(model, HALF, "out.onnx"), "cycle")


def test_a_function_that_calls_itself() -> None:
    model = parse(
        """(float[2, 4] x) => (float[2, 4] y) { y = own.f(x) }
        <domain: "own", opset_import: ["": 21, "own": 1]> f (a) => (b) { b = own.f(a) }"""
    )
    refused(lambda: prune(model, HALF, "out.onnx"), "'own.f' calls itself")


@pytest.mark.parametrize("levels", [20, 40, 1000, 20_000])
def test_deep_graphs(levels: int) -> None:
    """Protobuf reads some 30 levels of sub-graphs; in memory they can be deeper."""
    model = parse("(float[2] x, bool c) => (float[2] y) { y = Identity(x) }")
    graph = model.graph
    for level in range(levels):
        node = graph.node.add(op_type="If", input=["c"], output=[f"y{level}"])
        graph = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
    graph.node.add(op_type="Identity", input=["x"], output=["end"])
    told, _ = attempt(lambda: load(model))
    assert ("more than 100 levels deep" in told) == (levels > 100)
    if levels <= 40:
        Path("deep.onnx").write_bytes(model.SerializeToString())
        refused(lambda: prune("deep.onnx", HALF), "deep.onnx" if levels == 40 else "matches no weight")


def test_nothing_is_allocated_for_a_declared_shape() -> None:
    """Each file is a few hundred bytes; loading it may not take more than some megabytes."""
    declared = [model for kind, (model, _) in INVALID.items() if "huge" in kind]
    claimed = net()
    claimed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**62
    claimed.graph.value_info.append(onnx.helper.make_tensor_value_info("v", 1, [2**40, 2**40]))
    for model in (*declared, claimed):
        tracemalloc.start()
        attempt(lambda m=model: prune(m, HALF))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**24


# ------------------------------------------------------------------ values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64], ids=lambda d: np.dtype(d).name
)
def test_weights_that_are_no_numbers(dtype: type, bad: float) -> None:
    weight = np.ones((4, 3), dtype)
    weight[1, 2] = weight[3, 0] = bad
    cast = parse("(float[N, 4] x) => (float[N, 3] y) { c = Cast<to = 1>(w) y = MatMul(x, c) }", w=weight)
    for config in (
        HALF,
        [{"sparsity": 0.0}],
        [{"sparsity": 0.5, "pattern": "2:4"}],
        [{"sparsity": 0.5, "allocation": "global"}],
    ):
        refused(lambda c=config: prune(cast, c, "out.onnx"), "weight 'w' [4, 3] (MatMul) holds 2 entries", "exclude it")
    model = parse(
        "(float[N, 4] x) => (float[N, 3] z) { c = Cast<to = 1>(w) y = MatMul(x, c) z = MatMul(y, v) }",
        w=weight,
        v=np.arange(9, dtype=np.float32).reshape(3, 3),
    )
    result = prune(model, [{"sparsity": 0.5}, {"op_names": "w", "exclude": True}], "out.onnx")
    assert list(result.masks) == ["v"]
    kept = next(t for t in onnx.load("out.onnx").graph.initializer if t.name == "w")
    assert kept.raw_data == weight.tobytes()


# ------------------------------------------------------------------ the configuration


@pytest.mark.parametrize(
    "sparsity", [-0.1, 1.1, float("nan"), float("inf"), "0.5", "half", True, None, [0.5], {}], ids=repr
)
def test_a_sparsity_that_is_none(sparsity: Any) -> None:
    for key, pruner in (("sparsity", "level"), ("final_sparsity", "agp"), ("sparsity", "sensitivity")):
        text = refused(
            lambda k=key, p=pruner: prune("model.onnx", [{k: sparsity}], "out.onnx", pruner=p), "config entry 1"
        )
        assert "sparsity" in text


UNKNOWN: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "a misspelt key": ([{"sparsty": 0.5}], {}, ("config entry 1", "'sparsty'", "did you mean 'sparsity'")),
    "a key of another pruner": ([{"sparsity": 0.5, "start_epoch": 1}], {}, ("config entry 1", "'start_epoch'")),
    "a key of the mapping": ({"config_list": HALF, "prunr": "agp"}, {}, ("'prunr'", "expected")),
    "an entry alone": ({"sparsity": 0.5}, {}, ("must stand in a list",)),
    "a pruner": (HALF, {"pruner": "magic"}, ("pruner 'magic'", "'level'")),
    "a pattern": ([{"sparsity": 0.5, "pattern": "4x"}], {}, ("config entry 1", "4x")),
    "a pattern of zero": ([{"sparsity": 0.5, "pattern": "0:0"}], {}, ("config entry 1", "0:0")),
    "a block of nothing": ([{"sparsity": 0.5, "pattern": "block:0x4"}], {}, ("config entry 1", "block:0x4")),
    "a score": ([{"sparsity": 0.5, "score": "luck"}], {}, ("config entry 1", "luck", "'magnitude'")),
    "an allocation": ([{"sparsity": 0.5, "allocation": "fair"}], {}, ("config entry 1", "fair", "'uniform'")),
    "a score for all": (HALF, {"score": "luck"}, ("luck", "'magnitude'")),
    "a name": ([{"sparsity": 0.5, "op_names": "ww"}], {}, ("config entry 1", "matches no weight", "nearest names: w")),
    "a type": (
        [{"sparsity": 0.5, "op_types": "Conv"}],
        {},
        ("config entry 1", "matches no weight", "types present: MatMul"),
    ),
    "no entry": ([], {}, ("at least one entry",)),
    "no list": (0.5, {}, ("at least one entry",)),
    "nothing": (None, {}, ("at least one entry",)),
    "a list of no entries": ([0.5], {}, ("config entry 1", "0.5")),
    "a file that is not there": ("none.yaml", {}, ("none.yaml", "No such file")),
    "a file that is no text": ("model.onnx", {}, ("model.onnx",)),
    "max_drop without data": (HALF, {"max_drop": 0.1}, ("max_drop needs data",)),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_configuration_that_is_none(kind: str) -> None:
    config, options, parts = UNKNOWN[kind]
    refused(lambda: prune("model.onnx", config, "out.onnx", **options), *parts)


# ------------------------------------------------------------------ the output


def spellings(folder: Path) -> list[str | Path]:
    os.symlink("model.onnx", "link.onnx")
    os.symlink(folder, "folder")
    os.link("model.onnx", "hard.onnx")
    os.mkdir("sub")
    return [
        "model.onnx",
        "./model.onnx",
        folder / "model.onnx",
        "sub/../model.onnx",
        "link.onnx",
        "folder/model.onnx",
        "hard.onnx",
    ]


def test_the_output_is_the_input(folder: Path) -> None:
    names = spellings(folder)
    for source in names:
        for target in names:
            refused(
                lambda s=source, t=target: prune(s, HALF, t),
                f"the output '{Path(target)}' is the input itself",
                "--force",
            )
    refused(lambda: prune("model.onnx", HALF).save("link.onnx"), "is the input itself", "force=True")


@pytest.mark.parametrize(
    ("target", "parts"),
    [
        ("none/out.onnx", ("folder", "does not exist; create it first")),
        ("model.onnx/out.onnx", ("folder", "does not exist")),
        (".", ("is a folder; give the name of a file",)),
        ("", ("is a folder; give the name of a file",)),
        ("sub", ("is a folder; give the name of a file",)),
        ("sub/", ("is a folder; give the name of a file",)),
        ("x" * 300, ("cannot write", "File name too long")),
        ("nul\0.onnx", ("cannot write",)),
    ],
)
def test_an_output_that_cannot_be(target: str, parts: tuple[str, ...]) -> None:
    os.mkdir("sub")
    result = prune("model.onnx", HALF)
    refused(lambda: prune("model.onnx", HALF, target), *parts)
    refused(lambda: result.save(target), *parts)


def test_links_that_lead_nowhere() -> None:
    os.symlink("loop.onnx", "loop.onnx")
    os.symlink("none/out.onnx", "dangling.onnx")
    refused(lambda: prune("model.onnx", HALF, "dangling.onnx"), "does not exist; create it first")
    refused(lambda: prune("loop.onnx", HALF, "out.onnx"), "loop.onnx")
    refused(lambda: inspect("loop.onnx"), "loop.onnx")


# ------------------------------------------------------------------ data

DATA: dict[str, tuple[Any, tuple[str, ...]]] = {
    "another name": ({"input": np.ones((2, 4), np.float32)}, ("'x' float32[N, 4]", "'input'")),
    "a name more": ({"x": np.ones((2, 4), np.float32), "z": np.ones(2)}, ("'x' float32[N, 4]", "'z'")),
    "nothing": ({}, ("'x' float32[N, 4]",)),
    "another shape": ({"x": np.ones((2, 5), np.float32)}, ("'x' float32[N, 4]", "[2, 5]")),
    "another rank": ({"x": np.ones(4, np.float32)}, ("'x' float32[N, 4]", "[4]")),
    "strings": ({"x": np.full((2, 4), "a")}, ("'x' float32[N, 4]", "string")),
    "too few labels": ({"x": np.ones((2, 4), np.float32), "labels": np.zeros(1, int)}, ("'x' 2", "'labels' 1")),
    "no samples": ({"x": np.ones((0, 4), np.float32)}, ("no samples",)),
    "no file": ("none.npz", ("none.npz",)),
    "no archive": ("model.onnx", ("model.onnx",)),
    "no function": ("module_that_is_not:there", ("module_that_is_not:there",)),
    "a number": (3, ("data is a int", "'x' float32[N, 4]")),
    "an array": (np.ones((2, 4), np.float32), ("data is a ndarray", "'x' float32[N, 4]")),
    "an exhausted generator": (iter(()), ("no feeds",)),
    "a feed that does not fit": ([{"x": np.ones((2, 5), np.float32)}], ("feed 0", "[2, 5]")),
}


@pytest.mark.parametrize("kind", DATA)
def test_data_that_do_not_fit(kind: str) -> None:
    data, parts = DATA[kind]
    refused(lambda: prune("model.onnx", HALF, "out.onnx", data=data), *parts)


def test_an_archive_with_a_pickle_is_not_opened() -> None:
    np.savez("data.npz", x=np.array([object()], object))
    refused(lambda: prune("model.onnx", HALF, "out.onnx", data="data.npz"), "data.npz")
    refused(lambda: Masks.load("data.npz"), "data.npz")


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
