"""Files of every kind of export, pruned, back into the module: against a copy of the module pruned the same way."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnxprune.converters.torch import bind, exporting, reimport
from torch import nn

import onnxprune
from onnxprune import PruneError


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.b = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        x = x + self.b(self.a(x).relu())
        return self.fc(x.mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module], **options: object) -> None:
        super().__init__()
        self.rnn = kind(6, 8, batch_first=True, **options)
        self.fc = nn.Linear(16 if options.get("bidirectional") else 8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 12)
        self.mix = nn.Linear(12, 12)
        self.out = nn.Linear(12, 30, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(self.embedding(x)))


def images(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, int(np.prod(shape))).sin().reshape(shape)


def lenet() -> nn.Module:
    convs = nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, 40), nn.ReLU(), nn.Linear(40, 10))


def tokens() -> nn.Module:
    """Linear layers of equal shape on three axes: transposed and renamed by every folding exporter."""
    return nn.Sequential(*(nn.Sequential(nn.Linear(10, 10), nn.LayerNorm(10), nn.Tanh()) for _ in range(3)))


def encoder() -> nn.Module:
    """Layers that start as copies of each other."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def transposed() -> nn.Module:
    return nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))


NETS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor]] = {
    "lenet": (lenet, images(2, 1, 28, 28)),
    "residual": (Residual, images(2, 3, 8, 8)),
    "tokens": (tokens, images(2, 5, 10)),
    "tied": (Tied, torch.arange(10).reshape(2, 5)),
    "bilstm": (lambda: Recurrent(nn.LSTM, bidirectional=True), images(2, 5, 6)),
    "gru": (lambda: Recurrent(nn.GRU), images(2, 5, 6)),
    "rnn": (lambda: Recurrent(nn.RNN), images(2, 5, 6)),
    "encoder": (encoder, images(2, 5, 16)),
    "transposed": (transposed, images(2, 4, 8, 8)),
}
QUICK = [("lenet", "unfolded"), ("residual", "optimised"), ("tokens", "legacy")]
FOLDED = {"residual": {"stem.0.weight", "a.0.weight", "b.0.weight"}, "transposed": {"0.weight"}}


