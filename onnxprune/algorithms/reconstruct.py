"""Refitting what survives: least squares from what a layer reads now to what it computed when nothing was pruned.

Arrays are those of one layer, group by group: weights (groups, outputs, inputs), sums (groups, inputs[, inputs]).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

RIDGES = (1e-8, 1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths that are tried, as shares of the mean square of an input."""

RIDGE = 1e-2
"""The one taken where the data cannot be parted to try them."""

TRIED = 8
"""Outputs of a layer that are refitted to choose a strength."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over the rows x that a layer reads, and the rows d that it read in the dense model.

    Attributes:
        count: number of rows.
        x: sum of x (groups, inputs).
        d: sum of d.
        xx: sum of the products of x with itself: the Gram matrix (groups, inputs, inputs).
        xd: sum of the products of x with d.
    """

    count: int
    x: Array
    d: Array
    xx: Array
    xd: Array

    def __add__(self, other: Moments) -> Moments:
        """Of the rows of both."""
        return Moments(
            self.count + other.count, self.x + other.x, self.d + other.d, self.xx + other.xx, self.xd + other.xd
        )

    def centred(self) -> Moments:
        """The sums about the means: what is left to explain once a free bias has taken up the means."""
        if self.count == 0:
            return self
        outer = "gi,gj->gij"
        xx = self.xx - np.einsum(outer, self.x, self.x) / self.count
        xd = self.xd - np.einsum(outer, self.x, self.d) / self.count
        return Moments(self.count, np.zeros_like(self.x), np.zeros_like(self.d), xx, xd)


def refit(dense: Array, start: Array, keep: Array, sums: Moments, ridge: float) -> Array:
    """Weights that come closest to the dense outputs: sum of |w x - dense d|^2 + ridge * |w - start|^2.

    The ridge pulls to where the weights are, so that the first term never grows, and what the data say nothing about
    stays as it is.

    Args:
        dense: the dense weights.
        start: the weights now.
        keep: which of them survive; the others stay 0.
        sums: of the layer's rows; centred where a bias is free.
        ridge: as a share of the mean square of an input.
    """
    from scipy.linalg import cho_factor, cho_solve

    result = np.where(keep, start, 0.0)
    for group in range(len(dense)):
        gram = sums.xx[group]
        weight = ridge * float(np.trace(gram)) / len(gram)
        if not weight > 0:
            continue
        wanted = dense[group] @ sums.xd[group].T + weight * result[group]
        supports, which = np.unique(np.packbits(keep[group], axis=1), axis=0, return_inverse=True)
        order = np.argsort(which.reshape(-1), kind="stable")
        bounds = np.searchsorted(which.reshape(-1)[order], np.arange(len(supports) + 1))
        for first, last in itertools.pairwise(bounds):
            outputs = order[first:last]
            inputs = np.flatnonzero(keep[group, outputs[0]])
            if inputs.size == 0:
                continue
            normal = gram[np.ix_(inputs, inputs)]
            normal[np.diag_indices(inputs.size)] += weight
            factor = cho_factor(normal, lower=True, overwrite_a=True, check_finite=False)
            solved = cho_solve(factor, wanted[np.ix_(outputs, inputs)].T, overwrite_b=True, check_finite=False)
            result[group][np.ix_(outputs, inputs)] = solved.T
    return result


def error(dense: Array, weights: Array, sums: Moments) -> float:
    """Sum of |w x - dense d|^2, less the part that no weights change (that of the dense outputs alone)."""
    squares = np.einsum("gok,gok->", weights @ sums.xx, weights)
    mixed = np.einsum("gok,gok->", weights @ sums.xd, dense)
    return float(squares - 2 * mixed)


def choose_ridge(dense: Array, start: Array, keep: Array, halves: tuple[Moments, Moments]) -> float:
    """The strength with which some outputs, refitted on one half of the data, have the least error on the other."""
    if not all(half.count for half in halves):
        return RIDGE
    outputs = np.unique(np.linspace(0, dense.shape[1] - 1, TRIED, dtype=np.int64))
    some = dense[:, outputs], start[:, outputs], keep[:, outputs]
    errors = []
    for ridge in RIDGES:
        fitted = [refit(*some, half, ridge) for half in halves]
        errors.append(sum(error(some[0], weights, other) for weights, other in zip(fitted, halves[::-1], strict=True)))
    return RIDGES[int(np.argmin(errors))]
