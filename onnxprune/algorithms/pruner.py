"""Deciding: score, pattern, allocation and schedule put together, entry by entry of a configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxprune.algorithms import cuts, patterns, scores
from onnxprune.algorithms.allocate import ALLOCATIONS, below, erk_counts, given, global_count, uniform_counts
from onnxprune.algorithms.schedules import cubic
from onnxprune.algorithms.select import booleans, side_by_side
from onnxprune.config import AGPEntry, Config, Entry, SensitivityEntry
from onnxprune.errors import PruneError
from onnxprune.graph.values import Values, of
from onnxprune.graph.weights import Skipped, Weight, check_finite


@dataclass(frozen=True)
class Clock:
    """How far training is: the epoch, and the optimizer steps taken. None is the end of every schedule."""

    epoch: int | None = None
    step: int | None = None


def decide(
    config: Config,
    weights: Iterable[Weight],
    clock: Clock | None = None,
    held: Mapping[str, np.ndarray] | None = None,
    factors: Mapping[str, float] | None = None,
    norms: Mapping[str, np.ndarray] | None = None,
    shares: Mapping[str, float] | None = None,
) -> tuple[dict[str, np.ndarray], list[Skipped]]:
    """The masks of all weights a configuration governs, at one point in time.

    Args:
        config: the validated configuration.
        weights: the weights of the model.
        clock: where in its schedule each entry is; the end unless given.
        held: masks from earlier (True is kept, stored shape); what they removed stays removed.
        factors: for the sensitivity pruner, each weight's measured factor in (0, 1]; 1 where it has none.
        norms: for scores from calibration data, the norms of each weight's inputs in role order.
        shares: for the allocation 'sensitivity', the sparsity of each weight (0 where it has none).

    Returns:
        Weight name -> boolean array of the stored shape, True is kept, for each governed weight in the order given
        (patterns that couple weights are left to `structure.channels`); and the weights whose pattern cannot be had.

    Raises:
        PruneError: an entry matches nothing; a weight is not finite; a held mask does not fit; a score needs norms.
    """
    weights = list(weights)
    clock, held, factors = clock or Clock(), held or {}, factors or {}
    if norms is None and config.calibrated:
        raise PruneError(
            "score 'wanda', pruner 'sparsegpt' and 'reconstruct' need calibration data and a graph to run them in: "
            "prune the exported file, onnxprune.prune('model.onnx', ..., data=...)"
        )
    masks: dict[str, np.ndarray] = {}
    fitting, skipped = _fitting(config, weights, norms or {})
    for entry, chosen in fitting:

        def several(part: list[Governed], entry: Entry = entry) -> dict[str, np.ndarray]:
            kept = _decide_entry(entry, part, clock, held, factors, norms or {}, shares)
            return {weight.name: keep for (weight, _), keep in zip(part, kept, strict=True)}

        for found in side_by_side(several, _parts(entry, chosen), size=sum(weight.size for weight, _ in chosen)):
            masks |= found
    return {w.name: masks[w.name] for w in weights if w.name in masks}, skipped


def _parts(entry: Entry, chosen: list[Governed]) -> list[list[Governed]]:
    """The weights that have to be decided together: each on its own where none has to do with another."""
    alone = entry.allocation == "uniform" and not isinstance(entry, SensitivityEntry)
    return [[governed] for governed in chosen] if alone else [chosen]


@dataclass(frozen=True, eq=False)
class Decision:
    """What goes of a weight.

    Attributes:
        weight: the weight.
        cut: the entries that go, where that can be said so.
        values: of the weight, where there is a cut.
        bits: otherwise the mask (True is kept, stored shape), packed.
    """

    weight: Weight
    cut: cuts.Cut | None = None
    values: Values | None = None
    bits: np.ndarray | None = None

    @property
    def streamed(self) -> bool:
        """Whether it takes no memory: the mask can be worked out again from the weight's file."""
        return self.values is not None and self.values.in_file

    def kept(self) -> np.ndarray:
        """The mask: a boolean array of the stored shape, True is kept."""
        weight = self.weight
        if self.cut is None or self.values is None:
            assert self.bits is not None
            return np.unpackbits(self.bits, count=math.prod(weight.shape)).view(np.bool_).reshape(weight.shape)
        return cuts.kept(self.cut, self.values, weight)


def decisions(
    config: Config,
    weights: Iterable[Weight],
    clock: Clock | None = None,
    held: Mapping[str, np.ndarray] | None = None,
    factors: Mapping[str, float] | None = None,
    norms: Mapping[str, np.ndarray] | None = None,
    shares: Mapping[str, float] | None = None,
) -> tuple[dict[str, Decision], list[Skipped]]:
    """`decide` for models that need not fit into memory: the same masks, said in less room where possible."""
    weights = list(weights)
    clock, held, factors = clock or Clock(), held or {}, factors or {}
    found: dict[str, Decision] = {}
    fitting, skipped = _fitting(config, weights, norms or {})
    for entry, chosen in fitting:
        share = target(entry, clock)
        unstructured = all(pattern is patterns.UNSTRUCTURED for _, pattern in chosen)
        plain = unstructured and entry.score == "magnitude" and entry.allocation in COUNTS
        free = held.keys().isdisjoint(weight.name for weight, _ in chosen)
        if plain and free and share is not None and chosen and not isinstance(entry, SensitivityEntry):
            found |= _cut_entry(entry, [weight for weight, _ in chosen], share)
            continue
        for part in _parts(entry, chosen):
            kept = _decide_entry(entry, part, clock, held, factors, norms or {}, shares)
            for (weight, _), keep in zip(part, kept, strict=True):
                found[weight.name] = Decision(weight, bits=np.packbits(keep))
    return {w.name: found[w.name] for w in weights if w.name in found}, skipped


