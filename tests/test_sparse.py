"""Sparse storage: smaller files that onnxruntime runs to the same bits, and sparse files read back."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from nets import feeds, parse
from onnx import TensorProto, numpy_helper

from onnxprune import PruneError, inspect, prune
from onnxprune.graph import saving, sparse
from onnxprune.graph.model import load

LEVEL = [{"sparsity": 0.9}]


def dense(*shape: int, dtype: object = np.float32, seed: int = 0) -> np.ndarray:
    """No zero in it."""
    values = np.random.default_rng(seed).integers(1, 100, shape) * np.where(
        np.arange(np.prod(shape)) % 2, 1, -1
    ).reshape(shape)
    return values.astype(dtype) if np.dtype(dtype).kind == "i" else (values / 100).astype(dtype)


def quantised(*shape: int, dtype: object, zero: int) -> np.ndarray:
    return (dense(*shape) * 100 + zero).clip(np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def run(path: str | os.PathLike[str], model: onnx.ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"]).run(
        None, feeds(model)
    )


MATMUL = "(float[2, 40] x) => (float[2, 30] y) { y = MatMul(x, w) }"
RECURRENT = "(float[5, 2, 20] x) => (float[5, 1, 2, 10] y) {{ y = {}<hidden_size = 10>(x, w, r) }}"
FUNCTION = """(float[2, 40] x) => (float[2, 30] y) { y = own.f(x, w) }
<domain: "own", opset_import: ["": 21]> f (a, b) => (c) { c = MatMul(a, b) }"""
CAPTURED = """(float[2, 40] x, bool c) => (float[2, 30] y) { y = If(c)
<then_branch = t () => (float[2, 30] a) { a = MatMul(x, w) },
 else_branch = e () => (float[2, 30] b) { b = MatMul(x, v) }> }"""
LOOPED = """(float[2, 40] x) => (float[2, 40] y) <int64 n = {3}, bool go = {1}> { y = Loop(n, go, x)
<body = b (int64 i, bool c, float[2, 40] s) => (bool d, float[2, 40] t) { d = Identity(c) t = MatMul(s, w) }> }"""
DEQUANTISED = """(float[2, 40] x) => (float[2, 30] y) <float s = {{0.1}}, {0} z = {{{1}}}>
{{ c = DequantizeLinear(w, s, z) y = MatMul(x, c) }}"""

CASES = {
    "MatMul": parse(MATMUL, w=dense(40, 30)),
    "MatMul of three axes": parse("(float[2, 8] x) => (float[3, 2, 30] y) { y = MatMul(x, w) }", w=dense(3, 8, 30)),
    "Gemm": parse(
        "(float[2, 40] x) => (float[2, 30] y) { y = Gemm<transB = 1>(x, w, b) }", w=dense(30, 40), b=dense(30)
    ),
    "Conv": parse(
        "(float[1, 4, 9, 9] x) => (float[1, 8, 7, 7] y) { y = Conv(x, w, b) }", w=dense(8, 4, 3, 3), b=dense(8)
    ),
    "ConvTranspose": parse(
        "(float[1, 4, 9, 9] x) => (float[1, 8, 11, 11] y) { y = ConvTranspose(x, w) }", w=dense(4, 8, 3, 3)
    ),
    "LSTM": parse(RECURRENT.format("LSTM"), w=dense(1, 40, 20), r=dense(1, 40, 10)),
    "GRU": parse(RECURRENT.format("GRU"), w=dense(1, 30, 20), r=dense(1, 30, 10)),
    "RNN": parse(RECURRENT.format("RNN"), w=dense(1, 10, 20), r=dense(1, 10, 10)),
    "Transpose": parse("(float[2, 40] x) => (float[2, 30] y) { c = Transpose(w) y = MatMul(x, c) }", w=dense(30, 40)),
    "Concat": parse(
        "(float[2, 40] x) => (float[2, 60] y) { c = Concat<axis = 1>(w, v) y = MatMul(x, c) }",
        w=dense(40, 30),
        v=dense(40, 30, seed=1),
    ),
    "Attention": parse(
        "(float[1, 3, 8] x) => (float[1, 3, 8] y) { y = com.microsoft.Attention<num_heads = 2>(x, w, b) }",
        w=dense(8, 24),
        b=dense(24),
    ),
    "FusedMatMul": parse(
        "(float[2, 40] x) => (float[2, 30] y) { y = com.microsoft.FusedMatMul<transB = 1>(x, w) }", w=dense(30, 40)
    ),
    "float16": parse(
        "(float16[2, 40] x) => (float16[2, 30] y) { y = MatMul(x, w) }", w=dense(40, 30, dtype=np.float16)
    ),
    "float64": parse("(double[2, 40] x) => (double[2, 30] y) { y = MatMul(x, w) }", w=dense(40, 30, dtype=np.float64)),
    "bfloat16": parse(
        "(float[2, 40] x) => (float[2, 30] y) { c = Cast<to = 1>(w) y = MatMul(x, c) }",
        w=dense(40, 30, dtype=ml_dtypes.bfloat16),
    ),
    "int8": parse(DEQUANTISED.format("int8", 0), w=quantised(40, 30, dtype=np.int8, zero=0)),
    "uint8": parse(
        "(float[2, 40] x) => (float[2, 30] y) <float s = {0.1}> { c = DequantizeLinear(w, s) y = MatMul(x, c) }",
        w=np.abs(quantised(40, 30, dtype=np.int16, zero=0)).astype(np.uint8),
    ),
    "captured by an If": parse(CAPTURED, w=dense(40, 30), v=dense(40, 30, seed=1)),
    "captured by a Loop": parse(LOOPED, w=dense(40, 40)),
    "given to a function": parse(FUNCTION, w=dense(40, 30)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_sparse_file_is_smaller_and_computes_the_same(case: str, tmp_path: Path) -> None:
    model = CASES[case]
    sparsity = [{"sparsity": 0.95}]
    plain = prune(model, sparsity, tmp_path / "plain.onnx")
    packed = prune(model, sparsity, tmp_path / "packed.onnx", sparse=True)
    assert packed.masks == plain.masks
    stored = onnx.load(tmp_path / "packed.onnx")
    onnx.checker.check_model(stored)
    assert {s.values.name for s in stored.graph.sparse_initializer} == set(plain.masks)
    assert os.path.getsize(tmp_path / "packed.onnx") < os.path.getsize(tmp_path / "plain.onnx")
    for ours, theirs in zip(run(tmp_path / "packed.onnx", model), run(tmp_path / "plain.onnx", model), strict=True):
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("case", CASES)
def test_a_sparse_file_is_read_and_stays_sparse(case: str, tmp_path: Path) -> None:
    model = CASES[case]
    first = prune(model, [{"sparsity": 0.95}], tmp_path / "first.onnx", sparse=True)
    whole = prune(model, [{"sparsity": 0.95}]).to_proto()
    names = {s.values.name for s in onnx.load(tmp_path / "first.onnx").graph.sparse_initializer}
    looked = {w.name: w for w in inspect(tmp_path / "first.onnx").weights}
    assert {name: looked[name].zeros for name in looked} == {row.name: row.zeros for row in first.report.rows}
    again = prune(tmp_path / "first.onnx", [{"sparsity": 0.97}], tmp_path / "again.onnx")
    assert {s.values.name for s in onnx.load(tmp_path / "again.onnx").graph.sparse_initializer} == names
    assert again.masks == prune(whole, [{"sparsity": 0.97}], tmp_path / "whole.onnx").masks
    for ours, theirs in zip(run(tmp_path / "again.onnx", model), run(tmp_path / "whole.onnx", model), strict=True):
        assert ours.tobytes() == theirs.tobytes()


DENSE = {
    "a nonzero zero point": parse(DEQUANTISED.format("uint8", 128), w=quantised(40, 30, dtype=np.uint8, zero=128)),
    "an output of the graph": parse(
        "(float[2, 40] x) => (float[2, 30] y, float[40, 30] w) { y = MatMul(x, w) }", w=dense(40, 30)
    ),
    "an input of the graph": parse(
        "(float[2, 40] x, float[40, 30] w) => (float[2, 30] y) { y = MatMul(x, w) }", w=dense(40, 30)
    ),
    "int4": parse(
        "(float[2, 40] x) => (float[2, 30] y) <float s = {0.1}> { c = DequantizeLinear(w, s) y = MatMul(x, c) }",
        w=np.where(dense(40, 30) > 0, 3, -3).astype(ml_dtypes.int4),
    ),
}


@pytest.mark.parametrize("case", DENSE)
def test_what_onnxruntime_would_not_run_sparse_stays_dense(case: str, tmp_path: Path) -> None:
    model = DENSE[case]
    result = prune(model, [{"sparsity": 0.95}], tmp_path / "out.onnx", sparse=True)
    assert result.masks["w"].mean() == pytest.approx(0.05, abs=0.001)
    assert not onnx.load(tmp_path / "out.onnx").graph.sparse_initializer
    prune(model, [{"sparsity": 0.95}], tmp_path / "plain.onnx")
    for ours, theirs in zip(run(tmp_path / "out.onnx", model), run(tmp_path / "plain.onnx", model), strict=True):
        assert isinstance(ours, np.ndarray)
        assert ours.tobytes() == theirs.tobytes()


def branches() -> onnx.ModelProto:
    """A weight stored in each branch of an If; that of the second one is also its result."""
    text = """(float[40, 40] x, bool c) => (float[40, 40] y) { y = If(c)
    <then_branch = t () => (float[40, 40] a) { a = MatMul(x, w) },
     else_branch = e () => (float[40, 40] v) { b = MatMul(x, v) }> }"""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]> g {text}')
    for branch, name in zip(model.graph.node[0].attribute, "wv", strict=True):
        branch.g.initializer.append(numpy_helper.from_array(dense(40, 40), name))
    return model


def test_weights_stored_in_branches(tmp_path: Path) -> None:
    model = branches()
    prune(model, LEVEL, tmp_path / "plain.onnx")
    prune(model, LEVEL, tmp_path / "packed.onnx", sparse=True)
    stored = [a.g for a in onnx.load(tmp_path / "packed.onnx").graph.node[0].attribute]
    assert [[s.values.name for s in g.sparse_initializer] for g in stored] == [["w"], []]
    prune(tmp_path / "packed.onnx", LEVEL, tmp_path / "again.onnx")
    for taken in (True, False):
        given = {"x": dense(40, 40), "c": np.array(taken)}
        outputs = [
            onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(None, given)[0]
            for name in ("plain.onnx", "packed.onnx", "again.onnx")
        ]
        assert outputs[0].tobytes() == outputs[1].tobytes() == outputs[2].tobytes()


@pytest.mark.parametrize(
    ("dtype", "zeros"),
    [(np.float32, 2 / 3), (np.float64, 1 / 2), (np.float16, 4 / 5), (np.int8, 8 / 9)],
    ids=["float32", "float64", "float16", "int8"],
)
def test_the_break_even(dtype: type, zeros: float) -> None:
    for share, expected in ((zeros - 0.02, 0), (zeros + 0.02, 1)):
        array = np.zeros(10_000, dtype)
        array[: round((1 - share) * array.size)] = 1
        graph = onnx.GraphProto(initializer=[numpy_helper.from_array(array, "w")])
        size = graph.ByteSize()
        sparse.compress([graph], None)
        assert len(graph.sparse_initializer) == expected
        assert graph.ByteSize() <= size


def test_what_a_graph_gives_out_stays_dense_beside_others() -> None:
    zeros = np.zeros(100, np.float32)
    graph = onnx.GraphProto(initializer=[numpy_helper.from_array(zeros, name) for name in "abc"])
    graph.output.add(name="b")
    sparse.compress([graph], None)
    assert [item.values.name for item in graph.sparse_initializer] == ["a", "c"]
    assert [tensor.name for tensor in graph.initializer] == ["b"]
    sparse.densify([graph])
    sparse.compress([graph], {"a"})
    assert [item.values.name for item in graph.sparse_initializer] == ["a"]


def test_more_than_one_file_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sparse goes to another file as well; onnxruntime finds it there, and here it is refused."""
    model = parse(
        "(float[2, 128] x) => (float[2, 128] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        w=dense(128, 128),
        v=dense(128, 128),
    )
    config = [{"sparsity": 0.9}]
    monkeypatch.setattr(saving, "PROTOBUF_LIMIT", 30_000)
    prune(model, config, tmp_path / "out.onnx", sparse=True)
    found = onnx.load(tmp_path / "out.onnx", load_external_data=False).graph
    assert [len(found.initializer), len(found.sparse_initializer)] == [0, 2]
    assert os.path.getsize(tmp_path / "out.onnx") < 2000
    with pytest.raises(
        PruneError, match=r"sparse initializer '[vw]' .* keeps its data in another file \('out.onnx.data'\)"
    ):
        inspect(tmp_path / "out.onnx")
    given = {"x": dense(2, 128)}
    outputs = [
        onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, given)[0]
        for file in (tmp_path / "out.onnx", prune(model, config).to_proto().SerializeToString())
    ]
    assert outputs[0].tobytes() == outputs[1].tobytes()


