"""Exact selection of the entries of smallest magnitude, at the speed of memory.

The bits of a float without its sign, read as an unsigned integer (here its *key*), order as its magnitude does. So
ranks are counted on integers: nothing rounds, -0.0 equals 0.0, and denormals are numbers like any other.

The key of the wanted rank is first bracketed between two quantiles of a sample. One pass over the data, in chunks that
stay in cache, counts the keys below and inside the bracket and gathers those inside; the wanted one is picked from
them. The sample only guesses, the counts decide: where the rank is not in the bracket, or the bracket holds too many
keys to gather, the next pass works on the part that must hold it. A last pass writes the result.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from onnxprune.errors import PruneError

CHUNK = 1 << 17  # elements worked on at a time: their keys and comparisons stay in cache
SPAN = 1 << 20  # elements given to a thread at a time
SAMPLE = 1 << 16  # keys sampled for the first bracket, at most
ROOM = 3 << 19  # bytes of keys gathered per thread and pass, at most
WHOLE = 1 << 13  # up to so many elements are gathered without sampling
THREADED = 1 << 22  # fewer elements are not worth starting threads for
MAX_THREADS = 8  # by default: a few cores saturate memory
GUESSES = 6  # passes that trust a sample; any later one halves the range of keys

Array = np.ndarray[Any, Any]
Run = Callable[[Callable[["_Span"], Any], Iterable["_Span"]], Iterable[Any]]

_KEYS: dict[np.dtype[Any], np.dtype[Any]] = {
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

    Returns:
        For each score array a bool array of its shape and memory layout, True = selected: max(count, held) in total.

    Raises:
        PruneError: if fewer than `count` entries can be selected, a score is NaN, or the arguments do not fit together.
    """
    masks = [None] * len(scores) if held is None else list(held)
    _check(scores, count, masks, threads)
    results = [np.empty_like(score, dtype=bool, subok=False) for score in scores]
    need = count - sum(int(np.count_nonzero(mask)) for mask in masks if mask is not None)
    if need <= 0:
        for result, mask in zip(results, masks, strict=True):
            result[...] = False if mask is None else mask
        return results
    spans = _spans(scores, masks, results)
    total = sum(score.size for score in scores)
    workers = 1 if total < THREADED else threads or min(os.cpu_count() or 1, MAX_THREADS)
    if workers == 1:
        _select(spans, need, results, map, ROOM)
    else:
        with ThreadPoolExecutor(workers) as pool:
            _select(spans, need, results, pool.map, ROOM * workers)
    return results


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
    with np.nditer(operands, ["buffered", "external_loop", "zerosize_ok"], modes, buffersize=CHUNK) as chunks:
        for value, gone, target in chunks:
            np.multiply(value, ~gone, out=target)  # of bits, as integers: times 0 leaves neither a sign nor a NaN


@dataclass(frozen=True)
class _Span:
    """Elements `start` to `stop` of score array `index`, all its arrays with their axes in the scores' memory order."""

    index: int
    start: int
    stop: int
    score: Array
    held: Array | None
    result: Array
    dtype: np.dtype[Any]  # represents every value of all the score arrays exactly

    def chunks(self, *, write: bool = False) -> Iterator[tuple[Array, Array | None, Array]]:
        """Each chunk's keys (in a reused buffer; all bits set where held), held and, if `write`, result."""
        key = _KEYS[self.dtype]
        all_bits = key.type(np.iinfo(key).max)
        operands = [(self.score, "readonly", self.dtype)]
        if self.held is not None:
            operands.append((self.held, "readonly", np.dtype(bool)))
        if write:
            operands.append((self.result, "readwrite", np.dtype(bool)))
        arrays, modes, dtypes = zip(*operands, strict=True)
        flags: Any = ["buffered", "external_loop", "ranged"]
        buffer = np.empty(min(CHUNK, self.stop - self.start), key)
        with np.nditer(arrays, flags, [[m] for m in modes], dtypes, "C", "safe", buffersize=CHUNK) as chunks:
            chunks.iterrange = (self.start, self.stop)  # type: ignore[misc]  # numpy's stubs have it read-only
            for parts in chunks:
                score, *others = parts if isinstance(parts, tuple) else (parts,)
                keys = np.bitwise_and(score.view(key), all_bits >> 1, out=buffer[: score.size])
                mask = None if self.held is None else others[0]
                if mask is not None:
                    keys |= mask * all_bits
                yield keys, mask, others[-1] if write else keys


