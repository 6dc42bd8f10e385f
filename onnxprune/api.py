"""The front door: prune a model, look into one."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import onnx

from onnxprune import config as configuration
from onnxprune._version import __version__
from onnxprune.algorithms.cuts import Zeroing
from onnxprune.algorithms.pruner import Clock, Decision, decide, decisions, target
from onnxprune.errors import PruneError
from onnxprune.graph.files import writing
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.graph.weights import Skipped, Weight, find

if TYPE_CHECKING:
    from onnxprune.curves import Sensitivity
    from onnxprune.layerwise import Calibrated
    from onnxprune.lowering.lower import Lowering
    from onnxprune.runtime.evaluate import Evaluation
    from onnxprune.runtime.feeds import Dataset
    from onnxprune.runtime.session import Session
    from onnxprune.structure.channels import GroupRow
    from onnxprune.structure.plan import Plan


@dataclass(frozen=True)
class Row:
    """One weight of a report: its stored shape, its number of entries, and how many of them are zero."""

    name: str
    op_type: str
    shape: tuple[int, ...]
    size: int
    zeros_before: int
    zeros: int

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        rows: one per weight that was pruned.
        skipped: the weights left alone, with reasons.
        groups: one per group of channels, where channels or heads were pruned.
        notes: what a user should know besides.
        difference: of the shrunk model from the masked one, as a share of the outputs' scale; None where not checked.
        lowering: what became of layers with grouped inputs; None where none were asked for, or zeros are kept.
    """

    rows: tuple[Row, ...]
    skipped: tuple[Skipped, ...]
    groups: tuple[GroupRow, ...] = ()
    difference: float | None = None
    lowering: Lowering | None = None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Entries of all rows."""
        return sum(row.size for row in self.rows)

    @property
    def zeros(self) -> int:
        """Zeros of all rows."""
        return sum(row.zeros for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all rows."""
        return self.zeros / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(row), "shape": list(row.shape), "sparsity": row.sparsity} for row in self.rows]
        total = {"size": self.size, "zeros": self.zeros, "sparsity": self.sparsity}
        channels = {"groups": [asdict(group) for group in self.groups], "difference": self.difference}
        lowering = None if self.lowering is None else asdict(self.lowering)
        return {
            "weights": rows,
            "skipped": [asdict(s) for s in self.skipped],
            **total,
            **channels,
            "lowering": lowering,
            "notes": list(self.notes),
        }


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model.

    Attributes:
        masks: weight name -> boolean array of the stored shape, True is kept. Those of a model of more than 16 million
            entries are worked out from its file when they are looked at, as long as that is what it was; `packed()`
            puts them into memory.
        report: one row per weight, and the ones skipped, with reasons.
        evaluation: dense beside pruned under onnxruntime, where data was given.
        path: the file written; None where none was asked for, or the gate was not met.
        accepted: False where accuracy fell by more than `max_drop`.
    """

    model: Model = field(repr=False)
    masks: Masks
    report: Report
    evaluation: Evaluation | None = None
    path: Path | None = None
    accepted: bool = True

    @property
    def sparsity(self) -> float:
        """Share of zeros over the weights that the configuration governs."""
        return self.report.sparsity

    def save(self, path: str | os.PathLike[str], *, sparse: bool = False, force: bool = False) -> Path:
        """Write the pruned model: to a temporary file in the target's folder, then renamed.

        Args:
            path: the target; external data goes to a new file beside it.
            sparse: store initializers above the break-even sparsity as sparse_initializer.
            force: allow the target to be the source.
        """
        target = Path(path)
        check_target(self.model, target, force)
        with self.model.stage(target, sparse_storage=sparse) as staged:
            return staged.commit()

    def to_proto(self) -> onnx.ModelProto:
        """The pruned model as one protobuf, external data loaded."""
        return self.model.to_proto()


class Pruner:
    """A configuration at work on models; knows where in its schedule it is.

    Args:
        config_list: a list of entries, a mapping around one, or the path of a file with either.
        options: `score`, `pattern`, `allocation`: defaults of all entries.
    """

    kind: ClassVar[str | None] = None

    def __init__(self, config_list: configuration.ConfigSource, **options: Any) -> None:
        self.config = configuration.load(config_list, **{"pruner": self.kind, **options})
        self.clock = Clock()
        self.masks = Masks()

    def update_epoch(self, epoch: int) -> None:
        """Move schedules that count epochs to `epoch`; what is pruned by then stays pruned from now on."""
        self.clock = Clock(int(epoch), self.clock.step or 0)

    def step(self, steps: int = 1) -> None:
        """Move schedules that count optimizer steps on."""
        self.clock = Clock(self.clock.epoch or 0, (self.clock.step or 0) + steps)

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is and what is pruned, as plain values and arrays."""
        return {"epoch": self.clock.epoch, "step": self.clock.step, "masks": {n: self.masks[n] for n in self.masks}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            PruneError: it is not one.
        """
        try:
            self.clock = Clock(state["epoch"], state["step"])
            self.masks = Masks({name: np.asarray(mask, np.bool_) for name, mask in state["masks"].items()})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PruneError(f"this is no state_dict of a pruner: {type(error).__name__} {error}") from error

    def prune(self, model: ModelSource, *, epoch: int | None = None, step: int | None = None, **options: Any) -> Result:
        """Prune a model at one point of the schedule.

        Args:
            model: a path, an onnx.ModelProto or an onnx_ir.Model; it is not changed.
            epoch: the epoch to prune for; otherwise that of the last `update_epoch`, or the end of the schedule.
            step: the same for optimizer steps.
            options: as for `onnxprune.prune`.
        """
        following = epoch is None and step is None and self.clock != Clock()
        clock = self.clock if following else Clock(epoch, step)
        result = run(model, self.config, clock=clock, held=self.masks if following else None, **options)
        if following:
            self.masks = result.masks.packed()
        return result


class LevelPruner(Pruner):
    """Level: the int(n * sparsity) entries of smallest magnitude of each weight."""

    kind = "level"


class AGPPruner(Pruner):
    """AGP (Zhu & Gupta 2017): level pruning whose sparsity rises along a cubic schedule."""

    kind = "agp"


class SensitivityPruner(Pruner):
    """Sensitivity (Han et al. 2015): thresholds in units of each weight's spread and measured sensitivity."""

    kind = "sensitivity"


def prune(
    model: ModelSource,
    config: configuration.ConfigSource | Pruner,
    output: str | os.PathLike[str] | None = None,
    data: Any = None,
    *,
    pruner: str | None = None,
    score: str | None = None,
    pattern: str | None = None,
    allocation: str | None = None,
    inexact: bool | None = None,
    reconstruct: bool | None = None,
    epoch: int | None = None,
    step: int | None = None,
    **options: Any,
) -> Result:
    """Prune a model and, where asked, evaluate and write it.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model; it is not changed.
        config: a config list, a mapping around one, the path of a file with either, or a pruner object.
        output: the file to write.
        data: inputs and optional labels, as `onnxprune.evaluate` takes them; dense and pruned are compared on them,
            and the sensitivity pruner and the allocation 'sensitivity' measure with them.
        pruner: 'level', 'agp', 'sensitivity' or 'sparsegpt'.
        score: default of the entries' `score`.
        pattern: default of the entries' `pattern`.
        allocation: default of the entries' `allocation`.
        inexact: whether norms over channels let them go: they then average over fewer, and fine-tuning has to follow.
        reconstruct: whether what survives of each weight is refitted by least squares, so that on calibration data it
            comes close to what the dense one computes.
        epoch: for schedules, the epoch to prune for; the end unless given.
        step: the same for optimizer steps.
        options: `calibration` (what to calibrate on where that is not `data`, in the same forms; labels are not used),
            `max_memory` (for calibrating: bytes, or a text such as '2GB'; a quarter of the machine's unless given),
            `max_drop` (write nothing where the metric falls by more or, without labels, agreement with the dense
            model is lower than 1 - max_drop), `metric` (a callable or 'module:function'),
            `keep_shape` (zero in place where the pattern is 'channel', 'head' or 'grouped', instead of cutting out and
            lowering), `verify` (False: do not hold the model against the zeroed one in onnxruntime), `timing` and
            `latency_table` (as `onnxprune.lower` takes them), `align` (channel
            counts are rounded to multiples of it; what suits the machine unless given), `compact` (cut out, without
            changing what is computed, the channels that zeros have made dead), `shapes` (sizes of inputs with open
            dims), `sparse` (store as sparse_initializer what that makes smaller), `force` (allow output over the
            input), `threads` (of onnxruntime).

    Returns:
        The result: masks, report, evaluation, `save` and `to_proto`.

    Raises:
        PruneError: bad input; nothing has been written.
    """
    if isinstance(config, Pruner):
        if any(o is not None for o in (pruner, score, pattern, allocation, inexact, reconstruct)):
            raise PruneError(
                "pruner, score, pattern, allocation, inexact and reconstruct belong to the pruner object; "
                "give them when making it"
            )
        return config.prune(model, epoch=epoch, step=step, output=output, data=data, **options)
    options_ = {"pruner": pruner, "score": score, "pattern": pattern, "allocation": allocation, "inexact": inexact}
    checked = configuration.load(config, **options_, reconstruct=reconstruct)
    return run(model, checked, clock=Clock(epoch, step), output=output, data=data, **options)


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
) -> Result:
    """Prune with a validated configuration: decide, edit, evaluate, gate, write. See `prune`."""
    if max_drop is not None and data is None:
        raise PruneError("max_drop needs data to measure accuracy on; pass data (or --data)")
    if max_drop is not None and not math.isfinite(max_drop):
        raise PruneError(f"max_drop is {max_drop}; expected a number such as 0.01 (one point of accuracy)")
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
    calibrated = None
    if config.calibrated:
        calibrated = _calibrated(source, model, config, weights, trial, calibration, max_memory, threads)
    factors = None
    if trial is not None and config.pruner == "sensitivity":
        factors = trial.factors([w.name for _, chosen in config.assign(weights) for w in chosen])
    norms = {} if calibrated is None else calibrated.norms(config)
    if shares is None and trial is not None:
        shares = trial.shares(config, clock, shapes, norms)
    if plan is None:
        decided, misfits = decisions(config, weights, clock, held, factors, norms, shares)
        if calibrated is not None and config.pruner == configuration.SPARSEGPT:
            decided = {name: decision for name, decision in decided.items() if name not in calibrated.reasons}
        rows = {name: _row(decision) for name, decision in decided.items()}
        masks = _masks(decided)
    else:
        kept, misfits = decide(config, weights, clock, held, factors, norms, shares)
        along, pinned = plan.decide(config, clock, held, align, norms, shares)
        kept |= {name: kept[name] & mask if name in kept else mask for name, mask in along.items()}
        misfits += pinned
        rows = {w.name: row(w, kept[w.name]) for w in weights if w.name in kept}
        masks = Masks(kept)
    misfits += [] if calibrated is None else calibrated.unread(config, weights)
    told = {*masks, *(s.name for s in misfits)}
    others = [Skipped(w.name, w.op_type, "the configuration leaves it out") for w in weights if w.name not in told]
    groups = () if plan is None else plan.groups
    report = Report(tuple(rows.values()), (*misfits, *others, *untouched), groups)
    dense = None if calibrated is None else calibrated.duplicate()
    if plan is None:
        for decision in decided.values():
            _edit(model, decision)
    else:
        plan.zero(kept)
    if calibrated is not None and dense is not None and config.refits:
        masks = Masks(calibrated.apply(config, weights, dict(masks), dense))
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
        return Result(model, masks, report)
    with model.stage(target, sparse_storage=sparse) as staged:
        evaluation = None if trial is None else trial.evaluate(staged.path)
        accepted = max_drop is None or evaluation is None or evaluation.loss <= max_drop
        if target is not None and accepted and staged.in_place:
            masks = masks.packed()  # what they are worked out from is about to be replaced
        path = staged.commit() if target is not None and accepted else None
    return Result(model, masks, report, evaluation, path, accepted)


