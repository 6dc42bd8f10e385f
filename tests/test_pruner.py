"""The three pruners on files: against brute force, literal values and each other."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxprune import AGPPruner, LevelPruner, PruneError, SensitivityPruner, prune
from onnxprune.algorithms import allocate, cuts
from onnxprune.algorithms.pruner import Clock, decide, decisions, target
from onnxprune.config import load
from onnxprune.graph.model import load as load_model
from onnxprune.graph.weights import find


def net(seed: int = 0, ties: bool = False) -> onnx.ModelProto:
    """Conv -> MatMul -> Gemm on (N, 3, 8, 8); weights conv.weight, mm.weight, fc.weight."""
    rng = np.random.default_rng(seed)
    arrays = {
        "conv.weight": rng.normal(size=(6, 3, 3, 3)),
        "conv.bias": rng.normal(size=6),
        "mm.weight": rng.normal(size=(216, 40)) * 0.1,
        "fc.weight": rng.normal(size=(10, 40)) * 3,
    }
    if ties:
        arrays = {name: np.round(array) for name, array in arrays.items()}
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], name="conv"),
        helper.make_node("Flatten", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "mm.weight"], ["c"], name="mm"),
        helper.make_node("Relu", ["c"], ["d"]),
        helper.make_node("Gemm", ["d", "fc.weight"], ["y"], transB=1, name="fc"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def arrays(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.83, 1.0])
def test_level_removes_the_smallest_of_each(seed, ties, sparsity):
    dense = arrays(net(seed, ties))
    result = prune(net(seed, ties), [{"sparsity": sparsity, "op_types": "default"}])
    pruned = arrays(result.to_proto())
    for name, axes in {"conv.weight": (0, 1, 2, 3), "mm.weight": (1, 0), "fc.weight": (0, 1)}.items():
        role = dense[name].transpose(axes)
        expected = np.ones(role.size, bool)
        expected[np.argsort(np.abs(role).reshape(-1), kind="stable")[: int(role.size * sparsity)]] = False
        keep = expected.reshape(role.shape).transpose(np.argsort(axes))
        assert np.array_equal(result.masks[name], keep)
        assert np.array_equal(pruned[name], np.where(keep, dense[name], np.float32(0)))
        assert not np.signbit(pruned[name][~keep]).any()
    assert np.array_equal(pruned["conv.bias"], dense["conv.bias"])


def test_ties_go_by_output_then_input_whatever_the_layout():
    model = net()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(np.ones(tuple(tensor.dims), np.float32), tensor.name))
    masks = prune(model, [{"sparsity": 0.5}]).masks
    assert not masks["fc.weight"][:5].any()  # stored (output, input)
    assert masks["fc.weight"][5:].all()
    assert not masks["mm.weight"][:, :20].any()  # stored (input, output): the same outputs go
    assert masks["mm.weight"][:, 20:].all()


def test_the_input_is_never_changed():
    model = net()
    before = model.SerializeToString()
    prune(model, [{"sparsity": 0.9}])
    assert model.SerializeToString() == before


AGP = [
    {
        "initial_sparsity": 0,
        "final_sparsity": 0.8,
        "start_epoch": 1,
        "end_epoch": 10,
        "frequency": 1,
        "op_types": "default",
    }
]


@pytest.mark.parametrize("epoch", range(0, 13))
def test_agp_is_level_at_the_schedules_sparsity(epoch):
    share = 0.0 if epoch < 1 else 0.8 * (1 - (1 - min(epoch - 1, 9) / 9) ** 3)
    agp = AGPPruner(AGP).prune(net(), epoch=epoch)
    level = prune(net(), [{"sparsity": share, "op_types": "default"}])
    assert agp.masks == level.masks


def test_agp_by_epoch_by_update_and_by_function_are_one():
    pruner = AGPPruner(AGP)
    pruner.update_epoch(4)
    assert pruner.prune(net()).masks == AGPPruner(AGP).prune(net(), epoch=4).masks
    assert pruner.prune(net()).masks == prune(net(), AGP, pruner="agp", epoch=4).masks
    assert (
        prune(net(), AGPPruner(AGP), epoch=4).masks
        == prune(net(), {"pruner": "agp", "config_list": AGP}, epoch=4).masks
    )


def test_without_an_epoch_a_schedule_is_at_its_end():
    assert AGPPruner(AGP).prune(net()).masks == LevelPruner([{"sparsity": 0.8}]).prune(net()).masks


@pytest.mark.parametrize(
    ("kind", "entries"), [(AGPPruner, AGP), (SensitivityPruner, [{"sparsity": 0.8, "start_epoch": 1, "end_epoch": 10}])]
)
def test_a_pruned_weight_never_returns(kind, entries):
    pruner = kind(entries)
    removed = None
    for epoch in range(1, 12):
        pruner.update_epoch(epoch)
        result = pruner.prune(net(seed=epoch))  # every epoch another model: all magnitudes change
        gone = {name: ~mask for name, mask in result.masks.items()}
        total = sum(g.sum() for g in gone.values())
        assert removed is None or all((gone[name] >= removed[name]).all() for name in gone)
        assert total >= (0 if removed is None else sum(g.sum() for g in removed.values()))
        removed = gone
    assert total / sum(g.size for g in removed.values()) == pytest.approx(0.8, abs=1e-3)


def test_schedules_in_optimizer_steps():
    entries = [{"final_sparsity": 0.6, "start_step": 100, "end_step": 300, "frequency": 50}]
    pruner = AGPPruner(entries)
    pruner.step(260)
    expected = 0.6 * (1 - (1 - 150 / 200) ** 3)
    assert pruner.prune(net()).masks == prune(net(), [{"sparsity": expected}]).masks
    assert AGPPruner(entries).prune(net(), step=260).masks == prune(net(), [{"sparsity": expected}]).masks
    entry = pruner.config.entries[0]
    assert [target(entry, Clock(step=s)) for s in (99, 100, 300, 999)] == [None, 0.0, 0.6, 0.6]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.95, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_sensitivity_reaches_the_total_with_one_quality(sparsity, seed):
    result = prune(net(seed), [{"sparsity": sparsity}], pruner="sensitivity")
    dense = {name: a.astype(np.float64) for name, a in arrays(net(seed)).items() if name in result.masks}
    total = sum(a.size for a in dense.values())
    assert sum(int((~m).sum()) for m in result.masks.values()) == int(total * sparsity)
    gone = [np.abs(a[~result.masks[n]]).max(initial=0) / a.std() for n, a in dense.items()]
    kept = [np.abs(a[result.masks[n]]).min(initial=np.inf) / a.std() for n, a in dense.items()]
    assert max(gone) <= min(kept) * (1 + 1e-4)  # one quality separates what goes from what stays, in every weight


@pytest.mark.parametrize("quality", [0.0, 0.5, 1.3])
def test_quality_is_the_factor_of_the_standard_deviation(quality):
    result = prune(net(), [{"quality": quality}], pruner="sensitivity")
    for name, mask in result.masks.items():
        dense = arrays(net())[name].astype(np.float64)
        margin = np.abs(np.abs(dense) - quality * dense.std()) > 1e-5
        assert np.array_equal(mask[margin], (np.abs(dense) >= quality * dense.std())[margin])


def test_a_measured_factor_lowers_the_threshold_of_its_weight():
    weights = find(load_model(net()))[0]
    config = load([{"quality": 1.0}], pruner="sensitivity")
    plain = {name: int((~keep).sum()) for name, keep in decide(config, weights)[0].items()}
    spared = {
        name: int((~keep).sum()) for name, keep in decide(config, weights, factors={"fc.weight": 0.25})[0].items()
    }
    assert spared["fc.weight"] < plain["fc.weight"] / 3
    assert spared["conv.weight"] == plain["conv.weight"]


@pytest.mark.parametrize("pattern", ["unstructured", "block:2x2"])
@pytest.mark.parametrize("way", [decide, decisions])
def test_what_is_allocated_globally_is_decided_together(way, pattern):
    """The weight of the smallest values loses most."""
    weights = find(load_model(net()))[0]
    decided = way(load([{"sparsity": 0.5, "allocation": "global", "pattern": pattern}]), weights)[0]
    masks = decided if way is decide else {name: decision.kept() for name, decision in decided.items()}
    gone = {name: (~mask).mean() for name, mask in masks.items()}
    assert gone["mm.weight"] > 0.5 > 0.2 > gone["fc.weight"]


@pytest.mark.parametrize("allocation", ["uniform", "erk"])
@pytest.mark.parametrize("way", [decide, decisions])
def test_small_weights_beside_a_large_one(way, allocation, monkeypatch):
    """Two in threads, one in parallel itself: the same as one after the other."""
    weights = find(load_model(net()))[0]
    config = load([{"sparsity": 0.5, "allocation": allocation}])

    def masks():
        decided = way(config, weights)[0]
        return decided if way is decide else {name: decision.kept() for name, decision in decided.items()}

    alone = masks()
    for module in (allocate, cuts):
        monkeypatch.setattr(module, "THREADED", 401)
    assert sorted(weight.size for weight in weights) == [162, 400, 8640]
    assert all(np.array_equal(mask, alone[name]) for name, mask in masks().items())


def test_weights_without_norms_are_left_out_and_the_others_are_not():
    weights = find(load_model(net()))[0]
    config = load([{"sparsity": 0.5, "score": "wanda"}])
    norms = {weight.name: np.ones(weight.role_shape[1:]) for weight in weights}
    for name in norms:
        decided, skipped = decide(config, weights, norms={other: norms[other] for other in norms if other != name})
        assert (decided.keys(), skipped) == (norms.keys() - {name}, [])


def test_sensitivity_with_data_takes_more_from_what_does_not_matter():
    """mm's output is multiplied by zero, proj decides everything: mm loses nothing, so it gives more."""
    model = net()
    del model.graph.node[2:4]
    rng = np.random.default_rng(3)
    for name, array in {"proj.weight": rng.normal(size=(216, 40)), "zero": np.zeros(1)}.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    branch = [
        ("MatMul", ["b", "mm.weight"], ["c"]),
        ("Mul", ["c", "zero"], ["m"]),
        ("MatMul", ["b", "proj.weight"], ["p"]),
        ("Add", ["m", "p"], ["d"]),
    ]
    for place, (op, inputs, outputs) in enumerate(branch):
        model.graph.node.insert(2 + place, helper.make_node(op, inputs, outputs))
    data = {"x": rng.normal(size=(64, 3, 8, 8)).astype(np.float32)}
    measured = prune(model, [{"sparsity": 0.5}], pruner="sensitivity", data=data)
    plain = prune(model, [{"sparsity": 0.5}], pruner="sensitivity")
    removed = {name: [int((~r.masks[name]).sum()) for r in (measured, plain)] for name in plain.masks}
    assert (
        sum(m for m, _ in removed.values()) == sum(p for _, p in removed.values()) == int((162 + 2 * 8640 + 400) * 0.5)
    )
    assert removed["mm.weight"][0] > removed["mm.weight"][1]
    assert removed["proj.weight"][0] < removed["proj.weight"][1]


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "block:2x2", "block:4x1"])
@pytest.mark.parametrize("kind", ["level", "agp", "sensitivity"])
@pytest.mark.parametrize("allocation", ["uniform", "global", "erk"])
def test_everything_composes(pattern, kind, allocation):
    if kind == "sensitivity" and allocation != "global":
        pytest.skip("sensitivity allocates globally")
    entries = [{"sparsity": 0.5, "op_names": ["mm", "fc"]}]
    result = prune(net(), entries, pruner=kind, pattern=pattern, allocation=allocation)
    total = sum(m.size for m in result.masks.values())
    removed = sum(int((~m).sum()) for m in result.masks.values())
    assert total == 216 * 40 + 10 * 40
    if pattern[1] == ":" and allocation != "erk":
        assert removed == total // 2
    assert total * 0.4 < removed <= total // 2
    if pattern == "2:4":
        assert result.masks["mm.weight"].T.reshape(-1, 4).sum(1).min() >= 2  # along the input axis, stored first
        assert result.masks["fc.weight"].reshape(-1, 4).sum(1).min() >= 2  # along the input axis, stored last