class _Bag:
    """Keys gathered by all threads in one pass: each of them or, where there is no room for that, every `step`-th."""

    def __init__(self, room: int, key: np.dtype[Any]) -> None:
        self.keys = np.empty(room // key.itemsize, key)
        self.size = 0
        self.step = 1
        self.lock = threading.Lock()

    def add(self, found: Array) -> None:
        with self.lock:
            found = found[:: self.step]
            while self.size + found.size > self.keys.size:
                thinned = self.keys[: self.size : 2]
                self.size = thinned.size
                self.keys[: self.size] = thinned
                self.step *= 2
                found = found[::2]
            self.keys[self.size : self.size + found.size] = found
            self.size += found.size


def _kind(array: Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _check(scores: Sequence[Array], count: int, held: Sequence[Array | None], threads: int | None) -> None:
    if count < 0 or (threads is not None and threads < 1):
        raise PruneError(f"selecting expects a count of 0 or more and 1 thread or more, but got {count} and {threads}")
    if len(held) != len(scores):
        raise PruneError(f"{len(scores)} score arrays expect as many held arrays (or None), but got {len(held)}")
    for index, (score, mask) in enumerate(zip(scores, held, strict=True)):
        if score.dtype not in _KEYS:
            known = ", ".join(str(dtype) for dtype in _KEYS)
            raise PruneError(f"score array {index} is {_kind(score)}, but expected is one of {known}")
        if mask is not None and (mask.dtype != np.bool_ or mask.shape != score.shape):
            raise PruneError(f"held array {index} is {_kind(mask)}, but its scores expect bool{list(score.shape)}")
    total = sum(score.size for score in scores)
    if count > total:
        raise PruneError(f"cannot select {count} entries: there are only {total}; ask for at most as many")


def _spans(scores: Sequence[Array], held: Sequence[Array | None], results: Sequence[Array]) -> list[_Span]:
    dtypes = {score.dtype for score in scores}
    wide = np.dtype(np.float64 if np.dtype(np.float64) in dtypes else np.float32)
    dtype = dtypes.pop() if len(dtypes) == 1 else wide
    spans = []
    for index, (score, mask, result) in enumerate(zip(scores, held, results, strict=True)):
        axes = np.argsort([-abs(stride) for stride in score.strides], kind="stable")
        score, result = np.atleast_1d(score.transpose(axes), result.transpose(axes))
        mask = None if mask is None else np.atleast_1d(mask.transpose(axes))
        for start in range(0, score.size, SPAN):
            spans.append(_Span(index, start, min(start + SPAN, score.size), score, mask, result, dtype))
    return spans


def _select(spans: list[_Span], need: int, results: Sequence[Array], run: Run, room: int) -> None:
    """Fill the results: all that is held and the `need` lowest of the rest."""
    key, quota, ties = _threshold(spans, need, run, room)
    if quota < ties:
        found = [0] * len(results)
        for span, count in zip(spans, run(partial(_mark_ties, key=key), spans), strict=True):
            found[span.index] += count
        for result, count in zip(results, found, strict=True):
            _keep_first(result, min(quota, count))
            quota -= min(quota, count)
        mark = partial(_mark_below, bound=key, keep=True)
    else:
        mark = partial(_mark_below, bound=key + 1, keep=False)
    for _ in run(mark, spans):
        pass


def _threshold(spans: list[_Span], need: int, run: Run, room: int) -> tuple[int, int, int]:
    """The highest key to select, how many entries of that very key to select, and how many there are."""
    dtype = spans[0].dtype
    infinity = int(np.array(np.inf, dtype).view(_KEYS[dtype]))
    sample, finite = _sample(spans, infinity)
    low, high = 0, infinity  # the key wanted is at least low and less than high,
    below_low, below_high = 0, finite  # and so many keys are less than low, and than high (at first by a guess)
    guesses = 0
    while True:
        if guesses < GUESSES:
            left, right = _bracket(sample, (need - below_low) / max(below_high - below_low, 1), low, high)
        else:
            left, right = low, (low + high) // 2
        bag = _Bag(room, _KEYS[dtype])
        tallies = run(partial(_tally, left=left, right=right, infinity=infinity, bag=bag), spans)
        below_left, below_right, finite = map(sum, zip(*tallies, strict=True))
        if finite < need:
            raise PruneError(
                f"cannot select {need} entries besides those held: only {finite} of them are finite, and infinite "
                "scores are never selected; ask for fewer"
            )
        if high == infinity:
            below_high = finite
        guesses += 1
        if need <= below_left:
            high, below_high = left, below_left
        elif need > below_right:
            low, below_low = right, below_right
        else:
            low, high, below_low, below_high = left, right, below_left, below_right
            sample = bag.keys[: bag.size]
            if bag.size == below_high - below_low:
                sample.partition(need - below_low - 1)
                key = sample[need - below_low - 1]
                return int(key), need - below_low - int((sample < key).sum()), int((sample == key).sum())
        if high - low == 1:
            return low, need - below_low, below_high - below_low
        sample = sample[(sample >= low) & (sample < high)]


def _sample(spans: list[_Span], infinity: int) -> tuple[Array, int]:
    """Some finite keys, drawn evenly from all arrays, and a guess of how many finite ones there are."""
    total = sum(span.stop - span.start for span in spans)
    size = min(SAMPLE, total // 16) if total > WHOLE else 0
    random = np.random.default_rng(0)
    key = _KEYS[spans[0].dtype]
    parts = [np.empty(0, key)]
    seen = 0
    for span in spans:
        length = span.stop - span.start
        share = (seen + length) * size // total - seen * size // total
        seen += length
        if share:
            steps = np.arange(share) * length // share
            steps += span.start + random.integers(0, length // share, share)
            at = np.unravel_index(steps, span.score.shape)
            keys = span.score[at].astype(span.dtype).view(key) & (np.iinfo(key).max >> 1)
            finite = keys < infinity if span.held is None else (keys < infinity) & ~span.held[at]
            parts.append(keys[finite])
    sample = np.concatenate(parts)
    return sample, total * sample.size // max(size, 1)


def _bracket(sample: Array, share: float, low: int, high: int) -> tuple[int, int]:
    """Keys left < right between which, going by the sample, a share of the keys in [low, high) ends."""
    if sample.size == 0:
        return low, high
    middle = min(share, 1.0) * sample.size
    slack = 3 * math.sqrt(middle * (1 - min(share, 1.0))) + 8  # three standard deviations of a quantile
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


def _tally(span: _Span, left: int, right: int, infinity: int, bag: _Bag) -> tuple[int, int, int]:
    """How many keys are less than left, right and infinity; those from left to right go into the bag."""
    below = inside = finite = 0
    for keys, mask, _ in span.chunks():
        under = keys < left
        below += np.count_nonzero(under)
        under ^= keys < right
        if right - left > 1:
            found = _pick(keys, under)
            inside += found.size
            bag.add(found)
        else:
            inside += np.count_nonzero(under)
        finite += keys.size
        if keys.max() >= infinity:
            beyond = np.count_nonzero(keys >= infinity)
            finite -= beyond
            if np.count_nonzero(keys > infinity) > (0 if mask is None else np.count_nonzero(mask)):
                raise PruneError(f"score array {span.index} ({_kind(span.result)}) holds a NaN, which has no rank")
    return below, below + inside, finite


def _pick(keys: Array, chosen: Array) -> Array:
    """`keys[chosen]`, faster where few are chosen: their booleans are first looked at eight at a time."""
    if keys.size % 8:
        return keys[chosen]
    words = chosen.view(np.uint64)
    at = np.flatnonzero(words != 0)
    return keys.reshape(-1, 8).take(at, 0)[words.take(at).view(np.bool_).reshape(-1, 8)]


def _mark_ties(span: _Span, key: int) -> int:
    marked = 0
    for keys, _, result in span.chunks(write=True):
        marked += np.count_nonzero(np.equal(keys, key, out=result))
    return marked


def _mark_below(span: _Span, bound: int, keep: bool) -> None:
    """Mark what is below the bound or held, keeping the marks already made or not."""
    for keys, mask, result in span.chunks(write=True):
        if keep:
            result |= keys < bound
        else:
            np.less(keys, bound, out=result)
        if mask is not None:
            result |= mask


def _keep_first(marked: Array, quota: int) -> None:
    """Clear all marks but the first `quota` in C order, halving what is left to look at: every mark is read once."""
    if quota == 0:
        marked[...] = False
    while quota and marked.ndim:
        half = len(marked) // 2
        if half == 0:
            marked = marked[0]
            continue
        found = int(np.count_nonzero(marked[:half]))
        if found < quota:
            quota -= found
            marked = marked[half:]
        else:
            marked[half:] = False
            marked = marked[:half]
