"""The command line: prune, lower, inspect, explain, evaluate, benchmark.

Exit status 0 is done, 1 a gate that was not met, 2 bad input or usage. Results go to stdout, as tables or with
--json as one JSON object; everything else goes to stderr, errors as one paragraph.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from onnxprune import cli_search
from onnxprune.cli_options import DATA, Baseline, Json, Metric, Model, NoTiming, Report, Shapes, Table, Threads
from onnxprune.cli_output import (
    INTERRUPTED,
    check_report,
    interrupted,
    leave,
    print_json,
    reported,
    results_only,
    say,
    show,
)
from onnxprune.errors import PruneError

if TYPE_CHECKING:
    from onnxprune.inspection import Inspection
    from onnxprune.results import Result
    from onnxprune.runtime.benchmark import Benchmark
    from onnxprune.tables import Sizes

GATE_NOT_MET, BAD_INPUT = 1, 2
# typer has no public name for the parent of its usage errors, and where it keeps it differs between versions.
_USAGE_ERRORS = cast("tuple[type[Exception], ...]", typer.BadParameter.__bases__)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Prune neural networks where they are deployed: in their ONNX graph.",
    epilog="Exit status: 0 done, 1 accuracy fell by more than --max-drop, 2 bad input or usage.",
)


cli_search.register(app)


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        from onnxprune._version import __version__

        print(f"onnxprune {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(BAD_INPUT)


@app.command(short_help="Zero what matters least; show what it cost and bought.")
def prune(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)
    ],
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", metavar="S", help="Share of each weight to zero, from 0 to 1.")
    ] = None,
    config: Annotated[
        str | None, typer.Option(metavar="FILE", help="YAML, JSON or TOML with a config list, instead of --sparsity.")
    ] = None,
    pruner: Annotated[
        str | None, typer.Option(metavar="level|agp|sensitivity|sparsegpt", help="Which algorithm; level unless given.")
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What makes an entry matter: magnitude (unless given), wanda, ..."),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="P", help="unstructured (unless given), channel, head, grouped[:G], N:M, block:RxC."),
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(metavar="uniform|global|erk|sensitivity", help="How much goes from each weight.")
    ] = None,
    op_types: Annotated[
        list[str] | None, typer.Option("--op-types", metavar="TYPE", help="Only these operators; may be repeated.")
    ] = None,
    op_names: Annotated[
        list[str] | None,
        typer.Option("--op-names", metavar="NAME", help="Only weights of this name or pattern; may be repeated."),
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Not weights of this name or pattern; may be repeated.")
    ] = None,
    epoch: Annotated[
        int | None, typer.Option(metavar="N", help="Where in its schedule agp is; the end unless given.")
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Refit what survives to the dense outputs on calibration data.")
    ] = False,
    data: Annotated[str | None, typer.Option(metavar="DATA", help=f"Compare dense and pruned on it. {DATA}")] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="DATA", help="What decides, instead of --data; labels are not needed.")
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For calibrating, as 2GB; a quarter of the machine's unless given."),
    ] = None,
    metric: Metric = None,
    max_drop: Annotated[
        float | None, typer.Option(metavar="X", help="If accuracy falls by more, write nothing and exit with 1.")
    ] = None,
    keep_shape: Annotated[
        bool,
        typer.Option("--keep-shape", help="Zero in place what else would be cut out or lowered."),
    ] = False,
    inexact: Annotated[
        bool, typer.Option("--inexact", help="Let norms over channels lose some; the cut model is then not checked.")
    ] = False,
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not hold the cut or lowered model against the zeroed one.")
    ] = False,
    compact: Annotated[
        bool, typer.Option("--compact", help="Cut out the channels that zeros have made dead; nothing else changes.")
    ] = False,
    align: Annotated[
        str, typer.Option(metavar="auto|N", help="Round channel counts to a multiple of what kernels take at once.")
    ] = "auto",
    sparse: Annotated[
        bool, typer.Option("--sparse", help="Store as sparse_initializer what that makes smaller.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Allow OUT to be MODEL itself.")] = False,
    masks: Annotated[Path | None, typer.Option(metavar="FILE.npz", help="Write the masks too, bit-packed.")] = None,
    shape: Shapes = None,
    threads: Threads = None,
    latency_table: Table = None,
    no_timing: NoTiming = False,
    no_benchmark: Annotated[bool, typer.Option("--no-benchmark", help="Do not measure latency.")] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Zero the entries of a model's weights that matter least, and show what it cost and what it bought."""
    if compact and sparsity is None and config is None and pattern is None:
        sparsity = 0.0
    chosen = _config(sparsity, config, pattern, op_types, op_names, exclude)
    if masks is not None:
        _check_masks(masks, output, model)
    check_report(report, output, model)
    keep = output.with_name(f"{output.name}.checkpoint")
    with results_only(lambda: interrupted(keep)):
        from onnxprune import api
        from onnxprune.inspection import inspect
        from onnxprune.runtime.feeds import parse_shapes

        shapes = parse_shapes(shape or [])
        # What is replaced or cut has to be counted before; otherwise pruning counts most of it on its way.
        dense = inspect(model, shapes) if force or compact or shapes else None
        result = api.prune(
            model, chosen, output, data,
            pruner=pruner, score=score, pattern=pattern, allocation=allocation, inexact=inexact or None, epoch=epoch,
            reconstruct=reconstruct or None, calibration=calibration, max_memory=max_memory,
            max_drop=max_drop, metric=metric, sparse=sparse, force=force, threads=threads,
            keep_shape=keep_shape, verify=not no_verify, align=_align(align), shapes=shapes, compact=compact,
            timing=not no_timing, latency_table=latency_table, checkpoint=keep,
        )  # fmt: skip
        if masks is not None and result.accepted:
            result.masks.save(masks)
        latency = None if no_benchmark or result.path is None else _latency(result.path, model, shapes, threads)
        sizes = _sizes(dense, result, model)
        shown = _as_dict(model, result, sizes, latency)
        if report is not None:
            named = {"pruner": pruner, "score": score, "pattern": pattern, "allocation": allocation, "epoch": epoch}
            flags = {"inexact": inexact, "reconstruct": reconstruct, "compact": compact, "keep_shape": keep_shape}
            told = {key: value for key, value in {**named, **flags}.items() if value not in (None, False)}
            told["config_list" if isinstance(chosen, list) else "file"] = chosen
            shown = _page(report, shown, result, told, model)
    if as_json:
        print_json(shown)
    else:
        from onnxprune import tables

        show(tables.pruned(result.report))
        show(tables.channels(result.report))
        show(tables.sentence(note) for note in result.report.notes)
        if result.report.lowering is not None:
            show(tables.lowered(result.report.lowering))
        show(tables.compared(sizes, result.evaluation, latency))
        show(tables.verdict(result.sparsity, latency, result.path, cut=_smaller(result) and not keep_shape))
    if not result.accepted:
        say(_gate(result, max_drop))
        raise typer.Exit(GATE_NOT_MET)


