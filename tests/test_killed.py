"""A run that is killed leaves the old file or the new one, and nothing that the next run does not clear away."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from model_files import HALF, LAYOUTS, net, stored, tree, write_external

from onnxprune import prune
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


def _tensors(path: Path) -> list[list[onnx.StringStringEntryProto]]:
    from nets import tensors

    proto = onnx.load(path, load_external_data=False)
    return [[entry for entry in t.external_data if entry.key == "location"] for _, t in tensors(proto)]


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
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".onnxprune-notes", "sub", *keep])
    assert (tmp_path / "sub" / "x.onnx.data").exists()
    shutil.rmtree(tmp_path / ".onnxprune-notes")
