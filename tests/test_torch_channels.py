"""Channels and heads of torch modules: held while training, exported smaller, and cut out of the live module."""

from __future__ import annotations

import copy
import itertools
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnxprune.converters.torch import AGPPruner, LevelPruner, bind, shrinking
from onnxprune.converters.torch import recorded as sizes
from torch import nn, optim
from torch_channel_nets import (
    NETS,
    RECORDED,
    SEQ,
    SHAPES,
    Constant,
    HardWired,
    Residual,
    Sequence,
    build,
    heads,
    images,
    plain,
)
from torch_nets import make

import onnxprune
from onnxprune import PruneError
from onnxprune.runtime.session import open_session

HALF = [{"sparsity": 0.5, "op_types": "default", "pattern": "channel"}]


def train(net, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        result = net(x)
        nn.functional.cross_entropy(result, torch.arange(len(x)) % result.shape[1]).backward()
        optimizer.step()


def evaluated(net, x):
    modes = [(m, m.training) for m in net.modules()]
    with torch.no_grad():
        y = net.eval()(x)
    for module, mode in modes:
        module.training = mode
    return y


def snapshot(net):
    recorded = {
        (path, key): value
        for path, module in net.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (int, tuple)) and not isinstance(value, bool)
    }
    return {k: v.clone() for k, v in net.state_dict().items()}, recorded


def close(a, b, allowed=1e-5):
    assert (a - b).abs().max() <= allowed * a.abs().max()


# ------------------------------------------------------------ masks


