"""The commands that measure what bears how much: sensitivity and auto."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onnxprune.cli_options import DATA, Json, Metric, Model, Report, Shapes
from onnxprune.cli_output import INTERRUPTED, check_report, interrupted, print_json, reported, results_only, say, show
from onnxprune.errors import PruneError

if TYPE_CHECKING:
    from onnxprune.search import Candidate

GATE_NOT_MET = 1

Data = Annotated[str, typer.Option(metavar="DATA", help=DATA, show_default=False)]
Jobs = Annotated[int, typer.Option(metavar="N", help="Processes side by side; -1 is one per CPU.")]
Threads = Annotated[int, typer.Option(metavar="N", help="Threads of onnxruntime in each process.")]
Seed = Annotated[int, typer.Option(metavar="N", help="Of the samples' order.")]
Names = Annotated[
    list[str] | None, typer.Option("--op-names", metavar="NAME", help="Only weights of this name or pattern.")
]
Types = Annotated[list[str] | None, typer.Option("--op-types", metavar="TYPE", help="Only these operators.")]
Exclude = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Not weights of this name or pattern.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command(short_help="Measure how much each layer bears.")(sensitivity)
    app.command(short_help="Search for the smallest or fastest model within a drop.")(auto)


def sensitivity(
    model: Model,
    data: Data,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", "--report", metavar="OUT.html", help="Write a page about it."),
    ] = None,
    levels: Annotated[
        str | None, typer.Option(metavar="S,S,...", help="Sparsities; 0.25,0.5,0.7,0.8,0.9,0.95 unless given.")
    ] = None,
    pattern: Annotated[str, typer.Option(metavar="P", help="What goes; channel measures groups.")] = "unstructured",
    score: Annotated[str, typer.Option(metavar="NAME", help="What makes an entry matter.")] = "magnitude",
    op_types: Types = None,
    op_names: Names = None,
    exclude: Exclude = None,
    metric: Metric = None,
    precision: Annotated[
        float, typer.Option(metavar="X", help="A loss known to so much is known; 0 takes all samples.")
    ] = 0.01,
    latency: Annotated[bool, typer.Option("--latency", help="Time each group of channels cut out, too.")] = False,
    jobs: Jobs = -1,
    threads: Threads = 1,
    seed: Seed = 0,
    shape: Shapes = None,
    as_json: Json = False,
) -> None:
    """Prune each weight (or group of channels) alone at several levels and measure what is lost.

    Interrupted, the same command goes on from what is kept beside OUT.html.
    """
    check_report(output, model)
    tried = None if levels is None else _numbers(levels)
    keep = None if output is None else output.with_name(f"{output.name}.checkpoint")

    with results_only(lambda: interrupted(keep)):
        from onnxprune import curves
        from onnxprune.runtime.feeds import parse_shapes

        try:
            found = curves.sensitivity(
                model, data, levels=curves.LEVELS if tried is None else tried, pattern=pattern, score=score,
                op_types=[name for text in op_types for name in text.split(",")] if op_types else None,
                op_names=op_names or None, exclude=exclude or (), metric=metric, precision=precision, latency=latency,
                jobs=jobs, threads=threads, seed=seed, shapes=parse_shapes(shape or []), checkpoint=keep,
            )  # fmt: skip
        except KeyboardInterrupt:
            curves.end_processes()
            raise
        shown: dict[str, Any] = {"model": model, **found.to_dict()}
        if output is not None:
            settings = {"levels": tried, "precision": precision, "latency": latency, "metric": metric, "seed": seed}
            chosen = {"op_types": op_types, "op_names": op_names, "exclude": exclude}
            asked = {"pattern": pattern, "score": score, **chosen, **settings}
            asked = {key: value for key, value in asked.items() if value not in (None, False)}
            shown = reported(output, "sensitivity", shown, asked)
    if as_json:
        print_json(shown)
    else:
        from onnxprune import tables_search

        show(tables_search.sensitivity(found))


def auto(
    model: Model,
    data: Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)
    ],
    target: Annotated[str, typer.Option(metavar="size|macs|latency", help="What is made small.")] = "size",
    max_drop: Annotated[float, typer.Option(metavar="X", help="How much accuracy may fall.")] = 0.01,
    time: Annotated[str | None, typer.Option("--time", metavar="10m", help="How long to search: 90s, 10m, 2h.")] = None,
    hold_back: Annotated[float, typer.Option(metavar="S", help="Share of the data that only the gate sees.")] = 0.3,
    metric: Metric = None,
    jobs: Jobs = -1,
    threads: Threads = 1,
    seed: Seed = 0,
    shape: Shapes = None,
    force: Annotated[bool, typer.Option("--force", help="Allow OUT to be MODEL itself.")] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Search for the smallest or fastest model that keeps accuracy within a drop on data held back from the search.

    Ctrl-C ends it and keeps the best so far; the same command then goes on.
    """
    check_report(report, output, model)
    limit = None if time is None else _seconds(time)
    with results_only():
        from onnxprune import search
        from onnxprune.runtime.feeds import parse_shapes

        found = search.autoprune(
            model, data, output, max_drop=max_drop, target=target, time_limit=limit, hold_back=hold_back,
            metric=metric, jobs=jobs, threads=threads, seed=seed, shapes=parse_shapes(shape or []), force=force,
            checkpoint=output.with_name(f"{output.name}.checkpoint"), progress=_tell,
        )  # fmt: skip
        shown: dict[str, Any] = {"model": model, **found.to_dict()}
        if report is not None:
            shown = reported(report, "auto", shown, _chosen(target, max_drop, hold_back, seed, time))
    if as_json:
        print_json(shown)
    else:
        from onnxprune import tables_search

        show(tables_search.searched(found))
    if found.ended == "interrupted":
        say("interrupted")
        raise typer.Exit(INTERRUPTED)
    if found.best is None:
        say(f"gate not met: no model was within {max_drop:g} on the data held back; nothing was written")
        raise typer.Exit(GATE_NOT_MET)


def _chosen(target: str, max_drop: float, hold_back: float, seed: int, time: str | None) -> dict[str, Any]:
    return {"target": target, "max_drop": max_drop, "hold_back": hold_back, "seed": seed, "time": time}


def _tell(candidate: Candidate) -> None:
    from onnxprune.tables_search import line

    say(line(candidate))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PruneError(f"--levels is '{text}'; expected sparsities such as 0.5,0.8,0.9") from None


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise PruneError(f"--time is '{text}'; expected a duration such as 90s, 10m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