def make(name: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    build, inputs = NETS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, inputs


def export(model: nn.Module, inputs: torch.Tensor, how: str) -> onnx.ModelProto:
    if how == "unfolded":
        return bind(model, inputs).model.to_proto()
    if how == "optimised":
        return exporting.export(model, inputs, optimize=True).to_proto()
    with exporting.evaluating(model):
        model.eval()
        buffer = io.BytesIO()
        torch.onnx.export(model, (inputs,), buffer, dynamo=False)
    return onnx.load_from_string(buffer.getvalue())


def pruned(model: nn.Module, share: float) -> nn.Module:
    """A copy with the smallest entries of every matrix at zero: what a file pruned elsewhere was made from."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                flat = parameter.view(-1)
                flat[flat.abs().argsort()[: int(flat.numel() * share)]] = 0
    return model


def cases() -> list[object]:
    every = [(name, how) for name in NETS for how in ("unfolded", "optimised", "legacy")]
    return [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow) for case in every]


@pytest.mark.parametrize(("name", "how"), cases())
def test_weights_and_masks_come_back(name, how):
    model, inputs = make(name)
    model.train()
    target = pruned(model, 0.6)
    file = export(target, inputs, how)
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    keys = list(model.state_dict())
    pruner = reimport(model, file, inputs)
    assert list(model.state_dict()) == keys
    assert model.training
    folded = FOLDED.get(name, set()) if how != "unfolded" else set()
    wanted = dict(target.named_parameters())
    for n, parameter in model.named_parameters():
        expected = dense[n] * (wanted[n] != 0) if n in folded else wanted[n]
        assert torch.equal(parameter, expected), n
        assert not (torch.signbit(parameter) & (parameter == 0)).any() or parameter.ndim < 2
    masks = {n: p for n, p in wanted.items() if p.ndim > 1}
    assert set(pruner.masks) == set(masks)
    assert all(np.array_equal(pruner.masks[n], p.detach().numpy() != 0) for n, p in masks.items())
    step(model, inputs, 3)
    assert all((p.detach().numpy()[~pruner.masks[n]] == 0).all() for n, p in model.named_parameters() if n in masks)
    assert all((p.detach().numpy()[pruner.masks[n]] != 0).all() for n, p in model.named_parameters() if n in masks)


def step(model: nn.Module, inputs: torch.Tensor, times: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(times):
        (model(inputs).exp().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_file_from_the_command_line_goes_on_along_a_schedule(tmp_path: Path):
    model, inputs = make("lenet")
    onnx.save(export(model, inputs, "optimised"), tmp_path / "dense.onnx")
    onnxprune.prune(tmp_path / "dense.onnx", [{"sparsity": 0.5}], tmp_path / "pruned.onnx")
    entry = {"final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 3, "op_types": ["Linear"]}
    pruner = reimport(model, tmp_path / "pruned.onnx", inputs, {"pruner": "agp", "config_list": [entry]})
    before = {name: pruner.masks[name] for name in pruner.masks}
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-3)
    for epoch in range(1, 4):
        pruner.update_epoch(epoch)
        step(model, inputs, 1)
    after = {name: pruner.masks[name] for name in pruner.masks}
    assert all(not (after[name] & ~before[name]).any() for name in before)
    assert after["7.weight"].mean() == pytest.approx(0.2, abs=1e-3)
    assert np.array_equal(after["0.weight"], before["0.weight"])  # no entry names it: the file's zeros stay
    assert (model[0].weight.detach().numpy()[~before["0.weight"]] == 0).all()


def test_the_graph_is_exported_once(monkeypatch):
    model, inputs = make("lenet")
    file, calls, export_once = export(pruned(model, 0.5), inputs, "unfolded"), [], exporting.export
    monkeypatch.setattr(exporting, "export", lambda *a, **k: calls.append(a) or export_once(*a, **k))
    pruner = reimport(model, file, inputs)
    assert len(calls) == 1
    assert pruner.sparsity == pytest.approx(0.5, abs=1e-2)


def test_weights_trained_on_elsewhere_are_loaded():
    model, inputs = make("lenet")
    target = pruned(model, 0.5)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.add_((parameter != 0) * torch.randn_like(parameter) * 0.01)
    reimport(model, export(target, inputs, "legacy"), inputs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), target.parameters(), strict=True))


@pytest.mark.slow
def test_a_fresh_module_goes_by_names():
    target, inputs = make("lenet", seed=1)
    file = export(pruned(target, 0.5), inputs, "unfolded")
    model, _ = make("lenet", seed=2)
    reimport(model, file, inputs)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pruned(target, 0.5).parameters(), strict=True))


def unchanged(model: nn.Module, act: Callable[[], object], message: str) -> None:
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(PruneError, match=message):
        act()
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    step(model, images(2, 5, 10), 1)  # and nothing is held


def test_what_stays_ambiguous_is_an_error():
    target, inputs = make("tokens", seed=1)
    file = export(pruned(target, 0.5), inputs, "legacy")
    model, _ = make("tokens", seed=2)
    message = r"3 of 3 weights .*'0.0.weight' \[10, 10\] \(MatMul, Linear\): candidates: 'onnx::MatMul_\d+', 'onnx::"
    unchanged(model, lambda: reimport(model, file, inputs), message)


def test_another_function_is_an_error():
    model, inputs = make("tokens")
    file = export(pruned(model, 0.5), inputs, "legacy")
    bias = next(t for t in file.graph.initializer if t.dims == [10])
    bias.CopyFrom(numpy_helper.from_array(np.full(10, 3, np.float32), "own_name"))
    for node in file.graph.node:
        node.input[:] = ["own_name" if i == "0.0.bias" else i for i in node.input]
    unchanged(model, lambda: reimport(model, file, inputs), r"outputs differ .* does not name them: 0\.0\.bias")


def test_values_that_are_not_finite_are_an_error():
    model, inputs = make("tokens")
    file = bind(pruned(model, 0.5), inputs).model.to_proto()
    for tensor in file.graph.initializer:
        if tensor.name == "1.0.weight":
            tensor.CopyFrom(numpy_helper.from_array(np.full((10, 10), np.nan, np.float32), tensor.name))
    unchanged(model, lambda: reimport(model, file, inputs), r"'1.0.weight' \[10, 10\].* NaN")


@pytest.mark.slow
def test_a_file_of_another_model_is_an_error():
    model, inputs = make("tokens")
    other, images = make("lenet")
    file = export(other, images, "unfolded")
    unchanged(model, lambda: reimport(model, file, inputs), "no candidate of its shape")


@pytest.mark.slow
def test_half_precision_files_keep_the_masks():
    model, inputs = make("lenet")
    target = pruned(model, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = export(copy.deepcopy(target).half(), inputs.half(), "unfolded")
    pruner = reimport(model, file, inputs)
    for name, parameter in target.named_parameters():
        assert parameter.ndim < 2 or np.array_equal(pruner.masks[name], parameter.detach().numpy() != 0)
        assert torch.allclose(dict(model.named_parameters())[name], parameter, rtol=1e-3, atol=1e-6)
