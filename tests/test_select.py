from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

from onnxprune.algorithms import select
from onnxprune.algorithms.select import lowest, zero
from onnxprune.errors import PruneError

DTYPES = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]

# The sizes the module works with: as they are, and so small that small arrays take every path, with several chunks and
# spans, samples that guess badly, bags that overflow, brackets that are halved, and threads.
SIZES = {
    "usual": {},
    "small": {"CHUNK": 256, "SPAN": 256, "SAMPLE": 500, "ONE_IN": 2, "ROOM": 512, "WHOLE": 40, "THREADED": 500},
    "halving": {"CHUNK": 256, "SPAN": 700, "SAMPLE": 7, "ROOM": 64, "WHOLE": 0, "THREADED": 0, "GUESSES": 1},
}


@pytest.fixture(params=SIZES)
def sizes(request, monkeypatch):
    for name, value in SIZES[request.param].items():
        monkeypatch.setattr(select, name, value)


def oracle(scores, count, held=None):
    """Stable sort of the magnitudes in float64, arrays one after the other, held entries before all others."""
    magnitudes = np.concatenate([np.abs(s.astype(np.float64)).ravel() for s in scores] or [np.empty(0)])
    if held is not None:
        masks = [np.zeros(s.shape, bool) if h is None else h for s, h in zip(scores, held, strict=True)]
        taken = np.concatenate([mask.ravel() for mask in masks])
        magnitudes[taken] = -1
        count = max(count, int(taken.sum()))
    removed = np.zeros(magnitudes.size, bool)
    removed[np.argsort(magnitudes, kind="stable")[:count]] = True
    ends = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(removed, ends), scores, strict=True)]


def check(scores, count, held=None, threads=None):
    before = [s.tobytes() for s in scores]
    results = lowest(scores, count, held=held, threads=threads)
    assert len(results) == len(scores)
    for index, (result, expected, score) in enumerate(zip(results, oracle(scores, count, held), scores, strict=True)):
        assert result.dtype == np.bool_
        np.testing.assert_array_equal(result, expected, err_msg=f"array {index}, count {count}")
        assert result.strides == np.empty_like(score, dtype=bool).strides
    assert [s.tobytes() for s in scores] == before


def counts(total, rng):
    return sorted({0, min(1, total), total // 2, max(total - 1, 0), total, int(rng.integers(0, total + 1))})


def values(kind, size, rng):
    normal = rng.standard_normal(size)
    return {
        "normal": normal,
        "all equal": np.full(size, -0.5),
        "all zero": np.where(normal < 0, -0.0, 0.0),
        "two values": np.where(normal < 0.3, 1.0, -2.0),
        "few values": np.round(normal * 2) / 4,
        "half zeros": np.where(normal < 0, np.copysign(0.0, rng.standard_normal(size)), normal),
        "sorted": np.sort(normal),
        "reversed": -np.sort(-np.abs(normal)),
        "one outlier": np.where(np.arange(size) == size // 3, 6e4, normal * 1e-3),
        "denormal": normal * 1e-7,  # of float16
        "tiny": np.float32(1e-40) * np.round(normal * 50),  # denormal in float32 and bfloat16
        "periodic": np.tile([1e-3, 1.0, 2e-3, 50.0], size // 4 + 1)[:size] * (1 + np.abs(normal) / 100),
        "rare middle": np.where(np.abs(normal) < 2.5, np.sign(normal) + 2, 2 + normal / 100),
    }[kind]


KINDS = [
    "normal", "all equal", "all zero", "two values", "few values", "half zeros", "sorted", "reversed", "one outlier",
    "denormal", "tiny", "periodic", "rare middle",
]  # fmt: skip


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind, dtype):
    rng = np.random.default_rng(KINDS.index(kind))
    score = values(kind, 1009, rng).astype(dtype)
    zeros = int(np.count_nonzero(score == 0))
    for count in {*counts(score.size, rng), zeros, min(zeros + 5, score.size), max(zeros - 1, 0)}:
        check([score], count)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["normal", "few values", "half zeros", "periodic", "rare middle"])
def test_every_count(kind, seed, monkeypatch):
    for name, value in {**SIZES["small"], "THREADED": 1 << 20, "SPAN": 1 << 20}.items():
        monkeypatch.setattr(select, name, value)
    score = values(kind, 700, np.random.default_rng(seed)).astype(np.float32)
    rank = np.argsort(np.argsort(np.abs(score), kind="stable"))
    for count in range(score.size + 1):
        assert np.array_equal(lowest([score], count)[0], rank < count)


def layouts(array):
    """The same numbers, laid out in memory in other ways; or some of them."""
    a, b = array.shape[0] // 2, array.shape[-1] // 3
    yield "C", array
    yield "Fortran", np.asfortranarray(array)
    yield "transposed", array.T
    yield "axes rolled", np.moveaxis(array, 0, -1)
    yield "columns", array[..., b:]
    yield "every other", array[::2, ..., ::3]
    yield "reversed", array[::-1, ..., ::-1]
    yield "transposed and cut", array.T[b:, ..., :a]
    yield "broadcast", np.broadcast_to(array[:1], array.shape)
    yield "one axis more", array[:, None]


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(31, 40), (6, 5, 41), (3, 1, 7, 50)])
def test_layouts(shape, dtype):
    rng = np.random.default_rng(len(shape))
    array = values("few values", int(np.prod(shape)), rng).astype(dtype).reshape(shape)
    array.flags.writeable = False
    for _name, score in layouts(array):
        for count in (1, score.size // 3, int(rng.integers(score.size))):
            check([score], count)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (0, 5), (5, 0, 2), (1, 1, 1), (1, 300), (300, 1)])
