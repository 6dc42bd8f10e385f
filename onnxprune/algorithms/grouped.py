"""Grouped inputs: the outputs of a weight are taken in groups, and each group keeps inputs of its own.

All groups lose equally many inputs, so that what is left is one smaller grouped operator behind a Gather: a pattern
that a stock runtime turns into speed (`onnxprune.lowering`). CondenseNet (Huang et al. 2018, section 3.1) learns such
convolutions in training. Which outputs share a group is free: those that need the same inputs are put together.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from onnxprune.algorithms.patterns import Pattern, Shape, Units
from onnxprune.algorithms.scores import in_units

BLOCK = 16
"""Inputs that go together: what the kernels of convolutions take at once."""

STEPS = 4
"""A weight of few inputs has smaller blocks, so that there are at least so many."""

FEWEST = 8
"""Inputs a weight must have: below, there is little to choose from, and nothing to gain."""

SPATIAL, POINTWISE = 128, 256
"""Outputs of a group where none are named. A group pays for the inputs it gathers: a kernel of several positions uses
them more than once. Half as many keep more of the norm at one sparsity, and less accuracy at one latency."""

FEW = 256
"""Inputs below which a 1x1 convolution is one group: moving its outputs would take longer than it does itself."""

ROUNDS = 12
"""Of putting outputs into other groups, at most."""

SETTLED = 1.002
"""How much better a round has to be for another one to follow."""

MOVED = 1.03
"""How many times as much groups of scattered outputs have to cover as neighbours do: putting outputs back may take a
Gather, and where the needs are random it buys nothing."""


def grouped(size: int | None = None, parts: int = 1, joint: bool = False) -> Pattern:
    """Groups of `size` outputs, each with inputs of its own, all groups equally many.

    A unit is the weakest block of inputs that every group still has, in all groups at once; its score is the mean
    |score| of its entries. So what goes at one sparsity goes at every higher one, too.

    Args:
        size: outputs of a group; by the weight's shape unless given.
        parts: how many equal runs of outputs read inputs that are not each other's (a convolution's own groups).
        joint: whether all outputs keep the same inputs.
    """

    def outputs(shape: Shape) -> int:
        """Of one group."""
        return shape[0] if joint else choose(shape, parts) if size is None else size

    def units(scores: np.ndarray, held: np.ndarray | None) -> Units:
        profile, unit = _profile(scores)
        gone = None if held is None else np.asarray(held.reshape(*held.shape[:2], -1).all(2))
        members, lost = form(profile, outputs(scores.shape), parts, gone)
        totals = np.stack([profile[rows].sum(0) for rows in members])
        if lost is not None:
            totals[lost] = 0
        order = np.argsort(np.where(lost, -1, totals) if lost is not None else totals, axis=1, kind="stable")
        edges = blocks(scores.shape[1])
        widths = np.diff(edges)
        entries = scores.size // scores.shape[1]
        weakest = np.take_along_axis(totals, order, 1).sum(0)
        means = np.add.reduceat(weakest, edges[:-1]) * unit / (widths * entries)
        means[-1] = np.inf
        places = np.empty(scores.shape[:2], np.int64)
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.repeat(np.arange(widths.size), widths)[None, :], 1)
        places[members] = rank[:, None, :]
        sizes = widths * entries
        whole_blocks = bool((sizes == sizes[0]).all())
        earlier = None if lost is None else edges[1:] <= np.count_nonzero(lost[0])
        return Units(means, int(sizes[0]) if whole_blocks else sizes, earlier, scores.shape, places)

    def entries(removed: np.ndarray, units: Units) -> np.ndarray:
        assert units.places is not None
        gone = removed[units.places].reshape(*units.places.shape, *[1] * (len(units.shape) - 2))
        spread: np.ndarray = np.broadcast_to(gone, units.shape).copy()
        return spread

    def misfit(shape: Shape) -> str:
        if shape[1] < FEWEST:
            return f"each of its outputs reads {shape[1]} inputs, fewer than {FEWEST}"
        each = shape[0] if joint else shape[0] // parts
        if each % outputs(shape):
            where = "" if parts == 1 or joint else f" in each of its {parts} groups"
            return f"its {each} outputs{where} are no multiple of {outputs(shape)}"
        return ""

    name = "grouped" if size is None else f"grouped:{size}"
    return Pattern(name, units, entries, misfit, fitted=partial(grouped, size))


def choose(shape: Shape, parts: int = 1) -> int:
    """Outputs of a group for a weight of some shape: near `SPATIAL` or `POINTWISE`, a multiple of 16 where one fits."""
    each = shape[0] // parts
    pointwise = math.prod(shape[2:]) == 1
    if pointwise and len(shape) > 2 and shape[1] < FEW:
        return each
    target = POINTWISE if pointwise else SPATIAL
    divisors = [d for d in range(1, each + 1) if each % d == 0]
    best = max(math.gcd(d, BLOCK) for d in divisors if d >= min(each, target / 2))
    return min((abs(math.log(d / target)), -d) for d in divisors if math.gcd(d, BLOCK) == best)[1] * -1


def blocks(inputs: int) -> np.ndarray:
    """Where blocks of inputs begin and end, the weakest first: of `BLOCK`, or of as many as leave `STEPS` of them.

    The first one is smaller where they do not divide the inputs: what stays is whole blocks.
    """
    block = min(BLOCK, 1 << (inputs // STEPS).bit_length() - 1)
    edges = np.arange(inputs % block, inputs + 1, block)
    return edges if edges[0] == 0 else np.concatenate([[0], edges])


def form(
    profile: np.ndarray, size: int, parts: int = 1, gone: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Put outputs into groups.

    Args:
        profile: (outputs, inputs) how much each output needs each input: whole numbers, as float64.
        size: outputs of a group.
        parts: equal runs of outputs that share no group.
        gone: (outputs, inputs) what was removed earlier, or None. Where it has the pattern, its groups stay.

    Returns:
        (groups, size) outputs of each group; and (groups, inputs) the inputs it has lost earlier, or None.
    """
    runs = np.arange(profile.shape[0]).reshape(parts, -1)
    if gone is not None and gone.any():
        sets = [rows for run in runs for rows in _alike(gone, run)]
        if all(rows.size % size == 0 for rows in sets) and len({int(gone[rows[0]].sum()) for rows in sets}) == 1:
            members = np.concatenate([rows[cluster(profile[rows], size)] for rows in sets])
            return members, gone[members[:, 0]]
    return np.concatenate([run[cluster(profile[run], size)] for run in runs]), None


