"""Which channels go, and pruning them through the front door."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import AGPPruner, PruneError
from onnxprune.algorithms.allocate import ALLOCATIONS
from onnxprune.algorithms.pruner import Clock
from onnxprune.algorithms.scores import CHANNEL_SCORES
from onnxprune.config import load as load_config
from onnxprune.graph.model import load
from onnxprune.structure import explain, shrink
from onnxprune.structure.channels import Group, rounded
from onnxprune.structure.coupling import Member
from onnxprune.structure.plan import Plan

MODELS = Path(__file__).parents[1] / "models"
LENET, DATA = MODELS / "lenet5.onnx", MODELS / "mnist-test.npz"
HALF = [{"sparsity": 0.5, "op_types": "default", "pattern": "channel"}]


def residual(seed: int = 0, width: int = 16) -> onnx.ModelProto:
    """Conv, BatchNorm, Relu; a block of two with a residual sum; pooled into a Gemm."""
    rng = np.random.default_rng(seed)
    stored: dict[str, np.ndarray] = {}

    def w(name, *shape):
        stored[name] = rng.standard_normal(shape).astype(np.float32) * 0.3
        return name

    def bn(name, size):
        stored[f"{name}.var"] = rng.uniform(0.5, 2, size).astype(np.float32)
        return [w(f"{name}.scale", size), w(f"{name}.bias", size), w(f"{name}.mean", size), f"{name}.var"]

    nodes = [
        helper.make_node("Conv", ["x", w("stem", width, 3, 3, 3)], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("BatchNormalization", ["a", *bn("bn", width)], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", w("up", 2 * width, width, 1, 1), w("up.bias", 2 * width)], ["d"]),
        helper.make_node("Sigmoid", ["d"], ["e"]),
        helper.make_node("Conv", ["e", w("down", width, 2 * width, 3, 3)], ["f"], pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c", "f"], ["g"]),
        helper.make_node("GlobalAveragePool", ["g"], ["h"]),
        helper.make_node("Flatten", ["h"], ["i"]),
        helper.make_node("Gemm", ["i", w("fc", 5, width), w("fc.bias", 5)], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.dims) for t in model.graph.initializer}


# ------------------------------------------------------------------------------------------------------ front door


@pytest.mark.parametrize("seed", range(4))
def test_cut_and_zeroed_are_the_same_selection_and_function(seed):
    model = residual(seed)
    masked = onnxprune.prune(model, HALF, keep_shape=True, align=1)
    cut = onnxprune.prune(model, HALF, align=1)
    assert cut.masks == masked.masks
    assert cut.report.rows == masked.report.rows
    assert [(g.name, g.size, g.kept) for g in cut.report.groups] == [("stem", 16, 8), ("up", 32, 16)]
    assert cut.report.difference is not None
    assert cut.report.difference < 1e-5
    x = np.random.default_rng(seed).standard_normal((3, 3, 8, 8)).astype(np.float32)
    before, after = run(masked.to_proto(), x), run(cut.to_proto(), x)
    assert np.abs(before - after).max() <= 1e-5 * np.abs(before).max()
    assert shapes(masked.to_proto()) == shapes(model)
    found = shapes(cut.to_proto())
    assert (found["stem"], found["bn.var"], found["up"], found["down"], found["fc"]) == (
        (8, 3, 3, 3), (8,), (16, 8, 1, 1), (8, 16, 3, 3), (5, 8),
    )  # fmt: skip
    # What is left are the entries that the masks keep, in order.
    for tensor in cut.to_proto().graph.initializer:
        mask = cut.masks.get(tensor.name)
        whole = numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == tensor.name))
        if mask is not None:
            assert np.array_equal(whole[mask], numpy_helper.to_array(tensor).reshape(-1))


def test_dense_stays_dense():
    model = residual()
    cut = onnxprune.prune(model, [{"sparsity": 0.0, "pattern": "channel"}])
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    assert np.array_equal(run(model, x), run(cut.to_proto(), x))


def test_the_smaller_model_is_smaller(tmp_path):
    result = onnxprune.prune(LENET, HALF, tmp_path / "small.onnx", DATA, align=2)
    assert {g.name: (g.size, g.kept) for g in result.report.groups} == {
        "conv1.weight": (20, 10), "conv2.weight": (50, 24), "fc1.weight": (500, 250),
    }  # fmt: skip
    assert result.evaluation is not None
    assert (tmp_path / "small.onnx").stat().st_size < 0.3 * LENET.stat().st_size
    inputs, outputs = (
        [(v.name, v.type) for v in getattr(onnx.load(p).graph, k)] for p in (LENET,) for k in ("input", "output")
    )
    small = onnx.load(tmp_path / "small.onnx")
    assert [(v.name, v.type) for v in small.graph.input] == inputs
    assert [(v.name, v.type) for v in small.graph.output] == outputs


def test_a_seeded_bug_is_refused_and_nothing_is_written(tmp_path, monkeypatch):
    """The check of prune itself: were the wrong columns of a consumer to go, the outputs would differ."""
    from onnxprune.structure import shrink

    real = shrink.keep

    def wrong(array, alive):
        return real(array, [np.roll(a, 1) if array.ndim == 4 and i == 1 else a for i, a in enumerate(alive)])

    monkeypatch.setattr(shrink, "keep", wrong)
    with pytest.raises(PruneError, match="differs from the masked one"):
        onnxprune.prune(residual(), HALF, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
    onnxprune.prune(residual(), HALF, tmp_path / "out.onnx", verify=False)
    assert (tmp_path / "out.onnx").exists()


def test_agp_raises_the_share_and_nothing_returns():
    pruner = AGPPruner([{"final_sparsity": 0.75, "start_epoch": 0, "end_epoch": 4, "pattern": "channel"}])
    model = residual()
    kept = []
    masks = None
    for epoch in range(5):
        pruner.update_epoch(epoch)
        result = pruner.prune(model, keep_shape=True, align=1)
        kept.append([g.kept for g in result.report.groups])
        if masks is not None:
            assert all((result.masks[name] <= masks[name]).all() for name in masks)
        masks = result.masks
    assert kept == [[16, 32], [10, 19], [6, 11], [5, 9], [4, 8]]


def test_global_allocation_takes_where_it_costs_least():
    model = residual()
    for tensor in model.graph.initializer:
        if tensor.name == "up":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 100, "up"))
    result = onnxprune.prune(model, [{"sparsity": 0.3, "pattern": "channel", "allocation": "global"}], align=1)
    assert [g.kept for g in result.report.groups] == [16 - 1665 // 315, 32]  # 30 % of 5,552 entries, 315 a channel


@pytest.mark.parametrize("allocation", sorted(set(ALLOCATIONS) - {"sensitivity"}))
def test_shares_are_for_the_allocation_that_asks_for_them(allocation):
    config = load_config([{"sparsity": 0.5, "pattern": "channel", "allocation": allocation}])
    plan = Plan.of(load(residual()))
    plan.choose(config, Clock())
    alone = plan.removed
    plan.choose(config, Clock(), shares=dict.fromkeys(alone, 0.1))
    assert all(np.array_equal(plan.removed[name], gone) for name, gone in alone.items())


def test_at_least_a_tenth_stays():
    result = onnxprune.prune(residual(), [{"sparsity": 1.0, "pattern": "channel"}], align=1)
    assert [(g.size, g.kept) for g in result.report.groups] == [(16, 2), (32, 4)]


def test_channels_of_a_layer_that_is_left_out_stay():
    result = onnxprune.prune(residual(), [*HALF, {"op_names": ["down"], "exclude": True}], align=1)
    assert [g.name for g in result.report.groups] == ["up"]
    reasons = {s.name: s.reason for s in result.report.skipped}
    assert reasons["stem"] == "its channels are those of 'down', which the configuration leaves out"
    assert reasons["fc"] == "it reaches the graph output 'y'"


def test_channels_here_and_entries_there():
    config = [{"sparsity": 0.5, "op_types": ["Conv"], "pattern": "channel"}, {"sparsity": 0.8, "op_types": ["Gemm"]}]
    result = onnxprune.prune(residual(), config, align=1)
    fc = next(numpy_helper.to_array(t) for t in result.to_proto().graph.initializer if t.name == "fc")
    assert fc.shape == (5, 8)
    rows = {row.name: row for row in result.report.rows}
    assert rows["fc"].zeros == np.count_nonzero(~result.masks["fc"])
    assert np.count_nonzero(fc == 0) == np.count_nonzero(~result.masks["fc"]) - 5 * 8


def test_heads_only():
    with pytest.raises(PruneError, match="pattern 'heads' is not known"):
        onnxprune.prune(residual(), [{"sparsity": 0.5, "pattern": "heads"}])
    result = onnxprune.prune(residual(), [{"sparsity": 0.5, "pattern": "head"}])
    assert result.report.groups == ()
    assert result.sparsity == 0


def test_scores_are_checked_against_the_pattern():
    with pytest.raises(PruneError, match="score 'fpgm' with pattern 'unstructured'"):
        onnxprune.prune(LENET, [{"sparsity": 0.5, "score": "fpgm"}])
    with pytest.raises(PruneError, match="score 'wand' with pattern 'channel'"):
        onnxprune.prune(LENET, [{"sparsity": 0.5, "score": "wand", "pattern": "channel"}])


@pytest.mark.parametrize("score", ["magnitude", "l1", "l2", "fpgm", "bn_scale"])
def test_every_score_prunes(score):
    result = onnxprune.prune(residual(), [{"sparsity": 0.5, "score": score, "pattern": "channel"}], align=1)
    assert [g.kept for g in result.report.groups] == [8, 16]


def test_bn_scale_takes_the_smallest_scales():
    model = residual()
    scale = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "bn.scale")
    result = onnxprune.prune(model, [{"sparsity": 0.5, "score": "bn_scale", "pattern": "channel"}], align=1)
    stays = result.masks["bn.scale"]
    assert stays.sum() == 8
    assert np.abs(scale)[stays].min() > np.abs(scale)[~stays].max()


# ----------------------------------------------------------------------------------------------------------- scores


def l1(rows):
    return np.abs(rows).mean(1)


def l2(rows):
    return np.sqrt((rows**2).mean(1))


def fpgm(rows):
    return np.array([np.mean([np.linalg.norm(a - b) for b in rows]) for a in rows])


@pytest.mark.parametrize("name", ["l1", "l2", "fpgm"])
@pytest.mark.parametrize("shape", [(5, 3), (16, 300), (64, 1)])
def test_scores_are_what_their_papers_say(name, shape):
    rows = np.random.default_rng(0).standard_normal(shape)
    assert CHANNEL_SCORES[name](rows) == pytest.approx(globals()[name](rows), rel=1e-5)


@pytest.mark.parametrize("name", sorted(CHANNEL_SCORES))
@pytest.mark.parametrize("seed", range(5))
def test_scores_do_not_depend_on_the_order_of_entries(name, seed):
    """Front ends keep the same filter in different orders: the sums are exact, so that the last bit agrees."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((20, 577)) * 10.0 ** rng.uniform(-2 * seed, 0, (20, 577))
    rows = rows.astype(np.float32)
    order = rng.permutation(577)
    assert np.array_equal(CHANNEL_SCORES[name](rows), CHANNEL_SCORES[name](rows[:, order]))
    strided = np.asfortranarray(rows)
    assert np.array_equal(CHANNEL_SCORES[name](rows), CHANNEL_SCORES[name](strided))