def test_shapes(shape):
    rng = np.random.default_rng(0)
    score = rng.standard_normal(shape, dtype=np.float32)
    for count in counts(np.size(score), rng):
        check([np.asarray(score)], count)
        check([np.ones(shape, np.float32), np.asarray(score)], count)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtypes", [[np.float32], [ml_dtypes.bfloat16], [np.float16, np.float32], DTYPES])
def test_several_arrays(dtypes, seed):
    rng = np.random.default_rng(seed)
    scores, held = [], []
    for index in range(int(rng.integers(1, 7))):
        shape = tuple(rng.choice([0, 1, 3, 16, 90], size=int(rng.integers(0, 3)), p=[0.05, 0.1, 0.25, 0.3, 0.3]))
        numbers = values(KINDS[rng.integers(len(KINDS))], int(np.prod(shape)), rng).reshape(shape)
        score = numbers.astype(dtypes[index % len(dtypes)])
        mask = np.asarray(rng.random(shape) < rng.choice([0.0, 0.3, 1.0])) if rng.random() < 0.7 else None
        scores.append(score if rng.random() < 0.5 else score.T)
        held.append(None if mask is None else np.array(mask.reshape(scores[-1].shape), order=rng.choice(["C", "F"])))
    total = sum(s.size for s in scores)
    for count in (total // 3, int(rng.integers(0, total + 1))):
        for threads in (1, 2, 3):
            check(scores, count, threads=threads)
            check(scores, count, held, threads=threads)
            zeroed = [s if m is None else np.where(m, s.dtype.type(0), s) for s, m in zip(scores, held, strict=True)]
            check(zeroed, count, held, threads=threads)  # as weights are that were pruned before


def test_what_is_held_and_seems_zero_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    """A few of the scores that are held are not zero, infinite or NaN, where nobody looks first."""
    monkeypatch.setattr(select, "PROBED", 2)
    held = np.arange(40) % 3 == 1
    for bad in (1e-3, 5.0, np.inf, np.nan):
        score = np.where(held, 0.0, np.linspace(-1, 2, 40))
        score[np.flatnonzero(held)[4:9]] = bad
        for count in (0, 5, 13, 20, 40):
            check([score], count, [held])


def test_exact_values_decide_between_dtypes():
    half, brain, single, double = (np.array([v], t) for v, t in zip((0.1, 0.1, 0.1, 0.1), DTYPES, strict=True))
    assert brain[0] > single[0] > double[0] > half[0]
    check([half, brain, single, double], 2)
    assert [m[0] for m in lowest([single, double], 1)] == [False, True]
    assert [m[0] for m in lowest([half, brain], 1)] == [True, False]
    equal = [np.array([0.25, 0.5], t) for t in DTYPES]
    assert [m.tolist() for m in lowest(equal, 3)] == [[True, False]] * 3 + [[False, False]]


def test_ties_go_to_the_earlier_array_then_the_lower_logical_index():
    first = np.ones((2, 3), np.float32)
    second = -np.ones((3, 2), np.float32).T
    a, b = lowest([first, second], 8)
    assert a.all()
    assert b.tolist() == [[True, True, False], [False, False, False]]
    assert b.T.flags.c_contiguous


@pytest.mark.usefixtures("sizes")
def test_held_come_first_and_are_never_given_up():
    score = np.array([0.0, 9.0, -0.0, np.inf, np.nan, 1.0], np.float32)
    held = np.array([False, True, False, True, True, False])
    for count, expected in [(0, [1, 3, 4]), (3, [1, 3, 4]), (4, [0, 1, 3, 4]), (5, [0, 1, 2, 3, 4])]:
        assert np.flatnonzero(lowest([score], count, held=[held])[0]).tolist() == expected


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_scores_are_never_selected(dtype):
    rng = np.random.default_rng(3)
    score = rng.standard_normal(400).astype(dtype)
    score[rng.random(400) < 0.4] = np.inf
    score[7] = -np.inf
    finite = int(np.isfinite(score.astype(np.float64)).sum())
    for count in (1, finite // 2, finite - 1, finite):
        check([score], count)
    with pytest.raises(PruneError, match=rf"cannot select {finite + 1} .* only {finite} .* finite"):
        lowest([score], finite + 1)


@pytest.mark.usefixtures("sizes")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 500, 999])
def test_nan_is_refused(dtype, at):
    score = np.random.default_rng(1).standard_normal(1000).astype(dtype)
    score[at] = -np.nan
    for count in (1, 500, 1000):
        with pytest.raises(PruneError, match=r"score array 1 .* NaN"):
            lowest([np.ones(3, dtype), score], count)


