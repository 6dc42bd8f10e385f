"""A torch module and its graph: the same weights in the same roles by class, by graph and in a file."""

from __future__ import annotations

import copy
import warnings
from functools import cache

import numpy as np
import onnx
import pytest
import torch
from onnxprune.converters.torch import LevelPruner, bind
from onnxprune.converters.torch.binding import Binding
from onnxprune.converters.torch.layers import array, find
from torch import nn
from torch_nets import NETS, First, Tied, Twice, lenet5, make

import onnxprune
from onnxprune import PruneError
from onnxprune.algorithms.pruner import decide
from onnxprune.config import load as load_config

TYPES = ["default", "Embedding"]


@cache
def bound(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, tuple[torch.Tensor, ...], Binding]:
    """A net full of ties, and its binding: exported once for all tests."""
    net, inputs = make(name, ties=True, dtype=dtype)
    return net, inputs, bind(net, inputs)


def masks_of(weights, config, kind):
    return decide(load_config(config, pruner=kind), weights)[0]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, mask in ours.items():
        assert np.array_equal(mask, theirs[name]), name
    assert any(not mask.all() for mask in ours.values())


CONFIGS = {
    "level": [{"sparsity": 0.6, "op_types": TYPES}],
    "sensitivity": [{"sparsity": 0.6, "op_types": TYPES}],
    "global": [{"sparsity": 0.6, "op_types": TYPES, "allocation": "global"}],
    "blocks": [{"sparsity": 0.5, "op_types": TYPES, "pattern": "block:2x2"}],
    "2:4": [{"op_types": TYPES, "pattern": "2:4"}],
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", NETS)
def test_masks_are_identical_by_class_by_graph_and_by_file(name, config):
    net, _, binding = bound(name)
    entries, kind = CONFIGS[config], "sensitivity" if config == "sensitivity" else "level"
    by_class, skipped = find(net)
    assert not skipped
    assert not binding.skipped
    result = onnxprune.prune(binding.model.to_proto(), entries, pruner=kind)
    by_file = {binding.names[n]: result.masks[n] for n in result.masks}
    if config == "2:4" and not by_file:
        pytest.skip("no weight of this net has a multiple of 4 inputs")
    assert_same(masks_of(by_class, entries, kind), by_file)
    assert_same(masks_of(binding.weights, entries, kind), by_file)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("linear", torch.float16),
        ("linear", torch.bfloat16),
        ("linear", torch.float64),
        ("lenet5", torch.bfloat16),
        ("gru two-way", torch.float16),
    ],
)
def test_masks_are_identical_in_other_types(name, dtype):
    net, _, binding = bound(name, dtype)
    result = onnxprune.prune(binding.model.to_proto(), CONFIGS["level"])
    by_file = {binding.names[n]: result.masks[n] for n in result.masks}
    assert_same(masks_of(find(net)[0], CONFIGS["level"], "level"), by_file)
    assert_same(masks_of(binding.weights, CONFIGS["level"], "level"), by_file)


@pytest.mark.parametrize("name", NETS)
def test_every_parameter_and_buffer_is_bound(name):
    net, _, binding = bound(name)
    state = net.state_dict()
    bound_names = set(binding.names.values())
    assert binding.unbound == ()
    assert {n for n, _ in net.named_parameters()} <= bound_names
    initializers = {t.name: onnx.numpy_helper.to_array(t) for t in binding.model.to_proto().graph.initializer}
    for initializer, parameter in binding.names.items():
        assert np.array_equal(initializers[initializer], state[parameter].numpy())
    for weight in binding.weights:
        assert np.shares_memory(weight.storage.read(), state[weight.name].numpy())