def _calibrated(
    source: ModelSource,
    model: Model,
    config: configuration.Config,
    weights: Sequence[Weight],
    trial: _Trial | None,
    calibration: Any,
    max_memory: str | float | None,
    threads: int | None,
) -> Calibrated:
    from onnxprune.layerwise import Calibrated
    from onnxprune.runtime.feeds import load_data
    from onnxprune.runtime.session import open_session

    if calibration is None and trial is None:
        raise PruneError(
            "the configuration asks for calibration data (score 'wanda'); pass some hundred inputs as data or, where "
            "those are for evaluation only, as calibration (--data, --calibration); labels are not needed"
        )
    if calibration is None:
        assert trial is not None
        dataset = trial.dataset
    else:
        session = trial.dense if trial is not None else open_session(source, threads=threads)
        dataset = load_data(calibration, session.inputs)
    if not config.coupled:  # else the weights that read channels lose entries, too
        weights = [weight for _, chosen in config.assign(weights) for weight in chosen]
    return Calibrated.of(model, weights, dataset, max_memory, threads)


def _plan(model: Model, shapes: Mapping[str, Sequence[int]] | None, inexact: bool) -> Plan:
    from onnxprune.structure.plan import Plan  # scipy takes a while to import

    return Plan.of(model, shapes, inexact=inexact)


