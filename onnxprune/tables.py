"""What the command line shows, as rich tables and plain sentences; legible from 80 columns on.

Names come from files and are shown as they are: never read as markup, control characters escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress

    from onnxprune.graph.weights import Skipped
    from onnxprune.inspection import Inspection, Port, WeightInfo
    from onnxprune.lowering.lower import Lowering
    from onnxprune.results import Report
    from onnxprune.runtime.benchmark import Benchmark, Latency
    from onnxprune.runtime.evaluate import Evaluation
    from onnxprune.structure import Explanation, GroupInfo, PinnedInfo

UNKNOWN = "?"
NOT_FASTER = (
    "Unstructured sparsity alone does not make onnxruntime faster: its kernels multiply zeros like any other number "
    "(those of N:M and block patterns too)."
)
CUT = "What was pruned is gone from the graph: its tensors are smaller."
LISTED = 6
"""Names that are listed for one reason; --json gives all."""

LABEL = len("non-zero parameters")


@dataclass(frozen=True)
class Sizes:
    """Parameters that are not zero and bytes of the files, before and after pruning. None: nothing was written."""

    parameters: int
    nonzero_before: int
    nonzero: int
    bytes_before: int
    bytes: int | None


def bar(stream: IO[str]) -> Progress:
    """How far a piece of work is, in bytes, and how fast; it goes away when the work is done."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Shown

    console = Console(file=stream)
    text = TextColumn("{task.description}", markup=False)
    columns = text, BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    return Shown(*columns, console=console, transient=True)


def pruned(report: Report) -> Iterator[RenderableType]:
    """What was zeroed, per weight and in total, and what was left alone."""
    table = columns("weight", "operator", "shape", right=("entries", "zeros", "sparsity"))
    for row in report.rows:
        zeros = f"{row.zeros_before:,} → {row.zeros:,}"
        table.add_row(
            plain(row.name), plain(row.op_type), _shape(row.shape), f"{row.size:,}", zeros, percent(row.sparsity)
        )
    table.add_section()
    before = sum(row.zeros_before for row in report.rows)
    zeros = f"{before:,} → {report.zeros:,}"
    table.add_row(*_bold("total", "", "", f"{report.size:,}", zeros, percent(report.sparsity)))
    yield table
    yield from left_alone(report.skipped)


def channels(report: Report) -> Iterator[RenderableType]:
    """What became of each group of channels, and how the cut model was checked; nothing where there are none."""
    if not report.groups:
        return
    table = columns("channels of", right=("channels", "left", "share left"))
    for group in report.groups:
        what = f"{group.size:,}" if group.width == 1 else f"{group.size:,} of {group.width}"
        table.add_row(plain(group.name), what, f"{group.kept:,}", percent(group.kept / group.size))
    yield table
    if report.difference is not None:
        yield sentence(
            f"Checked in onnxruntime: with the channels cut out, the outputs differ by {report.difference:.1g} of "
            "their scale from those of the model with the same channels zeroed."
        )


def lowered(lowering: Lowering) -> Iterator[RenderableType]:
    """What became of each layer with grouped inputs, and how the model was checked."""
    if lowering.rows:
        table = columns("lowered", "operator", right=("groups", "inputs", "faster"), last="as")
        for row in lowering.rows:
            kept = f"{row.kept:,} of {row.inputs:,}"
            table.add_row(
                plain(row.name), row.op_type, f"{row.groups:,}", kept, f"{row.dense / row.lowered:.2f}", row.form
            )
        yield table
        sources = {row.source for row in lowering.rows}
        if sources != {"measured"}:
            yield sentence(f"How much faster each layer is on its own: {' and '.join(sorted(sources))}.")
    else:
        yield sentence("No layer of this model gains by being lowered; it stays as it is.")
    if lowering.difference is not None:
        yield sentence(
            f"Checked in onnxruntime: the outputs of the lowered model differ by {lowering.difference:.1g} of their "
            "scale from those of the model with the same zeros."
        )
    if lowering.dense:
        stays = columns("stays dense", last="because")
        for item in lowering.dense:
            stays.add_row(plain(f"{item.name} ({item.op_type})"), plain(item.reason))
        yield stays


