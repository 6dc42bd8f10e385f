"""Allocations against brute force over all weights together."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.algorithms.allocate import ALLOCATIONS, below, erk, globally, take, uniform
from onnxprune.algorithms.patterns import UNSTRUCTURED, Units, block

SETS = [[(10,)], [(8, 4), (3, 5), (1, 1)], [(20, 1, 5, 5), (50, 20, 5, 5), (50, 80), (10, 50)], [(7, 7)] * 5]
SPARSITIES = [0.0, 0.1, 0.29, 0.5, 0.777, 0.9, 1.0]


def weights(shapes, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape).astype(np.float32) * (i + 1) for i, shape in enumerate(shapes)]
    return [np.round(a) for a in arrays] if ties else arrays


def units(arrays):
    return [UNSTRUCTURED.units(a, None) for a in arrays]


@pytest.mark.parametrize("shapes", SETS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_uniform_takes_exactly_its_share_of_each(shapes, sparsity):
    for array, gone in zip(weights(shapes), uniform(units(weights(shapes)), sparsity), strict=True):
        assert gone.sum() == int(array.size * sparsity)


@pytest.mark.parametrize("shapes", SETS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("ties", [False, True])
def test_global_is_one_ranking(shapes, sparsity, ties):
    arrays = weights(shapes, ties=ties)
    flat = np.abs(np.concatenate([a.reshape(-1) for a in arrays]))
    expected = np.zeros(flat.size, bool)
    expected[np.argsort(flat, kind="stable")[: int(flat.size * sparsity)]] = True
    gone = np.concatenate([g.reshape(-1) for g in globally(units(arrays), sparsity)])
    assert np.array_equal(gone, expected)


@pytest.mark.parametrize("shapes", SETS)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_erk_reaches_the_total_exactly(shapes, sparsity):
    arrays = weights(shapes)
    gone = erk(units(arrays), sparsity)
    assert sum(g.sum() for g in gone) == int(sum(a.size for a in arrays) * sparsity)


def test_erk_densities_of_lenet5():
    """Densities go with (sum of dims) / (product of dims), at most 1: by hand, with one free epsilon."""
    shapes = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
    gone = erk(units([np.random.default_rng(0).normal(size=s).astype(np.float32) for s in shapes]), 0.95)
    density = [1 - g.mean() for g in gone]
    assert density[3] == 1.0  # 510 / 5000 would be more than the budget allows: capped
    raw = [31 / 500, 80 / 25000, 1300 / 400000]
    room = 430500 - int(430500 * 0.95) - 5000
    epsilon = room / (31 + 80 + 1300)
    assert density[:3] == pytest.approx([r * epsilon for r in raw], abs=2e-3)


@pytest.mark.parametrize("name", sorted(ALLOCATIONS.keys() - {"sensitivity"}))  # which measures
@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_stays_and_counts(name, seed):
    rng = np.random.default_rng(seed)
    shapes = [(6, 6), (4, 12), (3, 3)]
    held = [np.zeros(s, bool) for s in shapes]
    for sparsity in (0.2, 0.5, 0.8):
        arrays = [rng.normal(size=s).astype(np.float32) for s in shapes]
        gone = ALLOCATIONS[name]([UNSTRUCTURED.units(a, h) for a, h in zip(arrays, held, strict=True)], sparsity)
        assert all((g >= h).all() for g, h in zip(gone, held, strict=True))
        if name != "uniform":
            assert sum(g.sum() for g in gone) == int(93 * sparsity)
        held = gone


def test_below_is_a_threshold():
    array = np.array([[0.5, -1.5, 1.0, -0.2]], np.float32)
    held = np.array([[False, True, False, False]])
    gone = below(1.0)([UNSTRUCTURED.units(array, held)], 0.0)[0]
    assert np.array_equal(gone, [[True, True, False, True]])  # 1.0 is not below 1.0


def test_take_with_units_of_several_sizes_never_passes_the_budget():
    scores = np.array([1.0, 2.0, 3.0])
    unit = Units(scores, np.array([4, 2, 1]), None, (7,))
    assert [take([unit], budget)[0].tolist() for budget in (3, 4, 5, 6, 7)] == [
        [False, False, False],
        [True, False, False],
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_global_over_blocks_of_one_size_and_of_several():
    pattern = block(2, 2)
    small, large = np.ones((4, 4), np.float32), np.full((3, 3), 2.0, np.float32)
    gone = globally([pattern.units(small, None), pattern.units(large, None)], 16 / 25)
    assert gone[0].all()
    assert not gone[1].any()
