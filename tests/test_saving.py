"""A save is all or nothing, whatever fails."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from model_files import HALF, LAYOUTS, net, run, stored, tree, values, write_external
from nets import parse, tensors

from onnxprune import PruneError, prune
from onnxprune.graph import assemble
from onnxprune.graph.model import load


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A model with external data that a failing save must leave alone."""
    folder = tmp_path / "target"
    folder.mkdir()
    return write_external(net(), folder / "out.onnx", lambda index, name: "out.onnx.data")


SOURCES = {
    "inline": lambda path: onnx.save(net(), path) or path,
    "external": lambda path: write_external(net(), path, LAYOUTS["two files"]),
}


OPERATIONS = (
    (os, "fsync"),
    (os, "replace"),
    (assemble, "write"),
    (assemble, "_put"),
    (shutil, "copymode"),
    (tempfile, "mkdtemp"),
)


@pytest.mark.parametrize("kind", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_failure_at_any_call(
    source: str, kind: BaseException, target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each operation on files fails in turn: the target is the old model or, after the rename, the new one."""
    path = SOURCES[source](tmp_path / "model.onnx")
    expected = stored(prune(net(), HALF).to_proto())
    before = tree(tmp_path)
    clean = shutil.copytree(target.parent, tmp_path.with_name(f"{tmp_path.name}-clean"))
    left = 0

    def armed(function: Callable) -> Callable:
        def wrapper(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                raise kind
            return function(*args, **kwargs)

        return wrapper

    for owner, name in OPERATIONS:
        monkeypatch.setattr(owner, name, armed(getattr(owner, name)))
    failed = 0
    for failing in range(1, 100):
        left = failing
        told = ""
        try:
            prune(path, HALF, target)
        except (PruneError, KeyboardInterrupt) as error:
            told = str(error) or "stopped"
        if left > 0:
            break
        left = 0
        failed += bool(told)
        now = tree(tmp_path)
        if now["target/out.onnx"] == before["target/out.onnx"]:
            assert now == before
            assert told == "stopped" or "No space left on device; make room" in told
        else:
            assert {name: now[name] for name in before if "target" not in name}.items() <= before.items()
            assert stored(onnx.load(target)) == expected
            assert told in ("", "stopped")
            shutil.rmtree(target.parent)
            shutil.copytree(clean, target.parent)
    assert failed >= 5


LIMITED = """
import resource, sys
import onnxprune
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
try:
    onnxprune.prune(sys.argv[1], [{"sparsity": 0.5}], sys.argv[2])
except onnxprune.PruneError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 1000, 1500])
@pytest.mark.parametrize("source", SOURCES)
def test_a_limit_on_file_sizes(source: str, limit: int, target: Path, tmp_path: Path) -> None:
    path = SOURCES[source](tmp_path / "model.onnx")
    before = tree(tmp_path)
    told = subprocess.run(
        [sys.executable, "-c", LIMITED, path, target, str(limit)], capture_output=True, text=True, check=True
    )
    assert f"cannot write '{target}': File too large" in told.stdout
    assert tree(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # a failed test still holds what it mapped


@pytest.mark.parametrize("external", [False, True], ids=["inline", "external"])
def test_a_full_disk(external: bool, small_disk: Path, tmp_path: Path) -> None:
    model = parse("(float[2, 160] x) => (float[2, 160] y) { y = MatMul(x, w) }", w=values(160, 160))
    path = tmp_path / "model.onnx"
    write_external(model, path, LAYOUTS["one file"]) if external else onnx.save(model, path)
    target = small_disk / "out.onnx"
    onnx.save(net(), target)
    before = tree(small_disk)
    with pytest.raises(PruneError, match=r"cannot write '.*out\.onnx': No space left on device; make room"):
        prune(path, HALF, target)
    assert tree(small_disk) == before
    assert os.listdir(small_disk) == ["out.onnx"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    folder = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path / "locked"
    if os.geteuid() == 0 and not folder.is_dir():
        pytest.skip("root writes everywhere here")
    if os.geteuid() != 0:
        folder.mkdir(0o500)
    with pytest.raises(PruneError, match=r"cannot write '.*/out\.onnx': .*(not permitted|denied|Read-only)"):
        prune(net(), HALF, folder / "out.onnx")


@pytest.mark.parametrize("layout", ["one file", "two files"])
def test_another_file_system(layout: str, small_disk: Path, tmp_path: Path) -> None:
    """The target, or what a link leads to, is where no rename from here leads: it is written there to begin with."""
    source = write_external(net(), tmp_path / "model.onnx", LAYOUTS[layout])
    expected = stored(prune(net(), HALF).to_proto())
    os.symlink(small_disk / "linked.onnx", tmp_path / "link.onnx")
    for target in (small_disk / "out.onnx", tmp_path / "link.onnx"):
        for _ in range(2):
            prune(source, HALF, target)
            assert stored(onnx.load(os.path.realpath(target))) == expected
    assert (tmp_path / "link.onnx").is_symlink()
    named = {entry.value for m in small_disk.glob("*.onnx") for t in locations(m) for entry in t}
    assert set(os.listdir(small_disk)) == {"out.onnx", "linked.onnx"} | named


def locations(path: Path) -> list[list[onnx.StringStringEntryProto]]:
    proto = onnx.load(path, load_external_data=False)
    return [[e for e in t.external_data if e.key == "location"] for _, t in tensors(proto)]


UNPRIVILEGED = """
import os, sys
import tempfile
import onnxprune
with tempfile.TemporaryDirectory() as folder:  # all is imported
    onnxprune.prune(sys.argv[1], [{"sparsity": 0.5}], folder + "/out.onnx")
os.setgid(65534); os.setuid(65534)
for target, force in ((sys.argv[2], False), (sys.argv[1], True)):
    try:
        onnxprune.prune(sys.argv[1], [{"sparsity": 0.5}], target, force=force)
        print("written")
    except onnxprune.PruneError as error:
        print(error)
"""


def test_a_folder_that_only_others_may_write(target: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        source = write_external(net(), folder / "model.onnx", LAYOUTS["one file"])
        folder.chmod(0o755)
        before = tree(folder)
        told = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, source, folder / "out.onnx"],
            capture_output=True,
            text=True,
            check=True,
        )
        lines = told.stdout.splitlines()
        assert len(lines) == 2
        assert all(
            "cannot write '" in line and "Permission denied; make room or choose another" in line for line in lines
        )
        assert tree(folder) == before
        assert len(os.listdir(folder)) == 2
    finally:
        shutil.rmtree(folder)


def test_a_read_only_file_system(small_disk: Path, tmp_path: Path) -> None:
    source = write_external(net(), small_disk / "model.onnx", LAYOUTS["one file"])
    before = tree(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    prune(source, HALF, tmp_path / "out.onnx")
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(prune(net(), HALF).to_proto())
    for name, force in (("model.onnx", True), ("out.onnx", False)):
        with pytest.raises(PruneError, match=rf"cannot write '.*{name}': Read-only file system; make room or choose"):
            prune(source, HALF, small_disk / name, force=force)
    assert tree(small_disk) == before


def test_an_exception_while_the_staged_model_runs(target: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    model = load(net())

    def stumble(kind: type[BaseException]) -> None:
        with model.stage(target) as staged:
            assert run(staged.path, net())
            assert staged.path.parent.parent == target.parent
            raise kind

    for kind in (OSError, KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(kind):
            stumble(kind)
        assert tree(tmp_path) == before


def test_uncommitted_is_undone(target: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with load(target).stage(tmp_path / "new.onnx") as staged:
        assert staged.size == sum(p.stat().st_size for p in staged.path.parent.iterdir())
    assert tree(tmp_path) == before
    with load(target).stage(None) as staged:
        assert run(staged.path, net())
        folder = staged.path.parent
    assert not folder.exists()


def test_a_data_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    with load(path).stage(tmp_path / "out.onnx") as staged:
        (tmp_path / "out.onnx.data").write_text("another run's")
        with pytest.raises(PruneError, match=r"'out\.onnx\.data' appeared in its folder meanwhile; run again"):
            staged.commit()
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "out.onnx.data", "weights.bin"]
    assert (tmp_path / "out.onnx.data").read_text() == "another run's"


def test_an_interrupt_right_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    replace = os.replace

    def interrupted(staged: Path, target: Path) -> None:
        replace(staged, target)
        if target.suffix == ".onnx":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(source, HALF, tmp_path / "out.onnx")
    assert stored(onnx.load(tmp_path / "out.onnx")) == stored(prune(net(), HALF).to_proto())


def test_a_link_as_target_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    os.symlink("real/out.onnx", tmp_path / "link.onnx")
    source = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    for _ in range(2):  # dangling at first
        prune(source, HALF, tmp_path / "link.onnx")
        assert (tmp_path / "link.onnx").is_symlink()
        assert stored(onnx.load(tmp_path / "real/out.onnx")) == stored(prune(net(), HALF).to_proto())
    assert len(os.listdir(tmp_path / "real")) == 2


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions(mask: int, tmp_path: Path) -> None:
    """New files as any program makes them; a replaced file's stay, and hold for the data beside it."""
    source = write_external(net(), tmp_path / "model.onnx", LAYOUTS["one file"])
    (tmp_path / "old.onnx").write_text("something")
    (tmp_path / "old.onnx").chmod(0o640)
    old = os.umask(mask)
    try:
        for name in ("new", "old"):
            prune(source, HALF, tmp_path / f"{name}.onnx")
        prune(net(), HALF).masks.save(tmp_path / "masks.npz")
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes["new.onnx"] == modes["new.onnx.data"] == modes["masks.npz"] == 0o666 & ~mask
    assert modes["old.onnx"] == modes["old.onnx.data"] == 0o640
