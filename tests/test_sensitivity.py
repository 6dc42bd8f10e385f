"""Curves are what pruning one thing and evaluating says, however they are measured; allocation by them is exact."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

import onnxprune
from onnxprune import curves
from onnxprune.algorithms.allocate import hull, least_loss
from onnxprune.curves import Curve, Point, Sensitivity
from onnxprune.errors import PruneError
from onnxprune.runtime import samples
from onnxprune.runtime.evaluate import Agreement, Evaluation
from onnxprune.runtime.feeds import load_data
from onnxprune.runtime.paired import half_width
from onnxprune.runtime.session import open_session

NET = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N,3,8,8] x) => (float[N,10] y) {
    c = Conv<pads = [1, 1, 1, 1]>(x, conv, bias)
    r = Relu(c)
    p = GlobalAveragePool(r)
    f = Flatten(p)
    h = MatMul(f, first)
    a = Relu(h)
    d = MatMul(a, unused)
    z = Mul(d, zero)
    s = MatMul(a, second)
    y = Add(s, z)
}"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small CNN, one weight of which reaches no output, and 600 samples labelled by it with some noise, by class."""
    folder = tmp_path_factory.mktemp("net")
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(NET)
    shapes = {"conv": (16, 3, 3, 3), "bias": (16,), "first": (16, 32), "unused": (32, 10), "second": (32, 10)}
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, array in {**arrays, "zero": np.zeros(1, np.float32)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    onnx.save(proto, folder / "net.onnx")
    x = rng.standard_normal((600, 3, 8, 8)).astype(np.float32)
    labels = open_session(proto, threads=1).run({"x": x})[0].argmax(1)
    labels[:60] = rng.integers(0, 10, 60)
    order = labels.argsort(kind="stable")
    np.savez(folder / "data.npz", x=x[order], labels=labels[order])
    return folder / "net.onnx", folder / "data.npz"


def measure(files: tuple[Path, Path], **options: object) -> curves.Sensitivity:
    settings = {"levels": (0.5, 0.9), "jobs": 1, "precision": 0.0, "progress": False, **options}
    return onnxprune.sensitivity(*files, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("pattern", ["unstructured", "block:2x1", "grouped:8"])
def test_a_curve_is_pruning_one_weight_and_evaluating(files, pattern, labelled):
    model, data = files
    arrays = dict(np.load(data))
    given = arrays if labelled else {"x": arrays["x"]}
    found = measure((model, given), pattern=pattern)  # type: ignore[arg-type]
    assert found.measure == ("top-1" if labelled else "agreement")
    fit = ["first"] if pattern == "grouped:8" else ["conv", "first", "unused", "second"]
    assert [curve.name for curve in found.curves] == fit
    assert {skipped.name for skipped in found.skipped} == {"conv", "first", "unused", "second"} - set(fit)
    for curve in found.curves:
        for point in curve.points:
            entry = {"op_names": [curve.name], "sparsity": point.level, "pattern": pattern}
            pruned = onnxprune.prune(model, [entry], keep_shape=True)
            evaluation = onnxprune.evaluate(pruned.to_proto(), given, model, threads=1)
            assert point.loss == evaluation.loss
            assert point.error == pytest.approx(evaluation.agreement.error, rel=1e-9)
            assert (point.low, point.high, point.samples) == (point.loss, point.loss, 600)
            assert point.entries == pruned.report.rows[0].zeros
    flat = [curve.name for curve in found.curves if curve.flat]
    assert flat == (["unused"] if "unused" in fit else [])
    assert any("do not depend on 'unused'" in note for note in found.notes) == ("unused" in fit)
    assert len({point.loss for curve in found.curves for point in curve.points}) >= len(fit)


def test_a_groups_curve_is_pruning_its_channels_alone(files):
    model, data = files
    dense = onnxprune.inspect(model)
    found = measure(files, pattern="channel", levels=(0.5,))
    assert [curve.name for curve in found.curves] == ["conv", "first"]
    for curve in found.curves:
        entry = {"op_names": [curve.name], "sparsity": 0.5, "pattern": "channel"}
        pruned = onnxprune.prune(model, [entry], align=1)
        (point,) = curve.points
        assert point.loss == onnxprune.evaluate(pruned.to_proto(), data, model, threads=1).loss
        assert point.macs == dense.macs - onnxprune.inspect(pruned.to_proto()).macs


def test_latency_of_groups_is_measured_where_asked(files):
    found = measure(files, pattern="channel", levels=(0.5,), latency=True)
    assert all(point.latency is not None and point.latency < 1 for curve in found.curves for point in curve.points)
    assert measure(files, pattern="channel", levels=(0.5,)).curves[0].points[0].latency is None


@pytest.mark.parametrize("backend", ["loky", pytest.param("dask", marks=pytest.mark.slow)])
def test_side_by_side_is_one_after_the_other(files, backend):
    alone = measure(files, precision=0.05)
    if backend == "loky":
        assert measure(files, precision=0.05, jobs=2) == alone
        return
    distributed = pytest.importorskip("distributed")
    joblib = pytest.importorskip("joblib")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        joblib.parallel_config(backend="dask"),
    ):
        assert measure(files, precision=0.05, jobs=-1) == alone
        assert len(client.run(lambda: "onnxprune.probe" in sys.modules)) == 2
        assert any(client.run(_probed).values())


def _probed() -> bool:
    return "onnxprune.probe" in sys.modules


def test_few_samples_where_they_tell_enough(files):
    whole, few = measure(files), measure(files, precision=0.05)
    for all_, some in zip(whole.curves, few.curves, strict=True):
        for exact, quick in zip(all_.points, some.points, strict=True):
            assert quick.low <= exact.loss <= quick.high
            assert quick.samples in (256, 512, 600)
            assert quick.high - quick.loss <= max(0.05, 0.2 * quick.loss) or quick.samples == 600
    assert sum(p.samples for c in few.curves for p in c.points) < 600 * 8
    assert few.curves[2].points[0].samples == 256


def test_an_interval_holds_what_it_should():
    """The 99 % interval covers the true difference of two classifiers in about 99 % of many draws."""
    rng = np.random.default_rng(1)
    for right, both in ((0.95, 0.9), (0.9, 0.9), (0.99, 0.7)):
        covered = 0
        for _ in range(2000):
            u = rng.random(256)
            dense, pruned = u < right, (u < both) | (u > 0.999)
            loss = (dense.mean() - pruned.mean()).item()
            same = float((dense == pruned).mean())
            found = Evaluation(256, "top-1", 1 - loss, 1.0, Agreement(same, None, None, None))
            covered += abs(loss - (right - both - 0.001)) <= half_width(found)
        assert covered / 2000 >= 0.985


class TestAllocation:
    @pytest.mark.parametrize("seed", range(8))
    def test_no_choice_of_table_entries_loses_less(self, seed):
        """On convex tables, at every total that a choice of entries reaches, the sum is the least there is."""
        rng = np.random.default_rng(seed)
        tables = []
        for _ in range(3):
            saved = np.cumsum(rng.integers(1, 9, 4))
            slopes = np.sort(rng.random(4))
            tables.append([*zip(saved.tolist(), np.cumsum(slopes * np.diff([0, *saved])).tolist(), strict=True)])
        best: dict[int, float] = {}
        for chosen in itertools.product(*([(0, 0.0), *table] for table in tables)):
            total, loss = sum(s for s, _ in chosen), sum(cost for _, cost in chosen)
            best = {**best, total: min(loss, best.get(total, np.inf))}
        for total, loss in best.items():
            saved = least_loss(tables, total)
            assert sum(saved) == pytest.approx(total)
            predicted = sum(np.interp(s, *zip((0, 0), *t, strict=True)) for s, t in zip(saved, tables, strict=True))
            assert predicted <= loss + 1e-9
        exact = [t for t in best if any(abs(sum(least_loss(tables, t)) - t) < 1e-9 and t == b for b in best)]
        assert len(exact) == len(best)

    def test_any_tables_beat_a_grid(self):
        """On the hulls of tables of any shape no grid point is better."""
        rng = np.random.default_rng(9)
        tables = [[(float(s), float(rng.random())) for s in (2, 5, 6, 9)] for _ in range(3)]
        hulls = [hull(table) for table in tables]

        def predicted(saved: list[float]) -> float:
            return sum(float(np.interp(s, *zip(*h, strict=True))) for s, h in zip(saved, hulls, strict=True))

        for total in (3, 10, 20, 26):
            found = predicted(least_loss(tables, total))
            grid = np.arange(0, 9.25, 0.25)
            others = (p for p in itertools.product(grid, repeat=3) if sum(p) == total)
            assert found <= min(map(predicted, map(list, others))) + 1e-9

    def test_literal_cases(self):
        assert hull([(1, 0.5), (2, 0.1), (3, 0.9), (4, 1.0)]) == [(0.0, 0.0), (2, 0.1), (4, 1.0)]
        assert hull([(2, -0.1), (0, 3.0), (-1, 0.0)]) == [(0.0, 0.0), (2, 0.0)]
        assert least_loss([[(10, 0.1)], [(10, 0.2)]], 15) == [10, 5]
        assert least_loss([[(10, 0.1)], [(30, 0.3)]], 20) == [5, 15]
        assert least_loss([[(10, 0.1)]], 0) == [0]
        with pytest.raises(PruneError, match="20 is to be saved, but all weights together can save 15 at most"):
            least_loss([[(5, 0.1)], [(10, 0.2)]], 20)

    def test_pruning_takes_what_the_curves_say(self, files):
        model, data = files
        result = onnxprune.prune(model, [{"sparsity": 0.6}], allocation="sensitivity", data=data, threads=1)
        shares = onnxprune.sensitivity(model, data, jobs=1, progress=False).allocate(0.6)
        total = sum(row.size for row in result.report.rows)
        assert sum(row.zeros for row in result.report.rows) == int(total * 0.6)
        for row in result.report.rows:
            assert abs(row.zeros - row.size * shares[row.name]) <= 1
        assert len({row.sparsity for row in result.report.rows}) > 1
        uniform = onnxprune.prune(model, [{"sparsity": 0.6}], data=data)
        assert result.evaluation.drop < uniform.evaluation.drop

    @pytest.mark.parametrize("score", ["magnitude", "wanda"])
    def test_calibration_data_decide_and_need_no_labels(self, files, score):
        """What the curves of the unlabelled inputs say, whatever is evaluated beside."""
        model, data = files
        unlabelled = {"x": np.load(data)["x"][:200]}
        given = {"score": score, "allocation": "sensitivity", "calibration": unlabelled, "threads": 1}
        result = onnxprune.prune(model, [{"sparsity": 0.6}], **given)
        found = onnxprune.sensitivity(model, unlabelled, score=score, jobs=1, progress=False)
        assert found.measure == "agreement"
        shares = found.allocate(0.6)
        for row in result.report.rows:
            assert abs(row.zeros - row.size * shares[row.name]) <= 1
        assert result.evaluation is None
        beside = onnxprune.prune(model, [{"sparsity": 0.6}], data=data, **given)
        assert beside.masks == result.masks
        assert beside.evaluation.samples == 600

    def test_the_outputs_error_tells_apart_what_predictions_do_not(self):
        """All predictions are equal, but the first weight moves the outputs by a tenth of what the second does."""
        points = [[Point(s, int(100 * s), 0.0, 0.0, 0.01, 256, 1.0, s**2 * cost) for s in (0.25, 0.5, 0.75, 1.0)]
                  for cost in (0.01, 0.1)]  # fmt: skip
        made = [Curve(name, "Gemm", 100, tuple(own)) for name, own in zip("ab", points, strict=True)]
        found = Sensitivity(tuple(made), "agreement", 256, "unstructured", "magnitude", None)
        assert found.allocate(0.5) == {"a": 1.0, "b": 0.0}
        assert found.allocate(0.25) == {"a": 0.5, "b": 0.0}
        lost = replace(made[0], points=tuple(replace(point, loss=point.level) for point in points[0]))
        assert replace(found, curves=(lost, made[1])).allocate(0.5) == {"a": 0.0, "b": 1.0}
        blind = [replace(curve, points=tuple(replace(p, error=None) for p in curve.points)) for curve in made]
        assert replace(found, curves=tuple(blind)).allocate(0.5) == {"a": 0.5, "b": 0.5}

    def test_macs_and_latency_are_costs_too(self, files):
        found = measure(files, pattern="channel", latency=True)
        shares = found.allocate(0.3, "macs")
        saved = 0.0
        for curve in found.curves:
            levels, macs = [0.0], [0.0]
            for point in curve.points:
                levels.append(point.level)
                macs.append(point.macs)
            saved += np.interp(shares[curve.name], levels, macs)
        assert saved == pytest.approx(0.3 * found.macs, rel=1e-6)
        most = sum(max(p.latency for p in c.points) for c in found.curves)
        if most > 0.02:
            assert max(found.allocate(most / 2, "latency").values()) > 0
        with pytest.raises(PruneError, match="latency was not measured"):
            measure(files, pattern="channel").allocate(0.1, "latency")
        with pytest.raises(PruneError, match="cannot be had"):
            found.allocate(0.999, "macs")

    def test_without_data_it_says_what_it_needs(self, files):
        with pytest.raises(PruneError, match="measures on data"):
            onnxprune.prune(files[0], [{"sparsity": 0.5}], allocation="sensitivity")


class TestCheckpoint:
    def test_a_killed_run_goes_on_to_the_same_result(self, files, tmp_path):
        report = tmp_path / "r.json"
        keep = tmp_path / "keep"
        code = (
            "import sys, json, time, onnxprune; from onnxprune.probe import Probe; real = Probe.measured\n"
            "def slow(*a):\n    print('measuring', flush=True); time.sleep(float(sys.argv[1])); return real(*a)\n"
            "Probe.measured = slow\n"
            f"found = onnxprune.sensitivity({str(files[0])!r}, {str(files[1])!r}, levels=(0.5, 0.9), jobs=1, "
            f"precision=0.0, progress=False, checkpoint={str(keep)!r})\n"
            f"open({str(report)!r}, 'w').write(json.dumps(found.to_dict()))\n"
        )
        first = subprocess.Popen([sys.executable, "-c", code, "0.3"], stdout=subprocess.PIPE, text=True)
        assert first.stdout is not None
        for _ in range(4):
            assert first.stdout.readline() == "measuring\n"
        first.send_signal(signal.SIGKILL)
        first.communicate()
        kept = json.loads(keep.read_text())["records"]
        assert 2 <= len(kept) <= 4
        second = subprocess.run([sys.executable, "-c", code, "0"], capture_output=True, text=True, check=True)
        assert second.stdout.count("measuring") == 8 - len(kept)
        assert json.loads(report.read_text()) == measure(files).to_dict()
        assert not keep.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json"]

    def test_another_runs_checkpoint_is_refused(self, files, tmp_path):
        model, data = files
        keep = tmp_path / "keep"
        arrays = dict(np.load(data))
        made = curves.key(np.zeros(3, np.uint8), load_data(arrays, open_session(model).inputs), {})
        keep.write_text(json.dumps({"key": made, "records": {}}))
        with pytest.raises(
            PruneError, match=r"interrupted run with another model and other options; .*delete the file"
        ):
            measure(files, checkpoint=keep)
        keep.write_text("{}")
        with pytest.raises(PruneError, match=r"is no checkpoint .*delete it"):
            measure(files, checkpoint=keep)
        with pytest.raises(PruneError, match="does not exist"):
            measure(files, checkpoint=tmp_path / "none" / "keep")

    def test_the_key_knows_data_and_model(self, files):
        inputs = open_session(files[0]).inputs
        arrays = dict(np.load(files[1]))
        content = np.zeros(3, np.uint8)
        keys = [curves.key(content, load_data(arrays, inputs), {})]
        keys.append(curves.key(content + 1, load_data(arrays, inputs), {}))
        keys.append(curves.key(content, load_data({**arrays, "labels": arrays["labels"][::-1]}, inputs), {}))
        keys.append(curves.key(content, load_data({**arrays, "x": arrays["x"] + 1}, inputs), {}))
        assert len({json.dumps(k) for k in keys}) == 4
        assert keys[0] == curves.key(content, load_data(arrays, inputs), {})


def test_splitting_keeps_every_sample_once(files):
    dataset = load_data(str(files[1]), open_session(files[0]).inputs)
    seen, held = samples.split(dataset, 0.3, 0)
    assert (seen.samples, held.samples) == (420, 180)
    parts = [*seen.parts, *held.parts]
    rows = np.concatenate([np.c_[p.feed["x"].reshape(p.samples, -1), p.labels] for p in parts])
    arrays = np.load(files[1])
    whole = np.c_[arrays["x"].reshape(600, -1), arrays["labels"]]
    assert np.array_equal(rows[np.lexsort(rows.T)], whole[np.lexsort(whole.T)])
    assert samples.digest(seen) != samples.digest(samples.split(dataset, 0.3, 1)[0])
    feeds = load_data([{"x": arrays["x"][i : i + 2]} for i in range(0, 20, 2)], dataset.inputs)
    assert samples.split(feeds, 0.5, 0)[1].samples == 10
    with pytest.raises(PruneError, match="both parts need some"):
        samples.split(dataset, 1.0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": ()}, "levels are"),
        ({"levels": (1.5,)}, "levels are"),
        ({"pattern": "nope"}, "pattern 'nope' is not known"),
        ({"op_names": ["nope"]}, "matches no weight"),
    ],
)
def test_bad_options(files, options, message):
    with pytest.raises(PruneError, match=message):
        measure(files, **options)


