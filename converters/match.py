"""Which weight of an ONNX file is which of ours.

A file exported the ordinary way has lost names, transposed and stacked weights, and folded BatchNorm into them.
Weights are compared in role order, where layouts no longer differ, by what survived the pruning of the file: equal
values are a proof, a name is a hint. Every kind of evidence counts only where it is mutually unique, the strongest
first; nothing is guessed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxprune.errors import PruneError
from onnxprune.graph.weights import Weight

SIMILAR = 0.5
"""Correlation from which two weights are taken for one that was trained on."""

MARGIN = 0.2
"""By how much the best correlation has to beat the next."""

DEGREES = 8
"""Entries, beyond one per output for its factor, that must agree before a factor per output is believed."""

OFFSETS = 64
"""Blocks of rows of one weight that are looked at."""


@dataclass(frozen=True, eq=False)
class Match:
    """What a file says about one of our weights.

    Attributes:
        name: our weight.
        theirs: the file's weight; several where each is a block of our rows.
        how: the evidence, for people.
        keep: boolean array of our stored shape; False where the file has exactly 0.0.
        values: the file's values in our stored shape and type; None where only the zeros carry over, because the
            file has other values for a reason: a factor per output was folded in.
    """

    name: str
    theirs: tuple[str, ...]
    how: str
    keep: np.ndarray
    values: np.ndarray | None


def match(ours: Sequence[Weight], theirs: Sequence[Weight], normalised: Collection[str] = ()) -> dict[str, Match]:
    """Say of each of our weights which weight of a file it is.

    A file weight may serve several of ours that are equal, and several of ours may be blocks of its rows (stacked
    directions, gates, projections); one of ours may be made of several of theirs.

    Args:
        ours: a framework's parameters as weights.
        theirs: the weights of the file, as `onnxprune.graph.weights.find` finds them.
        normalised: names of ours whose outputs go to a normalisation that an exporter may fold into them; where our
            weights come from a graph, it is looked up there as well.

    Returns:
        Our name -> its match, in the order given. An embedding that the file does not hold (computed away) is absent.

    Raises:
        PruneError: a weight stays without a match; the message lists the candidates.
    """
    matcher = _Matcher(
        [_Side(weight, weight.name in normalised or _followed(weight, _is_norm)) for weight in ours],
        [_Side(weight, _followed(weight, lambda node: _is_norm(node) or _is_scale(node))) for weight in theirs],
    )
    matcher.run()
    return matcher.result()


class _Level(IntEnum):
    """What comparing values proves, weakest first."""

    NONE = 0
    FACTOR = 1
    ROUNDED = 2
    EXACT = 3


class _Evidence(NamedTuple):
    """What two weights have in common.

    Attributes:
        level: equality on the entries that survive in theirs.
        score: their correlation there; 0 where too few entries survive to mean anything.
        zeros: whether theirs is zero wherever ours is, by more than chance.
    """

    level: _Level
    score: float
    zeros: bool


class _Place(NamedTuple):
    """A block of rows of a file's weight: its index, and the first row."""

    theirs: int
    row: int