def test_a_tensor_of_zeros_only(tmp_path: Path) -> None:
    model = CASES["MatMul"]
    prune(model, [{"sparsity": 1.0}], tmp_path / "out.onnx", sparse=True)
    assert os.path.getsize(tmp_path / "out.onnx") < 1000
    assert not run(tmp_path / "out.onnx", model)[0].any()
    assert inspect(tmp_path / "out.onnx").sparsity == 1.0


def test_small_tensors_stay_as_they_are(tmp_path: Path) -> None:
    tiny = np.array([[0, 0, 0, 0, 0, 1]], np.float32)
    model = parse("(float[2, 1] x) => (float[2, 6] y) { y = MatMul(x, w) }", w=tiny)
    prune(model, [{"sparsity": 0.5}], tmp_path / "out.onnx", sparse=True)
    assert not onnx.load(tmp_path / "out.onnx").graph.sparse_initializer


def test_bits_of_other_tensors_survive(tmp_path: Path) -> None:
    """-0.0, NaN with a payload, infinities and subnormals come back as they were, and are no zeros."""
    odd = np.zeros(2000, np.float32)
    odd.view(np.uint32)[[3, 500, 900, 1500, 1999]] = [0x80000000, 0x7FC12345, 0xFFC00001, 0x7F800000, 1]
    model = parse(
        "(float[2, 40] x) => (float[2, 30] y, float[2000] z) { y = MatMul(x, w) z = Identity(odd) }",
        w=dense(40, 30),
        odd=odd,
    )
    prune(model, LEVEL, tmp_path / "out.onnx", sparse=True)
    assert {s.values.name for s in onnx.load(tmp_path / "out.onnx").graph.sparse_initializer} == {"w", "odd"}
    assert run(tmp_path / "out.onnx", model)[1].tobytes() == odd.tobytes()
    prune(tmp_path / "out.onnx", LEVEL, tmp_path / "again.onnx")
    assert run(tmp_path / "again.onnx", model)[1].tobytes() == odd.tobytes()
    assert (
        numpy_helper.to_array(
            next(t for t in load(tmp_path / "out.onnx").proto.graph.initializer if t.name == "odd")
        ).tobytes()
        == odd.tobytes()
    )


