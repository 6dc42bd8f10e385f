"""Every operator with a weight: which entries go, in which order, and that the operator sees zeros there."""

from __future__ import annotations

import numpy as np
import pytest
from nets import changed, feeds, run
from operator_nets import F32, FLOAT, QUANTISED
from weight_oracle import check

import onnxprune
from onnxprune.graph.roles import ROLES


def test_every_role_has_a_row():
    rows = {(node.domain, node.op_type) for net in FLOAT + QUANTISED for node in net.model.graph.node}
    assert rows == set(ROLES) - {("", "Gather")}


@pytest.mark.parametrize("net", FLOAT + QUANTISED, ids=lambda net: net.id)
def test_operator(net):
    check(net)


@pytest.mark.parametrize("net", FLOAT + QUANTISED, ids=lambda net: net.id)
def test_all_pruned_computes_zero(net):
    """None of these nets has a bias, so with every weight at what its operator takes for 0.0 all outputs are 0."""
    result = onnxprune.prune(net.model, [{"sparsity": 1.0}])
    assert result.sparsity == 1
    assert np.any(run(net.model)[0])
    assert not np.any(run(result.to_proto())[0])


RESPONSES = {  # id -> the axis of x that holds inputs, the axes of y that hold outputs
    **dict.fromkeys(["Conv1d", "Conv2d", "Conv3d", "Conv grouped", "Conv depthwise", "FusedConv"], (1, [1])),
    **dict.fromkeys(["ConvTranspose", "ConvTranspose grouped"], (1, [1])),
    **dict.fromkeys(
        ["Gemm", "Gemm transB", "MatMul right", "FusedMatMul transB", "FusedGemm", "TransposeMatMul"], (1, [1])
    ),
    **dict.fromkeys(
        ["Gemm of W x", "Gemm transA of W x", "MatMul left", "FusedMatMul left", "FusedMatMul transA"], (0, [0])
    ),
    **dict.fromkeys(["Einsum", "Einsum without a result"], (1, [1])),
    "Einsum of W x": (0, [0]),
    "Einsum per head": (2, [0, 2]),
    "Einsum to heads": (2, [2, 3]),
    **dict.fromkeys(["MatMul right batched", "FusedMatMul transBatchB", "FusedMatMul transB transBatchB"], (2, [0, 2])),
    **dict.fromkeys(["MatMul left batched", "FusedMatMul transBatchA"], (1, [0, 1])),
}


def responses(model, inputs: int, outputs: list[int]) -> np.ndarray:
    """(outputs, inputs): how the outputs of a net answer to each input alone."""
    (shape,) = [x.shape for x in feeds(model).values()]
    answers = []
    for i in range(shape[inputs]):
        x = np.zeros(shape, F32)
        x.swapaxes(0, inputs)[i] = 1
        (y,) = run(model, {"x": x})
        y = np.moveaxis(y, outputs, range(len(outputs)))
        answers.append(y.reshape(int(np.prod(y.shape[: len(outputs)])), -1).max(1))
    return np.stack(answers, 1)


@pytest.mark.parametrize("net", [net for net in FLOAT if net.id in RESPONSES], ids=lambda net: net.id)
def test_equal_entries_go_by_output_then_input(net):
    """With all weights 1, the first outputs fall silent, and one output no longer hears its first inputs."""
    (w,) = net.model.graph.initializer
    model = changed(net.model, net, "W", np.ones(w.dims, F32))
    dense = responses(model, *RESPONSES[net.id])
    size, outputs = int(np.prod(w.dims)), len(dense)
    heard = [np.flatnonzero(row) for row in dense]
    inputs = len(heard[0])
    count = size // outputs * (outputs // 2) + size // outputs // inputs * (inputs // 2)
    result = onnxprune.prune(model, [{"sparsity": (count + 0.5) / size}])
    expected = dense != 0
    expected[: outputs // 2] = False
    expected[outputs // 2, heard[outputs // 2][: inputs // 2]] = False
    assert result.report.zeros == count
    assert np.array_equal(responses(result.to_proto(), *RESPONSES[net.id]) != 0, expected)