def test_scores_of_nothing():
    for score in CHANNEL_SCORES.values():
        assert np.array_equal(score(np.zeros((3, 4), np.float32)), np.zeros(3))


# -------------------------------------------------------------------------------------------------------- alignment


def group(size: int, width: int = 1) -> Group:
    places = np.arange(size * width).reshape(size, width)
    return Group("w", np.arange(size), (Member("w", 0, "output", places),))


@pytest.mark.parametrize(
    ("size", "width", "wanted", "align", "stay"),
    [
        (64, 1, 32, 16, 32),
        (64, 1, 40, 16, 32),  # down: never more work than asked
        (64, 1, 63, 16, 48),
        (64, 1, 64, 16, 64),  # nothing was to go
        (20, 1, 10, 16, 8),  # a multiple of 16 would leave nothing
        (20, 1, 7, 16, 4),
        (5, 1, 3, 16, 2),
        (3, 1, 1, 16, 1),
        (100, 1, 3, 16, 10),  # a tenth stays
        (12, 64, 6, 16, 6),  # heads of 64 suit any count
        (12, 8, 7, 16, 6),
        (64, 1, 40, 1, 40),
    ],
)
def test_counts_suit_the_kernels(size, width, wanted, align, stay):
    score = np.arange(size, dtype=float)
    removed = score < size - wanted
    assert (~rounded(group(size, width), removed, score, align, None)).nonzero()[0].tolist() == list(
        range(size - stay, size)
    )