def test_a_sparse_constant_is_refused() -> None:
    model = parse("(float[2, 3] x) => (float[2, 4] y) { w = Constant<value_float = 1.0>() y = MatMul(x, w) }")
    attribute = model.graph.node[0].attribute[0]
    attribute.Clear()
    attribute.name, attribute.type = "sparse_value", onnx.AttributeProto.SPARSE_TENSOR
    attribute.sparse_tensor.CopyFrom(item([1.0, 2.0], [1, 6], [3, 4]))
    with pytest.raises(PruneError, match="Sparse tensors are not supported"):
        load(model)


# ------------------------------------------------------------------ sparse tensors from elsewhere


def item(values: object, indices: object, dims: list[int], dtype: object = np.float32) -> onnx.SparseTensorProto:
    out = onnx.SparseTensorProto(dims=dims)
    out.values.CopyFrom(numpy_helper.from_array(np.array(values, dtype), "w"))
    out.indices.CopyFrom(numpy_helper.from_array(np.array(indices, np.int64), "i"))
    return out


def holding(packed: onnx.SparseTensorProto) -> onnx.ModelProto:
    model = parse("(float[2, 3] x) => (float[2, N] y) { y = MatMul(x, w) }")
    model.graph.sparse_initializer.append(packed)
    return model


