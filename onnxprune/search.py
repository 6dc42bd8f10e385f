"""The smallest or fastest model that keeps its accuracy: recipes tried under onnxruntime, gated on data held back."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from onnxprune import config as configuration
from onnxprune import curves, pipeline
from onnxprune.algorithms.patterns import parse
from onnxprune.algorithms.pruner import Clock
from onnxprune.checkpoint import Checkpoint
from onnxprune.curves import Sensitivity
from onnxprune.errors import PruneError
from onnxprune.graph.model import ModelSource, load
from onnxprune.inspection import inspect
from onnxprune.recipes import Recipe, deflated, recipes
from onnxprune.results import Result, check_target
from onnxprune.runtime import samples as sampling
from onnxprune.runtime.benchmark import Benchmark, benchmark
from onnxprune.runtime.evaluate import ROUNDING
from onnxprune.runtime.feeds import load_data
from onnxprune.runtime.paired import Paired, Stopped
from onnxprune.runtime.session import open_session

TARGETS = ("size", "macs", "latency")
STEPS = 6
"""Halvings of each recipe's bracket: strengths are found to 1/64."""
MOST = 0.98
"""The largest strength tried."""
CURVE_LEVELS = (0.5, 0.75, 0.9, 0.97)
CURVE_PRECISION = 0.02
"""Curves steer the search, whose results are measured again: a coarse look will do."""
CURVES_SHARE = 0.5
"""Share of the time left that measuring curves may take."""
QUIET = 0.5
"""Seconds that what is under way is given to end after an interruption."""


