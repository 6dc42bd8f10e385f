"""Figures of a report: from its JSON to what plotly draws; colours are names of the page's CSS variables."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxprune.tables import escaped

LABEL = 26
"""Characters of a name that fit beside a figure; the whole name is in the table and where the mouse points."""
COLOURS = ("--one", "--two", "--three", "--four", "--five", "--six")


@dataclass(frozen=True)
class Figure:
    """What plotly draws.

    Attributes:
        id: of its element.
        title: above it.
        note: below the title.
        data: plotly's traces.
        layout: plotly's layout.
        choices: where one of several is shown at a time: names, in the order of the traces' `meta`.
        wide: whether it takes the page's whole width.
    """

    id: str
    title: str
    note: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    choices: Sequence[str] = ()
    wide: bool = False


def label(name: str) -> str:
    """A name as plotly is to show it, which reads markup: cut in the middle, nothing in it read as markup."""
    text = escaped(name)
    if len(text) > LABEL:
        text = f"{text[: LABEL // 2]}…{text[-(LABEL - LABEL // 2 - 1) :]}"
    return literal(text)


def literal(text: str) -> str:
    """A text that plotly shows as it is."""
    return escaped(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def of(document: Mapping[str, Any]) -> Iterator[Figure]:
    """The figures of a report, as far as its JSON has something to show."""
    rows = (document.get("report") or {}).get("weights") or []
    if rows:
        yield _sparsity(rows)
        yield _sizes(rows)
    if document.get("curves"):
        yield curves("curves", document)
    for pattern, found in (document.get("sensitivity") or {}).items():
        yield curves(f"curves-{pattern.replace(':', '-')}", found)
    if document.get("candidates"):
        yield _frontier(document)
    if document.get("histograms"):
        yield _histograms(document["histograms"])
    if (document.get("benchmark") or {}).get("latency"):
        yield _latency(document["benchmark"])


def _bars(rows: Sequence[Mapping[str, Any]], axis: Mapping[str, Any]) -> dict[str, Any]:
    names = [row["name"] for row in rows]
    return {
        "height": 60 + 26 * len(rows),
        "margin": {"l": 10, "r": 20, "t": 10, "b": 30},
        "xaxis": {"automargin": True, **axis},
        "yaxis": {
            "automargin": True, "autorange": "reversed", "tickmode": "array", "tickvals": list(range(len(rows))),
            "ticktext": [label(name) for name in names], "ticks": "", "showgrid": False, "zeroline": False,
        },
        "barmode": "overlay",
        "bargap": 0.35,
        "showlegend": False,
    }  # fmt: skip


def _sparsity(rows: Sequence[Mapping[str, Any]]) -> Figure:
    hover = [f"{literal(row['name'])}<br>{row['zeros']:,} of {row['size']:,} entries are zero" for row in rows]
    bar = {
        "type": "bar", "orientation": "h", "x": [100 * row["sparsity"] for row in rows], "y": list(range(len(rows))),
        "marker": {"color": "--one"}, "hovertext": hover, "hovertemplate": "%{hovertext}<br>%{x:.2f} %<extra></extra>",
    }  # fmt: skip
    layout = _bars(rows, {"range": [0, 103], "tick0": 0, "dtick": 25, "ticksuffix": " %"})
    return Figure("sparsity", "Sparsity per layer", "Share of each weight's entries that are zero.", [bar], layout)


def _sizes(rows: Sequence[Mapping[str, Any]]) -> Figure:
    places = list(range(len(rows)))
    hover = [f"{literal(row['name'])}<br>{row['size']:,} entries" for row in rows]
    shared: dict[str, Any] = {"type": "bar", "orientation": "h", "y": places, "hovertext": hover}
    whole = {"x": [row["size"] for row in rows], "name": "entries", "marker": {"color": "--faint"}}
    left = {"x": [row["size"] - row["zeros"] for row in rows], "name": "not zero", "marker": {"color": "--two"}}
    told = "%{hovertext}<br>%{fullData.name}: %{x:,}<extra></extra>"
    data = [shared | trace | {"hovertemplate": told} for trace in (whole, left)]
    layout = _bars(rows, {"type": "log", "dtick": 1, "tickformat": "~s"})
    note = "Entries of each weight (light) and those that are not zero (dark); the scale is logarithmic."
    return Figure("sizes", "Size per layer", note, data, layout)


def curves(id_: str, found: Mapping[str, Any]) -> Figure:
    """Sensitivity curves: loss over sparsity, one line for each weight or group."""
    data = []
    for index, curve in enumerate(found["curves"]):
        points = curve["points"]
        entries = f"{literal(curve['name'])} ({curve['size']:,} entries)"
        data.append({
            "type": "scatter", "mode": "lines+markers", "name": label(curve["name"]),
            "x": [100 * p["level"] for p in points], "y": [100 * p["loss"] for p in points],
            "customdata": [[100 * p["low"], 100 * p["high"], p["samples"]] for p in points],
            "line": {"color": COLOURS[index % len(COLOURS)], "width": 2,
                     "dash": ("solid", "dash", "dot", "dashdot")[index // len(COLOURS) % 4]},
            "hovertemplate": entries + "<br>%{x:.0f} % sparse: %{y:.2f} points lost (%{customdata[0]:.2f} to "
                             "%{customdata[1]:.2f})<br>%{customdata[2]} samples<extra></extra>",
        })  # fmt: skip
    many = len(data) > 12
    layout = {
        "height": 420 if many else 400 + 22 * len(data), "margin": {"l": 10, "r": 15, "t": 10, "b": 10},
        "xaxis": {"title": {"text": "sparsity of this one alone"}, "ticksuffix": " %", "automargin": True,
                  "range": [0, 102]},
        "yaxis": {"title": {"text": "points lost"}, "automargin": True, "rangemode": "tozero"},
        "showlegend": not many, "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
        "hovermode": "closest",
    }  # fmt: skip
    measure = "accuracy" if found["measure"] == "top-1" else escaped(str(found["measure"]))
    note = f"What is lost of {measure}, in points, when only one is pruned ({found['pattern']}, {found['score']})."
    return Figure(id_, f"Sensitivity ({found['pattern']})", note, data, layout, wide=True)


UNITS = {"size": "deflated file, % of dense", "macs": "MACs, % of dense", "latency": "latency, % of dense"}


def _frontier(document: Mapping[str, Any]) -> Figure:
    known = [c for c in document["candidates"] if c["value"] is not None and c["loss"] is not None]
    front = sorted(document["frontier"], key=lambda c: c["value"])

    def points(chosen: Sequence[Mapping[str, Any]], **look: Any) -> dict[str, Any]:
        return {
            "type": "scatter", "x": [100 * c["value"] for c in chosen], "y": [100 * c["loss"] for c in chosen],
            "hovertext": [f"{literal(c['recipe'])} at {c['strength']:.4g}" for c in chosen],
            "hovertemplate": "%{hovertext}<br>%{x:.1f} % of dense, %{y:.2f} points lost<extra></extra>", **look,
        }  # fmt: skip

    data = [
        points(known, mode="markers", name="tried", marker={"color": "--muted", "size": 7}),
        points(front, mode="lines+markers", name="frontier", line={"color": "--one", "width": 2, "shape": "hv"}),
    ]
    if document["best"] is not None:
        star = {"color": "--two", "size": 14, "symbol": "star"}
        data.append(points([document["best"]], mode="markers", name="kept", marker=star))
    limit = 100 * document["max_drop"]
    dashed = {"color": "--three", "width": 1.5, "dash": "dash"}
    layout = {
        "height": 420, "margin": {"l": 10, "r": 15, "t": 10, "b": 10}, "hovermode": "closest",
        "xaxis": {"title": {"text": UNITS[document["target"]]}, "ticksuffix": " %", "automargin": True,
                  "rangemode": "tozero"},
        "yaxis": {"title": {"text": "points lost on the search's data"}, "automargin": True},
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit, "y1": limit, "line": dashed}],
    }  # fmt: skip
    note = f"Models whose {document['target']} was measured; the dashed line is how many points may be lost."
    return Figure("frontier", "Frontier", note, data, layout, wide=True)


def _histograms(found: Mapping[str, Any]) -> Figure:
    data = []
    for name, histogram in found.items():
        edges = histogram["edges"]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        for when, colour in (("before", "--faint"), ("after", "--one")):
            data.append({
                "type": "bar", "x": middles, "y": histogram[when], "name": when, "marker": {"color": colour},
                "meta": name, "visible": name == next(iter(found)), "width": edges[1] - edges[0],
                "hovertemplate": "about %{x:.3g}: %{y:,} entries " + when + "<extra></extra>",
            })  # fmt: skip
    layout = {
        "height": 360, "margin": {"l": 10, "r": 15, "t": 10, "b": 10}, "barmode": "overlay", "bargap": 0,
        "xaxis": {"title": {"text": "value"}, "automargin": True},
        "yaxis": {"title": {"text": "entries that are not zero"}, "automargin": True},
        "legend": {"orientation": "h", "y": -0.25, "yanchor": "top", "x": 0},
    }  # fmt: skip
    return Figure(
        "histograms", "Weights before and after", "Values that are not zero.", data, layout, [str(n) for n in found]
    )


def _latency(found: Mapping[str, Any]) -> Figure:
    named = [("dense", found["baseline"], "--faint"), ("model", found["latency"], "--one")]
    shown = [(name, latency, colour) for name, latency, colour in named if latency is not None]
    pick: Callable[[str], list[float]] = lambda key: [latency[key] for _, latency, _ in shown]  # noqa: E731
    bar = {
        "type": "bar", "orientation": "h", "y": [name for name, *_ in shown], "x": pick("median"),
        "marker": {"color": [colour for *_, colour in shown]},
        "error_x": {"type": "data", "symmetric": False, "color": "--text",
                    "array": [latency["high"] - latency["median"] for _, latency, _ in shown],
                    "arrayminus": [latency["median"] - latency["low"] for _, latency, _ in shown]},
        "hovertemplate": "%{y}: %{x:.4g} ms<extra></extra>",
    }  # fmt: skip
    layout = {
        "height": 100 + 50 * len(shown), "margin": {"l": 10, "r": 15, "t": 10, "b": 10},
        "xaxis": {"ticksuffix": " ms", "automargin": True, "rangemode": "tozero"},
        "yaxis": {"automargin": True, "autorange": "reversed", "ticks": ""}, "showlegend": False, "bargap": 0.4,
    }  # fmt: skip
    note = "Median and middle half of runs in onnxruntime, taken in turns."
    return Figure("latency", "Latency", note, [bar], layout)
