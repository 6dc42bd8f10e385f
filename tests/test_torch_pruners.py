"""The pruners a torch user names: schedules, resuming, exporting, and NNI's published cases."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnxprune.converters import deploy
from onnxprune.converters import torch as bridge
from onnxprune.converters.torch import AGP_Pruner, AGPPruner, LevelPruner, SensitivityPruner
from torch import nn, optim
from torch_nets import Tied, lenet5, make

from onnxprune import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import load
from onnxprune.graph.weights import find
from onnxprune.runtime.session import open_session

AGP = [{"initial_sparsity": 0, "final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 10, "frequency": 1}]
X = torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 10


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def zeros(model):
    return {n: (p == 0).detach().numpy() for n, p in model.named_parameters() if p.ndim > 1}


# ------------------------------------------------------------ what NNI's users have written


class Mnist(nn.Module):
    """The net of NNI's tests."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 5, 5, 1), nn.BatchNorm2d(5)
        self.conv2, self.bn2 = nn.Conv2d(5, 10, 5, 1), nn.BatchNorm2d(10)
        self.fc1, self.fc2 = nn.Linear(4 * 4 * 10, 100), nn.Linear(100, 10)

    def forward(self, x):
        x = nn.functional.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2, 2)
        x = nn.functional.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2, 2)
        return self.fc2(torch.relu(self.fc1(x.view(-1, 4 * 4 * 10))))


def test_nni_level_half_of_conv_and_fc_after_a_train_step():
    torch.manual_seed(0)
    model = Mnist()
    optimizer = optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    config_list = [{"sparsity": 0.5, "op_types": ["Conv2d", "Linear"]}]
    LevelPruner(config_list)(model)
    nn.functional.cross_entropy(model(torch.randn(4, 1, 28, 28)), torch.tensor([1, 2, 3, 4])).backward()
    optimizer.step()
    for layer in (model.conv1, model.conv2, model.fc1, model.fc2):
        assert abs(int((layer.weight == 0).sum()) - 0.5 * layer.weight.numel()) <= 1


def test_nni_level_on_named_types_and_default():
    torch.manual_seed(0)
    model = Mnist()
    entries = [
        {"sparsity": 0.6, "op_types": ["default"]},
        {"sparsity": 0.4, "op_types": ["Conv2d"], "op_names": ["conv1"]},
    ]
    rows = {row.name: row for row in LevelPruner(entries)(model).report.rows}
    assert {n: r.zeros for n, r in rows.items()} == {
        "conv1.weight": 50,
        "conv2.weight": 750,
        "fc1.weight": 9600,
        "fc2.weight": 600,
    }


def test_nni_the_masked_sum_of_a_square_weight():
    layer = nn.Linear(10, 10, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[i + 0.1 * j for i in range(10)] for j in range(10)]))
    LevelPruner([{"sparsity": 0.9, "op_types": ["default"]}])(layer)
    assert layer(torch.ones(1, 10)).sum().item() == pytest.approx(94.5, abs=1e-5)


def test_the_code_of_the_documentation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, example_inputs = lenet5(), X
    optimizer = optim.AdamW(model.parameters(), 1e-2)

    config_list = [
        {
            "initial_sparsity": 0,
            "final_sparsity": 0.8,
            "start_epoch": 1,
            "end_epoch": 10,
            "frequency": 1,
            "op_types": "default",
        }
    ]
    pruner = AGPPruner(config_list)
    pruner(model)
    reached = []
    for epoch in range(1, 11):
        train(model, optimizer)
        pruner.update_epoch(epoch)
        reached.append(pruner.sparsity)
    pruner.export("pruned.onnx", example_inputs)

    expected = [0.8 - 0.8 * (1 - (epoch - 1) / 9) ** 3 for epoch in range(1, 11)]
    assert reached == pytest.approx(expected, abs=0.01)
    assert all(a <= b for a, b in itertools.pairwise(reached))
    assert AGP_Pruner is AGPPruner
    exported = {w.name: w for w in find(load("pruned.onnx"))[0]}
    assert sum(int((w.values() == 0).sum()) for w in exported.values()) == sum(row.zeros for row in pruner.report.rows)