@dataclass(frozen=True)
class Candidate:
    """A recipe at one strength, as it was measured.

    Attributes:
        recipe: in words.
        strength: what it was asked for: a sparsity, or the share of what is to be saved.
        loss: on the data of the search; of a candidate that loses too much, an estimate from its first samples.
        samples: how many were evaluated.
        sparsity: share of zeros, or of entries cut out, of the weights it governs.
        value: what the target measures, as a share of the dense model's; None where it was not measured.
        held_back: loss on the data held back; None where they were not looked at.
        written: whether it was the best kept so far, and written.
        error: why there is no such model.
    """

    recipe: str
    strength: float
    loss: float | None = None
    samples: int = 0
    sparsity: float | None = None
    value: float | None = None
    held_back: float | None = None
    written: bool = False
    error: str = ""


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        target: what was made small.
        max_drop: how much accuracy may fall.
        measure: what is meant by accuracy: the metric's name, or 'agreement'.
        candidates: in the order they were tried.
        best: the kept one; None where none was within the drop on the data held back.
        dense: the target's value for the dense model: bytes (deflated), MACs, or 1.
        path: the file written.
        search_samples: how many samples the search saw.
        held_back_samples: how many only the gate saw.
        evaluation: of the kept model beside the dense one, on the data held back; as JSON, like what follows.
        benchmark: latency of the kept model beside the dense one; None where it was not measured.
        report: of the kept model's pruning.
        ended: 'searched', 'time' or 'interrupted'.
        curves: sensitivity curves by pattern.
        notes: what should be known besides.
    """

    target: str
    max_drop: float
    measure: str
    candidates: tuple[Candidate, ...]
    best: Candidate | None
    dense: float
    path: Path | None
    search_samples: int
    held_back_samples: int
    evaluation: Mapping[str, Any] | None = None
    benchmark: Mapping[str, Any] | None = None
    report: Mapping[str, Any] | None = None
    ended: str = "searched"
    curves: Mapping[str, Sensitivity] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def frontier(self) -> tuple[Candidate, ...]:
        """Candidates that nothing measured beats in both loss and value, by rising loss; the first of equals."""
        found: list[Candidate] = []
        known = [c for c in self.candidates if c.value is not None and c.loss is not None]
        for candidate in sorted(known, key=lambda c: (c.loss, c.value)):
            if not found or (candidate.value or 0.0) < (found[-1].value or 0.0):
                found.append(candidate)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "target": self.target, "max_drop": self.max_drop, "measure": self.measure, "dense": self.dense,
            "candidates": [asdict(c) for c in self.candidates], "frontier": [asdict(c) for c in self.frontier],
            "best": None if self.best is None else asdict(self.best),
            "output": None if self.path is None else str(self.path),
            "search_samples": self.search_samples, "held_back_samples": self.held_back_samples,
            "evaluation": self.evaluation,
            "benchmark": self.benchmark,
            "report": self.report, "ended": self.ended,
            "sensitivity": {name: found.to_dict() for name, found in self.curves.items()}, "notes": list(self.notes),
        }  # fmt: skip


def autoprune(
    model: ModelSource,
    data: Any,
    output: str | os.PathLike[str] | None = None,
    *,
    max_drop: float = 0.01,
    target: str = "size",
    time_limit: float | None = None,
    hold_back: float = 0.3,
    metric: Any = None,
    jobs: int = -1,
    threads: int = 1,
    seed: int = 0,
    shapes: Mapping[str, Sequence[int]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Callable[[Candidate], None] | None = None,
) -> Search:
    """Search for the smallest or fastest model that keeps accuracy within a drop on data held back from the search.

    Each recipe's strength is bisected on the data of the search. Whatever is within the drop there, and smaller
    than what is kept, is then evaluated on the data held back; if it is within the drop there too, it is written. What
    those data say decides about nothing else.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model; it is not changed.
        data: inputs and optional labels, as `onnxprune.evaluate` takes them.
        output: the file to write; each better model replaces it.
        max_drop: how much the metric may fall or, without labels, agreement with the dense model may be below 1.
        target: 'size' (bytes of the deflated file), 'macs' (of the cut model) or 'latency' (onnxruntime's, in turns
            with the dense model).
        time_limit: seconds.
        hold_back: share of the data that only the gate sees.
        metric: as `evaluate` takes it.
        jobs: processes side by side that measure sensitivity curves, as for `onnxprune.sensitivity`.
        threads: of onnxruntime.
        seed: of the split.
        shapes: sizes of inputs with open dims.
        checkpoint: a file that measurements are kept in; an interrupted search goes on from it.
        force: allow output over the input.
        progress: is told of each candidate.

    Returns:
        What was found. Ctrl-C ends the search, and what was found so far is returned.

    Raises:
        PruneError: bad input, or the checkpoint is another run's.
    """
    if target not in TARGETS:
        raise PruneError(f"target {target!r} is not known; expected one of {', '.join(TARGETS)}")
    if not 0 <= max_drop < 1:
        raise PruneError(f"max_drop is {max_drop}; expected a number from 0, below 1, such as 0.01")
    if time_limit is not None and time_limit <= 0:
        raise PruneError(f"the time limit is {time_limit:g} s; it must be above 0")
    if any(recipe.refits for recipe in recipes(target)):
        from onnxprune import layerwise

        layerwise.check()
    run = _Run.of(
        model, data, None if output is None else Path(output), max_drop=max_drop, target=target, hold_back=hold_back,
        metric=metric, jobs=jobs, threads=threads, seed=seed, shapes=shapes, checkpoint=checkpoint, force=force,
        progress=progress,
    )  # fmt: skip
    run.deadline = None if time_limit is None else time.monotonic() + time_limit
    # In a thread of its own: a call into onnxruntime cannot be interrupted, but it can be left behind.
    worker = threading.Thread(target=run.work, daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(0.05)
            if run.late() and run.ended == "searched":
                run.ended = "time"
                run.stop.set()
    except KeyboardInterrupt:
        run.ended = "interrupted"
        run.stop.set()
        curves.end_processes()
        worker.join(QUIET)
    if run.error is not None and run.ended != "interrupted":  # processes that were interrupted, too, fail
        raise run.error
    return run.found()


@dataclass(eq=False)
class _Run:
    """A search under way; `work` fills it in one thread, `found` may be asked from another."""

    source: ModelSource
    output: Path | None
    options: dict[str, Any]
    search: Paired
    gate: Paired
    keep: Checkpoint
    dense: float
    progress: Callable[[Candidate], None] | None
    deadline: float | None = None
    ended: str = "searched"
    error: BaseException | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    candidates: list[Candidate] = field(default_factory=list)
    curves: dict[str, Sensitivity | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    best: Candidate | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, source: ModelSource, data: Any, output: Path | None, **options: Any) -> _Run:
        """Check everything there is to check, and part the data."""
        model = load(source)
        if output is not None:
            check_target(model, output, options["force"])
        dense = open_session(source, threads=options["threads"])
        dataset = load_data(data, dense.inputs)
        content = curves.content_of(model, source)
        of = {name: options[name] for name in ("max_drop", "target", "hold_back", "seed", "threads")}
        of["shapes"] = {name: list(shape) for name, shape in (options["shapes"] or {}).items()}
        of["metric"] = options["metric"] if isinstance(options["metric"], str) else None
        keep = Checkpoint.open(options["checkpoint"], curves.key(content, dataset, of))
        seen, held = sampling.split(dataset, options["hold_back"], options["seed"])
        metric = options["metric"]
        run = cls(
            source, output, options, Paired(dense, seen, metric), Paired(dense, held, metric), keep, 1.0,
            options["progress"],
        )  # fmt: skip
        if options["target"] == "macs":
            found = inspect(source, options["shapes"])
            if not found.macs_complete:
                raise PruneError("the model's MACs are not all known ('onnxprune inspect' says why); take latency")
            run.dense = float(found.macs)
        elif options["target"] == "size":
            with model.stage(None) as staged:
                run.dense = float(deflated(staged))
        run.gate.compare(dense, lambda loss, half: True)  # labels that do not fit are told before the search
        return run

    @property
    def limit(self) -> float:
        return float(self.options["max_drop"]) + ROUNDING

    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def work(self) -> None:
        try:
            self._search()
        except Stopped:
            return
        except BaseException as error:
            if not self.stop.is_set():  # what is torn down under way may well fail
                self.error = error

    def _search(self) -> None:
        brackets = {recipe: [0.0, min(parse(recipe.pattern).most, MOST)] for recipe in recipes(self.options["target"])}
        bounds: dict[Recipe, float] = {}
        best_seen: float | None = None
        for _ in range(STEPS):
            for recipe, bracket in brackets.items():
                if best_seen is not None and bounds.get(recipe, 0.0) >= best_seen:
                    continue  # even what loses too much is larger
                strength = sum(bracket) / 2
                candidate = self._candidate(recipe, strength)
                if candidate is None:
                    continue
                within = candidate.loss is not None and candidate.loss <= self.limit
                bracket[0 if within else 1] = strength
                if within and candidate.value is not None:
                    best_seen = min(candidate.value, candidate.value if best_seen is None else best_seen)
                elif candidate.value is not None:
                    bounds[recipe] = candidate.value

    def _candidate(self, recipe: Recipe, strength: float) -> Candidate | None:
        if self.stop.is_set():
            raise Stopped
        name = f"{recipe} at {strength}"
        if name in self.keep.records:
            record = self.keep.records[name]
            candidate = Candidate(**record["candidate"])
            if candidate.written and self.output is not None and not self.output.exists():
                candidate, extra = self._try(recipe, strength)  # somebody removed what was written
                record = {"candidate": asdict(candidate), **extra}
                self.keep.add(name, record)
            self._take(candidate, record)
            return candidate
        if recipe.allocation == "sensitivity" and self._curves(recipe) is None:
            return None
        candidate, extra = self._try(recipe, strength)
        record = {"candidate": asdict(candidate), **extra}
        self.keep.add(name, record)
        self._take(candidate, record)
        return candidate

    def _take(self, candidate: Candidate, record: dict[str, Any]) -> None:
        with self.lock:
            self.candidates.append(candidate)
            if candidate.written:
                self.best, self.kept = candidate, record
        if self.progress is not None and not self.stop.is_set():
            self.progress(candidate)

    def _try(self, recipe: Recipe, strength: float) -> tuple[Candidate, dict[str, Any]]:
        """Prune, evaluate, measure; if it is the best so far and passes the gate, write."""
        options, kind = self.options, self.options["target"]
        try:
            result = self._prune(recipe, strength)
        except PruneError as error:
            return Candidate(str(recipe), strength, error=str(error)), {}
        extra: dict[str, Any] = {}
        with result.model.stage(None) as staged:
            session = open_session(staged.path, threads=options["threads"])
            limit = self.limit
            found, _ = self.search.compare(session, lambda loss, half: loss - half > limit, self.stop.is_set)
            value = None
            if kind == "size":
                value = deflated(staged) / self.dense
            elif kind == "macs":
                value = inspect(staged.path, options["shapes"]).macs / self.dense
            elif found.loss <= limit:
                timed = self._timed(staged.path, 1.0)
                value = 1 / timed.speedup if timed.significant and timed.speedup else 1.0
            shown: dict[str, Any] = {"loss": found.loss, "samples": found.samples, "sparsity": result.sparsity}
            shown["value"] = value
            better = value is not None and value < (1.0 if self.best is None else self.best.value or 1.0)
            if found.loss <= limit and better:
                held, _ = self.gate.compare(session, lambda loss, half: False, self.stop.is_set)
                shown["held_back"] = held.loss
                if held.loss <= limit:
                    if kind == "latency":
                        timed = self._timed(staged.path, 2.0)
                        shown["value"] = 1 / timed.speedup if timed.significant and timed.speedup else 1.0
                        extra["benchmark"] = timed.to_dict()
                    if shown["value"] < 1.0:
                        extra |= {"evaluation": held.to_dict(), "report": result.report.to_dict()}
                        shown["written"] = True
                        self._write(result, Candidate(str(recipe), strength, **shown), extra)
        return Candidate(str(recipe), strength, **shown), extra

    def _prune(self, recipe: Recipe, strength: float) -> Result:
        options = self.options
        if recipe.refits:
            more: dict[str, Any] = {"calibration": sampling.first(self.search.dataset, CALIBRATION)}
        else:
            more = {}
        shares = None
        if recipe.allocation == "sensitivity":
            found = self.curves[recipe.pattern]
            assert found is not None
            cost = options["target"] if options["target"] != "size" and parse(recipe.pattern).faster else "parameters"
            shares = found.allocate(strength, cost)
        mapping: dict[str, Any] = {
            "pruner": recipe.pruner, "config_list": [{"op_types": "default", "sparsity": strength}],
            "score": recipe.score, "pattern": recipe.pattern, "allocation": recipe.allocation,
        }  # fmt: skip
        if recipe.reconstruct:
            mapping["reconstruct"] = True
        if parse(recipe.pattern).fitted is not None:
            more["timing"] = options["target"] == "latency"
        return pipeline.run(
            self.source, configuration.load(mapping), clock=Clock(), shapes=options["shapes"],
            threads=options["threads"], shares=shares, **more,
        )  # fmt: skip

    def _curves(self, recipe: Recipe) -> Sensitivity | None:
        """The curves of a pattern; None where measuring them takes too much of the time."""
        pattern, options = recipe.pattern, self.options
        if pattern in self.curves:
            return self.curves[pattern]
        end = None if self.deadline is None else time.monotonic() + CURVES_SHARE * (self.deadline - time.monotonic())

        def late() -> bool:
            return self.stop.is_set() or (end is not None and time.monotonic() > end)

        faster = parse(pattern).faster
        entry = {"op_types": "default", "pattern": pattern, "sparsity": 0.0}
        path = self.keep.path
        try:
            found: Sensitivity | None = curves.measure(
                self.source, self.search.dataset, configuration.load([entry]), self.search.dense,
                levels=CURVE_LEVELS, metric=options["metric"], precision=CURVE_PRECISION, jobs=options["jobs"],
                latency=faster and options["target"] == "latency", threads=options["threads"], seed=options["seed"],
                shapes=options["shapes"], progress=self.progress is not None, stopped=late,
                checkpoint=None if path is None else path.with_name(f"{path.name}.{pattern.partition(':')[0]}"),
                finish=False,
            )  # fmt: skip
        except Stopped:
            if self.stop.is_set():
                raise
            found = None
            self.notes.append(
                f"measuring sensitivity curves ({pattern}) would have taken more than half of the time: its allocation "
                "was left out; give more --time, what was measured is kept"
            )
        self.curves[pattern] = found
        return found

    def _timed(self, path: Path, seconds: float) -> Benchmark:
        options = self.options
        return benchmark(path, self.source, shapes=options["shapes"], threads=options["threads"], min_time=seconds)

    def _write(self, result: Result, candidate: Candidate, extra: dict[str, Any]) -> None:
        """Put a model in its place; from then on, and not before, it is the best."""
        if self.output is None:
            return
        with result.model.stage(self.output) as staged, self.lock:
            if self.stop.is_set():
                raise Stopped
            staged.commit()
            self.best, self.kept = candidate, {"candidate": asdict(candidate), **extra}

    def found(self) -> Search:
        """What there is so far."""
        with self.lock:
            options, kept = self.options, self.kept
            path = self.output if self.best is not None else None
            measure = kept.get("evaluation", {}).get("metric") or "agreement"
            seen = [*self.candidates, *([] if self.best is None or self.best in self.candidates else [self.best])]
            notes = list(self.notes)
            if self.ended == "searched":
                self._forget()
            elif self.keep.path is not None:
                notes.append(f"the same command goes on from here: measurements are kept in '{self.keep.path}'")
            return Search(
                options["target"], options["max_drop"], measure, tuple(seen), self.best, self.dense, path,
                self.search.dataset.samples, self.gate.dataset.samples, kept.get("evaluation"), kept.get("benchmark"),
                kept.get("report"), self.ended, {n: c for n, c in self.curves.items() if c is not None}, tuple(notes),
            )  # fmt: skip

    def _forget(self) -> None:
        self.keep.done()
        if self.keep.path is not None:
            for pattern in self.curves:
                name = f"{self.keep.path.name}.{pattern.partition(':')[0]}"
                self.keep.path.with_name(name).unlink(missing_ok=True)


CALIBRATION = 256
"""Samples of the search's data that are calibrated on."""


__all__ = ["Candidate", "Recipe", "Search", "autoprune", "recipes"]
