"""Half of the channels of many architectures, cut out: `python bench_channels.py [SECTION or name ...]`.

Each architecture is exported into a temporary folder, pruned with `onnxprune.prune(pattern="channel")`, which holds
the result against the model with the same channels zeroed, and timed beside the dense model. Sections are structures
(hand-written nets), transformers (random weights), files (trained models from packages), keras (keras.applications)
and labels (time to find the groups). `--no-latency` skips timing; `--share 0.25` prunes another share.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import logging
import os
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from _architectures import Architecture, every
from bench_labels import label_times
from bench_select import processor

import onnxprune
from onnxprune.runtime.feeds import Feed, random_feeds
from onnxprune.runtime.session import Session, open_session
from onnxprune.structure import explain

HEADER = [
    "architecture",
    "from",
    "groups",
    "params left",
    "MACs left",
    "dense ms",
    "pruned ms",
    "speed-up",
    "of MACs",
    "difference",
    "pinned because",
]
PARAMETERS_BAR, SPEED_BAR = 0.35, 0.8
EMBEDDINGS = {"Embedding", "Gather"}


@dataclass(frozen=True)
class Row:
    """What came of one architecture.

    Attributes:
        architecture: which.
        exporter: what wrote it.
        groups: of channels; heads among them.
        parameters: share left.
        macs: share left; None where they are not known.
        dense: milliseconds; None where not timed.
        pruned: milliseconds.
        speedup: median of paired runs.
        difference: of the cut from the zeroed model.
        effect: of the cut from the dense model; where that is small, the check says little.
        pinned: reason -> number of weights whose outputs stay; the vocabularies of embeddings always do.
        heads: share of heads left; None where there are none.
        inner: share of channels left in all groups.
    """

    architecture: Architecture
    exporter: str
    groups: tuple[int, int]
    parameters: float
    macs: float | None
    dense: float | None
    pruned: float | None
    speedup: float | None
    difference: float
    effect: float
    pinned: Mapping[str, int]
    heads: float | None
    inner: float

    @property
    def of_macs(self) -> float | None:
        """The speed-up as a share of what the MACs promise."""
        return None if self.speedup is None or self.macs is None else self.speedup * self.macs

    def cells(self) -> list[str]:
        """For the table."""
        groups, heads = self.groups
        return [
            self.architecture.name,
            self.exporter,
            f"{groups} ({heads} of heads)" if heads else str(groups),
            f"{self.parameters:.2f}",
            "?" if self.macs is None else f"{self.macs:.2f}",
            "" if self.dense is None else f"{self.dense:.2f}",
            "" if self.pruned is None else f"{self.pruned:.2f}",
            "" if self.speedup is None else f"{self.speedup:.2f}",
            "" if self.of_macs is None else f"{self.of_macs:.2f}",
            f"{self.difference:.0e}" if self.difference else "0",
            "; ".join(f"{count} {reason}" for reason, count in self.pinned.items()),
        ]


def short(reason: str) -> str:
    """A reason without the names of one graph."""
    for pattern, text in (
        (r"it reaches the graph output '.*'", "graph output"),
        (r"it is an axis of the graph input '.*'", "graph input"),
        (r"(\w+) '.*?' (.*)", r"\1 \2"),
    ):
        match = re.fullmatch(pattern, reason)
        if match:
            reason = match.expand(text)
            break
    return re.sub(r"'[^']*'", "'...'", re.sub(r"\d+ positions", "n positions", reason))[:100]


def relative(left: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> float:
    """The largest difference of outputs that are numbers, as a share of the largest output."""
    return max(
        float(np.abs(np.subtract(a, b, dtype=np.float64)).max(initial=0) / (np.abs(np.float64(a)).max(initial=0) or 1))
        for a, b in zip(left, right, strict=True)
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Exporters print graphs that they cannot export, below Python, too."""
    sys.stdout.flush()
    kept = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def compare(sessions: Sequence[Session], feed: Feed, seconds: float) -> tuple[float, float, float]:
    """Milliseconds of two models, and how many times faster the second is: medians over runs in turns.

    One thread computes, and its own time is taken: what else goes on in the machine would else count for the slower
    model, which is interrupted more often.
    """
    times: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(times) < 12 or (time.perf_counter() < end and len(times) < 2000):
        times.append([])
        for session in sessions:
            start = time.thread_time()
            session.run(feed)
            times[-1].append(time.thread_time() - start)
    dense, pruned = np.array(times[2:]).T
    return float(np.median(dense)) * 1e3, float(np.median(pruned)) * 1e3, float(np.median(dense / pruned))