# ------------------------------------------------------------ schedules and state


def test_with_example_inputs_the_same_masks():
    model, inputs = make("lenet5", ties=True)
    other = copy.deepcopy(model)
    one, two = LevelPruner([{"sparsity": 0.7}])(model), LevelPruner([{"sparsity": 0.7}])(other, inputs)
    assert one.masks == two.masks
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", [AGPPruner, SensitivityPruner])
def test_a_resumed_schedule_gives_the_masks_of_an_uninterrupted_one(kind, tmp_path):
    entry = {"initial_sparsity": 0.1, "start_epoch": 1, "end_epoch": 6, "frequency": 2}
    config = [{**entry, "final_sparsity": 0.9} if kind is AGPPruner else {**entry, "sparsity": 0.9}]

    def begin(seed):
        torch.manual_seed(seed)
        model = lenet5()
        model[7].p = 0.0
        return model, optim.AdamW(model.parameters(), 1e-2), kind(config)

    model, optimizer, pruner = begin(0)
    pruner(model)
    for epoch in range(1, 7):
        train(model, optimizer)
        pruner.update_epoch(epoch)
        if epoch == 3:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
            torch.save(state, tmp_path / "checkpoint.pt")
    for early in (False, True):
        twin, twin_optimizer, again = begin(1)
        state = torch.load(tmp_path / "checkpoint.pt")  # nothing in it but tensors and plain values
        if early:
            again.load_state_dict(state["pruner"])
            twin.load_state_dict(state["model"])
            again(twin)
        else:
            again(twin)
            twin.load_state_dict(state["model"])
            again.load_state_dict(state["pruner"])
        twin_optimizer.load_state_dict(state["optimizer"])
        for epoch in range(4, 7):
            train(twin, twin_optimizer)
            again.update_epoch(epoch)
        assert again.masks == pruner.masks
        assert pruner.sparsity == pytest.approx(0.9, abs=0.01)
        assert all(np.array_equal(a, zeros(twin)[n]) for n, a in zeros(model).items())


def test_schedules_in_steps():
    model = lenet5()
    pruner = AGPPruner([{"final_sparsity": 0.5, "start_step": 0, "end_step": 4, "frequency": 2}])(model)
    reached = []
    for _ in range(5):
        reached.append(pruner.sparsity)
        pruner.step()
    assert reached == pytest.approx([0, 0, 0.4375, 0.4375, 0.5], abs=0.02)


def test_state_of_another_model_is_refused():
    pruner = LevelPruner([{"sparsity": 0.5}])(lenet5())
    other = LevelPruner([{"sparsity": 0.5}])
    other.load_state_dict(pruner.state_dict())
    with pytest.raises(PruneError, match=r"mask for weight '0.weight' has the shape"):
        other(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(PruneError, match="no state_dict of a pruner"):
        other.load_state_dict({"weights": 1})


def test_remove_leaves_a_plain_model_with_zeros():
    torch.manual_seed(0)
    model = lenet5()
    pruner = AGPPruner(AGP)(model)
    pruner.update_epoch(10)
    before = zeros(model)
    pruner.remove()
    assert all(np.array_equal(mask, zeros(model)[name]) for name, mask in before.items())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())
    train(model, optim.SGD(model.parameters(), 0.1), 1)
    assert all(zeros(model)[name].sum() < mask.sum() for name, mask in before.items())
    values = copy.deepcopy(model.state_dict())
    pruner.update_epoch(11)
    assert all(torch.equal(values[key], value) for key, value in model.state_dict().items())


def test_calling_again_goes_on_and_calling_with_another_model_too():
    model = lenet5()
    pruner = AGPPruner(AGP)(model)
    pruner.update_epoch(5)
    masks = Masks(pruner.masks)
    pruner(model)
    assert pruner.masks == masks
    assert len(model[0].weight._post_accumulate_grad_hooks) == 1


