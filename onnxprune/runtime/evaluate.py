"""What pruning cost: accuracy with labels, agreement with the dense model without."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from onnxprune.errors import PruneError
from onnxprune.graph.model import ModelSource
from onnxprune.runtime.feeds import Array, Batch, Dataset, DataSource, load_data, load_function
from onnxprune.runtime.session import ModelInput, Session, open_session
from onnxprune.runtime.top1 import Top1

Metric = Callable[[list[Any], Any], Any]
"""Takes the outputs in the model's order, samples along the first axis, and the labels (None without);
returns a number, higher is better. Outputs of feeds that do not stack are lists of arrays, one per feed."""

TOP1 = "top-1"
ROUNDING = 1e-9
"""What shares of samples may differ by when they are equal: 0.99 - 0.98 is more than 0.01."""
PROGRESS_AFTER = 2.0
"""Seconds before a progress bar appears."""


@dataclass(frozen=True)
class Agreement:
    """How close a model's outputs are to its baseline's."""

    top1: float | None
    """Share of equal predictions of the first output; None where it has no classes."""
    cosine: float | None
    """Mean cosine similarity over samples and floating outputs; None if there are none."""
    largest_difference: float | None
    """Largest absolute difference of any output element (infinite for NaN or another shape)."""
    error: float | None
    """Squared differences as a share of the baseline's squares, mean over floating outputs; None if there are none. A
    sample that is not finite or of another shape counts as if it were 0."""


@dataclass(frozen=True)
class Evaluation:
    """A model's result on data, beside its baseline's."""

    samples: int
    metric: str | None
    score: float | None
    """Higher is better; None without labels or metric."""
    baseline_score: float | None
    agreement: Agreement | None
    """None without a baseline."""
    notes: tuple[str, ...] = ()

    @property
    def drop(self) -> float | None:
        """Baseline's score minus the model's: positive is worse."""
        if self.score is None or self.baseline_score is None:
            return None
        return self.baseline_score - self.score

    @property
    def loss(self) -> float:
        """What was lost: the metric's drop or, without labels, 1 - agreement with the baseline (top-1, else cosine)."""
        if self.drop is not None:
            return self.drop
        if self.agreement is None:
            return 0.0
        if self.agreement.top1 is not None:
            return 1 - self.agreement.top1
        return 1 - (0.0 if self.agreement.cosine is None else self.agreement.cosine)

    def within(self, drop: float) -> bool:
        """Whether no more than that was lost."""
        return self.loss <= drop + ROUNDING

    def to_dict(self) -> dict[str, Any]:
        """The fields and `drop`, ready for JSON (an infinite difference becomes None; a note says why)."""
        result = asdict(self) | {"drop": self.drop, "notes": list(self.notes)}
        if self.agreement is not None and not math.isfinite(self.agreement.largest_difference or 0.0):
            result["agreement"]["largest_difference"] = None
        return result


