"""How long the command goes on after Ctrl-C: `python tests/bench/bench_interrupt.py [runs]`.

Each command is interrupted, with all its processes as a terminal does it, at random moments of its work: a search from
when it has written a first model, about when it starts processes; the others some seconds after they were started.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

NET = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N, 24] x) => (float[N, 6] y) {
    h = Gemm(x, first, bias) a = Relu(h) m = MatMul(a, middle) b = Relu(m) y = MatMul(b, second) }"""

ENDLESS = """<ir_version: 9, opset_import: ["" : 18]>
g (float[N, 24] x) => (float[N, 24] y) { m = Constant<value = int64 {9223372036854775807}>()
    c = Constant<value = bool {1}>() y = Loop(m, c, x) <body = b (int64 i, bool p, float[N, 24] a) =>
    (bool q, float[N, 24] d) { q = Identity(p) d = Relu(a) }> }"""

COMMANDS = {
    "auto, two processes": "auto net.onnx --data data.npz -o out.onnx --max-drop 0.5 --jobs 2",
    "sensitivity, two processes": "sensitivity net.onnx --data data.npz --jobs 2 --precision 0 --levels {levels}",
    "sensitivity, one process": "sensitivity net.onnx --data data.npz --jobs 1 --precision 0 --levels {levels}",
    "evaluate a model without end": "evaluate endless.onnx --baseline endless.onnx --data data.npz",
}


def interrupted(line: str, folder: Path, random: random.Random) -> float | None:
    """Seconds from the signal to the end of the process; None where it had ended before."""
    levels = ",".join(f"{i / 1000:g}" for i in range(1, 900))
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxprune", *line.format(levels=levels).split()],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    if "out.onnx" in line:
        while process.poll() is None and not (folder / "out.onnx").exists():
            time.sleep(0.005)
        time.sleep(random.uniform(0.0, 0.35))
    else:
        time.sleep(random.uniform(4.0, 7.0))
    if process.poll() is not None:
        process.communicate()
        return None
    os.killpg(process.pid, signal.SIGINT)
    start = time.perf_counter()
    _, told = process.communicate(timeout=60)
    took = time.perf_counter() - start
    assert process.returncode == 130, (process.returncode, told)
    return took


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    rng, moments = np.random.default_rng(0), random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        net = parser.parse_model(NET)
        for key, shape in {"first": (24, 64), "bias": (64,), "middle": (64, 64), "second": (64, 6)}.items():
            net.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), key))
        onnx.save(net, folder / "net.onnx")
        onnx.save(parser.parse_model(ENDLESS), folder / "endless.onnx")
        x = rng.standard_normal((900, 24)).astype(np.float32)
        np.savez(folder / "data.npz", x=x)
        for what, line in COMMANDS.items():
            took = []
            for _ in range(runs):
                took.append(interrupted(line, folder, moments))
                for left in folder.glob("out.onnx*"):
                    left.unlink()
            known = sorted(seconds for seconds in took if seconds is not None)
            if known:
                print(
                    f"{what}: median {statistics.median(known):.2f} s, {known[0]:.2f} to {known[-1]:.2f} s "
                    f"({len(known)} runs)"
                )


if __name__ == "__main__":
    main()