@dataclass(frozen=True, eq=False)
class _Trial:
    """The dense model on the user's data: what a pruned one is held against. The data are read once."""

    source: ModelSource
    dense: Session
    dataset: Dataset
    metric: Any
    threads: int | None

    @classmethod
    def of(cls, source: ModelSource, data: Any, metric: Any, threads: int | None) -> _Trial:
        from onnxprune.runtime.feeds import load_data
        from onnxprune.runtime.session import open_session

        dense = open_session(source, threads=threads)
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
        given = {"metric": self.metric, "threads": self.threads, **options}
        return measure(self.source, self.dataset, config, self.dense, levels=levels, **given)


@dataclass(frozen=True, eq=False)
class Lowered:
    """A lowered model.

    Attributes:
        model: the model; the one given where no layer gains.
        report: layer by layer.
        path: the file written, or None.
    """

    model: Model = field(repr=False)
    report: Lowering
    path: Path | None = None

    def to_proto(self) -> onnx.ModelProto:
        """The model as one protobuf, external data loaded."""
        return self.model.to_proto()


def lower(
    model: ModelSource,
    output: str | os.PathLike[str] | None = None,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    threads: int = 1,
    timing: bool = True,
    latency_table: str | os.PathLike[str] | None = None,
    verify: bool = True,
    force: bool = False,
) -> Lowered:
    """Write the layers of a model whose zeros leave groups of outputs with inputs of their own as smaller operators.

    Args:
        model: a path, an onnx.ModelProto or an onnx_ir.Model, pruned with the pattern 'grouped', or with zeros that
            have it; it is not changed.
        output: the file to write.
        shapes: sizes of inputs with open dims: what layers are timed at.
        threads: of onnxruntime, when timing.
        timing: False: take what a static model says is faster, and do not time.
        latency_table: a JSON file of times. Where it exists they are taken from it, and nothing is timed here; else
            it is written.
        verify: False: do not hold the lowered model against the one given in onnxruntime.
        force: allow output over the input.

    Raises:
        PruneError: bad input, or the outputs differ; nothing has been written.
    """
    from onnxprune.lowering.latency import Latencies
    from onnxprune.lowering.lower import lowered

    source = load(model)
    target = None if output is None else Path(output)
    if target is not None:
        check_target(source, target, force)
    found, report = lowered(source, shapes, Latencies.open(threads, latency_table, timing), verify)
    if target is None:
        return Lowered(found, report)
    with found.stage(target) as staged:
        return Lowered(found, report, staged.commit())