SLOW = {"gru", "group norm"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in NETS])
def test_held_exported_and_cut_out_of_the_live_module(name, tmp_path):
    net, x, groups = build(name)
    pruner = LevelPruner(HALF)(net, x, align=1)
    optimizer = optim.AdamW(net.parameters(), 1e-2)
    assert {g.name: (g.size, g.kept) for g in pruner.report.groups} == groups
    train(net, optimizer, x)
    stored = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for key, mask in pruner.masks.items():
        if "running" not in key:
            assert not stored[key].detach().numpy()[~mask].any(), key
    masked = evaluated(net, x)
    before = sum(p.numel() for p in net.parameters())
    # The file is smaller, and the same function.
    pruner.export(tmp_path / "small.onnx")
    session = open_session(tmp_path / "small.onnx")
    close(masked, torch.from_numpy(session.run({session.inputs[0].name: x.numpy()})[0]))
    file = onnx.load(tmp_path / "small.onnx").graph.initializer
    assert sum(int(np.prod(t.dims)) for t in file) < 0.75 * before
    # The live module: smaller, the same function, and it goes on training.
    done = pruner.shrink(optimizer)
    assert (done.before, done.after) == (before, sum(p.numel() for p in net.parameters()))
    assert {g.name: (g.size, g.kept) for g in done.groups} == groups
    assert done.difference < 1e-5
    close(masked, evaluated(net, x))
    state = net.state_dict()
    assert {key: tuple(state[key].shape) for key in SHAPES[name]} == SHAPES[name]
    for path, attributes in RECORDED[name].items():
        assert {key: getattr(net.get_submodule(path), key) for key in attributes} == attributes, path
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(net, optimizer, x)
    assert set(map(id, net.parameters())) == {id(p) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("name", ["plain", "residual", pytest.param("gru", marks=pytest.mark.slow)])
def test_the_masks_are_those_of_the_file(name):
    net, x, _ = build(name)
    exported = bind(net, x).pull()
    file = onnxprune.prune(exported, HALF, keep_shape=True, align=1)
    pruner = LevelPruner(HALF)(net, x, align=1)
    ours = dict(pruner.masks)
    assert set(ours) == set(file.masks) & set(net.state_dict())
    for key, mask in ours.items():  # a vector that the file has a copy of for each reader is one in the module
        copies = [m for k, m in file.masks.items() if k == key or (k.rpartition("_")[0] == key and k not in ours)]
        assert np.array_equal(mask, np.logical_and.reduce(copies)), key


def test_agp_raises_the_share_and_is_resumed():
    config = [{"final_sparsity": 0.75, "start_epoch": 0, "end_epoch": 4, "pattern": "channel"}]
    net, x, _ = build("residual")
    pruner = AGPPruner(config)(net, x, align=1)
    optimizer = optim.SGD(net.parameters(), 0.01, momentum=0.9)
    left, masks = [], []
    for epoch in range(1, 5):
        train(net, optimizer, x, 1)
        pruner.update_epoch(epoch)
        left.append([g.kept for g in pruner.report.groups])
        masks.append(dict(pruner.masks))
        if epoch == 2:
            saved, weights = pruner.state_dict(), copy.deepcopy(net.state_dict())
            with pytest.raises(PruneError, match="schedule is not at its end"):
                pruner.shrink()
    assert left == [[10, 19], [6, 11], [5, 9], [4, 8]]
    for earlier, later in itertools.pairwise(masks):
        assert all((later[key] <= mask).all() for key, mask in earlier.items())
    again = Residual()
    again.load_state_dict(weights)
    resumed = AGPPruner(config)
    resumed.load_state_dict(saved)
    resumed(again, x, align=1)
    assert [g.kept for g in resumed.report.groups] == [6, 11]
    resumed.update_epoch(4)
    assert [g.kept for g in resumed.report.groups] == [4, 8]
    pruner.shrink(optimizer)
    pruner.update_epoch(9)  # the schedule is over
    assert net.stem.weight.shape == (4, 3, 3, 3)


def test_channels_beside_single_entries_stay_held_at_the_smaller_size(tmp_path):
    net, x, _ = build("plain")
    config = [
        {"sparsity": 0.8, "op_types": ["Linear"]},
        {"sparsity": 0.5, "op_types": ["Conv2d"], "pattern": "channel"},
    ]
    pruner = LevelPruner(config)(net, x, align=1)
    assert [(g.name, g.size, g.kept) for g in pruner.report.groups] == [("0.weight", 8, 4)]
    assert int((net[7].weight == 0).sum()) == 48
    columns = (net[5].weight == 0).all(0).view(8, 9).all(1)
    assert int(columns.sum()) >= 4
    optimizer = optim.SGD(net.parameters(), 0.1, momentum=0.9)
    train(net, optimizer, x)
    pruner.shrink(optimizer)
    zeros = {key: (net.get_parameter(key) == 0).clone() for key in ("5.weight", "7.weight")}
    assert pruner.sparsity == pytest.approx(sum(int(z.sum()) for z in zeros.values()) / (12 * 36 + 60))
    train(net, optimizer, x)
    assert all(net.get_parameter(key)[zero].abs().sum() == 0 for key, zero in zeros.items())
    done = pruner.export(tmp_path / "small.onnx")
    assert done.sparsity == pytest.approx(pruner.sparsity)


def test_scores_follow_the_live_batch_norm():
    """Its scale is no weight in a role: the graph's copy of it is refreshed."""
    net, x, _ = build("plain")
    pruner = AGPPruner([{"final_sparsity": 0.5, "end_epoch": 1, "pattern": "channel", "score": "bn_scale"}])(net, x)
    pruner._channels.align = 1
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([5.0, 1, 6, 2, 7, 3, 8, 4]))
    pruner.update_epoch(1)
    assert pruner.masks["1.weight"].tolist() == [True, False] * 4


def test_without_a_graph_channels_are_refused():
    with pytest.raises(PruneError, match=r"need the graph.*example_inputs"):
        LevelPruner(HALF)(plain())
    net = plain()
    with pytest.raises(PruneError, match="no channels to cut out"):
        LevelPruner([{"sparsity": 0.5}])(net, images()).shrink()


