"""The same input makes the same bytes: whatever the run, the threads, the processor's instructions, the Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from model_files import LAYOUTS, net, values, write_external
from nets import parse

from onnxprune import prune

ROOT = Path(__file__).parents[1]

PROGRAM = """
import hashlib, json, os, sys
from pathlib import Path
cpus = int(sys.argv[2])
if cpus:
    os.cpu_count = lambda: cpus
import onnx
from onnxprune import AGPPruner, SensitivityPruner, prune
from onnxprune.algorithms import cuts, select
from onnxprune.graph import assemble, values

for module in (assemble, cuts, select, values):  # small models are shared out among threads, too
    assert hasattr(module, "SPAN")
    module.SPAN = 1 << 12
select.THREADED = cuts.THREADED = 1 << 12

folder = Path(sys.argv[1])
entries = lambda **more: [{"sparsity": 0.6, **more}]
agp = [{"initial_sparsity": 0.1, "final_sparsity": 0.7, "start_epoch": 0, "end_epoch": 9}]
RUNS = {
    "level": lambda *a: prune(a[0], entries(), a[1]),
    "global": lambda *a: prune(a[0], entries(allocation="global"), a[1]),
    "erk": lambda *a: prune(a[0], entries(allocation="erk"), a[1]),
    "2:4": lambda *a: prune(a[0], entries(pattern="2:4", sparsity=0.5, op_types=["MatMul"]), a[1]),
    "sparse": lambda *a: prune(a[0], entries(sparsity=0.9), a[1], sparse=True),
    "agp": lambda *a: AGPPruner(agp).prune(a[0], epoch=4, output=a[1]),
    "sensitivity": lambda *a: SensitivityPruner(entries()).prune(a[0], output=a[1]),
    "channel": lambda *a: prune(a[0], entries(sparsity=0.5, pattern="channel"), a[1], verify=False, align=1),
    "head": lambda *a: prune(a[0], entries(sparsity=0.5, pattern="channel", score="l2"), a[1], verify=False, align=1),
    "grouped": lambda *a: prune(a[0], entries(sparsity=0.5, pattern="grouped:8"), a[1], verify=False, timing=False),
}
found = {}
for source in ("image.onnx", "types.onnx", "large.onnx"):
    for name, run in RUNS.items():
        if (source == "large.onnx" and name not in ("level", "global", "agp", "sensitivity")) or (
            source == "types.onnx" and name in ("channel", "head", "grouped", "2:4")
        ):
            continue
        target = Path(f"{name.replace(':', '-')}-{source}")
        result = run(folder / source, target)
        masks = hashlib.sha256()
        for key in sorted(result.masks):
            masks.update(key.encode() + result.masks[key].tobytes())
        whole = hashlib.sha256()
        for path in (target, *sorted(Path().glob(f"{target}.*data"))):
            whole.update(path.read_bytes())
        bare = onnx.load(target)
        del bare.metadata_props[:]
        graph = hashlib.sha256(bare.SerializeToString(deterministic=True))
        found[f"{name} {source}"] = [whole.hexdigest(), graph.hexdigest(), masks.hexdigest()]
