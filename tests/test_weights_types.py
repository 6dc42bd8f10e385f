"""Every type a weight can have, in every way a tensor can be stored."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from nets import Net, Operand, parse, pi, run
from onnx import TensorProto, helper, numpy_helper
from weight_oracle import check

import onnxprune

COLUMNS = np.transpose
MASK = "0101 0100 1110"  # the same entries go in every type

TYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "int8": np.int8,
    "uint8": np.uint8,
    "int4": ml_dtypes.int4,
    "uint4": ml_dtypes.uint4,
    "int16": np.int16,
    "uint16": np.uint16,
}
SHIFTS = {"uint8": 128, "uint4": 8, "uint16": 40000, "int8": -7, "int16": 1000}


def typed(array: np.ndarray, name: str) -> TensorProto:
    """A tensor with its values in the typed field (float_data, int32_data, ...), not as raw bytes."""
    dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
    tensor = helper.make_tensor(name, dtype, array.shape, array.astype(np.float64).reshape(-1).tolist())
    assert not tensor.raw_data
    return tensor


def stored_as(model: onnx.ModelProto, storage: str) -> onnx.ModelProto:
    """The model with its weight W stored otherwise."""
    (weight,) = [t for t in model.graph.initializer if t.name == "W"]
    array = numpy_helper.to_array(weight)
    if "typed" in storage:
        weight.CopyFrom(typed(array, "W"))
    if "Constant" in storage:
        node = helper.make_node("Constant", [], ["W"], value=weight)
        model.graph.initializer.remove(weight)
        model.graph.node.insert(0, node)
    return model


def net(name: str, storage: str) -> Net:
    zero = SHIFTS.get(name, 0)
    array = pi(3, 4, dtype=TYPES[name], offset=zero)
    if "int" not in name:
        model = parse("(float[2,3] x) => (float[2,4] y) { V = Cast<to=1>(W) y = MatMul(x, V) }", W=array)
    else:
        scale, zero = np.float32(0.5).reshape(()), np.array(zero, TYPES[name])
        text = "(float[2,3] x) => (float[2,4] y) { V = DequantizeLinear(W, s, z) y = MatMul(x, V) }"
        model = parse(text, W=array, s=scale, z=zero)
    return Net(f"{name} {storage}", stored_as(model, storage), {"W": MASK}, {"W": [Operand("V", COLUMNS)]})


@pytest.mark.parametrize("storage", ["raw", "typed", "Constant raw", "Constant typed"])
@pytest.mark.parametrize("dtype", TYPES)
def test_type_and_storage(dtype, storage):
    check(net(dtype, storage))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_operator_computes_in_the_type(dtype):
    names = {"float16": "float16", "float32": "float", "float64": "double"}
    model = parse(
        f"({names[dtype]}[2,3] x) => ({names[dtype]}[2,4] y) {{ y = MatMul(x, W) }}", W=pi(3, 4, dtype=TYPES[dtype])
    )
    check(Net(dtype, model, {"W": MASK}, {"W": [Operand("W", COLUMNS)]}))


def test_value_floats_of_a_constant_node():
    """Stored as a list of floats, rewritten as a tensor."""
    model = parse("(float[2,3] x) => (float[2,4] y) { V = Reshape(W, s) y = MatMul(x, V) }", s=np.array([3, 4]))
    model.graph.node.insert(0, helper.make_node("Constant", [], ["W"], value_floats=pi(12).tolist()))
    result = onnxprune.prune(model, [{"sparsity": 0.5}])
    assert "".join("01"[int(k)] for k in result.masks["W"]) == MASK.replace(" ", "")
    (x,) = [pi(2, 3)]
    expected = x @ (pi(12) * result.masks["W"]).reshape(3, 4)
    assert np.array_equal(run(result.to_proto(), {"x": x})[0], expected)


def test_bytes_of_kept_entries_survive():
    """Negative zeros and denormals that are kept stay what they are, bit by bit; a pruned entry is +0.0."""
    array = np.array([[-0.0, 1e-40, -1e-40], [0.0, 1.0, -2.0]], np.float32)
    model = parse("(float[2,2] x) => (float[2,3] y) { y = MatMul(x, W) }", W=array)
    result = onnxprune.prune(model, [{"sparsity": 0.5}])
    assert result.report.rows[0].zeros_before == 2
    after = numpy_helper.to_array(result.to_proto().graph.initializer[0])
    assert result.masks["W"].tolist() == [[False, False, True], [False, True, True]]
    assert after.tobytes() == np.array([[0.0, 0.0, -1e-40], [0.0, 1.0, -2.0]], np.float32).tobytes()


def test_zeros_already_there_count():
    """A weight sparser than asked for is left as it is, and its zeros are those counted."""
    array = pi(4, 4)
    array[1:] = 0
    result = onnxprune.prune(
        parse("(float[2,4] x) => (float[2,4] y) { y = MatMul(x, W) }", W=array), [{"sparsity": 0.5}]
    )
    assert (result.report.rows[0].zeros_before, result.report.rows[0].zeros) == (12, 12)
    assert np.array_equal(numpy_helper.to_array(result.to_proto().graph.initializer[0]), array)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint4"])
def test_quantised_zeros_already_there_count(dtype):
    """An entry at the zero point is a zero."""
    zero = SHIFTS[dtype]
    array = pi(4, 4, dtype=TYPES[dtype], offset=zero)
    array[0] = zero
    text = "(float[2,4] x) => (float[2,4] y) { V = DequantizeLinear(W, s, z) y = MatMul(x, V) }"
    model = parse(text, W=array, s=np.float32(1).reshape(()), z=np.array(zero, TYPES[dtype]))
    result = onnxprune.prune(model, [{"sparsity": 0.5}])
    assert (result.report.rows[0].zeros_before, result.report.rows[0].zeros) == (4, 8)
    after = numpy_helper.to_array(result.to_proto().graph.initializer[0]).astype(np.int64)
    assert np.count_nonzero(after == zero) == 8