PACKED = 1 << 24
"""Up to so many entries, masks are kept in memory, whatever becomes of the model's file."""


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


def note(model: Model, config: configuration.Config, report: Report, clock: Clock) -> None:
    """Record in the model's metadata_props what was done to it (at most 2 KB)."""
    record: dict[str, Any] = {"version": __version__, "pruner": config.pruner, "config_list": config.source}
    record |= {"sparsity": round(report.sparsity, 6), "zeros": report.zeros, "weights": len(report.rows)}
    record |= {key: value for key, value in asdict(clock).items() if value is not None}
    if len(json.dumps(record, default=list)) > 2000:
        record["config_list"] = f"{len(config.source)} entries"
    for entry in [p for p in model.proto.metadata_props if p.key == "onnxprune"]:
        model.proto.metadata_props.remove(entry)
    model.proto.metadata_props.add(key="onnxprune", value=json.dumps(record, default=list, sort_keys=True))


def _row(decision: Decision) -> Row:
    weight, cut = decision.weight, decision.cut
    if cut is None:
        return row(weight, decision.kept())
    return Row(weight.name, weight.op_type, weight.shape, weight.size, cut.zeros, cut.zeros_after)


def row(weight: Weight, keep: np.ndarray) -> Row:
    """One weight of a report: zeros before its mask, and after."""
    zero = weight.values() == 0
    before = int(np.count_nonzero(zero))
    zero |= ~weight.role(keep)
    return Row(weight.name, weight.op_type, weight.shape, weight.size, before, int(np.count_nonzero(zero)))


def check_target(model: Model, target: Path, force: bool) -> None:
    """Refuse a target that is a folder, or the model itself unless forced."""
    with writing(target):
        same = model.path is not None and target.exists() and os.path.samefile(model.path, target)
        folder = target.is_dir()
    if same and not force:
        raise PruneError(
            f"the output '{target}' is the input itself; choose another name, or --force (force=True) to replace it"
        )
    if folder:
        raise PruneError(f"the output '{target}' is a folder; give the name of a file in it")


__all__ = [
    "AGPPruner",
    "LevelPruner",
    "Lowered",
    "Masks",
    "Pruner",
    "Report",
    "Result",
    "Row",
    "SensitivityPruner",
    "lower",
    "prune",
]