# ------------------------------------------------------------ heads


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "bert",
            {
                "encoder.layer.0.attention.self": {
                    "num_attention_heads": 2,
                    "attention_head_size": 4,
                    "all_head_size": 8,
                }
            },
        ),
        pytest.param(
            "llama", {"layers.0.self_attn": {"head_dim": 4, "num_key_value_groups": 2}}, marks=pytest.mark.slow
        ),
    ],
)
def test_heads_of_transformers(kind, expected, tmp_path):
    torch.manual_seed(0)
    net = heads(kind)
    x = torch.randint(0, 30, (2, 7))
    pruner = LevelPruner([{"sparsity": 0.5, "pattern": "head"}])(net, (x,), align=1)
    [group] = pruner.report.groups
    assert (group.size, group.kept, group.heads) == ((4, 2, True) if kind == "bert" else (2, 1, True))
    before = evaluated(net, x).last_hidden_state
    optimizer = optim.Adam(net.parameters(), 1e-3)
    net(x).last_hidden_state.square().mean().backward()
    pruner.shrink(optimizer)
    close(before, evaluated(net, x).last_hidden_state)
    for path, attributes in expected.items():
        assert {key: getattr(net.get_submodule(path), key) for key in attributes} == attributes
    net(x).last_hidden_state.square().mean().backward()
    optimizer.step()


def test_torchs_own_attention_is_refused_by_name_and_left_as_it_was(tmp_path):
    net, x = make("attention")
    pruner = LevelPruner([{"sparsity": 0.5, "pattern": "head"}])(net, x)
    state, recorded = snapshot(net)
    optimizer = optim.SGD(net.parameters(), 0.1)
    params = list(net.parameters())
    with pytest.raises(PruneError, match=r"module 'attention' \(MultiheadAttention\).*embed_dim.*Exclude it"):
        pruner.shrink(optimizer)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert snapshot(net)[1] == recorded
    assert all(a is b for a, b in zip(params, net.parameters(), strict=True))
    pruner.export(tmp_path / "small.onnx")  # in a file it can be smaller
    small = {tuple(t.dims) for t in onnx.load(tmp_path / "small.onnx").graph.initializer}
    assert (8, 12) in small


# ------------------------------------------------------------ binding.shrink


