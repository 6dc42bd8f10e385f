"""A run that is killed leaves the old file or the new one, and nothing that the next run does not clear away."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import statistics
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import onnx
import pytest
from forked import Server, server
from model_files import HALF, LAYOUTS, net, stored, tree, values, write_external
from nets import parse

from onnxprune import cli, prune
from onnxprune.graph import files, saving

pytestmark = pytest.mark.skipif(files.fcntl is None, reason="there are no locks here")

KILLED = """
import os, shutil, signal, sys, tempfile
import onnxprune
from onnxprune.graph import assemble, files, model, saving, wire

source, target, scene, force = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "force"
model.LARGE, wire.LEAST = 0, 100
OPERATIONS = [
    (os, "fsync"), (os, "replace"), (assemble, "write"), (assemble, "_put"), (shutil, "copymode"), (files, "_remove"),
    (tempfile, "mkdtemp"), (files, "put"), (files, "sync"), (os, "unlink"), (saving, "tidy"),
]
calls = 0

def armed(function, last):
    def wrapper(*args, **kwargs):
        global calls
        calls += 1
        if calls == last:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        return result
    return wrapper

onnxprune.prune(source, [{"sparsity": 0.5}])  # all is imported
for last in range(1, 200):
    shutil.copytree(scene, f"{scene}-{last}")
    child = os.fork()
    if child == 0:
        for owner, name in OPERATIONS:
            setattr(owner, name, armed(getattr(owner, name), last))
        os.chdir(f"{scene}-{last}")
        onnxprune.prune(source, [{"sparsity": 0.5}], target, force=force)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        print(last)
        break