def explained(explanation: Explanation) -> Iterator[RenderableType]:
    """The groups of a model, and what pins the others."""
    if explanation.groups:
        table = columns("channels of", right=("channels",), last="with them go")
        for group in explanation.groups:
            what = f"{group.size:,}" if group.width == 1 else f"{group.size:,} of {group.width}"
            table.add_row(plain(group.name), what + " heads" * group.heads, _along(group))
        yield table
    else:
        yield sentence("No channels of this model can be pruned.")
    if explanation.pinned:
        pinned = columns("pinned", right=("outputs",), last="because")
        reasons: dict[str, list[PinnedInfo]] = {}
        for item in explanation.pinned:
            reasons.setdefault(item.reason, []).append(item)
        for reason, items in reasons.items():
            sizes = sorted({item.outputs for item in items})
            span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,}-{sizes[-1]:,}"
            pinned.add_row(_several([f"{item.name} ({item.op_type})" for item in items]), span, plain(reason))
        yield pinned
    yield from left_alone(explanation.skipped)


def compared(
    sizes: Sizes, evaluation: Evaluation | None, benchmark: Benchmark | str | None
) -> Iterator[RenderableType]:
    """Dense beside pruned.

    Args:
        sizes: parameters and files.
        evaluation: on the user's data, if there were any.
        benchmark: latencies, or the reason why there are none; None where they were not wanted.
    """
    table = columns("", right=("dense", "pruned"), last="change")
    if evaluation is not None:
        _accuracy(table, evaluation)
    fewer = f"{sizes.nonzero_before / sizes.nonzero:.2f} times fewer" if sizes.nonzero else "all gone"
    fewer = fewer if sizes.nonzero < sizes.nonzero_before else "none"
    table.add_row("non-zero parameters", f"{sizes.nonzero_before:,}", f"{sizes.nonzero:,}", fewer)
    if sizes.bytes is not None:
        table.add_row(
            "file size", size(sizes.bytes_before), size(sizes.bytes), _size_change(sizes.bytes_before, sizes.bytes)
        )
    if benchmark is not None and not isinstance(benchmark, str):
        _latency(table, benchmark)
    yield table
    if isinstance(benchmark, str):
        yield sentence(f"Latency was not measured: {benchmark}")
    elif benchmark is not None:
        yield sentence(_measured(benchmark))
    yield from _notes((*(evaluation.notes if evaluation else ()), *_assumed(benchmark)))


def verdict(
    sparsity: float, benchmark: Benchmark | str | None, written: Path | None, *, cut: bool = False
) -> Iterator[RenderableType]:
    """Sparsity is not speed: said plainly, with what was measured beside it. And where the result is.

    Args:
        sparsity: share of zeros.
        benchmark: latencies, or the reason why there are none.
        written: the file.
        cut: whether what was pruned is gone from the graph.
    """
    text = CUT if cut else NOT_FASTER
    if benchmark is not None and not isinstance(benchmark, str) and benchmark.baseline is not None:
        dense, now = _time(benchmark.baseline), _time(benchmark.latency)
        difference = _difference(benchmark).replace("not measurable", "no measurable difference")
        what = "fewer weights" if cut else "zeros"
        text += f" Measured here: {percent(sparsity)} {what}, latency {now}, dense {dense}: {difference}."
    yield sentence(text)
    yield sentence("Nothing was written." if written is None else f"Written: {written}")


def inspected(inspection: Inspection) -> Iterator[RenderableType]:
    """A model's weights in their roles, and its totals."""
    table = columns("weight", "operator", "shape", right=("entries", "sparsity", "MACs"))
    mixed = len({weight.dtype for weight in inspection.weights}) > 1
    for weight in inspection.weights:
        operators = ", ".join(weight.op_types)
        macs = UNKNOWN if weight.macs is None else f"{weight.macs:,}"
        shape = _shape(weight.shape) + (f" {weight.dtype}" if mixed else "")
        table.add_row(plain(weight.name), plain(operators), shape, f"{weight.size:,}", percent(weight.sparsity), macs)
    table.add_section()
    total = _macs(inspection)
    table.add_row(*_bold("total", "", "", f"{inspection.size:,}", percent(inspection.sparsity), total))
    yield table
    yield from left_alone(inspection.skipped)
    yield from _unknown_macs(inspection.weights)
    yield _facts(inspection)
    yield from _notes(inspection.notes)


