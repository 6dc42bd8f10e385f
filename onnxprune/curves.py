"""Measured sensitivity: what pruning one weight, or one group of channels, alone costs under onnxruntime."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from onnxprune import config as configuration
from onnxprune._version import __version__
from onnxprune.algorithms import allocate
from onnxprune.algorithms.patterns import parse
from onnxprune.checkpoint import Checkpoint
from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.graph.weights import Skipped, find
from onnxprune.probe import Point, Probe, Shared
from onnxprune.runtime import samples as sampling
from onnxprune.runtime.evaluate import Comparison
from onnxprune.runtime.feeds import Dataset, load_data
from onnxprune.runtime.paired import Stopped
from onnxprune.runtime.session import Session, open_session

LEVELS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95)
"""Sparsities at which each weight is tried."""
FACTOR_LEVELS = (0.3, 0.6, 0.9)
"""Those of the sensitivity pruner."""
EVEN = 0.002
"""Cost of outputs that are no floats, at sparsity s EVEN * s^2: what cannot be told apart is pruned evenly."""
Task = tuple[str, float]
Named = tuple[Task, dict[str, Any]]
KINDS = ("parameters", "macs", "latency")


@dataclass(frozen=True)
class Curve:
    """What pruning one weight, or one group of channels, costs.

    Attributes:
        name: of the weight, or of the group's first weight.
        op_type: its operator.
        size: its entries; of a group, those of the weights that produce its channels.
        points: by rising level.
    """

    name: str
    op_type: str
    size: int
    points: tuple[Point, ...]

    @property
    def flat(self) -> bool:
        """Whether the model's outputs on these data do not depend on it at all."""
        return bool(self.points) and all(point.difference == 0 for point in self.points)


@dataclass(frozen=True)
class Sensitivity:
    """The curves of a model.

    Attributes:
        curves: one per weight or group, in graph order.
        measure: what falls: the metric's name, or 'agreement'.
        samples: how many there are.
        pattern: what was removed.
        score: what chose it.
        macs: multiply-accumulates of the dense model; None where they are not known.
        skipped: what was left alone, with reasons.
        notes: what should be known besides.
    """

    curves: tuple[Curve, ...]
    measure: str
    samples: int
    pattern: str
    score: str
    macs: int | None
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()

    def allocate(self, share: float, of: str = "parameters") -> dict[str, float]:
        """The sparsities that reach a total at the least predicted loss: `algorithms.allocate.least_loss`.

        Losses of single weights are taken to add up. To each, the outputs' squared error is added: errors that have
        nothing to do with each other do add up, and they tell apart what a few hundred predictions do not.

        Args:
            share: what to save: of the weights' entries, the model's MACs or its latency.
            of: 'parameters', 'macs' or 'latency'.

        Returns:
            Name -> sparsity.

        Raises:
            PruneError: the share cannot be reached, or was not measured.
        """
        if of not in KINDS:
            raise PruneError(f"allocating {of!r}: expected one of {', '.join(KINDS)}")
        total, saved_by = self._savings(of)
        tables = [[(saved_by(point), _cost(point)) for point in curve.points] for curve in self.curves]
        try:
            saved = allocate.least_loss(tables, share * total)
        except PruneError as error:
            raise PruneError(f"sparsity {share:g} of {of} cannot be had: {error}; ask for less") from error
        shares = {}
        for curve, table, wanted in zip(self.curves, tables, saved, strict=True):
            levels = {saving: point.level for (saving, _), point in zip(table, curve.points, strict=True)}
            corners = [corner for corner, _ in allocate.hull(table)]
            at = [0.0, *(levels[corner] for corner in corners[1:])]
            shares[curve.name] = float(np.interp(wanted, corners, at))
        return shares

    def _savings(self, of: str) -> tuple[float, Callable[[Point], float]]:
        points = [point for curve in self.curves for point in curve.points]
        if of == "parameters":
            return float(sum(curve.size for curve in self.curves)), lambda point: float(point.entries)
        if of == "macs":
            if self.macs is None or any(point.macs is None for point in points):
                raise PruneError("the model's MACs are not known, so they cannot be allocated; take parameters")
            return float(self.macs), lambda point: float(point.macs or 0)
        if any(point.latency is None for point in points):
            raise PruneError("latency was not measured with the curves; measure them with latency=True")
        return 1.0, lambda point: point.latency or 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        curves = [
            {**asdict(curve), "points": [asdict(p) for p in curve.points], "flat": curve.flat} for curve in self.curves
        ]
        return {
            "measure": self.measure, "samples": self.samples, "pattern": self.pattern, "score": self.score,
            "macs": self.macs, "curves": curves, "skipped": [asdict(s) for s in self.skipped],
            "notes": list(self.notes),
        }  # fmt: skip


