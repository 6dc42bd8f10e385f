"""Constants of functions that take their value from the call stay what they are."""

from __future__ import annotations

import numpy as np
import onnx
from nets import run

from onnxprune import prune

MODEL = """
<ir_version: 10, opset_import: ["": 20, "own": 1]>
main (float[N, 3] x) => (float[N, 3] y) <float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}>
{
    a = MatMul (x, w)
    y = own.shift <by = [1.0, 2.0, 3.0]> (a)
}
<domain: "own", opset_import: ["": 20]>
shift <by> (a) => (b)
{
    c = Constant <value_floats: floats = @by> ()
    b = Add (a, c)
}
"""


def test_a_referenced_value_floats_is_left_alone():
    model = onnx.parser.parse_model(MODEL)
    x = np.ones((2, 3), np.float32)
    for sparsity in (0.0, 0.5):
        pruned = prune(model, [{"sparsity": sparsity}]).to_proto()
        assert pruned.functions[0] == model.functions[0]
        w = np.arange(1, 10, dtype=np.float32).reshape(3, 3).copy()
        if sparsity:  # by output, then input: the four smallest are 1, 2, 3, 4
            w[w <= 4] = 0
        assert np.array_equal(run(pruned, {"x": x})[0], x @ w + np.float32([1, 2, 3]))
