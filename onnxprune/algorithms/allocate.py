"""How much from each: spreading one sparsity over several weights.

An allocation takes the units of all weights that an entry of the configuration governs and the share of their
entries to remove, and returns the units to remove. Adding an allocation is one function in ALLOCATIONS.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxprune.algorithms.patterns import Shape, Units
from onnxprune.algorithms.select import MAX_THREADS, THREADED, booleans, lowest
from onnxprune.errors import PruneError

Allocation = Callable[[Sequence[Units], float], list[np.ndarray]]


def uniform(weights: Sequence[Units], sparsity: float) -> list[np.ndarray]:
    """The same share of every weight: int(n * sparsity) entries of each."""
    return _each(weights, uniform_counts([units.shape for units in weights], sparsity))


def uniform_counts(shapes: Sequence[Shape], sparsity: float) -> list[int]:
    """How many entries `uniform` takes from weights of such shapes."""
    return [int(math.prod(shape) * sparsity) for shape in shapes]


def globally(weights: Sequence[Units], sparsity: float) -> list[np.ndarray]:
    """One ranking over all weights: int(N * sparsity) entries of them together."""
    return take(weights, global_count([units.shape for units in weights], sparsity))


def global_count(shapes: Sequence[Shape], sparsity: float) -> int:
    """How many entries `globally` takes from weights of such shapes together."""
    return int(sum(map(math.prod, shapes)) * sparsity)


def erk(weights: Sequence[Units], sparsity: float) -> list[np.ndarray]:
    """Erdős-Rényi-Kernel (Evci et al. 2020, "Rigging the lottery", section 3): small weights stay denser.

    The density of a weight is proportional to (sum of its dimensions) / (product of its dimensions), at most 1;
    int(N * sparsity) entries go in total.
    """
    room = [_removable(units) for units in weights]
    return _each(weights, erk_counts([units.shape for units in weights], sparsity, room))


def erk_counts(shapes: Sequence[Shape], sparsity: float, removable: Sequence[int] | None = None) -> list[int]:
    """How many entries `erk` takes from weights of such shapes, of which so many may go (all, unless given)."""
    sizes = np.array([math.prod(shape) for shape in shapes], np.int64)
    room = sizes if removable is None else np.array(removable, np.int64)
    raw = np.array([sum(shape) / math.prod(shape) if math.prod(shape) else 0.0 for shape in shapes])
    total = int(int(sizes.sum()) * sparsity)

    def removed(scale: float) -> np.ndarray:
        """Entries of each weight that go, as a fraction, when densities are `scale` times the raw ones."""
        return np.clip(sizes * (1 - raw * scale), 0, room)

    dense, sparse = 1 / raw[raw > 0].min(initial=1.0), 0.0
    for _ in range(200):  # bisection: the total falls as the scale rises
        middle = (dense + sparse) / 2
        dense, sparse = (dense, middle) if removed(middle).sum() > total else (middle, sparse)
    return _whole(removed(dense), total, np.asarray(room))


def given(shares: Sequence[float]) -> Allocation:
    """Shares decided elsewhere, one per weight; as many entries go as they come to in total."""

    def allocate(weights: Sequence[Units], sparsity: float) -> list[np.ndarray]:
        room = np.array([_removable(units) for units in weights], np.int64)
        wanted = np.minimum(np.array([units.entries for units in weights]) * np.asarray(shares), room)
        return _each(weights, _whole(wanted, int(wanted.sum() + 1e-6), room))

    return allocate


def sensitivity(weights: Sequence[Units], sparsity: float) -> list[np.ndarray]:
    """At least measured loss: what that comes to is decided before (`curves`), and `given`.

    Raises:
        PruneError: always; nothing has been measured.
    """
    raise PruneError(
        "allocation 'sensitivity' measures on data: give data or calibration (--data, --calibration) to prune a file; "
        "in a training loop use uniform, global or erk"
    )


def least_loss(tables: Sequence[Sequence[tuple[float, float]]], total: float) -> list[float]:
    """How much to save in each of several weights, so that the total is reached at the least predicted loss.

    A table's points (saved, loss) are joined by the lower convex hull of them and (0, 0); losses add up. Of such convex
    functions the least sum is found by always taking the stretch that costs least per unit saved; stretches of equal
    cost give equal shares of themselves. Only one stretch (or several of equal cost) is taken in part.

    Args:
        tables: for each weight its points, in any order; savings of 0 or less are ignored.
        total: the sum of savings to reach.

    Returns:
        The saving in each weight.

    Raises:
        PruneError: the tables do not reach the total.
    """
    stretches = [
        ((loss - loss_before) / (saved - before), index, saved - before)
        for index, table in enumerate(tables)
        for (before, loss_before), (saved, loss) in itertools.pairwise(hull(table))
    ]
    saved = [0.0] * len(tables)
    missing = total
    for _, alike in itertools.groupby(sorted(stretches), key=lambda stretch: round(stretch[0], 15)):
        chosen = list(alike)
        length = sum(size for *_, size in chosen)
        part = min(1.0, max(0.0, missing) / length)
        for _, index, size in chosen:
            saved[index] += part * size
        missing -= part * length
    if missing > 1e-9 * max(1.0, abs(total)):
        raise PruneError(f"{total:.6g} is to be saved, but all weights together can save {total - missing:.6g} at most")
    return saved


def hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of (0, 0) and points (saved, loss), by rising savings.

    A loss below 0 counts as 0, and where saving more loses less, that is what the lesser saving costs too.
    """
    rising: list[tuple[float, float]] = []
    least = math.inf
    for saved, loss in sorted(((s, max(0.0, cost)) for s, cost in points if s > 0), key=lambda p: (-p[0], p[1])):
        if not rising or saved < rising[-1][0]:
            least = min(least, loss)
            rising.append((saved, least))
    lower = [(0.0, 0.0)]
    for point in reversed(rising):
        while len(lower) > 1 and _slope(lower[-2], lower[-1]) >= _slope(lower[-2], point):
            lower.pop()
        lower.append(point)
    return lower