COUNTS: dict[str, Callable[..., int | list[int]]] = {
    "uniform": uniform_counts,
    "erk": erk_counts,
    "global": global_count,
}
"""Allocations that need to know no more than the weights' shapes."""


def _cut_entry(entry: Entry, weights: list[Weight], share: float) -> dict[str, Decision]:
    """The decisions about the weights one entry governs, as cuts."""
    values = [of(weight) for weight in weights]
    counts: int | list[int] = COUNTS[entry.allocation]([v.shape for v in values], share)
    try:
        found = cuts.cuts(values, counts) if isinstance(counts, int) else cuts.each(values, counts)
    except cuts.NotFinite as error:
        check_finite(weights[error.index], weights[error.index].values())
        raise
    return {w.name: Decision(w, cut, v) for w, cut, v in zip(weights, found, values, strict=True)}


Governed = tuple[Weight, patterns.Pattern]
"""A weight and the pattern that an entry asks of it, made to fit."""


def _fitting(
    config: Config, weights: list[Weight], norms: Mapping[str, np.ndarray]
) -> tuple[list[tuple[Entry, list[Governed]]], list[Skipped]]:
    """The entries whose pattern does not couple weights, each with the weights it governs; and what does not fit.

    Weights whose score needs norms that there are none of are in neither.
    """
    found = []
    skipped: list[Skipped] = []
    for index, chosen in config.assign(weights):
        entry = config.entries[index]
        pattern = patterns.parse(entry.pattern)
        if pattern.coupled:
            continue
        fitting = []
        for weight in chosen:
            if entry.score in scores.CALIBRATED and weight.name not in norms:
                continue  # the caller knows why
            own = pattern if pattern.fitted is None else pattern.fitted(weight.parts, weight.joint)
            reason = own.misfit(weight.role_shape)
            if reason:
                skipped.append(Skipped(weight.name, weight.op_type, f"pattern {pattern.name} does not fit: {reason}"))
            else:
                fitting.append((weight, own))
        found.append((entry, fitting))
    return found, skipped


def target(entry: Entry, clock: Clock) -> float | None:
    """The sparsity an entry asks for at a point in time; None where nothing is pruned yet."""
    final = entry.final()
    if isinstance(entry, (AGPEntry, SensitivityEntry)) and final is not None:
        time = clock.epoch if entry.counts == "epoch" else clock.step
        start, end = entry.span
        return cubic(entry.initial_sparsity, final, start, end, entry.frequency)(float("inf") if time is None else time)
    return final


def _decide_entry(
    entry: Entry,
    weights: list[Governed],
    clock: Clock,
    held: Mapping[str, np.ndarray],
    factors: Mapping[str, float],
    norms: Mapping[str, np.ndarray],
    shares: Mapping[str, float] | None,
) -> list[np.ndarray]:
    """The masks of the weights one entry governs, each with its pattern."""
    share = target(entry, clock)
    allocation = ALLOCATIONS[entry.allocation]
    if entry.allocation == "sensitivity" and shares is not None:
        allocation = given([shares.get(weight.name, 0.0) for weight, _ in weights])
    if isinstance(entry, SensitivityEntry) and entry.quality is not None:
        allocation, share = below(entry.quality), 0.0
    units = []
    earlier = _held([weight for weight, _ in weights], held)
    for weight, pattern in weights:
        values = weight.values()
        check_finite(weight, values)
        if entry.score in scores.CALIBRATED:
            score_of = scores.CALIBRATED[entry.score]
            made = pattern.units(score_of(values, norms[weight.name]), earlier.get(weight.name))
            units.append(made if made.places is not None else patterns.per_output(made))
            continue
        relative = isinstance(entry, SensitivityEntry)
        score = scores.relative(factors.get(weight.name, 1.0)) if relative else scores.SCORES[entry.score]
        units.append(pattern.units(score(values), earlier.get(weight.name)))
    if share is None:  # before the first update, what was pruned earlier stays pruned
        removed = [np.zeros(u.scores.shape, np.bool_) if u.held is None else u.held for u in units]
    else:
        removed = allocation(units, share) if units else []

    def keep(governed: Governed, unit: patterns.Units, gone: np.ndarray) -> np.ndarray:
        weight, pattern = governed
        entries = pattern.entries(gone, unit)
        return weight.stored(np.logical_not(entries, out=entries if entries is gone else None))

    return side_by_side(keep, weights, units, removed, size=sum(weight.size for weight, _ in weights))


def _held(weights: Iterable[Weight], held: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What masks of earlier (True is kept) removed of the weights that have one, in role order."""
    kept = {}
    for weight in weights:
        if weight.name in held:
            mask = held[weight.name]
            if mask.shape != weight.shape:
                raise PruneError(
                    f"the mask held for weight '{weight.name}' has the shape {list(mask.shape)}, the weight "
                    f"{list(weight.shape)}: it belongs to another model; use a new pruner"
                )
            kept[weight.name] = weight.role(mask)
    masks = list(kept.values())
    gone = side_by_side(np.logical_not, masks, booleans(masks), size=sum(mask.size for mask in masks))
    return dict(zip(kept, gone, strict=True))