print(json.dumps(found))
"""


def image() -> onnx.ModelProto:
    return parse(
        """(float[N, 3, 12, 12] x) => (float[N, 7] y) {
            a = Conv<kernel_shape = [3, 3]>(x, first, bias) b = Relu(a) c = Conv<kernel_shape = [3, 3]>(b, second)
            d = Relu(c) e = GlobalAveragePool(d) f = Flatten(e) g = MatMul(f, third) h = Relu(g)
            y = MatMul(h, last) }""",
        first=values(24, 3, 3, 3),
        bias=values(24, seed=1),
        second=values(32, 24, 3, 3, seed=2).round(),  # full of ties
        third=values(32, 48, seed=3),
        last=values(48, 7, seed=4).astype(ml_dtypes.bfloat16).astype(np.float32),
    )


def large() -> onnx.ModelProto:
    """Many entries, many of them alike."""
    return parse(
        "(float[2, 600] x) => (float[2, 600] y) { c = Cast<to = 10>(x) h = MatMul(c, w) y = Cast<to = 1>(h) }",
        w=values(600, 600, dtype=np.float16),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    onnx.save(image(), folder / "image.onnx")
    write_external(net(), folder / "types.onnx", LAYOUTS["two files"])
    write_external(large(), folder / "large.onnx", LAYOUTS["one file"])
    return folder


def digests(
    folder: Path, where: Path, cpus: int = 0, python: str = sys.executable, **environment: str
) -> dict[str, list[str]]:
    """What a process of its own makes of the models."""
    where.mkdir()
    done = subprocess.run(
        [python, "-W", "ignore", "-c", PROGRAM, folder, str(cpus)],
        cwd=where, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def instructions() -> dict[str, str]:
    """Levels of the processor's instructions, as what numpy is told not to use."""
    from numpy._core import _multiarray_umath as core

    features: Mapping[str, bool] = core.__cpu_features__
    usable = [name for name in core.__cpu_dispatch__ if features.get(name)]
    wide = [name for name in usable if "512" in name or name == "X86_V4"]
    return {"without wide ones": " ".join(wide), "only what all have": " ".join(usable)}


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return digests(folder, tmp_path_factory.mktemp("expected") / "run")


SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "one processor, other hashes": (1, {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}),
    "again": (0, {}),
    "two processors": (2, {"PYTHONHASHSEED": "2"}),
    "eight processors": (8, {"OMP_NUM_THREADS": "8", "PYTHONHASHSEED": "3"}),
    "another place and language": (0, {"LC_ALL": "C", "TZ": "Asia/Kathmandu", "HOME": "/nonexistent"}),
}


@pytest.mark.parametrize(
    "setting", [name if i == 0 else pytest.param(name, marks=pytest.mark.slow) for i, name in enumerate(SETTINGS)]
)
def test_settings(setting: str, folder: Path, expected: dict[str, list[str]], tmp_path: Path) -> None:
    cpus, environment = SETTINGS[setting]
    assert len(expected) == 20
    assert digests(folder, tmp_path / "run", cpus, **environment) == expected


@pytest.mark.parametrize("level", ["only what all have", pytest.param("without wide ones", marks=pytest.mark.slow)])
def test_instructions(level: str, folder: Path, expected: dict[str, list[str]], tmp_path: Path) -> None:
    disabled = instructions()[level]
    if not disabled:
        pytest.skip("this processor has none of them")
    assert digests(folder, tmp_path / "run", NPY_DISABLE_CPU_FEATURES=disabled) == expected


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_versions_of_python(version: str, folder: Path, expected: dict[str, list[str]], tmp_path: Path) -> None:
    """Those that have what onnxprune needs; ONNXPRUNE_PYTHONS names more of them, separated like PATH."""
    named = os.environ.get("ONNXPRUNE_PYTHONS", "").split(os.pathsep)
    candidates = [*filter(None, named), *filter(None, [shutil.which(f"python{version}")])]
    program = "import sys, onnx, onnx_ir, onnxruntime, scipy, joblib, typer, pydantic; print(sys.version_info[:2])"
    major, minor = version.split(".")
    for python in candidates:
        told = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
        if told.stdout.strip() == f"({major}, {minor})":
            break
    else:
        pytest.skip(f"no Python {version} with onnx, onnxruntime and the rest is installed")
    package = tmp_path / "package"
    shutil.copytree(ROOT / "onnxprune", package / "onnxprune", ignore=shutil.ignore_patterns("__pycache__"))
    found = digests(folder, tmp_path / "run", python=python, PYTHONPATH=str(package))
    # The record in a file names onnxprune's version, which a copy of the sources does not have.
    assert {key: value[1:] for key, value in found.items()} == {key: value[1:] for key, value in expected.items()}


# ------------------------------------------------------------------ several threads


