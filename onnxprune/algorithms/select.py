"""Exact selection of the entries of smallest magnitude, at the speed of memory.

The bits of a float without its sign, read as an unsigned integer (here its *key*), order as its magnitude does. So
ranks are counted on integers: nothing rounds, -0.0 equals 0.0, and denormals are numbers like any other.

The key of the wanted rank is first bracketed between two quantiles of a sample. One pass over the data, in chunks that
stay in cache, marks and counts the keys below the bracket and gathers the few inside with their places; the lowest of
those are then marked too. The sample only guesses, the counts decide: where the rank is not in the bracket, or the
bracket holds too many keys to gather, the next pass works on the part that must hold it. Where that comes down to one
key that crowds the data (zeros, say), two more passes mark what is below it and as many of the crowd as are wanted.
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
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from onnxprune.errors import PruneError

CHUNK = 1 << 20  # bytes of keys worked on at a time: with what is compared, they stay in cache
SPAN = 1 << 20  # elements given to a thread at a time
SAMPLE = 1 << 16  # keys sampled for the first bracket, at most,
ONE_IN = 128  # and at most one in so many
ROOM = 3 << 19  # bytes gathered per thread and pass, at most
WHOLE = 1 << 13  # up to so many elements are gathered without sampling
PROBED = 64  # entries of an array looked at for whether what is held is zero
THREADED = 1 << 22  # fewer elements are not worth starting threads for
MAX_THREADS = 8  # by default: a few cores saturate memory
GUESSES = 6  # passes that trust a sample; any later one halves the range of keys

Array = np.ndarray[Any, Any]
Result = TypeVar("Result")
Run = Callable[[Callable[["_Span"], Any], Iterable["_Span"]], Iterable[Any]]

KEYS: dict[np.dtype[Any], np.dtype[Any]] = {
    np.dtype(np.float16): np.dtype(np.uint16),
    np.dtype(ml_dtypes.bfloat16): np.dtype(np.uint16),
    np.dtype(np.float32): np.dtype(np.uint32),
    np.dtype(np.float64): np.dtype(np.uint64),
}


def lowest(
    scores: Sequence[Array],
    count: int,
    *,
    held: Sequence[Array | None] | None = None,
    threads: int | None = None,
    out: Sequence[Array] | None = None,
) -> list[Array]:
    """Select the `count` entries of smallest |score| over all arrays together.

    Ties go to the earlier array, then to the lower index in C order (of the array as passed, whatever its strides).
    The result is the same on every machine and for every number of threads.

    Args:
        scores: float16, bfloat16, float32 or float64 arrays of any shapes and strides, in any mixture; only read.
            An infinite score is never selected.
        count: how many entries to select in total.
        held: for each score array None or a bool array of its shape: entries selected whatever their score. They count
            towards `count`; where there are more of them, exactly they are selected.
        threads: how many threads to use on a large input; by default one per CPU, at most 8.
        out: arrays for the result, as `booleans(scores)` makes them.

    Returns:
        For each score array a bool array of its shape and memory layout, True = selected: max(count, held) in total.

    Raises:
        PruneError: if fewer than `count` entries can be selected, a score is NaN, or the arguments do not fit together.
    """
    masks = [None] * len(scores) if held is None else list(held)
    _check(scores, count, masks, threads)
    results = booleans(scores) if out is None else list(out)
    total = sum(score.size for score in scores)
    workers = 1 if total < THREADED else threads or min(os.cpu_count() or 1, MAX_THREADS)
    if count and any(mask is not None for mask in masks) and _seem_zero(scores, masks):
        with contextlib.suppress(PruneError):  # what is held may be infinite or NaN
            _run(_parts(scores, [None] * len(scores), results), count, workers)
            if all(_within(mask, result) for mask, result in zip(masks, results, strict=True) if mask is not None):
                return results
    need = count - sum(int(np.count_nonzero(mask)) for mask in masks if mask is not None)
    if need <= 0:
        for result, mask in zip(results, masks, strict=True):
            result[...] = False if mask is None else mask
        return results
    _run(_parts(scores, masks, results), need, workers)
    return results


def _run(parts: list[_Part], need: int, workers: int) -> None:
    if workers == 1:
        _select(parts, need, map, ROOM)
    else:
        with ThreadPoolExecutor(workers) as pool:
            _select(parts, need, pool.map, ROOM * workers)


def _seem_zero(scores: Sequence[Array], held: Sequence[Array | None]) -> bool:
    """Whether what is held has no score, as far as a few entries tell: weights pruned before are zero.

    Then it is most likely among the lowest anyhow, and selecting without a look at what is held, which takes half as
    long, finds the same.
    """
    for score, mask in zip(scores, held, strict=True):
        if mask is not None and mask.size:
            places = np.linspace(0, score.size - 1, min(score.size, PROBED), dtype=np.int64)
            if np.any(score.flat[places][mask.flat[places]] != 0):
                return False
    return True


def _within(held: Array, result: Array) -> bool:
    """Whether all that is held is marked."""
    modes: Any = [["readonly"], ["readonly"]]
    with np.nditer([held, result], ["buffered", "external_loop", "zerosize_ok"], modes, buffersize=CHUNK // 2) as walk:
        return not any(np.greater(h, r, out=scratch("within")[: h.size]).any() for h, r in walk)


def side_by_side(function: Callable[..., Result], *arguments: Sequence[Any], size: int) -> list[Result]:
    """`map`, in several threads where there are `size` elements to work on and that is worth it."""
    if size < THREADED:
        return list(map(function, *arguments))
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        return list(pool.map(function, *arguments))


def booleans(arrays: Iterable[Array]) -> list[Array]:
    """Bool arrays of undefined values, of the shapes and memory layouts of others, in one piece of memory.

    One large allocation is given in large pages; many of a few MB take longer to be touched than to be worked on.
    """
    arrays = list(arrays)
    whole = np.empty(sum(array.size for array in arrays), np.bool_)
    ends = np.cumsum([array.size for array in arrays])
    pieces = []
    for array, end in zip(arrays, ends.tolist(), strict=True):
        strides = np.empty_like(array, dtype=bool, subok=False).strides
        pieces.append(np.lib.stride_tricks.as_strided(whole[end - array.size : end], array.shape, strides))
    return pieces


def zero(values: Array, removed: Array, out: Array) -> None:
    """Write `values` into `out`, with exactly +0.0 where `removed` is True.

    The three have one shape and any strides; `values` and `out` have one dtype, of 1, 2, 4 or 8 bytes. `out` may be
    `values` itself.

    Raises:
        PruneError: if shapes or dtypes are otherwise.
    """
    if not values.shape == removed.shape == out.shape or values.dtype != out.dtype or removed.dtype != np.bool_:
        raise PruneError(
            "zeroing expects values and out of one shape and dtype and a bool array of that shape, but got "
            f"{_kind(values)}, {_kind(out)} and {_kind(removed)}"
        )
    bits = np.dtype(f"u{values.dtype.itemsize}")
    operands = values.view(bits), removed, out.view(bits)
    modes: Any = [["readonly"], ["readonly"], ["writeonly"]]
    length = CHUNK // bits.itemsize
    with np.nditer(operands, ["buffered", "external_loop", "zerosize_ok"], modes, buffersize=length) as chunks:
        for value, gone, target in chunks:
            np.multiply(value, ~gone, out=target)  # of bits, as integers: times 0 leaves neither a sign nor a NaN


@dataclass(frozen=True)
class _Part:
    """One score array, with its axes in memory order: an entry's *place* is `first` + its index in that order."""

    index: int
    first: int
    axes: tuple[int, ...]  # what axis of the array as passed each axis is
    score: Array
    held: Array | None
    result: Array
    dtype: np.dtype[Any]  # represents every value of all the score arrays exactly

    def spans(self) -> list[_Span]:
        return [_Span(self, start, min(start + SPAN, self.score.size)) for start in range(0, self.score.size, SPAN)]

    def logical(self, at: Array) -> Array:
        """C-order indices in the array as passed of the elements with such indices in memory order."""
        if len(self.axes) < 2:
            return at
        order = np.argsort(self.axes)
        coordinates = np.unravel_index(at, self.result.shape)
        shape = [self.result.shape[axis] for axis in order]
        return np.asarray(np.ravel_multi_index([coordinates[axis] for axis in order], shape))


