"""Selection without masks: the lowest magnitudes of values in files, as a threshold and what to do with its ties.

What `select.lowest` selects are the entries up to some magnitude, and of those of that very magnitude the first ones.
Those two numbers say it all: they take a few passes over the values to find, in chunks that stay in cache, and no
memory that grows with a model. Whoever needs the entries compares the values once more.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from onnxprune import progress
from onnxprune.algorithms.select import (
    GUESSES,
    KEYS,
    MAX_THREADS,
    ROOM,
    SPAN,
    THREADED,
    Bag,
    bracket,
    where,
)
from onnxprune.errors import PruneError
from onnxprune.graph.stored import CHUNK
from onnxprune.graph.values import Values
from onnxprune.graph.weights import Weight

BLOCKS, BLOCK = 1 << 10, 64
"""The first bracket is guessed from so many runs of so many values, at most: a run costs a reading of the file."""

LEAST = 1 << 7
"""Runs of values that the first bracket is guessed from, at least."""

WHOLE = 1 << 16
"""Up to so many values are gathered without a guess."""

BINS = 1 << 16
"""Into which ties are counted where their order is not that in memory."""

Array = np.ndarray[Any, Any]
Run = Callable[[Callable[["_Span"], Any], Iterable["_Span"]], Iterable[Any]]


class NotFinite(Exception):  # noqa: N818  (a finding, not an error)
    """Values that have no rank."""

    def __init__(self, index: int) -> None:
        """Whose values they are."""
        super().__init__(index)
        self.index = index


@dataclass(frozen=True)
class Cut:
    """Which entries of a weight go: those of a smaller magnitude, and the first ones of the very magnitude.

    Attributes:
        dtype: in which magnitudes are compared.
        key: the magnitude's bits.
        last: C-order index in role order of the last entry of that magnitude that goes; -1 where none does.
        removed: how many entries go.
        zeros: how many were zero before.
    """

    dtype: np.dtype[Any]
    key: int
    last: int
    removed: int
    zeros: int

    @property
    def zeros_after(self) -> int:
        """How many entries are zero when what goes is: zeros go first."""
        return max(self.removed, self.zeros)

    def gone(self, values: Values, part: Array, start: int) -> Array:
        """Which of the values go, of a part in memory order that starts at an element; the thread's own buffer."""
        keys = _keys(part, self.dtype, _scratch("keys", KEYS[self.dtype], part.size))
        gone = _scratch("gone", np.bool_, part.size)
        if self.last >= values.size - 1:
            return np.less_equal(keys, self.key, out=gone)
        np.less(keys, self.key, out=gone)
        if self.last >= 0:
            ties = where(np.equal(keys, self.key))
            gone[ties[values.places(ties + start) <= self.last]] = True
        return gone


@dataclass(frozen=True)
class Zeroing:
    """A cut carried out on a stored tensor, all at once or part by part."""

    cut: Cut
    values: Values

    def __call__(self, array: Array) -> Array:
        """The tensor with zeros in it."""
        out = np.array(array)
        self.part(out.reshape(-1), 0)
        return out

    def part(self, values: Array, start: int) -> None:
        """Put zeros into a part of it."""
        gone = self.cut.gone(self.values, values, start)
        bits = values.view(f"u{values.dtype.itemsize}")
        np.multiply(bits, np.logical_not(gone, out=gone), out=bits)  # as integers: leaves neither a sign nor a NaN


def cuts(values: Sequence[Values], count: int, threads: int | None = None) -> list[Cut]:
    """The cuts of the `count` entries of smallest magnitude over all weights together.

    They select what `select.lowest` does, in every weight: ties go to the earlier weight, then to the lower index in
    role order. All is the same for every number of threads.

    Args:
        values: of each weight; float16, bfloat16, float32 or float64, in any mixture.
        count: how many entries to remove in total.
        threads: how many threads to use on large weights; by default one per CPU, at most 8.

    Raises:
        NotFinite: a value is NaN or infinite.
        PruneError: there are fewer entries.
    """
    total = sum(v.size for v in values)
    if not 0 <= count <= total:
        raise PruneError(f"cannot remove {count} entries: there are {total}")
    return _cuts(values, count, threads, None)