def test_a_pattern_that_does_not_fit_is_said():
    result = prune(net(), [{"sparsity": 0.5, "pattern": "2:4"}])
    assert set(result.masks) == {"mm.weight", "fc.weight"}
    assert [(s.name, s.reason) for s in result.report.skipped] == [
        ("conv.weight", "pattern 2:4 does not fit: its 3 inputs are no multiple of 4")
    ]


def test_masks_of_another_model_are_refused():
    pruner = AGPPruner(AGP)
    pruner.update_epoch(5)
    pruner.prune(net())
    other = net()
    other.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((5, 3, 3, 3), np.float32), "conv.weight"))
    with pytest.raises(PruneError, match=r"'conv.weight' has the shape \[6, 3, 3, 3\], the weight \[5, 3, 3, 3\]"):
        pruner.prune(other)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    model = net()
    array = numpy_helper.to_array(model.graph.initializer[2]).copy()
    array[3, 4] = bad
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(array, "mm.weight"))
    with pytest.raises(
        PruneError, match=r"'mm.weight' \[216, 40\] \(MatMul\) holds 1 entries that are NaN or infinite"
    ):
        prune(model, [{"sparsity": 0.5}])
    assert set(prune(model, [{"sparsity": 0.5}, {"exclude": True, "op_names": "mm.weight"}]).masks) == {
        "conv.weight",
        "fc.weight",
    }