@pytest.mark.parametrize(
    ("make_optimizer", "kept"),
    [
        (lambda p: optim.SGD(p, 0.05, momentum=0.9), ["momentum_buffer"]),
        pytest.param(
            lambda p: optim.Adam(p, 1e-3, eps=0.01, amsgrad=True),
            ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
            marks=pytest.mark.slow,
        ),
        (lambda p: optim.AdamW(p, 1e-3, eps=0.01), ["exp_avg", "exp_avg_sq"]),
    ],
    ids=["sgd", "adam", "adamw"],
)
def test_training_goes_on_as_if_nothing_had_happened(make_optimizer, kept):
    """A masked step and a step of the smaller net, from the same state of the optimizer, end at the same values."""
    net, x, _ = build("residual")
    net.norm = nn.Identity()
    pruner = LevelPruner(HALF)(net, x, align=1)
    optimizer = make_optimizer(net.parameters())
    train(net, optimizer, x)
    twin = copy.deepcopy(net)
    held = LevelPruner(HALF)(twin, x, align=1)
    other = make_optimizer(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert held.masks == pruner.masks
    masks = dict(pruner.masks)
    binding = bind(net, x)
    binding.shrink(net, optimizer=optimizer)
    for name, parameter in net.named_parameters():
        assert [key for key in kept if optimizer.state[parameter][key].shape == parameter.shape] == kept, name
    pruner.remove()
    train(net, optimizer, x)
    train(twin, other, x)
    large = dict(twin.named_parameters())
    for name, parameter in net.named_parameters():
        whole = large[name].detach()
        wanted = whole[torch.from_numpy(masks[name])].view(parameter.shape) if name in masks else whole
        assert torch.allclose(parameter.detach(), wanted, rtol=1e-4, atol=1e-6), name
    close(evaluated(twin, x), evaluated(net, x), 1e-4)


def test_zeros_of_any_origin_are_enough_and_one_channel_stays():
    net, x, _ = build("plain")
    with torch.no_grad():
        for value in (net[0].weight, net[0].bias, net[1].weight, net[1].bias):
            value.zero_()
        net[5].weight.zero_()
        net[5].bias[:3] = 0
        net[7].weight[:, :5] = 0
    before = evaluated(net, x)
    done = bind(net, x).shrink()
    assert [(g.name, g.kept) for g in done.groups] == [("0.weight", 1), ("5.weight", 9)]
    close(before, evaluated(net, x))


@pytest.mark.parametrize(
    ("net", "x", "match"),
    [
        (
            HardWired(),
            images(),
            r"module 'body' \(Flat\), where it calls 'body.fc', does not run.*x.flatten\(1\).*exclude",
        ),
        (Constant(), images(4, 3), r"computes something else|does not run"),
    ],
    ids=["view", "constant"],
)
def test_code_that_knows_a_size_is_refused_and_everything_put_back(net, x, match):
    pruner = LevelPruner(HALF)(net, x, align=1)
    optimizer = optim.Adam(net.parameters())
    train(net, optimizer, x, 1)
    state, recorded = snapshot(net)
    params, moments = list(net.parameters()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(PruneError, match=match):
        pruner.shrink(optimizer)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert snapshot(net)[1] == recorded
    assert all(a is b for a, b in zip(params, net.parameters(), strict=True))
    assert str(optimizer.state_dict()) == str(moments)
    train(net, optimizer, x, 1)


def test_an_optimizer_whose_state_has_another_layout_is_refused():
    net, x, _ = build("plain")
    pruner = LevelPruner(HALF)(net, x, align=1)
    optimizer = optim.Adafactor(net.parameters())
    train(net, optimizer, x, 1)
    with pytest.raises(PruneError, match=r"Adafactor.*shrink without optimizer"):
        pruner.shrink(optimizer)
    assert net[0].weight.shape == (8, 3, 3, 3)


@pytest.mark.slow
def test_layers_of_one_module_that_differ_are_refused():
    torch.manual_seed(0)
    net, x = Sequence(nn.LSTM, num_layers=2, bidirectional=True), images(*SEQ)
    with torch.no_grad():
        for name, value in net.rnn.named_parameters():
            if "l1" in name:
                value.view(4, 12, -1)[:, :3] = 0
            if name.startswith("weight_hh_l1"):
                value[:, :3] = 0
        net.fc.weight[:, :3] = 0
        net.fc.weight[:, 12:15] = 0
    with pytest.raises(PruneError, match=r"'rnn' \(LSTM\) has one hidden_size.*\[9, 12\]"):
        bind(net, x).shrink()


# ------------------------------------------------------------ seeded bugs


def test_wrong_positions_are_seen(monkeypatch):
    """Were other columns to go than the graph says, the module would compute something else."""
    net, x, _ = build("plain")
    pruner = LevelPruner(HALF)(net, x, align=1)
    real = shrinking._kept

    def wrong(tensor, stays):
        return real(tensor, [np.roll(s, 1) if tensor.ndim == 2 and axis == 1 else s for axis, s in enumerate(stays)])

    monkeypatch.setattr(shrinking, "_kept", wrong)
    with pytest.raises(PruneError, match="computes something else"):
        pruner.shrink()
    assert net[0].weight.shape == (8, 3, 3, 3)


def test_forgotten_groups_are_seen(monkeypatch):
    net, x, _ = build("residual")
    pruner = LevelPruner(HALF)(net, x, align=1)
    monkeypatch.setattr(sizes, "_sizes", lambda *args: {})
    with pytest.raises(PruneError, match=r"the Residual, where it calls 'depth', does not run"):
        pruner.shrink()
    assert net.depth.weight.shape == (32, 1, 3, 3)
