"""Several small models of one function, timed in turns: which is the fastest here."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxprune.runtime.session import open_session

ROUNDS = 5
"""Runs of each model, at least."""


def in_turns(
    models: Sequence[onnx.ModelProto | Path], feed: Mapping[str, np.ndarray], threads: int = 1, seconds: float = 0.1
) -> list[float]:
    """Milliseconds of a run of each model: medians over runs in turns.

    On one thread its own processor time counts, which does not grow where the machine has other work.

    Args:
        models: with the same inputs.
        feed: what they are run on.
        threads: intra-op threads.
        seconds: of timing for each model, where `ROUNDS` runs do not take longer.

    Raises:
        PruneError: one of them does not load or run.
    """
    sessions = [open_session(model, threads=threads) for model in models]
    clock = time.thread_time if threads == 1 else time.perf_counter
    for _ in range(2):
        for session in sessions:
            session.run(feed)
    times: list[list[float]] = []
    end = time.perf_counter() + seconds * len(models)
    while len(times) < ROUNDS or time.perf_counter() < end:
        times.append([])
        for session in sessions:
            start = clock()
            session.native.run(None, feed)
            times[-1].append(clock() - start)
    return [float(t) * 1e3 for t in np.median(np.array(times), axis=0)]


def machine() -> str:
    """What times hold for."""
    import onnxruntime as ort

    return f"{_processor()}, onnxruntime {ort.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "flags"))]
    return f"{names[0]} {hashlib.sha256(names[-1].encode()).hexdigest()[:8]}" if names else platform.machine()
