"""Bars of long work, as a terminal gets them."""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

pty = pytest.importorskip("pty")

MODEL = Path(__file__).parents[1] / "models" / "lenet5.onnx"

RUN = """
import sys
from onnxprune import cli, cli_output
from onnxprune.graph import assemble
cli_output.SLOW, assemble.SPAN = float(sys.argv.pop(1)), 1 << 16
sys.argv[0] = "onnxprune"
cli.main()
"""


def shown(slow: float, *command: object) -> str:
    """What a command writes to the terminal that its stderr is."""
    ours, theirs = pty.openpty()
    try:
        words = [sys.executable, "-c", RUN, str(slow), *map(str, command)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
        child = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=theirs, env=environment)
        text = b""
        while child.poll() is None or select.select([ours], [], [], 0)[0]:  # what is not read holds the child up
            if select.select([ours], [], [], 0.05)[0]:
                text += os.read(ours, 1 << 16)
        assert child.returncode == 0
    finally:
        os.close(ours)
        os.close(theirs)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode())


def test_bars_tell_bytes_and_rate(tmp_path: Path) -> None:
    command = ("prune", MODEL, "-o", tmp_path / "out.onnx", "--sparsity", "0.5", "--no-benchmark")
    text = shown(-1.0, *command)
    for what in ("looking for the smallest weights", "writing out.onnx"):
        assert re.search(rf"{what} \S* *[\d.]+/1\.7 MB", text), what
    assert re.search(r"[\d.]+ .B/s", text)


def test_channels_have_bars_too(tmp_path: Path) -> None:
    command = (
        "prune",
        MODEL,
        "-o",
        tmp_path / "out.onnx",
        "--sparsity",
        "0.5",
        "--no-benchmark",
        "--pattern",
        "channel",
    )
    text = shown(-1.0, *command, "--no-verify")
    for what in ("scoring channels", "counting zeros", "writing out.onnx"):
        assert what in text


def test_work_that_is_done_at_once_has_none(tmp_path: Path) -> None:
    command = ("prune", MODEL, "-o", tmp_path / "out.onnx", "--sparsity", "0.5", "--no-benchmark")
    assert "writing" not in shown(60.0, *command)