def test_labels_that_do_not_fit_are_told_first(files, tmp_path):
    arrays = dict(np.load(files[1]))
    with pytest.raises(PruneError, match=r"labels reach from \d to 99"):
        measure((files[0], {**arrays, "labels": np.where(arrays["labels"] == 3, 99, arrays["labels"])}))  # type: ignore[arg-type]
    with pytest.raises(PruneError, match="first axis counts samples"):
        measure((files[0], {**arrays, "labels": arrays["labels"][:5]}))  # type: ignore[arg-type]


@pytest.mark.parametrize("jobs", [1, 2])
def test_interrupting_the_command_says_how_to_go_on(files, tmp_path, jobs):
    model, data = (shutil.copy(path, tmp_path) for path in files)
    command = [sys.executable, "-m", "onnxprune", "sensitivity", model, "--data", data, "--jobs", f"{jobs}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [
        "--precision",
        "0",
        "-o",
        str(tmp_path / "r.html"),
        "--levels",
        ",".join(f"{i / 1000:g}" for i in range(1, 900)),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True)
    for _ in range(1200):
        if (tmp_path / "r.html.checkpoint").exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of it
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from here" in told
    assert "Traceback" not in told
    assert json.loads((tmp_path / "r.html.checkpoint").read_text())["records"]
    assert not (tmp_path / "r.html").exists()
