"""Lowered equals masked under onnxruntime, in every form, for every operator; and what is refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from nets import parse

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.graph.model import load
from onnxprune.lowering import forms, order
from onnxprune.lowering.latency import DENSE, Latencies, alone, dense
from onnxprune.lowering.layers import layers
from onnxprune.lowering.lower import _facts, lowered
from onnxprune.runtime.session import open_session
from onnxprune.structure import verify
from onnxprune.structure.prepare import prepare
from onnxprune.structure.sizes import choose

F32 = np.float32


class Always:
    """Times that make one form, or the first that a layer has, the fastest."""

    def __init__(self, form: str = "") -> None:
        self.form = form
        self.timing = False

    def of(self, layer):
        names = list(forms.candidates(layer))
        chosen = self.form if self.form in names else names[0]
        return {DENSE: 1.0, chosen: 0.5}, "measured"

    def save(self):
        pass


def conv(attributes: str, kernel: tuple[int, ...], size: str, group: int = 1, bias: bool = True, batch: str = "2"):
    """A convolution of 32 channels to 48, by its attributes."""
    rng = np.random.default_rng(1)
    arrays = {"w": rng.normal(size=(48, 32 // group, *kernel)).astype(F32)}
    if bias:
        arrays["b"] = rng.normal(size=48).astype(F32)
    given = "x, w, b" if bias else "x, w"
    return parse(
        f"(float[{batch}, 32, {size}] x) => (float[] y) {{ y = Conv <{attributes}, group = {group}> ({given}) }}",
        **arrays,
    )


def transposed(attributes: str, kernel: tuple[int, ...], size: str, group: int = 1):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(32, 48 // group, *kernel)).astype(F32)
    text = f"(float[2, 32, {size}] x) => (float[] y) {{ y = ConvTranspose <{attributes}, group = {group}> (x, w, b) }}"
    return parse(text, w=w, b=rng.normal(size=48).astype(F32))


def gemm(transposed_: int, bias: bool = True):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(48, 32) if transposed_ else (32, 48)).astype(F32)
    arrays = {"w": w, "b": rng.normal(size=48).astype(F32)} if bias else {"w": w}
    given = "x, w, b" if bias else "x, w"
    return parse(f"(float[N, 32] x) => (float[] y) {{ y = Gemm <transB = {transposed_}> ({given}) }}", **arrays)


def matmul(shape: str):
    w = np.random.default_rng(1).normal(size=(32, 48)).astype(F32)
    return parse(f"(float[{shape + ', ' if shape else ''}32] x) => (float[] y) {{ y = MatMul (x, w) }}", w=w)


def batch(data: str, weight: tuple[int, ...]):
    """A batch of matrices, 32 inputs and 48 outputs each."""
    w = np.random.default_rng(1).normal(size=(*weight, 32, 48)).astype(F32)
    return parse(f"(float[{data}, 32] x) => (float[] y) {{ y = MatMul (x, w) }}", w=w)


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def recurrent(op: str, directions: int = 1, outputs: str = "y", states: bool = False):
    """A recurrent operator on 32 inputs, of 5 steps and an open batch."""
    rng = np.random.default_rng(1)
    size, rows = 12, GATES[op] * 12
    arrays = {"w": (directions, rows, 32), "r": (directions, rows, size), "b": (directions, 2 * rows)}
    way = "bidirectional" if directions == 2 else "forward"
    given = ", , h" if states else ""
    extra = f", float[{directions}, N, {size}] h" if states else ""
    found = ", ".join(f"float[] {name}" for name in outputs.split(", ") if name)
    text = (
        f"(float[5, N, 32] x{extra}) => ({found}) "
        f'{{ {outputs} = {op} <hidden_size = {size}, direction = "{way}"> (x, w, r, b{given}) }}'
    )
    return parse(text, **{name: rng.normal(size=shape).astype(F32) / 4 for name, shape in arrays.items()})


NETS = {
    "conv": conv("pads = [1, 1, 1, 1]", (3, 3), "7, 9"),
    "conv without bias": conv("pads = [1, 1, 1, 1]", (3, 3), "7, 9", bias=False),
    "conv 1x1": conv("strides = [2, 2]", (1, 1), "7, 9"),
    "conv stride dilation": conv("strides = [2, 1], dilations = [1, 2]", (3, 3), "9, 11"),
    "conv auto_pad": conv('auto_pad = "SAME_UPPER", strides = [2, 2]', (3, 3), "9, 11"),
    "conv of 2 groups": conv("pads = [1, 1, 1, 1]", (3, 3), "7, 9", group=2),
    "conv 1-d": conv("pads = [1, 1]", (3,), "11"),
    "conv 3-d": conv("pads = [1, 1, 1, 1, 1, 1]", (3, 3, 3), "4, 5, 6"),
    "conv of an open batch": conv("pads = [1, 1, 1, 1]", (3, 3), "H, W", batch="N"),
    "transposed": transposed("strides = [2, 2], output_padding = [1, 0]", (3, 3), "5, 6"),
    "transposed of 2 groups": transposed("pads = [1, 1, 0, 0]", (2, 2), "5, 6", group=2),
    "transposed 1-d": transposed("strides = [2]", (4,), "9"),
    "gemm": gemm(0),
    "gemm transB": gemm(1),
    "gemm without bias": gemm(1, bias=False),
    "matmul of a vector": matmul(""),
    "matmul of rank 2": matmul("5"),
    "matmul of rank 3": matmul("1, 5"),
    "matmul of open sizes": matmul("N, S"),
    "matmul of a batch": matmul("3, 5"),
    "matmul of rank 4": matmul("2, N, 5"),
    "batch": batch("3, 5", (3,)),
    "batch of open sizes": batch("3, N", (3,)),
    "batch of rank 4": batch("2, 3, N", (2, 3)),
    "batch of one": batch("7, N", (1,)),
    "LSTM": recurrent("LSTM"),
    "LSTM of two directions": recurrent("LSTM", 2, states=True),
    "LSTM whose last state is read": recurrent("LSTM", outputs=", y, c"),
    "GRU of two directions": recurrent("GRU", 2),
    "RNN": recurrent("RNN", outputs="y, h2"),
}


def masked(proto: onnx.ModelProto, pattern: str = "grouped:8", sparsity: float = 0.5):
    entry = {"sparsity": sparsity, "op_types": "default", "pattern": pattern}
    return onnxprune.prune(proto, [entry], keep_shape=True)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name, net in NETS.items()
        for form in forms.FORMS[net.graph.node[0].op_type]
        if (name, form) not in {("batch", "products"), ("batch of rank 4", "products")}
    ],
)
def test_lowered_equals_masked(name, form):
    entry = {"sparsity": 0.5, "op_names": ["w"], "pattern": "grouped:8"}
    result = onnxprune.prune(NETS[name], [entry], keep_shape=True)
    assert result.sparsity == 0.5
    model, report = lowered(result.model, latencies=Always(form))
    assert [row.kept for row in report.rows] == [16 // (2 if "of 2 groups" in name else 1)]
    assert report.rows[0].form in (form, "grouped", "batched")
    assert report.difference is not None
    assert report.difference < 1e-5
    if form not in {"padded", "pointwise"}:  # these fill up blocks
        stored = {
            t.name: np.prod(t.dims) for t in model.proto.graph.initializer if t.data_type == 1 and len(t.dims) > 1
        }
        kept = sum(size for name, size in stored.items() if name not in ("r", "b"))
        assert kept == np.prod(result.model.proto.graph.initializer[0].dims) / 2


@pytest.mark.parametrize("name", NETS)
def test_what_is_timed_is_the_layer(name):
    """The models that are timed run, and agree: those of every form with that of the dense layer."""
    entry = {"sparsity": 0.5, "op_names": ["w"], "pattern": "grouped:8"}
    model = prepare(onnxprune.prune(NETS[name], [entry], keep_shape=True).model)
    ((layer,), _) = layers(model, *_facts(model, choose(model, None)))
    data = {"data": np.random.default_rng(2).normal(size=layer.data).astype(F32)}
    expected = open_session(alone(layer, dense(layer)), threads=1).run(data)
    for form in forms.candidates(layer).values():
        (result,) = open_session(alone(layer, form(layer)), threads=1).run(data)
        assert np.abs(result - expected[0]).max() < 1e-4 * np.abs(expected[0]).max()
    assert Latencies(timing=False).of(layer)[1] == "estimated"


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
@pytest.mark.parametrize(
    "name",
    [
        "conv",
        "conv 3-d",
        "transposed",
        "gemm transB",
        "matmul of rank 3",
        "matmul of a batch",
        "batch of rank 4",
        "LSTM",
    ],
)
def test_operator_sets(name, opset):
    proto = onnx.ModelProto.FromString(NETS[name].SerializeToString())
    proto.opset_import[0].version = opset
    entry = {"sparsity": 0.5, "op_names": ["w"], "pattern": "grouped:8"}
    model, report = lowered(onnxprune.prune(proto, [entry], keep_shape=True).model, latencies=Always())
    assert report.rows
    assert report.difference is not None
    assert report.difference < 1e-5
    assert model.proto.opset_import[0].version == opset


@pytest.mark.parametrize("tag", ["inputs", "weight", "bias", "order"])
def test_a_wrong_tensor_is_caught(tag, monkeypatch):
    def roll(piece):
        name = next(n for n in piece.tensors if f"/{tag}_" in n)
        piece.tensors[name] = np.roll(piece.tensors[name], 1, axis=0)

    def wrong(layer):
        piece = forms.grouped(layer)
        roll(piece)
        return piece

    monkeypatch.setitem(forms.FORMS, "Conv", {"grouped": wrong})
    with pytest.raises(PruneError, match="differs from the masked one"):
        lowered(masked(NETS["conv"]).model, latencies=Always())


def test_nothing_gains_and_the_model_is_left_as_it_is():
    class Never(Always):
        def of(self, layer):
            return {DENSE: 1.0, "grouped": 1.0}, "measured"

    source = masked(NETS["conv"]).model
    model, report = lowered(source, latencies=Never())
    assert model is source
    assert report.rows == ()
    assert [s.reason for s in report.dense] == ["lowered it takes 1.00 times as long (measured)"]


def test_what_onnxruntime_does_not_load_stays_dense():
    """Its optimiser moves a DequantizeLinear of int8 behind a Transpose, with a type that does not fit (1.32)."""
    proto = parse(
        "(float[4, 32] x) => (float[] y) { q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z)"
        " y = MatMul (d, w) }",
        w=np.random.default_rng(0).normal(size=(32, 48)).astype(F32),
        s=F32(0.02),
        z=np.int8(0),
    )
    result = onnxprune.prune(proto, [{"sparsity": 0.5, "op_names": ["w"], "pattern": "grouped:8"}], keep_shape=True)
    model, report = lowered(result.model, latencies=Always())
    if model is result.model:
        assert not report.rows
        assert "cannot load what was made of the masked model" in report.dense[0].reason
    else:
        assert report.difference < 1e-5


def test_16_bit_products_are_written_so_that_onnxruntime_survives():
    """Behind heads that are put together, a Transpose after a lowered product and a MatMul crash onnxruntime 1.32."""
    rng = np.random.default_rng(0)
    proto = parse(
        "(float16[2, 2, 5, 16] h) => (float16[] y) { t = Transpose <perm = [0, 2, 1, 3]> (h) r = Reshape (t, s)"
        " m = MatMul (r, w) y = MatMul (m, v) }",
        w=rng.normal(size=(32, 16)).astype(np.float16),
        v=rng.normal(size=(16, 6)).astype(np.float16),
        s=np.array([0, 0, 32], np.int64),
    )
    result = onnxprune.prune(proto, [{"sparsity": 0.5, "op_names": ["w"], "pattern": "grouped:8"}], keep_shape=True)
    found, _ = layers(result.model, *_facts(prepare(result.model), choose(result.model, None)))
    assert [list(forms.candidates(layer)) for layer in found] == [["products"]]
    _, report = lowered(result.model, latencies=Always())
    assert [row.form for row in report.rows] == ["products"]
    assert report.difference < 2e-3


def test_dense_models_have_nothing_to_lower():
    source = load(NETS["conv"])
    model, report = lowered(source, latencies=Always())
    assert model is source
    assert report.rows == report.dense == ()


def test_verification_can_be_left_out():
    _, report = lowered(masked(NETS["conv"]).model, latencies=Always(), check=False)
    assert report.difference is None
    assert verify.TOLERANCE == 1e-4


CHAIN = """(float[N, 16, 9, 9] x) => (float[] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r = Relu (a)
    d = Conv <pads = [1, 1, 1, 1], group = 32> (r, w2, b2)
    n = BatchNormalization (d, scale, bias, mean, var)
    c = Conv (n, w3, b3)
    %s
}"""


def chain(end: str) -> onnx.ModelProto:
    """Convolutions whose groups lie scattered, one behind the other."""
    rng = np.random.default_rng(5)
    arrays = {name: rng.normal(size=32).astype(F32) for name in ("b1", "b2", "b3", "scale", "bias", "mean")}
    arrays["var"] = rng.random(32).astype(F32) + 0.5
    for name, shape in (("w1", (32, 16, 3, 3)), ("w2", (32, 1, 3, 3)), ("w3", (32, 32, 1, 1)), ("w4", (32, 32))):
        arrays[name] = rng.normal(size=shape).astype(F32)
    return parse(CHAIN % end, **arrays)


ENDS = {
    "t = Transpose <perm = [0, 2, 3, 1]> (c) y = MatMul (t, w4)": 0,
    "p = GlobalAveragePool (c) f = Flatten (p) y = Gemm (f, w4)": 0,
    "y = Relu (c)": 1,
    "s = Add (c, r) t = Transpose <perm = [0, 2, 3, 1]> (s) y = MatMul (t, w4)": 1,  # both layers feed one sum
    "s = Softmax <axis = 1> (c) t = Transpose <perm = [0, 2, 3, 1]> (s) y = MatMul (t, w4)": 1,
    "s = Slice (c, from, to, axis) q = Concat <axis = 1> (s, s) t = Transpose <perm = [0, 2, 3, 1]> (q) "
    "y = MatMul (t, w4)": 1,
}


def test_a_bias_that_is_moved():
    """As tf2onnx writes one that TensorFlow adds to a channels-first product."""
    model = parse(
        "(float[2, 32, 7, 9] x) => (float[] y) { r = Reshape(b, to) q = Squeeze(r, axes) y = Conv(x, w, q) }",
        w=np.random.default_rng(1).normal(size=(48, 32, 3, 3)).astype(F32),
        b=np.random.default_rng(2).normal(size=(2, 24)).astype(F32),
        to=np.array([1, 48, 1, 1]),
        axes=np.array([0, 2, 3]),
    )
    lower, report = lowered(masked(model).model, latencies=Always())
    assert [row.name for row in report.rows] == ["w"]
    assert report.difference is not None
    assert report.difference < 1e-5
    assert not {"Reshape", "Squeeze"} & {node.op_type for node in lower.proto.graph.node}


@pytest.mark.parametrize("end", ENDS)
def test_outputs_take_the_order_of_their_groups_where_readers_can_follow(end):
    """The first layer's order goes through ReLU, depthwise convolution and norm; the last one's as far as the end lets
    it. What is left is one Gather that puts outputs back."""
    proto = chain(end)
    for name, value in (("from", 0), ("to", 16), ("axis", 1)):
        if f" {name}" in end:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([value], np.int64), name))
    entry = {"sparsity": 0.5, "op_names": ["w1", "w3"], "pattern": "grouped:8"}
    result = onnxprune.prune(proto, [entry], keep_shape=True)
    model, report = lowered(result.model, latencies=Always())
    assert [row.groups for row in report.rows] == [4, 4]
    assert sum("order" in name for node in model.proto.graph.node for name in node.input) == ENDS[end]
    assert report.difference is not None
    assert report.difference < 1e-5


@pytest.mark.parametrize("pattern", ["grouped:8", "channel"])
def test_nodes_may_stand_in_any_order(pattern):
    """onnxruntime sorts them, and converters rely on that."""
    proto = chain("p = GlobalAveragePool (c) f = Flatten (p) y = Gemm (f, w4)")
    turned = onnx.ModelProto.FromString(proto.SerializeToString())
    del turned.graph.node[:]
    turned.graph.node.extend(reversed(proto.graph.node))
    entry = {"sparsity": 0.5, "op_types": "default", "pattern": pattern}
    results = [onnxprune.prune(given, [entry], align=1, timing=False) for given in (proto, turned)]
    first, second = (sorted(node.op_type for node in result.to_proto().graph.node) for result in results)
    assert first == second
    masks = [{name: mask.tolist() for name, mask in result.masks.items()} for result in results]
    assert masks[0]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("name", ["w1", "b1", "w2", "b2", "scale", "w3"])
def test_a_tensor_left_in_the_old_order_is_caught(name, monkeypatch):
    moved = order._moved
    monkeypatch.setattr(
        order, "_moved", lambda model, moves: moved(model, {n: found for n, found in moves.items() if n != name})
    )
    entry = {"sparsity": 0.5, "op_names": ["w1"], "pattern": "grouped:8"}
    result = onnxprune.prune(chain("y = Relu (c)"), [entry], keep_shape=True)
    with pytest.raises(PruneError, match="differs from the masked one"):
        lowered(result.model, latencies=Always())


@pytest.mark.parametrize("name", ["conv", "gemm"])
def test_half_precision(name):
    proto = onnx.ModelProto.FromString(NETS[name].SerializeToString())
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name)
        )
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    model, report = lowered(masked(proto).model, latencies=Always())
    assert report.rows
    assert {t.data_type for t in model.proto.graph.initializer} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}


REFUSED = {
    "quantised": (
        "(float[2, 32, 7, 7] x) => (float[] y) { d = DequantizeLinear (w, s, z) y = Conv (x, d) }",
        {"w": np.random.default_rng(0).integers(-9, 9, (48, 32, 3, 3)).astype(np.int8), "s": F32(0.1), "z": np.int8(0)},
        "it is quantised; lower the model before quantising it",
    ),
    "a batch that is spread": (
        "(float[1, 5, 32] x) => (float[] y) { y = MatMul (x, w) }",
        {"w": np.random.default_rng(0).normal(size=(3, 32, 48)).astype(F32)},
        "its batch of 3 matrices multiplies one of 1; only equal ones have a form",
    ),
    "a batch of an open size": (
        "(float[N, 3, 5, 32] x) => (float[] y) { y = MatMul (x, w) }",
        {"w": np.random.default_rng(0).normal(size=(3, 32, 48)).astype(F32)},
        "its batch of 3 matrices multiplies one of 1x3; only equal ones have a form",
    ),
    "recurrent weights": (
        "(float[5, N, 8] x) => (float[] y) { y = LSTM <hidden_size = 16> (x, v, w) }",
        {
            "v": np.random.default_rng(0).normal(size=(1, 64, 8)).astype(F32),
            "w": np.random.default_rng(0).normal(size=(1, 64, 16)).astype(F32),
        },
        "what the LSTM multiplies it by is its own last state, of which nothing can be left out",
    ),
    "the other side": (
        "(float[32, 5] x) => (float[] y) { y = MatMul (w, x) }",
        {"w": np.random.default_rng(0).normal(size=(48, 32)).astype(F32)},
        "the MatMul multiplies it from the other side",
    ),
    "scaled": (
        "(float[5, 32] x) => (float[] y) { y = Gemm <alpha = 2.0> (x, w) }",
        {"w": np.random.default_rng(0).normal(size=(32, 48)).astype(F32)},
        "the Gemm scales what it multiplies",
    ),
    "a bias that is computed": (
        "(float[2, 32, 7, 7] x, float[48] b) => (float[] y) { y = Conv (x, w, b) }",
        {"w": np.random.default_rng(0).normal(size=(48, 32, 3, 3)).astype(F32)},
        "the bias 'b' of its Conv is computed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_dense_says_why(name):
    text, arrays, reason = REFUSED[name]
    proto = parse(text, **{n: np.asarray(a) for n, a in arrays.items()})
    entry = {"sparsity": 0.5, "op_names": ["w"], "pattern": "grouped:8"}
    source = onnxprune.prune(proto, [entry], keep_shape=True).model
    model, report = lowered(source, latencies=Always())
    assert model is source
    assert [s.reason for s in report.dense] == [reason]


def test_a_model_that_stays_in_its_file_is_lowered_too(tmp_path, monkeypatch):
    """Of a large file only what is changed is read, late: zeros must be there by the time groups are looked for."""
    monkeypatch.setattr("onnxprune.graph.model.LARGE", 1000)
    path = tmp_path / "large.onnx"
    onnx.save(conv("pads = [1, 1, 1, 1]", (3, 3), "7, 9"), path)
    entry = {"sparsity": 0.5, "op_types": "default", "pattern": "grouped"}
    result = onnxprune.prune(path, [entry], tmp_path / "out.onnx", timing=False)
    assert result.report.lowering is not None
    assert [row.kept for row in result.report.lowering.rows] == [16]
    assert result.report.lowering.difference is not None