@app.command(short_help="Turn zeros in groups into smaller, faster operators.")
def lower(
    model: Model,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="The file to write.", show_default=False)
    ],
    no_verify: Annotated[
        bool, typer.Option("--no-verify", help="Do not hold the lowered model against the given one.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Allow OUT to be MODEL itself.")] = False,
    shape: Shapes = None,
    threads: Threads = None,
    latency_table: Table = None,
    no_timing: NoTiming = False,
    as_json: Json = False,
) -> None:
    """Write layers whose zeros leave groups of outputs with inputs of their own as smaller operators."""
    with results_only():
        from onnxprune import api
        from onnxprune.runtime.feeds import parse_shapes

        shapes = parse_shapes(shape or [])
        found = api.lower(
            model, output, shapes=shapes, threads=1 if threads is None else threads, timing=not no_timing,
            latency_table=latency_table, verify=not no_verify, force=force,
        )  # fmt: skip
        assert found.path is not None
        latency = None if no_timing else _latency(found.path, model, shapes, threads)
    if as_json:
        timed = None if latency is None or isinstance(latency, str) else latency.to_dict()
        print_json({"model": model, "output": str(found.path), "lowering": asdict(found.report), "benchmark": timed})
    else:
        from onnxprune import tables

        show(tables.lowered(found.report))
        if latency is not None and not isinstance(latency, str):
            show(tables.benchmarked(latency))
        show([tables.sentence(f"Written: {found.path}")])


