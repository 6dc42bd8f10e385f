"""Weights that reach their operand as an unchanged state of a loop, or through a slice bounded by a fixed shape."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from nets import run

from onnxprune import prune

LOOP = """
<ir_version: 10, opset_import: ["": 20]>
main (float[2, 3] x) => (float[2, 3] y)
<float[3, 3] w = {9, 2, 8, 3, 7, 4, 6, 5, 1}, int64 trips = {2}, bool go = {1}>
{
    y, last = Loop (trips, go, x, w) <body = step (int64 i, bool c, float[2, 3] a, float[3, 3] u)
        => (bool d, float[2, 3] b, float[3, 3] v)
    {
        d = Identity (c)
        b = MatMul (a, u)
        v = HANDED
    }>
}
"""
FIRST = LOOP.replace("y, last =", "last, y =").replace("go, x, w", "go, w, x")
FIRST = FIRST.replace("float[2, 3] a, float[3, 3] u", "float[3, 3] u, float[2, 3] a")
FIRST = FIRST.replace("float[2, 3] b, float[3, 3] v", "float[3, 3] v, float[2, 3] b")
SCAN = """
<ir_version: 10, opset_import: ["": 20]>
main (float[2, 3] x, float[4, 2, 3] s) => (float[2, 3] y)
<float[3, 3] w = {9, 2, 8, 3, 7, 4, 6, 5, 1}>
{
    y, last, all = Scan <num_scan_inputs = 1, body = step (float[2, 3] a, float[3, 3] u, float[2, 3] t)
        => (float[2, 3] b, float[3, 3] v, float[2, 3] o)
    {
        m = MatMul (a, u)
        b = Add (m, t)
        v = HANDED
        o = Identity (b)
    }> (x, w, s)
}
"""
SHAPE = """
<ir_version: 10, opset_import: ["": 20]>
main (float[2, 3] x, float[2] rows) => (float[2, 3] y)
<float[3, 3] w = {9, 2, 8, 3, 7, 4, 6, 5, 1}, float[1, 3] u = {1, 1, 1},
 int64[1] zero = {0}, int64[1] axis = {0}, int64[1] three = {3}>
{
    two = Shape (rows)
    upper = Slice (w, zero, two, axis)
    lower = Slice (w, two, three, axis)
    turned = Concat <axis = 0> (lower, upper)
    y = MatMul (x, turned)
}
"""


@pytest.mark.parametrize("text", [LOOP, FIRST, SCAN])
@pytest.mark.parametrize("handed", ["Identity (u)", "Identity (q)\n        q = Identity (u)"])
def test_a_state_that_a_loop_hands_on_unchanged_is_its_weight(text, handed):
    if "\n" in handed:  # a chain: its first link has to come first
        last, first = (line.strip() for line in handed.split("\n"))
        text = text.replace("v = HANDED", f"{first}\n        v = {last}")
    model = onnx.parser.parse_model(text.replace("HANDED", handed))
    result = prune(model, [{"sparsity": 0.4}])
    # role order (output, input): columns of w. The three smallest of nine are 1, 2, 3
    assert np.array_equal(result.masks["w"], np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]], bool))
    assert [row.op_type for row in result.report.rows] == ["MatMul"]
    assert all(np.isfinite(y).all() for y in run(result.to_proto()))


@pytest.mark.parametrize("text", [LOOP, SCAN])
def test_a_state_that_a_loop_changes_is_none(text):
    model = onnx.parser.parse_model(text.replace("HANDED", "Neg (u)"))
    with pytest.raises(ValueError, match="the model has no weights that can be pruned"):
        prune(model, [{"sparsity": 0.4}])


@pytest.mark.parametrize(
    ("rows", "asked"),
    [("float[2]", "Shape"), ("float[N, 2]", "Shape <start = 1>"), ("float[2, N]", "Shape <end = -1>")],
)
def test_bounds_that_are_a_fixed_shape(rows, asked):
    text = SHAPE.replace("float[2] rows", f"{rows} rows").replace("Shape", asked)
    result = prune(onnx.parser.parse_model(text), [{"sparsity": 0.4}])
    assert np.array_equal(result.masks["w"], np.array([[1, 0, 1], [0, 1, 1], [1, 1, 0]], bool))


def test_bounds_that_are_a_free_shape_are_said():
    model = onnx.parser.parse_model(SHAPE.replace("float[2] rows", "float[N] rows"))
    with pytest.raises(ValueError, match="no weights that can be pruned"):
        prune(model, [{"sparsity": 0.4}])