def _cost(point: Point) -> float:
    return max(0.0, point.loss) + (EVEN * point.level**2 if point.error is None else point.error)


def sensitivity(
    model: ModelSource,
    data: Any,
    *,
    levels: Sequence[float] = LEVELS,
    pattern: str = "unstructured",
    score: str = "magnitude",
    op_types: str | Sequence[str] | None = None,
    op_names: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    metric: Any = None,
    precision: float = 0.01,
    latency: bool = False,
    jobs: int = -1,
    threads: int = 1,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Prune each weight (or group of channels) alone at several levels, and measure what is lost.

    Each measurement is compared with the dense model sample by sample, on a random order of the data, and stops once
    the interval of the loss is narrower than `precision`, or than a fifth of the loss, on either side.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model; it is not changed.
        data: inputs and optional labels, as `onnxprune.evaluate` takes them.
        levels: sparsities, from 0 to 1.
        pattern: as in a configuration; 'channel' and 'head' measure groups.
        score: as in a configuration.
        op_types: only weights of these operators; the default types unless given.
        op_names: only these weights.
        exclude: not these.
        metric: as `evaluate` takes it; one of your own is measured on all samples.
        precision: 0 evaluates all samples every time.
        latency: whether to measure, one after the other, what each group of channels alone saves, or each weight with
            grouped inputs, lowered.
        jobs: processes side by side, -1 one per CPU; inside `joblib.parallel_config(backend=...)` that backend's.
        threads: of onnxruntime, in each process.
        seed: of the samples' order.
        shapes: sizes of inputs with open dims.
        checkpoint: a file that each measurement is kept in, so that an interrupted run can go on; it is removed at
            the end.
        progress: whether to show a bar on stderr.

    Raises:
        PruneError: bad input, or the checkpoint is another run's.
    """
    entry: dict[str, Any] = {"pattern": pattern, "score": score, "sparsity": 0.0}
    if op_types is not None or op_names is None:
        entry["op_types"] = op_types or "default"
    if op_names is not None:
        entry["op_names"] = list(op_names)
    config = configuration.load([entry, *({"op_names": [name], "exclude": True} for name in exclude)])
    if not levels or not all(0 < level <= 1 for level in levels):
        raise PruneError(f"levels are {list(levels)}; expected sparsities above 0, up to 1")
    dense = open_session(model, threads=threads)
    dataset = load_data(data, dense.inputs)
    return measure(
        model, dataset, config, dense, levels=levels, metric=metric, precision=precision, latency=latency, jobs=jobs,
        threads=threads, seed=seed, shapes=shapes, checkpoint=checkpoint, progress=progress,
    )  # fmt: skip


def measure(
    source: ModelSource,
    dataset: Dataset,
    config: configuration.Config,
    dense: Session,
    *,
    levels: Sequence[float] = LEVELS,
    metric: Any = None,
    precision: float = 0.01,
    latency: bool = False,
    jobs: int = 1,
    threads: int | None = 1,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    stopped: Callable[[], bool] = lambda: False,
    finish: bool = True,
    norms: Mapping[str, np.ndarray] | None = None,
) -> Sensitivity:
    """The curves of what the first entry of a configuration governs; see `sensitivity`.

    `stopped` is asked before processes are started and after each measurement; where it says so, Stopped is raised.
    Without `finish` the checkpoint stays. `norms` are those of each weight's inputs, where the score needs them.
    """
    entry = config.entries[0]
    model = load(source)
    content = content_of(model, source)
    comparison = Comparison.of(dense, dense, dataset, metric)
    ordered = sampling.shuffled(dataset, seed)
    most = parse(entry.pattern).most
    tried = sorted({min(float(level), most) for level in levels})
    shared = Shared(
        content, ordered, config, None if comparison.function is not None else comparison.metric, threads, precision,
        None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()},
        _norms(model, dataset, config, threads) if norms is None and config.calibrated else dict(norms or {}),
    )  # fmt: skip
    blob = np.frombuffer(pickle.dumps(shared), np.uint8)
    name = hashlib.blake2b(blob.tobytes(), digest_size=16).hexdigest()
    probe = Probe.of(shared)
    options = {
        "config": config.source, "levels": tried, "metric": comparison.metric, "precision": precision, "seed": seed,
        "latency": latency, "shapes": None if shapes is None else {name: list(shape) for name, shape in shapes.items()},
    }  # fmt: skip
    keep = Checkpoint.open(checkpoint, key(content, dataset, options))
    items = list(probe.items)
    wanted = [(item, level) for item in items for level in tried]
    missing = [(item, level) for item, level in wanted if f"{item} {level}" not in keep.records]
    own = comparison.function
    for (item, level), record in _run(name, blob, probe, own, missing, jobs, progress, stopped):
        keep.add(f"{item} {level}", record)
        if stopped():
            raise Stopped
    if latency:
        _measure_latency(probe, source, keep, wanted, shapes)
    curves = []
    for item, (op_type, size) in probe.items.items():
        points = [Point(**keep.records[f"{item} {level}"]) for level in tried]
        curves.append(Curve(item, op_type, size, tuple(points)))
    if finish:
        keep.done()
    notes = [
        f"the model's outputs on these data do not depend on '{curve.name}': pruning it loses nothing that they show"
        for curve in curves
        if curve.flat
    ]
    measured = comparison.metric or "agreement"
    return Sensitivity(
        tuple(curves), measured, dataset.samples, entry.pattern, entry.score, probe.macs, probe.skipped, tuple(notes)
    )


def factors(curves: Sequence[Curve]) -> dict[str, float]:
    """Each weight's factor in (0, 1] for its threshold (Han et al. 2015, section 3): the more it loses, the smaller.

    A weight that loses nothing has 1, one that loses as much as the average 1/2.
    """
    mean = {curve.name: fmean(max(0.0, point.loss) for point in curve.points) for curve in curves}
    average = fmean(mean.values()) if mean else 0.0
    return {name: 1 / (1 + value / average) if average > 0 else 1.0 for name, value in mean.items()}


def key(content: np.ndarray | str, dataset: Dataset, options: Mapping[str, Any]) -> dict[str, Any]:
    """What measurements hold for: digests of model and data, options, and the version that made them."""
    state = hashlib.blake2b(digest_size=16)
    if isinstance(content, str):
        opened = load(content)
        files = [Path(content), *(Path(file.path) for file in opened.data.values())]
        for path in files:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 24):
                    state.update(chunk)
    else:
        state.update(content.tobytes())
    digests = {"model": state.hexdigest(), "data": sampling.digest(dataset)}
    return {**digests, "options": dict(options), "version": __version__}


_thread = threading.local()
"""The probe that a thread, most often the only one of a process, works with: it changes its model in place."""


def _measured(name: str, blob: Any, metric: Any, task: Task) -> Named:
    """What a process is asked to do."""
    if getattr(_thread, "name", None) != name:
        _thread.name, _thread.probe = name, Probe.of(pickle.loads(memoryview(blob)))
    return task, _thread.probe.measured(*task, metric)


def _run(
    name: str,
    blob: np.ndarray,
    probe: Probe,
    metric: Any,
    tasks: list[Task],
    jobs: int,
    progress: bool,
    stopped: Callable[[], bool],
) -> Iterator[Named]:
    """Records as they are measured: here, or side by side through joblib."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task("measuring sensitivity", total=len(tasks))
        for item in _here(probe, metric, tasks) if jobs == 1 else _beside(name, blob, metric, tasks, jobs, stopped):
            bar.advance(task)
            yield item


def _here(probe: Probe, metric: Any, tasks: list[Task]) -> Iterator[Named]:
    for item, level in tasks:
        yield (item, level), probe.measured(item, level, metric)


def _beside(
    name: str, blob: np.ndarray, metric: Any, tasks: list[Task], jobs: int, stopped: Callable[[], bool]
) -> Iterator[Named]:
    from joblib import Parallel, delayed

    if not tasks:
        return
    calls = (delayed(_measured)(name, blob, metric, task) for task in tasks)
    with _undisturbed():
        if stopped():  # a process half started when this one ends would say so among the results
            raise Stopped
        found = Parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered")(calls)
    yield from found


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Processes started meanwhile do not hear Ctrl-C, which a terminal sends to all: this one ends them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # or it is started on the way, and up to Python 3.12 lets the signal in again
    _start_quietly()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_quietly() -> None:
    """Start what clears up after joblib's processes without its warnings: at Ctrl-C there is much to clear up."""
    from joblib.externals.loky.backend import resource_tracker

    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        resource_tracker.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


PATIENCE = 0.3
"""Seconds in which a pool of processes may end them itself."""


def end_processes() -> None:
    """Processes that measure would go on for as long as a measurement takes."""
    if "joblib.externals.loky" not in sys.modules:
        return
    from joblib.externals.loky import get_reusable_executor

    def close() -> None:
        get_reusable_executor(reuse=True).shutdown(wait=False, kill_workers=True)

    closing = threading.Thread(target=close, daemon=True)  # the pool is locked while another thread starts processes
    closing.start()
    closing.join(PATIENCE)
    for process in multiprocessing.active_children():
        process.terminate()


def _measure_latency(
    probe: Probe,
    source: ModelSource,
    keep: Checkpoint,
    wanted: list[Task],
    shapes: Mapping[str, Sequence[int]] | None,
) -> None:
    """One after the other, in turns with the dense model; grouped inputs lowered. Nothing else should run meanwhile."""
    from onnxprune.lowering.latency import Latencies
    from onnxprune.lowering.lower import lowered
    from onnxprune.runtime.benchmark import benchmark

    threads = probe.shared.threads or 1
    latencies = Latencies.open(threads) if probe.shared.config.grouped else None

    for item, level in wanted:
        record = keep.records[f"{item} {level}"]
        if record["latency"] is not None:
            continue
        model, _, undo = probe.candidate(item, level)
        try:
            if latencies is not None:
                model, _ = lowered(model, shapes, latencies, check=False)
            with model.stage(None) as staged:
                found = benchmark(staged.path, source, shapes=shapes, threads=threads, min_time=0.4)
        finally:
            undo()
        keep.add(f"{item} {level}", record | {"latency": 1 - 1 / (found.speedup or 1.0)})


def _norms(model: Model, dataset: Dataset, config: configuration.Config, threads: int | None) -> dict[str, np.ndarray]:
    from onnxprune.layerwise import Calibrated

    weights = [weight for _, chosen in config.assign(find(model)[0]) for weight in chosen]
    return Calibrated.of(model, weights, dataset, None, threads).norms(config)


def content_of(model: Model, source: ModelSource) -> np.ndarray | str:
    """The bytes of a model, or its path where its data lie in files: what is sent to other processes."""
    if model.external_files and isinstance(source, (str, os.PathLike)):
        return os.path.abspath(source)
    return np.frombuffer(model.to_proto().SerializeToString(), np.uint8)


__all__ = ["Curve", "Point", "Sensitivity", "factors", "measure", "sensitivity"]