@app.command(short_help="Show weights, zeros and multiply-accumulates.")
def inspect(model: Model, shape: Shapes = None, as_json: Json = False) -> None:
    """Show a model's weights in their roles: shapes, zeros, multiply-accumulates, and what cannot be pruned and why."""
    with results_only():
        from onnxprune import inspection
        from onnxprune.runtime.feeds import parse_shapes

        found = inspection.inspect(model, parse_shapes(shape or []))
    if as_json:
        print_json(found.to_dict())
    else:
        from onnxprune import tables

        show(tables.inspected(found))


@app.command(short_help="Show the groups of channels, and what pins the others.")
def explain(model: Model, shape: Shapes = None, as_json: Json = False) -> None:
    """Show what lives or dies together in a model: its groups of channels and heads, and what pins the others."""
    with results_only():
        from onnxprune import structure
        from onnxprune.runtime.feeds import parse_shapes

        found = structure.explain(model, parse_shapes(shape or []))
    if as_json:
        print_json(found.to_dict())
    else:
        from onnxprune import tables

        show(tables.explained(found))


@app.command(short_help="Measure accuracy, or agreement with a baseline.")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(metavar="DATA", help=DATA, show_default=False)],
    baseline: Baseline = None,
    metric: Metric = None,
    threads: Threads = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Measure a model on data in onnxruntime: accuracy with labels, agreement with a baseline without."""
    check_report(report, model)
    with results_only():
        from onnxprune.runtime import evaluate as evaluation

        found = evaluation.evaluate(model, data, baseline, metric=metric, threads=threads)
        shown = found.to_dict()
        if report is not None:
            shown = reported(report, "evaluate", {"model": model, "evaluation": shown}) | shown
    if as_json:
        print_json(shown)
    else:
        from onnxprune import tables

        show(tables.evaluated(found))


@app.command(short_help="Measure latency, in turns with a baseline's.")
def benchmark(
    model: Model,
    baseline: Baseline = None,
    shape: Shapes = None,
    threads: Threads = None,
    runs: Annotated[
        int | None, typer.Option(metavar="N", help="Timed runs; as many as fit into 2 s unless given.")
    ] = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Measure a model's latency in onnxruntime, in turns with a baseline's."""
    check_report(report, model)
    with results_only():
        from onnxprune.runtime import benchmark as benchmarking
        from onnxprune.runtime.feeds import parse_shapes

        shapes = parse_shapes(shape or [])
        found = benchmarking.benchmark(
            model, baseline, shapes=shapes, threads=1 if threads is None else threads, runs=runs
        )
        shown = found.to_dict()
        if report is not None:
            shown = reported(report, "benchmark", {"model": model, "benchmark": shown}) | shown
    if as_json:
        print_json(shown)
    else:
        from onnxprune import tables

        show(tables.benchmarked(found))


