"""Labels: whatever is removed, ties, pins and products hold; and what can be removed is."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.structure.labels import Labels, Solution


def removable(solution: Solution, axis: np.ndarray) -> int:
    """Number of classes of an axis that may go."""
    classes = solution.classes(axis)
    return np.unique(classes[classes >= 0]).size


def random_system(seed: int) -> tuple[Labels, list, list, list]:
    rng = np.random.default_rng(seed)
    labels = Labels()
    axes = [labels.fresh(int(rng.choice([2, 3, 4, 6, 12]))) for _ in range(6)]
    axes.append(labels.fixed(4, "fixed"))
    ties, pins, products = [], [], []
    for _ in range(rng.integers(2, 7)):
        kind = rng.integers(3)
        a = axes[rng.integers(len(axes))]
        if kind == 0:
            b = next(x for x in (axes[i] for i in rng.permutation(len(axes))) if x.size == a.size)
            labels.tie(a, b)
            ties.append((a, b))
        elif kind == 1 and a.size == 12:
            sizes = ((3, 4), (4, 3), (2, 6), (2, 3, 2))[rng.integers(4)]
            factors = labels.split(a, sizes, "split")
            products.append((a.reshape(sizes), factors))
            axes += factors
        elif kind == 2:
            b = axes[rng.integers(len(axes))]
            cells = labels.merge([a, b], "merge")
            products.append((cells.reshape(a.size, b.size), (a, b)))
            axes.append(cells)
    for _ in range(rng.integers(0, 2)):
        a = axes[rng.integers(len(axes))]
        labels.pin(a[:1], "pinned")
        pins.append(a[:1])
    return labels, ties, pins, products


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_removed_the_constraints_hold(seed):
    labels, ties, pins, products = random_system(seed)
    solution = labels.solve()
    rng = np.random.default_rng(seed + 1000)
    for _ in range(5):
        dead = rng.random(labels.count) < 0.5

        def alive(axis, dead=dead):
            root = solution.root[axis]
            return solution.pinned[root] | ~dead[root]

        for a, b in ties:
            assert (alive(a) == alive(b)).all()
        for axis in pins:
            assert alive(axis).all()
        for cells, factors in products:
            whole = np.ones((), np.bool_)
            for factor in factors:
                whole = np.logical_and.outer(whole, alive(factor))
            # A factor that lost nothing and one that lost all are the same to the cells only if both say so.
            assert (alive(cells) == whole).all()


def test_a_split_axis_is_cut_along_its_longest_factor():
    labels = Labels()
    axis = labels.fresh(12)
    outer, inner = labels.split(axis, (3, 4), "Reshape")
    solution = labels.solve()
    assert (removable(solution, outer), removable(solution, inner), removable(solution, axis)) == (0, 4, 4)
    assert (solution.classes(axis).reshape(3, 4) == solution.classes(inner)).all()


def test_heads_go_before_length():
    labels = Labels()
    outer, inner = labels.split(labels.fresh(12), (3, 4), "Reshape")
    labels.prefer(outer)
    solution = labels.solve()
    assert (removable(solution, outer), removable(solution, inner)) == (3, 0)


def test_copies_go_last():
    labels = Labels()
    outer, inner = labels.split(labels.fresh(10), (2, 5), "Reshape")
    labels.avoid(inner)
    solution = labels.solve()
    assert (removable(solution, outer), removable(solution, inner)) == (2, 0)


def test_a_pinned_factor_leaves_the_other():
    labels = Labels()
    outer, inner = labels.split(labels.fresh(12), (3, 4), "Reshape")
    labels.pin(inner, "Softmax mixes it")
    solution = labels.solve()
    assert (removable(solution, outer), removable(solution, inner)) == (3, 0)


def test_a_pinned_cell_holds_its_factors_and_says_why():
    labels = Labels()
    axis = labels.fresh(12)
    outer, inner = labels.split(axis, (3, 4), "Reshape")
    labels.prefer(outer)
    labels.pin(axis[5:6], "it reaches the output")
    solution = labels.solve()
    assert removable(solution, outer) == 2
    assert solution.classes(outer).tolist()[1] == -1
    for factor in (outer, inner):
        assert solution.reasons[int(solution.root[factor[1]])] == "it reaches the output"


def test_merged_and_split_again_is_the_same_axis():
    labels = Labels()
    heads, size = labels.fresh(3), labels.fresh(4)
    merged = labels.merge([heads, size], "Reshape 'a'")
    again = labels.split(merged, (3, 4), "Reshape 'b'")
    labels.prefer(again[0])
    solution = labels.solve()
    assert (solution.classes(heads) == solution.classes(again[0])).all()
    assert removable(solution, heads) == 3
    assert removable(solution, size) == 0


def test_a_shuffle_keeps_its_groups():
    """Channel shuffle: (groups, offsets) transposed; the offsets are the longer factor."""
    labels = Labels()
    axis = labels.fresh(12)
    groups, offsets = labels.split(axis, (2, 6), "Reshape 'a'")
    shuffled = labels.merge([offsets, groups], "Reshape 'b'")
    solution = labels.solve()
    assert removable(solution, shuffled) == removable(solution, axis) == 6
    assert solution.classes(shuffled).reshape(6, 2).tolist() == [[c, c] for c in solution.classes(axis)[:6].tolist()]


def test_what_repeats_along_a_factor_is_not_cut_there():
    """A batch that was merged with heads, and is split off again, is none of the channels' business."""
    labels = Labels()
    heads = labels.fresh(3)
    merged = labels.merge([labels.fixed(5, "batch"), heads], "Reshape 'a'")
    batch, again = labels.split(merged, (5, 3), "Reshape 'b'")
    solution = labels.solve()
    assert (removable(solution, batch), removable(solution, again)) == (0, 3)


def test_single_positions_carry_on_and_what_is_merged_beside_axes_that_stay_does_not():
    labels = Labels()
    one, other, stays = labels.fresh(1), labels.fresh(1), labels.fixed(1, "stays")
    for factors in ([one], [one, stays], [stays, one], [one, other]):
        assert labels.merge(factors, "Reshape") is one
    assert labels.is_fixed(labels.merge([stays, stays], "Reshape"))
    assert labels.is_fixed(labels.merge([labels.fixed(4, "length"), other], "Reshape"))
    solution = labels.solve()
    assert (removable(solution, one), removable(solution, other)) == (1, 0)
    assert solution.reasons[int(solution.root[other[0]])] == "Reshape merges it with other axes"


@pytest.mark.parametrize("sizes", [(12,), (1, 12), (12, 1), (1, 12, 1)])
def test_a_split_that_adds_axes_of_one_position(sizes: tuple[int, ...]) -> None:
    labels = Labels()
    axis = labels.fresh(12)
    for size, part in zip(sizes, labels.split(axis, sizes, "Reshape"), strict=True):
        assert part is axis if size == 12 else labels.reason(part) == "Reshape adds an axis of one position"


def test_axes_of_different_length_cannot_be_tied():
    labels = Labels()
    with pytest.raises(ValueError, match="lengths 3 and 4 meet"):
        labels.tie(labels.fresh(3), labels.fresh(4))
