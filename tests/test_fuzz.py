"""A slice of tests/fuzz.py without atheris, and what it has found, as literally as can be."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import fuzz
import numpy as np
import onnx
import pytest
from bad_input import attempt
from nets import parse, pi
from onnx import TensorProto, helper

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.graph.model import load
from onnxprune.structure import explain

SLICE = {"model": 300, "shrink": 120, "config": 500, "masks": 300, "data": 400}
"""Target -> how many mutated inputs. The first ones, which are the seeds themselves, are left out."""


@pytest.mark.parametrize("target", SLICE)
def test_slice(target: str, tmp_path: Path) -> None:
    fuzzer = fuzz.Fuzzer(target, tmp_path)
    fuzz.plain(fuzzer, range(1000, 1000 + SLICE[target]))
    assert fuzzer.runs == SLICE[target]
    assert fuzzer.passed
    assert {key: (tmp_path / f"{target}-{key}.txt").read_text() for key in fuzzer.found} == {}


def test_a_bug_is_a_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is neither success nor a PruneError is kept, with where it comes from."""
    from onnxprune.graph import schemas

    fuzzer = fuzz.Fuzzer("shrink", tmp_path)
    fuzzer(scans(9).SerializeToString())
    assert (fuzzer.runs, fuzzer.passed, fuzzer.found) == (1, 0, {})
    monkeypatch.setattr(schemas, "check_nodes", lambda proto, what: None)
    fuzzer(scans(9).SerializeToString())
    assert (fuzzer.runs, fuzzer.passed, len(fuzzer.found)) == (2, 0, 1)
    (key,) = fuzzer.found
    assert onnx.load_model_from_string((tmp_path / f"shrink-{key}").read_bytes()) == scans(9)
    assert "Traceback" in (tmp_path / f"shrink-{key}.txt").read_text()


# ------------------------------------------------------------------ finds: models


def product(**changes: object) -> onnx.ModelProto:
    """One product, with an attribute or operand changed by what the find is about."""
    return parse("(float[2,4] x) => (float[2,3] y) { y = MatMul(x, w) }", w=pi(4, 3))


def node(model: onnx.ModelProto, op_type: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == op_type)


def attribute(model: onnx.ModelProto, op_type: str, name: str) -> onnx.AttributeProto:
    return next(a for a in node(model, op_type).attribute if a.name == name)


def empty_constant() -> onnx.ModelProto:
    model = parse("(float[2,4] x) => (float[2,3] y) { w = Constant<value = float[1] {1}>() y = MatMul(x, w) }")
    attribute(model, "Constant", "value").ClearField("t")
    return model


LOOP = """(float[2,4] x) => (float[2,4] y) {
    n = Constant<value = int64 {2}>() c = Constant<value = bool {1}>()
    y = Loop(n, c, x) <body = b (int64 i, bool go, float[2,4] s) => (bool go2, float[2,4] t) {
        go2 = Identity(go) t = MatMul(s, w) }> }"""

SCAN = """(float[2,5,4] x, float[2,4] s) => (float[2,4] e, float[2,5,3] y) {
    e, y = Scan<num_scan_inputs = 1, scan_input_axes = [1], scan_output_axes = [1], body =
        b (float[2,4] a, float[2,4] v) => (float[2,4] a2, float[2,3] u) { a2 = Add(a, v) u = MatMul(v, w) }>(s, x) }"""


def other_type(text: str, op_type: str, name: str, **arrays: np.ndarray) -> onnx.ModelProto:
    model = parse(text, **arrays)
    found = attribute(model, op_type, name)
    found.CopyFrom(helper.make_attribute(name, [1.0, 2.0]))
    return model


def no_body() -> onnx.ModelProto:
    model = parse(LOOP, w=pi(4, 4))
    del node(model, "Loop").attribute[:]
    return model


def scans(count: int) -> onnx.ModelProto:
    model = parse(SCAN, w=pi(4, 3))
    attribute(model, "Scan", "num_scan_inputs").i = count
    return model


