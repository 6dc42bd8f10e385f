"""The configuration: what it accepts, which entry governs a weight, and what every error says."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import yaml

from onnxprune.config import load
from onnxprune.errors import PruneError


@dataclass(frozen=True)
class W:
    name: str
    op_types: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset({self.name, self.name.rpartition(".")[0]})


WEIGHTS = [
    W("conv1.weight", ("Conv",)),
    W("conv2.weight", ("FusedConv",)),
    W("fc1.weight", ("Gemm",)),
    W("fc2.weight", ("MatMul", "Embedding")),
    W("emb.weight", ("Embedding",)),
    W("rnn.weight", ("LSTM",)),
]


def governed(entries, **options):
    return {index: [w.name.partition(".")[0] for w in ws] for index, ws in load(entries, **options).assign(WEIGHTS)}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"sparsity": 0.5, "op_types": "default"}], {0: ["conv1", "conv2", "fc1", "fc2", "rnn"]}),
        ([{"sparsity": 0.5, "op_types": ["default"]}], {0: ["conv1", "conv2", "fc1", "fc2", "rnn"]}),
        ([{"sparsity": 0.5}], {0: ["conv1", "conv2", "fc1", "fc2", "rnn"]}),
        ([{"sparsity": 0.5, "op_types": ["Conv", "Gemm"]}], {0: ["conv1", "fc1"]}),
        (
            [{"sparsity": 0.5, "op_types": ["default", "Embedding"]}],
            {0: ["conv1", "conv2", "fc1", "fc2", "emb", "rnn"]},
        ),
        ([{"sparsity": 0.5, "op_names": "emb.weight"}], {0: ["emb"]}),
        ([{"sparsity": 0.5, "op_names": ["fc1"]}], {0: ["fc1"]}),  # the module's name, as in NNI
        ([{"sparsity": 0.5, "op_names": ["fc*", "emb"]}], {0: ["fc1", "fc2", "emb"]}),
        ([{"sparsity": 0.5, "op_types": ["Conv"], "op_names": ["*1*"]}], {0: ["conv1"]}),  # both must match
        (
            [{"sparsity": 0.5, "op_types": "default"}, {"sparsity": 0.9, "op_names": ["fc1"]}],
            {0: ["conv1", "conv2", "fc2", "rnn"], 1: ["fc1"]},
        ),
        (
            [{"sparsity": 0.9, "op_names": ["fc1"]}, {"sparsity": 0.5, "op_types": "default"}],
            {1: ["conv1", "conv2", "fc1", "fc2", "rnn"]},
        ),
        (
            [{"sparsity": 0.5, "op_types": "default"}, {"exclude": True, "op_names": ["fc*"]}],
            {0: ["conv1", "conv2", "rnn"]},
        ),
        (
            [{"sparsity": 0.5}, {"exclude": True, "op_types": ["Gemm"]}, {"sparsity": 0.1, "op_names": ["fc1"]}],
            {0: ["conv1", "conv2", "fc2", "rnn"], 2: ["fc1"]},
        ),
        ([{"exclude": True, "op_types": "default"}], {}),
    ],
)
def test_last_matching_entry_wins(entries, expected):
    assert governed(entries) == expected


def test_the_winning_entry_is_taken_whole():
    config = load([{"sparsity": 0.5, "pattern": "2:4"}, {"sparsity": 0.9, "op_names": ["fc1"]}])
    assert config.entries[1].pattern == "unstructured"


@pytest.mark.parametrize("suffix", [".json", ".yaml", ".yml", ".toml"])
@pytest.mark.parametrize("form", ["list", "mapping"])
def test_files_of_either_form(tmp_path, suffix, form):
    entries = [{"final_sparsity": 0.5, "end_epoch": 10, "op_types": ["Conv"]}, {"exclude": True, "op_names": ["fc1"]}]
    source = {"pruner": "agp", "pattern": "2:4", "config_list": entries} if form == "mapping" else entries
    path = tmp_path / f"config{suffix}"
    if suffix == ".toml":
        head = 'pruner = "agp"\npattern = "2:4"\n' if form == "mapping" else ""
        path.write_text(
            head + '[[config_list]]\nfinal_sparsity = 0.5\nend_epoch = 10\nop_types = ["Conv"]\n'
            '[[config_list]]\nexclude = true\nop_names = ["fc1"]\n'
        )
    else:
        path.write_text(json.dumps(source) if suffix == ".json" else yaml.safe_dump(source))
    options = {} if form == "mapping" else {"pruner": "agp", "pattern": "2:4"}
    assert load(path, **options) == load(str(path), **options) == load(source, **options)
    assert load(path, **options).entries[0].pattern == "2:4"


def test_options_go_before_the_mapping_and_after_the_entry():
    source = {
        "pattern": "2:4",
        "allocation": "erk",
        "config_list": [{"sparsity": 0.3}, {"sparsity": 0.3, "pattern": "1:4"}],
    }
    config = load(source, pattern="block:2x2", allocation=None)
    assert [e.pattern for e in config.entries] == ["block:2x2", "1:4"]
    assert config.entries[0].allocation == "erk"


def test_a_pattern_implies_its_sparsity():
    assert load([{"op_types": "default"}], pattern="2:4").entries[0].final() == 0.5
    assert load([{"op_types": "default"}], pattern="4:5").entries[0].final() == 0.2


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ([{"sparsity": 1.5}], {}, ["entry 1", "'sparsity'", "1.5", "less than or equal to 1"]),
        ([{"sparsity": 0.5}, {"sparsity": -0.1}], {}, ["entry 2", "'sparsity'", "-0.1"]),
        ([{"sparsity": float("nan")}], {}, ["entry 1", "'sparsity'", "nan"]),
        ([{"sparsity": "0.5"}], {}, ["entry 1", "'sparsity'", "'0.5'", "number"]),
        ([{"sparsity": True}], {}, ["entry 1", "'sparsity'", "True"]),
        ([{"sparsty": 0.5}], {}, ["entry 1", "'sparsty'", "did you mean 'sparsity'"]),
        ([{"op_types": "default"}], {}, ["entry 1", "'sparsity' is missing"]),
        ([{"sparsity": 0.5, "op_types": 3}], {}, ["entry 1", "'op_types'", "3"]),
        ([{"sparsity": 0.5, "op_names": [3]}], {}, ["entry 1", "'op_names'"]),
        ([{"sparsity": 0.5, "exclude": "yes"}], {}, ["entry 1", "'exclude'", "'yes'"]),
        ([{"sparsity": 0.5, "pattern": "4:2"}], {}, ["entry 1", "'pattern'", "4:2", "0 < N < M"]),
        ([{"sparsity": 0.6, "pattern": "2:4"}], {}, ["entry 1", "more than the pattern 2:4 allows, 0.5"]),
        ([{"sparsity": 0.5, "score": "luck"}], {}, ["entry 1", "'score'", "'luck'", "'magnitude'"]),
        (
            [{"sparsity": 0.5, "allocation": "fair"}],
            {},
            ["entry 1", "'allocation'", "'fair'", "'erk', 'global', 'sensitivity', 'uniform'"],
        ),
        ([{"sparsity": 0.5, "final_sparsity": 0.8}], {}, ["entry 1", "'final_sparsity'", "level"]),
        ([{"final_sparsity": 0.8, "sparsity": 0.8}], {"pruner": "agp"}, ["entry 1", "short for 'final_sparsity'"]),
        ([{"start_epoch": 0}], {"pruner": "agp"}, ["entry 1", "'final_sparsity' is missing"]),
        (
            [{"final_sparsity": 0.8, "start_epoch": 5, "end_epoch": 2}],
            {"pruner": "agp"},
            ["ends at 2, before it starts at 5"],
        ),
        ([{"final_sparsity": 0.8, "start_epoch": 1, "end_step": 2}], {"pruner": "agp"}, ["not both"]),
        ([{"final_sparsity": 0.8, "start_step": 1}], {"pruner": "agp"}, ["'end_step' is missing"]),
        ([{"final_sparsity": 0.8, "frequency": 0}], {"pruner": "agp"}, ["'frequency'", "0"]),
        ([{"final_sparsity": 0.2, "initial_sparsity": 0.4}], {"pruner": "agp"}, ["never return"]),
        ([{"sparsity": 0.5, "quality": 1.0}], {"pruner": "sensitivity"}, ["exactly one of 'sparsity'"]),
        ([{"op_types": "default"}], {"pruner": "sensitivity"}, ["exactly one of 'sparsity'"]),
        ([{"quality": 1.0, "end_epoch": 4}], {"pruner": "sensitivity"}, ["has no schedule"]),
        ([{"sparsity": 0.5, "allocation": "erk"}], {"pruner": "sensitivity"}, ["'allocation'", "'erk'"]),
        ([], {}, ["at least one entry"]),
        ("[]", {}, ["cannot read the configuration"]),
        (3, {}, ["at least one entry", "3"]),
        ([3], {}, ["entry 1 is 3"]),
        ({"sparsity": 0.5}, {}, ["'sparsity' is not known", "must stand in a list"]),
        ({"config_list": [{"sparsity": 0.5}], "prunner": "agp"}, {}, ["'prunner' is not known"]),
        ([{"sparsity": 0.5}], {"pruner": "taylor"}, ["pruner 'taylor'", "'agp', 'level', 'sensitivity'"]),
    ],
)
def test_every_error_names_the_entry_the_key_and_the_value(source, options, words):
    with pytest.raises(PruneError) as caught:
        load(source, **options)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.yaml", "- sparsity: [0.5"), ("a.json", "[{"), ("a.toml", "= 1"), ("a.yaml", "!!python/object:os.system {}")],
)
def test_files_that_cannot_be_parsed(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(PruneError, match="cannot be parsed"):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            {"sparsity": 0.5, "op_types": ["Conv3D"]},
            ["entry 2", "types present: Conv, Embedding, FusedConv, Gemm, LSTM, MatMul"],
        ),
        ({"sparsity": 0.5, "op_names": ["fc1.wieght"]}, ["entry 2", "nearest names: fc1.weight"]),
        (
            {"sparsity": 0.5, "op_names": ["fc1", "fc3"]},
            ["entry 2", "the name 'fc3' matches no weight", "nearest names"],
        ),
        ({"exclude": True, "op_names": ["cnv1"]}, ["entry 2", "nearest names", "conv1"]),
        ({"sparsity": 0.5, "op_types": []}, ["entry 2", "matches no weight"]),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(entry, words):
    with pytest.raises(PruneError) as caught:
        load([{"sparsity": 0.5}, entry]).assign(WEIGHTS)
    for word in words:
        assert word in str(caught.value)
