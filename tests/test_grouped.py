"""Grouped inputs: literal cases, exact counts, growing along a schedule, and groups found."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.algorithms.allocate import erk, globally, uniform
from onnxprune.algorithms.grouped import blocks, choose, cluster, grouped
from onnxprune.algorithms.patterns import parse
from onnxprune.errors import PruneError

SHAPES = [(64, 64), (32, 48, 3, 3), (16, 24, 5), (48, 8, 1, 1), (24, 100)]


def removed(pattern, scores, sparsity, held=None, allocate=uniform):
    units = pattern.units(scores, held)
    return pattern.entries(allocate([units], sparsity)[0], units)


def supports(gone: np.ndarray) -> dict[bytes, list[int]]:
    """Zero pattern of inputs -> the outputs that have it; every kernel position of an input goes alike."""
    inputs = gone.reshape(*gone.shape[:2], -1)
    assert (inputs.all(2) == inputs.any(2)).all()
    found: dict[bytes, list[int]] = {}
    for index, row in enumerate(inputs.all(2)):
        found.setdefault(row.tobytes(), []).append(index)
    return found


def test_literal():
    """Rows 0 and 2 need the first inputs, 1 and 3 the last ones: they share groups, and lose what is left over."""
    weak, strong = [1, 1, 1, 1], [9, 8, 9, 8]
    w = np.array([strong + weak, weak + strong, strong + weak, weak + strong], np.float32)
    gone = removed(grouped(2), w, 0.5)
    assert np.array_equal(gone, np.array([[0] * 4 + [1] * 4, [1] * 4 + [0] * 4] * 2, bool))


def test_what_is_weakest_in_a_group_goes_first_literal():
    w = np.array([[1, 8, 3, 7, 2, 6, 4, 5], [1, 8, 3, 7, 2, 6, 4, 5]], np.float32)
    assert np.flatnonzero(removed(grouped(2), w, 0.5)[0]).tolist() == [0, 2, 4, 6]
    assert np.flatnonzero(removed(grouped(2), w, 0.25)[0]).tolist() == [0, 4]
    assert np.flatnonzero(removed(grouped(2), w, 0.2)[0]).tolist() == []  # no whole block


def test_ties_go_to_the_lower_index():
    gone = removed(grouped(4), np.ones((8, 16), np.float32), 0.5)
    assert np.array_equal(gone, np.tile([True] * 8 + [False] * 8, (8, 1)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [8, None])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
def test_all_groups_lose_equally_many_inputs(shape, size, sparsity):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    pattern = grouped(size)
    gone = removed(pattern, w, sparsity)
    lost = gone.reshape(*shape[:2], -1).all(2).sum(1)
    edges = blocks(shape[1])
    assert len(set(lost.tolist())) == 1
    assert lost[0] == max(edge for edge in edges if edge <= shape[1] * sparsity + 1e-9)
    each = choose(shape) if size is None else size
    assert all(len(rows) % each == 0 for rows in supports(gone).values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [8, None])
def test_grows_along_a_schedule_without_a_weight_returning(seed, size):
    rng = np.random.default_rng(seed)
    held = None
    for sparsity in (0.0, 0.2, 0.4, 0.6, 0.75):
        w = rng.normal(size=(64, 64, 3, 3)).astype(np.float32)  # training moves everything
        if held is not None:
            w[held] = 0
        gone = removed(grouped(size), w, sparsity, held)
        assert gone.mean() == int(4 * sparsity) / 4
        assert all(len(rows) % (size or 64) == 0 for rows in supports(gone).values())
        assert held is None or (gone >= held).all()
        held = gone


def test_parts_share_no_group():
    w = np.ones((32, 16), np.float32)
    w[:16, :8] = w[16:, 8:] = 5
    w[::2] *= 3  # rows alike across parts must not attract each other
    gone = removed(grouped(None, parts=4), w, 0.5)
    assert np.array_equal(gone, w % 5 != 0)
    assert "no multiple of 16" in grouped(16, parts=4).misfit((32, 16))
    assert grouped(16, parts=2).misfit((32, 16)) == ""


def test_joint_outputs_keep_the_same_inputs():
    w = np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)
    assert len(supports(removed(grouped(8, joint=True), w, 0.5))) == 1


def test_planted_groups_are_found():
    """Outputs scattered at random, each in need of a quarter of the inputs: what is kept is what was planted."""
    rng = np.random.default_rng(3)
    w = rng.normal(size=(128, 64)).astype(np.float32) * 0.1
    planted = np.zeros(w.shape, bool)
    for rows in rng.permutation(128).reshape(4, 32):
        planted[np.ix_(rows, rng.permutation(64)[:16])] = True
    w[planted] *= 30
    gone = removed(grouped(32), w, 0.75)
    assert np.array_equal(~gone, planted)


@pytest.mark.parametrize("seed", range(3))
def test_grouping_keeps_more_than_neighbours_would(seed):
    """On filters with correlated needs; the neighbours' grouping is where the search starts."""
    rng = np.random.default_rng(seed)
    needs = rng.random((6, 64)) ** 4
    w = np.abs(rng.normal(size=(96, 64))) * needs[rng.integers(0, 6, 96)]

    def kept(members):
        totals = np.sort(w[members].sum(1), axis=1)
        return totals[:, -16:].sum()

    neighbours = np.arange(96).reshape(6, 16)
    assert kept(cluster(np.rint(w * 1e6), 16)) > 1.1 * kept(neighbours)