def test_what_was_held_goes_first():
    score = np.arange(8, dtype=float)
    held = np.zeros(8, np.bool_)
    held[7] = True
    assert rounded(group(8), score < 3, score, 1, held).nonzero()[0].tolist() == [0, 1, 7]


# ----------------------------------------------------------------------------------------------------- command line


def cli(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "onnxprune", *map(str, arguments)], capture_output=True, text=True)


def test_the_commands_of_the_readme(tmp_path):
    small, masked = tmp_path / "small.onnx", tmp_path / "masked.onnx"
    common = ("--pattern", "channel", "--sparsity", "0.5", "--json", "--no-benchmark")
    first = cli("prune", LENET, "-o", small, *common)
    second = cli("prune", LENET, "-o", masked, *common, "--keep-shape")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    a, b = json.loads(first.stdout)["report"], json.loads(second.stdout)["report"]
    assert a["groups"] == b["groups"]
    assert a["difference"] < 1e-5
    assert b["difference"] is None
    assert shapes(onnx.load(masked)).items() >= shapes(onnx.load(LENET)).items()
    assert shapes(onnx.load(small))["conv1.weight"] == (a["groups"][0]["kept"], 1, 5, 5)
    found = json.loads(cli("explain", LENET, "--json").stdout)
    assert [(g["name"], g["size"]) for g in found["groups"]] == [
        ("conv1.weight", 20),
        ("conv2.weight", 50),
        ("fc1.weight", 500),
    ]
    assert found["pinned"] == [
        {"name": "fc2.weight", "op_type": "Gemm", "outputs": 10, "reason": "it reaches the graph output 'logits'"}
    ]
    assert "it reaches the graph output 'logits'" in " ".join(cli("explain", LENET).stdout.split())


