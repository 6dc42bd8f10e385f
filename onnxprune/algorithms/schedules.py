"""When: the sparsity to have reached at a point in time, counted in epochs or optimizer steps.

A schedule is a function from time to a sparsity; None means that nothing is pruned yet.
"""

from __future__ import annotations

from collections.abc import Callable

Schedule = Callable[[float], "float | None"]


def constant(sparsity: float) -> Schedule:
    """The same sparsity at all times."""
    return lambda time: sparsity


def cubic(initial: float, final: float, start: int, end: int, frequency: int = 1) -> Schedule:
    """Automated gradual pruning: s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^3, with n dt = end - start.

    Zhu & Gupta 2017, "To prune, or not to prune", eq. 1. Updates happen at start, start + frequency, ...;
    between two updates the earlier one holds. Before `start` nothing is pruned, from `end` on it is `final`,
    also where the frequency does not divide the span.

    Args:
        initial: sparsity at `start`.
        final: sparsity at `end`.
        start: time of the first update (t0).
        end: time of the last update.
        frequency: time between updates (dt).
    """

    def at(time: float) -> float | None:
        if time < start:
            return None
        if time >= end:
            return final
        reached = (time - start) // frequency * frequency
        return final + (initial - final) * (1 - reached / (end - start)) ** 3

    return at
