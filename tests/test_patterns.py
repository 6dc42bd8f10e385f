"""Patterns: literal cases, and counts against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxprune.algorithms.allocate import uniform
from onnxprune.algorithms.patterns import parse
from onnxprune.errors import PruneError

SHAPES = [(8, 8), (6, 12), (4, 8, 3, 3), (3, 4, 5), (1, 16)]


def removed(text: str, scores: np.ndarray, sparsity: float, held: np.ndarray | None = None) -> np.ndarray:
    pattern = parse(text)
    units = pattern.units(scores, held)
    return pattern.entries(uniform([units], sparsity)[0], units)


def test_two_of_four_literal():
    w = np.array([[4, -1, 3, 2, 1, 1, 1, 1], [-9, 8, 7, -6, 0, 5, 0, 4]], np.float32)
    expected = np.array([[0, 1, 0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0, 1, 0]], bool)
    assert np.array_equal(removed("2:4", w, 0.5), expected)


def test_two_of_four_below_its_sparsity_takes_the_smallest_that_may_go():
    w = np.array([[4, 1, 3, 2, 10, 11, 12, 13]], np.float32)
    assert np.array_equal(np.flatnonzero(removed("2:4", w, 0.25)), [1, 3])
    assert np.array_equal(np.flatnonzero(removed("2:4", w, 0.375)), [1, 3, 4])  # 3 may not go: its group has given two


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (1, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_n_of_m_leaves_n_of_every_m_inputs(shape, n, m, seed):
    w = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    if shape[1] % m:
        assert "no multiple of" in parse(f"{n}:{m}").misfit(shape)
        return
    gone = removed(f"{n}:{m}", w, 1 - n / m)
    groups = np.moveaxis(gone, 1, -1).reshape(-1, m)
    assert (groups.sum(1) == m - n).all()
    values = np.abs(np.moveaxis(w, 1, -1).reshape(-1, m))
    for group, value in zip(groups, values, strict=True):  # and they are the smallest
        assert value[group].max() <= value[~group].min()


@pytest.mark.parametrize("seed", range(5))
def test_n_of_m_grows_along_a_schedule_without_a_weight_returning(seed):
    rng = np.random.default_rng(seed)
    held = None
    for sparsity in (0.1, 0.2, 0.35, 0.5):
        w = rng.normal(size=(6, 16)).astype(np.float32)  # training moves everything
        gone = removed("2:4", w, sparsity, held)
        assert gone.sum() == int(gone.size * sparsity)
        assert gone.reshape(-1, 4).sum(1).max() <= 2
        assert held is None or (gone >= held).all()
        held = gone


def test_block_literal():
    w = np.array([[1, 1, 9, 9], [1, 1, 9, 9], [2, 2, 0, 0], [2, 2, 0, 8]], np.float32)
    assert np.array_equal(
        removed("block:2x2", w, 0.5), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]) == 1
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (4, 1), (1, 4), (3, 5)])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_blocks_go_whole_and_never_more_than_asked(shape, rows, columns, sparsity):
    w = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    gone = removed(f"block:{rows}x{columns}", w, sparsity)
    assert gone.sum() <= int(w.size * sparsity)
    means = []
    for r, c in itertools.product(range(0, shape[0], rows), range(0, shape[1], columns)):
        part = gone[r : r + rows, c : c + columns].reshape(-1, *shape[2:])
        assert (part.all(0) | ~part.any(0)).all()
        values = np.abs(w[r : r + rows, c : c + columns]).reshape(part.shape)
        means += list(
            zip(values.mean(0).reshape(-1), part.all(0).reshape(-1), itertools.repeat(len(part)), strict=False)
        )
    kept = [(mean, size) for mean, out, size in means if not out]
    if kept:  # the lowest block that stays would not have fitted, or ranks above all that went
        assert gone.sum() + min(kept)[1] > int(w.size * sparsity)
        assert max((mean for mean, out, _ in means if out), default=0) <= min(kept)[0]


@pytest.mark.parametrize("seed", range(3))
def test_blocks_grow_along_a_schedule(seed):
    rng = np.random.default_rng(seed)
    held = None
    for sparsity in (0.2, 0.4, 0.8):
        gone = removed("block:2x3", rng.normal(size=(5, 7)).astype(np.float32), sparsity, held)
        assert held is None or (gone >= held).all()
        assert gone.sum() <= int(35 * sparsity)
        held = gone


@pytest.mark.parametrize(
    "text", ["", "4:2", "0:4", "2:2", "block", "block:0x2", "block:2", "channels", "2:4:8", "block:-1x2"]
)
def test_unknown_patterns_are_refused(text):
    with pytest.raises(PruneError, match="is not known; expected 'unstructured'"):
        parse(text)
