"""Which channels go: scores of channels, and how many of each group are left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from onnxprune import progress
from onnxprune.algorithms import patterns
from onnxprune.algorithms.allocate import ALLOCATIONS, given
from onnxprune.algorithms.patterns import Units
from onnxprune.algorithms.pruner import Clock, target
from onnxprune.algorithms.scores import BN_SCALE, CALIBRATED, CHANNEL_SCORES, l1
from onnxprune.config import Config
from onnxprune.graph.weights import Skipped, Weight, check_finite
from onnxprune.structure.coupling import Coupling, Group, Member

LEAST = 0.1
"""Share of a group's channels that always stays (and one at least)."""


@dataclass(frozen=True)
class GroupRow:
    """One group of a report: its first weight, its channels, how many stay, and how many rows of a weight each has."""

    name: str
    size: int
    kept: int
    width: int
    heads: bool


def decide(
    config: Config,
    coupling: Coupling,
    clock: Clock,
    held: Mapping[str, np.ndarray] | None = None,
    align: int | None = None,
    norms: Mapping[str, np.ndarray] | None = None,
    shares: Mapping[str, float] | None = None,
) -> tuple[dict[str, np.ndarray], list[Skipped]]:
    """Which channels go, at one point in time.

    A group is governed by the entry of the weight it is named after. All weights that produce its channels have to be
    governed by entries with the pattern; where they ask for different sparsities, the lowest counts.

    Args:
        config: the validated configuration.
        coupling: the groups of the model.
        clock: where in its schedule each entry is.
        held: masks from earlier (True is kept, stored shape); channels they removed stay removed.
        align: counts are rounded to multiples of it; `lanes()` unless given.
        norms: for scores from calibration data, the norms of each weight's inputs in role order.
        shares: for the allocation 'sensitivity', the share of each group's channels (0 where it has none).

    Returns:
        Group name -> boolean array, True where the channel goes; and the weights that cannot be pruned, with reasons.

    Raises:
        PruneError: an entry matches nothing; a weight is not finite.
    """
    align = lanes() if align is None else align
    governed = {w.name: i for i, chosen in config.assign(coupling.weights) for w in chosen}
    patterns_ = [patterns.parse(entry.pattern) for entry in config.entries]
    coupled = {name: i for name, i in governed.items() if patterns_[i].coupled}
    skipped: dict[str, Skipped] = {}
    chosen: dict[int, list[tuple[Group, float]]] = {}
    for group in coupling.groups:
        producers = [member.name for member in group.producers]
        index = coupled.get(producers[0])
        if index is None:
            continue
        if patterns_[index].name == "head" and not group.heads:
            continue
        outside = next((name for name in producers if name not in coupled), None)
        if outside is not None:
            reason = f"its channels are those of '{outside}', which the configuration leaves out"
            skipped[producers[0]] = Skipped(producers[0], coupling.by_name[producers[0]].op_type, reason)
            continue
        unread = [name for name in producers if name not in (norms or {})]
        if config.entries[index].score in CALIBRATED and unread:
            if unread[0] != producers[0]:  # else the caller knows why
                reason = f"its channels are those of '{unread[0]}', whose inputs cannot be read"
                skipped[producers[0]] = Skipped(producers[0], coupling.by_name[producers[0]].op_type, reason)
            continue
        asked = [target(config.entries[coupled[name]], clock) for name in producers]
        chosen.setdefault(index, []).append((group, min(0.0 if share is None else share for share in asked)))
    for pinned in coupling.pinned:
        if pinned.name in coupled:
            skipped.setdefault(pinned.name, Skipped(pinned.name, pinned.op_type, pinned.reason))
    removed: dict[str, np.ndarray] = {}
    scored: dict[str, Units] = {}
    work = [(group, config.entries[index].score) for index, groups in chosen.items() for group, _ in groups]
    with progress.task("scoring channels", sum(_bytes(coupling, group) for group, _ in work)) as advance:
        for group, score in work:
            scored[group.name] = units(coupling, group, score, _held(group, held or {}), norms)
            advance(_bytes(coupling, group))
    for index, groups in chosen.items():
        entry = config.entries[index]
        for share in sorted({share for _, share in groups}):
            part = [group for group, wanted in groups if wanted == share]
            made = [scored[group.name] for group in part]
            allocation = ALLOCATIONS[entry.allocation]
            if entry.allocation == "sensitivity" and shares is not None:
                allocation = given([shares.get(group.name, 0.0) for group in part])
            for group, unit, gone in zip(part, made, allocation(made, share), strict=True):
                removed[group.name] = rounded(group, gone, unit.scores, align, unit.held)
    return removed, list(skipped.values())


def rows(coupling: Coupling, removed: Mapping[str, np.ndarray]) -> tuple[GroupRow, ...]:
    """What was decided, group by group."""
    return tuple(
        GroupRow(g.name, g.size, g.size - int(removed[g.name].sum()), g.width, g.heads)
        for g in coupling.groups
        if g.name in removed
    )


