"""The command line says what the Python interface says, exits as promised, and fails in one paragraph."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

import onnxprune
from onnxprune import cli, cli_output, tables

MODELS = Path(__file__).parents[1] / "models"
LENET = str(MODELS / "lenet5.onnx")
DATA = str(MODELS / "mnist-test.npz")

NET = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N,16] x) => (float[N,4] y) {
    t = MatMul(x, first)
    r = Relu(t)
    y = Gemm(r, second)
}"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    proto = parser.parse_model(NET)
    for name, shape in (("first", (16, 12)), ("second", (12, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(proto, tmp_path / "dense.onnx")
    return tmp_path / "dense.onnx"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(4)
    np.savez(tmp_path / "data.npz", x=rng.standard_normal((40, 16)).astype(np.float32), labels=rng.integers(0, 4, 40))
    return tmp_path / "data.npz"


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process; its status, stdout and stderr."""

    def go(*arguments: object) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return go


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "onnxprune", *map(str, arguments)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "80", **environment},
        check=False,
    )


def is_one_paragraph(text: str) -> bool:
    return text.endswith("\n") and "\n" not in text[:-1] and "Traceback" not in text


# ------------------------------------------------------------------------------------------------- the real command


def test_the_newcomers_command(tmp_path: Path) -> None:
    output = tmp_path / "pruned.onnx"
    done = command("prune", LENET, "-o", output, "--sparsity", "0.8", "--data", DATA)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    text = done.stdout
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    for row in onnxprune.prune(LENET, [{"sparsity": 0.8}]).report.rows:
        (line,) = (line for line in text.splitlines() if line.split()[:1] == [row.name])
        assert f"{row.zeros_before:,} → {row.zeros:,}" in line
        assert f"{row.size:,}" in line
        assert "80.00 %" in line
    for label in ("total", "accuracy (top-1)", "non-zero parameters", "file size", "latency"):
        assert f"  {label}" in text
    plain = " ".join(text.split())
    assert "Unstructured sparsity alone does not make onnxruntime faster" in plain
    assert "Measured here: 80.00 % zeros, latency" in plain
    assert f"Written: {output}".replace(" ", "") in text.replace("\n", "").replace(" ", "")
    onnx.checker.check_model(str(output))


def test_gate_not_met_exits_1_and_writes_nothing(tmp_path: Path) -> None:
    done = command(
        "prune", LENET, "-o", tmp_path / "p.onnx", "--sparsity", "0.95", "--data", DATA, "--max-drop", "0.01",
        "--masks", tmp_path / "masks.npz",
    )  # fmt: skip
    assert done.returncode == 1
    assert "gate not met: top-1 fell by" in done.stderr
    assert is_one_paragraph(done.stderr)
    assert "Nothing was written" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_bad_input_exits_2_and_writes_nothing(tmp_path: Path) -> None:
    done = command("prune", tmp_path / "none.onnx", "-o", tmp_path / "p.onnx", "--sparsity", "0.5")
    assert done.returncode == 2
    assert done.stdout == ""
    assert is_one_paragraph(done.stderr)
    assert done.stderr.startswith("error: no such file")
    assert list(tmp_path.iterdir()) == []


