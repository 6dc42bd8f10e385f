"""What is no weight, and weights that are left alone: said with the reason, never half pruned, never a crash."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from nets import parse, pi, run

import onnxprune
from onnxprune.graph.model import load
from onnxprune.graph.weights import find

F32 = np.float32
HALF = F32(0.5).reshape(())
FUNCTION = '<domain: "own", opset_import: ["": 21]>'


def skipped(model: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Name -> operator and reason of what is left alone; nothing of it may change."""
    model.graph.node.add(op_type="MatMul", input=["other", "OTHER"], output=["other y"])
    model.graph.input.add(name="other").type.CopyFrom(onnx.helper.make_tensor_type_proto(1, [2, 3]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(pi(3, 4), "OTHER"))
    model.graph.output.add(name="other y")
    result = onnxprune.prune(model, [{"sparsity": 0.5}])
    assert list(result.masks) == ["OTHER"]
    pruned = result.to_proto()
    pruned.ClearField("metadata_props")
    pruned.graph.initializer[-1].CopyFrom(model.graph.initializer[-1])
    assert pruned == model
    return {s.name: (s.op_type, s.reason) for s in result.report.skipped}


REFUSED = {
    "weight normalisation": (
        parse(
            "(float[2,4] x) => (float[2,3] y) "
            "{ s = Mul(W, W) n = ReduceSum(s, a) r = Sqrt(n) V = Div(W, r) y = Gemm<transB=1>(x, V) }",
            W=pi(3, 4),
            a=np.array([1]),
        ),
        ("W", "Gemm", "its scale is computed from the weight itself"),
    ),
    "LoRA": (
        parse(
            "(float[2,3] x) => (float[2,4] y) { D = MatMul(A, B) V = Add(W, D) y = MatMul(x, V) }",
            W=pi(3, 4),
            A=pi(3, 1),
            B=pi(1, 4),
        ),
        ("W", "MatMul", "it is computed by Add, which neither moves nor scales its elements"),
    ),
    "contrib operator": (
        parse("(float[2,4] x) => (float[2,4] y) { V = com.microsoft.Gelu(W) y = MatMul(x, V) }", W=pi(4, 4)),
        ("W", "MatMul", "it is computed by com.microsoft.Gelu, which has no rule"),
    ),
    "MatMulNBits": (
        parse(
            "(float[2,16] x) => (float[2,2] y) "
            "{ y = com.microsoft.MatMulNBits<K=16, N=2, bits=4, block_size=16>(x, W, s) }",
            W=np.full((2, 1, 8), 0x57, np.uint8),
            s=np.ones(2, F32),
        ),
        ("W", "MatMulNBits", "its weights are packed in 2 to 8 bits per block"),
    ),
    "Einsum of a diagonal": (
        parse('(float[2,3] x) => (float[2,3] y) { y = Einsum<equation="bi,ii->bi">(x, W) }', W=pi(3, 3)),
        ("W", "Einsum", "Einsum 'bi,ii->bi' does not multiply its operand 1 as a matrix"),
    ),
    "Einsum with a sum of its own": (
        parse('(float[2,3] x) => (float[2,3] y) { y = Einsum<equation="bi,ik->bi">(x, W) }', W=pi(3, 4)),
        ("W", "Einsum", "Einsum 'bi,ik->bi' does not multiply its operand 1 as a matrix"),
    ),
    "Einsum of any rank": (
        parse('(float[2,3] x) => (float[2,4] y) { y = Einsum<equation="...i,...io->...o">(x, W) }', W=pi(2, 3, 4)),
        ("W", "Einsum", "Einsum '...i,...io->...o' does not multiply its operand 1 as a matrix"),
    ),
    "Einsum of three": (
        parse(
            '(float[2,3] x, float[2,4] z) => (float[2] y) { y = Einsum<equation="bi,io,bo->b">(x, W, z) }', W=pi(3, 4)
        ),
        ("W", "Einsum", "Einsum 'bi,io,bo->b' has 3 operands"),
    ),
    "int32": (
        parse("(int32[2,3] x) => (int32[2,4] y) { y = MatMul(x, W) }", W=pi(3, 4, dtype=np.int32)),
        ("W", "MatMul", "its type INT32 cannot be pruned"),
    ),
    "complex": (
        parse("(complex64[2,3] x) => (complex64[2,4] y) { y = MatMul(x, W) }", W=pi(3, 4, dtype=np.complex64)),
        ("W", "MatMul", "its type COMPLEX64 cannot be pruned"),
    ),
    "bool": (
        parse("(float[2,3] x) => (float[2,4] y) { V = Cast<to=1>(W) y = MatMul(x, V) }", W=pi(3, 4) > 0),
        ("W", "MatMul", "its type BOOL cannot be pruned"),
    ),
    "string": (
        parse(
            "(float[2,3] x) => (float[2,4] y) { V = Cast<to=1>(W) y = MatMul(x, V) }", W=np.full((3, 4), "1", object)
        ),
        ("W", "MatMul", "its type STRING cannot be pruned"),
    ),
    "cast to an integer": (
        parse("(int32[2,3] x) => (int32[2,4] y) { V = Cast<to=6>(W) y = MatMul(x, V) }", W=pi(3, 4)),
        ("W", "MatMul", "it is cast to int32"),
    ),
    "run-time zero point": (
        parse(
            "(float[2,3] x, uint8 z) => (float[2,4] y) { V = DequantizeLinear(W, s, z) y = MatMul(x, V) }",
            W=pi(3, 4, dtype=np.uint8, offset=9),
            s=HALF,
        ),
        ("W", "MatMul", "the DequantizeLinear after it takes a shape, a scale or a zero point known at run time only"),
    ),
    "run-time zero point of the operator": (
        parse(
            "(uint8[2,3] x, uint8 z) => (int32[2,4] y) { y = MatMulInteger(x, W, z, z) }",
            W=pi(3, 4, dtype=np.uint8, offset=9),
        ),
        ("W", "MatMulInteger", "the scale or zero point of MatMulInteger is computed at run time"),
    ),
    "run-time shape": (
        parse("(float[2,2,3] x, int64[3] s) => (float[2,2,4] y) { V = Expand(W, s) y = MatMul(x, V) }", W=pi(3, 4)),
        ("W", "MatMul", "the Expand after it takes a shape, a scale or a zero point known at run time only"),
    ),
    "run-time shape of a recurrent weight": (
        parse(
            "(float[2,1,3] x, int64[3] s) => (float[2,1,1,2] y) { V = Reshape(W, s) y = RNN<hidden_size=2>(x, V, V) }",
            W=pi(2, 3),
        ),
        ("W", "RNN", "the Reshape after it takes"),
    ),
    "two zero points": (
        parse(
            "(float[2,3] x) => (float[2,8] y) "
            "{ A = DequantizeLinear(W, s, z1) B = DequantizeLinear(W, s, z2) "
            "a = MatMul(x, A) b = MatMul(x, B) y = Concat<axis=1>(a, b) }",
            W=pi(3, 4, dtype=np.uint8, offset=9),
            s=HALF,
            z1=np.uint8(9).reshape(()),
            z2=np.uint8(10).reshape(()),
        ),
        ("W", "MatMul", "it is read with different zero points"),
    ),
    "two zero points in one operand": (
        parse(
            "(float[2,3] x) => (float[2,2] y) { A = Expand(W, e) B = Cast<to=1>(A) V = Sub(B, z) y = MatMul(x, V) }",
            W=pi(3, 1, dtype=np.uint8, offset=9),
            e=np.array([3, 2]),
            z=np.array([9, 8], F32),
        ),
        ("W", "MatMul", "it is read with different zero points"),
    ),
    "quantised with one zero point, dequantised with another": (
        parse(
            "(float[2,3] x) => (float[2,4] y) "
            "{ Q = QuantizeLinear(W, s, z1) V = DequantizeLinear(Q, s, z2) y = MatMul(x, V) }",
            W=pi(3, 4),
            s=HALF,
            z1=np.uint8(9).reshape(()),
            z2=np.uint8(10).reshape(()),
        ),
        ("W", "MatMul", "it is quantised with one zero point and dequantised with another"),
    ),
    "a zero point that its type cannot hold": (
        parse(
            "(float[2,3] x) => (float[2,4] y) { U = Cast<to=1>(W) V = Sub(U, z) y = MatMul(x, V) }",
            W=pi(3, 4, dtype=np.uint8, offset=9),
            z=F32(9.5).reshape(()),
        ),
        ("W", "MatMul", "the zero point [9.5] subtracted from it is no uint8"),
    ),
    "shifted after scaling": (
        parse("(float[2,3] x) => (float[2,4] y) { U = Mul(W, s) V = Sub(U, s) y = MatMul(x, V) }", W=pi(3, 4), s=HALF),
        ("W", "MatMul", "a constant is subtracted after it was scaled"),
    ),
    "a difference that grows": (
        parse("(float[2,3] x) => (float[2,2] y) { V = Sub(W, z) y = MatMul(x, V) }", W=pi(3, 1), z=pi(2)),
        ("W", "MatMul", "it is the difference of [3, 1] and [2], the first not of the operand's shape"),
    ),
    "an outer product": (
        parse("(float[2,3] x) => (float[2,4] y) { V = Mul(W, z) y = MatMul(x, V) }", W=pi(3, 1), z=pi(4)),
        ("z", "MatMul", "it is a product of [3, 1] and [4], neither of the operand's shape"),
    ),
    "a layout that does not fit": (
        parse(
            "(float[2,3] x) => (float[2,4] y) { V = Reshape(W, s) y = MatMul(x, V) }", W=pi(3, 5), s=np.array([3, 4])
        ),
        ("W", "MatMul", "its layout cannot be computed as the graph describes it"),
    ),
    "made of nothing stored": (
        parse("(float[2,3] x) => (float[2,4] y) { V = ConstantOfShape(s) y = MatMul(x, V) }", s=np.array([3, 4])),
        ("s", "MatMul", "it is computed by ConstantOfShape"),
    ),
    "the last of three operands": (
        parse(
            '(float[2,3] x, float[3] s) => (float[2,4] y) { y = Einsum<equation="bi,i,io->bo">(x, s, W) }', W=pi(3, 4)
        ),
        ("W", "Einsum", "Einsum 'bi,i,io->bo' has 3 operands"),
    ),
    "numbers in an attribute": (
        parse("(float[3] x) => (float y) { i = Constant<value_ints=[1, 2, 3]>() V = Cast<to=1>(i) y = MatMul(x, V) }"),
        ("i", "MatMul", "it is given as the attribute 'value_ints' of a Constant node"),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_left_alone_with_the_reason(case):
    model, (name, op_type, reason) = REFUSED[case]
    found = skipped(model)
    assert list(found) == [name]
    assert found[name][0] == op_type
    assert reason in found[name][1]


SILENT = {
    "activations times activations": parse("(float[2,3] x) => (float[2,2] y) { t = Transpose(x) y = MatMul(x, t) }"),
    "scaled activations": parse(
        "(float[2,3] x) => (float[2,2] y) { t = Transpose(x) u = Mul(t, s) y = MatMul(x, u) }", s=np.ones((3, 2), F32)
    ),
    "an activation of a fixed shape": parse(
        "(float[2,3] x, int64[2] n) => (float[2,2] y) "
        "{ z = Expand(s, n) t = Transpose(x) u = Add(t, z) y = MatMul(x, u) }",
        s=HALF,
    ),
    "a state that starts constant": parse(
        "(float[2,3] x, int64[2] n) => (float[4,2] y) "
        "{ h = Expand(s, n) t = Transpose(x) u = Reshape(t, n) y = MatMul(h, u) }",
        s=HALF,
    ),
    "constants only": parse(
        "(float[3,4] x) => (float[3,4] y) { p = MatMul(A, B) y = Add(x, p) }", A=pi(3, 2), B=pi(2, 4)
    ),
    "a table of shapes": parse("(int64 i) => (int64 y) { y = Gather(T, i) }", T=np.array([3, 4, 5])),
    "a table of shapes of an activation": parse(
        "(float[2,3] x, int64 i) => (int64 y) { s = Shape(x) y = Gather(s, i) }"
    ),
    "an integer matrix": parse("(int64 i) => (int64[2] y) { y = Gather(T, i) }", T=np.array([[3, 4], [5, 6]])),
    "a float vector": parse("(int64 i) => (float y) { y = Gather(T, i) }", T=pi(5)),
    "a computed table": parse("(int64 i) => (float[4] y) { U = Add(T, T) y = Gather(U, i) }", T=pi(5, 4)),
    "a bool matrix": parse("(int64 i) => (bool[4] y) { y = Gather(T, i) }", T=pi(5, 4) > 0),
    "a state that a Loop changes": parse(
        """(float[2,3] x) => (float[3,3] z, float[2,2,3] y) {
        c = Constant<value=bool {1}>() n = Constant<value=int64 {2}>()
        z, y = Loop(n, c, W) <body = b (int64 i, bool c0, float[3,3] w) => (bool c1, float[3,3] w1, float[2,3] k)
        { c1 = Identity(c0) k = MatMul(x, w) w1 = Transpose(w) }> }""",
        W=pi(3, 3),
    ),
    "what a Scan cuts": parse(
        """(float[2,3] x) => (float[5,2,4] y) { y = Scan<num_scan_inputs=1,
        body = b (float[3,4] w) => (float[2,4] k) { k = MatMul(x, w) }>(W) }""",
        W=pi(5, 3, 4),
    ),
    "norms and biases": parse(
        "(float[2,4] x) => (float[2,4] y) { n = LayerNormalization(x, g, b) y = Add(n, b) }", g=pi(4), b=pi(4)
    ),
    "weights computed by a network": parse(
        "(float[2,4] x, float[2,4] h) => (float[2,2] y) { t = Tanh(h) V = Transpose(t) y = MatMul(x, V) }"
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_no_weight(case):
    assert find(load(SILENT[case])) == ([], [])
    with pytest.raises(onnxprune.PruneError, match="matches no weight"):
        onnxprune.prune(SILENT[case], [{"sparsity": 0.5}])


def test_a_table_used_as_a_weight_too_is_reported():
    """A Gather hides nothing: the MatMul's operand that has no rule is still said."""
    model = parse(
        "(float[2,4] x, int64 i) => (float[4] e, float[2,4] y) { e = Gather(T, i) U = Exp(T) y = MatMul(x, U) }",
        T=pi(4, 4),
    )
    weights, left = find(load(model))
    assert [(w.name, w.op_types) for w in weights] == [("T", ("Embedding",))]
    assert [(s.name, s.op_type) for s in left] == [("T", "MatMul")]


def test_a_function_that_calls_itself_is_an_error():
    model = parse(f"(float[2,3] x) => (float[2,3] y) {{ y = own.f(x) }} {FUNCTION} f (x) => (y) {{ y = Identity(x) }}")
    model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "f", "own"
    with pytest.raises(onnxprune.PruneError, match="calls itself"):
        onnxprune.prune(model, [{"sparsity": 0.5}])


def test_two_left_alone_of_one_name():
    """The branches of an If may name their tensors alike."""
    matrix = "<int32[3,4] W = {3, 1, 2, 1, 1, 3, 2, 1, 3, 3, 1, 2}>"
    model = parse(
        f"""(bool c, int32[2,3] x) => (int32[2,4] y) {{ y = If(c) <
        then_branch = t () => (int32[2,4] a) {matrix} {{ a = MatMul(x, W) }},
        else_branch = e () => (int32[2,4] b) {matrix} {{ b = MatMul(x, W) }} > }}"""
    )
    assert [s.name for s in find(load(model))[1]] == ["W", "W.2"]


def test_a_weight_with_a_reader_that_has_no_rule_is_pruned_for_the_other():
    """What another operator computes of the stored zeros is right as well: it reads the same tensor."""
    model = parse("(float[2,4] x) => (float[2,4] y) { h = MatMul(x, W) U = Add(W, W) y = MatMul(h, U) }", W=pi(4, 4))
    result = onnxprune.prune(model, [{"sparsity": 1.0}])
    assert [s.op_type for s in result.report.skipped] == ["MatMul"]
    assert not run(result.to_proto())[0].any()