@dataclass(frozen=True)
class _Span:
    """The elements of a part from start to stop in memory order."""

    part: _Part
    start: int
    stop: int

    def chunks(self) -> Iterator[tuple[Array, Array | None, Array, int]]:
        """Chunk by chunk the keys (in the thread's buffer), which of them are held, result and the first place."""
        part = self.part
        key = KEYS[part.dtype]
        magnitude = key.type(np.iinfo(key).max >> 1)
        boolean = np.dtype(np.bool_)
        flags: Any = ["buffered", "external_loop", "ranged"]
        modes: Any = [["readonly"], ["readwrite"], ["readonly"]]
        arrays = [part.score, part.result] if part.held is None else [part.score, part.result, part.held]
        dtypes, modes = [part.dtype, boolean, boolean][: len(arrays)], modes[: len(arrays)]
        length = min(CHUNK // key.itemsize, self.stop - self.start)
        buffer = scratch("keys").view(key)
        place = part.first + self.start
        with np.nditer(arrays, flags, modes, dtypes, "C", "safe", buffersize=length) as chunks:
            chunks.iterrange = (self.start, self.stop)  # type: ignore[misc]  # numpy's stubs have it read-only
            for score, result, *held in chunks:
                keys = np.bitwise_and(score.view(key), magnitude, out=buffer[: score.size])
                yield keys, held[0] if held else None, result, place
                place += score.size


_THREAD = threading.local()


def scratch(name: str) -> Array:
    """A thread's own buffer, kept: touching fresh memory costs more than the work on it.

    "keys" and "values" have CHUNK bytes, the others a boolean for each of as many keys as that may be.
    """
    if not hasattr(_THREAD, name):
        plain = name in ("keys", "values")
        setattr(_THREAD, name, np.empty(CHUNK, np.uint8) if plain else np.empty(CHUNK // 2, np.bool_))
    buffer: Array = getattr(_THREAD, name)
    return buffer


class Bag:
    """Keys and places gathered by all threads in one pass: each or, where there is no room, every `step`-th."""

    def __init__(self, room: int, key: np.dtype[Any], total: int) -> None:
        place = np.dtype(np.uint32 if total < 2**32 else np.int64)
        self.keys = np.empty(min(room // (key.itemsize + place.itemsize), total + 1), key)
        self.places = np.empty(self.keys.size, place)
        self.size = 0
        self.step = 1
        self.lock = threading.Lock()

    def add(self, keys: Array, places: Array) -> None:
        """Gather keys and their places; from any thread."""
        with self.lock:
            keys, places = keys[:: self.step], places[:: self.step]
            while self.size + keys.size > self.keys.size:
                half = (self.size + 1) // 2
                self.keys[:half] = self.keys[: self.size : 2]
                self.places[:half] = self.places[: self.size : 2]
                self.size, self.step = half, self.step * 2
                keys, places = keys[::2], places[::2]
            end = self.size + keys.size
            self.keys[self.size : end], self.places[self.size : end], self.size = keys, places, end


def _kind(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _check(scores: Sequence[Array], count: int, held: Sequence[Array | None], threads: int | None) -> None:
    if count < 0 or (threads is not None and threads < 1):
        raise PruneError(f"selecting expects a count of 0 or more and 1 thread or more, but got {count} and {threads}")
    if len(held) != len(scores):
        raise PruneError(f"{len(scores)} score arrays expect as many held arrays (or None), but got {len(held)}")
    for index, (score, mask) in enumerate(zip(scores, held, strict=True)):
        if score.dtype not in KEYS:
            known = ", ".join(str(dtype) for dtype in KEYS)
            raise PruneError(f"score array {index} is {_kind(score)}, but expected is one of {known}")
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != score.shape):
            raise PruneError(f"held array {index} is {_kind(mask)}, but its scores expect bool{list(score.shape)}")
    total = sum(score.size for score in scores)
    if count > total:
        raise PruneError(f"cannot select {count} entries: there are only {total}; ask for at most as many")


def _parts(scores: Sequence[Array], held: Sequence[Array | None], results: Sequence[Array]) -> list[_Part]:
    dtypes = {score.dtype for score in scores}
    wide = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
    dtype = dtypes.pop() if len(dtypes) == 1 else wide
    parts = []
    first = 0
    for index, (score, mask, result) in enumerate(zip(scores, held, results, strict=True)):
        if score.flags.c_contiguous and (mask is None or mask.flags.c_contiguous):  # one axis is the fastest to walk
            score, result, mask = score.reshape(-1), result.reshape(-1), None if mask is None else mask.reshape(-1)
        axes = tuple(np.argsort([-abs(stride) for stride in score.strides], kind="stable").tolist())
        score, result = np.atleast_1d(score.transpose(axes), result.transpose(axes))
        mask = None if mask is None else np.atleast_1d(mask.transpose(axes))
        parts.append(_Part(index, first, axes, score, mask, result, dtype))
        first += score.size
    return parts


def _select(parts: list[_Part], need: int, run: Run, room: int) -> None:
    """Fill the parts' results: all that is held and the `need` lowest of the rest."""
    spans = [span for part in parts for span in part.spans()]
    key = KEYS[parts[0].dtype]
    infinity = int(np.array(np.inf, parts[0].dtype).view(key))
    sample, finite = _sample(spans, infinity)
    low, high = 0, infinity  # the key wanted is at least low and less than high,
    below_low, below_high = 0, finite  # and so many keys are less than low, and than high (at first by a guess)
    guesses = 0
    while high - low > 1 or guesses == 0:
        if guesses < GUESSES:
            left, right = bracket(sample, (need - below_low) / max(below_high - below_low, 1), low, high)
        else:
            left, right = low, (low + high) // 2
        guesses += 1
        bag = Bag(room, key, parts[-1].first + parts[-1].score.size)
        tallies = run(partial(_tally, left=left, right=right, infinity=infinity, bag=bag), spans)
        below_left, below_right, finite = map(sum, zip(*tallies, strict=True))
        if finite < need:
            raise PruneError(
                f"cannot select {need} entries besides those held: only {finite} of them are finite, and infinite "
                "scores are never selected; ask for fewer"
            )
        if high == infinity:
            below_high = finite
        if need <= below_left:
            high, below_high = left, below_left
        elif need > below_right:
            low, below_low = right, below_right
        else:
            low, high, below_low, below_high = left, right, below_left, below_right
            if bag.size == below_high - below_low:
                _mark_gathered(parts, bag, need - below_low)
                return
            sample = bag.keys[: bag.size]
        sample = sample[(sample >= low) & (sample < high)]
    _mark_crowd(parts, spans, low, need - below_low, run)


def _sample(spans: list[_Span], infinity: int) -> tuple[Array, int]:
    """Some finite keys, drawn evenly from all arrays, and a guess of how many finite ones there are."""
    total = sum(span.stop - span.start for span in spans)
    size = min(SAMPLE, total // ONE_IN) if total > WHOLE else 0
    random = np.random.default_rng(0)
    key = KEYS[spans[0].part.dtype]
    drawn = [np.empty(0, key)]
    seen = 0
    for span in spans:
        length = span.stop - span.start
        share = (seen + length) * size // total - seen * size // total
        seen += length
        if share:
            steps = np.arange(share) * length // share
            steps += span.start + random.integers(0, length // share, share)
            part = span.part
            keys = _take(part.score, steps).astype(part.dtype, copy=False).view(key) & (np.iinfo(key).max >> 1)
            free = keys < infinity
            drawn.append(keys[free if part.held is None else free & ~_take(part.held, steps)])
    sample = np.concatenate(drawn)
    return sample, total * sample.size // max(size, 1)


def _take(array: Array, at: Array) -> Array:
    """Elements by their index in C order; an array of one axis need not be asked where those are."""
    return np.asarray(array.take(at) if array.ndim == 1 else array[np.unravel_index(at, array.shape)])


def bracket(sample: Array, share: float, low: int, high: int, design: float = 1.0) -> tuple[int, int]:
    """A range of keys, within low and high, where by the sample the given share of the keys in [low, high) ends.

    `design` is how many times further off its quantiles may be than those of a sample drawn entry by entry.
    """
    if sample.size == 0:
        return low, high
    middle = min(share, 1.0) * sample.size
    slack = 2.5 * design * math.sqrt(middle * (1 - min(share, 1.0))) + 8  # 2.5 standard deviations of a quantile
    first, last = int(middle - slack), math.ceil(middle + slack)
    places = np.clip([first, int(middle), last], 0, sample.size - 1)
    sample.partition(places)
    bottom, guess, top = (int(key) for key in sample[places])
    left = bottom if middle > slack else low
    right = top + 1 if last < sample.size else high
    # One key may crowd the bracket's edge (zeros, say): it is left outside, or it is itself what is looked for.
    if np.count_nonzero(sample == bottom) > last - first:
        left, right = (bottom, bottom + 1) if guess == bottom else (bottom + 1, right)
    if np.count_nonzero(sample == top) > last - first:
        left, right = (top, top + 1) if guess == top else (left, top)
    return left, right


def _tally(span: _Span, left: int, right: int, infinity: int, bag: Bag) -> tuple[int, int, int]:
    """Mark what is less than left or held and gather what is in [left, right), unless that is a single key.

    Returns how many keys are less than left, right and infinity.
    """
    below = inside = finite = 0
    for keys, held, result, place in span.chunks():
        np.less(keys, left, out=result)
        within = np.less(keys, right, out=scratch("within")[: keys.size])
        if held is not None:
            _leave_out(held, result, within)
        below += np.count_nonzero(result)
        within ^= result
        if right - left > 1:
            at = where(within)
            inside += at.size
            bag.add(keys.take(at), at + place)
        else:
            inside += np.count_nonzero(within)
        finite += keys.size if held is None else keys.size - np.count_nonzero(held)
        if keys.max() >= infinity:
            ranked = keys if held is None else keys[~held]
            finite -= np.count_nonzero(ranked >= infinity)
            if np.any(ranked > infinity):
                raise PruneError(f"score array {span.part.index} holds a NaN, which has no rank; replace it")
        if held is not None:
            result |= held
    return below, below + inside, finite


def _leave_out(held: Array, *marks: Array) -> None:
    """Clear the marks of what is held, in place: of booleans, a > b is a and not b."""
    for marked in marks:
        np.greater(marked, held, out=marked)


def where(chosen: Array) -> Array:
    """`np.flatnonzero`, faster where few are chosen: the booleans are first looked at eight at a time."""
    if chosen.size % 8:
        return np.flatnonzero(chosen)
    words = chosen.view(np.uint64)
    at = np.flatnonzero(words != 0)
    hits = np.flatnonzero(words.take(at).view(np.bool_))
    return np.asarray(at.take(hits >> 3) * 8 + (hits & 7))


def _mark_gathered(parts: list[_Part], bag: Bag, quota: int) -> None:
    """Mark the `quota` lowest of the keys in the bag, which holds all that are not marked yet and might have to be."""
    keys, places = bag.keys[: bag.size], bag.places[: bag.size]
    key = np.partition(keys, quota - 1)[quota - 1]
    below, ties = places.compress(keys < key), places.compress(keys == key)
    below.sort(kind="stable")
    ties.sort(kind="stable")
    quota -= below.size
    for part in parts:
        ends = np.array([part.first, part.first + part.score.size], places.dtype)
        chosen, tied = (all_[slice(*np.searchsorted(all_, ends))] - ends[0] for all_ in (below, ties))
        if quota < tied.size:
            tied = tied[np.argsort(part.logical(tied), kind="stable")[:quota]]
        np.put(part.result, chosen, True)
        np.put(part.result, tied, True)
        quota -= tied.size


def _mark_crowd(parts: list[_Part], spans: list[_Span], key: int, quota: int, run: Run) -> None:
    """Mark what is less than key, or held, and the first `quota` entries of that very key."""
    found = [0] * len(parts)
    for span, count in zip(spans, run(partial(_mark_equal, key=key), spans), strict=True):
        found[span.part.index] += count
    for part, count in zip(parts, found, strict=True):
        order = np.argsort(part.axes) if part.axes else (0,)
        _keep_first(part.result.transpose(order), min(quota, count), count)
        quota -= min(quota, count)
    for _ in run(partial(_add_below, key=key), spans):
        pass


def _mark_equal(span: _Span, key: int) -> int:
    count = 0
    for keys, held, result, _ in span.chunks():
        np.equal(keys, key, out=result)
        if held is not None:
            _leave_out(held, result)
        count += int(np.count_nonzero(result))
    return count


def _add_below(span: _Span, key: int) -> None:
    for keys, held, result, _ in span.chunks():
        result |= keys < key
        if held is not None:
            result |= held


def _keep_first(marked: Array, quota: int, count: int) -> None:
    """Clear all of `count` marks but the first `quota` in C order, halving what is left to look at."""
    if quota == 0:
        marked[...] = False
    while 0 < quota < count:
        half = len(marked) // 2
        if half == 0:
            marked = marked[0]
            continue
        found = int(np.count_nonzero(marked[:half]))
        if found < quota:
            marked, quota, count = marked[half:], quota - found, count - found
        else:
            marked[half:] = False
            marked, count = marked[:half], found