def evaluated(evaluation: Evaluation) -> Iterator[RenderableType]:
    """A model's result on data, beside its baseline's."""
    if evaluation.agreement is not None:
        table = columns("", right=("baseline", "model"), last="change")
        _accuracy(table, evaluation)
        yield table
    elif evaluation.score is not None:
        yield sentence(f"{_metric(evaluation)}: {_score(evaluation.metric, evaluation.score)}")
    yield sentence(f"Measured on {evaluation.samples:,} samples.")
    yield from _notes(evaluation.notes)


def benchmarked(benchmark: Benchmark) -> Iterator[RenderableType]:
    """A model's latency, beside its baseline's."""
    if benchmark.baseline is not None:
        table = columns("", right=("baseline", "model"), last="change")
        _latency(table, benchmark)
        yield table
    else:
        yield sentence(f"Latency {_spread(benchmark.latency)}.")
    shapes = ", ".join(f"{name} {_shape(shape)}" for name, shape in benchmark.shapes.items())
    yield sentence(f"{_measured(benchmark)} Inputs: {shapes}.")
    yield from _notes(benchmark.notes)


def left_alone(skipped: Sequence[Skipped]) -> Iterator[RenderableType]:
    """Weights that were left alone, grouped by reason; nothing where there are none."""
    if not skipped:
        return
    table = columns("left alone", last="because")
    reasons: dict[str, list[str]] = {}
    for item in skipped:
        reasons.setdefault(item.reason, []).append(f"{item.name} ({item.op_type})")
    for reason, names in reasons.items():
        table.add_row(_several(names), plain(reason))
    yield table


def sentence(text: str) -> RenderableType:
    """A paragraph of its own."""
    return Padding(plain(text), (0, 0, 1, 1))


def percent(share: float) -> str:
    """`80.00 %`; what is not all is never shown as 100."""
    text = f"{100 * share:.2f}"
    return "99.99 %" if text == "100.00" and share < 1 else f"{text} %"


def size(count: int) -> str:
    """Bytes, in decimal units."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}" if count < 1000 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count} bytes"


def escaped(text: str) -> str:
    """A text from outside with its control characters, and whatever else does not print, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


# ---------------------------------------------------------------------------------------------------------- rows


def _accuracy(table: Table, evaluation: Evaluation) -> None:
    if evaluation.score is not None:
        cells = [_score(evaluation.metric, value) for value in (evaluation.baseline_score, evaluation.score)]
        table.add_row(plain(_metric(evaluation)), *cells, _score_change(evaluation))
    agreement = evaluation.agreement
    if agreement is None:
        return
    if agreement.top1 is not None:
        table.add_row("same predictions", "", percent(agreement.top1), "")
    if evaluation.score is None:
        if agreement.cosine is not None:
            table.add_row("cosine similarity", "", f"{agreement.cosine:.6f}", "")
        if agreement.largest_difference is not None:
            table.add_row("largest difference", "", f"{agreement.largest_difference:.4g}", "")


def _latency(table: Table, benchmark: Benchmark) -> None:
    dense = "" if benchmark.baseline is None else _spread(benchmark.baseline)
    table.add_row("latency", dense, _spread(benchmark.latency), _difference(benchmark))


def _metric(evaluation: Evaluation) -> str:
    return "accuracy (top-1)" if evaluation.metric == "top-1" else str(evaluation.metric)


def _score(metric: str | None, value: float | None) -> str:
    if value is None:
        return ""
    return percent(value) if metric == "top-1" else f"{value:.6g}"


def _score_change(evaluation: Evaluation) -> str:
    if evaluation.drop is None:
        return ""
    if evaluation.drop == 0:
        return "none"
    change = -evaluation.drop
    return f"{100 * change:+.2f} points" if evaluation.metric == "top-1" else f"{change:+.4g}"


def _size_change(before: int, after: int) -> str:
    change = after - before
    if abs(change) < 10_000:
        return f"{change:+,} bytes" if change else "none"
    return f"{size(abs(change))} {'more' if change > 0 else 'less'}"


def _difference(benchmark: Benchmark) -> str:
    if benchmark.speedup is None:
        return ""
    if not benchmark.significant:
        return "not measurable"
    ratio, word = (benchmark.speedup, "faster") if benchmark.speedup > 1 else (1 / benchmark.speedup, "slower")
    return f"{ratio:.2f} times {word}"


def _spread(latency: Latency) -> str:
    """Median and half the distance between the quartiles, in one unit and to one precision."""
    factor, unit = (1, "ms") if latency.median >= 0.1 else (1000, "µs")
    median, half = factor * latency.median, factor * (latency.high - latency.low) / 2
    digits = max(2 - math.floor(math.log10(median)), 0) if median > 0 else 0
    return f"{median:.{digits}f} ± {half:.{digits}f} {unit}"


