"""Grouped inputs as a user asks for them: the command line, latency tables, configurations that mix, and torch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnxprune.converters.torch import AGPPruner, LevelPruner
from torch import nn

import onnxprune
from onnxprune.cli import main
from onnxprune.errors import PruneError
from onnxprune.lowering import forms
from onnxprune.lowering.latency import DENSE, Latencies

MODELS = Path(__file__).parents[1] / "models"
GROUPED = [{"sparsity": 0.5, "pattern": "grouped:8"}]


class Net(nn.Module):
    """Convolutions, one with groups of its own, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(32, 64, 3, padding=1)
        self.b = nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.c = nn.ConvTranspose2d(64, 16, 2, groups=2)
        self.d = nn.Linear(16, 8)

    def forward(self, x):
        x = self.c(self.b(self.a(x).relu()).relu()).relu()
        return self.d(x.mean((2, 3)))


X = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def path(net, tmp_path_factory):
    target = tmp_path_factory.mktemp("grouped") / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter
        torch.onnx.export(net, (X,), str(target), dynamo=True, optimize=False, verbose=False, external_data=False)
    return target


def operators(path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def weights(path) -> int:
    return sum(int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer if len(t.dims) > 1 and t.data_type == 1)


def test_prune_lowers_by_itself(path, tmp_path, capsys):
    out = tmp_path / "fast.onnx"
    arguments = ["prune", str(path), "-o", str(out), "--pattern", "grouped:16", "--sparsity", "0.5"]
    assert main([*arguments, "--no-timing", "--no-benchmark"]) == 0
    shown = capsys.readouterr().out
    assert "estimated" in shown
    assert "Checked in onnxruntime" in shown
    assert "Gather" in operators(out)
    assert weights(out) < weights(path)


def test_keep_shape_then_lower(path, tmp_path, capsys):
    masked, low, direct = (tmp_path / f"{name}.onnx" for name in ("masked", "low", "direct"))
    arguments = ["prune", str(path), "--pattern", "grouped:16", "--sparsity", "0.5", "--no-timing", "--no-benchmark"]
    assert main([*arguments, "-o", str(masked), "--keep-shape"]) == 0
    assert "Gather" not in operators(masked)
    assert weights(masked) == weights(path)
    assert main(["lower", str(masked), "-o", str(low), "--no-timing"]) == 0
    assert main([*arguments, "-o", str(direct)]) == 0
    assert operators(low) == operators(direct)
    capsys.readouterr()
    assert main(["lower", str(masked), "-o", str(low), "--no-timing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["source"] for row in found["lowering"]["rows"]} == {"estimated"}
    assert found["benchmark"] is None


def test_a_latency_table_is_written_then_decides(path, tmp_path, capsys):
    table, out = tmp_path / "table.json", tmp_path / "out.onnx"
    arguments = ["prune", str(path), "-o", str(out), "--pattern", "grouped:16", "--sparsity", "0.5", "--no-benchmark"]
    assert main([*arguments, "--latency-table", str(table)]) == 0
    content = json.loads(table.read_text())
    times = content["milliseconds"]
    assert content["threads"] == 1
    assert times
    for name in times:  # another machine: only the form 'split' of convolutions is fast there
        times[name] = 1.0 if name.endswith("; split") else 10.0 if name.endswith(f"; {DENSE}") else 100.0
    table.write_text(json.dumps(content))
    result = onnxprune.prune(path, [{"sparsity": 0.5, "pattern": "grouped:16"}], out, latency_table=table)
    assert result.report.lowering is not None
    assert {row.form for row in result.report.lowering.rows} <= {"split", *forms.FORMS["Gemm"]}
    assert "table" in {row.source for row in result.report.lowering.rows}
    with pytest.raises(PruneError, match="is for 1 threads, not 2"):
        onnxprune.lower(out, latency_table=table, threads=2)


@pytest.mark.parametrize("content", ["", "{}", '{"format": "x"}', '{"format": "onnxprune latency table 1"}'])
def test_what_is_no_table_is_refused(content, path, tmp_path, capsys):
    table = tmp_path / "table.json"
    table.write_text(content)
    assert main(["lower", str(path), "-o", str(tmp_path / "o.onnx"), "--latency-table", str(table)]) == 2
    assert "holds no latency table" in capsys.readouterr().err
    assert not (tmp_path / "o.onnx").exists()


def test_times_are_measured_once(path, tmp_path, monkeypatch):
    monkeypatch.setenv("ONNXPRUNE_CACHE", str(tmp_path / "cache"))
    masked = onnxprune.prune(path, GROUPED, keep_shape=True).to_proto()
    first = onnxprune.lower(masked)
    monkeypatch.setattr("onnxprune.lowering.latency.Latencies._measure", None)
    monkeypatch.setattr("onnxprune.lowering.lower._ratio", lambda *_: 0.5)
    again = onnxprune.lower(masked)
    assert [row.name for row in first.report.rows] in ([], [row.name for row in again.report.rows])


def test_channels_in_one_layer_and_grouped_inputs_in_another(path, tmp_path):
    config = [
        {"op_names": ["a.weight"], "pattern": "channel", "sparsity": 0.5},
        {"op_names": ["d.weight"], "pattern": "grouped", "sparsity": 0.5},
    ]
    result = onnxprune.prune(path, config, tmp_path / "o.onnx", timing=False, align=1)
    shapes = {tuple(t.dims) for t in onnx.load(tmp_path / "o.onnx").graph.initializer}
    assert (32, 32, 3, 3) in shapes  # half of the first layer's outputs
    assert result.report.lowering is not None
    assert result.report.groups


# ----------------------------------------------------------------------------------------------------------- torch


@pytest.mark.parametrize("pattern", ["grouped", "grouped:8"])
def test_a_module_has_the_masks_of_its_file(net, path, pattern):
    config = [{"sparsity": 0.6, "pattern": pattern}]
    of_file = onnxprune.prune(path, config, keep_shape=True).masks
    module = Net().eval()
    module.load_state_dict(net.state_dict())
    pruner = LevelPruner(config)
    pruner(module)
    assert len(of_file) == 4 if pattern == "grouped" else 3
    assert {name: pruner.masks[name].tolist() for name in pruner.masks} == {
        name: of_file[name].tolist() for name in of_file
    }


def test_training_then_export(net, tmp_path, monkeypatch):
    class Fast(Latencies):
        def of(self, layer):
            return {DENSE: 1.0, next(iter(forms.candidates(layer))): 0.5}, "measured"

    monkeypatch.setattr(Latencies, "open", lambda *_: Fast(timing=False))
    torch.manual_seed(1)
    module = Net()
    pruner = AGPPruner([{"final_sparsity": 0.5, "start_epoch": 0, "end_epoch": 3, "pattern": "grouped:8"}])
    pruner(module, (X,))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    before: dict[str, np.ndarray] = {}
    for epoch in (1, 2, 3):
        for _ in range(2):
            optimizer.zero_grad()
            module(X).square().sum().backward()
            optimizer.step()
        pruner.update_epoch(epoch)
        for name, mask in before.items():
            assert not (pruner.masks[name] & ~mask).any()
        before = {name: pruner.masks[name] for name in pruner.masks}
    assert pruner.sparsity == 0.5
    module.eval()
    exported = pruner.export(tmp_path / "fast.onnx")
    assert exported.difference < 1e-4
    assert "Gather" in operators(tmp_path / "fast.onnx")
    pruner.export(tmp_path / "masked.onnx", keep_shape=True)
    assert "Gather" not in operators(tmp_path / "masked.onnx")


@pytest.mark.parametrize("pattern", ["grouped", "channel"])
@pytest.mark.parametrize("name", ["lenet5.onnx", "lenet-300-100.onnx"])
def test_sizes_are_those_of_the_files(name, pattern, tmp_path, capsys):
    source, target = MODELS / name, tmp_path / "out.onnx"
    given = ["--pattern", pattern, "--sparsity", "0.75", "--no-benchmark", "--json"]
    assert main(["prune", str(source), "-o", str(target), *given]) == 0
    found = json.loads(capsys.readouterr().out)["sizes"]
    assert found["nonzero_before"] == onnxprune.inspect(source).nonzero
    assert found["nonzero"] == onnxprune.inspect(target).nonzero < found["nonzero_before"]
    assert (found["bytes_before"], found["bytes"]) == (source.stat().st_size, target.stat().st_size)
