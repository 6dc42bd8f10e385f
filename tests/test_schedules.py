"""Schedules against literal values and the closed form of Zhu & Gupta 2017, eq. 1."""

from __future__ import annotations

import pytest

from onnxprune.algorithms.schedules import constant, cubic


def test_constant():
    assert [constant(0.3)(t) for t in (0, 5, float("inf"))] == [0.3, 0.3, 0.3]


def test_agp_of_the_documentation():
    at = cubic(0.0, 0.8, 1, 10)
    assert at(0) is None  # before t0 nothing
    assert at(1) == 0.0
    assert at(10) == 0.8
    assert at(11) == at(float("inf")) == 0.8
    assert at(4) == pytest.approx(0.8 * (1 - (6 / 9) ** 3), abs=1e-15)  # three of nine steps done


@pytest.mark.parametrize(
    ("initial", "final", "start", "end"), [(0.0, 0.8, 1, 10), (0.2, 0.9, 0, 7), (0.5, 0.5, 3, 3), (0, 1, 5, 6)]
)
@pytest.mark.parametrize("frequency", [1, 2, 3, 4, 100])
def test_cubic_is_the_formula_at_updates_and_holds_between(initial, final, start, end, frequency):
    at = cubic(initial, final, start, end, frequency)
    updates = [*range(start, end, frequency), end]
    for t in range(end + 5):
        last = max((u for u in updates if u <= t), default=None)
        if last is None:
            assert at(t) is None
        elif last == end:  # lands on the final sparsity, whether or not the frequency divides the span
            assert at(t) == final
        else:
            assert at(t) == pytest.approx(
                final + (initial - final) * (1 - (last - start) / (end - start)) ** 3, abs=1e-12
            )


def test_cubic_never_falls():
    values = [cubic(0.1, 0.95, 2, 50, 3)(t) for t in range(2, 60)]
    assert values == sorted(values)
    assert len(set(values)) == 17  # updates at 2, 5, ..., 47 and 50
