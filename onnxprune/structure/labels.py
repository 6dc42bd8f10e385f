"""Labels: an integer for every position of every axis, and what ties and pins them.

Equal labels live or die together. Operators tie labels, and pin those of positions that must stay. Where a Reshape
merges or splits axes, a position of the long axis lives where all positions it is made of live: a *product*. At most
one factor of a product may lose positions; which one is settled when everything else is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Axis = np.ndarray
"""The labels of one axis: int64, one per position."""

Axes = tuple[Axis, ...]


LONG = 1 << 25
"""Positions of the longest axis that labels are given to: beyond it, they would fill a machine's memory."""


class Misfit(ValueError):  # noqa: N818  (a finding, not an error)
    """Axes that should be alike have different sizes, or one is too large."""


@dataclass(frozen=True, eq=False)
class Product:
    """An axis that is several: `cells[i, j, ...]` lives where `factors[0][i]`, `factors[1][j]`, ... all live."""

    cells: np.ndarray
    factors: Axes
    what: str


def _check_size(size: int) -> None:
    if not 0 <= size <= LONG:
        raise Misfit(f"an axis of {size} positions cannot be followed")


def joined(root: Axis, left: Axis, right: Axis) -> Axis:
    """The smallest label of each class, once `left[i]` and `right[i]` are in one; `root` says it of before.

    The larger roots of ties are hung under the smaller ones, and paths halved until they are flat, as in Shiloach and
    Vishkin, "An O(log n) parallel connectivity algorithm" (1982).
    """
    while True:
        left, right = root[left], root[right]
        apart = left != right
        if not apart.any():
            return root
        left, right = left[apart], right[apart]
        above = root.copy()
        np.minimum.at(above, np.maximum(left, right), np.minimum(left, right))
        while not np.array_equal(root := above[above], above):
            above = root


@dataclass(eq=False)
class Labels:
    """The labels of one graph, and what is known of them so far."""

    count: int = 0
    _ties: list[tuple[Axis, Axis]] = field(default_factory=list)
    _pins: list[tuple[Axis, str]] = field(default_factory=list)
    _heads: list[Axis] = field(default_factory=list)
    _copies: list[Axis] = field(default_factory=list)
    _products: list[Product] = field(default_factory=list)
    _fixed: dict[int, str] = field(default_factory=dict)

    def fresh(self, size: int) -> Axis:
        """Labels of a new axis whose positions are free of each other.

        Raises:
            Misfit: there are too many.
        """
        _check_size(size)
        axis = np.arange(self.count, self.count + size, dtype=np.int64)
        self.count += size
        return axis

    def fixed(self, size: int, reason: str) -> Axis:
        """Labels of a new axis that keeps all its positions: they share one, and it is pinned.

        Raises:
            Misfit: there are too many.
        """
        _check_size(size)
        label = self.fresh(1)
        self._fixed[int(label[0])] = reason
        self._pins.append((label, reason))
        return np.full(size, label[0])

    def is_fixed(self, axis: Axis) -> bool:
        """Whether an axis came from `fixed`: what ties pin is not known before `solve`."""
        return axis.size > 0 and int(axis[0]) in self._fixed and bool((axis == axis[0]).all())

    def reason(self, axis: Axis) -> str:
        """Why an axis from `fixed` keeps its positions."""
        return self._fixed[int(axis[0])]

    def tie(self, left: Axis, right: Axis) -> None:
        """Position by position the same life.

        Raises:
            Misfit: they are of different sizes.
        """
        if left.shape != right.shape:
            raise Misfit(f"lengths {left.size} and {right.size} meet")
        if not np.array_equal(left, right):
            self._ties.append((left, right))

    def pin(self, axis: Axis, reason: str) -> None:
        """These positions stay."""
        if axis.size and not self.is_fixed(axis):
            self._pins.append((np.unique(axis), reason))

    def prefer(self, axis: Axis) -> None:
        """Where a product can lose positions along several factors, this one is meant (attention heads)."""
        self._heads.append(axis)

    def avoid(self, axis: Axis) -> None:
        """Positions that repeat one entry: a product loses them last."""
        self._copies.append(axis)

    def merge(self, factors: Sequence[Axis], what: str) -> Axis:
        """The labels of an axis that runs over all combinations of several axes, the last one fastest."""
        sizes = [axis.size for axis in factors]
        open_ = [i for i, axis in enumerate(factors) if axis.size != 1 and not self.is_fixed(axis)]
        if not open_:
            # Of single positions the one that matters carries on: a merged axis of size 1 is still itself.
            loose = [axis for axis in factors if axis.size == 1 and not self.is_fixed(axis)]
            if loose and math.prod(sizes) == 1:
                return loose[0]
            for axis in loose:
                self.pin(axis, f"{what} merges it with other axes")
            known = [axis for axis in sorted(factors, key=lambda axis: axis.size == 1) if self.is_fixed(axis)]
            reason = self.reason(known[0]) if known else f"{what} merges axes that stay"
            return self.fixed(math.prod(sizes), reason)
        if len(open_) == 1:
            shape = [size if i == open_[0] else 1 for i, size in enumerate(sizes)]
            return np.broadcast_to(factors[open_[0]].reshape(shape), sizes).reshape(-1)
        cells = self.fresh(math.prod(sizes))
        self._products.append(Product(cells.reshape(sizes), tuple(factors), what))
        return cells

    def split(self, axis: Axis, sizes: Sequence[int], what: str) -> Axes:
        """The labels of several axes whose combinations, the last one fastest, an axis runs over."""
        if self.is_fixed(axis):
            return tuple(np.full(size, axis[0]) for size in sizes)
        if sum(size != 1 for size in sizes) <= 1:
            reason = f"{what} adds an axis of one position"
            longest = max(range(len(sizes)), key=lambda i: sizes[i])
            return tuple(axis if i == longest else self.fixed(1, reason) for i in range(len(sizes)))
        factors = tuple(
            self.fresh(size) if size != 1 else self.fixed(1, f"{what} adds an axis of one position") for size in sizes
        )
        self._products.append(Product(axis.reshape(tuple(sizes)), factors, what))
        return factors

    def relate(self, axis: Axis, factors: Sequence[Axis], what: str) -> None:
        """Say that an axis runs over all combinations of axes that are known already."""
        self._products.append(Product(axis.reshape([f.size for f in factors]), tuple(factors), what))

    def solve(self) -> Solution:
        """Settle all ties, pins and products."""
        solver = _Solver(self)
        solver.run()
        return Solution(solver.root, solver.pinned, solver.reasons, solver.heads)


