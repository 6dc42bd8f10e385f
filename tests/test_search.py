"""The search keeps its promise on data it has not seen, goes on where it was killed, and ends when it is told to."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnxprune
from onnxprune import cli, curves, search
from onnxprune.errors import PruneError
from onnxprune.recipes import Recipe, recipes
from onnxprune.runtime import samples
from onnxprune.runtime.evaluate import Evaluation
from onnxprune.runtime.feeds import load_data
from onnxprune.runtime.paired import Paired
from onnxprune.runtime.session import open_session

NET = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N,24] x) => (float[N,6] y) {
    h = Gemm(x, first, bias)
    a = Relu(h)
    m = MatMul(a, middle)
    b = Relu(m)
    y = MatMul(b, second)
}"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A net with weights of very different size, and 900 samples that it labels itself, but for some."""
    folder = tmp_path_factory.mktemp("net")
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NET)
    for name, shape in {"first": (24, 64), "bias": (64,), "middle": (64, 64), "second": (64, 6)}.items():
        array = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1]))
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(proto, folder / "net.onnx")
    x = rng.standard_normal((900, 24)).astype(np.float32)
    labels = open_session(proto, threads=1).run({"x": x})[0].argmax(1)
    labels[:90] = rng.integers(0, 6, 90)
    np.savez(folder / "data.npz", x=x, labels=labels)
    return folder / "net.onnx", folder / "data.npz"


def run(files: tuple[Path, Path], output: Path | None = None, **options: Any) -> search.Search:
    return onnxprune.autoprune(*files, output, **{"jobs": 1, "max_drop": 0.03, **options})


def same(one: search.Search, other: search.Search) -> bool:
    return one.to_dict() == other.to_dict()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "STEPS", 3)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("target", ["size", "macs"])
@pytest.mark.usefixtures("quick")
def test_the_kept_model_is_within_the_drop_on_data_held_back(files, target, labelled, tmp_path):
    arrays = dict(np.load(files[1]))
    data = arrays if labelled else {"x": arrays["x"]}
    found = run((files[0], data), tmp_path / "o.onnx", target=target)  # type: ignore[arg-type]
    assert found.best is not None
    assert found.path == tmp_path / "o.onnx"
    assert [path.name for path in tmp_path.iterdir()] == ["o.onnx"]
    seen, held = samples.split(load_data(data, open_session(files[0]).inputs), 0.3, 0)
    assert (found.search_samples, found.held_back_samples) == (seen.samples, held.samples) == (630, 270)
    again = onnxprune.evaluate(tmp_path / "o.onnx", held, files[0], threads=1)
    assert again.loss == found.best.held_back <= 0.03
    assert onnxprune.evaluate(tmp_path / "o.onnx", seen, files[0], threads=1).loss == found.best.loss <= 0.03
    if target == "macs":
        dense = onnxprune.inspect(files[0]).macs
        assert onnxprune.inspect(tmp_path / "o.onnx").macs / dense == found.best.value < 1
    else:
        assert found.best.value == _deflated(tmp_path / "o.onnx") / _deflated(files[0]) < 1
    within = [c for c in found.candidates if c.held_back is not None and c.held_back <= 0.03]
    assert found.best.value == min(c.value for c in within if c.value is not None)
    front = found.frontier
    assert all(a.loss < b.loss and a.value > b.value for a, b in itertools.pairwise(front))
    assert len({candidate.recipe for candidate in found.candidates}) >= 4


def _deflated(path: Path) -> int:
    import zlib

    packer = zlib.compressobj(1)
    return len(packer.compress(path.read_bytes())) + len(packer.flush())


@pytest.mark.parametrize("drop", [0.01, 0.02, 0.03, 0.07, 0.1])
def test_a_drop_of_just_so_much_is_within_it(drop):
    """0.95 - 0.94 is more than 0.01 in binary."""
    for right in range(11, 101):
        lost = round(100 * drop)
        found = Evaluation(100, "top-1", (right - lost) / 100, right / 100, None)
        assert found.within(drop)
        assert not replace(found, samples=100, score=(right - lost - 1) / 100).within(drop)


def test_latency_is_measured_and_significant(files, tmp_path, monkeypatch):
    monkeypatch.setattr(search, "recipes", lambda target: [Recipe("channel", "uniform")])
    monkeypatch.setattr(search, "STEPS", 1)
    found = run(files, tmp_path / "o.onnx", target="latency", max_drop=0.99)
    (tried,) = found.candidates
    assert tried.value is not None
    if found.best is None:  # on a busy machine
        assert not (tmp_path / "o.onnx").exists()
        return
    assert found.benchmark is not None
    assert found.benchmark["significant"]
    assert found.best.value == pytest.approx(1 / found.benchmark["speedup"])
    assert found.benchmark["latency"]["median"] < found.benchmark["baseline"]["median"]