def _cuts(values: Sequence[Values], count: int, threads: int | None, advance: progress.Advance | None) -> list[Cut]:
    """`cuts`; says how far the first pass is, or shows each."""
    total = sum(v.size for v in values)
    workers = 1 if total < THREADED else threads or min(os.cpu_count() or 1, MAX_THREADS)
    if workers == 1:
        return _Search(values, count, map, ROOM, advance).run()
    with ThreadPoolExecutor(workers) as pool:
        return _Search(values, count, pool.map, ROOM * workers, advance).run()


def each(values: Sequence[Values], counts: Sequence[int]) -> list[Cut]:
    """`cuts` of each weight on its own: weights beside each other, one that is much of the whole in parallel itself."""
    workers = min(os.cpu_count() or 1, MAX_THREADS)
    share = max(THREADED, sum(v.size for v in values) // (4 * workers))
    small = [v.size <= share for v in values]
    work = list(zip(values, counts, small, strict=True))
    total = sum(v.size * v.dtype.itemsize for v in values)
    with (
        progress.task("looking for the smallest weights", total) as advance,
        ThreadPoolExecutor(workers) as pool,
    ):
        running = [pool.submit(_cuts, [v], count, 1, advance) if s else None for v, count, s in work]
        found = []
        for index, ((v, count, _), run) in enumerate(zip(work, running, strict=True)):
            try:
                found += _cuts([v], count, None, advance) if run is None else run.result()
            except NotFinite:
                for other in running:
                    if other is not None:
                        other.cancel()
                raise NotFinite(index) from None
    return found


def kept(cut: Cut, values: Values, weight: Weight) -> Array:
    """The mask of a cut: a boolean array of the weight's stored shape, True is kept."""
    gone = np.empty(values.size, np.bool_)
    at = 0
    for part in values.chunks(0, values.size, np.empty(CHUNK, np.uint8)):
        gone[at : at + part.size] = cut.gone(values, part, at)
        at += part.size
    stays = np.logical_not(gone, out=gone)
    if values.in_file:
        return stays.reshape(weight.shape)
    order = np.argsort(values.axes, kind="stable")
    return weight.stored(stays.reshape([values.shape[axis] for axis in values.axes]).transpose(order))


def _keys(part: Array, dtype: np.dtype[Any], out: Array | None = None) -> Array:
    """The bits of magnitudes, as integers that order alike."""
    key = KEYS[dtype]
    part = part if part.dtype == dtype else part.astype(dtype)
    magnitude = key.type(np.iinfo(key).max >> 1)
    return np.asarray(np.bitwise_and(part.view(key), magnitude, out=None if out is None else out.view(key)))


_THREAD = threading.local()


def _scratch(name: str, dtype: Any, size: int) -> Array:
    """A thread's own buffer, kept: touching fresh memory costs more than the work on it."""
    found: Array | None = getattr(_THREAD, name, None)
    if found is None or found.size < size or found.dtype != dtype:
        found = np.empty(size, dtype)
        setattr(_THREAD, name, found)
    return found[:size]


@dataclass(frozen=True)
class _Span:
    """Some values of one weight, and how many come before those of that weight."""

    index: int
    values: Values
    first: int
    start: int
    stop: int

    def chunks(self, dtype: np.dtype[Any]) -> Iterator[tuple[Array, int]]:
        """Keys (in the thread's buffer) and where in memory order they start."""
        at = self.start
        buffer = _scratch("values", np.uint8, CHUNK // dtype.itemsize * self.values.dtype.itemsize)
        for part in self.values.chunks(self.start, self.stop, buffer):
            own = self.values.in_file and part.dtype == dtype
            yield _keys(part, dtype, part if own else _scratch("keys", KEYS[dtype], part.size)), at
            at += part.size


class _Search:
    """A bracket of keys that is made smaller by passes over the values."""

    def __init__(
        self, values: Sequence[Values], count: int, run: Run, room: int, advance: progress.Advance | None
    ) -> None:
        dtypes = {v.dtype for v in values}
        wide = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
        self.dtype = dtypes.pop() if len(dtypes) == 1 else wide
        self.key = KEYS[self.dtype]
        self.infinity = int(np.array(np.inf, self.dtype).view(self.key))
        self.values, self.count, self.run_, self.room, self.advance = values, count, run, room, advance
        self.bytes = sum(v.size * v.dtype.itemsize for v in values)
        self.firsts = np.cumsum([0, *(v.size for v in values)]).tolist()
        self.total: int = self.firsts[-1]
        self.zeros = np.zeros(len(values), np.int64)
        self.spans = [
            _Span(index, v, self.firsts[index], start, min(start + SPAN, v.size))
            for index, v in enumerate(values)
            for start in range(0, v.size, SPAN)
        ]

    def run(self) -> list[Cut]:
        """Find the cuts."""
        low, high = 0, self.infinity  # the key wanted is at least low and less than high,
        below_low, below_high = 0, self.total  # and so many keys are less than low, and than high
        sample, design = self.sample()
        passes = 0
        while True:
            need = self.count - below_low
            if high - low == 1 or passes >= GUESSES:
                left, right = low, max((low + high) // 2, low + 1)
            else:
                left, right = bracket(sample, need / max(below_high - below_low, 1), low, high, design)
            bag = Bag(self.room, self.key, self.total)
            below, inside = self.tally(left, right, bag, first=passes == 0)
            passes += 1
            if self.count == 0:
                return [Cut(self.dtype, 0, -1, 0, int(zeros)) for zeros in self.zeros]
            below_left, below_right = int(below.sum()), int(below.sum() + inside.sum())
            if self.count <= below_left:
                high, below_high = left, below_left
            elif self.count > below_right:
                low, below_low = right, below_right
            elif right - left == 1:
                return self.crowd(left, below, inside)
            elif bag.size == below_right - below_left:
                return self.gathered(bag, below)
            else:
                low, high, below_low, below_high = left, right, below_left, below_right
                sample, design = bag.keys[: bag.size], 1.0
            sample = sample[(sample >= low) & (sample < high)]

    def tally(self, left: int, right: int, bag: Bag, first: bool) -> tuple[Array, Array]:
        """How many keys of each weight are less than left, and in [left, right); those are gathered."""
        below, inside = np.zeros(len(self.values), np.int64), np.zeros(len(self.values), np.int64)
        count = partial(_tally, search=self, left=left, right=right, bag=bag, first=first)
        own = None if self.advance is None else contextlib.nullcontext(self.advance if first else _nothing)
        with own or progress.task("looking for the smallest weights", self.bytes) as advance:
            for span, found in zip(self.spans, self.run_(count, self.spans), strict=True):
                below[span.index] += found[0]
                inside[span.index] += found[1]
                self.zeros[span.index] += found[2]
                advance((span.stop - span.start) * span.values.dtype.itemsize)
        return below, inside

    def sample(self) -> tuple[Array, float]:
        """Some keys, drawn in runs evenly from all weights, and how much less they tell than as many drawn singly."""
        if self.total <= WHOLE:
            return np.empty(0, self.key), 1.0
        # What falls into a bracket of six standard deviations shall fill half of the room, if so many runs can do that.
        room = self.room // (self.key.itemsize + 4)
        blocks = min(max((6 * self.total // room) ** 2 // BLOCK, LEAST), BLOCKS)
        random = np.random.default_rng(0)
        starts = np.arange(blocks) * self.total // blocks
        starts += random.integers(0, max(self.total // blocks - BLOCK, 1), blocks)
        index = np.searchsorted(self.firsts, starts, "right") - 1
        parts = [
            _keys(self.values[which].runs((starts[index == which] - self.firsts[which]).tolist(), BLOCK), self.dtype)
            for which in np.unique(index).tolist()
        ]
        sample = np.concatenate(parts)
        guess = np.partition(sample, place := min(self.count * sample.size // self.total, sample.size - 1))[place]
        share = (sample[: sample.size // BLOCK * BLOCK].reshape(-1, BLOCK) < guess).mean(1)
        mean = float(share.mean())
        single = math.sqrt(mean * (1 - mean) / BLOCK)
        return sample[sample < self.infinity], max(1.0, float(share.std()) / single if single > 0 else 1.0)

    def gathered(self, bag: Bag, below: Array) -> list[Cut]:
        """The cuts where all keys that matter are in a bag."""
        keys, places = bag.keys[: bag.size], bag.places[: bag.size].astype(np.int64)
        quota = self.count - int(below.sum())
        key = int(np.partition(keys, quota - 1)[quota - 1])
        parts = np.searchsorted(self.firsts, places, "right") - 1
        removed = below + np.bincount(parts[keys < key], minlength=below.size)
        quota = self.count - int(removed.sum())
        tied = [places[(keys == key) & (parts == index)] - self.firsts[index] for index in range(below.size)]
        lasts = []
        for index, at in enumerate(tied):
            taken = min(quota, at.size)
            order = np.sort(self.values[index].places(at)) if taken else at
            lasts.append(self.values[index].size if taken == at.size else int(order[taken - 1]) if taken else -1)
            removed[index] += taken
            quota -= taken
        return [
            Cut(self.dtype, key, last, int(gone), int(zeros))
            for last, gone, zeros in zip(lasts, removed, self.zeros, strict=True)
        ]

    def crowd(self, key: int, below: Array, inside: Array) -> list[Cut]:
        """The cuts where one key is too frequent to be gathered."""
        quota = self.count - int(below.sum())
        lasts = []
        for index, ties in enumerate(inside.tolist()):
            taken = min(quota, ties)
            lasts.append(self.values[index].size if taken == ties else self.tie(index, key, taken) if taken else -1)
            below[index] += taken
            quota -= taken
        return [
            Cut(self.dtype, key, last, int(gone), int(zeros))
            for last, gone, zeros in zip(lasts, below, self.zeros, strict=True)
        ]

    def tie(self, index: int, key: int, number: int) -> int:
        """The place of one of the entries of a key, counted in role order from 1."""
        spans = [span for span in self.spans if span.index == index]
        size = self.values[index].size
        width = -(-size // BINS)
        counts = sum(self.run_(partial(_ties, dtype=self.dtype, key=key, low=0, high=size, width=width), spans))
        ends = np.cumsum(counts)
        bin_ = int(np.searchsorted(ends, number))
        number -= int(ends[bin_ - 1]) if bin_ else 0
        low, high = bin_ * width, min((bin_ + 1) * width, size)
        counts = sum(self.run_(partial(_ties, dtype=self.dtype, key=key, low=low, high=high, width=1), spans))
        return low + int(np.searchsorted(np.cumsum(counts), number))


def _nothing(count: int) -> None:
    pass


def _tally(span: _Span, search: _Search, left: int, right: int, bag: Bag, first: bool) -> tuple[int, int, int]:
    """Gather what is in [left, right), unless that is a single key; count what is less, what is inside, and zeros."""
    below = inside = zeros = 0
    for keys, at in span.chunks(search.dtype):
        less = np.less(keys, left, out=_scratch("less", np.bool_, keys.size))
        within = np.less(keys, right, out=_scratch("within", np.bool_, keys.size))
        below += int(np.count_nonzero(less))
        within ^= less
        if right - left > 1:
            chosen = where(within)
            inside += chosen.size
            bag.add(keys.take(chosen), chosen + (span.first + at))
        else:
            inside += int(np.count_nonzero(within))
        if first:
            zeros += keys.size - int(np.count_nonzero(keys))
            if keys.max() >= search.infinity:
                raise NotFinite(span.index)
    return below, inside, zeros


def _ties(span: _Span, dtype: np.dtype[Any], key: int, low: int, high: int, width: int) -> Array:
    """How many entries of a key lie in each stretch of so many places between low and high."""
    counts = np.zeros(-(-(high - low) // width), np.int64)
    for keys, at in span.chunks(dtype):
        places = span.values.places(where(np.equal(keys, key)) + at)
        if low or width == 1:
            places = places[(places >= low) & (places < high)]
        counts += np.bincount((places - low) // width, minlength=counts.size)
    return counts