@pytest.mark.parametrize(
    ("scores", "count", "options", "message"),
    [
        ([np.ones(3, np.int32)], 1, {}, r"score array 0 is int32\[3\]"),
        ([np.ones(3, ">f4")], 1, {}, r"score array 0 is >f4\[3\]"),
        ([np.ones(3)], -1, {}, "count of 0 or more"),
        ([np.ones(3)], 4, {}, "cannot select 4 entries: there are only 3"),
        ([], 1, {}, "there are only 0"),
        ([np.ones(3)], 1, {"threads": 0}, "1 thread or more"),
        ([np.ones(3)], 1, {"held": []}, "1 score arrays"),
        ([np.ones(3)], 1, {"held": [np.ones(2, bool)]}, r"held array 0 is bool\[2\].*bool\[3\]"),
        ([np.ones(3)], 1, {"held": [np.ones(3, int)]}, "held array 0 is int64"),
    ],
)
def test_bad_arguments(scores, count, options, message):
    with pytest.raises(PruneError, match=message):
        lowest(scores, count, **options)


def test_nothing_to_select_from():
    assert lowest([], 0) == []


@pytest.mark.parametrize("kind", ["normal", "all equal", "half zeros", "sorted"])
def test_large_arrays_with_the_usual_sizes(kind):
    rng = np.random.default_rng(5)
    scores = [values(kind, 1 << 20, rng).astype(np.float32).reshape(1024, 1024).T for _ in range(5)]
    scores.append(rng.standard_normal(1001, dtype=np.float32))
    rank = np.argsort(np.abs(np.concatenate([s.ravel() for s in scores])), kind="stable")
    for count, threads in ((10, 1), (rank.size // 2, 2), (int(0.8 * rank.size), 3), (rank.size - 1, 1)):
        expected = np.zeros(rank.size, bool)
        expected[rank[:count]] = True
        results = lowest(scores, count, threads=threads)
        assert np.array_equal(np.concatenate([result.ravel() for result in results]), expected)


def test_a_small_input_starts_no_thread(monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("started a thread"))
    lowest([np.random.default_rng(0).standard_normal(100_000)], 50_000, threads=4)


def test_a_memory_map_is_only_read(tmp_path):
    stored = np.lib.format.open_memmap(tmp_path / "w.npy", mode="w+", dtype=np.float32, shape=(60, 70))
    stored[...] = np.random.default_rng(0).standard_normal((60, 70))
    stored.flush()
    mapped = np.load(tmp_path / "w.npy", mmap_mode="r")
    check([mapped.T], 1234)
    assert type(lowest([mapped], 5)[0]) is np.ndarray


@pytest.mark.parametrize("dtype", [*DTYPES, np.int8])
@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_zero(dtype, chunk, monkeypatch):
    monkeypatch.setattr(select, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    array = (rng.standard_normal((30, 41)) * 50).astype(dtype)
    if dtype is not np.int8:
        array[3, 5:9] = np.nan, -np.nan, np.inf, -0.0
    for _name, source in layouts(array):
        removed = rng.random(source.shape) < 0.5
        expected = source.copy()
        expected[removed] = 0
        for out in (np.empty_like(source), np.ones(source.shape[::-1], dtype).T, source.copy()):
            zero(source, removed, out)
            assert out.tobytes() == expected.tobytes()
    zero(array, np.ones(array.shape, bool), array)
    assert array.tobytes() == bytes(array.nbytes)
    zero(np.empty((0, 3), dtype), np.empty((0, 3), bool), np.empty((0, 3), dtype))


@pytest.mark.parametrize(
    "operands",
    [
        (np.ones(3), np.ones(2, bool), np.ones(3)),
        (np.ones(3), np.ones(3, int), np.ones(3)),
        (np.ones(3), np.ones(3, bool), np.ones(3, np.float32)),
    ],
)
def test_zero_refuses_other_shapes_and_dtypes(operands):
    with pytest.raises(PruneError, match="zeroing expects"):
        zero(*operands)