def _held(group: Group, held: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """The channels all of whose rows were removed earlier, in every weight that produces them."""
    gone = np.ones(group.size, np.bool_)
    for member in group.producers:
        mask = held.get(member.name)
        if mask is None:
            return None
        lines = np.moveaxis(mask, member.axis, 0).reshape(mask.shape[member.axis], -1)
        gone &= ~lines[member.places].any((1, 2))
    return gone


def scores(coupling: Coupling, group: Group, score: str, norms: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """A score for each channel of a group: the mean over the weights whose outputs it is.

    With a score from calibration data, the mean of the scores of its entries.

    With `bn_scale`, over the scales of the BatchNorms it passes; a group that passes none is scored by L1.
    """
    if score == BN_SCALE:
        scales = _bn_scales(coupling)
        tensors = {str(v.name): v.const_value for g in coupling.model.graph.graphs() for v in g.initializers.values()}
        found = [m for m in group.members if m.name in scales]
        if found:
            arrays = [coupling.model.current(tensors[m.name]).astype(np.float64) for m in found]  # type: ignore[arg-type]
            values = [np.abs(array)[m.places].mean(1) for m, array in zip(found, arrays, strict=True)]
            total: np.ndarray = np.mean(values, axis=0)
            return total
        score = "l1"
    parts = []
    for member in group.producers:
        weight = coupling.by_name[member.name]
        entries = weight.values()
        check_finite(weight, entries)
        if score in CALIBRATED:
            entries = CALIBRATED[score](entries, (norms or {})[member.name])
        per_output = CHANNEL_SCORES.get(score, l1)(entries.reshape(entries.shape[0], -1))
        places = _outputs(weight.role(_positions(weight.shape, member.axis)), weight.shape[member.axis])
        per_place = np.bincount(places, per_output, weight.shape[member.axis]) / np.maximum(
            np.bincount(places, minlength=weight.shape[member.axis]), 1
        )
        parts.append(per_place[member.places].mean(1))
    result: np.ndarray = np.mean(parts, axis=0)
    return result


def units(
    coupling: Coupling,
    group: Group,
    score: str,
    held: np.ndarray | None,
    norms: Mapping[str, np.ndarray] | None = None,
) -> Units:
    """The channels of a group as units of an allocation; a unit's size is the entries its producers lose."""
    entries = 0
    for member in group.producers:
        weight = coupling.by_name[member.name]
        entries += _lost(weight, member)
    entries = max(entries, 1)  # channels that nobody reads go like others
    return Units(scores(coupling, group, score, norms), entries, held, (group.size, entries))


def _bytes(coupling: Coupling, group: Group) -> int:
    """Of the weights that produce the channels of a group."""
    weights = [coupling.by_name[member.name] for member in group.producers]
    return sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in weights)


def _lost(weight: Weight, member: Member) -> int:
    """How many entries a weight loses with one channel."""
    size = weight.shape[member.axis]
    if weight.size == math.prod(weight.shape):
        return weight.size * int(member.places.shape[1]) // size
    read = weight.role(_positions(weight.shape, member.axis)).reshape(-1)  # the rest is another operator's, or nobody's
    return int(np.bincount(read, minlength=size)[member.places].sum(1).max(initial=0))


def rounded(group: Group, removed: np.ndarray, score: np.ndarray, align: int, held: np.ndarray | None) -> np.ndarray:
    """A decision made fit: enough channels stay, and their number suits the kernels.

    Args:
        group: the group.
        removed: channels an allocation chose.
        score: of each channel.
        align: positions that kernels take at once; counts are rounded down to a multiple, so that there is never more
            work than asked. Where too few would stay, to a multiple of half as many, and so on.
        held: channels that went earlier.
    """
    least = max(1, math.ceil(LEAST * group.size))
    wanted = max(group.size - int(removed.sum()), least)
    if wanted < group.size:
        step = align if group.width > 1 or not group.heads else 1  # the head's positions lie along another axis
        while step > 1:
            count = wanted * group.width // step * step // group.width
            if count * group.width % step == 0 and count >= least:
                wanted = count
                break
            step //= 2
    order = np.lexsort((np.arange(group.size), score, np.ones(group.size) if held is None else ~held))
    result = np.zeros(group.size, np.bool_)
    result[order[: group.size - wanted]] = True
    return result


@lru_cache(maxsize=1)
def lanes() -> int:
    """float32 values in one vector register of this machine: 16 with AVX-512, else 8."""
    core = getattr(np, "_core", None) or np.core
    return 16 if core._multiarray_umath.__cpu_features__.get("AVX512F") else 8


def _positions(shape: Sequence[int], axis: int) -> np.ndarray:
    line = [1] * len(shape)
    line[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis], dtype=np.int32).reshape(line), shape)


def _outputs(seen: np.ndarray, size: int) -> np.ndarray:
    """For each output in role order, its position on the stored axis."""
    return np.ascontiguousarray(seen.reshape(seen.shape[0], -1)[:, 0] if seen.size else np.arange(size))


def _bn_scales(coupling: Coupling) -> set[str]:
    names: set[str] = set()
    for site in coupling.flow.sites:
        if site.node.op_type == "BatchNormalization":
            names |= coupling.flow.leaves.get(site.node.input[1], frozenset())
    return names
