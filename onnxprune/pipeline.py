"""One run of pruning: decide, edit, cut or lower, evaluate, gate, write."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxprune import config as configuration
from onnxprune import progress
from onnxprune.algorithms.cuts import Zeroing
from onnxprune.algorithms.pruner import Clock, Decision, decide, decisions, target
from onnxprune.checkpoint import Checkpoint
from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.graph.weights import Skipped, Weight, find
from onnxprune.results import Report, Result, Row, check_target, note, row

if TYPE_CHECKING:
    from onnxprune.curves import Sensitivity
    from onnxprune.layerwise import Calibrated
    from onnxprune.runtime.evaluate import Evaluation
    from onnxprune.runtime.feeds import Dataset
    from onnxprune.runtime.session import Session
    from onnxprune.structure.plan import Plan
    from onnxprune.structure.shrink import Lines


def run(
    source: ModelSource,
    config: configuration.Config,
    *,
    clock: Clock,
    held: Mapping[str, np.ndarray] | None = None,
    output: str | os.PathLike[str] | None = None,
    data: Any = None,
    max_drop: float | None = None,
    metric: Any = None,
    sparse: bool = False,
    force: bool = False,
    threads: int | None = None,
    keep_shape: bool = False,
    verify: bool = True,
    align: int | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    compact: bool = False,
    timing: bool = True,
    latency_table: str | os.PathLike[str] | None = None,
    calibration: Any = None,
    max_memory: str | float | None = None,
    shares: Mapping[str, float] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Result:
    """Prune with a validated configuration: decide, edit, evaluate, gate, write. See `prune`."""
    if max_drop is not None and data is None:
        raise PruneError("max_drop needs data to measure accuracy on; pass data (or --data)")
    if max_drop is not None and not math.isfinite(max_drop):
        raise PruneError(f"max_drop is {max_drop}; expected a number such as 0.01 (one point of accuracy)")
    if config.refits:
        from onnxprune import layerwise

        layerwise.check()
    model = load(source)
    target = None if output is None else Path(output)
    if target is not None:
        check_target(model, target, force)
    plan = None
    if config.coupled:
        plan = _plan(model, shapes, config.inexact)
        model = plan.coupling.model
    weights, untouched = find(model) if plan is None else (list(plan.coupling.weights), list(plan.coupling.skipped))
    if not weights and untouched:
        first, more = untouched[0], len(untouched) - 1
        raise PruneError(
            "the configuration matches no weight: the model has none that can be pruned; "
            f"'{first.name}' ({first.op_type}) is left alone: {first.reason}"
            + (f"; and so are {more} more" * (more > 0))
        )
    trial = None if data is None else _Trial.of(source, data, metric, threads)
    deciding = trial  # calibration data decide, so that what is measured on data has not been seen
    if calibration is not None:
        dense = None if trial is None else trial.dense
        deciding = _Trial.of(source, calibration, metric, threads, dense, lean=not config.measured)
    calibrated = None
    if config.calibrated:
        calibrated = _calibrated(model, config, weights, deciding, max_memory)
    factors = None
    if deciding is not None and config.pruner == "sensitivity":
        factors = deciding.factors([w.name for _, chosen in config.assign(weights) for w in chosen])
    norms = {} if calibrated is None else calibrated.norms(config)
    if shares is None and deciding is not None:
        shares = deciding.shares(config, clock, shapes, norms)
    if plan is None:
        decided, misfits = decisions(config, weights, clock, held, factors, norms, shares)
        if calibrated is not None and config.pruner == configuration.SPARSEGPT:
            decided = {name: decision for name, decision in decided.items() if name not in calibrated.reasons}
        rows = {name: _row(decision) for name, decision in decided.items()}
        masks = _masks(decided)
    else:
        kept: dict[str, np.ndarray | Lines]
        single, misfits = decide(config, weights, clock, held, factors, norms, shares)
        along, pinned = plan.choose(config, clock, held, align, norms, shares)
        kept = {name: mask & along[name].mask() if name in along else mask for name, mask in single.items()}
        kept |= {name: stays for name, stays in along.items() if name not in kept}
        misfits += pinned
        rows = _rows([weight for weight in weights if weight.name in kept], kept)
        masks = _channel_masks(kept)
    misfits += [] if calibrated is None else calibrated.unread(config, weights)
    told = {*masks, *(s.name for s in misfits)}
    others = [Skipped(w.name, w.op_type, "the configuration leaves it out") for w in weights if w.name not in told]
    groups = () if plan is None else plan.groups
    report = Report(tuple(rows.values()), (*misfits, *others, *untouched), groups)
    unedited = None if calibrated is None else calibrated.duplicate()
    keep = Checkpoint(None, {})
    if calibrated is not None and config.refits:
        keep = calibrated.checkpoint(checkpoint, config, masks)
    if plan is None:
        for decision in decided.values():
            _edit(model, decision)
    else:
        plan.zero(kept)
    if calibrated is not None and unedited is not None and config.refits:
        masks = Masks(calibrated.apply(config, weights, dict(masks), unedited, keep))
        after = {w.name: row(w, masks[w.name]) for w in weights if w.name in rows}
        rows = {name: replace(after[name], zeros_before=before.zeros_before) for name, before in rows.items()}
        report = replace(report, rows=tuple(rows.values()))
    if calibrated is not None:
        report = replace(report, notes=tuple(calibrated.notes))
    if plan is not None and not keep_shape:
        model = plan.cut()
        report = replace(report, difference=plan.check(model) if verify and not config.inexact else None)
    if compact:
        from onnxprune.structure import compact as dead

        model, plan, difference = dead.compact(model, shapes, align or 1)
        report = replace(report, groups=plan.groups, difference=difference)
    if config.grouped and not keep_shape:
        from onnxprune.lowering.latency import Latencies
        from onnxprune.lowering.lower import lowered

        model, lowering = lowered(model, shapes, Latencies.open(threads or 1, latency_table, timing), verify)
        report = replace(report, lowering=lowering)
    note(model, config, report, clock)
    if trial is None and target is None:
        keep.done()
        return Result(model, masks, report)
    with model.stage(target, sparse_storage=sparse) as staged:
        evaluation = None if trial is None else trial.evaluate(staged.path)
        accepted = max_drop is None or evaluation is None or evaluation.within(max_drop)
        if target is not None and accepted and staged.in_place:
            masks = masks.packed()  # what they are worked out from is about to be replaced
        size = staged.size
        path = staged.commit() if target is not None and accepted else None
    keep.done()
    return Result(model, masks, report, evaluation, path, accepted, None if path is None else size)


def _calibrated(
    model: Model, config: configuration.Config, weights: Sequence[Weight], deciding: _Trial | None, memory: Any
) -> Calibrated:
    from onnxprune.layerwise import Calibrated

    if deciding is None:
        raise PruneError(
            "the configuration asks for calibration data (score 'wanda'); pass some hundred inputs as data or, where "
            "those are for evaluation only, as calibration (--data, --calibration); labels are not needed"
        )
    if not config.coupled:  # else the weights that read channels lose entries, too
        weights = [weight for _, chosen in config.assign(weights) for weight in chosen]
    return Calibrated.of(model, weights, deciding.dataset, memory, deciding.threads)


def _plan(model: Model, shapes: Mapping[str, Sequence[int]] | None, inexact: bool) -> Plan:
    from onnxprune.structure.plan import Plan

    return Plan.of(model, shapes, inexact=inexact)


@dataclass(frozen=True, eq=False)
class _Trial:
    """The dense model on data: what a pruned one is held against. The data are read once."""

    source: ModelSource
    dense: Session
    dataset: Dataset
    metric: Any
    threads: int | None

    @classmethod
    def of(
        cls,
        source: ModelSource,
        data: Any,
        metric: Any,
        threads: int | None,
        dense: Session | None = None,
        lean: bool = False,
    ) -> _Trial:
        from onnxprune.runtime.feeds import load_data
        from onnxprune.runtime.session import open_session

        dense = open_session(source, threads=threads, lean=lean) if dense is None else dense
        return cls(source, dense, load_data(data, dense.inputs), metric, threads)

    def evaluate(self, model: Path) -> Evaluation:
        from onnxprune.runtime.evaluate import evaluate

        return evaluate(model, self.dataset, self.dense, metric=self.metric, threads=self.threads)

    def factors(self, names: list[str]) -> dict[str, float]:
        from onnxprune import curves

        found = self._curves({"op_names": [*names], "sparsity": 0.0}, curves.FACTOR_LEVELS, precision=0.0)
        return curves.factors([curve for curve in found.curves if curve.name in names])

    def shares(
        self,
        config: configuration.Config,
        clock: Clock,
        shapes: Mapping[str, Sequence[int]] | None,
        norms: Mapping[str, np.ndarray],
    ) -> dict[str, float]:
        """For what entries allocate by sensitivity: name of each weight or group -> its sparsity."""
        from onnxprune import curves

        found: dict[str, float] = {}
        for entry, source in zip(config.entries, config.source, strict=True):
            share = target(entry, clock)
            if entry.allocation != "sensitivity" or entry.exclude or not share:
                continue
            named: dict[str, Any] = {key: source[key] for key in ("op_types", "op_names") if key in source}
            wanted = {**named, "pattern": entry.pattern, "score": entry.score, "sparsity": 0.0}
            measured = self._curves(wanted, curves.LEVELS, shapes=shapes, norms=norms)
            found |= measured.allocate(share)
        return found

    def _curves(self, entry: dict[str, Any], levels: Sequence[float], **options: Any) -> Sensitivity:
        from onnxprune.curves import measure

        config = configuration.load([entry])
        metric = self.metric if self.dataset.labelled else None
        given = {"metric": metric, "threads": self.threads, **options}
        return measure(self.source, self.dataset, config, self.dense, levels=levels, **given)


PACKED = 1 << 22
"""Up to so many entries, masks are kept in memory, whatever becomes of the model's file."""