def _slope(left: tuple[float, float], right: tuple[float, float]) -> float:
    return (right[1] - left[1]) / (right[0] - left[0])


def _whole(wanted: np.ndarray, total: int, room: np.ndarray) -> list[int]:
    """Whole numbers of entries: rounded down, and what that leaves over goes by largest remainder."""
    counts = np.floor(wanted).astype(np.int64)
    for index in np.argsort(-(wanted - counts), kind="stable"):
        if counts.sum() < total and counts[index] < room[index]:
            counts[index] += 1
    return [int(count) for count in counts]


def _each(weights: Sequence[Units], budgets: Sequence[int]) -> list[np.ndarray]:
    """`take` from each weight on its own: small weights beside each other, a large one in parallel itself."""
    work = list(zip(weights, budgets, booleans(units.scores for units in weights), strict=True))
    small = [units.scores.size < THREADED for units in weights]
    if sum(u.scores.size for u, s in zip(weights, small, strict=True) if s) < THREADED:
        return [take([units], budget, [out])[0] for units, budget, out in work]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        running = [pool.submit(take, [u], b, [o]) if s else None for (u, b, o), s in zip(work, small, strict=True)]
        return [
            take([units], budget, [out])[0] if run is None else run.result()[0]
            for (units, budget, out), run in zip(work, running, strict=True)
        ]


def _removable(units: Units) -> int:
    """Entries that may go at most: those of units with a finite score."""
    finite = np.isfinite(units.scores)
    return int(finite.sum()) * units.sizes if isinstance(units.sizes, int) else int(units.sizes[finite].sum())


def below(quality: float) -> Allocation:
    """Every unit whose |score| is under `quality`, whatever share that is (held ones included)."""

    def allocate(weights: Sequence[Units], sparsity: float) -> list[np.ndarray]:
        chosen = [np.abs(units.scores) < quality for units in weights]
        return [c if u.held is None else c | u.held for c, u in zip(chosen, weights, strict=True)]

    return allocate


ALLOCATIONS: dict[str, Allocation] = {"uniform": uniform, "global": globally, "erk": erk, "sensitivity": sensitivity}


def take(weights: Sequence[Units], budget: int, out: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
    """The units of smallest score, over all weights together, that fit a number of entries.

    Units of one size: exactly budget // size of them, ties by order. Units of several sizes are taken in order
    of score until the next one would pass the budget.

    Args:
        weights: the units of each weight.
        budget: entries to remove at most; those of units held from earlier count.
        out: memory that may be used for the result, as `select.booleans` makes it.

    Returns:
        For each weight a boolean array of its units' shape, True where removed.
    """
    sizes = {int(u.sizes) for u in weights if isinstance(u.sizes, int)}
    if len(sizes) <= 1 and all(isinstance(u.sizes, int) for u in weights):
        size = sizes.pop() if sizes else 1
        return lowest([u.scores for u in weights], budget // size, held=[u.held for u in weights], out=out)
    scores = np.concatenate([np.abs(u.scores).reshape(-1).astype(np.float64) for u in weights])
    empty = [np.zeros(u.scores.shape, np.bool_) if u.held is None else u.held for u in weights]
    held = np.concatenate([e.reshape(-1) for e in empty])
    cost = np.concatenate([np.broadcast_to(u.sizes, u.scores.shape).reshape(-1) for u in weights])
    order = np.lexsort((np.arange(scores.size), scores, ~held))
    fits = np.cumsum(cost[order]) <= budget
    fits |= held[order]
    removed = np.zeros(scores.size, np.bool_)
    removed[order] = fits & np.isfinite(scores[order])
    bounds = np.cumsum([u.scores.size for u in weights])[:-1]
    return [part.reshape(u.scores.shape) for part, u in zip(np.split(removed, bounds), weights, strict=True)]
