"""The page: tables and figures of a report's JSON in one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from onnxprune.errors import PruneError
from onnxprune.graph import saving
from onnxprune.report import figures
from onnxprune.tables import escaped, percent, size

TITLES = {
    "prune": "Pruned",
    "sensitivity": "Sensitivity",
    "auto": "Search",
    "evaluate": "Evaluated",
    "benchmark": "Benchmark",
}


def check() -> None:
    """Refuse before anything is measured where the plotting library is missing.

    Raises:
        PruneError: it is.
    """
    try:
        import plotly.offline  # noqa: F401
    except ImportError as error:
        raise PruneError("a report needs plotly: pip install 'onnxprune[report]'") from error


def write(document: Mapping[str, Any], target: Path) -> Path:
    """Write the page: to a temporary file in the target's folder, then renamed.

    Raises:
        PruneError: plotly is missing, or the file cannot be written.
    """
    check()
    with saving.replacing(target) as draft:
        draft.write_text(page(document), encoding="utf-8")
    return target


def page(document: Mapping[str, Any]) -> str:
    """The page's text. Whatever comes from a model is escaped; only the two scripts here may run."""
    from plotly.offline import get_plotlyjs

    drawn = list(figures.of(document))
    own = resources.files("onnxprune.report")
    scripts = [get_plotlyjs(), own.joinpath("page.js").read_text(encoding="utf-8")]
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    data = {figure.id: {"data": figure.data, "layout": figure.layout} for figure in drawn}
    body = "".join([_head(document), *map(_figure, drawn), *_tables(document), *_circumstances(document)])
    name = f"onnxprune: {TITLES[document['kind']]} {document.get('model', '')}"
    return "".join([
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">',
        f"<title>{_text(name)}</title>",
        f"<style>{own.joinpath('page.css').read_text(encoding='utf-8')}</style></head><body><main>{body}</main>",
        f'<script type="application/json" id="json">{_inert(document)}</script>',
        f'<script type="application/json" id="figures">{_inert(data)}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ])  # fmt: skip


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _inert(value: Any) -> str:
    """JSON that cannot end the element it stands in."""
    text = json.dumps(value, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _text(value: object) -> str:
    return html.escape(escaped(str(value)))


def _head(document: Mapping[str, Any]) -> str:
    model = document.get("model")
    shown = f' <span class="model">{_text(model)}</span>' if model else ""
    tiles = "".join(
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(name)}</span></div>' for name, value in _tiles(document)
    )
    return f'<h1>{TITLES[document["kind"]]}{shown}</h1><div class="tiles">{tiles}</div>'


def _tiles(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The few numbers that matter most."""
    report, evaluation, timed = (document.get(key) or {} for key in ("report", "evaluation", "benchmark"))
    if report:
        yield "zeros or cut out", percent(report["sparsity"])
    if evaluation.get("score") is not None:
        yield _metric(evaluation), _score(evaluation, "score")
    if evaluation.get("drop") is not None:
        yield "points lost", f"{100 * evaluation['drop']:.2f}"
    elif (evaluation.get("agreement") or {}).get("top1") is not None:
        yield "same predictions", percent(evaluation["agreement"]["top1"])
    if timed.get("speedup"):
        yield "times as fast" + ("" if timed["significant"] else " (not significant)"), f"{timed['speedup']:.2f}"
    elif timed:
        yield "latency", f"{timed['latency']['median']:.3g} ms"
    if document.get("best"):
        yield f"{document['target']} left", percent(document["best"]["value"])
    if document.get("candidates") is not None:
        yield "models tried", str(len(document["candidates"]))
    if document.get("curves") is not None:
        yield "curves", str(len(document["curves"]))
        yield "samples", f"{document['samples']:,}"


def _figure(figure: figures.Figure) -> str:
    choice = ""
    if figure.choices:
        options = "".join(f'<option value="{i}">{_text(name)}</option>' for i, name in enumerate(figure.choices))
        choice = f'<label>weight <select data-figure="{_text(figure.id)}">{options}</select></label>'
    tall = " tall" if figure.layout.get("height", 0) > 900 else ""
    head = f'<h2>{_text(figure.title)}</h2><p class="note">{_text(figure.note)}</p>{choice}'
    plot = f'<div class="frame{tall}"><div class="plot" id="{_text(figure.id)}"></div></div>'
    return f'<section class="figure{" wide" * figure.wide}">{head}{plot}</section>'


# ------------------------------------------------------------------------------------------------------------ tables


def _tables(document: Mapping[str, Any]) -> Iterator[str]:
    yield from _beside(document)
    rows = (document.get("report") or {}).get("weights") or []
    if rows:
        head = ("weight", "operator", "shape", "entries", "zeros before", "zeros", "sparsity")
        cells: list[tuple[Any, ...]] = [
            (r["name"], r["op_type"], "x".join(map(str, r["shape"])), f"{r['size']:,}", f"{r['zeros_before']:,}",
             f"{r['zeros']:,}", percent(r["sparsity"]))
            for r in rows
        ]  # fmt: skip
        yield _table("Weights", head, cells, right=4)
    groups = (document.get("report") or {}).get("groups") or []
    if groups:
        cells = [(g["name"], f"{g['size']:,}", f"{g['kept']:,}", percent(g["kept"] / g["size"])) for g in groups]
        yield _table("Channels", ("channels of", "channels", "left", "share left"), cells, right=3)
    for found in [document, *(document.get("sensitivity") or {}).values()]:
        if found.get("curves"):
            yield _curves(found)
    if document.get("candidates"):
        yield _candidates(document)
    skipped = [*((document.get("report") or {}).get("skipped") or ()), *(document.get("skipped") or ())]
    if skipped:
        cells = [(s["name"], s["op_type"], s["reason"]) for s in skipped]
        yield _table("Left alone", ("weight", "operator", "because"), cells, right=0)
    parts = [document, *((document.get(key) or {}) for key in ("report", "evaluation", "benchmark"))]
    notes = [note for part in parts for note in part.get("notes") or ()]
    if notes:
        items = "".join(f"<li>{_text(note)}</li>" for note in notes)
        yield f'<section class="wide"><h2>Notes</h2><ul>{items}</ul></section>'


def _beside(document: Mapping[str, Any]) -> Iterator[str]:
    """Dense beside pruned."""
    evaluation, sizes, timed = (document.get(key) or {} for key in ("evaluation", "sizes", "benchmark"))
    cells: list[Sequence[str]] = []
    if evaluation.get("score") is not None:
        cells.append((_metric(evaluation), _score(evaluation, "baseline_score"), _score(evaluation, "score")))
    agreement = evaluation.get("agreement") or {}
    if agreement.get("top1") is not None:
        cells.append(("same predictions", "", percent(agreement["top1"])))
    if agreement.get("cosine") is not None:
        cells.append(("cosine similarity", "", f"{agreement['cosine']:.6f}"))
    if agreement.get("largest_difference") is not None:
        cells.append(("largest difference", "", f"{agreement['largest_difference']:.4g}"))
    if sizes:
        cells.append(("non-zero parameters", f"{sizes['nonzero_before']:,}", f"{sizes['nonzero']:,}"))
        after = "" if sizes["bytes"] is None else size(sizes["bytes"])
        cells.append(("file size", size(sizes["bytes_before"]), after))
    if document.get("best"):
        what, best = document["target"], document["best"]
        dense, kept = document["dense"], document["best"]["value"]
        if what == "size":
            cells.append(("deflated file", size(round(dense)), size(round(dense * kept))))
        if what == "macs":
            cells.append(("MACs", f"{dense:,.0f}", f"{dense * kept:,.0f}"))
        cells.append(("points lost, search's data", "", f"{100 * best['loss']:.2f}"))
        cells.append(("points lost, data held back", "", f"{100 * best['held_back']:.2f}"))
    if timed.get("latency"):
        dense_time = "" if timed["baseline"] is None else f"{timed['baseline']['median']:.4g} ms"
        cells.append((f"latency ({timed['threads']} thread)", dense_time, f"{timed['latency']['median']:.4g} ms"))
    if cells:
        yield _table("Dense beside pruned", ("", "dense", "pruned"), cells, right=2, wide=False)


def _curves(found: Mapping[str, Any]) -> str:
    levels = sorted({p["level"] for c in found["curves"] for p in c["points"]})
    head = ("only this pruned", "entries", *(f"at {100 * level:g} %" for level in levels), "samples")
    cells = []
    for curve in found["curves"]:
        by = {p["level"]: p for p in curve["points"]}
        lost = [f"{100 * by[level]['loss']:.2f}" if level in by else "" for level in levels]
        most = max((p["samples"] for p in curve["points"]), default=0)
        cells.append((curve["name"], f"{curve['size']:,}", *lost, f"{most:,}"))
    return _table(f"Points lost ({found['pattern']})", head, cells, right=len(head) - 1)


def _candidates(document: Mapping[str, Any]) -> str:
    head = ("recipe", "strength", f"{document['target']} left", "points lost", "held back", "")
    cells = []
    for c in document["candidates"]:
        value = "" if c["value"] is None else percent(c["value"])
        loss = c["error"] if c["loss"] is None else f"{100 * c['loss']:.2f}"
        held = "" if c["held_back"] is None else f"{100 * c['held_back']:.2f}"
        kept = "kept" if c == document["best"] else "written" if c["written"] else ""
        cells.append((c["recipe"], f"{c['strength']:.4g}", value, loss, held, kept))
    return _table("Models tried", head, cells, right=5)


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], right: int, wide: bool = True) -> str:
    """A table whose last `right` columns are numbers."""
    numeric = len(head) - right

    def row(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="number"' if index >= numeric else "" for index in range(len(cells))]
        return "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    named = f"<thead><tr>{row(head, 'th')}</tr></thead>" if any(head) else ""
    table = f"<table>{named}<tbody>{body}</tbody></table>"
    return f'<section class="{"wide" * wide}"><h2>{_text(title)}</h2><div class="scroll">{table}</div></section>'


def _circumstances(document: Mapping[str, Any]) -> Iterator[str]:
    yield f'<section class="wide"><h2>Command</h2><pre>{_text(document["command"])}</pre></section>'
    yield _table("Environment", ("", ""), list(document["environment"].items()), right=0, wide=False)
    if document.get("configuration") is not None:
        shown = json.dumps(document["configuration"], indent=2, default=str).split("\n")
        lines = "\n".join(map(_text, shown))
        yield f"<section><h2>Configuration</h2><pre>{lines}</pre></section>"


def _metric(evaluation: Mapping[str, Any]) -> str:
    return "accuracy (top-1)" if evaluation["metric"] == "top-1" else str(evaluation["metric"])


def _score(evaluation: Mapping[str, Any], key: str) -> str:
    value = evaluation.get(key)
    if value is None:
        return ""
    return percent(value) if evaluation["metric"] == "top-1" else f"{value:.6g}"