def test_groups_do_not_depend_on_memory_order_or_type():
    w = np.random.default_rng(0).normal(size=(64, 48, 3)).astype(np.float16)
    first = removed(grouped(16), w, 0.5)
    assert np.array_equal(first, removed(grouped(16), np.asfortranarray(w), 0.5))
    assert np.array_equal(first, removed(grouped(16), w.astype(np.float64), 0.5))


def test_sizes_by_shape():
    assert [choose(s) for s in [(256, 64, 3, 3), (256, 64, 1, 1), (3072, 768), (96, 24, 1, 1), (1000, 512)]] == [
        128, 256, 256, 96, 200,
    ]  # fmt: skip
    assert [choose((outputs, 64, 3, 3)) for outputs in (32, 96, 128, 192, 512)] == [32, 96, 128, 96, 128]
    assert choose((256, 64, 3, 3), 32) == 8
    assert blocks(64).tolist() == [0, 16, 32, 48, 64]
    assert blocks(24).tolist() == [0, 4, 8, 12, 16, 20, 24]
    assert blocks(100).tolist() == [0, 4, 20, 36, 52, 68, 84, 100]


def test_allocations():
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(64, 64, 3, 3)), 10 * rng.normal(size=(32, 64))]
    pattern = grouped(16)
    units = [pattern.units(w, None) for w in weights]
    gone = [pattern.entries(g, u).mean() for g, u in zip(globally(units, 0.6), units, strict=True)]
    assert gone[0] == 0.5  # a third block would be more than 60 % of both
    assert gone[1] == 0  # ten times as large
    total = sum(w.size for w in weights)
    assert sum(g.sum() for g in (pattern.entries(g, u) for g, u in zip(erk(units, 0.6), units, strict=True))) <= total
    with pytest.raises(PruneError, match="selected"):
        removed(pattern, weights[0], 1.0)


@pytest.mark.parametrize(("shape", "reason"), [((64, 3, 3, 3), "reads 3 inputs"), ((10, 64), "no multiple of 16")])
def test_misfits(shape, reason):
    assert reason in parse("grouped:16").misfit(shape)


@pytest.mark.parametrize("text", ["grouped:0", "grouped:", "grouped:x", "groups"])
def test_bad_spellings(text):
    with pytest.raises(PruneError, match="'grouped:G'"):
        parse(text)