"""


@pytest.mark.parametrize("where", ["in place", "another name"])
@pytest.mark.parametrize("kind", ["single", "external"])
def test_killed_at_any_call(kind: str, where: str, tmp_path: Path) -> None:
    """Killed before each operation on files in turn; then a second run, of another model, onto the same name."""
    scene = tmp_path / "scene"
    scene.mkdir()
    if kind == "single":
        (scene / "model.onnx").write_bytes(net().SerializeToString())
        (scene / "out.onnx").write_bytes(net().SerializeToString())
    else:
        write_external(net(), scene / "model.onnx", lambda index, name: "model.onnx.data")
        write_external(net(), scene / "out.onnx", lambda index, name: "out.onnx.data")
    target = "model.onnx" if where == "in place" else "out.onnx"
    command = [sys.executable, "-c", KILLED, "model.onnx", target, str(scene), "force" if where == "in place" else "no"]
    done = subprocess.run(command, cwd=scene, capture_output=True, text=True, check=True)
    killed = int(done.stdout) - 1
    assert killed >= 12
    old, new = stored(net()), stored(prune(net(), HALF).to_proto())
    ends = set()
    for last in range(1, killed + 1):
        folder = tmp_path / f"scene-{last}"
        now = stored(onnx.load(folder / target))
        assert now in (old, new)
        ends.add(now == new)
        if where != "in place":
            before, after = tree(scene), tree(folder)
            assert {n: h for n, h in after.items() if n.startswith("model")} == {
                n: h for n, h in before.items() if n.startswith("model")
            }
        prune(net(), HALF, folder / "other.onnx")
        assert stored(onnx.load(folder / target)) == now
        left = {path.name for path in folder.iterdir()} - {"other.onnx"}
        named = {entry.value for m in ("model", "out") for t in _tensors(folder / f"{m}.onnx") for entry in t}
        assert left == {"model.onnx", "out.onnx"} | named
    assert ends == {True, False}


@pytest.fixture(scope="module")
def forked() -> Iterator[Server]:
    with server(ONNXPRUNE_CACHE="") as running:
        yield running


def large(seed: int = 0) -> onnx.ModelProto:
    """A model whose saving takes a share of a run."""
    names = "abcdef"
    body = " ".join(f"h{n} = MatMul({'x' if i == 0 else f'h{names[i - 1]}'}, {n})" for i, n in enumerate(names))
    return parse(
        f"(float[2, 256] x) => (float[2, 256] y) {{ {body} y = Relu(hf) }}",
        **{n: values(256, 256, seed=seed + i) for i, n in enumerate(names)},
    )


def scene_of(kind: str, folder: Path, model: onnx.ModelProto) -> None:
    """model.onnx, and what stood at out.onnx."""
    folder.mkdir()
    for name in ("model.onnx", "out.onnx"):
        if kind == "single":
            (folder / name).write_bytes(model.SerializeToString())
        else:
            write_external(model, folder / name, lambda index, tensor, name=name: f"{name}.data")


@pytest.mark.parametrize("count", [10, pytest.param(75, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["in place", "another name"])
@pytest.mark.parametrize("kind", ["single", "external"])
def test_killed_at_random_moments(kind: str, where: str, count: int, forked: Server, tmp_path: Path) -> None:
    """The real command, killed whenever: the target is the old file or the whole new one; the next run clears up."""
    scene = tmp_path / "scene"
    scene_of(kind, scene, large())
    target = "model.onnx" if where == "in place" else "out.onnx"
    force = ["--force"] if where == "in place" else []
    command = ["prune", "model.onnx", "-o", target, "--sparsity", "0.5", "--no-benchmark", *force]
    again = ["prune", "model.onnx", "-o", "other.onnx", "--sparsity", "0.5", "--no-benchmark"]
    old, new = stored(large()), stored(prune(large(), HALF).to_proto())
    took: deque[float] = deque(maxlen=5)  # seconds of the last whole runs: machines get faster and slower
    for index in range(3):
        shutil.copytree(scene, tmp_path / f"whole-{index}")
        done = forked.run(command, tmp_path / f"whole-{index}")
        assert done.status == 0
        assert stored(onnx.load(tmp_path / f"whole-{index}" / target)) == new
        took.append(done.seconds)
    moments = random.Random(f"{kind} {where} {count}")
    killed = runs = 0
    while killed < count:
        runs += 1
        assert runs < 10 * count, f"of {runs} runs, only {killed} were killed"
        folder = shutil.copytree(scene, tmp_path / "folder")
        done = forked.run(command, folder, killed_after=moments.uniform(0, 1.1 * statistics.median(took)))
        killed += done.status == -9
        assert done.status in (0, -9), done.err
        now = stored(onnx.load(folder / target))
        assert now == new if done.status == 0 else now in (old, new)
        if where != "in place":
            assert tree(scene).items() >= {n: h for n, h in tree(folder).items() if n.startswith("model")}.items()
        whole = forked.run(again, folder)
        assert whole.status == 0
        took.append(whole.seconds)
        assert stored(onnx.load(folder / target)) == now
        named = {entry.value for m in folder.glob("*.onnx") for t in _tensors(m) for entry in t}
        assert {path.name for path in folder.iterdir()} == {"model.onnx", "out.onnx", "other.onnx"} | named
        shutil.rmtree(folder)


def test_what_is_synced_before_a_rename(tmp_path: Path) -> None:
    """Every file that takes another's place is on disk before it does, and the folder's entries are afterwards."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    source = write_external(net(), tmp_path / "model.onnx", LAYOUTS["two files"])
    calls = "openat,fsync,fdatasync,rename,renameat,renameat2,close"
    log = tmp_path / "log.txt"
    program = "import onnxprune, sys; onnxprune.prune(sys.argv[1], [{'sparsity': 0.5}], sys.argv[2])"
    out = tmp_path / "out.onnx"
    traced = subprocess.run(
        ["strace", "-f", "-y", "-o", log, "-e", f"trace={calls}", sys.executable, "-c", program, source, out],
        capture_output=True,
        check=False,
    )
    if traced.returncode:
        pytest.skip(f"strace cannot be used here: {traced.stderr.decode()[-200:]}")
    synced: set[str] = set()
    renamed: list[str] = []
    for line in log.read_text(errors="replace").splitlines():
        call = line.split(maxsplit=1)[1]
        if call.startswith(("fsync(", "fdatasync(")):
            synced.add(call.split("<")[1].split(">")[0])
            if call.split("<")[1].split(">")[0] == str(tmp_path):
                renamed = [name for name in renamed if name == "never"]
        elif call.startswith("rename") and str(out) in call:
            staged, target = call.split('"')[1], call.split('"')[3]
            assert staged in synced, f"{staged} was renamed before it was on disk"
            if target == str(out):
                assert not renamed, "data files were renamed, and the folder was not synced before the model was"
            renamed.append(target)
    assert not renamed, "the folder was not synced after the last rename"
    assert len([name for name in synced if "out.onnx" in name]) == 3


def test_two_runs_onto_one_target(forked: Server, tmp_path: Path) -> None:
    """Runs at once, of models with and without data files, leave one whole model, and nothing else."""
    wanted = [stored(prune(model, HALF).to_proto()) for model in (large(), large(10))]
    with server(ONNXPRUNE_CACHE="") as second:
        for attempt in range(10):
            folder = tmp_path / f"{attempt}"
            folder.mkdir()
            (folder / "model.onnx").write_bytes(large().SerializeToString())
            write_external(large(10), folder / "data.onnx", lambda index, name: "data.bin")
            pair = ("model.onnx" if attempt % 2 else "data.onnx", "data.onnx")
            requests = [
                running.start(["prune", name, "-o", "out.onnx", "--sparsity", "0.5", "--no-benchmark"], folder)
                for running, name in zip((forked, second), pair, strict=True)
            ]
            outcomes = [finish() for finish in requests]
            assert any(done.status == 0 for done in outcomes)
            for done in outcomes:
                assert done.status == 0 or "appeared in its folder meanwhile; run again" in done.err
            assert stored(onnx.load(folder / "out.onnx")) in wanted
            prune(folder / "model.onnx", HALF, folder / "other.onnx")
            named = {entry.value for m in folder.glob("*.onnx") for t in _tensors(m) for entry in t}
            assert {p.name for p in folder.iterdir()} == {"model.onnx", "data.onnx", "other.onnx", "out.onnx"} | named