@pytest.mark.parametrize("allocation", ["uniform", "sensitivity"])
def test_grouped_inputs_are_tried_with_measured_latency(files, tmp_path, monkeypatch, allocation):
    assert Recipe("grouped", allocation) in recipes("latency")
    monkeypatch.setattr(search, "recipes", lambda target: [Recipe("grouped", allocation)])
    monkeypatch.setattr(search, "STEPS", 1)
    asked: list[bool] = []
    real = curves.measure
    monkeypatch.setattr(curves, "measure", lambda *a, **more: [asked.append(more["latency"]), real(*a, **more)][1])
    found = run(files, tmp_path / "o.onnx", target="latency", max_drop=0.99)
    assert asked == ([True] if allocation == "sensitivity" else [])
    (tried,) = found.candidates
    assert tried.value is not None or allocation == "sensitivity"  # so much latency may not be had


@pytest.mark.usefixtures("quick")
def test_what_is_held_back_decides_about_nothing_else(files, tmp_path, monkeypatch):
    """With a gate that never opens the search tries the same models with the same results, and writes none."""
    asked: list[int] = []
    real = Paired.compare

    def shut(self: Paired, *arguments: Any, **more: Any) -> Any:
        evaluation, half = real(self, *arguments, **more)
        asked.append(self.dataset.samples)
        if self.dataset.samples == 270:
            evaluation = type(evaluation)(270, "top-1", 0.0, 1.0, evaluation.agreement)
        return evaluation, half

    opened = run(files, tmp_path / "o.onnx")
    monkeypatch.setattr(Paired, "compare", shut)
    closed = run(files, tmp_path / "c.onnx")
    assert closed.best is None
    assert not (tmp_path / "c.onnx").exists()
    assert [(c.recipe, c.strength, c.loss, c.value) for c in closed.candidates] == [
        (c.recipe, c.strength, c.loss, c.value) for c in opened.candidates
    ]
    assert asked.count(270) > 1


@pytest.mark.usefixtures("quick")
def test_a_killed_search_goes_on_to_the_same_table(files, tmp_path):
    code = (
        "import sys, json, onnxprune; from onnxprune import search; search.STEPS = 3\n"
        f"found = onnxprune.autoprune({str(files[0])!r}, {str(files[1])!r}, {str(tmp_path / 'o.onnx')!r}, jobs=1, "
        f"max_drop=0.03, checkpoint={str(tmp_path / 'keep')!r}, progress=lambda c: print('tried', flush=True))\n"
        "json.dump(found.to_dict(), sys.stderr)\n"
    )
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert killed.stdout is not None
    for _ in range(4):
        assert killed.stdout.readline() == "tried\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = json.loads((tmp_path / "keep").read_text())["records"]
    assert len(kept) >= 4
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = run(files, tmp_path / "other.onnx").to_dict()
    result = json.loads(done.stderr)
    assert {**result, "output": None} == {**expected, "output": None}
    assert (tmp_path / "o.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()
    assert not (tmp_path / "keep").exists()


@pytest.mark.parametrize("later", [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
def test_ctrl_c_keeps_the_best_so_far(later, files, tmp_path):
    """At any moment, also while processes are started: the pool of them is locked then."""
    output = tmp_path / "o.onnx"
    command = [sys.executable, "-m", "onnxprune", "auto", str(files[0]), "--data", str(files[1]), "-o", str(output)]
    command += ["--max-drop", "0.2", "--jobs", "2", "--json"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True)
    assert process.stderr is not None
    assert "tried" not in process.stderr.readline()
    for _ in range(2400):
        if output.exists():
            break
        time.sleep(0.1)
    time.sleep(later)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of it
    told = time.monotonic()
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - told
    assert process.returncode == 130
    assert out, err
    assert out, (took, err)
    found = json.loads(out)
    assert found["ended"] == "interrupted"
    assert found["best"]["written"]
    assert "Traceback" not in err
    assert any("goes on from here" in note for note in found["notes"])
    assert output.exists()
    assert took < 5, took  # 2 s are promised where a process gets the time it needs


@pytest.mark.usefixtures("quick")
def test_the_time_ends_it(files, tmp_path):
    found = run(files, tmp_path / "o.onnx", time_limit=0.01, checkpoint=tmp_path / "keep")
    assert found.ended == "time"
    assert any("goes on from here" in note for note in found.notes)
    whole = run(files, tmp_path / "o.onnx", checkpoint=tmp_path / "keep")
    assert whole.ended == "searched"
    assert same(whole, run(files, tmp_path / "o.onnx"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "speed"}, "target 'speed' is not known"),
        ({"max_drop": 1.5}, "max_drop is 1.5"),
        ({"time_limit": 0}, "time limit"),
        ({"hold_back": 0.0}, "both parts need some"),
        ({"checkpoint": "/nowhere/keep"}, "does not exist"),
    ],
)
def test_bad_options(files, options, message):
    with pytest.raises(PruneError, match=message):
        run(files, **options)


def test_over_the_model_only_if_forced(files):
    with pytest.raises(PruneError, match="is the input itself"):
        run(files, files[0])


@pytest.mark.parametrize("text", ["", "ten", "5d", "0m", "-1s"])
def test_a_time_that_is_none(files, text, capsys):
    command = ["auto", str(files[0]), "--data", str(files[1]), "-o", "o.onnx", f"--time={text}"]
    assert cli.main(command) == cli.BAD_INPUT
    assert "expected a duration such as 90s, 10m or 2h" in capsys.readouterr().err
