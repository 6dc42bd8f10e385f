"""One weight or group of channels pruned, everything else dense: what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxprune import config as configuration
from onnxprune.algorithms import allocate
from onnxprune.algorithms.patterns import parse
from onnxprune.algorithms.pruner import decide
from onnxprune.algorithms.scores import CALIBRATED
from onnxprune.graph.model import Model, load
from onnxprune.graph.weights import Skipped, find
from onnxprune.inspection import inspect
from onnxprune.runtime.feeds import Dataset
from onnxprune.runtime.paired import Paired
from onnxprune.runtime.session import Session, open_session

if TYPE_CHECKING:
    from onnxprune.structure.plan import Plan

RELATIVE = 0.2
"""A loss known to this share of itself is known well enough."""


@dataclass(frozen=True)
class Point:
    """One weight or group at one level, everything else dense.

    Attributes:
        level: sparsity asked for.
        entries: entries of weights that go (of a group, those of the weights that produce its channels).
        loss: fall of the metric or, without labels, of the agreement with the dense model from 1.
        low: lower end of the loss's interval; of all samples, where they were all needed, the loss itself is exact.
        high: its upper end.
        samples: how many were evaluated.
        difference: largest absolute difference of any output element from the dense model's; None is infinite.
        error: squared differences of the outputs as a share of the dense ones' squares; None where they are no floats.
        macs: multiply-accumulates saved; None where not known.
        latency: share of the dense model's latency saved, measured; None where that was not asked for.
    """

    level: float
    entries: int
    loss: float
    low: float
    high: float
    samples: int
    difference: float | None
    error: float | None = None
    macs: int | None = None
    latency: float | None = None


@dataclass(frozen=True, eq=False)
class Shared:
    """What all measurements share; goes to other processes.

    Attributes:
        model: the file's bytes; a path where its data lie in other files.
        dataset: in random order.
        config: whose first entry says what is measured.
        metric: by name; None where none is needed or it is the user's own.
        threads: of onnxruntime.
        precision: of the loss.
        shapes: sizes of open dims.
        norms: of each weight's inputs, where the score needs them.
    """

    model: np.ndarray | str
    dataset: Dataset
    config: configuration.Config
    metric: str | None
    threads: int | None
    precision: float
    shapes: dict[str, tuple[int, ...]] | None
    norms: dict[str, np.ndarray] | None = None


class Probe:
    """One model and its data, ready to measure any of its weights or groups."""

    def __init__(self, shared: Shared, model: Model, plan: Plan | None) -> None:
        self.shared = shared
        self.model = model
        self.plan = plan
        self.entry = shared.config.entries[0]
        known = find(model) if plan is None else (plan.coupling.weights, plan.coupling.skipped)
        self.weights, untouched = list(known[0]), known[1]
        dense = open_session(model_of(shared.model), threads=shared.threads)
        self.paired = Paired(dense, shared.dataset, shared.metric)
        self.items: dict[str, tuple[str, int]] = {}
        self._inspected = _macs(model_of(shared.model), shared.shapes)
        self.macs = None if self._inspected is None else self._inspected[0]
        governed = [w for index, chosen in shared.config.assign(self.weights) for w in chosen if index == 0]
        self.skipped = tuple(self._find(governed)) + tuple(untouched)

    @classmethod
    def of(cls, shared: Shared) -> Probe:
        """Load the model and find what can be measured in it."""
        model = load(model_of(shared.model))
        plan = None
        if shared.config.coupled:
            from onnxprune.structure.plan import Plan

            plan = Plan.of(model, shared.shapes, inexact=shared.config.inexact)
        return cls(shared, model, plan)

    def _find(self, governed: list[Any]) -> Iterator[Skipped]:
        pattern = parse(self.entry.pattern)
        for name in sorted(unread := self._unread({weight.name for weight in governed})):
            yield Skipped(name, self._type(name), f"score {self.entry.score}: its inputs cannot be read")
        if self.plan is None:
            for weight in governed:
                if weight.name in unread:
                    continue
                own = pattern if pattern.fitted is None else pattern.fitted(weight.parts, weight.joint)
                if reason := own.misfit(weight.role_shape):
                    yield Skipped(weight.name, weight.op_type, f"pattern {pattern.name} does not fit: {reason}")
                else:
                    self.items[weight.name] = (weight.op_type, weight.size)
            return
        from onnxprune.structure import channels

        names = {weight.name for weight in governed}
        coupling = self.plan.coupling
        for group in coupling.groups:
            if unread & {m.name for m in group.producers}:
                continue
            if {m.name for m in group.producers} <= names and (group.heads or pattern.name != "head"):
                units = channels.units(coupling, group, self.entry.score, None, self.shared.norms)
                self.items[group.name] = (coupling.by_name[group.name].op_type, units.entries)
        for pinned in coupling.pinned:
            if pinned.name in names:
                yield Skipped(pinned.name, pinned.op_type, pinned.reason)

    def _unread(self, names: set[str]) -> set[str]:
        """Weights that a score from calibration data cannot judge."""
        return names - set(self.shared.norms or ()) if self.entry.score in CALIBRATED else set()

    def _type(self, name: str) -> str:
        return next(weight.op_type for weight in self.weights if weight.name == name)

    def candidate(self, item: str, level: float) -> tuple[Model, int, Callable[[], None]]:
        """The model with only this pruned, the entries that went, and what undoes it."""
        if self.plan is not None:
            return self._cut(item, level)
        weight = next(w for w in self.weights if w.name == item)
        entry = {"pattern": self.entry.pattern, "score": self.entry.score, "sparsity": level, "op_names": ["*"]}
        kept = decide(configuration.load([entry]), [weight], norms=self.shared.norms)[0][item]
        tensor = weight.leaf.tensor
        before = self.model.read(tensor)
        self.model.edit(tensor, lambda values: weight.pruned(kept, values))

        def undo() -> None:
            if self.model.edits:
                self.model.edits.clear()
            else:
                self.model.edit(tensor, lambda values: before)

        return self.model, int(np.count_nonzero(~weight.role(kept))), undo

    def _cut(self, item: str, level: float) -> tuple[Model, int, Callable[[], None]]:
        from onnxprune.structure import channels

        assert self.plan is not None
        coupling = self.plan.coupling
        group = next(g for g in coupling.groups if g.name == item)
        units = channels.units(coupling, group, self.entry.score, None, self.shared.norms)
        (gone,) = allocate.uniform([units], level)
        gone = channels.rounded(group, gone, units.scores, 1, None)
        self.plan.removed = {item: gone}
        size = units.sizes if isinstance(units.sizes, int) else 0
        return self.plan.cut(), int(gone.sum()) * size, lambda: None

    def measured(self, item: str, level: float, metric: Any) -> dict[str, Any]:
        """A point, as a JSON record."""
        model, entries, undo = self.candidate(item, level)
        try:
            macs = None
            if self.plan is not None and self.macs is not None:
                with model.stage(None) as staged:
                    after = _macs(staged.path, self.shared.shapes)
                macs = None if after is None else self.macs - after[0]
            elif self._inspected is not None and (own := self._inspected[1].get(item)) is not None:
                macs = round(own * entries / self.items[item][1])
            session = _session(model, self.shared.threads)
        finally:
            undo()
        paired = self.paired if metric is None else replace(self.paired, metric=metric)
        precision = self.shared.precision
        found, half = paired.compare(
            session, lambda loss, half: precision > 0 and half <= max(precision, RELATIVE * loss)
        )
        difference = None if found.agreement is None else found.agreement.largest_difference
        if difference is not None and not math.isfinite(difference):
            difference = None
        error = None if found.agreement is None else found.agreement.error
        low, high = found.loss - half, found.loss + half
        return asdict(Point(level, entries, found.loss, low, high, found.samples, difference, error, macs))


def model_of(content: np.ndarray | str) -> Any:
    """The model that bytes or a path stand for."""
    if isinstance(content, str):
        return content
    return onnx.ModelProto.FromString(content.tobytes())


def _session(model: Model, threads: int | None) -> Session:
    if not model.external_files:
        return open_session(model.proto, threads=threads)
    with model.stage(None) as staged:
        return open_session(staged.path, threads=threads)


def _macs(source: Any, shapes: Mapping[str, Sequence[int]] | None) -> tuple[int, dict[str, int | None]] | None:
    """Multiply-accumulates of a model, and weight by weight; None where they are not all known."""
    found = inspect(source, shapes)
    return (found.macs, {w.name: w.macs for w in found.weights}) if found.macs_complete else None