def test_several_threads_on_different_models(folder: Path, tmp_path: Path) -> None:
    """The library called from many threads at once makes what it makes one call after the other."""
    calls = [
        (source, config, options)
        for source, config, options in (
            ("image.onnx", [{"sparsity": 0.6}], {}),
            ("image.onnx", [{"sparsity": 0.5, "pattern": "channel"}], {"align": 1}),
            ("image.onnx", [{"sparsity": 0.7, "allocation": "global"}], {}),
            ("types.onnx", [{"sparsity": 0.6}], {}),
            ("types.onnx", [{"sparsity": 0.5}], {"sparse": True}),
            ("image.onnx", [{"sparsity": 0.5, "pattern": "grouped:8"}], {"timing": False}),
            ("image.onnx", [{"sparsity": 2.0}], {}),
            ("nothing.onnx", [{"sparsity": 0.5}], {}),
        )
        for _ in range(3)
    ]

    def made(where: str, index: int) -> bytes:
        source, config, options = calls[index]
        target = tmp_path / f"{where}-{index:02}.onnx"
        try:
            prune(folder / source, config, target, **options)
        except ValueError as error:
            return str(error).replace(target.name, "").encode()
        parts = [target, *sorted(tmp_path.glob(f"{target.name}.*data"))]
        return b"".join(part.read_bytes() for part in parts).replace(target.name.encode(), b"")

    alone = [made("one", index) for index in range(len(calls))]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda index: made("two", index), range(len(calls))))
    assert together == alone
    assert len(set(alone)) == 8


def test_no_state_but_tables() -> None:
    """What modules and classes hold is the same after all kinds of work as before."""
    program = """
import copy, importlib, pkgutil, sys
import onnxprune
names = [m.name for m in pkgutil.walk_packages(onnxprune.__path__, "onnxprune.") if "converters" not in m.name]
modules = [importlib.import_module(name) for name in names if name != "onnxprune.__main__"]

def state():
    kinds = (dict, list, set, bytearray, int, str, float, tuple, frozenset, type(None))
    found = {}
    for module in modules:
        for key, value in vars(module).items():
            if not key.startswith("__") and isinstance(value, kinds):
                found[module.__name__, key] = repr(value)
    for module in modules:
        for owner in [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == module.__name__]:
            for key, value in vars(owner).items():
                if isinstance(value, (dict, list, set)) and not key.startswith(("__", "model_", "_abc")):
                    found[module.__name__, owner.__name__, key] = repr(value)
    return found

before = state()
import numpy as np
from pathlib import Path
folder = Path(sys.argv[1])
image = folder / "image.onnx"
x = {"x": np.random.default_rng(0).standard_normal((40, 3, 12, 12)).astype(np.float32)}
for pattern in ("unstructured", "channel", "grouped:8"):
    onnxprune.prune(image, [{"sparsity": 0.5, "pattern": pattern}], "out.onnx", data=x)
onnxprune.prune(image, {"score": "wanda", "reconstruct": True, "config_list": [{"sparsity": 0.5}]}, data=x)
import joblib
alone = onnxprune.sensitivity(image, x, levels=[0.5], jobs=1, progress=False)
with joblib.parallel_config(backend="threading"):
    assert onnxprune.sensitivity(image, x, levels=[0.5], jobs=3, progress=False).curves == alone.curves
onnxprune.inspect(folder / "types.onnx")
onnxprune.benchmark(image, runs=3)
from onnxprune.structure import explain
explain(image)
after = state()
for key in sorted(before.keys() | after.keys(), key=str):
    if before.get(key) != after.get(key):
        print(*key)
"""
    import tempfile

    with tempfile.TemporaryDirectory() as where:
        onnx.save(image(), f"{where}/image.onnx")
        onnx.save(net(), f"{where}/types.onnx")
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, where],
            cwd=where, capture_output=True, text=True, check=False, env={**os.environ, "ONNXPRUNE_CACHE": ""},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
