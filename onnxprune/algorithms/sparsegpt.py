"""SparseGPT: second-order selection, and what goes is made up for by what stays.

Frantar & Alistarh 2023, "SparseGPT: massive language models can be accurately pruned in one-shot", algorithm 1.
"""

from __future__ import annotations

import numpy as np

from onnxprune.algorithms.allocate import take
from onnxprune.algorithms.patterns import Pattern

Array = np.ndarray

DAMPING = 0.01
"""Added to the Gram matrix's diagonal, as a share of its mean (section 4, "dampening")."""

BLOCK = 128
"""Columns whose mask is chosen at once, and whose updates of later columns are carried out together."""


def sparsegpt(
    weights: Array, grams: Array, pattern: Pattern, budget: int, inputs: int, damping: float = DAMPING
) -> tuple[Array, Array]:
    """Prune one layer column by column; later columns make up for what earlier ones lost.

    Columns are taken in blocks in each of which the same share of entries goes, those of least w^2 / [H^-1]_jj for the
    Gram matrix H of the columns that are left. N:M chooses its M columns together, blocks as many as fit.

    Args:
        weights: (groups, outputs, columns), columns in the order inputs, kernel positions.
        grams: (groups, columns, columns): the Gram matrix of each group's inputs.
        pattern: what shape may go.
        budget: entries to remove at most, in all groups together; exactly so many where units are single entries.
        inputs: number of inputs; columns are inputs * kernel positions.
        damping: added to the diagonal, as a share of its mean.

    Returns:
        New weights, and True where entries went.
    """
    groups, outputs, columns = weights.shape
    order, spans = _spans(pattern, inputs, columns // inputs)
    w = weights[:, :, order].astype(np.float64)
    factors = np.stack([_factor(gram[np.ix_(order, order)], damping) for gram in grams])
    spread = np.einsum("gkk->gk", factors)[:, None, :]
    removed = np.zeros(w.shape, np.bool_)
    taken = 0
    for start, stop in spans:
        scores = (w[:, :, start:stop] / spread[:, :, start:stop]) ** 2
        shape = (groups * outputs, stop - start)
        units = pattern.units(scores.reshape(shape), None)
        gone = pattern.entries(take([units], budget * stop // columns - taken)[0], units).reshape(scores.shape)
        taken += int(gone.sum())
        removed[:, :, start:stop] = gone
        errors = np.zeros(gone.shape)
        for column in range(start, stop):
            lost = np.where(gone[:, :, column - start], w[:, :, column], 0.0) / spread[:, :, column]
            errors[:, :, column - start] = lost
            w[:, :, column:stop] -= lost[:, :, None] * factors[:, None, column, column:stop]
        w[:, :, stop:] -= errors @ factors[:, start:stop, stop:]
    w[removed] = 0.0
    back = np.argsort(order)
    return w[:, :, back], removed[:, :, back]


def _spans(pattern: Pattern, inputs: int, positions: int) -> tuple[Array, list[tuple[int, int]]]:
    """The order of columns in which a pattern's units lie side by side, and the blocks to choose masks in."""
    columns = inputs * positions
    if pattern.columns == 1:
        return np.arange(columns), [(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]
    step = pattern.columns if pattern.most < 1 else max(BLOCK // pattern.columns, 1) * pattern.columns
    order = np.arange(columns).reshape(inputs, positions).T.reshape(-1)
    starts = [
        (p * inputs + s, p * inputs + min(s + step, inputs)) for p in range(positions) for s in range(0, inputs, step)
    ]
    return order, starts


def _factor(gram: Array, damping: float) -> Array:
    """The upper Cholesky factor of the inverse: row j holds what is needed once columns before j are settled."""
    from scipy.linalg import cholesky, lapack

    mean = float(np.trace(gram)) / len(gram)
    damped = gram + np.eye(len(gram)) * (damping * mean if mean > 0 else 1.0)
    inverse, info = lapack.dpotri(cholesky(damped, lower=True, check_finite=False), lower=1)
    if info:  # nothing of positive definite matrices does that
        raise np.linalg.LinAlgError(f"dpotri returns {info}")
    inverse = np.tril(inverse) + np.tril(inverse, -1).T
    factor: Array = cholesky(inverse, lower=False, overwrite_a=True, check_finite=False)
    return factor
