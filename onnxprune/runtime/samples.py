"""Samples of a dataset: put into another order, parted in two, told from others'."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np

from onnxprune.errors import PruneError
from onnxprune.runtime.feeds import BATCH, Array, Batch, Dataset, has_samples


def count(dataset: Dataset) -> int:
    """What a dataset can be parted into: samples or, where it is an iterable of feeds, feeds."""
    return len(dataset) if dataset.whole else dataset.samples


def take(dataset: Dataset, order: Array) -> Dataset:
    """The samples (or whole feeds) of these numbers, in their order."""
    if dataset.whole:
        return replace(dataset, parts=tuple(dataset.parts[index] for index in order))
    first = dataset.parts[0].feed
    sampled = {
        value.name: np.concatenate([part.feed[value.name] for part in dataset.parts])[order]
        for value in dataset.inputs
        if value.name in first and has_samples(value, first[value.name])
    }
    told = [part.labels for part in dataset.parts if part.labels is not None]
    labels = np.concatenate(told)[order] if told else None
    step = dataset.fixed or BATCH
    parts = []
    for start in range(0, len(order), step):
        rows = slice(start, start + step)
        feed = {name: sampled[name][rows] if name in sampled else array for name, array in first.items()}
        chosen = None if labels is None else labels[rows]
        parts.append(Batch(feed, chosen, min(step, len(order) - start)))
    return replace(dataset, parts=tuple(parts))


def shuffled(dataset: Dataset, seed: int) -> Dataset:
    """All samples in random order: files are often sorted by class, and the first few should be like the rest."""
    return take(dataset, np.random.default_rng(seed).permutation(count(dataset)))


def split(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Part a dataset at random: all but `share` of it, and that share; both in random order.

    Raises:
        PruneError: one of the two would be empty.
    """
    total = count(dataset)
    held = math.ceil(total * share)
    if not 0 < held < total:
        raise PruneError(
            f"holding back {share:g} of {total} {'feeds' if dataset.whole else 'samples'} leaves {total - held} and "
            f"{held}; both parts need some: give more data, or another share"
        )
    order = np.random.default_rng(seed).permutation(total)
    return take(dataset, order[held:]), take(dataset, order[:held])


def first(dataset: Dataset, number: int) -> Dataset:
    """So many samples (or whole feeds) from the beginning."""
    return take(dataset, np.arange(min(number, count(dataset))))


def digest(dataset: Dataset) -> str:
    """Changes with any value, shape, type or order of the data."""
    state = hashlib.blake2b(digest_size=16)
    for part in dataset.parts:
        arrays = {**part.feed, **({} if part.labels is None else {"\0labels": part.labels})}
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            state.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            state.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
    return state.hexdigest()