@dataclass(frozen=True, eq=False)
class _Side:
    """A weight as a matrix of its outputs, and whether its output is normalised."""

    weight: Weight
    normalised: bool

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Role shape without the kernel axes of length 1, which come and go with the operator."""
        outputs, inputs, *kernel = self.weight.role_shape
        return (outputs, inputs, *(k for k in kernel if k != 1))

    @cached_property
    def rows(self) -> np.ndarray:
        values = self.weight.values()
        flat = values.reshape(values.shape[0], -1)
        return flat.astype(np.float32) if flat.dtype.itemsize < 4 else flat

    @property
    def embedding(self) -> bool:
        return self.weight.op_type == "Embedding"


class _Matcher:
    """The search: settles ours one kind of evidence after the other."""

    def __init__(self, ours: list[_Side], theirs: list[_Side]) -> None:
        self.ours, self.theirs = ours, theirs
        self.settled: dict[int, tuple[list[_Place], str, _Level]] = {}
        self._places: dict[int, list[_Place]] = {}
        self._evidence: dict[tuple[int, _Place], _Evidence] = {}

    def run(self) -> None:
        for level, words in [
            (_Level.EXACT, "equal values"),
            (_Level.ROUNDED, "values equal up to rounding"),
            (_Level.FACTOR, "values equal up to a factor per output"),
        ]:

            def proven(i: int, place: _Place, level: _Level = level) -> bool:
                return self.evidence(i, place).level >= level

            def named(i: int, place: _Place, proven: Callable[[int, _Place], bool] = proven) -> bool:
                return self.same_name(i, place) and proven(i, place)

            self.settle(named, f"name and {words}")
            self.settle(proven, words)
        self.assemble()
        similar = "similar values"
        self.settle(lambda i, p: self.same_name(i, p) and self.evidence(i, p).score >= SIMILAR, f"name and {similar}")
        self.settle_similar()
        self.settle(lambda i, p: self.whole(i, p) and self.evidence(i, p).zeros, "zero pattern")
        self.settle(self.named_alone(), "name")
        self.settle(self.whole, "shape")
        self.check()

    # what may be compared with what

    def places(self, i: int) -> list[_Place]:
        """Where one of ours may lie in the file."""
        if i not in self._places:
            self._places[i] = [_Place(j, row) for j in range(len(self.theirs)) for row in self._rows(i, j)]
        return self._places[i]

    def _rows(self, i: int, j: int) -> Iterator[int]:
        ours, theirs = self.ours[i].shape, self.theirs[j].shape
        if ours[1:] != theirs[1:] or theirs[0] < ours[0]:
            return
        if ours[0] == theirs[0]:
            yield 0
        elif not self.theirs[j].embedding:
            step = math.gcd(ours[0], theirs[0])
            last = theirs[0] - ours[0]
            yield from range(0, last + 1, step if last // step < OFFSETS else ours[0])

    def block(self, i: int, place: _Place) -> np.ndarray:
        return self.theirs[place.theirs].rows[place.row : place.row + self.ours[i].shape[0]]

    def whole(self, i: int, place: _Place) -> bool:
        """Same shape, and both or neither an embedding: enough to go by shape or name alone."""
        ours, theirs = self.ours[i], self.theirs[place.theirs]
        return ours.shape == theirs.shape and ours.embedding == theirs.embedding

    def same_name(self, i: int, place: _Place) -> bool:
        ours, theirs = self.ours[i], self.theirs[place.theirs]
        return ours.shape == theirs.shape and theirs.weight.name in ours.weight.names

    def evidence(self, i: int, place: _Place) -> _Evidence:
        key = (i, place)
        if key not in self._evidence:
            ours, theirs = self.ours[i], self.theirs[place.theirs]
            tolerance = max(_epsilon(ours.weight), _epsilon(theirs.weight))
            self._evidence[key] = _compare(ours.rows, self.block(i, place), tolerance, ours.normalised)
        return self._evidence[key]

    # settling

    def settle(self, accept: Callable[[int, _Place], bool], how: str) -> None:
        """Settle what evidence of one kind makes mutually unique, until nothing moves."""
        open_ = [i for i in range(len(self.ours)) if i not in self.settled]
        table = {i: [place for place in self.places(i) if accept(i, place)] for i in open_}
        moved = True
        while moved:
            moved = False
            for i in [i for i in open_ if i not in self.settled]:
                free = [place for place in table[i] if self.free(i, place)]
                if not free or not all(self.alike(i, free[0], place) for place in free[1:]):
                    continue
                rivals = {o: table[o] for o in open_ if o != i and o not in self.settled}
                for place in free:
                    if not any(self.wants(o, rivals[o], i, place) for o in rivals):
                        self.settled[i] = ([place], how, self.evidence(i, place).level)
                        moved = True
                        break

    def wants(self, other: int, places: Sequence[_Place], i: int, place: _Place) -> bool:
        """Whether another of ours could have a block as well, with other values than this one's."""
        near = [p for p in places if self.overlap(i, place, other, p)]
        return any(self.free(other, p) for p in near) and not self.twins(i, other)

    def settle_similar(self) -> None:
        """Settle weights that were trained on: the best correlation on both sides, by a margin."""
        open_ = [i for i in range(len(self.ours)) if i not in self.settled]
        scores = {(i, p): self.evidence(i, p).score for i in open_ for p in self.places(i) if self.free(i, p)}

        def best(i: int, place: _Place) -> bool:
            score = scores.get((i, place), 0.0)
            if score < SIMILAR:
                return False
            for (other, p), rival in scores.items():
                same = other == i and not self.alike(i, place, p)
                across = other != i and self.overlap(i, place, other, p) and not self.twins(i, other)
                if (same or across) and rival > score - MARGIN:
                    return False
            return True

        self.settle(best, "similar values")

    def assemble(self) -> None:
        """Settle those of ours that are made of several of theirs, one block of rows after the other."""
        for i, ours in enumerate(self.ours):
            places: list[_Place] = []
            level, row = _Level.EXACT, 0
            while i not in self.settled and row < ours.shape[0]:
                found: dict[int, _Level] = {}
                for j, theirs in enumerate(self.theirs):
                    count = theirs.shape[0]
                    if theirs.shape[1:] == ours.shape[1:] and count < ours.shape[0] and row + count <= ours.shape[0]:
                        tolerance = max(_epsilon(ours.weight), _epsilon(theirs.weight))
                        seen = _compare(ours.rows[row : row + count], theirs.rows, tolerance, ours.normalised).level
                        if seen:
                            found[j] = seen
                if not found or not all(_same(self.theirs[j].rows, self.theirs[min(found)].rows) for j in found):
                    break
                places.append(_Place(min(found), 0))
                level = min(level, found[min(found)])
                row += self.theirs[min(found)].shape[0]
            if places and row == ours.shape[0]:
                self.settled[i] = (places, f"equal values, in {len(places)} blocks", level)

    def named_alone(self) -> Callable[[int, _Place], bool]:
        """Names that no value bears out: believed where every open weight of that shape finds its name in the file."""
        open_ = [i for i in range(len(self.ours)) if i not in self.settled]
        lost = {self.ours[i].shape for i in open_ if not any(self.same_name(i, p) for p in self.places(i))}
        return lambda i, place: self.same_name(i, place) and self.ours[i].shape not in lost

    def free(self, i: int, place: _Place) -> bool:
        """Whether a block is nobody's, or that of one of ours that equals this one."""
        for other, (taken, _, _) in self.settled.items():
            for p in taken:
                if self.overlap(i, place, other, p) and not (p == place and self.twins(i, other)):
                    return False
        return True

    def overlap(self, i: int, place: _Place, other: int, p: _Place) -> bool:
        if place.theirs != p.theirs:
            return False
        return place.row < p.row + self.ours[other].shape[0] and p.row < place.row + self.ours[i].shape[0]

    def twins(self, i: int, other: int) -> bool:
        """Whether two of ours are equal, so that the file may hold one copy for both."""
        return _same(self.ours[i].rows, self.ours[other].rows)

    def alike(self, i: int, place: _Place, p: _Place) -> bool:
        """Whether two blocks of the file are equal, so that it does not matter which one is meant."""
        return place == p or _same(self.block(i, place), self.block(i, p))

    # what comes out

    def check(self) -> None:
        """Refuse what was left open, and a second copy in the file that was pruned otherwise than the first."""
        open_ = [i for i in range(len(self.ours)) if i not in self.settled and not self.ours[i].embedding]
        if open_:
            raise PruneError(self._ambiguous(open_))
        taken = {place.theirs for places, _, _ in self.settled.values() for place in places}
        for i, (places, _, level) in self.settled.items():
            for p in [p for p in self.places(i) if p.theirs not in taken and level >= _Level.ROUNDED]:
                if self.evidence(i, p).level < _Level.ROUNDED or _same(self.block(i, p) != 0, self._joined(i) != 0):
                    continue
                weight = self.ours[i].weight
                first, second = (self.theirs[x.theirs].weight.name for x in (places[0], p))
                raise PruneError(
                    f"the file holds '{weight.name}' {list(weight.shape)} twice, as '{first}' and '{second}', with "
                    "different zeros; prune both alike, or export them as one initializer"
                )

    def result(self) -> dict[str, Match]:
        return {self.ours[i].weight.name: self._match(i) for i in range(len(self.ours)) if i in self.settled}

    def _joined(self, i: int) -> np.ndarray:
        places, _, _ = self.settled[i]
        if len(places) == 1:
            return self.block(i, places[0])
        return np.concatenate([self.theirs[p.theirs].rows for p in places])

    def _match(self, i: int) -> Match:
        places, how, level = self.settled[i]
        side, weight = self.ours[i], self.ours[i].weight
        found = self._joined(i).reshape(weight.role_shape)
        keep = found != 0
        folded = side.normalised and not all(self.theirs[p.theirs].normalised for p in places)
        values = None
        if level == _Level.EXACT or (level != _Level.FACTOR and not folded):
            read = weight.stored(np.ones(weight.role_shape, np.bool_), fill=False)
            values = np.where(
                read, weight.stored(np.where(keep, found, 0).astype(weight.dtype), fill=0), weight.storage.read()
            )
        names = tuple(self.theirs[p.theirs].weight.name for p in places)
        return Match(weight.name, names, how, weight.stored(keep, fill=True), values)

    def _ambiguous(self, open_: Sequence[int]) -> str:
        lines = []
        for i in open_[:5]:
            weight = self.ours[i].weight
            free = dict.fromkeys(p.theirs for p in self.places(i) if self.free(i, p))
            names = [f"'{self.theirs[j].weight.name}'" for j in free]
            listed = (
                f"candidates: {', '.join(names[:6] + ['...'] * (len(names) > 6))}"
                if names
                else "no candidate of its shape"
            )
            lines.append(f"'{weight.name}' {list(weight.shape)} ({', '.join(weight.op_types)}): {listed}")
        more = f"; and {len(open_) - 5} more" if len(open_) > 5 else ""
        return (
            f"{len(open_)} of {len(self.ours)} weights cannot be found in the file or told apart: {'; '.join(lines)}"
            f"{more}. Neither names nor surviving values decide; load the weights that the file was exported from into "
            "the model, or prune a file that keeps the parameters' names"
        )


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two matrices are equal; most are not, and the first row says so."""
    return a.shape == b.shape and np.array_equal(a[:1], b[:1]) and np.array_equal(a, b)


def _compare(a: np.ndarray, b: np.ndarray, tolerance: float, normalised: bool) -> _Evidence:
    """What theirs, b, has in common with ours, a: two matrices of one shape."""
    if a.size > 2**16:  # most pairs have nothing in common, and a few rows say so
        few = np.linspace(0, len(a) - 1, min(len(a), 2 + 2**14 // a.shape[1])).astype(np.int64)
        sample = _compare_all(a[few], b[few], tolerance, normalised)
        if np.count_nonzero(b[few]) > 256 and sample.score < SIMILAR / 2 and not sample.level and not sample.zeros:
            return sample
    return _compare_all(a, b, tolerance, normalised)


def _compare_all(a: np.ndarray, b: np.ndarray, tolerance: float, normalised: bool) -> _Evidence:
    live = b != 0
    count = int(np.count_nonzero(live))
    none = a == 0
    share = 1 - count / max(b.size, 1)
    zeros = 0 < share < 1 and not np.any(none & live) and np.count_nonzero(none) * math.log(share) < math.log(1e-6)
    if not count:
        return _Evidence(_Level.NONE, 0.0, zeros)
    if np.array_equal(np.where(live, a, np.zeros((), a.dtype)), b):
        return _Evidence(_Level.EXACT, 1.0, zeros)
    x, y = np.where(live, a, 0).astype(np.float64), b.astype(np.float64)
    counts = np.count_nonzero(live, axis=1)
    largest = np.abs(y).max(axis=1, keepdims=True)
    if np.all(np.abs(x - y) <= tolerance * (np.abs(y) + largest * 1e-3)):
        return _Evidence(_Level.ROUNDED, 1.0, zeros)
    xy, xx, yy = ((p * q).sum(axis=1) for p, q in ((x, y), (x, x), (y, y)))
    degrees = int(np.maximum(counts - 1, 0).sum())
    factor = np.divide(xy, xx, out=np.zeros_like(xy), where=xx > 0)[:, None]
    level = _Level.NONE
    if degrees >= DEGREES and np.all(np.abs(y - factor * x) <= 4 * tolerance * largest):
        level = _Level.FACTOR
    return _Evidence(level, _row_score(xy, xx, yy, counts) if normalised else _score(xy, xx, yy, count), zeros)


def _score(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray, count: int) -> float:
    """Cosine over the survivors; 0 within what chance gives."""
    scale = math.sqrt(float(xx.sum()) * float(yy.sum()))
    cosine = float(xy.sum()) / scale if scale else 0.0
    return cosine if cosine * math.sqrt(count) > 5 else 0.0


def _row_score(xy: np.ndarray, xx: np.ndarray, yy: np.ndarray, counts: np.ndarray) -> float:
    """Mean |cosine| of the outputs, each of which may have a factor of its own, with what chance gives taken off."""
    several = counts > 1
    total = int((counts[several] - 1).sum())
    if total < 4 * DEGREES:
        return 0.0
    scale = np.sqrt(xx * yy)
    cosine = np.abs(np.divide(xy, scale, out=np.zeros_like(xy), where=scale > 0))[several]
    n = counts[several]
    chance = float((np.sqrt(2 / (np.pi * n)) * n).sum() / n.sum())
    return max(0.0, (float((cosine * n).sum() / n.sum()) - chance) / (1 - chance))


def _epsilon(weight: Weight) -> float:
    """The relative error that a value may have picked up on its way through a type."""
    precision = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-5}
    return precision.get(weight.dtype.name, 1e-5)


def _followed(weight: Weight, by: Callable[[ir.Node], bool]) -> bool:
    """Whether an operator's output goes on to a node of some kind, past a bias and changes of its shape."""

    def reaches(value: ir.Value, depth: int) -> bool:
        for node, _ in value.uses():
            passing = node.op_type in _PASSING or (node.op_type == "Add" and _is_constant(node, value))
            if by(node) or (depth and passing and reaches(node.outputs[0], depth - 1)):
                return True
        return False

    return any(reaches(use.site.outputs[0], 3) for use in weight.uses if use.site is not None)


_PASSING = {"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast"}


def _is_norm(node: ir.Node) -> bool:
    return node.op_type == "BatchNormalization"


def _is_scale(node: ir.Node) -> bool:
    """A product with a constant, as an exporter leaves of a normalisation that it does not fold."""
    return node.op_type == "Mul" and any(_is_constant(node, value) for value in node.inputs)


def _is_constant(node: ir.Node, value: ir.Value | None) -> bool:
    """Whether all inputs of a node but one are constants."""
    others = [other for other in node.inputs if other is not None and other is not value]
    return bool(others) and all(other.const_value is not None for other in others)