def short_body() -> onnx.ModelProto:
    model = parse(LOOP, w=pi(4, 4))
    del attribute(model, "Loop", "body").g.output[1]
    return model


def short_branch() -> onnx.ModelProto:
    model = parse(
        """(float[2,4] x, bool c) => (float[2,3] y) { y = If(c) <
            then_branch = t () => (float[2,3] a) { a = MatMul(x, w) },
            else_branch = e () => (float[2,3] b) { b = MatMul(x, w) }> }""",
        w=pi(4, 3),
    )
    del attribute(model, "If", "else_branch").g.output[:]
    return model


def two_fields() -> onnx.ModelProto:
    model = product()
    model.graph.initializer[0].int64_data.append(1)
    return model


def segment() -> onnx.ModelProto:
    model = product()
    model.graph.initializer[0].segment.begin = 0
    return model


def no_operand() -> onnx.ModelProto:
    model = parse("(float[2,4] x) => (float[2,3] y) { v = Transpose<perm = [1, 0]>(w) y = MatMul(x, v) }", w=pi(3, 4))
    del node(model, "Transpose").input[:]
    return model


def no_version() -> onnx.ModelProto:
    model = product()
    model.opset_import[0].domain = "elsewhere"
    return model


def version_zero() -> onnx.ModelProto:
    model = no_body()
    model.opset_import.add(domain="ai.onnx", version=0)
    return model


