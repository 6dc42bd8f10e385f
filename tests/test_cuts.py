"""Cuts select what `select.lowest` does, from files and from memory, whatever the layout, the ties and the threads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from onnxprune import PruneError
from onnxprune.algorithms import cuts
from onnxprune.algorithms.cuts import Cut, NotFinite, Zeroing
from onnxprune.algorithms.select import lowest, zero
from onnxprune.graph import values as reading
from onnxprune.graph.stored import Extent, File
from onnxprune.graph.values import Values

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def in_file(array: np.ndarray, axes: Sequence[int], path: Path, offset: int = 0) -> Values:
    """An array in role order, kept in a file with its axes in another order."""
    stored = np.ascontiguousarray(array.transpose(axes))
    path.write_bytes(b"\xa5" * offset + stored.tobytes() + b"\x5a" * 7)
    return Values(array.shape, tuple(axes), array.dtype, Extent(File.of(str(path)), offset, stored.nbytes))


def in_memory(array: np.ndarray, axes: Sequence[int]) -> Values:
    return Values(array.shape, tuple(axes), array.dtype, np.ascontiguousarray(array.transpose(axes)).reshape(-1))


BUFFER = np.empty(300_000, np.uint8)


def gone(cut: Cut, values: Values) -> np.ndarray:
    """What a cut removes, in role order, put together from parts."""
    out = np.empty(values.size, np.bool_)
    at = 0
    for chunk in values.chunks(0, values.size, BUFFER):
        out[at : at + chunk.size] = cut.gone(values, chunk, at)
        at += chunk.size
    shape = [values.shape[axis] for axis in values.axes]
    return out.reshape(shape).transpose(np.argsort(values.axes))


def normal(shape: Sequence[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


KINDS: dict[str, Callable[[Sequence[int], int], np.ndarray]] = {
    "normal": normal,
    "all equal": lambda shape, seed: np.full(shape, -0.5),
    "all zero of both signs": lambda shape, seed: np.copysign(0.0, normal(shape, seed)),
    "mostly zero": lambda shape, seed: np.where(normal(shape, seed) < 1, np.copysign(0.0, normal(shape, 9)), 1.5),
    "few values": lambda shape, seed: np.round(normal(shape, seed) * 2),
    "sorted": lambda shape, seed: np.sort(normal(shape, seed), axis=None).reshape(shape),
    "rows of scales": lambda shape, seed: (
        normal(shape, seed) * np.logspace(-3, 1, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    ),
    "denormal": lambda shape, seed: normal(shape, seed) * 1e-7,
}
SHAPES = [(1, 1), (7, 5), (5, 3, 2, 4), (64, 100), (300, 257)]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_is_what_lowest_selects(kind: str, dtype: type, tmp_path: Path) -> None:
    for number, shape in enumerate(SHAPES):
        array = KINDS[kind](shape, number).astype(dtype)
        orders = [tuple(range(len(shape))), tuple(reversed(range(len(shape)))), (*range(1, len(shape)), 0)][
            : 2 if array.size > 10_000 else 3
        ]
        counts = {0, array.size // 2, int(array.size * 0.8), array.size - 1, array.size}
        for axes, count in itertools.product(orders, sorted(counts)):
            (expected,) = lowest([array], count)
            for values in (in_file(array, axes, tmp_path / "w", number), in_memory(array, axes)):
                (cut,) = cuts.cuts([values], count)
                np.testing.assert_array_equal(gone(cut, values), expected)
                assert cut.removed == count
                assert cut.zeros == reading.zeros(values) == np.count_nonzero(array == 0)
                assert cut.zeros_after == np.count_nonzero((array == 0) | expected)


@pytest.mark.parametrize("kind", KINDS)
def test_over_several_weights_together(kind: str, tmp_path: Path) -> None:
    arrays = [KINDS[kind](shape, i).astype(DTYPES[i % 2]) for i, shape in enumerate(SHAPES)]
    total = sum(array.size for array in arrays)
    values = [
        in_file(a, tuple(reversed(range(a.ndim))), tmp_path / str(i)) if i % 3 else in_memory(a, range(a.ndim))
        for i, a in enumerate(arrays)
    ]
    for count in (0, 1, total // 3, int(total * 0.9), total):
        expected = lowest(arrays, count)
        found = cuts.cuts(values, count)
        assert sum(cut.removed for cut in found) == count
        for cut, v, wanted in zip(found, values, expected, strict=True):
            np.testing.assert_array_equal(gone(cut, v), wanted)
    half = [array.size // 2 for array in arrays]
    for cut, v, array, count in zip(cuts.each(values, half), values, arrays, half, strict=True):
        np.testing.assert_array_equal(gone(cut, v), lowest([array], count)[0])


@pytest.mark.parametrize("kind", ["normal", "mostly zero", "few values"])
def test_the_number_of_threads_changes_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuts, "THREADED", 0)
    monkeypatch.setattr(cuts, "SPAN", 3000)
    monkeypatch.setattr(cuts, "ROOM", 1 << 12)  # too little to gather all at once
    array = KINDS[kind]((400, 401), 3).astype(np.float32)
    values = in_file(array, (1, 0), tmp_path / "w")
    for count in (5, array.size // 2, int(array.size * 0.9)):
        found = [cuts.cuts([values], count, threads) for threads in (1, 2, 3, 8)]
        assert all(other == found[0] for other in found)
        np.testing.assert_array_equal(gone(found[0][0], values), lowest([array], count)[0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(bad: float) -> None:
    arrays = [normal((30, 40), seed).astype(np.float32) for seed in range(4)]
    arrays[2][7, 9] = bad
    values = [in_memory(array, (0, 1)) for array in arrays]
    with pytest.raises(NotFinite) as told:
        cuts.cuts(values, 100)
    assert told.value.index == 2
    with pytest.raises(NotFinite) as told:
        cuts.each(values, [10] * 4)
    assert told.value.index == 2


def test_more_than_there_is() -> None:
    with pytest.raises(PruneError, match="cannot remove 7 entries: there are 6"):
        cuts.cuts([in_memory(normal((2, 3), 0), (0, 1))], 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_zeroing_part_by_part(dtype: type) -> None:
    array = KINDS["few values"]((50, 41), 1).astype(dtype)
    values = in_memory(array, (1, 0))
    for count in (0, 700, 2000):
        (cut,) = cuts.cuts([values], count)
        expected = np.empty_like(array)
        zero(array, lowest([array], count)[0], expected)
        stored = np.ascontiguousarray(array.T)
        change = Zeroing(cut, values)
        whole = change(stored)
        np.testing.assert_array_equal(whole.view(np.uint8), np.ascontiguousarray(expected.T).view(np.uint8))
        flat = stored.reshape(-1).copy()
        for at in range(0, flat.size, 37):
            change.part(flat[at : at + 37], at)
        np.testing.assert_array_equal(flat.view(np.uint8), whole.reshape(-1).view(np.uint8))


def test_a_tie_too_many_is_seen(tmp_path: Path) -> None:
    """The oracle above tells a cut from one that is off by one tie, or counts ties in memory order."""
    array = KINDS["few values"]((60, 70), 2).astype(np.float32)
    values = in_file(array, (1, 0), tmp_path / "w")
    (cut,) = cuts.cuts([values], 2000)
    (expected,) = lowest([array], 2000)
    assert np.array_equal(gone(cut, values), expected)
    later = next(
        i for i in range(cut.last + 1, array.size) if abs(array.flat[i]) == np.uint32(cut.key).view(np.float32)
    )
    assert not np.array_equal(gone(Cut(cut.dtype, cut.key, later, cut.removed, cut.zeros), values), expected)
    as_stored = Values(values.shape[::-1], (0, 1), values.dtype, values.source)
    (other,) = cuts.cuts([as_stored], 2000)
    assert not np.array_equal(gone(other, as_stored).T, expected)
