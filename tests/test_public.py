"""The public surface: what is exported, what an import loads, what depends on what."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import onnxprune

PUBLIC = {
    "AGPPruner",
    "Benchmark",
    "Evaluation",
    "Inspection",
    "LevelPruner",
    "Lowered",
    "Masks",
    "PruneError",
    "Pruner",
    "Report",
    "Result",
    "Search",
    "Sensitivity",
    "SensitivityPruner",
    "__version__",
    "autoprune",
    "benchmark",
    "evaluate",
    "inspect",
    "lower",
    "prune",
    "sensitivity",
}
HEAVY = ("torch", "tensorflow", "keras", "tf2onnx", "onnxruntime", "scipy", "sklearn", "sympy")
PACKAGE = Path(onnxprune.__file__).parent
FLOORS = {
    "errors": 0,
    "_version": 0,
    "graph": 1,
    "algorithms": 2,  # with config: entries name patterns, scores and allocations
    "config": 2,
    "runtime": 3,
    "structure": 4,
    "lowering": 4,
    "layerwise": 4,
    "checkpoint": 3,
    "probe": 4,
    "curves": 4,
    "inspection": 4,
    "results": 4,
    "pipeline": 5,
    "api": 5,
    "recipes": 5,
    "search": 5,
    "tables": 6,
    "tables_search": 6,
    "report": 6,
    "cli_options": 6,
    "cli_output": 6,
    "cli_search": 7,
    "cli": 7,
    "__main__": 8,
}


WITHOUT_SCIPY = """
import sys
sys.modules["scipy"] = None
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "scipy" else find(name, *more)
import numpy as np
import onnxprune
model, data = sys.argv[1], {"image": np.zeros((8, 1, 28, 28), np.float32)}
for config in ({"pattern": "channel"}, {"pattern": "grouped"}, {"score": "wanda"}):
    assert onnxprune.prune(model, config | {"config_list": [{"sparsity": 0.5}]}, data=data, timing=False).sparsity > 0.3
for call in (
    lambda: onnxprune.prune(model, {"pruner": "sparsegpt", "config_list": [{"sparsity": 0.5}]}, data=data),
    lambda: onnxprune.prune(model, {"reconstruct": True, "config_list": [{"sparsity": 0.5}]}, data=data),
    lambda: onnxprune.autoprune(model, data),
):
    try:
        call()
    except onnxprune.PruneError as error:
        assert "pip install 'onnxprune[calibration]'" in str(error)
    else:
        raise AssertionError("scipy was not missed")
"""


def test_what_runs_without_scipy(tmp_path: Path):
    """All but SparseGPT, reconstruction and the search that tries them, which say what to install."""
    model = PACKAGE.parent / "models" / "lenet5.onnx"
    subprocess.run([sys.executable, "-c", WITHOUT_SCIPY, model], check=True, cwd=tmp_path)


def test_public_names():
    assert set(onnxprune.__all__) == PUBLIC, (
        "the public API changed: if that is meant, change PUBLIC here and the README"
    )
    for name in onnxprune.__all__:
        assert getattr(onnxprune, name) is not None
    assert set(dir(onnxprune)) >= PUBLIC


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prune_model'"):
        onnxprune.prune_model  # noqa: B018


@pytest.mark.parametrize(
    "statement", ["import onnxprune", "from onnxprune import prune, inspect, AGPPruner", "import onnxprune.cli"]
)
def test_an_import_loads_neither_framework_nor_runtime(statement):
    code = f"import sys; {statement}; print([m for m in {HEAVY} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_pruning_without_data_loads_no_runtime(tmp_path):
    model = Path(__file__).parents[1] / "models" / "lenet5.onnx"
    target = str(tmp_path / "out.onnx")
    code = (
        f"import sys, onnxprune; onnxprune.prune({str(model)!r}, [{{'sparsity': 0.5}}], {target!r});"
        f"print([m for m in {HEAVY} if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_dependencies_point_downwards(path):
    """A module imports, when it is loaded, from its own floor or a lower one; the bridges are never imported."""
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own in {"__init__", "converters"}:
        return
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("onnxprune."):
            other = node.module.split(".")[1]
            assert FLOORS[other] <= FLOORS[own], f"{path.name} ({own}) imports {node.module}"
