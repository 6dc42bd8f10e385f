"""Scores: what ranks, and that it ranks the same everywhere."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnxprune.algorithms import scores
from onnxprune.algorithms.scores import CHANNEL_SCORES, deviation, magnitude, relative


def test_magnitude_is_the_weight_itself():
    w = np.array([[1.0, -2.0]], np.float32)
    assert magnitude(w) is w


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("shape", [(3,), (64, 33), (5, 4, 3, 3), (1500, 1000)])
def test_deviation_is_numpys(dtype, scale, shape):
    w = (np.random.default_rng(0).normal(0.3, 1, shape) * scale).astype(dtype)
    assert deviation(w) == pytest.approx(float(np.std(w.astype(np.float64))), rel=1e-5)


def test_deviation_does_not_depend_on_order():
    w = np.random.default_rng(0).normal(size=2**21 + 5).astype(np.float32)
    results = {deviation(order) for order in (w, w[::-1], np.sort(w), np.roll(w, 12345))}
    assert len(results) == 1


def test_deviation_of_nothing_and_of_zeros():
    assert deviation(np.zeros((0, 3), np.float32)) == 0.0
    assert deviation(np.zeros((4, 3), np.float32)) == 0.0
    assert deviation(np.full((4, 3), 7.0, np.float32)) == 0.0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_relative_is_the_quality_at_which_an_entry_falls(dtype):
    w = np.array([[1.0, -3.0, 0.5, 2.0]], dtype)
    score = relative(0.5)(w)
    for quality in (0.3, 1.0, 2.0):
        assert np.array_equal(np.abs(score) < quality, np.abs(w) < quality * 0.5 * np.std(w.astype(np.float64)))


def test_relative_of_a_constant_weight_has_no_division_by_zero():
    assert np.array_equal(relative(1.0)(np.full((2, 2), -3.0, np.float32)), np.full((2, 2), 3.0))


@pytest.mark.parametrize("score", ["l1", "l2"])
@pytest.mark.parametrize("shape", [(0, 3), (5, 7), (40, 300), (300, 40)])
def test_channel_scores_do_not_depend_on_the_blocks_they_are_summed_in(score, shape, monkeypatch):
    rows = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    whole = CHANNEL_SCORES[score](rows)
    assert whole.shape == shape[:1]
    mean = np.abs(rows).mean(1) if score == "l1" else np.sqrt(np.square(rows).mean(1))
    assert np.allclose(whole, mean, rtol=1e-5)
    for block in (1, 100, 1000):
        monkeypatch.setattr(scores, "BLOCK", block)
        assert np.array_equal(CHANNEL_SCORES[score](rows), whole)
        assert np.array_equal(CHANNEL_SCORES[score](np.asfortranarray(rows)), whole)