def _rows(weights: Sequence[Weight], kept: Mapping[str, np.ndarray | Lines]) -> dict[str, Row]:
    rows = {}
    sizes = [math.prod(weight.shape) * weight.dtype.itemsize for weight in weights]
    with progress.task("counting zeros", sum(sizes)) as advance:
        for weight, size in zip(weights, sizes, strict=True):
            rows[weight.name] = row(weight, kept[weight.name])
            advance(size)
    return rows


def _channel_masks(kept: Mapping[str, np.ndarray | Lines]) -> Masks:
    """The masks of a model that loses channels: what the positions of axes say is worked out when it is looked at."""
    whole = Masks({name: stays for name, stays in kept.items() if isinstance(stays, np.ndarray)})
    return whole | Masks.made({n: (s.mask, s.shape) for n, s in kept.items() if not isinstance(s, np.ndarray)})


def _masks(decided: Mapping[str, Decision]) -> Masks:
    """The masks of weights: in memory, or worked out from a large model's file when they are looked at."""
    made = Masks.made({name: (decision.kept, decision.weight.shape) for name, decision in decided.items()})
    if sum(math.prod(decision.weight.shape) for decision in decided.values()) <= PACKED:
        return made.packed()
    held = {name: decision for name, decision in decided.items() if not decision.streamed}
    return made | Masks.made({n: (d.kept, d.weight.shape) for n, d in held.items()}).packed()


def _edit(model: Model, decision: Decision) -> None:
    """Carry a decision out in its model."""
    weight, cut, values = decision.weight, decision.cut, decision.values
    if cut is not None and values is not None and values.in_file:
        if cut.removed:
            model.edit(weight.leaf.tensor, Zeroing(cut, values))
        return
    keep = decision.kept()
    if keep.all():
        return
    bits = np.packbits(keep)

    def change(stored: np.ndarray) -> np.ndarray:
        keep = np.unpackbits(bits, count=math.prod(weight.shape)).view(np.bool_)
        return weight.pruned(keep.reshape(weight.shape), stored)

    model.edit(weight.leaf.tensor, change)


def _row(decision: Decision) -> Row:
    weight, cut = decision.weight, decision.cut
    if cut is None:
        return row(weight, decision.kept())
    return Row(weight.name, weight.op_type, weight.shape, weight.size, cut.zeros, cut.zeros_after)
