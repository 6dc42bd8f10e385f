"""Which outputs of a weight read which inputs, from its zeros alone: groups of outputs that share a support."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxprune.algorithms.grouped import cluster

SMALLEST = 8
"""Outputs of a group: smaller ones leave matrix kernels idle."""

WORTH = 0.85
"""Share of the inputs that a group keeps at most: above, there is nothing to gain."""

GATHERED = 24
"""Multiplications that moving one input takes the time of, when covers are compared."""


@dataclass(frozen=True, eq=False)
class Cover:
    """Groups of outputs with the inputs they read; every entry of the weight outside is zero.

    Attributes:
        outputs: (groups, size) indices of outputs; each output once.
        inputs: (groups, kept) indices of the data's channels; where a group reads fewer, some other one stands there.
        live: (groups, kept) False where an input only fills a place.
    """

    outputs: np.ndarray
    inputs: np.ndarray
    live: np.ndarray

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.outputs.shape[0])

    @property
    def size(self) -> int:
        """Outputs of a group."""
        return int(self.outputs.shape[1])

    @property
    def kept(self) -> int:
        """Inputs of a group."""
        return int(self.inputs.shape[1])

    @property
    def ordered(self) -> bool:
        """Whether the outputs come group by group as they are."""
        return bool((np.diff(self.outputs.reshape(-1)) > 0).all())

    def padded(self, multiple: int) -> Cover:
        """With inputs up to a multiple, whose weights are zero."""
        more = -self.kept % multiple
        if not more:
            return self
        pad = ((0, 0), (0, more))
        return Cover(self.outputs, np.pad(self.inputs, pad, "edge"), np.pad(self.live, pad))


def cover(live: np.ndarray, parts: int = 1, joint: bool = False) -> Cover | None:
    """The groups that a weight's zeros allow; None where none leave out enough.

    Rows of one support make groups at once. Else rows are put together by likeness, which loses nothing either: a
    group keeps whatever one of its members reads.

    Args:
        live: (outputs, inputs) whether any entry is not zero.
        parts: equal runs of outputs that read inputs of their own, one run's after the other's.
        joint: whether all outputs are one group, come what may.
    """
    inputs = live.shape[1]
    found = make(live, np.arange(live.shape[0])[None]) if joint else _exact(live, parts)
    if found is None:
        each = live.shape[0] // parts
        sizes = [d for d in range(SMALLEST, each, SMALLEST) if each % d == 0]
        tried = [_clustered(live, parts, size) for size in (*sizes, each)]
        found = min(tried, key=lambda c: c.groups * c.kept * (c.size + GATHERED), default=None)
    return found if found is not None and 0 < found.kept <= WORTH * inputs else None


def make(live: np.ndarray, members: np.ndarray, parts: int = 1) -> Cover:
    """The cover that groups of outputs have."""
    inputs = live.shape[1]
    reads = live[members].any(1)
    kept = max(1, int(reads.sum(1).max()))
    order = np.argsort(~reads, axis=1, kind="stable")[:, :kept]  # what is read first, in order
    used = np.take_along_axis(reads, order, 1)
    offset = members[:, :1] // (live.shape[0] // parts) * inputs
    return Cover(members, np.where(used, order, order[:, :1]) + offset, used)


def _exact(live: np.ndarray, parts: int) -> Cover | None:
    """Groups of rows with one support each; rows that read less fill them up."""
    each = live.shape[0] // parts
    sets: list[tuple[int, np.ndarray, list[int]]] = []
    loose: list[int] = []
    order = np.argsort(-live.sum(1), kind="stable")
    for row in order.tolist():
        same = next((s for s in sets if s[0] == row // each and np.array_equal(s[1], live[row])), None)
        if same is not None:
            same[2].append(row)
        elif any(s[0] == row // each and not (live[row] & ~s[1]).any() for s in sets):
            loose.append(row)
        else:
            sets.append((row // each, live[row], [row]))
            if len(sets) * SMALLEST > live.shape[0] and len(sets) > parts:
                return None
    sizes = [d for d in range(each, 0, -1) if each % d == 0 and (d >= SMALLEST or d == each)]
    for size in sizes:
        filled = _fill([(p, s, list(rows)) for p, s, rows in sets], loose, live, each, size)
        if filled is not None:
            members = np.sort(np.array(filled).reshape(-1, size), axis=1)
            return make(live, members[np.argsort(members[:, 0], kind="stable")], parts)
    return None


def _fill(
    sets: list[tuple[int, np.ndarray, list[int]]], loose: list[int], live: np.ndarray, each: int, size: int
) -> list[int] | None:
    """The rows, set after set, where each set can be brought to a multiple of the size; else None."""
    for row in loose:
        fits = [rows for p, s, rows in sets if p == row // each and not (live[row] & ~s).any()]
        next((rows for rows in fits if len(rows) % size), fits[0]).append(row)
    if any(len(rows) % size for _, _, rows in sets):
        return None
    return [row for _, _, rows in sets for row in sorted(rows)]


def _clustered(live: np.ndarray, parts: int, size: int) -> Cover:
    runs = np.arange(live.shape[0]).reshape(parts, -1)
    profile = live.astype(np.float64)
    return make(live, np.concatenate([run[cluster(profile[run], size)] for run in runs]), parts)