def test_indices_of_both_forms() -> None:
    expected = np.zeros((3, 4), np.float32)
    expected[0, 1], expected[2, 3] = 5, 6
    for indices in ([1, 11], [[0, 1], [2, 3]]):
        model = load(holding(item([5, 6], indices, [3, 4])))
        assert np.array_equal(numpy_helper.to_array(model.proto.graph.initializer[0]), expected)


HOSTILE = {
    "an index beyond": item([1], [12], [3, 4]),
    "a negative index": item([1], [-1], [3, 4]),
    "a pair beyond": item([1], [[0, 4]], [3, 4]),
    "a negative pair": item([1], [[1, -1]], [3, 4]),
    "triples for two axes": item([1], [[0, 0, 0]], [3, 4]),
    "more indices than values": item([1], [1, 2], [3, 4]),
    "more values than indices": item([1, 2], [1], [3, 4]),
    "values of two axes": item([[1, 2]], [1, 2], [3, 4]),
    "negative dims": item([1], [1], [-3, -4]),
    "a terabyte": item([1], [1], [2**20, 2**18]),
    "an exabyte": item([1], [1], [2**40, 2**40]),
    "strings": item([b"a"], [1], [3, 4], dtype=object),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_sparse_tensor_is_refused(kind: str) -> None:
    with pytest.raises(PruneError, match=r"sparse initializer 'w'.*(export it again|store it dense first)"):
        load(holding(HOSTILE[kind]))


def test_many_bombs_have_one_budget() -> None:
    model = holding(item([1], [1], [3, 4]))
    for index in range(3):
        packed = item([1], [1], [2**12, 2**13])  # 128 MB each
        packed.values.name = f"w{index}"
        model.graph.sparse_initializer.append(packed)
    with pytest.raises(PruneError, match=r"sparse initializer 'w\d' of shape \[4096, 8192\] takes more memory"):
        load(model)


def test_fractional_indices_and_external_ones_are_refused() -> None:
    packed = item([1], [1], [3, 4])
    packed.indices.CopyFrom(numpy_helper.from_array(np.array([1.0], np.float32), "i"))
    with pytest.raises(PruneError, match="integers as indices"):
        load(holding(packed))
    packed = item([1], [1], [3, 4])
    packed.values.data_location = TensorProto.EXTERNAL
    packed.values.external_data.add(key="location", value="w.data")
    with pytest.raises(PruneError, match=r"w\.data"):
        load(holding(packed))
