"""Models made to do harm: refused within seconds and megabytes, and nothing read or written but what was named."""

from __future__ import annotations

import ast
import ctypes
import html.parser
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from bad_input import net, refused
from forked import Outcome, Server, server
from hostile_models import BEARABLE, HUGE, REFUSED, Make
from nets import pi

from onnxprune import prune

SECONDS, MEGABYTES = 5.0, 1024.0
"""What is promised for such models."""

READING = {
    "inspect": "inspect model.onnx",
    "explain": "explain model.onnx",
    "prune": "prune model.onnx -o out.onnx --sparsity 0.5 --no-benchmark",
    "channels": "prune model.onnx -o out.onnx --sparsity 0.5 --pattern channel --no-verify --no-benchmark",
    "groups": "prune model.onnx -o out.onnx --sparsity 0.5 --pattern grouped --no-verify --no-timing --no-benchmark",
    "lower": "lower model.onnx -o out.onnx --no-timing --no-verify",
}
RUNNING = {
    "evaluate": "evaluate model.onnx --data data.npz",
    "benchmark": "benchmark model.onnx --runs 3",
}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, inotify and /proc")


@pytest.fixture(scope="module")
def forked() -> Iterator[Server]:
    with server(ONNXPRUNE_CACHE="") as running:
        yield running


class Scene:
    """A folder with a hostile model, and one beside it that is watched."""

    def __init__(self, base: Path, make: Make) -> None:
        self.inside, self.outside, self.scratch = base / "inside", base / "outside", base / "scratch"
        for folder in (self.inside, self.outside, self.scratch):
            folder.mkdir()
        (self.outside / "secret.bin").write_bytes(bytes(range(48)))
        make(self.inside)
        np.savez(self.inside / "data.npz", x=np.ones((2, 4), np.float32), labels=np.zeros(2, int))
        self.before = self.listing()
        self.watch = _watch(self.outside)

    def listing(self) -> dict[str, tuple[int, int]]:
        return {p.name: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in self.inside.iterdir()}

    def tried(self, forked: Server, command: str) -> Outcome:
        """Run a command; whatever it does, it is quick, small and stays within what was named."""
        done = forked.run(command.split(), self.inside, seconds=60, environment={"TMPDIR": str(self.scratch)})
        assert done.status in (0, 2), (command, done)
        assert done.busy < SECONDS  # of the processor's time: others may be at work on this machine
        assert done.megabytes < MEGABYTES
        assert "unexpected" not in done.err
        assert "MemoryError" not in done.err
        assert done.status == 0 or re.fullmatch(r"error: [^\n]+\n", done.err), done.err
        assert all(c.isprintable() or c == "\n" for c in done.out + done.err)
        roots = (str(self.inside), str(self.scratch))
        libraries = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if p}
        for event, path, written in done.seen:
            assert event in {"open", "os.mkdir", "os.remove", "os.rmdir", "os.rename"}, (event, path)
            allowed = (
                roots if written else (*roots, *libraries, sys.prefix, "/proc", "/sys", "/dev/null", "/etc", "/usr")
            )
            assert path.startswith(allowed), (event, path, written)
        assert _events(self.watch) == b"", "a file outside was opened"
        assert not list(self.scratch.iterdir())
        left = self.listing()
        if done.status == 0:
            for name in [name for name in left if re.fullmatch(r"out\.onnx(\.(\d\.)?data)?", name)]:
                del left[name]
                os.unlink(self.inside / name)
        assert left == self.before
        return done


