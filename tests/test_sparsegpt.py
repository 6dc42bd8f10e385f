"""SparseGPT, held against an implementation that does the algebra by hand, one column after the other."""

from __future__ import annotations

import numpy as np
import pytest
from nets import parse

import onnxprune
from onnxprune import PruneError
from onnxprune.algorithms import sparsegpt as module
from onnxprune.algorithms.patterns import parse as pattern
from onnxprune.algorithms.sparsegpt import DAMPING, sparsegpt


def gram(rng: np.random.Generator, columns: int, rows: int = 300) -> np.ndarray:
    """Of correlated inputs."""
    x = rng.normal(size=(rows, columns)) @ (np.eye(columns) + 0.5 * rng.normal(size=(columns, columns)))
    return x.T @ x


def lost(dense: np.ndarray, pruned: np.ndarray, grams: np.ndarray) -> float:
    delta = dense - pruned
    return float(np.einsum("gok,gkl,gol->", delta, grams, delta))


def by_hand(w: np.ndarray, grams: np.ndarray, choose) -> np.ndarray:
    """Optimal brain surgeon, column by column: the inverse of the Gram matrix of all columns that are not settled yet.

    Args:
        w: (groups, outputs, columns).
        grams: (groups, columns, columns).
        choose: column, weights now, diagonals of the inverses that each column will be settled with -> what goes of it.
    """
    groups, _, columns = w.shape
    w = w.copy()
    damped = [g + DAMPING * np.trace(g) / columns * np.eye(columns) for g in grams]
    diagonals = np.array([[np.linalg.inv(h[j:, j:])[0, 0] for j in range(columns)] for h in damped])
    for column in range(columns):
        gone = choose(column, w, diagonals)
        for group in range(groups):
            inverse = np.linalg.inv(damped[group][column:, column:])
            for row in np.flatnonzero(gone[group]):
                w[group, row, column:] -= w[group, row, column] / inverse[0, 0] * inverse[0]
                w[group, row, column] = 0.0
    return w


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("groups", "sparsity"), [(1, 0.5), (1, 0.7), (3, 0.5)])
def test_blocks_are_the_same_as_one_column_after_the_other(monkeypatch, seed, groups, sparsity):
    monkeypatch.setattr(module, "BLOCK", 8)
    rng = np.random.default_rng(seed)
    w, grams = rng.normal(size=(groups, 5, 24)), np.stack([gram(rng, 24) for _ in range(groups)])
    budget = int(w.size * sparsity)
    gone = np.zeros(w.shape, np.bool_)

    def choose(column: int, now: np.ndarray, diagonals: np.ndarray) -> np.ndarray:
        if column % 8 == 0:  # a block's mask is chosen at its first column
            scores = (now**2 / diagonals[:, None])[:, :, column : column + 8]
            count = budget * (column + 8) // 24 - int(gone.sum())
            chosen = np.zeros(scores.size, np.bool_)
            chosen[np.argsort(scores.reshape(-1))[:count]] = True
            gone[:, :, column : column + 8] = chosen.reshape(scores.shape)
        return gone[:, :, column]

    expected = by_hand(w, grams, choose)
    found, removed = sparsegpt(w, grams, pattern("unstructured"), budget, 24)
    np.testing.assert_array_equal(removed, gone)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-8)
    assert removed.sum() == budget


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("positions", [1, 9])
def test_2_of_4_is_chosen_four_columns_at_a_time(seed, positions):
    rng = np.random.default_rng(seed)
    inputs = 8
    w, grams = rng.normal(size=(1, 6, inputs * positions)), gram(rng, inputs * positions)[None]
    order = np.arange(inputs * positions).reshape(inputs, positions).T.reshape(-1)  # inputs side by side
    gone = np.zeros(w.shape, np.bool_)

    def choose(column: int, now: np.ndarray, diagonals: np.ndarray) -> np.ndarray:
        if column % 4 == 0:
            scores = (now**2 / diagonals[:, None])[:, :, column : column + 4]
            part = np.zeros(scores.shape, np.bool_)
            np.put_along_axis(part, np.argsort(scores, -1)[..., :2], True, -1)
            gone[:, :, column : column + 4] = part
        return gone[:, :, column]

    expected = by_hand(w[:, :, order], grams[:, order][:, :, order], choose)
    found, removed = sparsegpt(w, grams, pattern("2:4"), w.size // 2, inputs)
    np.testing.assert_allclose(found[:, :, order], expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_array_equal(removed[:, :, order], gone)
    kept = ~removed.reshape(6, inputs // 4, 4, positions)
    assert (kept.sum(2) == 2).all()


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:2", "block:2x4", "block:3x1"])
@pytest.mark.parametrize("groups", [1, 2])
def test_with_uncorrelated_inputs_it_is_magnitude(text, groups):
    """With the identity for a Gram matrix nothing can be made up for, and those of least squares go."""
    rng = np.random.default_rng(1)
    w = rng.normal(size=(groups, 12, 16))
    made, share = pattern(text), pattern(text).most if pattern(text).most < 1 else 0.5
    budget = int(w.size * share)
    found, removed = sparsegpt(w, np.stack([np.eye(16)] * groups), made, budget, 16)
    np.testing.assert_array_equal(found, np.where(removed, 0.0, w))
    plain = onnxprune.prune(
        parse("(double[N,16] x) => (double[A,B] y) { y = MatMul(x, w) }", w=(w**2).reshape(-1, 16).T),
        [{"sparsity": share, "pattern": text}],
    )
    np.testing.assert_array_equal(~removed.reshape(-1, 16), plain.masks["w"].T)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("text", "sparsity"), [("unstructured", 0.5), ("unstructured", 0.8), ("2:4", 0.5), ("block:2x2", 0.5)]
)
def test_it_loses_less_than_magnitude(seed, text, sparsity):
    """On inputs as they are inside a net: those of a layer and a Relu. There is no theorem, and strange ones exist."""
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(400, 12)) @ rng.normal(size=(12, 32)) + rng.normal(size=32), 0)
    w, grams = rng.normal(size=(1, 10, 32)), (x.T @ x)[None]
    found, removed = sparsegpt(w, grams, pattern(text), int(w.size * sparsity), 32)
    magnitude, _ = sparsegpt(w, np.eye(32)[None], pattern(text), int(w.size * sparsity), 32)
    assert np.count_nonzero(found == 0) == np.count_nonzero(magnitude == 0) == removed.sum()
    assert lost(w, found, grams) < lost(w, magnitude, grams)