def test_binding_leaves_the_module_as_it_was(capfd):
    net, inputs = make("lenet5")
    net.train()
    net[1].eval()
    before, keys = copy.deepcopy(net.state_dict()), list(net.state_dict())
    random = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        bind(net, inputs)
    assert [m.training for m in net] == [True, False] + [True] * 7
    assert net.training
    assert not seen
    assert capfd.readouterr() == ("", "")
    assert torch.equal(random, torch.get_rng_state())
    assert keys == list(net.state_dict())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_the_batch_is_dynamic_and_metadata_tell_nothing_of_this_machine():
    _, _, binding = bound("lenet5")
    proto = binding.model.to_proto()
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert b"site-packages" not in proto.SerializeToString()
    assert b"stack_trace" not in proto.SerializeToString()


def test_pull_moves_weights_and_nothing_else():
    net, inputs = make("lenet5")
    binding = bind(net, inputs)
    before = binding.model.to_proto()
    with torch.no_grad():
        for value in net.parameters():
            value.mul_(2)
        net[1].running_mean.add_(1)
    after = binding.pull()
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in after.graph.initializer}
    assert all(np.array_equal(arrays[n], net.state_dict()[p].numpy()) for n, p in binding.names.items())
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in before.graph.node]
    difference = max(abs(a - b).max() for a, b in zip(run(after, inputs), outputs(net, inputs), strict=True))
    assert difference < 1e-4


def run(proto, inputs):
    from onnxprune.runtime.session import open_session

    session = open_session(proto)
    return session.run({i.name: x.numpy() for i, x in zip(session.inputs, inputs, strict=True)})


def outputs(net, inputs):
    mode = net.training
    with torch.no_grad():
        result = net.eval()(*inputs).numpy()
    net.train(mode)
    return [result]


@pytest.mark.parametrize("name", ["lenet5", "lstm two-way", "encoder", "tied"])
def test_push_brings_a_file_pruned_elsewhere_back(name, tmp_path):
    net, inputs = make(name)
    binding = bind(net, inputs)
    result = onnxprune.prune(binding.model.to_proto(), [{"sparsity": 0.7}], tmp_path / "pruned.onnx")
    masks = binding.push(tmp_path / "pruned.onnx")
    for initializer in result.masks:
        parameter = dict(net.named_parameters())[binding.names[initializer]]
        assert np.array_equal(parameter.detach().numpy() == 0, ~result.masks[initializer])
        assert np.array_equal(masks[binding.names[initializer]], result.masks[initializer])
    file = onnx.load(tmp_path / "pruned.onnx")
    assert np.allclose(run(file, inputs)[0], outputs(net, inputs)[0], atol=1e-5)


def test_push_refuses_another_graph_and_leaves_the_module_alone(tmp_path):
    net, inputs = make("lenet5")
    binding = bind(net, inputs)
    before = copy.deepcopy(net.state_dict())
    LevelPruner([{"sparsity": 0.5}])(copy.deepcopy(net)).export(tmp_path / "folded.onnx", inputs)
    names = {t.name for t in onnx.load(tmp_path / "folded.onnx").graph.initializer}
    assert "0.weight" in names  # the trap: BatchNorm is folded in, the name is the parameter's
    with pytest.raises(PruneError, match=r"is not the bound graph.*reimport"):
        binding.push(tmp_path / "folded.onnx")
    broken = binding.model.to_proto()
    tensor = next(t for t in broken.graph.initializer if t.name == "8.weight")
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.full((10, 128), np.nan, np.float32), "8.weight"))
    with pytest.raises(PruneError, match=r"'8.weight' \[10, 128\] of the model holds NaN"):
        binding.push(broken)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((10, 128)), "8.weight"))
    with pytest.raises(PruneError, match=r"'8.weight' is float32\[10, 128\], but the model has float64"):
        binding.push(broken)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_changed_module_is_followed_or_refused_by_name():
    net, inputs = make("linear")
    binding = bind(net, inputs)
    net[0] = nn.Linear(4, 6)
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in binding.pull().graph.initializer}
    assert np.array_equal(arrays["0.weight"], net[0].weight.detach().numpy())
    net[0] = nn.Identity()
    with pytest.raises(PruneError, match=r"parameter '0.weight' is no longer in the model"):
        binding.pull()
    net, inputs = make("linear")
    binding = bind(net, inputs)
    net.double()
    with pytest.raises(PruneError, match=r"'0.weight' is float32\[6, 4\], but the module has float64"):
        binding.pull()