def _time(latency: Latency) -> str:
    return _spread(latency).partition(" ±")[0] + _spread(latency)[-3:]


def _measured(benchmark: Benchmark) -> str:
    threads = "1 thread" if benchmark.threads == 1 else f"{benchmark.threads} threads"
    version = benchmark.versions.get("onnxruntime", "")
    return f"Latency: median ± half the interquartile range of {benchmark.runs} runs, onnxruntime {version}, {threads}."


def _macs(inspection: Inspection) -> str:
    if inspection.macs_complete:
        return f"{inspection.macs:,}"
    return f"> {inspection.macs:,}" if inspection.macs else UNKNOWN


def _unknown_macs(weights: Iterable[WeightInfo]) -> Iterator[RenderableType]:
    reasons: dict[str, list[str]] = {}
    for weight in weights:
        if weight.macs is None:
            reasons.setdefault(weight.macs_unknown, []).append(weight.name)
    if reasons:
        table = columns("MACs not known of", last="because")
        for reason, names in reasons.items():
            table.add_row(_several(names), plain(reason))
        yield table


def _facts(inspection: Inspection) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in inspection.opsets.items())
    zeros = inspection.parameters - inspection.nonzero
    grid.add_row("parameters", f"{inspection.parameters:,} ({inspection.nonzero:,} non-zero, {zeros:,} zero)")
    if inspection.file_bytes is not None:
        grid.add_row("file size", size(inspection.file_bytes))
    grid.add_row("opset", plain(f"{opsets}; IR version {inspection.ir_version}"))
    if inspection.producer:
        grid.add_row("producer", plain(inspection.producer))
    for label, ports in (("input", inspection.inputs), ("output", inspection.outputs)):
        for port in ports:
            grid.add_row(label, plain(_port(port)))
    return Padding(grid, (0, 0, 1, 1))


def _port(port: Port) -> str:
    if port.shape is None:
        declared = f"{port.name} {port.dtype}"
    else:
        declared = f"{port.name} {port.dtype}[{', '.join(UNKNOWN if d is None else str(d) for d in port.shape)}]"
    if port.taken is None or port.taken == port.shape:
        return declared
    return f"{declared} taken as {'x'.join(UNKNOWN if d is None else str(d) for d in port.taken) or 'a scalar'}"


# ------------------------------------------------------------------------------------------------------- helpers


def columns(*left: str, right: Sequence[str] = (), last: str = "") -> Table:
    """A table with a rule under its head: texts fold, numbers stand to the right and do not wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=True, padding=(0, 1), header_style="bold")
    for title in left:
        table.add_column(title, overflow="fold", no_wrap=title == "shape", min_width=len(title) or LABEL)
    for title in right:
        table.add_column(title, justify="right", no_wrap=True)
    if last:
        table.add_column(last, overflow="fold")
    return table


def plain(text: str) -> Text:
    """A text from outside: never read as markup, control characters escaped."""
    return Text(escaped(text))


def _bold(*cells: str) -> list[Text]:
    return [Text(cell, style="bold") for cell in cells]


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _along(group: GroupInfo) -> Text:
    """What goes with the channels of a group: weights by name, biases and norms by number."""
    parts = []
    for role in ("output", "input"):
        names = [member.name for member in group.members if member.role == role]
        if others := [name for name in names if role == "input" or name != group.name]:
            parts.append(f"{role}s of {_several(others)}")
    if count := sum(member.role == "parameter" for member in group.members):
        parts.append(f"{count} other tensor{'s' if count > 1 else ''}")
    return plain("; ".join(parts))


def _several(names: Sequence[str]) -> Text:
    more = len(names) - LISTED
    shown = [*names[:LISTED], *([f"and {more} more"] if more > 0 else [])]
    return plain(", ".join(shown))


def _assumed(benchmark: Benchmark | str | None) -> tuple[str, ...]:
    return () if benchmark is None or isinstance(benchmark, str) else benchmark.notes


def _notes(notes: Iterable[str]) -> Iterator[RenderableType]:
    texts = [plain(f"note: {note}") for note in notes]
    for index, text in enumerate(texts):
        yield Padding(text, (0, 0, int(index == len(texts) - 1), 1))