def called(inputs: int, outputs: int) -> onnx.ModelProto:
    """A function of one input and one output, called with others."""
    model = parse("(float[2,4] x) => (float[2,4] y) { y = own.dense(x) }")
    call = model.graph.node[0]
    call.input.extend(["x"] * (inputs - 1))
    call.output.extend(f"more{i}" for i in range(outputs - 1))
    model.opset_import.add(domain="own", version=1)
    model.functions.append(
        helper.make_function(
            "own", "dense", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 21)]
        )
    )
    return model


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto], str]] = {
    "an attribute without its tensor": (empty_constant, "attribute 'value' of a Constant node is empty"),
    "a group of several numbers": (
        lambda: other_type(
            "(float[1,2,5] x) => (float[1,3,3] y) { y = Conv<group=1>(x, w) }", "Conv", "group", w=pi(3, 2, 3)
        ),
        "a Conv node has an attribute 'group' of another type than INT",
    ),
    "a body that is no graph": (
        lambda: other_type(LOOP, "Loop", "body", w=pi(4, 4)),
        "'body' of another type than GRAPH",
    ),
    "no body": (no_body, "a Loop node lacks its attribute 'body'"),
    "a body with fewer results": (short_body, "has 3 operands and 1 results, and its body 3 and 1"),
    "a branch with fewer results": (short_branch, "has 1 results, and its else_branch 0"),
    "no operand to run along": (lambda: scans(0), "runs along 0 of 2 operands"),
    "more operands to run along than there are": (lambda: scans(9), "runs along 9 of 2 operands"),
    "values in two fields": (two_fields, "tensor 'w' has values in several places (raw_data, int64_data)"),
    "a part of a tensor": (segment, "tensor 'w' has values in several places (raw_data, segment)"),
    "a node without operands": (no_operand, "a Transpose node has 0 operands, and takes 1"),
    "version 0 of ai.onnx, after another": (version_zero, "is of version 0 of ai.onnx, which there is not"),
    "more results than a function gives": (lambda: called(1, 2), "a dense node has 2 results, and gives 1"),
    "more operands than a function takes": (lambda: called(2, 1), "a dense node has 2 operands, and takes 1"),
    "no version of ai.onnx": (no_version, "is of ai.onnx, but the model imports no version of it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_refused(name: str) -> None:
    make, text = REFUSED[name]
    for call in (
        lambda: onnxprune.prune(make(), [{"sparsity": 0.5}]),
        lambda: onnxprune.prune(make(), [{"sparsity": 0.5, "pattern": "channel"}]),
        lambda: onnxprune.inspect(make()),
        lambda: explain(make()),
    ):
        assert text in attempt(call)[0]


LSTM = (
    "(float[2,1,3] x) => (float[2,1,1,2] y) "
    "{ y = com.microsoft.DynamicQuantizeLSTM<hidden_size=2>(x, W, R, , , , , , s, wz, s, wz) }"
)

SKIPPED: dict[str, tuple[Callable[[], onnx.ModelProto], str, str]] = {
    "a scale that is an integer": (
        lambda: parse(
            LSTM.replace("s, wz, s, wz", "wz, wz, s, wz"),
            W=pi(1, 3, 8, dtype=np.int8),
            R=pi(1, 2, 8, dtype=np.int8),
            s=np.float32([0.5]),
            wz=np.int8([0]),
        ),
        "W",
        "its scale is of the type int8, which is no real number",
    ),
    "a zero point of another length": (
        lambda: parse(
            "(float[2,8] x) => (float[2,5] y) { v = DequantizeLinear<axis=0>(w, s, z) y = MatMul(x, v) }",
            w=pi(8, 5, dtype=np.int8),
            s=np.ones(8, np.float32),
            z=np.zeros(3, np.int8),
        ),
        "w",
        "its scale or zero point of shape [3, 1] does not fit [8, 5]",
    ),
    "an axis that is not there": (
        lambda: parse(
            "(float[2,8] x) => (float[2,5] y) { v = Concat<axis=1048576>(w, w) y = MatMul(x, v) }", w=pi(4, 5)
        ),
        "w",
        "its layout cannot be computed as the graph describes it",
    ),
    "a vector for a convolution's weight": (
        lambda: parse("(float[1,2,5] x) => (float[1,3,3] y) { y = Conv(x, w) }", w=np.ones(8, np.float32)),
        "w",
        "a kernel has at least 3 axes, and it has 1",
    ),
    "a number for a convolution's weight": (
        lambda: parse("(float[1,2,5] x) => (float[1,3,3] y) { y = Conv(x, w) }", w=np.float32(1).reshape(())),
        "w",
        "a kernel has at least 3 axes, and it has 0",
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_weights_skipped(name: str) -> None:
    make, weight, text = SKIPPED[name]
    reasons = {skipped.name: skipped.reason for skipped in onnxprune.inspect(make()).skipped}
    assert text in reasons[weight]


def test_operand_left_out() -> None:
    """Of a node of another domain, whose operands nobody counts."""
    model = parse(
        "(float[2,8] x) => (float[2,5] y) { v = com.microsoft.DequantizeLinear(w, s, z) y = MatMul(x, v) }",
        w=pi(8, 5, dtype=np.int8),
        s=np.float32(1).reshape(()),
        z=np.int8(0).reshape(()),
    )
    node(model, "DequantizeLinear").input[0] = ""
    told, _ = attempt(lambda: onnxprune.prune(model, [{"sparsity": 0.5}]))
    assert "matches no weight" in told


def test_input_without_a_type() -> None:
    model = product()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UNDEFINED
    assert [weight.name for weight in onnxprune.inspect(model).weights] == ["w"]


def test_sizes_beyond_memory() -> None:
    """What no memory holds is refused where channels are looked for, by name; single entries need no positions."""
    model = parse(
        f"(float[2,4] x) => (float[N] z, float[2,3] y) {{ n = Constant<value = int64[1] {{{2**40}}}>() "
        "h = MatMul(x, v) r = Relu(h) y = MatMul(r, w) z = ConstantOfShape(n) }",
        v=pi(4, 6),
        w=pi(6, 3),
    )
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [2**33]))
    with pytest.raises(
        PruneError, match=r"'more' has the shape \[8589934592\]: positions are followed along axes of up"
    ):
        explain(model)
    assert onnxprune.prune(model, [{"sparsity": 0.5}]).report.sparsity == 0.5


def test_bodies_of_nodes_without_a_rule() -> None:
    """A weight in the body of an operator that is not known stays whole, and so does what the body reads."""
    model = parse(
        """(float[2,4] x, bool c) => (float[2,3] y) { h = MatMul(x, v) k = MatMul(x, u) r = Relu(k)
        q = other.If(c) <then_branch = t () => (float[2,3] a) { a = MatMul(h, w) }>
        s = MatMul(r, w2) y = Add(s, q) }""",
        v=pi(4, 6), w=pi(6, 3), u=pi(4, 6), w2=pi(6, 3),
    )  # fmt: skip
    model.opset_import.add(domain="other", version=1)
    branch = node(model, "If").attribute[0].g
    branch.initializer.append(next(t for t in model.graph.initializer if t.name == "w"))
    branch.initializer[0].name = "inner"
    branch.node[0].input[1] = "inner"
    found = explain(model)
    assert [group.name for group in found.groups] == ["u"]
    assert {pinned.name: pinned.reason for pinned in found.pinned}["v"] == "If 'q' has no rule (operator other.If)"
    small = onnxprune.prune(model, [{"sparsity": 0.5, "pattern": "channel"}], align=1, verify=False).to_proto()
    sizes = {tensor.name: list(tensor.dims) for tensor in small.graph.initializer}
    assert (sizes["v"], sizes["u"], sizes["w2"]) == ([4, 6], [4, 3], [3, 3])


@pytest.mark.parametrize("inputs", [1, 2])
def test_part_of_a_stored_tensor(inputs: int) -> None:
    """Of a weight that is one of two parts of a tensor, one output goes with each channel: there were none counted."""
    model = parse(
        f"""(float[1,{inputs},4] x) => (float[1,2,4] y) {{
            w, other = Split<axis=0, num_outputs=2>(both) h = Conv(x, w) y = Conv(h, v) }}""",
        both=pi(6, inputs, 1),
        v=pi(2, 3, 1),
    )
    result = onnxprune.prune(model, [{"sparsity": 0.5, "pattern": "channel"}], align=1)
    assert [(group.name, group.size, group.kept) for group in result.report.groups] == [
        ("both", 3, 2),
        ("both#2", 3, 2),  # which nobody reads
    ]


def test_parts_that_nobody_reads() -> None:
    """They are channels of their own, which cost no entry of a weight."""
    model = parse(
        "(float[2,3] x) => (float[2,2] y) { q, k, v = Split<axis=1, num_outputs=3>(w) y = MatMul(x, k) }", w=pi(3, 6)
    )
    result = onnxprune.prune(model, [{"sparsity": 0.5, "pattern": "channel"}], align=1)
    assert [(group.size, group.kept) for group in result.report.groups] == [(4, 2)]


# ------------------------------------------------------------------ finds: other files


def test_config_keys_of_several_types(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("{0.5: 1, op_types: 2}")
    told, _ = attempt(lambda: onnxprune.prune(product(), path))
    assert "config key '0.5', 'op_types' is not known" in told


def archive(compression: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytearray:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name.replace("_npy", ".npy"), content)
    return bytearray(out.getvalue())


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def damaged(kind: str) -> bytes:
    good = npy(np.arange(400, dtype=np.float32).reshape(100, 4))
    if kind == "no array":
        return bytes(archive(x=b"text"))
    if kind == "a cut header":
        return bytes(archive(x_npy=good.replace(b"(100, 4), }", b"(100, 4, { ")))
    data = archive(x_npy=good)
    if kind == "another compression":
        for start in (data.index(b"PK\x03\x04") + 8, data.index(b"PK\x01\x02") + 10):
            data[start] = 99
    elif kind == "encrypted":
        for start in (data.index(b"PK\x03\x04") + 6, data.index(b"PK\x01\x02") + 8):
            data[start] |= 1
    elif kind == "another version":
        data[data.index(b"PK\x01\x02") + 6] = 110
    else:
        data[60:90] = bytes(range(200, 230))
    return bytes(data)


@pytest.mark.parametrize(
    "kind", ["no array", "a cut header", "another compression", "encrypted", "another version", "damaged"]
)
def test_data_files(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.write_bytes(damaged(kind))
    told, _ = attempt(lambda: onnxprune.evaluate(load(product()).to_proto(), path))
    assert "is no readable .npz file" in told
    assert "write it with np.savez" in told
