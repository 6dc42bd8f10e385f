"""What shape may be removed: single entries, N of every M, blocks.

A pattern turns the scores of a weight into units, the things that are kept or removed whole, and a decision
about units back into one about entries. Adding a pattern is one function that returns a Pattern, and its
spelling in `parse`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from onnxprune.errors import PruneError

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Units:
    """The units of one weight.

    Attributes:
        scores: any shape; smallest absolute value goes first, +inf never goes.
        sizes: entries per unit: one number, or an array of the scores' shape.
        held: units removed earlier (same shape), or None.
        shape: the weight's shape in role order.
        places: (output, input) the unit that each place of the weight belongs to, where its values decide about that.
    """

    scores: np.ndarray
    sizes: int | np.ndarray
    held: np.ndarray | None
    shape: Shape
    places: np.ndarray | None = None

    @property
    def entries(self) -> int:
        """Number of entries of the weight."""
        return int(np.prod(self.shape, dtype=np.int64))


def per_output(units: Units) -> Units:
    """Units ranked against those of their own output (or row of blocks) only: the score is the rank in it.

    Of equally large outputs each then loses the same number, and one more where it does not divide: the first ones do.
    Units held from earlier rank first; those that never go keep +inf.
    """
    rows = np.abs(units.scores).reshape(units.scores.shape[0], -1)
    first = rows if units.held is None else np.where(units.held.reshape(rows.shape), -1.0, rows)
    ranks = np.empty(rows.shape, np.float64)
    places = np.broadcast_to(np.arange(rows.shape[1], dtype=np.float64), rows.shape)
    np.put_along_axis(ranks, np.argsort(first, axis=1, kind="stable"), places, axis=1)
    ranks[np.isinf(rows)] = np.inf
    return replace(units, scores=ranks.reshape(units.scores.shape))


@dataclass(frozen=True, eq=False)
class Pattern:
    """A shape of removal.

    Attributes:
        name: its spelling in a configuration.
        units: (scores, entries removed earlier or None) of a weight in role order to Units.
        entries: (what is removed of the units, the units) to the entries removed, in role order.
        misfit: the reason why a weight of some shape in role order cannot have the pattern; empty where it can.
        most: the largest sparsity the pattern allows.
        columns: inputs that a unit, or the choice between units, reaches over.
        coupled: whether its units reach over several weights, so that the structure of the graph decides about them.
        fitted: (parts, joint) to the pattern for a weight whose outputs fall into `parts` equal runs that read inputs
            of their own, or all have to keep the same inputs; None where that makes no difference.
    """

    name: str
    units: Callable[[np.ndarray, np.ndarray | None], Units]
    entries: Callable[[np.ndarray, Units], np.ndarray]
    misfit: Callable[[Shape], str]
    most: float = 1.0
    columns: int = 1
    coupled: bool = False
    fitted: Callable[[int, bool], Pattern] | None = None

    @property
    def faster(self) -> bool:
        """Whether what it removes can leave the graph, so that latency says something."""
        return self.coupled or self.fitted is not None


def parse(text: str) -> Pattern:
    """The pattern of a configuration's spelling: 'unstructured', 'channel', 'head', 'grouped', 'N:M', 'block:RxC'.

    Raises:
        PruneError: no such pattern.
    """
    if text in PLAIN:
        return PLAIN[text]
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = int(match[1]), int(match[2])
        if 0 < n < m:
            return n_of_m(n, m)
    elif match := re.fullmatch(r"block:(\d+)x(\d+)", text):
        rows, columns = int(match[1]), int(match[2])
        if rows and columns:
            return block(rows, columns)
    elif match := re.fullmatch(r"grouped(?::([1-9]\d*))?", text):
        from onnxprune.algorithms.grouped import grouped  # which is made of what stands here

        return grouped(int(match[1]) if match[1] else None)
    raise PruneError(
        f"pattern '{text}' is not known; expected {', '.join(map(repr, PLAIN))}, 'N:M' with 0 < N < M such as '2:4' "
        "(N of every M inputs stay), 'block:RxC' such as 'block:4x1' (R outputs by C inputs), or 'grouped' and "
        "'grouped:G' (inputs of their own for every G outputs)"
    )


UNSTRUCTURED = Pattern(
    "unstructured",
    lambda scores, held: Units(scores, 1, held, scores.shape),
    lambda removed, units: removed,
    lambda shape: "",
)
"""Every entry on its own."""

CHANNEL = replace(UNSTRUCTURED, name="channel", coupled=True)
"""Whole channels of the graph: outputs of weights, with everything that goes along (see `onnxprune.structure`)."""

HEAD = replace(UNSTRUCTURED, name="head", coupled=True)
"""Whole attention heads."""

PLAIN = {pattern.name: pattern for pattern in (UNSTRUCTURED, CHANNEL, HEAD)}


def n_of_m(n: int, m: int) -> Pattern:
    """At most m - n of every m consecutive inputs of an output go, at each kernel position: '2:4' leaves 2 of 4.

    Below the full sparsity of 1 - n/m the entries of smallest score among those that may go are taken, so
    that a schedule can approach the pattern step by step (Mishra et al. 2021 describe 2:4).
    """

    def groups(entries: np.ndarray) -> np.ndarray:
        last = np.moveaxis(entries, 1, -1)
        return last.reshape(*last.shape[:-1], -1, m)

    def units(scores: np.ndarray, held: np.ndarray | None) -> Units:
        ranked = np.abs(scores)
        if held is not None:
            ranked = np.where(held, -np.ones((), ranked.dtype), ranked)
        order = np.argsort(groups(ranked), axis=-1, kind="stable")
        stays = np.zeros(order.shape, np.bool_)
        np.put_along_axis(stays, order[..., m - n :], True, axis=-1)
        last = np.moveaxis(scores, 1, -1).shape
        size = np.abs(scores).astype(np.result_type(scores.dtype, np.float32), copy=False)
        allowed = np.where(np.moveaxis(stays.reshape(last), -1, 1), np.inf, size)
        return Units(allowed, 1, held, scores.shape)

    def misfit(shape: Shape) -> str:
        return "" if shape[1] % m == 0 else f"its {shape[1]} inputs are no multiple of {m}"

    return Pattern(f"{n}:{m}", units, lambda removed, units: removed, misfit, round(1 - n / m, 12), m)


def block(rows: int, columns: int) -> Pattern:
    """Blocks of `rows` outputs by `columns` inputs, at each kernel position; a block's score is its mean |score|.

    Blocks at the far edges are smaller where the block does not divide the weight.
    """

    def grid(array: np.ndarray) -> np.ndarray:
        """(output, input, *kernel) padded to whole blocks: (R, rows, C, columns, *kernel)."""
        outputs, inputs = array.shape[:2]
        pad = [(0, -outputs % rows), (0, -inputs % columns)] + [(0, 0)] * (array.ndim - 2)
        whole = np.pad(array, pad) if any(p != (0, 0) for p in pad) else array
        return whole.reshape(whole.shape[0] // rows, rows, whole.shape[1] // columns, columns, *array.shape[2:])

    def units(scores: np.ndarray, held: np.ndarray | None) -> Units:
        wide = scores if scores.dtype == np.float64 else scores.astype(np.float32, copy=False)
        total = grid(np.abs(wide)).sum((1, 3), dtype=np.float64)
        if scores.shape[0] % rows == 0 and scores.shape[1] % columns == 0:
            sizes: int | np.ndarray = rows * columns
        else:
            sizes = grid(np.ones(scores.shape, np.bool_)).sum((1, 3))
        # A unit is held where all its entries are: the padding of an edge block counts as removed.
        gone = None if held is None else grid(~held).sum((1, 3)) == 0
        return Units(total / sizes, sizes, gone, scores.shape)

    def entries(removed: np.ndarray, units: Units) -> np.ndarray:
        spread = removed.repeat(rows, 0).repeat(columns, 1)
        return spread[: units.shape[0], : units.shape[1]]

    return Pattern(f"block:{rows}x{columns}", units, entries, lambda shape: "", columns=columns)