# ------------------------------------------------------------ export


@pytest.mark.parametrize(
    "name",
    ["lenet5", "linear 3-d", "transposed 2d", "gru two-way", "lstm", "encoder", "tied", "attention, other widths"],
)
def test_the_exported_file_has_the_zeros_and_computes_the_same(name, tmp_path, capfd):
    model, inputs = make(name)
    model.train()
    pruner = LevelPruner([{"sparsity": 0.7}])(model)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        exported = pruner.export(tmp_path / "pruned.onnx", inputs)
    assert not seen
    assert capfd.readouterr() == ("", "")
    assert model.training
    assert os.listdir(tmp_path) == ["pruned.onnx"]
    assert (exported.path, exported.absent) == (tmp_path / "pruned.onnx", ())
    assert exported.difference < 1e-4
    assert exported.sparsity == pruner.sparsity == pytest.approx(0.7, abs=0.05)
    weights = find(load(tmp_path / "pruned.onnx"))[0]
    matrices = [w for w in weights if w.op_type != "Embedding"]
    count = sum(int((w.values() == 0).sum()) for w in matrices)
    assert count == exported.zeros == sum(row.zeros for row in pruner.report.rows)
    assert "onnxprune" in {p.key for p in onnx.load(tmp_path / "pruned.onnx").metadata_props}
    content = (tmp_path / "pruned.onnx").read_bytes()
    assert b"site-packages" not in content
    assert b"torch_nets" not in content
    session = open_session(tmp_path / "pruned.onnx")
    theirs = session.run({i.name: x.numpy() for i, x in zip(session.inputs, inputs, strict=True)})[0]
    with torch.no_grad():
        assert np.allclose(theirs, model.eval()(*inputs).numpy(), atol=1e-5)


def test_the_exported_batch_has_any_size(tmp_path):
    model = lenet5()
    LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "pruned.onnx", X[:1])
    session = open_session(tmp_path / "pruned.onnx")
    assert session.run({session.inputs[0].name: X[:5].numpy()})[0].shape == (5, 10)
    graph = onnx.load(tmp_path / "pruned.onnx").graph
    assert "BatchNormalization" not in {node.op_type for node in graph.node}


def test_export_uses_the_inputs_of_the_call_and_needs_some(tmp_path):
    model, inputs = make("linear")
    assert LevelPruner([{"sparsity": 0.5}])(model, inputs).export(tmp_path / "a.onnx").difference < 1e-4
    with pytest.raises(PruneError, match="export needs example inputs"):
        LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "b.onnx")
    with pytest.raises(PruneError, match="call the pruner with it first"):
        LevelPruner([{"sparsity": 0.5}]).export(tmp_path / "b.onnx", inputs)
    with pytest.raises(PruneError, match="is a folder"):
        LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path, inputs)
    with pytest.raises(PruneError, match="does not exist"):
        LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "none" / "b.onnx", inputs)
    with pytest.raises(PruneError, match="the Sequential fails on the example inputs: mat1 and mat2"):
        LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "b.onnx", inputs[0].double())
    with pytest.raises(PruneError, match="the Sequential fails on the example inputs: "):
        LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "b.onnx", inputs[0][:, :3])
    assert os.listdir(tmp_path) == ["a.onnx"]


def test_export_zeroes_what_was_loaded_meanwhile(tmp_path):
    model, inputs = make("linear")
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    model.load_state_dict(make("linear", seed=5)[0].state_dict())
    pruner.export(tmp_path / "a.onnx", inputs)
    assert all(np.array_equal(~pruner.masks[n], mask) for n, mask in zeros(model).items())


def test_a_forward_that_is_random_is_not_exported(tmp_path):
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) + torch.randn_like(x)

    with pytest.raises(PruneError, match=r"outputs for the exported model differ from the framework's by"):
        LevelPruner([{"sparsity": 0.5}])(Noisy()).export(tmp_path / "a.onnx", torch.randn(2, 4))
    assert os.listdir(tmp_path) == []