def test_align_is_checked():
    refused = cli("prune", LENET, "-o", "x.onnx", "--pattern", "channel", "--sparsity", "0.5", "--align", "some")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --align is 'some'; expected auto or a number")


# ------------------------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("seed", range(5))
def test_any_decision_can_be_cut(seed):
    """Not only the one that scores make: whatever goes, the cut model computes what the zeroed one does."""
    plan = Plan.of(load(residual(seed)))
    rng = np.random.default_rng(seed)
    plan.removed = {g.name: rng.random(g.size) < rng.random() for g in plan.coupling.groups}
    for gone in plan.removed.values():
        gone[rng.integers(gone.size)] = False
    from onnxprune.structure import shrink

    plan.zero(shrink.kept(plan.coupling, plan.removed))
    assert plan.check(plan.cut()) < 1e-5


@pytest.mark.parametrize("empty", [(), (3,), (0, 1, 5), range(16)], ids=str)
def test_channels_of_which_nothing_is_left(empty):
    """One always stays; where nothing is told of any tensor, all do."""
    coupling = Plan.of(load(residual())).coupling
    whole = {t.name: np.ones(tuple(t.dims), np.bool_) for t in coupling.model.proto.graph.initializer}

    def live(name):
        left = whole[name].copy()
        if name in ("stem", "down") or name.startswith("bn."):
            left[list(empty)] = False
        if name in ("up", "fc"):
            left[:, list(empty)] = False
        return left

    wanted = [c in empty and c != 0 if len(empty) == 16 else c in empty for c in range(16)]
    assert shrink.gone(coupling, live)["stem"].tolist() == wanted
    for found in (shrink.gone(coupling, live), shrink.gone(coupling, lambda name: None)):
        assert not found["up"].any()
    assert not shrink.gone(coupling, lambda name: None)["stem"].any()


def test_explain_names_members_and_roles():
    found = explain(residual())
    assert [(g.name, g.size, g.width, g.heads) for g in found.groups] == [("stem", 16, 1, False), ("up", 32, 1, False)]
    assert {(m.name, m.axis, m.role) for m in found.groups[0].members} == {
        ("stem", 0, "output"), ("down", 0, "output"), ("up", 1, "input"), ("fc", 1, "input"),
        *((f"bn.{what}", 0, "parameter") for what in ("scale", "bias", "mean", "var")),
    }  # fmt: skip
    assert [(p.name, p.outputs) for p in found.pinned] == [("fc", 5)]