@dataclass(frozen=True, eq=False)
class Solution:
    """Which labels are one, and which stay.

    Attributes:
        root: label -> class.
        pinned: class -> whether it stays.
        reasons: class -> why, where it stays.
        heads: class -> whether it is a batch of a product of two computed values: an attention head.
    """

    root: np.ndarray
    pinned: np.ndarray
    reasons: dict[int, str]
    heads: np.ndarray

    def classes(self, axis: Axis) -> np.ndarray:
        """The class of each position; -1 where it stays."""
        root = self.root[axis]
        return np.where(self.pinned[root], -1, root)


class _Solver:
    """Ties are contracted to classes; products are settled one after another, which makes new ties."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.ties = list(labels._ties)
        self.pins = list(labels._pins)
        self.root = np.arange(labels.count)
        self.pinned = np.zeros(labels.count, np.bool_)
        self.reasons: dict[int, str] = {}
        self.heads = np.zeros(labels.count, np.bool_)
        self.copies = np.zeros(labels.count, np.bool_)
        for axis in labels._heads:
            self.heads[axis] = True
        for axis in labels._copies:
            self.copies[axis] = True

    def run(self) -> None:
        waiting = list(self.labels._products)
        self._contract()
        while waiting:
            rest = [product for product in waiting if not self._settle(product)]
            if len(rest) == len(waiting) and not self.ties and not self.pins:
                self._choose(rest)
            waiting = rest
            self._contract()

    def _contract(self) -> None:
        """Make classes of the ties found since the last time, and spread the pins."""
        if self.ties:
            left, right = (np.concatenate(ends) for ends in zip(*self.ties, strict=True))
            self.root = joined(self.root, left, right)
            for flags in (self.pinned, self.heads, self.copies):
                flags[self.root[np.flatnonzero(flags)]] = True
            moved = {int(self.root[label]): reason for label, reason in reversed(self.reasons.items())}
            self.reasons = dict(reversed(moved.items()))
            self.ties.clear()
        for axis, reason in self.pins:
            for label in np.unique(self.root[axis]):
                if not self.pinned[label]:
                    self.pinned[label] = True
                    self.reasons[int(label)] = reason
        self.pins.clear()

    def _why(self, axis: Axis) -> str:
        root = self.root[axis]
        held = root[self.pinned[root]]
        return self.reasons.get(int(held[0]), "") if held.size else ""

    def _open(self, product: Product) -> list[int]:
        """The factors that may still lose positions; pins what cannot."""
        cells = self.root[product.cells]
        stays = self.pinned[cells]
        found = []
        for k, factor in enumerate(product.factors):
            root = self.root[factor]
            if factor.size > 1 and not self.pinned[root].all():
                others = tuple(a for a in range(cells.ndim) if a != k)
                held = stays.any(others) & ~self.pinned[root]
                if held.any():
                    place = np.argwhere(np.moveaxis(stays, k, 0)[held])[0]
                    cell = np.moveaxis(cells, k, 0)[held][tuple(place)]
                    self.pins.append((factor[held], self.reasons.get(int(cell)) or f"{product.what} needs it"))
                if (cells == cells.take([0], k)).all():  # one position gone would take all with it
                    self.pins.append((factor, self._instead(product, k)))
                elif not held.all():
                    found.append(k)
            elif factor.size == 1 and not self.pinned[root].all():
                self.pins.append((factor, f"{product.what} has an axis with this position only"))
        return found

    def _settle(self, product: Product) -> bool:
        """Tie a product's cells to its one open factor, if there is no choice."""
        before = len(self.pins)
        open_ = self._open(product)
        if len(self.pins) > before and len(open_) > 1:
            return False  # look again when the pins have spread
        if len(open_) > 1:
            return False
        if not open_:
            longer = sorted(product.factors, key=lambda axis: axis.size == 1)
            reason = next((r for r in map(self._why, longer) if r), f"{product.what} joins axes that stay")
            self.pins.append((product.cells.reshape(-1), reason))
        else:
            k = open_[0]
            shape = [size if i == k else 1 for i, size in enumerate(product.cells.shape)]
            spread = np.broadcast_to(product.factors[k].reshape(shape), product.cells.shape)
            self.ties.append((product.cells.reshape(-1), spread.reshape(-1)))
        return True

    def _choose(self, waiting: Sequence[Product]) -> None:
        """Decide which factor of each product that has several may lose positions: heads, else the longest."""

        def rank(product: Product, k: int) -> tuple[bool, bool, int, int]:
            root = self.root[product.factors[k]]
            return bool(self.heads[root].any()), not self.copies[root].all(), np.unique(root).size, -k

        best = max(waiting, key=lambda p: max(rank(p, k) for k in self._quiet(p)))
        top = max(rank(best, k) for k in self._quiet(best))
        for product in waiting:
            ranks = {k: rank(product, k) for k in self._quiet(product)}
            if max(ranks.values())[0] != top[0]:
                continue
            chosen = max(ranks, key=lambda k: ranks[k])
            for k in ranks:
                if k != chosen:
                    self.pins.append((product.factors[k], self._whole(product, chosen)))

    def _instead(self, product: Product, k: int) -> str:
        """Why a factor stays whose positions would each take all of a product with them."""
        others = [i for i in self._quiet(product) if i != k]
        if not others:
            return f"{product.what} repeats what lies along an axis of {product.factors[k].size} positions"
        heads = [i for i in others if self.heads[self.root[product.factors[i]]].any()]
        return self._whole(product, max(heads or others, key=lambda i: product.factors[i].size))

    def _whole(self, product: Product, chosen: int) -> str:
        """Why all factors but one stay."""
        count = product.factors[chosen].size
        each = product.cells.size // count
        if self.heads[self.root[product.factors[chosen]]].any():
            return f"{product.what} holds {count} heads of {each} positions, which go as a whole"
        return f"{product.what} holds {count} channels of {each} positions, which go as a whole"

    def _quiet(self, product: Product) -> list[int]:
        return [k for k, f in enumerate(product.factors) if f.size > 1 and not self.pinned[self.root[f]].all()]
