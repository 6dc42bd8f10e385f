"""Which entries matter: a number per entry of a weight; the entries of smallest absolute score go first.

Adding a score is one function in SCORES: it takes a weight's values in role order (output, input, *kernel)
and returns an array of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Score = Callable[[np.ndarray], np.ndarray]


def magnitude(values: np.ndarray) -> np.ndarray:
    """|w| (Han et al. 2015): the values themselves, since ranking is by absolute value. No copy."""
    return values


def relative(factor: float) -> Score:
    """|w| in units of the weight's standard deviation, times 1/factor (Han et al. 2015, section 3).

    Ranking all weights together by it is thresholding each at quality * factor * std, for one quality.
    """

    def score(values: np.ndarray) -> np.ndarray:
        spread = deviation(values) * factor
        wide = values if values.dtype == np.float64 else values.astype(np.float32)
        scaled: np.ndarray = wide / wide.dtype.type(spread) if spread > 0 else np.abs(wide)
        return scaled

    return score


def wanda(values: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """|w| * ||x||_2 (Sun et al. 2023, "A simple and effective pruning approach for large language models", eq. 1).

    Args:
        values: a weight in role order.
        norms: the norm of the input that each entry is multiplied with, over the calibration data (same shape).
    """
    scores: np.ndarray = np.abs(values.astype(np.float64)) * norms
    return scores


SCORES: dict[str, Score] = {"magnitude": magnitude}
"""Scores of entries that the weight alone gives."""

WANDA = "wanda"
CALIBRATED: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {WANDA: wanda}
"""Scores of entries that need the norms of their inputs; entries are then ranked against those of their own output."""

ChannelScore = Callable[[np.ndarray], np.ndarray]
"""Takes a weight as (outputs, the rest), returns a score per output: the lowest goes first."""


def l1(rows: np.ndarray) -> np.ndarray:
    """Mean |w| of a filter (Li et al. 2017, "Pruning filters for efficient ConvNets", section 3.1)."""
    sums, unit = _sums(rows, 52 - rows.shape[1].bit_length(), np.abs)
    return _mean(sums, rows) * unit


def l2(rows: np.ndarray) -> np.ndarray:
    """Root mean square of a filter (He et al. 2018, "Soft filter pruning", section 3)."""
    sums, unit = _sums(rows, (52 - rows.shape[1].bit_length()) // 2, np.square)
    root: np.ndarray = np.sqrt(_mean(sums, rows)) * unit
    return root


def fpgm(rows: np.ndarray) -> np.ndarray:
    """Mean distance to all filters (He et al. 2019, "Filter pruning via geometric median", eq. 8)."""
    whole, unit = in_units(rows, (50 - rows.shape[1].bit_length()) // 2)
    squares = (whole * whole).sum(1)
    distances = np.sqrt(squares[:, None] + squares[None, :] - 2 * whole @ whole.T)
    steps, step = in_units(distances, 52 - rows.shape[0].bit_length())
    return _mean(steps.sum(1), distances) * (step * unit)


def in_units(values: np.ndarray, bits: int, top: float | None = None) -> tuple[np.ndarray, float]:
    """Values as whole multiples of a unit, of at most so many bits: their sums do not depend on the order.

    The unit is made for the largest magnitude, `top`, of these values or of all those that they are a part of.
    """
    wide = values.astype(np.float64)
    top = float(np.max(np.abs(wide), initial=0.0)) if top is None else top
    if top == 0:
        return wide, 1.0
    shift = max(bits, 1) - math.frexp(top)[1]
    return np.rint(np.ldexp(wide, shift)), math.ldexp(1.0, -shift)


BLOCK = 1 << 20
"""Entries of a weight that are worked on at a time."""


def _sums(rows: np.ndarray, bits: int, of: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, float]:
    """The sum over each row of a function of its entries in units, and the unit."""
    step = max(1, BLOCK // max(rows.shape[1], 1))
    blocks = [rows[start : start + step] for start in range(0, rows.shape[0], step)]
    top = max((float(np.max(np.abs(block.astype(np.float64)), initial=0.0)) for block in blocks), default=0.0)
    unit = in_units(np.empty(0), bits, top)[1]
    sums = [of(in_units(block, bits, top)[0]).sum(1) for block in blocks]
    return np.concatenate([np.empty(0), *sums]), unit


def _mean(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    mean: np.ndarray = sums / max(rows.shape[1], 1)
    return mean


BN_SCALE = "bn_scale"
"""|scale| of the BatchNorm behind a channel (Liu et al. 2017, "Network slimming")."""

CHANNEL_SCORES: dict[str, ChannelScore] = {"magnitude": l1, "l1": l1, "l2": l2, "fpgm": fpgm}
"""Scores of the outputs of a weight, for patterns that take them whole; beside `BN_SCALE`."""


def deviation(values: np.ndarray) -> float:
    """Standard deviation, the same to the last bit on every machine.

    Sums in floating point depend on their order, and so on the processor; here the values are rounded to
    2^-20 of the largest one and summed as integers.
    """
    if values.size == 0:
        return 0.0
    wide = values.reshape(-1)
    top = float(np.max(np.abs(wide)))
    if top == 0:
        return 0.0
    shift = 20 - math.frexp(top)[1]
    total = squares = 0
    for start in range(0, wide.size, 2**20):  # 2^20 squares of 20 bits just fit 64
        whole = np.rint(np.ldexp(wide[start : start + 2**20].astype(np.float64), shift)).astype(np.int64)
        total += int(whole.sum())
        squares += int((whole * whole).sum())
    variance = (squares * wide.size - total * total) / wide.size**2
    return math.ldexp(math.sqrt(variance), -shift)