def test_lost_zeros_are_seen_in_any_layout():
    model, inputs = make("lstm")
    pruner = LevelPruner([{"sparsity": 0.7}])(model)
    proto = bridge.bind(model, inputs).pull()
    assert deploy.check_zeros(load(proto), pruner.weights, pruner._kept) == ()
    tensor = next(t for t in proto.graph.initializer if t.name.endswith("weight_hh_l0"))
    values = onnx.numpy_helper.to_array(tensor).copy()
    values[np.unravel_index(np.flatnonzero(values == 0)[0], values.shape)] = 1e-30
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(PruneError, match=r"lost zeros of weight 'layer.weight_hh_l0' \[20, 5\]: 1 of its 20 outp"):
        deploy.check_zeros(load(proto), pruner.weights, pruner._kept)


def test_weights_only_used_in_training_are_said_to_be_absent(tmp_path):
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.extra = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.body(x)
            return (x, self.extra(x)) if self.training else x

    exported = LevelPruner([{"sparsity": 0.5}])(Auxiliary()).export(tmp_path / "a.onnx", torch.randn(2, 4))
    assert exported.absent == ("extra.weight",)


def test_a_batchnorm_that_scales_a_channel_to_zero(tmp_path):
    torch.manual_seed(0)
    model = lenet5()
    with torch.no_grad():
        model[1].weight[2] = 0
    exported = LevelPruner([{"sparsity": 0.5}])(model).export(tmp_path / "a.onnx", X)
    assert exported.absent == ()


@pytest.mark.parametrize("name", ["linear", "lenet5", pytest.param("lstm", marks=pytest.mark.slow)])
def test_half_precision_exports(name, tmp_path):
    model, inputs = make(name, dtype=torch.float16)
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    exported = pruner.export(tmp_path / "a.onnx", inputs)
    assert exported.difference < 1e-2
    assert exported.zeros == sum(row.zeros for row in pruner.report.rows)
    assert {w.dtype.name for w in find(load(tmp_path / "a.onnx"))[0]} == {"float16"}


@pytest.mark.parametrize("name", ["linear", "lenet5", pytest.param("lstm", marks=pytest.mark.slow)])
def test_bfloat16_is_refused_with_the_way_out_and_that_works(name, tmp_path):
    model, inputs = make(name, dtype=torch.bfloat16)
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    with pytest.raises(PruneError, match=r"computes in bfloat16, which .* model.float\(\)") as error:
        pruner.export(tmp_path / "a.onnx", inputs)
    assert os.listdir(tmp_path) == []
    assert "\n" not in str(error.value)
    before = zeros(model)
    model.float()
    exported = pruner.export(tmp_path / "a.onnx", tuple(x.float() for x in inputs))
    assert exported.difference < 1e-4
    assert exported.zeros == sum(row.zeros for row in pruner.report.rows)
    assert all(np.array_equal(mask, before[n]) for n, mask in zeros(model).items())


def test_tied_weights_export_as_two_and_keep_their_zeros(tmp_path):
    torch.manual_seed(0)
    model = Tied()
    pruner = LevelPruner([{"sparsity": 0.5}])(model)
    pruner.export(tmp_path / "a.onnx", torch.randint(0, 20, (2, 3)))
    for weight in find(load(tmp_path / "a.onnx"))[0]:
        assert int((weight.values() == 0).sum()) == pruner.report.rows[0].zeros


# ------------------------------------------------------------ the package


def test_the_bridge_loads_neither_onnxruntime_nor_further_libraries():
    code = (
        "import sys, onnxprune.converters.torch\n"
        "print([m for m in ('onnxruntime', 'tensorflow', 'transformers', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = bridge.nothing
    assert set(bridge.__all__) >= {"AGPPruner", "AGP_Pruner", "LevelPruner", "SensitivityPruner", "bind", "reimport"}