def cluster(profile: np.ndarray, size: int) -> np.ndarray:
    """Groups of equal size whose members need the same inputs: k-means with supports for means.

    A group's support is the quarter of the inputs that its members need most together; an output belongs where the
    support covers most of its needs. All sums are of whole numbers, so that every machine finds the same groups.

    Args:
        profile: (outputs, inputs), whole numbers.
        size: outputs of a group; divides their number.

    Returns:
        (groups, size) indices, ascending in each group; groups by their first.
    """
    count = profile.shape[0] // size
    best = np.arange(profile.shape[0]).reshape(count, size)
    if count == 1:
        return best
    keep = max(1, profile.shape[1] // STEPS)
    bits = 24 - max(profile.shape[1], size).bit_length()  # sums fit the 24 bits of a float32
    needs = in_units(profile, bits)[0].astype(np.float32)
    most = 0.0
    for members in (best, _assign(needs @ _top(needs[_seeds(needs, count, keep)], keep).T, size)):
        before = -1.0
        for _ in range(ROUNDS):
            totals = _member(members, needs.shape[0]) @ needs
            support = _top(totals, keep)
            covered = float((totals * support).sum(dtype=np.float64))
            if not most:
                most = covered * MOVED
            elif covered > most:
                best, most = members, covered
            if covered <= before * SETTLED:
                break
            before, members = covered, _assign(needs @ support.T, size)
    best = np.sort(best, axis=1)
    return best[np.argsort(best[:, 0], kind="stable")]


def _profile(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """(outputs, inputs) sums of |score| over the kernel as whole multiples of a unit: no sum of them is rounded."""
    profile, unit = in_units(np.abs(scores), 52 - int(scores.size).bit_length())
    return profile.reshape(*scores.shape[:2], -1).sum(2), unit


def _alike(gone: np.ndarray, rows: np.ndarray) -> list[np.ndarray]:
    """Rows in sets of equal content."""
    _, which = np.unique(np.packbits(gone[rows], axis=1), axis=0, return_inverse=True)
    which = which.reshape(-1)
    return [rows[which == label] for label in range(int(which.max()) + 1)]


def _top(totals: np.ndarray, keep: int) -> np.ndarray:
    """1.0 for the `keep` largest of each row, the earlier one on ties."""
    order = np.argsort(-totals, axis=1, kind="stable")[:, :keep]
    chosen = np.zeros(totals.shape, totals.dtype)
    np.put_along_axis(chosen, order, 1.0, 1)
    return chosen


def _member(members: np.ndarray, outputs: int) -> np.ndarray:
    """(groups, outputs) 1.0 where an output is in a group."""
    inside = np.zeros((members.shape[0], outputs), np.float32)
    np.put_along_axis(inside, members, 1.0, 1)
    return inside


def _seeds(profile: np.ndarray, count: int, keep: int) -> np.ndarray:
    """Outputs to start groups from: each is the one that the supports of those before serve worst."""
    own = -np.partition(-profile, keep - 1, axis=1)[:, :keep].sum(1)
    seeds = [int(np.argmax(own))]
    served = np.zeros(own.size, own.dtype)
    while len(seeds) < count:
        served = np.maximum(served, profile @ _top(profile[seeds[-1:]], keep)[0])
        missed = own - served
        missed[seeds] = -1
        seeds.append(int(np.argmax(missed)))
    return np.array(seeds)


def _assign(gain: np.ndarray, size: int) -> np.ndarray:
    """Every output to a group, equally many to each: those that lose most elsewhere choose first."""
    wishes = np.argsort(-gain, axis=1, kind="stable")
    ranked = np.take_along_axis(gain, wishes, 1)
    room = [size] * gain.shape[1]
    members: list[list[int]] = [[] for _ in room]
    for output in np.argsort(ranked[:, 1] - ranked[:, 0], kind="stable").tolist():
        group = next(g for g in wishes[output].tolist() if room[g])
        room[group] -= 1
        members[group].append(output)
    return np.sort(np.array(members), axis=1)