def test_installed_as_a_command() -> None:
    found = shutil.which("onnxprune", path=str(Path(sys.executable).parent))
    assert found is not None
    done = subprocess.run([found, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"onnxprune {onnxprune.__version__}\n"


def test_a_closed_pipe_is_quiet(model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxprune", "inspect", str(model), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == cli_output.BROKEN_PIPE
    assert errors == b""


def test_help_loads_neither_onnx_nor_a_runtime() -> None:
    code = (
        "import sys; from onnxprune.cli import main; status = main(['prune', '--help']);"
        "sys.exit(status or len({'onnx', 'onnx_ir', 'numpy', 'onnxruntime'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--sparsity" in done.stdout


# ------------------------------------------------------------------------------------------- JSON is what Python says


def test_prune_json(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.onnx"
    masks = tmp_path / "masks.npz"
    status, out, err = run(
        "prune", model, "-o", output, "--sparsity", "0.5", "--data", data, "--masks", masks, "--threads", "1", "--json"
    )
    assert (status, err) == (0, "")
    found = json.loads(out)
    expected = onnxprune.prune(
        model, [{"sparsity": 0.5, "op_types": "default"}], output=tmp_path / "q.onnx", data=str(data), threads=1
    )
    assert expected.evaluation is not None
    assert output.read_bytes() == (tmp_path / "q.onnx").read_bytes()
    assert found["report"] == expected.report.to_dict()
    assert found["evaluation"] == expected.evaluation.to_dict()
    assert found["sparsity"] == expected.sparsity
    assert found["accepted"] is True
    assert found["output"] == str(output)
    assert onnxprune.Masks.load(masks) == expected.masks
    before, after = onnxprune.inspect(model), onnxprune.inspect(output)
    assert found["sizes"] == {
        "parameters": before.parameters,
        "nonzero_before": before.nonzero,
        "nonzero": after.nonzero,
        "bytes_before": before.file_bytes,
        "bytes": after.file_bytes,
    }
    assert found["benchmark"]["shapes"] == {"x": [1, 16]}
    assert found["benchmark"]["baseline"]["median"] > 0


def test_prune_json_where_the_gate_is_not_met(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "p.onnx"
    status, out, err = run(
        "prune", model, "-o", output, "--sparsity", "1", "--data", data, "--max-drop", "-1", "--json"
    )
    assert status == 1
    assert is_one_paragraph(err)
    found = json.loads(out)
    assert (found["accepted"], found["output"], found["benchmark"]) == (False, None, None)
    assert not output.exists()


def test_inspect_json(run: Run, model: Path) -> None:
    status, out, err = run("inspect", model, "--shape", "x=3x16", "--json")
    assert (status, err) == (0, "")
    expected = onnxprune.inspect(model, {"x": (3, 16)})
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))
    assert json.loads(out)["macs"] == 3 * (16 * 12 + 12 * 4)


@pytest.mark.parametrize("baseline", [True, False])
def test_evaluate_json(run: Run, model: Path, data: Path, tmp_path: Path, baseline: bool) -> None:
    pruned = tmp_path / "p.onnx"
    onnxprune.prune(model, [{"sparsity": 0.6}], output=pruned)
    options = ["--baseline", model] if baseline else []
    status, out, err = run("evaluate", pruned, "--data", data, *options, "--threads", "1", "--json")
    assert (status, err) == (0, "")
    expected = onnxprune.evaluate(pruned, str(data), model if baseline else None, threads=1)
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))


def test_benchmark_json(run: Run, model: Path) -> None:
    status, out, err = run("benchmark", model, "--baseline", model, "--shape", "x=5x16", "--runs", "4", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    expected = onnxprune.benchmark(model, model, shapes={"x": (5, 16)}, runs=4).to_dict()
    assert found.keys() == expected.keys()
    for key in ("shapes", "notes", "versions", "threads", "runs"):
        assert found[key] == expected[key]
    assert found["latency"].keys() == expected["latency"].keys()


@pytest.mark.parametrize("verb", ["inspect", "evaluate", "benchmark"])
def test_verbs_as_text(run: Run, model: Path, data: Path, verb: str) -> None:
    options: dict[str, list[object]] = {
        "inspect": [],
        "evaluate": ["--data", data, "--baseline", model],
        "benchmark": ["--runs", "4"],
    }
    status, out, err = run(verb, model, *options[verb])
    assert (status, err) == (0, "")
    wanted = {"inspect": "48", "evaluate": "accuracy (top-1)", "benchmark": "Latency"}[verb]
    assert wanted in out
    assert "\n\n\n" not in out
    assert not any(line.endswith(" ") for line in out.splitlines())


def test_stdout_is_for_results_only(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = """import numpy as np
def data():
    print("loading")
    return {"x": np.ones((4, 16), np.float32), "labels": np.zeros(4, int)}
"""
    (tmp_path / "noisy_data.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    status, out, err = run("evaluate", model, "--data", "noisy_data:data", "--json")
    assert (status, err) == (0, "loading\n")
    assert json.loads(out)["samples"] == 4


# ---------------------------------------------------------------------------------------------------- configurations

FORMS = {
    "list.yaml": "- {sparsity: 0.5, op_types: default}\n",
    "list.json": '[{"sparsity": 0.5, "op_types": ["default"]}]',
    "mapping.yaml": "pruner: level\nconfig_list:\n- sparsity: 0.5\n  op_types: default\n",
    "mapping.json": '{"pruner": "level", "score": "magnitude", "config_list": [{"sparsity": 0.5}]}',
    "mapping.toml": 'pruner = "level"\n[[config_list]]\nsparsity = 0.5\nop_types = "default"\n',
}


@pytest.mark.parametrize("name", FORMS)
def test_a_configuration_file_does_what_sparsity_does(run: Run, model: Path, tmp_path: Path, name: str) -> None:
    config = tmp_path / name
    config.write_text(FORMS[name])
    plain, configured = tmp_path / "plain.onnx", tmp_path / "configured.onnx"
    assert run("prune", model, "-o", plain, "--sparsity", "0.5", "--no-benchmark")[0] == 0
    assert run("prune", model, "-o", configured, "--config", config, "--no-benchmark")[0] == 0
    one, two = (onnx.load(path).graph.initializer for path in (plain, configured))
    assert [tensor.SerializeToString() for tensor in one] == [tensor.SerializeToString() for tensor in two]


OPTIONS: dict[str, tuple[list[str], Any, dict[str, Any]]] = {
    "op types": (["--op-types", "Gemm"], [{"op_types": ["Gemm"]}], {}),
    "op types in one": (["--op-types", "Gemm,MatMul"], [{"op_types": ["Gemm", "MatMul"]}], {}),
    "op names": (["--op-names", "fi*"], [{"op_names": ["fi*"]}], {}),
    "exclude": (["--exclude", "first"], [{}, {"op_names": "first", "exclude": True}], {}),
    "global": (["--allocation", "global"], [{}], {"allocation": "global"}),
    "2:4": (["--pattern", "2:4"], [{}], {"pattern": "2:4"}),
    "agp": (["--pruner", "agp", "--epoch", "3"], [{}], {"pruner": "agp", "epoch": 3}),
    "sensitivity": (["--pruner", "sensitivity"], [{}], {"pruner": "sensitivity"}),
    "score": (["--score", "magnitude"], [{}], {"score": "magnitude"}),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_are_the_interfaces(run: Run, model: Path, tmp_path: Path, case: str) -> None:
    options, config, keywords = OPTIONS[case]
    config = [entry if "exclude" in entry else {"sparsity": 0.5, **entry} for entry in config]
    status, out, err = run(
        "prune", model, "-o", tmp_path / "p.onnx", "--sparsity", "0.5", *options, "--no-benchmark", "--json"
    )
    assert (status, err) == (0, "")
    expected = onnxprune.prune(model, config, **keywords)
    assert json.loads(out)["report"]["weights"] == expected.report.to_dict()["weights"]


def test_epoch_is_where_the_schedule_is(run: Run, model: Path, tmp_path: Path) -> None:
    entry = {"final_sparsity": 0.8, "start_epoch": 1, "end_epoch": 10}
    config = tmp_path / "agp.json"
    config.write_text(json.dumps({"pruner": "agp", "config_list": [entry]}))
    status, out, _ = run(
        "prune", model, "-o", tmp_path / "p.onnx", "--config", config, "--epoch", "4", "--no-benchmark", "--json"
    )
    assert status == 0
    expected = onnxprune.AGPPruner([entry]).prune(model, epoch=4)
    assert 0 < expected.sparsity < 0.7
    assert json.loads(out)["report"] == expected.report.to_dict()


def test_a_pattern_says_its_own_sparsity(run: Run, model: Path, tmp_path: Path) -> None:
    status, out, _ = run("prune", model, "-o", tmp_path / "p.onnx", "--pattern", "2:4", "--no-benchmark", "--json")
    assert status == 0
    assert json.loads(out)["sparsity"] == 0.5


def test_what_the_configuration_leaves_out_is_told(run: Run, model: Path, tmp_path: Path) -> None:
    arguments = ("prune", model, "-o", tmp_path / "p.onnx", "--sparsity", "0.5", "--exclude", "first", "--no-benchmark")
    status, out, _ = run(*arguments)
    assert status == 0
    assert "first (MatMul)" in out
    (told,) = json.loads(run(*arguments, "--json")[1])["report"]["skipped"]
    assert told["name"] == "first"


def test_in_place_needs_force(run: Run, model: Path) -> None:
    before = model.read_bytes()
    status, _, err = run("prune", model, "-o", model, "--sparsity", "0.5")
    assert status == 2
    assert "--force" in err
    assert model.read_bytes() == before
    status, out, err = run("prune", model, "-o", model, "--sparsity", "0.5", "--force")
    assert (status, err) == (0, "")
    assert "the dense model was replaced" in " ".join(out.split())
    assert onnxprune.inspect(model).sparsity == 0.5


def test_a_latency_that_cannot_be_measured_is_no_failure(run: Run, tmp_path: Path) -> None:
    text = NET.replace(
        "t = MatMul(x, first)", "k = Constant<value_ints=[-1,32]>() z = Reshape(x, k) t = MatMul(z, first)"
    )
    proto = parser.parse_model(text)
    for name, shape in (("first", (32, 12)), ("second", (12, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(proto, tmp_path / "pairs.onnx")  # needs an even number of rows, and one is the default
    arguments = ("prune", tmp_path / "pairs.onnx", "-o", tmp_path / "p.onnx", "--sparsity", "0.5")
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    assert "Latency was not measured" in out
    assert (tmp_path / "p.onnx").exists()
    assert json.loads(run(*arguments, "--json")[1])["benchmark_skipped"]
    assert json.loads(run(*arguments, "--shape", "x=2x16", "--json")[1])["benchmark"]["shapes"] == {"x": [2, 16]}


# ------------------------------------------------------------------------------------------------------------ errors

ERRORS: dict[str, tuple[list[str], str]] = {
    "no command": (["prunes"], "No such command"),
    "no model": (["prune"], "MODEL"),
    "no output": (["prune", "dense.onnx", "--sparsity", "0.5"], "--output"),
    "no sparsity": (["prune", "dense.onnx", "-o", "p.onnx"], "--sparsity S"),
    "no number": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "half"], "--sparsity"),
    "sparsity too large": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "1.5"], "1.5"),
    "sparsity and config": (
        ["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--config", "c"],
        "--config and",
    ),
    "names and config": (["prune", "dense.onnx", "-o", "p.onnx", "--config", "c", "--op-names", "n"], "--op-names"),
    "no config": (["prune", "dense.onnx", "-o", "p.onnx", "--config", "c.yaml"], "c.yaml"),
    "no such pruner": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--pruner", "x"], "'agp', 'level'"),
    "nothing matches": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--op-types", "Conv"], "Gemm"),
    "no such weight": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--exclude", "frist"], "first"),
    "gate without data": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--max-drop", "0.1"], "--data"),
    "no data": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--data", "d.npz"], "d.npz"),
    "no folder": (["prune", "dense.onnx", "-o", "no/p.onnx", "--sparsity", "0.5"], "folder"),
    "no folder for masks": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--masks", "no/m"], "folder"),
    "masks over the model": (
        ["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--masks", "p.onnx"],
        "--masks",
    ),
    "a shape of no input": (["prune", "dense.onnx", "-o", "p.onnx", "--sparsity", "0.5", "--shape", "z=1"], "'z'"),
    "no shape": (["inspect", "dense.onnx", "--shape", "x"], "x=1x3x224x224".replace("x=", "input=")),
    "no onnx": (["inspect", "noise.onnx"], "not an ONNX model"),
    "nothing to evaluate against": (["evaluate", "dense.onnx", "--data", "unlabelled.npz"], "labels"),
    "data that do not fit": (["evaluate", "dense.onnx", "--data", "other.npz"], "'x' float32"),
    "no runs": (["benchmark", "dense.onnx", "--runs", "0"], "runs"),
    "no threads": (["benchmark", "dense.onnx", "--threads", "0"], "threads"),
}


@pytest.mark.parametrize("case", ERRORS)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_errors(run: Run, model: Path, case: str, options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, expected = ERRORS[case]
    monkeypatch.chdir(model.parent)
    Path("noise.onnx").write_bytes(b"\x08\x07noise" * 9)
    np.savez("unlabelled.npz", x=np.ones((4, 16), np.float32))
    np.savez("other.npz", x=np.ones((4, 9), np.float32))
    before = {path: path.read_bytes() for path in Path().iterdir()}
    status, out, err = run(*arguments, *options)
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert expected in err
    assert is_one_paragraph(err)
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_no_command_shows_the_help(run: Run) -> None:
    status, out, _ = run()
    assert status == 2
    assert "benchmark" in out


def test_a_fault_is_one_paragraph_and_a_traceback_on_request(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("onnxprune.inspection.inspect", broken)
    status, out, err = run("inspect", model)
    assert (status, out) == (2, "")
    assert is_one_paragraph(err)
    assert "RuntimeError: two lines" in err
    assert "ONNXPRUNE_DEBUG=1" in err
    monkeypatch.setenv("ONNXPRUNE_DEBUG", "1")
    assert "Traceback" in run("inspect", model)[2]


ENDLESS = """(float[2, 4] x) => (float[2, 4] y) { m = Constant<value = int64 {9223372036854775807}>()
    c = Constant<value = bool {1}>() y = Loop(m, c, x) <body = b (int64 i, bool p, float[2, 4] a) =>
    (bool q, float[2, 4] d) { q = Identity(p) d = Relu(a) }> }"""


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent otherwise there")
def test_an_interrupt_ends_what_a_library_does_not(tmp_path: Path) -> None:
    """A model that runs for ever is in onnxruntime's hands, where Python cannot interrupt it."""
    proto = parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> g {ENDLESS}')
    onnx.save(proto, tmp_path / "endless.onnx")
    (tmp_path / "spy.py").write_text(
        "import numpy, pathlib\n"
        "def feeds():\n    pathlib.Path('called').touch()\n    return [{'x': numpy.ones((2, 4), numpy.float32)}]\n"
    )
    command = [sys.executable, "-m", "onnxprune", "evaluate", "endless.onnx", "--data", "spy:feeds"]
    command += ["--baseline", "endless.onnx"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=-1, stderr=-1, text=True, start_new_session=True)
    for _ in range(1200):
        if (tmp_path / "called").exists():
            break
        time.sleep(0.05)
    time.sleep(1.0)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    out, told = process.communicate(timeout=60)
    took = time.monotonic() - sent
    assert (process.returncode, out, told) == (130, "", "interrupted\n")
    assert 1.0 <= took < 5, took


def test_an_interrupt_is_one_line(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxprune.inspection.inspect", interrupted)
    assert run("inspect", model) == (130, "", "interrupted\n")


def test_names_are_shown_as_they_are_and_do_no_harm(run: Run, tmp_path: Path) -> None:
    names = ["[red]evil[/red]", ":smile:", "bell\x07\x1b[31m", "a" * 200, "two\nlines"]
    proto = parser.parse_model('<ir_version: 9, opset_import: ["" : 18]> g (float[1,4] x0) => (y) {}')
    for index, name in enumerate(names):
        proto.graph.node.append(onnx.helper.make_node("MatMul", [f"x{index}", name], [f"x{index + 1}"]))
        proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), name))
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("x5", onnx.TensorProto.FLOAT, [1, 4]))
    onnx.save(proto, tmp_path / "m.onnx")
    for arguments in (
        ("inspect", tmp_path / "m.onnx"),
        ("prune", tmp_path / "m.onnx", "-o", tmp_path / "p.onnx", "--sparsity", "0.5", "--no-benchmark"),
    ):
        status, out, err = run(*arguments)
        assert (status, err) == (0, "")
        assert "[red]evil[/red]" in out
        assert ":smile:" in out
        assert r"bell\x07\x1b[31m" in out
        assert r"two\nlines" in out
        assert "\x1b" not in out
        assert "\x07" not in out
        assert out.count("a") >= 200
        assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.8, "80.00 %"), (1.0, "100.00 %"), (0.999999, "99.99 %"), (0.0, "0.00 %"), (0.12345, "12.35 %")],
)
def test_percent(share: float, text: str) -> None:
    assert tables.percent(share) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 bytes"), (1000, "1 kB"), (1_726_660, "1.727 MB"), (2_000_000_000, "2 GB"), (123_456, "123.5 kB")],
)
def test_size(count: int, text: str) -> None:
    assert tables.size(count) == text