# ----------------------------------------------------------------------------------------------------------- inexact


NORMS = {
    "layer norm": "n = LayerNormalization<axis=-1>(h, s, t)",
    "layer norm by hand": "m = ReduceMean<axes=[-1]>(h) c = Sub(h, m) q = Mul(c, c) v = ReduceMean<axes=[-1]>(q) "
    "e = Sqrt(v) d = Div(c, e) f = Mul(d, s) n = Add(f, t)",
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_over_channels_lose_some_where_that_is_asked_for(name):
    """What comes out is the norm over what is left: as numpy computes it."""
    text = f"g (float[N,6] x) => (float[N,4] y) {{h = MatMul(x, a) {NORMS[name]} y = MatMul(n, b)}}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    rng = np.random.default_rng(0)
    arrays = {
        k: rng.standard_normal(s).astype(np.float32) for k, s in {"a": (6, 8), "b": (8, 4), "s": 8, "t": 8}.items()
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
    exact = onnxprune.prune(model, HALF, align=1)
    assert exact.report.groups == ()
    assert any("axis 1" in s.reason for s in exact.report.skipped)
    result = onnxprune.prune(model, HALF, align=1, inexact=True)
    assert [(g.name, g.size, g.kept) for g in result.report.groups] == [("a", 8, 4)]
    assert result.report.difference is None  # it computes something else: the check says nothing
    stays = result.masks["a"].any(0)
    x = rng.standard_normal((3, 6)).astype(np.float32)
    h = x @ arrays["a"][:, stays]
    centred = h - h.mean(1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5 * (name == "layer norm"))
    wanted = (normal * arrays["s"][stays] + arrays["t"][stays]) @ arrays["b"][stays]
    assert run(result.to_proto(), x) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("form", ["whole", "by hand"])
def test_group_norms_lose_as_many_channels_of_every_group_where_that_is_asked_for(form):
    """Exactly, a group goes as a whole; else what comes out is the norm over what is left of each group."""
    norm = {
        "whole": "n = GroupNormalization<num_groups = 2>(h, s, t)",
        "by hand": "g = Reshape(h, parts) i = InstanceNormalization(g, one, nought) u = Reshape(i, whole) "
        "s3 = Unsqueeze(s, two) t3 = Unsqueeze(t, two) d = Mul(u, s3) n = Add(d, t3)",
    }[form]
    text = f"g (float[N,3,5] x) => (float[N,2,5] y) {{h = Conv(x, a) {norm} y = Conv(n, b)}}"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 21]> {text}')
    rng = np.random.default_rng(0)
    sizes = {"a": (16, 3, 1), "b": (2, 16, 1), "s": 16, "t": 16}
    arrays = {k: rng.standard_normal(s).astype(np.float32) for k, s in sizes.items()}
    shapes = {"parts": np.array([0, 2, -1]), "whole": np.array([-1, 16, 5]), "two": np.array([1])}
    fills = {"one": np.ones(2, np.float32), "nought": np.zeros(2, np.float32)}
    stored = arrays | (shapes | fills if form == "by hand" else {})
    model.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in stored.items())
    exact = onnxprune.prune(model, HALF, align=1)
    assert [(g.size, g.width, g.kept) for g in exact.report.groups] == [(2, 8, 1)]
    result = onnxprune.prune(model, HALF, align=1, inexact=True)
    assert [(g.size, g.width, g.kept) for g in result.report.groups] == [(8, 2, 4)]
    stays = result.masks["a"].any((1, 2))
    assert (stays.reshape(2, 8).sum(1) == 4).all()
    x = rng.standard_normal((3, 3, 5)).astype(np.float32)
    h = np.einsum("oi,nit->not", arrays["a"][stays, :, 0], x).reshape(3, 2, -1)
    h = ((h - h.mean(2, keepdims=True)) / np.sqrt(h.var(2, keepdims=True) + 1e-5)).reshape(3, 8, 5)
    wanted = np.einsum("oc,nct->not", arrays["b"][:, stays, 0], h * arrays["s"][stays, None] + arrays["t"][stays, None])
    assert run(result.to_proto(), x) == pytest.approx(wanted, rel=1e-4, abs=1e-5)
