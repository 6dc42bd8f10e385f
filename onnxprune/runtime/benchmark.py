"""What pruning bought: the latency of a model beside its baseline's, in one process, run by run."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxprune.errors import PruneError
from onnxprune.graph.model import ModelSource
from onnxprune.runtime.evaluate import common_inputs
from onnxprune.runtime.feeds import Feed, load_data, random_feeds
from onnxprune.runtime.session import Session, open_session

LOADS = 4
"""Two loads of one file differ by up to a tenth, through their place in memory, for as long as they live. So both
models are loaded this often, in alternating order, and a difference counts only if every load shows it."""
MIN_RUNS = 3
MAX_RUNS = 500
"""Runs of each load, where their number is not given."""
MIN_EFFECT = 0.03
"""A difference below this is not called one."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one run: the median, and the quarter and three-quarter points."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Benchmark:
    """Latency of a model and, run in turns with it, of its baseline."""

    latency: Latency
    baseline: Latency | None
    speedup: float | None
    """Median over paired runs of the baseline's time by the model's: above 1 is faster."""
    significant: bool
    """Whether the difference lies outside the spread; `compare` says how that is decided."""
    threads: int
    runs: int
    shapes: Mapping[str, tuple[int, ...]]
    """Shapes of the inputs used."""
    notes: tuple[str, ...]
    """Input sizes that were assumed."""
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; times in milliseconds."""
        result = asdict(self)
        result["shapes"] = {name: list(shape) for name, shape in self.shapes.items()}
        return result | {"notes": list(self.notes), "versions": dict(self.versions)}

    def summary(self) -> str:
        """One line: `latency 1.52 ms vs 1.53 ms dense (1 thread): no measurable difference`."""
        threads = f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        if self.baseline is None or self.speedup is None:
            spread = f"{_ms(self.latency.low)} to {_ms(self.latency.high)}"
            return f"latency {_ms(self.latency.median)} ({threads}; middle half of {self.runs} runs: {spread})"
        line = f"latency {_ms(self.latency.median)} vs {_ms(self.baseline.median)} dense ({threads})"
        if not self.significant:
            return f"{line}: no measurable difference"
        faster = self.speedup > 1
        return f"{line}: {self.speedup if faster else 1 / self.speedup:.2f} times {'faster' if faster else 'slower'}"


def benchmark(
    model: ModelSource,
    baseline: ModelSource | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    feeds: Mapping[str, Any] | None = None,
    threads: int = 1,
    runs: int | None = None,
    min_time: float = 2.0,
) -> Benchmark:
    """Time a model in onnxruntime, and its baseline in turns with it on the same inputs.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model.
        baseline: the dense model. It must take the same inputs.
        shapes: sizes for inputs with dynamic dims, by input name; others are assumed, and noted.
        feeds: inputs to use instead of random ones.
        threads: intra-op threads, which do not spin.
        runs: timed runs of each model; default as many as fit into `min_time`, from 12 to 2000.
        min_time: seconds to spend on timing, both models together; loading and warming up come on top,
            and a slow model takes longer for its 12 runs.

    Raises:
        PruneError: a model does not load or run, the inputs of the two differ, or shapes or feeds do not fit.
    """
    if runs is not None and runs < 1:
        raise PruneError(f"runs is {runs}; it must be 1 or more")
    if shapes and feeds is not None:
        raise PruneError("shapes and feeds are both given; feeds bring their own shapes, so give one of the two")
    models = [model] if baseline is None else [model, baseline]
    sessions = _load(models, threads, turn=0)
    inputs = sessions[0].inputs if baseline is None else common_inputs(*sessions)
    notes: list[str] = []
    if feeds is not None:
        feed = next(iter(load_data([feeds], inputs))).feed
    else:
        feed, notes = random_feeds(model, shapes, inputs=inputs)
    loads = 1 if baseline is None else min(LOADS, runs or LOADS)
    rounds = []
    for turn in range(loads):
        if turn:
            sessions.clear()  # large models should not be in memory twice
            sessions = _load(models, threads, turn)
        share = None if runs is None else runs * (turn + 1) // loads - runs * turn // loads
        rounds.append(_time(sessions, feed, share, min_time / loads))
    times = [[seconds for of_round in rounds for seconds in of_round[index]] for index in range(len(models))]
    speedup, significant = None, False
    if baseline is not None:
        speedup, significant = compare([r[0] for r in rounds], [r[1] for r in rounds])
    return Benchmark(
        latency=_latency(times[0]),
        baseline=None if baseline is None else _latency(times[1]),
        speedup=speedup,
        significant=significant,
        threads=threads,
        runs=len(times[0]),
        shapes={name: array.shape for name, array in feed.items()},
        notes=tuple(notes),
        versions=_versions(),
    )


def compare(times: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> tuple[float, bool]:
    """Speedup and whether it is one, from seconds of runs taken in pairs, one sequence for each load of the models.

    The speedup is the median of all ratios baseline / model. It counts if it is at least `MIN_EFFECT` away from 1 and
    the middle half of every load's ratios lies on the same side of 1.
    """
    loads = [np.asarray(slow) / np.asarray(fast) for fast, slow in zip(times, baseline, strict=True)]
    median = np.median(np.concatenate(loads))
    quarters = np.array([np.quantile(ratios, [0.25, 0.75]) for ratios in loads])
    same_side = bool((quarters > 1).all() or (quarters < 1).all())
    return float(median), same_side and bool(abs(np.log(median)) >= np.log1p(MIN_EFFECT))


def _load(models: Sequence[ModelSource], threads: int, turn: int) -> list[Session]:
    """Sessions in the order of `models`, the last loaded first in odd turns."""
    order = list(enumerate(models))[:: -1 if turn % 2 else 1]
    opened = {index: open_session(model, threads=threads) for index, model in order}
    return [opened[index] for index in range(len(models))]


def _time(sessions: Sequence[Session], feed: Feed, runs: int | None, min_time: float) -> list[list[float]]:
    """Seconds of each run of each session, in turns; the order alternates, so that neither always comes first."""
    warm = time.perf_counter()
    for _ in range(10):
        for session in sessions:
            session.run(feed)
        if time.perf_counter() - warm > min_time / 4:
            break
    times: list[list[float]] = [[] for _ in sessions]
    start = time.perf_counter()
    order = list(range(len(sessions)))
    while (done := len(times[0])) < (runs or MAX_RUNS):
        if runs is None and done >= MIN_RUNS and time.perf_counter() - start >= min_time:
            break
        for index in order if done % 2 == 0 else reversed(order):
            before = time.perf_counter()
            sessions[index].native.run(None, feed)
            times[index].append(time.perf_counter() - before)
    return times


def _latency(seconds: Sequence[float]) -> Latency:
    low, median, high = (float(q) * 1000 for q in np.quantile(seconds, [0.25, 0.5, 0.75]))
    return Latency(median, low, high)


def _ms(value: float) -> str:
    return f"{value:#.3g} ms" if value < 100 else f"{value:.0f} ms"


def _versions() -> dict[str, str]:
    import onnxruntime as ort

    return {"onnxruntime": ort.__version__, "numpy": np.__version__, "python": platform.python_version()}