def measure(architecture: Architecture, folder: Path, share: float, seconds: float) -> Row:
    """Export, prune, check and time one architecture."""
    dense, pruned = folder / "dense.onnx", folder / "pruned.onnx"
    with silence():
        exporter = architecture.write(dense)
    shapes = architecture.shapes or None
    config = [{"sparsity": share, "op_types": "default", "pattern": "channel"}]
    result = onnxprune.prune(dense, config, output=pruned, shapes=shapes)
    report = result.report
    explained = explain(dense, shapes)
    before, after = onnxprune.inspect(dense, shapes), onnxprune.inspect(pruned, shapes)
    sessions = [open_session(path, threads=1) for path in (dense, pruned)]
    feed, _ = random_feeds(dense, shapes, 1, inputs=sessions[0].inputs)
    effect = relative(*(session.run(feed) for session in sessions))
    times = compare(sessions, feed, seconds) if seconds else None
    heads = [group for group in report.groups if group.heads]
    complete = before.macs_complete and after.macs_complete and before.macs > 0
    return Row(
        architecture,
        exporter,
        (len(report.groups), len(heads)),
        after.parameters / before.parameters,
        after.macs / before.macs if complete else None,
        None if times is None else times[0],
        None if times is None else times[1],
        None if times is None else times[2],
        report.difference or 0.0,
        effect,
        dict(Counter(short(p.reason) for p in explained.pinned if p.op_type not in EMBEDDINGS).most_common()),
        sum(g.kept for g in heads) / sum(g.size for g in heads) if heads else None,
        sum(g.kept for g in report.groups) / max(sum(g.size for g in report.groups), 1),
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def bars(rows: Sequence[Row]) -> list[str]:
    """What was promised beside what came out."""
    plain = [row for row in rows if row.architecture.plain]
    lines = []
    for row in plain:
        aligned = row.of_macs is None or row.of_macs >= SPEED_BAR
        met = row.parameters <= PARAMETERS_BAR and aligned
        speed = "" if row.of_macs is None else f", speed-up {row.speedup:.2f} of {1 / (row.macs or 1):.2f} by MACs"
        lines.append(
            f"{'met   ' if met else 'NOT MET'} {row.architecture.name}: parameters {row.parameters:.2f}{speed}"
        )
    for row in rows:
        if row.heads is not None:
            lines.append(f"{'met   ' if row.heads < 1 else 'NOT MET'} {row.architecture.name}: heads {row.heads:.2f}")
        if row.effect < 1e-3:
            lines.append(f"CHECK   {row.architecture.name}: pruning changes its outputs by {row.effect:.0e} only")
    return lines


def chosen(words: Sequence[str]) -> list[Architecture]:
    """The architectures of some sections, or with a word in their names."""
    found = [a for a in every() if not words or any(w == a.section or w.lower() in a.name.lower() for w in words)]
    exact = [a for a in found if a.name in words]
    return exact if exact and len(exact) == len(words) else found


def versions() -> str:
    names = ["onnx", "onnxruntime", "numpy", "torch", "transformers", "keras", "tensorflow", "tf2onnx"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="SECTION or name")
    parser.add_argument("--no-latency", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each, both models together")
    parser.add_argument("--share", type=float, default=0.5, help="of the channels that go")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}; {versions()}")
    print(f"one thread; {options.share:.0%} of the channels of every group\n", flush=True)

    rows: list[Row] = []
    lines: list[list[str]] = []
    failed: list[str] = []
    wanted = [] if options.words == ["labels"] else chosen([w for w in options.words if w != "labels"])
    for number, architecture in enumerate(wanted, 1):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(architecture, Path(folder), options.share, 0 if options.no_latency else options.seconds)
            except LookupError as error:
                outcome = f"skipped: {error}"
            except Exception as error:
                traceback.print_exc(limit=-3)
                outcome = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                failed.append(architecture.name)
                lines.append([architecture.name, outcome, *[""] * (len(HEADER) - 2)])
            else:
                rows.append(row)
                lines.append(row.cells())
                outcome = " | ".join(row.cells()[1:])
        gc.collect()
        took = time.perf_counter() - start
        print(f"{number}/{len(wanted)} {architecture.name} | {outcome}  [{took:.0f} s]", file=sys.stderr, flush=True)
    if lines:
        print(table(lines))
        print("\n" + "\n".join(bars(rows)))
        print(
            f"\n{len(rows)} of {len(lines)} run and agree with the zeroed models{': FAILED ' * bool(failed)}"
            + ", ".join(failed)
        )
    if not options.words or "labels" in options.words:
        print("\n" + "\n".join(label_times()))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