@pytest.mark.parametrize("seed", ["no update", "wrong factor"])
def test_seeded_bugs_are_caught(monkeypatch, seed):
    if seed == "no update":
        monkeypatch.setattr(module, "_factor", lambda h, damping: np.eye(len(h)))
    else:  # the factor of the Gram matrix, not of its inverse
        monkeypatch.setattr(module, "_factor", lambda h, damping: np.linalg.cholesky(h).T)
    with pytest.raises(AssertionError):
        test_blocks_are_the_same_as_one_column_after_the_other(monkeypatch, 0, 1, 0.5)


def test_the_count_is_exact_through_the_door():
    rng = np.random.default_rng(2)
    text = """(float[N,4,9,9] x) => (float[A,B] y) {
        a = Conv<kernel_shape=[3,3], group=2>(x, first, bias)
        b = Relu(a)
        c = Flatten(b)
        y = MatMul(c, second)
    }"""
    shapes = {"first": (6, 2, 3, 3), "bias": (6,), "second": (294, 7)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    data = {"x": rng.normal(size=(50, 4, 9, 9)).astype(np.float32)}
    for sparsity, allocation in ((0.37, "uniform"), (0.613, "erk"), (0.5, "global")):
        config = {"pruner": "sparsegpt", "allocation": allocation, "config_list": [{"sparsity": sparsity}]}
        plain = onnxprune.prune(parse(text, **arrays), {**config, "pruner": "level"})
        result = onnxprune.prune(parse(text, **arrays), config, calibration=data, threads=1)
        assert [row.zeros for row in result.report.rows] == [row.zeros for row in plain.report.rows]
        assert all(row.zeros_before == 0 for row in result.report.rows)
        stored = {t.name: np.asarray(t.float_data or np.frombuffer(t.raw_data, np.float32)).reshape(t.dims)
                  for t in result.to_proto().graph.initializer}  # fmt: skip
        for name in ("first", "second"):
            np.testing.assert_array_equal(stored[name] != 0, result.masks[name])
            assert not np.array_equal(stored[name], np.where(result.masks[name], arrays[name], 0))
        np.testing.assert_array_equal(stored["bias"], arrays["bias"])


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"sparsity": 0.5, "score": "wanda"}, "the sparsegpt pruner selects by its own"),
        ({"sparsity": 0.5, "pattern": "channel"}, "takes entries, N:M and blocks"),
        ({"sparsity": 0.5, "pattern": "grouped"}, "takes entries, N:M and blocks"),
    ],
)
def test_what_it_does_not_do_is_said(entry, says):
    with pytest.raises(PruneError, match=says):
        onnxprune.prune("none.onnx", {"pruner": "sparsegpt", "config_list": [entry]})