def evaluate(
    model: ModelSource | Session,
    data: DataSource,
    baseline: ModelSource | Session | None = None,
    *,
    metric: str | Metric | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Run a model, and its baseline beside it, over data in onnxruntime.

    Args:
        model: the model to judge: a path, an onnx.ModelProto, an onnx_ir.Model, or a Session.
        data: an .npz path, mapping, iterable of feeds, `module:function` or Dataset; see `feeds.load_data`.
        baseline: the dense model. It must take the same inputs.
        metric: a callable `(outputs, labels) -> float`, higher is better, or `module:function`; default with labels
            is top-1 accuracy of the first output (`top1.Top1` says what that means for its shapes).
        threads: for onnxruntime; None takes all CPUs.
        progress: whether to show a bar on stderr from 2 seconds on.

    Raises:
        PruneError: a model does not load or run, the data do not fit, neither labels nor metric nor baseline are
            given, top-1 is not defined for the output, the metric fails or gives no finite number, or the
            baseline computes NaN. A NaN of `model` counts as a wrong prediction and is noted.
    """
    session = model if isinstance(model, Session) else open_session(model, threads=threads)
    dense = baseline if baseline is None or isinstance(baseline, Session) else open_baseline(baseline, threads)
    dataset = load_data(data, session.inputs if dense is None else common_inputs(session, dense))
    comparison = Comparison.of(session, dense, dataset, metric)
    with contextlib.closing(_with_progress(dataset, progress)) as batches:
        for batch in batches:
            comparison.update(batch)
    return comparison.result()


@dataclass
class Comparison:
    """A model's outputs judged batch after batch, beside its baseline's; `result` may be asked at any time."""

    session: Session
    dense: Session | None
    metric: str | None
    function: Metric | None
    labelled: bool
    samples: int = 0
    _top1: Top1 | None = None
    _likeness: _Likeness = field(default_factory=lambda: _Likeness(()))
    _kept: list[tuple[list[Any], list[Any] | None, Array | None]] = field(default_factory=list)
    _with_nan: set[str] = field(default_factory=set)
    _notes: list[str] = field(default_factory=list)

    @classmethod
    def of(
        cls, session: Session, dense: Session | None, dataset: Dataset, metric: str | Metric | None = None
    ) -> Comparison:
        """Settle what is measured on a dataset, before anything is run; errors are those of `evaluate`."""
        name, function = _resolve(metric, dataset.labelled)
        if name is None and dense is None:
            raise PruneError(
                "there is nothing to evaluate against: the data have no 'labels' and no baseline is given; add labels, "
                "a baseline (the dense model) or a metric"
            )
        if dense is not None and len(session.outputs) != len(dense.outputs):
            raise PruneError(
                f"{session.label} has {len(session.outputs)} outputs and the baseline {len(dense.outputs)}; "
                "they must be the same model"
            )
        top1 = Top1(session.outputs[0]) if name == TOP1 or dense is not None else None
        return cls(session, dense, name, function, dataset.labelled, _top1=top1, _likeness=_Likeness(session.outputs))

    def update(self, batch: Batch, reference: list[Any] | None = None) -> list[Any] | None:
        """Run the model on a batch, and its baseline where its outputs (`reference`) are not at hand; returns those."""
        outputs = run_batch(self.session, batch)
        if reference is None and self.dense is not None:
            reference = run_batch(self.dense, batch)
        self.samples += batch.samples
        self._with_nan |= _nan_outputs(self.session, outputs)
        if self.dense is not None and reference is not None:
            for broken in sorted(_nan_outputs(self.dense, reference)):
                raise PruneError(f"{self.dense.label} computes NaN in output '{broken}' on these data")
            self._likeness.update(outputs, reference, batch.samples)
        if self.function is not None:
            self._kept.append((outputs, reference, batch.labels))
        if self._top1 is not None:
            try:
                labels = batch.labels if self.metric == TOP1 else None
                self._top1.update(outputs[0], None if reference is None else reference[0], labels, batch.samples)
            except PruneError as error:
                if self.metric == TOP1:
                    raise
                self._top1 = None  # agreement is then the cosine and the largest difference
                self._notes.append(f"no top-1 agreement: {error}")
        return reference

    def result(self) -> Evaluation:
        """What has come out so far."""
        top1 = None if self._top1 is None else self._top1.copy()  # finishing settles what more batches may change
        notes = list(self._notes)
        if top1 is not None and not top1.finish():
            notes.append(f"no top-1 agreement: without labels, output '{top1.output}' may be a regression's")
            top1 = None
        notes += [f"output '{broken}' of {self.session.label} is NaN for some samples: wrong, whatever it is compared "
                  "to" for broken in self.session.outputs if broken in self._with_nan]  # fmt: skip
        notes += self._likeness.notes
        if top1 is not None and top1.note is not None:
            notes.append(top1.note)

        name, dense, kept = self.metric, self.dense, self._kept
        score = baseline_score = None
        if self.function is not None and name is not None:
            labels = _stack([labels for _, _, labels in kept]) if self.labelled else None
            score = _measure(self.function, name, self.session, [outputs for outputs, _, _ in kept], labels)
            if dense is not None:
                others = [reference for _, reference, _ in kept if reference is not None]
                baseline_score = _measure(self.function, name, dense, others, labels)
        elif name == TOP1 and top1 is not None:
            score = top1.right / top1.total
            baseline_score = None if dense is None else top1.baseline_right / top1.total
        agreement = None
        if dense is not None:
            same = None if top1 is None else top1.equal / top1.total
            agreement = Agreement(same, self._likeness.cosine, self._likeness.largest, self._likeness.error)
        return Evaluation(self.samples, name, score, baseline_score, agreement, tuple(notes))


def open_baseline(baseline: ModelSource, threads: int | None) -> Session:
    """A session that messages call the baseline."""
    name = f" '{os.fspath(baseline)}'" if isinstance(baseline, (str, os.PathLike)) else ""
    return open_session(baseline, threads=threads, label=f"the baseline{name}")


def common_inputs(session: Session, baseline: Session) -> tuple[ModelInput, ...]:
    """The inputs of two sessions that must take the same data; a dim is fixed if either fixes it.

    Raises:
        PruneError: names, types or shapes differ.
    """
    merged = []
    others = {value.name: value for value in baseline.inputs}
    required = [{v.name for v in s.inputs if v.required} for s in (session, baseline)]
    for value in session.inputs:
        other = others.get(value.name)
        if other is None and not value.required:
            continue
        dims = None if other is None else _merge(value.shape, other.shape)
        if other is None or dims is None or value.dtype != other.dtype or required[0] != required[1]:
            raise PruneError(
                f"{session.label} and its baseline take different inputs: {', '.join(map(str, session.inputs))} "
                f"and {', '.join(map(str, baseline.inputs))}; compare a model with the one it was pruned from"
            )
        merged.append(ModelInput(value.name, value.dtype, dims, value.required))
    return tuple(merged)


def _merge(
    left: tuple[int | str | None, ...], right: tuple[int | str | None, ...]
) -> tuple[int | str | None, ...] | None:
    if not left or not right:  # undeclared
        return left or right
    if len(left) != len(right):
        return None
    pairs = list(zip(left, right, strict=True))
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
        return None
    return tuple(b if isinstance(b, int) else a for a, b in pairs)


def _resolve(metric: str | Metric | None, labelled: bool) -> tuple[str | None, Metric | None]:
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric is not None and metric != TOP1:
        if not isinstance(metric, str) or ":" not in metric:
            raise PruneError(f"metric {metric!r} is neither '{TOP1}' nor a callable nor 'module:function'")
        return metric, load_function(metric)
    if metric == TOP1 and not labelled:
        raise PruneError("top-1 needs labels: add an array 'labels' to the data, or pairs (feed, labels)")
    return (TOP1 if labelled else None), None


def run_batch(session: Session, batch: Batch) -> list[Any]:
    """The outputs of one batch, without the rows that stem from padding."""
    outputs = session.run(batch.feed)
    if batch.padded:
        rows = max(len(array) for array in batch.feed.values() if array.ndim)
        for index, output in enumerate(outputs):
            if not isinstance(output, np.ndarray) or output.ndim == 0 or len(output) != rows:
                shape = f"of shape {list(output.shape)}" if isinstance(output, np.ndarray) else "no tensor"
                raise PruneError(
                    f"{session.label}: the last {batch.samples} samples do not fill the model's batch of {rows}, and "
                    f"padding cannot be cut from output '{session.outputs[index]}', which is {shape}; give a "
                    f"multiple of {rows} samples"
                )
            outputs[index] = output[: batch.samples]
    return outputs


def _nan_outputs(session: Session, outputs: list[Any]) -> set[str]:
    return {
        name
        for name, output in zip(session.outputs, outputs, strict=True)
        if isinstance(output, np.ndarray) and output.dtype.kind == "f" and bool(np.isnan(output).any())
    }


@dataclass
class _Likeness:
    """Running cosine similarity, error and largest difference over the outputs of two models."""

    names: Sequence[str]
    largest: float | None = None
    _sums: dict[str, float] = field(default_factory=dict)
    _squares: dict[str, Array] = field(default_factory=dict)
    """Output -> sums of the squared differences and of the baseline's squares."""
    _samples: int = 0
    _noted: dict[str, str] = field(default_factory=dict)

    @property
    def cosine(self) -> float | None:
        return sum(self._sums.values()) / (self._samples * len(self._sums)) if self._sums else None

    @property
    def error(self) -> float | None:
        shares = [float(lost / whole) if whole > 0 else float(lost > 0) for lost, whole in self._squares.values()]
        return sum(shares) / len(shares) if shares else None

    @property
    def notes(self) -> list[str]:
        return list(self._noted.values())

    def update(self, outputs: list[Any], reference: list[Any], samples: int) -> None:
        self._samples += samples
        for name, left, right in zip(self.names, outputs, reference, strict=True):
            if not isinstance(right, np.ndarray) or right.dtype.kind not in "fbiu":
                self._noted[name] = f"output '{name}' is not numeric: no cosine, no difference"
                continue
            floating = right.dtype.kind == "f"
            if not isinstance(left, np.ndarray) or left.shape != right.shape:
                found = list(left.shape) if isinstance(left, np.ndarray) else type(left).__name__
                self._noted[name] = f"output '{name}' is {found} where the baseline's is {list(right.shape)}"
                self.largest = math.inf
                if floating:
                    self._sums[name] = self._sums.get(name, 0.0)
                    self._lose(name, np.full((1, right.size), np.nan), right.reshape(1, -1))
                continue
            rows = samples if left.ndim and len(left) == samples else 1
            a, b = (array.astype(np.float64).reshape(rows, -1) for array in (left, right))
            with np.errstate(all="ignore"):
                differences = np.where(a == b, 0.0, np.abs(a - b))
            if a.size:
                difference = float(differences.max())
                self.largest = max(self.largest or 0.0, math.inf if math.isnan(difference) else difference)
            if floating:
                self._sums[name] = self._sums.get(name, 0.0) + float(_cosine(a, b).sum()) * (samples / rows)
                self._lose(name, differences, b)

    def _lose(self, name: str, differences: Array, reference: Array) -> None:
        """Add the squares of some samples."""
        with np.errstate(all="ignore"):
            whole = np.square(np.where(np.isfinite(reference), reference, 0.0), dtype=np.float64).sum(1)
            lost = np.square(differences).sum(1)
        lost = np.where(np.isfinite(lost), lost, whole)
        self._squares[name] = self._squares.get(name, 0.0) + np.array([lost.sum(), whole.sum()])


def _cosine(a: Array, b: Array) -> Array:
    """Of each row; exactly 1 for equal rows, 0 where it does not exist (NaN, infinity, one of them all zeros)."""
    with np.errstate(all="ignore"):
        cosine = np.einsum("ij,ij->i", a, b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    cosine = np.where(np.isfinite(cosine), np.clip(cosine, -1.0, 1.0), 0.0)
    return np.where((a == b).all(axis=1), 1.0, cosine)


def _measure(function: Metric, name: str, session: Session, outputs: list[list[Any]], labels: Any) -> float:
    stacked = [_stack(list(parts)) for parts in zip(*outputs, strict=True)]
    try:
        score = float(function(stacked, labels))
    except Exception as error:
        raise PruneError(f"the metric '{name}' raised {type(error).__name__} on {session.label}: {error}") from error
    if not math.isfinite(score):
        raise PruneError(f"the metric '{name}' gives {score} on {session.label}; it must give a finite number")
    return score


def _stack(parts: list[Any]) -> Any:
    """One array with samples along the first axis, or the list itself where the parts do not stack."""
    if not all(isinstance(part, np.ndarray) and part.shape[1:] == parts[0].shape[1:] for part in parts):
        return parts
    if parts[0].ndim == 0:
        return np.stack(parts) if all(part.ndim == 0 for part in parts) else parts
    return np.concatenate(parts) if all(part.ndim == parts[0].ndim for part in parts) else parts


def _with_progress(dataset: Dataset, enabled: bool) -> Generator[Batch, None, None]:
    """The batches; a bar appears on stderr once they have taken a while, and goes when they end."""
    bar: Progress | None = None
    started = time.monotonic()
    try:
        for done, batch in enumerate(dataset, 1):
            yield batch
            if not enabled:
                continue
            if bar is None and done < len(dataset) and time.monotonic() - started >= PROGRESS_AFTER:
                bar = Progress(
                    TextColumn("evaluating"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    console=Console(stderr=True),
                    transient=True,
                )
                bar.add_task("evaluating", total=len(dataset))
                bar.start()
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
    finally:
        if bar is not None:
            bar.stop()
