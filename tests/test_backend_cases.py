"""ONNX's own backend cases as inputs: the node cases the onnx package generates, and the models it ships.

The node cases get their weights as inputs; each is tried as it is, with all inputs but the first stored, and between
two layers whose channels go.
"""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnx.backend.test
import pytest
import test_graphs
from graphs import sandwich, unfit
from nets import session
from onnx import numpy_helper

import onnxprune
from onnxprune.errors import PruneError
from onnxprune.graph.model import load

SHIPPED = Path(onnx.backend.test.__file__).parent / "data"


@cache
def cases():
    """Every node case: name, model, inputs and expected outputs of its first data set."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found = collect_testcases(None)
    return {case.name: (case.model, *case.data_sets[0]) for case in found}


def stored(model: onnx.ModelProto, inputs: list) -> onnx.ModelProto | None:
    """The model with all inputs but the first as initializers; None where one of them is no tensor."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    given = [(v, a) for v, a in zip(model.graph.input, inputs, strict=False) if v.name][1:]
    if not given or not all(
        v.type.HasField("tensor_type") and isinstance(a, (np.ndarray, np.generic)) for v, a in given
    ):
        return None
    del copy.graph.input[1:]
    for value, array in given:
        expected = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        copy.graph.initializer.append(numpy_helper.from_array(np.asarray(array, expected), value.name))
    return copy


def pruned(model: onnx.ModelProto | Path, sparsity: float, op_types: str | list[str]) -> onnxprune.api.Result | None:
    """The result; None where there is nothing to prune, which is the one error allowed."""
    try:
        return onnxprune.prune(model, [{"sparsity": sparsity, "op_types": op_types}])
    except PruneError as error:
        if "matches no weight" not in str(error):
            raise
        return None


def check(model: onnx.ModelProto) -> list[str]:
    """Nothing changes at sparsity 0, and exactly the entries asked for at 0.5; the weights' names."""
    names = []
    for op_types in ("default", ["Embedding"]):
        dense = pruned(model, 0.0, op_types)
        same = load(model).to_proto() if dense is None else dense.to_proto()
        del same.metadata_props[:]
        same.metadata_props.extend(model.metadata_props)
        assert same.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True)
        half = pruned(model, 0.5, op_types)
        assert (half is None) == (dense is None)
        for row in [] if half is None else half.report.rows:
            assert row.zeros == max(row.zeros_before, row.size // 2), row
            assert np.count_nonzero(~half.masks[row.name]) == row.size // 2
            names.append(row.name)
    return names


@pytest.mark.parametrize("part", range(8))
def test_node_cases(part):
    for name, (model, inputs, _) in list(cases().items())[part::8]:
        try:
            check(model)
            lifted = stored(model, inputs)
            if lifted is not None:
                check(lifted)
        except Exception as error:
            raise AssertionError(f"{name}: {error}") from error


WEIGHTS = {
    "test_basic_conv_with_padding": ["W"],
    "test_basic_deform_conv_with_padding": ["W"],
    "test_convinteger_without_padding": ["w"],
    "test_convtranspose_3d": ["W"],
    "test_gather_0": [],
    "test_gemm_transposeB": ["b"],
    "test_gru_with_initial_bias": ["W", "R"],
    "test_lstm_with_peepholes": ["W", "R"],
    "test_matmul_4d": ["b"],
    "test_matmulinteger": ["B"],
    "test_qlinearconv": ["w"],
    "test_qlinearmatmul_2D_int8_float32": ["b"],
    "test_simple_rnn_defaults": ["W", "R"],
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_node_cases(name):
    """The weights found, and the expected outputs of the case at sparsity 0."""
    model, inputs, outputs = cases()[name]
    model = stored(model, inputs)
    assert check(model) == WEIGHTS[name]
    result = pruned(model, 0.0, "default")
    if result is not None:
        feed = {model.graph.input[0].name: inputs[0]}
        for got, expected in zip(session(result.to_proto()).run(None, feed), outputs, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("folder", sorted(p.name for p in SHIPPED.iterdir() if p.is_dir()))
def test_shipped_models(folder):
    paths = sorted((SHIPPED / folder).rglob("*.onnx"))
    for path in paths:
        try:
            check(onnx.load(path))
        except Exception as error:
            raise AssertionError(f"{path.parent.name}: {error}") from error
    assert paths or folder == "real"  # those are downloaded, and so not there


def test_shipped_weights_are_found():
    """A converted Conv, its weight an initializer."""
    result = pruned(SHIPPED / "pytorch-converted" / "test_Conv2d" / "model.onnx", 0.5, "default")
    assert [(row.name, row.op_type) for row in result.report.rows] == [("1", "Conv")]


# ------------------------------------------------------------------ between two layers

UNFIT = {
    "an operand is no tensor": "sequences, optional values and types alone",
    "no operand with an axis holds real numbers": "integers, truth values, text and scalars cannot come from a layer",
    "the operand is empty": "a layer of no outputs",
    "the first result is no tensor": "there is nothing for a layer to read",
}
"""Why a case cannot stand between two layers."""

NOT_RUN = {
    "test_adagrad": "training operators are in a preview domain that onnxruntime does not have",
    "test_adam": "the same",
    "test_momentum": "the same",
    "test_nesterov": "the same",
    "test_flexattention": "the same",
    "test_affine_grid_": "the expanded ones: Range is given tensors where onnxruntime wants scalars",
    "test_attention_4d_diff_heads_mask4d_padded_kv": "onnxruntime's kernel refuses the mask of its own case",
    "test_bernoulli": "no kernel for RandomUniformLike of operator set 22",
    "test_dequantizelinear_": "no kernel for operator set 28",
    "test_quantizelinear": "no kernel for operator set 28",
    "test_optional_": "no kernel for operator set 28",
    "test_gru_batchwise": "recurrent kernels know layout 0 only",
    "test_lstm_batchwise": "recurrent kernels know layout 0 only",
    "test_simple_rnn_batchwise": "recurrent kernels know layout 0 only",
    "test_pow_types_": "no kernel for exponents that are unsigned",
    "test_roialign_": "no kernel for operator set 22",
    "test_swiglu": "no kernel for Swish of operator set 24",
}
"""Names of cases, or their beginnings, that onnxruntime does not run between two layers, and why."""


def test_which_cases_stand_between_layers():
    found = Counter(unfit(model, inputs) for model, inputs, _ in cases().values())
    assert found.keys() - {""} <= UNFIT.keys()
    assert found[""] > 1200


def runs(graph):
    try:
        session(graph.model).run(None, graph.feed)
    except Exception:  # there is no kernel
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_node_cases_shrink(part):
    """Without half of the channels that go through the case, it computes what it does with zeros in their place."""
    for name, (model, inputs, _) in list(cases().items())[part::8]:
        for convolve in (False, True) if not unfit(model, inputs) else ():
            graph = sandwich(model, inputs, np.random.default_rng(0), convolve)
            if not runs(graph):
                assert name.startswith(tuple(NOT_RUN)), name
                continue
            try:
                test_graphs.shrinks(graph, 0.5)
            except Exception as error:
                raise AssertionError(f"{name}, {graph.steps}: {error}") from error
