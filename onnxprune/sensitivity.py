"""Measured sensitivity: what pruning one weight alone costs, in onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import Progress

from onnxprune.algorithms.select import lowest
from onnxprune.graph.model import ModelSource, load
from onnxprune.graph.weights import check_finite, find
from onnxprune.runtime.evaluate import Evaluation, evaluate
from onnxprune.runtime.feeds import Dataset
from onnxprune.runtime.session import Session, open_session

LEVELS = (0.3, 0.6, 0.9)
"""Sparsities at which each weight is tried."""


def measure(
    source: ModelSource,
    names: Sequence[str],
    dataset: Dataset,
    dense: Session,
    *,
    metric: Any = None,
    threads: int | None = None,
) -> dict[str, list[float]]:
    """Prune each weight alone at a few levels by magnitude and measure what is lost.

    Args:
        source: the dense model.
        names: the weights to try.
        dataset: what to measure on.
        dense: the dense model's session.
        metric: as `evaluate` takes it.
        threads: of onnxruntime.

    Returns:
        Weight name -> loss at each of LEVELS: the fall of the metric or, without labels, of the agreement with the
        dense model from 1.
    """
    losses: dict[str, list[float]] = {name: [] for name in names}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("measuring sensitivity", total=len(names) * len(LEVELS))
        for name in names:
            for level in LEVELS:
                session = _alone(source, name, level, threads)
                losses[name].append(max(0.0, loss(evaluate(session, dataset, dense, metric=metric, progress=False))))
                progress.advance(task)
    return losses


def factors(losses: dict[str, list[float]]) -> dict[str, float]:
    """Each weight's factor in (0, 1] for its threshold (Han et al. 2015, section 3): the more it loses, the smaller.

    A weight that loses nothing has 1, one that loses as much as the average 1/2.
    """
    mean = {name: fmean(values) for name, values in losses.items()}
    average = fmean(mean.values()) if mean else 0.0
    return {name: 1 / (1 + value / average) if average > 0 else 1.0 for name, value in mean.items()}


def loss(evaluation: Evaluation) -> float:
    """What a model lost: the metric's drop or, without labels, 1 - agreement with the baseline (top-1, else cosine)."""
    if evaluation.drop is not None:
        return evaluation.drop
    agreement = evaluation.agreement
    if agreement is None:
        return 0.0
    if agreement.top1 is not None:
        return 1 - agreement.top1
    return 1 - (0.0 if agreement.cosine is None else agreement.cosine)


def _alone(source: ModelSource, name: str, level: float, threads: int | None) -> Session:
    model = load(source)
    weight = next(w for w in find(model)[0] if w.name == name)
    values = weight.values()
    check_finite(weight, values)
    keep = weight.stored(~lowest([values], int(weight.size * level))[0])
    model.edit(weight.leaf.tensor, lambda stored: weight.pruned(keep, stored))
    if not model.external_files:
        return open_session(model.proto, threads=threads)
    with model.stage(None) as staged:
        return open_session(staged.path, threads=threads)
