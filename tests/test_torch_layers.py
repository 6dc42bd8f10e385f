"""Leaf modules as weights without a graph: what is found, what it is called, what is refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as torch_prune
from onnxprune.converters.torch import LevelPruner
from onnxprune.converters.torch.layers import find
from torch import nn
from torch_nets import Attention, Tied, make

from onnxprune import PruneError


def types(model):
    return {w.name: w.op_types for w in find(model)[0]}


def test_types_are_those_of_onnx_and_of_torch_subclasses_included():
    class Mine(nn.Linear):
        pass

    model = nn.ModuleDict({"a": Mine(2, 3), "b": nn.LSTM(2, 3), "c": nn.RNN(2, 3), "d": nn.Embedding(4, 2)})
    found = types(model)
    assert found["a.weight"] == ("Gemm", "MatMul", "Mine", "Linear")
    assert found["b.weight_ih_l0"] == ("LSTM",)
    assert found["c.weight_hh_l0"] == ("MatMul", "RNN")
    assert found["d.weight"] == ("Embedding",)


def test_an_output_projection_is_part_of_its_attention():
    model = Attention()
    names = {w.name: (w.op_types, w.names) for w in find(model)[0]}
    assert "MultiheadAttention" in names["attention.out_proj.weight"][0]
    assert "attention" in names["attention.out_proj.weight"][1]
    pruner = LevelPruner([{"sparsity": 0.5, "op_types": ["MultiheadAttention"]}])(model)
    assert {r.name for r in pruner.report.rows} == {"attention.in_proj_weight", "attention.out_proj.weight"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"op_types": "default"}, {"0.weight", "3.weight", "8.weight"}),
        ({"op_types": ["Conv2d"]}, {"0.weight", "3.weight"}),
        ({"op_types": ["Conv"]}, {"0.weight", "3.weight"}),
        ({"op_types": ["Linear"]}, {"8.weight"}),
        ({"op_names": ["8"]}, {"8.weight"}),
        ({"op_names": ["3.weight"]}, {"3.weight"}),
        ({"op_names": ["*.weight"]}, {"0.weight", "3.weight", "8.weight"}),
        ({"op_types": ["Linear"], "op_names": ["8*"]}, {"8.weight"}),
    ],
)
def test_entries_name_weights_by_either_name(entry, expected):
    pruner = LevelPruner([{"sparsity": 0.5, **entry}])(make("lenet5")[0])
    assert {row.name for row in pruner.report.rows} == expected


def test_patterns_reach_into_nested_modules():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    pruner = LevelPruner([{"sparsity": 0.5, "op_names": ["layers.*.linear1"]}])(model)
    assert [row.name for row in pruner.report.rows] == ["layers.0.linear1.weight", "layers.1.linear1.weight"]


def test_a_model_that_nothing_matches_is_an_error():
    with pytest.raises(PruneError, match=r"matches no weight: the model has no weights that can be pruned"):
        LevelPruner([{"sparsity": 0.5}])(nn.Sequential(nn.ReLU(), nn.LayerNorm(4)))
    with pytest.raises(PruneError, match=r"matches no weight; types present: Gemm, Linear, MatMul"):
        LevelPruner([{"sparsity": 0.5, "op_types": ["Conv2d"]}])(nn.Linear(2, 2))


def test_modules_without_values_are_refused_by_name():
    with pytest.raises(PruneError, match=r"'1.weight' \[3, 2\] is on the meta device"):
        LevelPruner([{"sparsity": 0.5}])(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3, device="meta")))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3, device="meta"))
    with pytest.raises(PruneError, match=r"'1.weight' \[3, 2\] is on the meta device"):
        LevelPruner([{"sparsity": 0.5}])(model, torch.ones(1, 2))
    model = nn.Sequential(nn.Linear(2, 2))
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    model.to("meta")
    with pytest.raises(PruneError, match=r"'0.weight' \[2, 2\] went to the meta device .* load the model again"):
        _ = pruner.report
    with pytest.raises(PruneError, match=r"'0.weight' of a LazyLinear has no shape yet"):
        LevelPruner([{"sparsity": 0.5}])(nn.Sequential(nn.LazyLinear(3)))


def test_not_a_number_is_refused_by_name_and_nothing_changed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight[2, 3] = float("nan")
    with pytest.raises(PruneError, match=r"'1.weight' \[4, 4\] .*NaN"):
        LevelPruner([{"sparsity": 0.5}])(model)
    assert (model[0].weight != 0).all()
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def reparametrized():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "parametrized"
        yield nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), "parametrized"
        yield nn.utils.weight_norm(nn.Linear(3, 3)), "weight_g and weight_v"
        yield torch_prune.l1_unstructured(nn.Linear(3, 3), "weight", 0.5), "weight_orig"


@pytest.mark.parametrize("case", range(4))
def test_computed_weights_are_left_alone_with_the_reason(case):
    layer, why = list(reparametrized())[case]
    pruner = LevelPruner([{"sparsity": 0.5}])(nn.Sequential(nn.Linear(3, 3), layer))
    assert [row.name for row in pruner.report.rows] == ["0.weight"]
    (skipped,) = pruner.skipped
    assert (skipped.name, skipped.op_type) == ("1.weight", "Linear")
    assert why in skipped.reason
    with pytest.raises(PruneError, match=rf"'weight' \(Linear\) is left alone: .*{why}"):
        LevelPruner([{"sparsity": 0.5}])(layer)


def test_types_that_cannot_be_pruned_are_left_alone():
    class Sharded(torch.Tensor):
        pass

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64), nn.Linear(2, 2))
    model[2].weight = nn.Parameter(torch.randn(2, 2).as_subclass(Sharded))
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    assert [row.name for row in pruner.report.rows] == ["0.weight"]
    assert {s.name: s.reason.split(";")[0] for s in pruner.skipped} == {
        "1.weight": "its type is torch.complex64",
        "2.weight": "it is a Sharded, not a plain tensor",
    }


def test_a_tied_weight_is_its_matrix_product_s():
    (weight,) = find(Tied())[0]
    assert weight.op_types == ("Gemm", "MatMul", "Embedding", "Linear")
    assert weight.name == "embedding.weight"


@pytest.mark.parametrize("gates", [4, 3])
def test_ties_go_by_the_operator_s_order_of_gates(gates):
    model = (nn.LSTM if gates == 4 else nn.GRU)(1, 2)
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(1)
    LevelPruner([{"sparsity": 1 / gates, "op_types": "default"}])(model)
    lost = (model.weight_ih_l0.detach().numpy() == 0).reshape(gates, 2)
    first = 0 if gates == 4 else 1  # input gate; update gate
    assert np.array_equal(lost.all(1), np.arange(gates) == first)