def test_a_target_that_another_run_replaces_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a run says of its output is of what it wrote itself, whatever lies there afterwards."""
    source = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    commit, written = saving.Staged.commit, []

    def replaced(staged: saving.Staged) -> Path:
        written.append(staged.size)
        path = commit(staged)
        path.with_name("out.onnx.data").unlink()
        return path

    monkeypatch.setattr(saving.Staged, "commit", replaced)
    arguments = [source, "-o", tmp_path / "out.onnx", "--sparsity", "0.5", "--no-benchmark", "--json"]
    assert cli.main(["prune", *map(str, arguments)]) == 0
    assert [json.loads(capsys.readouterr().out)["sizes"]["bytes"]] == written


def test_where_there_are_no_locks(tmp_path: Path) -> None:
    """As on Windows: models are pruned all the same, and nothing is left beside them."""
    source = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    wanted = stored(prune(source, HALF).to_proto())
    program = "import sys; sys.modules['fcntl'] = None; import onnxprune.cli; sys.exit(onnxprune.cli.main())"
    arguments = ["prune", source, "-o", tmp_path / "out.onnx", "--sparsity", "0.5", "--no-benchmark"]
    subprocess.run([sys.executable, "-c", program, *map(str, arguments)], check=True, capture_output=True)
    assert stored(onnx.load(tmp_path / "out.onnx")) == wanted
    assert not list(tmp_path.glob(f"{files.PREFIX}*"))


def _tensors(path: Path) -> list[list[onnx.StringStringEntryProto]]:
    from nets import tensors

    proto = onnx.load(path, load_external_data=False)
    return [[entry for entry in t.external_data if entry.key == "location"] for _, t in tensors(proto)]


@pytest.mark.parametrize("at_once", [True, False])
def test_a_folder_that_is_cleared_away_before_it_is_locked(
    at_once: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may come between; it takes the folder for one that was left, and a new one is made."""
    lock, clearing, seen = files.fcntl.flock, contextlib.ExitStack(), []

    def late(file: IO[bytes], how: int) -> None:
        if not seen:
            seen.append(file)
            seen.extend(clearing.enter_context(files.left(tmp_path)))
            if at_once:
                clearing.close()
        lock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    with files.staging(tmp_path / "out.onnx") as folder:
        assert [folder.is_dir(), len(seen)] == [True, 2]
        clearing.close()
        assert folder not in seen
        assert [path.name for path in folder.iterdir()] == [files.LOCK]
        with files.left(tmp_path) as found:
            assert not found
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    path = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    from onnxprune.graph.model import load

    with load(path).stage(tmp_path / "out.onnx") as staged:
        before = tree(staged.path.parent)
        prune(path, HALF, tmp_path / "other.onnx")
        assert tree(staged.path.parent) == before
        staged.commit()
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(net())
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model.onnx", "other.onnx", "other.onnx.data", "out.onnx", "out.onnx.data", "weights.bin",
    ]  # fmt: skip


def test_a_folder_of_somebody_else_stays(tmp_path: Path) -> None:
    """What has our prefix but no lock holds something else; a journal names nothing but data files of its model."""
    (tmp_path / ".onnxprune-notes").mkdir()
    (tmp_path / ".onnxprune-notes" / "diary.txt").write_text("mine")
    keep = ["keep.txt", "other.onnx.data", "out.onnx.data.bak", "out.onnx"]
    for name in keep:
        (tmp_path / name).write_text("mine")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.onnx.data").write_text("mine")
    hidden = tmp_path / ".onnxprune-dead"
    for journal in (
        {"target": "out.onnx", "files": [*keep, "out.onnx.data"]},
        {"target": "../x.onnx", "files": ["sub/x.onnx.data", "../x.onnx.data", str(tmp_path / "keep.txt")]},
        {"target": 5, "files": [None]},
        ["no journal"],
    ):
        hidden.mkdir()
        (hidden / files.LOCK).touch()
        (hidden / saving.JOURNAL).write_text(json.dumps(journal))
        saving.tidy(tmp_path)
        assert not hidden.exists()
    (tmp_path / ".onnxprune-empty").mkdir()  # of a run that was killed before it could lock it
    hidden.mkdir()
    (hidden / files.LOCK).touch()
    (tmp_path / ".onnxprune-also-empty").mkdir()
    saving.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".onnxprune-notes", "sub", *keep])
    assert (tmp_path / "sub" / "x.onnx.data").exists()
    shutil.rmtree(tmp_path / ".onnxprune-notes")