def command() -> NoReturn:
    """The command of a terminal: runs the command line, and ends the process."""
    status = main()
    if status == INTERRUPTED:
        leave(status)
    sys.exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: those of the process unless given.

    Returns:
        The exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names in a file need not fit the terminal's encoding
    try:
        status = app(args=arguments, prog_name="onnxprune", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except _USAGE_ERRORS as error:
        say(f"error: {_usage(error)}")
    except PruneError as error:
        _trace()
        say(f"error: {error}")
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        return INTERRUPTED
    except Exception as error:
        _trace()
        say(
            f"error: unexpected {type(error).__name__}: {error}. This is a fault of onnxprune or of a library it uses; "
            "set ONNXPRUNE_DEBUG=1 to see where it happens"
        )
    return BAD_INPUT


# ------------------------------------------------------------------------------------------------- pieces of prune


def _config(
    sparsity: float | None,
    config: str | None,
    pattern: str | None,
    op_types: list[str] | None,
    op_names: list[str] | None,
    exclude: list[str] | None,
) -> Any:
    """The configuration that the options spell out, or the path of the file that holds it."""
    if config is not None:
        given = {"--sparsity": sparsity, "--op-types": op_types, "--op-names": op_names, "--exclude": exclude}
        if clash := [name for name, value in given.items() if value not in (None, [])]:
            raise PruneError(f"--config and {', '.join(clash)} are both given; the file says it all, so put it there")
        return config
    if sparsity is None and pattern is None:
        raise PruneError("nothing says how much to prune; give --sparsity S, from 0 to 1, or --config FILE")
    entry: dict[str, Any] = {} if sparsity is None else {"sparsity": sparsity}
    if op_types or not op_names:
        entry["op_types"] = [name for text in op_types for name in text.split(",")] if op_types else "default"
    if op_names:
        entry["op_names"] = list(op_names)
    return [entry, *({"op_names": [name], "exclude": True} for name in exclude or ())]


def _align(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise PruneError(f"--align is '{text}'; expected auto or a number of channels such as 8")
    return int(text)


def _check_masks(masks: Path, output: Path, model: str) -> None:
    """What would make the masks fail to be written is found out before the model is."""
    if not masks.parent.is_dir() or masks.is_dir():
        raise PruneError(f"cannot write masks to '{masks}': give the name of a file in an existing folder")
    if masks.resolve() in (output.resolve(), Path(model).resolve()):
        raise PruneError(f"--masks '{masks}' is the model itself or the output; choose another name")


def _latency(path: Path, model: str, shapes: dict[str, tuple[int, ...]], threads: int | None) -> Benchmark | str:
    """Latency beside the dense model's, or the reason why there is none: the pruned file stands either way."""
    from onnxprune.runtime.benchmark import benchmark

    if os.path.samefile(path, model):
        return "the dense model was replaced, so nothing is left to compare with"
    try:
        return benchmark(path, model, shapes=shapes, threads=1 if threads is None else threads)
    except PruneError as error:
        return str(error)


def _smaller(result: Result) -> bool:
    """Whether tensors are smaller than they were: channels are gone, or layers are lowered."""
    lowering = result.report.lowering  # it may take channels out, and find no layer to lower then
    return bool(result.report.groups or (lowering and (lowering.rows or lowering.difference is not None)))


def _sizes(dense: Inspection | None, result: Result, model: str) -> Sizes:
    from onnxprune.inspection import inspect, parameters, stored_bytes
    from onnxprune.tables import Sizes

    rows = result.report.rows
    if dense is None and _smaller(result):
        dense = inspect(model)
    if dense is None:
        total, before = parameters(result.model, {row.name: row.zeros_before for row in rows})
        stored = stored_bytes(model)
    else:
        total, before, stored = dense.parameters, dense.nonzero, dense.file_bytes or 0
    nonzero = before - sum(row.zeros - row.zeros_before for row in rows)
    if _smaller(result) and result.path is not None:  # biases and norms went too
        nonzero = inspect(result.path).nonzero
    return Sizes(total, before, nonzero, stored, result.file_bytes)


def _as_dict(model: str, result: Result, sizes: Sizes, latency: Benchmark | str | None) -> dict[str, Any]:
    report = result.report.to_dict()
    return {
        "model": model,
        "output": None if result.path is None else str(result.path),
        "accepted": result.accepted,
        "sparsity": result.sparsity,
        "report": report,
        "evaluation": None if result.evaluation is None else result.evaluation.to_dict(),
        "sizes": asdict(sizes),
        "benchmark": None if latency is None or isinstance(latency, str) else latency.to_dict(),
        "benchmark_skipped": latency if isinstance(latency, str) else None,
    }


def _page(report: Path, shown: dict[str, Any], result: Result, config: Any, model: str) -> dict[str, Any]:
    """Write the page; returns its JSON."""
    from onnxprune.report.document import histograms

    if result.path is None or os.path.samefile(result.path, model):
        return reported(report, "prune", shown, config)
    return reported(report, "prune", shown, config, histograms=histograms(model, result.path))


def _gate(result: Result, max_drop: float | None) -> str:
    assert result.evaluation is not None
    evaluation = result.evaluation
    what = "agreement with the dense model" if evaluation.metric is None else evaluation.metric
    fell = f"{what} fell by {evaluation.loss:.6g}, more than --max-drop {max_drop:g} allows"
    return f"gate not met: {fell}; nothing was written"


def _usage(error: Any) -> str:
    context = error.ctx
    command = "onnxprune" if context is None else context.command_path
    return f"{error.format_message().rstrip('.')} (see '{command} --help')"


def _trace() -> None:
    if os.environ.get("ONNXPRUNE_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
