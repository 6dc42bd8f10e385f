"""Bad models, weights, configurations, outputs and data: a PruneError that names it, and nothing written."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from bad_input import HALF, attempt, net, refused
from nets import parse
from onnx import TensorProto

from onnxprune import Masks, PruneError, inspect, prune
from onnxprune.graph.model import load


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test starts in a folder with a good model, model.onnx, and must leave it as it was before the call."""
    monkeypatch.chdir(tmp_path)
    onnx.save(net(), "model.onnx")
    return tmp_path


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
        other = node.attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH).g
        other.node.add(op_type="Identity", input=["x"], output=[f"e{level}"])
        other.output.append(onnx.helper.make_tensor_value_info(f"e{level}", onnx.TensorProto.FLOAT, [2]))
        graph = node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH).g
        graph.output.append(onnx.helper.make_tensor_value_info(f"y{level + 1}", onnx.TensorProto.FLOAT, [2]))
    graph.node.add(op_type="Identity", input=["x"], output=[f"y{levels}"])
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


@pytest.mark.parametrize("ends", [(0, 3, 1), (1, 6, 1, 2)], ids=str)
def test_parts_of_tensors_that_are_no_numbers(ends: tuple[int, ...]) -> None:
    """A part that does not lie in one piece."""
    weight = np.ones((4, 6), np.float32)
    weight[2, 1] = np.nan
    named = {name: np.array([end], np.int64) for name, end in zip("abcd", ends, strict=False)}
    text = f"(float[N, 4] x) => (float[N, 3] y) {{ v = Slice(w, {', '.join(named)}) y = MatMul(x, v) }}"
    refused(lambda: prune(parse(text, w=weight, **named), HALF, "out.onnx"), "weight 'w'", "1 entries", "exclude it")


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