def test_tied_and_shared_parameters_are_one_weight_with_all_their_names():
    torch.manual_seed(0)
    for net, inputs, names, count in (
        (Tied(), torch.randint(0, 20, (2, 3)), {"embedding", "head", "embedding.weight", "head.weight"}, 1),
        (Twice(), torch.randn(2, 6), {"first", "again", "first.weight", "again.weight"}, 2),
    ):
        weight, *rest = bind(net, inputs).weights
        assert len(rest) == count - 1
        assert names <= weight.names
        assert names <= find(net)[0][0].names
        assert find(net)[0][0].name == weight.name


def test_weights_of_functional_calls_need_the_graph():
    torch.manual_seed(0)
    net = Twice()
    assert [s.name for s in find(net)[1]] == ["own"]
    assert "example_inputs" in find(net)[1][0].reason
    weight = bind(net, torch.randn(2, 6)).weights[1]
    assert (weight.name, weight.op_types, weight.role_shape) == ("own", ("MatMul", "Twice"), (4, 6))


def test_what_the_graph_does_not_read_is_said():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.extra = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)
            self.register_buffer("fixed", torch.randn(4, 4))

        def forward(self, x):
            x = self.body(x) @ self.fixed
            return (self.head(x), self.extra(x)) if self.training else self.head(x)

    binding = bind(Auxiliary(), torch.randn(2, 4))
    assert [w.name for w in binding.weights] == ["body.weight", "head.weight"]
    assert binding.unbound == ("extra.weight", "extra.bias")
    said = {s.name: s.reason for s in binding.skipped}
    assert said["extra.weight"] == "the exported graph does not read it for the example inputs"
    assert "not a parameter" in said["fixed"]


def test_a_projected_lstm_is_left_alone_with_the_reason():
    net = nn.Sequential(First(nn.LSTM(4, 6, proj_size=3)), nn.Linear(3, 2))
    for weights, skipped in (find(net), (lambda b: (b.weights, b.skipped))(bind(net, torch.randn(5, 2, 4)))):
        assert [w.name for w in weights] == ["1.weight"]
        said = {s.name for s in skipped}
        assert {"0.layer.weight_ih_l0", "0.layer.weight_hh_l0"} == said
        assert all("no projection" in s.reason for s in skipped)


def test_inputs_by_keyword_and_models_that_cannot_be_exported():
    torch.manual_seed(0)
    net = nn.Bilinear(4, 5, 6)
    binding = bind(net, {"input1": torch.randn(2, 4), "input2": torch.randn(2, 5)})
    assert [w.name for w in binding.weights] == ["weight"]

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else x

    with pytest.raises(PruneError, match=r"torch.onnx.export cannot export the Branching"):
        bind(Branching(), torch.randn(2, 4))
    with pytest.raises(PruneError, match=r"example_inputs is a str; give a tensor"):
        bind(lenet5(), "x")
    with pytest.raises(PruneError, match=r"called with a torch.nn.Module, not ModelProto"):
        bind(onnx.ModelProto(), torch.randn(2, 4))


def test_wrapped_models_are_their_own():
    net, inputs = make("linear")
    for wrapped in (torch.compile(net, backend="eager"), nn.DataParallel(net)):
        assert [w.name for w in find_wrapped(wrapped)] == ["0.weight", "2.weight"]
        assert set(bind(wrapped, inputs).names.values()) == {"0.weight", "0.bias", "2.weight"}


def find_wrapped(model):
    return LevelPruner([{"sparsity": 0.5}])(model).weights


def test_arrays_are_views():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        value = torch.randn(3, 4).to(dtype)
        seen = array(value)
        value[1, 2] = 0
        assert seen[1, 2] == 0
        assert seen.dtype.itemsize == value.element_size()
