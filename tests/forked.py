"""Commands tried many times: a server that has imported everything once, and forks a process for each.

Run as a script this is the server; it reads requests and writes outcomes, JSON line by line.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        status: its exit status; negative where a signal ended it.
        out: what it printed.
        err: what it printed to stderr.
        seconds: how long it took.
        busy: seconds of processor time.
        megabytes: the most memory it had at once, what was imported included.
        seen: files it opened and programs it started, as far as Python did: (event, path, whether for writing).
    """

    status: int
    out: str
    err: str
    seconds: float
    busy: float
    megabytes: float
    seen: tuple[tuple[str, str, bool], ...]


class Server:
    """Forks a process for each command."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def run(self, arguments: Sequence[object], folder: Path, **options: Any) -> Outcome:
        """Run a command line in a folder, with the options of `start`."""
        return self.start(arguments, folder, **options)()

    def start(
        self,
        arguments: Sequence[object],
        folder: Path,
        *,
        seconds: float = 60.0,
        killed_after: float | None = None,
        spare: int = 4096,
        environment: Mapping[str, str] | None = None,
    ) -> Callable[[], Outcome]:
        """Start a command line in a folder; what is returned waits for its end.

        Args:
            arguments: of onnxprune.
            folder: the working directory.
            seconds: after which it is killed.
            killed_after: seconds after which it is killed whatever it does.
            spare: megabytes of address space it may take.
            environment: variables that it sees.
        """
        request = {
            "arguments": [str(a) for a in arguments], "folder": str(folder), "seconds": seconds,
            "killed_after": killed_after, "spare": spare, "environment": dict(environment or {}),
        }  # fmt: skip
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

        def finish() -> Outcome:
            assert self.process.stdout is not None
            answer = json.loads(self.process.stdout.readline())
            return Outcome(**{**answer, "seen": tuple(map(tuple, answer["seen"]))})

        return finish


@contextlib.contextmanager
def server(**environment: str) -> Iterator[Server]:
    """A server, until the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", **environment},
    )
    try:
        yield Server(process)
    finally:
        assert process.stdin is not None
        process.communicate(timeout=10)


WATCHED = {
    "open": 0, "os.mkdir": 0, "os.remove": 0, "os.rmdir": 0, "os.rename": 1, "os.link": 1, "os.symlink": 1,
    "os.truncate": 0, "os.chmod": 0, "subprocess.Popen": 0, "os.system": 0, "os.exec": 0, "os.posix_spawn": 0,
    "os.fork": None, "socket.connect": None, "pickle.find_class": 0, "ctypes.dlopen": 0,
}  # fmt: skip
"""Event -> which of its arguments is the path."""


def _warm() -> None:
    """Import whatever the commands need, by running them once."""
    import tempfile

    import numpy as np
    import onnx
    from onnx import numpy_helper, parser

    from onnxprune import cli

    model = parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> g (float[N, 4] x) => (float[N, 4] y) '
        "{ h = MatMul(x, v) r = Relu(h) s = Constant<value = int64[2] {4, 32}>() w2 = Reshape(w, s) y = MatMul(r, t) "
        "t = Transpose(w2) }".replace("y = MatMul(r, t) t = Transpose(w2)", "t = Transpose(w2) y = MatMul(r, t)")
    )
    for name, shape in (("v", (4, 32)), ("w", (128,))):
        model.graph.initializer.append(numpy_helper.from_array(np.arange(128, dtype=np.float32).reshape(shape), name))
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        path = f"{folder}/model.onnx"
        onnx.save(model, path)
        np.savez(f"{folder}/data.npz", x=np.ones((8, 4), np.float32), labels=np.zeros(8, int))
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            for line in (
                f"inspect {path}", f"explain {path}", f"evaluate {path} --data {folder}/data.npz",
                f"benchmark {path} --runs 3", f"lower {path} -o {folder}/low.onnx --no-timing",
                f"prune {path} -o {folder}/out.onnx --sparsity 0.5 --no-benchmark",
                f"prune {path} -o {folder}/out.onnx --sparsity 0.5 --pattern channel --no-benchmark",
            ):  # fmt: skip
                assert cli.main(line.split()) == 0, line


def main() -> None:
    """Serve requests."""
    _warm()
    for line in sys.stdin:
        print(json.dumps(_tried(json.loads(line))), flush=True)


def _tried(request: dict[str, Any]) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="forked-") as scratch:
        names = {name: os.path.join(scratch, name) for name in ("out", "err", "seen")}
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            _child(request, names)
        ended, status, usage = 0, 0, None
        limit = request["killed_after"] if request["killed_after"] is not None else request["seconds"]
        while not ended:
            ended, status, usage = os.wait4(child, os.WNOHANG)
            left = start + limit - time.monotonic()
            if ended:
                break
            if left <= 0:
                os.kill(child, signal.SIGKILL)
                ended, status, usage = os.wait4(child, 0)
                break
            time.sleep(min(max(left, 0.0), 0.002))
        took = time.monotonic() - start
        texts = {}
        for name, path in names.items():
            texts[name] = ""
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="backslashreplace", newline="") as file:
                    texts[name] = file.read()
    assert usage is not None
    return {
        "status": os.waitstatus_to_exitcode(status), "out": texts["out"], "err": texts["err"], "seconds": took,
        "busy": usage.ru_utime + usage.ru_stime,
        "megabytes": usage.ru_maxrss / 1024,
        "seen": [json.loads(entry) for entry in texts["seen"].splitlines()],
    }  # fmt: skip


def _child(request: dict[str, Any], names: dict[str, str]) -> None:
    import resource
    import tempfile

    from onnxprune import cli

    status = 99
    try:
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        tempfile.tempdir = None
        for number, name in ((1, "out"), (2, "err")):
            handle = os.open(names[name], os.O_CREAT | os.O_WRONLY)
            os.dup2(handle, number)
        log = os.open(names["seen"], os.O_CREAT | os.O_WRONLY)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115

        def hook(event: str, given: tuple[Any, ...]) -> None:
            if event in WATCHED:
                index = WATCHED[event]
                path = (
                    ""
                    if index is None
                    else os.path.abspath(os.fsdecode(given[index]))
                    if isinstance(given[index], (str, bytes, os.PathLike))
                    else str(given[index])
                )
                written = event != "open" or bool(given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
                os.write(log, (json.dumps([event, path, written]) + "\n").encode())

        if request["spare"]:
            with open("/proc/self/statm") as file:
                now = int(file.read().split()[0]) * resource.getpagesize()
            limit = now + request["spare"] * MEGABYTE
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.addaudithook(hook)
        status = cli.main(request["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException as error:
        os.write(2, f"CRASHED {type(error).__name__}: {error}".encode())
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
