"""What the commands sensitivity and auto show."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import RenderableType

from onnxprune.curves import Sensitivity
from onnxprune.search import Candidate, Search
from onnxprune.tables import columns, left_alone, percent, plain, sentence, size

UNITS = {"size": "deflated file", "macs": "MACs", "latency": "latency"}


def sensitivity(found: Sensitivity) -> Iterator[RenderableType]:
    """Points lost, per weight and level."""
    levels = sorted({point.level for curve in found.curves for point in curve.points})
    shown = columns("only this pruned", right=("entries", *(f"{100 * level:g} %" for level in levels)))
    for curve in found.curves:
        by = {point.level: point for point in curve.points}
        lost = [f"{100 * by[level].loss:.2f}" if level in by else "" for level in levels]
        shown.add_row(plain(curve.name), f"{curve.size:,}", *lost)
    yield shown
    yield from left_alone(found.skipped)
    measure = "accuracy" if found.measure == "top-1" else found.measure
    yield sentence(f"Points of {measure} lost, on up to {found.samples:,} samples ({found.pattern}, {found.score}).")
    yield from (sentence(f"note: {note}") for note in found.notes)


def line(candidate: Candidate) -> str:
    """A candidate in one line, as it is tried."""
    what = f"{candidate.recipe} at {candidate.strength:.4g}"
    if candidate.loss is None:
        return f"{what}: {candidate.error}"
    value = "" if candidate.value is None else f", {percent(candidate.value)} of dense"
    held = "" if candidate.held_back is None else f", {100 * candidate.held_back:.2f} held back"
    return f"{what}: {100 * candidate.loss:.2f} points lost{held}{value}{', written' * candidate.written}"


def searched(found: Search) -> Iterator[RenderableType]:
    """The frontier, and what was kept."""
    shown = columns("frontier", right=("strength", f"{found.target} left", "points lost", "held back"))
    best = [] if found.best is None or found.best in found.frontier else [found.best]
    for candidate in sorted([*found.frontier, *best], key=lambda c: c.loss or 0.0):
        held = "" if candidate.held_back is None else f"{100 * candidate.held_back:.2f}"
        mark = " (kept)" if candidate == found.best else ""
        value, loss = percent(candidate.value or 0.0), f"{100 * (candidate.loss or 0.0):.2f}"
        shown.add_row(plain(candidate.recipe + mark), f"{candidate.strength:.4g}", value, loss, held)
    yield shown
    tried = f"{len(found.candidates)} models were tried on {found.search_samples:,} samples; "
    ended = {"searched": "", "time": " The time was up.", "interrupted": " Interrupted."}[found.ended]
    yield sentence(f"{tried}{found.held_back_samples:,} were held back for the gate.{ended}")
    if found.best is None:
        yield sentence(f"None was within {100 * found.max_drop:g} points on the data held back. Nothing was written.")
    else:
        yield sentence(_kept(found, found.best))
    yield from (sentence(f"note: {note}") for note in found.notes)


def _kept(found: Search, best: Candidate) -> str:
    value = best.value or 0.0
    held, seen = 100 * (best.held_back or 0.0), 100 * (best.loss or 0.0)
    measured = f"{UNITS[found.target]} {percent(value)} of the dense model's"
    if found.target == "size":
        measured += f" ({size(round(found.dense * value))})"
    if found.target == "latency" and found.benchmark is not None:
        dense, now = (found.benchmark[key]["median"] for key in ("baseline", "latency"))
        measured += f" ({now:.4g} ms, dense {dense:.4g} ms)"
    written = "" if found.path is None else f" Written: {found.path}"
    return (
        f"Kept: {best.recipe} at {best.strength:.4g}: {measured}; {held:.2f} points lost on the data held back, "
        f"{seen:.2f} on the search's.{written}"
    )