def _watch(folder: Path) -> int:
    """A handle that tells of every file that anybody opens in a folder, whatever library it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle: int = libc.inotify_init1(os.O_NONBLOCK)
    opened, changed, created, deleted = 0x20, 0x2, 0x100, 0x200
    assert libc.inotify_add_watch(handle, os.fsencode(folder), opened | changed | created | deleted) >= 0
    return handle


def _events(handle: int) -> bytes:
    try:
        return os.read(handle, 4096)
    except BlockingIOError:
        return b""


LONGER = {kind: ("inspect", "channels", "evaluate") for kind in ("ten million nodes", "a weight of a million axes")}
"""What takes most of a second each time, and the commands that are tried on it: they come to it in three ways."""


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(kind: str, forked: Server, tmp_path: Path) -> None:
    make, told = REFUSED[kind]
    scene = Scene(tmp_path, make)
    commands = {**READING, **RUNNING}
    for name in LONGER.get(kind, commands):
        done = scene.tried(forked, commands[name])
        assert done.status == 2, name
        assert re.search(told, done.err), (name, done.err)
        assert "'model.onnx'" in done.err


@pytest.mark.parametrize("kind", BEARABLE)
def test_refused_or_pruned(kind: str, forked: Server, tmp_path: Path) -> None:
    scene = Scene(tmp_path, BEARABLE[kind])
    for command in READING.values():
        scene.tried(forked, command)


@pytest.mark.parametrize("kind", HUGE)
def test_an_input_of_a_huge_shape(kind: str, forked: Server, tmp_path: Path) -> None:
    scene = Scene(tmp_path, HUGE[kind])
    for name, command in READING.items():
        told = scene.tried(forked, command).err
        assert ("axes of up to" in told) == (name in {"explain", "channels"})
    for command in RUNNING.values():
        assert re.search(r"'x' float32\[\d+, 4\] takes .* GB in the shape", scene.tried(forked, command).err)


def test_what_watches_sees(forked: Server, tmp_path: Path) -> None:
    """A command that is told to read the file outside is seen to, in Python and in onnxruntime."""
    scene = Scene(tmp_path, lambda folder: onnx.save(net(), folder / "model.onnx"))
    done = forked.run(["inspect", scene.outside / "secret.bin"], scene.inside)
    assert done.status == 2
    assert ("open", str(scene.outside / "secret.bin"), False) in done.seen
    assert _events(scene.watch)


# ------------------------------------------------------------------ names

NAMES = [
    "\x1b[31mred\x1b[0m", "a\rb", "line\nline", "\u202egnp.exe", "<img src=x onerror=alert(1)>", "</script><u>",
    "\x9b2J", "[red]markup[/red]", "\x07bell", "a" * 3000,
]  # fmt: skip


def named(folder: Path) -> None:
    """A chain of layers whose tensors and nodes have all these names."""
    values = [f"h{name}" for name in NAMES]
    model = net()
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.input[0].name = f"x{NAMES[0]}"
    for index, name in enumerate(NAMES):
        read = values[index - 1] if index else model.graph.input[0].name
        made = values[index] if index + 1 < len(NAMES) else model.graph.output[0].name
        model.graph.node.add(op_type="MatMul", input=[read, f"w{name}"], output=[made], name=f"n{name}")
        shape = (4 if index == 0 else 8, 3 if index + 1 == len(NAMES) else 8)
        model.graph.initializer.append(onnx.numpy_helper.from_array(pi(*shape), f"w{name}"))
        model.metadata_props.add(key=name, value=name)
    model.graph.doc_string = model.producer_name = "".join(NAMES)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_names_that_would_steer_a_terminal_or_a_page(forked: Server, tmp_path: Path) -> None:
    scene = Scene(tmp_path, named)
    np.savez(scene.inside / "data.npz", **{f"x{NAMES[0]}": np.ones((2, 4), np.float32)})
    scene.before = scene.listing()
    for command in READING.values():
        assert scene.tried(forked, command).status == 0
    assert scene.tried(forked, "evaluate model.onnx --data data.npz --baseline model.onnx").status == 0
    assert scene.tried(forked, RUNNING["benchmark"]).status == 0
    told = (
        scene.tried(forked, "prune model.onnx -o out.onnx --sparsity 2").err + scene.tried(forked, "inspect no\x1b").err
    )
    assert "\\x1b" in told
    pytest.importorskip("plotly")
    done = forked.run([*READING["prune"].split(), "--report", "page.html"], scene.inside)
    assert done.status == 0, done.err
    page = (scene.inside / "page.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"w{name}" not in page or (name.isprintable() and not set(name) & set("<>&"))
    tags = _Tags()
    tags.feed(page)
    assert not tags.seen & {"img", "u"}
    assert not any(key.startswith("on") for key in tags.attributes)


class _Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.attributes |= {key for key, _ in attrs}


# ------------------------------------------------------------------ code


PACKAGE = [
    path for folder in ("onnxprune", "converters") for path in (Path(__file__).parents[1] / folder).rglob("*.py")
]

BETWEEN_OWN_PROCESSES = {"curves.py"}
"""Modules that hand what they made themselves to processes they started; nothing of it is ever a file."""


def test_nothing_is_unpickled_or_executed() -> None:
    calls = 0
    for path in PACKAGE:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                if names & {"pickle", "marshal", "shelve", "dill", "cloudpickle"}:
                    assert path.name in BETWEEN_OWN_PROCESSES or names == {"pickle", "UnpicklingError"}, path
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert called not in {"eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "__import__"}, path
            if called in {"np.load", "numpy.load"}:
                calls += 1
                assert given.get("allow_pickle") == "False", path
            if called == "torch.load":
                calls += 1
                assert given.get("weights_only") == "True", path
            if called.startswith("pickle.load"):
                assert path.name in BETWEEN_OWN_PROCESSES
                assert called == "pickle.loads"
    assert calls >= 3


REFERENCE = "spy:act"


@pytest.mark.parametrize(
    "key", ["metric", "data", "calibration", "score", "pattern", "allocation", "pruner", "config_list", "function"]
)
def test_only_the_users_own_command_line_names_code(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration cannot have a function called, nor can what a data function returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("spy.py").write_text("import os\nos.mkdir('imported')\ndef act(*a):\n    return 'spy:act'\n")
    onnx.save(net(), "model.onnx")
    Path("config.yaml").write_text(f"{{sparsity: 0.5, config_list: [{{sparsity: 0.5}}], {key}: '{REFERENCE}'}}")
    Path("entry.yaml").write_text(f"[{{sparsity: 0.5, {key}: '{REFERENCE}'}}]")
    Path("tag.yaml").write_text(f"!!python/object/apply:os.mkdir [imported]\n# {key}")
    for config in ("config.yaml", "entry.yaml", "tag.yaml"):
        refused(lambda c=config: prune("model.onnx", c, "out.onnx"))
    assert not Path("imported").exists()


def test_a_data_function_cannot_name_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("first_spy.py").write_text("def act():\n    return 'second_spy:act'\n")
    Path("second_spy.py").write_text("import os\nos.mkdir('imported')\n")
    onnx.save(net(), "model.onnx")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    refused(lambda: prune("model.onnx", [{"sparsity": 0.5}], "out.onnx", data="first_spy:act"), "must return data")
    assert not Path("imported").exists()
