"""Grouped inputs, lowered, beside the dense model: `python bench_grouped.py [layers] [norms] [profiles] [SECTION ...]`.

Sections are those of bench_channels.py (structures, transformers, files, keras): each of their architectures is lowered
wherever its zeros allow, faster or not, and held against the masked model.

Single layers as `onnxprune.prune(pattern="grouped")` makes them, whole networks at their published sizes (random
weights), and how much of a weight's norm groups keep. For each network channel pruning is put beside it: the share of
channels is searched at which it is as fast. Times are processor time on one thread, in turns with the dense model.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import onnx
from _backbones import NETS, write
from bench_channels import short, versions
from bench_select import processor
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune.algorithms.grouped import cluster
from onnxprune.algorithms.scores import in_units
from onnxprune.graph.model import load
from onnxprune.graph.weights import find
from onnxprune.lowering.forms import candidates
from onnxprune.lowering.latency import DENSE, Latencies
from onnxprune.lowering.layers import Layer
from onnxprune.lowering.lower import lowered
from onnxprune.runtime.feeds import random_feeds
from onnxprune.runtime.turns import in_turns

CONVOLUTIONS = [
    (128, 128, 3, 56), (128, 128, 3, 28), (256, 256, 3, 28), (256, 256, 3, 14), (512, 512, 3, 14), (512, 512, 3, 7),
    (1024, 256, 1, 28), (256, 1024, 1, 14),
]  # fmt: skip
PRODUCTS = [(768, 768, 128), (768, 3072, 128), (3072, 768, 128), (768, 3072, 64), (4096, 4096, 1)]
BATCHES = [(8, 512, 512, 128), (8, 512, 512, 8)]
RECURRENT = [
    ("LSTM", 4, 256, 256, 1, 50, 1), ("LSTM", 4, 512, 128, 1, 50, 1), ("LSTM", 4, 512, 128, 2, 50, 4),
    ("GRU", 3, 512, 128, 1, 50, 1),
]  # fmt: skip
"""Operator, gates, inputs, units, directions, steps, batch."""

SHARES = (0.5, 0.75)
POINTWISE = {"MobileNetV2", "EfficientNet-B0"}
BARS = {"ResNet-18": 2.8, "ResNet-50": 2.8, "VGG-16": 2.8, "BERT-base": 1.7, "MobileNetV2": 1.5, "EfficientNet-B0": 1.5}


def node(op: str, data: tuple[int, ...], weights: dict[str, tuple[int, ...]], **attributes: object) -> onnx.ModelProto:
    """A model of one node with stored weights."""
    rng = np.random.default_rng(0)
    graph = helper.make_graph(
        [helper.make_node(op, ["x", *weights], ["y"], **attributes)],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, data)],
        [onnx.ValueInfoProto(name="y")],
        [
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) / 9, name)
            for name, shape in weights.items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def cases() -> Iterator[tuple[str, onnx.ModelProto, bool]]:
    """What a layer is called, a model of it, and whether there is a bar."""
    for inputs, outputs, kernel, size in CONVOLUTIONS:
        weights = {"w": (outputs, inputs, kernel, kernel)}
        model = node("Conv", (1, inputs, size, size), weights, pads=[kernel // 2] * 4)
        yield f"Conv {kernel}x{kernel} {inputs}->{outputs} at {size}x{size}", model, kernel == 3
    for inputs, outputs, rows in PRODUCTS:
        model = node("MatMul", (1, rows, inputs), {"w": (inputs, outputs)})
        yield f"MatMul {inputs}->{outputs}, {rows} rows", model, False
    for count, inputs, outputs, rows in BATCHES:
        model = node("MatMul", (count, rows, inputs), {"w": (count, inputs, outputs)})
        yield f"{count} MatMuls {inputs}->{outputs}, {rows} rows", model, False
    for op, gates, inputs, units, directions, steps, batch in RECURRENT:
        weights = {"w": (directions, gates * units, inputs), "r": (directions, gates * units, units)}
        way = "bidirectional" if directions == 2 else "forward"
        model = node(op, (steps, batch, inputs), weights, hidden_size=units, direction=way)
        what = f"{'bi' if directions == 2 else ''}{op} {inputs}->{units}, {steps} steps, batch {batch}"
        yield what, model, False


def layers(seconds: float) -> Iterator[list[str]]:
    """One row per layer and share."""
    for what, dense, barred in cases():
        feed, _ = random_feeds(dense)
        for share in SHARES:
            found = [
                onnxprune.prune(dense, [{"sparsity": share, "pattern": pattern, "op_names": ["w"]}])
                for pattern in ("grouped", *["grouped:64"] * barred)
            ]
            before, *after = in_turns([dense, *(result.to_proto() for result in found)], feed, 1, seconds)
            lowering = found[0].report.lowering
            assert lowering is not None
            form = next((row.form for row in lowering.rows), "dense")
            groups = next((row.groups for row in lowering.rows), 1)
            ideal = [before / ms * (1 - result.sparsity) for ms, result in zip(after, found, strict=True)]
            bar = "" if not barred else ("met" if ideal[0] >= 0.9 else "NOT MET")
            narrower = f"{ideal[1]:.2f}" if barred else ""
            cells = [what, f"{found[0].sparsity:.0%}", f"{groups}", form, f"{before / after[0]:.2f}"]
            yield [*cells, f"{ideal[0]:.2f}", bar, narrower]


def profile(model: onnx.ModelProto, runs: int = 30) -> dict[str, float]:
    """Microseconds of a run by operator of the graph that onnxruntime makes of a model."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/run"
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feed, _ = random_feeds(model)
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    taken: dict[str, list[float]] = {}
    for event in events:
        if event["name"].endswith("_kernel_time"):
            taken.setdefault(event["args"]["op_name"], []).append(float(event["dur"]))
    return {op: float(np.median(times)) * len(times) / runs for op, times in taken.items()}


def profiles(share: float) -> Iterator[list[str]]:
    """One row per 3x3 convolution: where the time of the dense and of the lowered one goes."""
    moves = ("Gather", "ReorderInput", "ReorderOutput")
    for what, dense, barred in cases():
        if not barred:
            continue
        result = onnxprune.prune(dense, [{"sparsity": share, "pattern": "grouped", "op_names": ["w"]}])
        before, after = profile(dense), profile(result.to_proto())
        times = [[found.get(op, 0.0) for op in ("Conv", *moves)] for found in (before, after)]
        ideal = [(times[0][0] / times[1][0]), sum(times[0]) / sum(times[1])]
        cells = [" + ".join(f"{value:.0f}" for value in row) for row in times]
        yield [what, *cells, *(f"{value * (1 - result.sparsity):.2f}" for value in ideal)]


def network(name: str, folder: Path, share: float, seconds: float, channels: bool) -> list[str]:
    """Prune, lower and time one network; channels at the same latency beside it."""
    dense, fast, thin = (folder / f"{kind}.onnx" for kind in ("dense", "fast", "thin"))
    write(name, dense)
    feed, _ = random_feeds(dense)
    entries: list[dict[str, object]] = [{"sparsity": share, "pattern": "grouped", "op_types": "default"}]
    if name in POINTWISE:
        kernels = [w.name for w in find(load(dense))[0] if w.role_shape[2:] != (1, 1)]
        entries += [{"op_names": [kernel], "exclude": True} for kernel in kernels]
    result = onnxprune.prune(dense, entries, fast)
    lowering = result.report.lowering
    assert lowering is not None
    before, after = in_turns([dense, fast], feed, 1, seconds)
    own = sum(row.dense for row in lowering.rows) / max(sum(row.lowered for row in lowering.rows), 1e-9)
    beside = equal(dense, thin, feed, after / before, seconds) if channels else ""
    met = "met" if before / after >= BARS[name] or share != 0.75 else "NOT MET"
    left = onnxprune.inspect(fast).parameters / onnxprune.inspect(dense).parameters
    cells = [name, f"{result.sparsity:.2%}", f"{len(lowering.rows)}", f"{left:.2f}", f"{before:.1f}", f"{after:.1f}"]
    return [*cells, f"{before / after:.2f}", f"{own:.2f}", f"{lowering.difference or 0:.0e}", met, beside]


def equal(dense: Path, thin: Path, feed: dict[str, np.ndarray], wanted: float, seconds: float) -> str:
    """The share of channels at which the model takes the wanted share of the dense one's time, by bisection."""
    low, high, found = 0.0, 0.9, ""
    for _ in range(4):
        share = (low + high) / 2
        onnxprune.prune(dense, [{"sparsity": share, "pattern": "channel"}], thin, verify=False)
        before, after = in_turns([dense, thin], feed, 1, seconds / 2)
        found = f"{share:.0%} of channels: {before / after:.2f}"
        low, high = (share, high) if after / before > wanted else (low, share)
    return found


class Everywhere(Latencies):
    """Times by which every layer gains, most by its first form."""

    def of(self, layer: Layer) -> tuple[dict[str, float], str]:
        return {DENSE: 1.0, next(iter(candidates(layer))): 0.5}, "estimated"


def agreement(words: set[str], share: float) -> Iterator[list[str]]:
    """One row per architecture: how far lowered and masked are apart where all is lowered that can be."""
    from _architectures import every

    for architecture in every():
        if not words & {architecture.section, architecture.name}:
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                architecture.write(path)
                entry = {"sparsity": share, "pattern": "grouped", "op_types": "default"}
                masked = onnxprune.prune(path, [entry], keep_shape=True)
                _, report = lowered(masked.model, architecture.shapes or None, Everywhere(timing=False))
            except Exception as error:  # a row of its own
                yield [architecture.name, "", "", "FAILED", " ".join(f"{type(error).__name__}: {error}".split())]
                continue
        reasons = Counter(short(skipped.reason) for skipped in report.dense)
        apart = "" if report.difference is None else f"{report.difference:.0e}"
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
        yield [architecture.name, f"{masked.sparsity:.0%}", f"{len(report.rows)}", apart, why]
        gc.collect()


def norms() -> Iterator[list[str]]:
    """How much of a weight's squared norm a quarter of the inputs keeps: one group, neighbours, clustered."""
    from _architectures import files

    for architecture in files():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            try:
                architecture.write(path)
            except LookupError:
                continue
            rows = []
            for weight in find(load(path))[0]:
                values = weight.values()
                outputs, inputs = values.shape[:2]
                if values.dtype != np.float32 or weight.parts > 1 or min(outputs, inputs) < 32 or outputs % 32:
                    continue
                needs = in_units(np.abs(values).reshape(outputs, inputs, -1).sum(2), 40)[0]
                squares = (values.astype(np.float64) ** 2).reshape(outputs, inputs, -1).sum(2)
                whole = np.arange(outputs)
                ways = (whole[None], whole.reshape(-1, 32), cluster(needs, 32))
                rows.append([kept(needs, squares, members, inputs // 4) for members in ways])
            if rows:
                yield [architecture.name, f"{len(rows)}", *(f"{value:.3f}" for value in np.mean(rows, axis=0))]


def kept(needs: np.ndarray, squares: np.ndarray, members: np.ndarray, keep: int) -> float:
    """Share of the squared norm that stays."""
    total = 0.0
    for rows in members:
        chosen = np.argsort(-needs[rows].sum(0), kind="stable")[:keep]
        total += float(squares[rows][:, chosen].sum())
    return total / float(squares.sum())


def table(header: Sequence[str], rows: Iterator[list[str]]) -> None:
    """Markdown, row by row as they come."""
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="layers|norms|profiles|name")
    parser.add_argument("--share", type=float, default=0.75, help="of the weights of each layer that go")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each model")
    parser.add_argument("--no-channels", action="store_true", help="do not search for channels of equal latency")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(f"{processor()}, {os.cpu_count()} CPUs; {versions()}; one thread\n", flush=True)
    words = options.words or ["layers", "norms", *NETS]
    if sections := set(words) - {"layers", "norms", "profiles", *NETS}:
        header = ["architecture", "removed", "lowered", "difference", "stays dense because"]
        table(header, agreement(sections, options.share))
    if "layers" in words:
        header = ["layer", "removed", "groups", "form", "speed-up", "of ideal", "0.9 of ideal", "of ideal, grouped:64"]
        table(header, layers(min(options.seconds, 0.5)))
    if "profiles" in words:
        header = ["layer", "dense, us: Conv + Gather + to and from blocks", "lowered", "Conv of ideal", "all of ideal"]
        table(header, profiles(options.share))
    if "norms" in words:
        table(["model", "weights", "one group", "neighbours by 32", "clustered by 32"], norms())
    names = [name for name in NETS if name in words]

    def rows() -> Iterator[list[str]]:
        for name in names:
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                yield network(name, Path(folder), options.share, options.seconds, not options.no_channels)
            gc.collect()
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)

    if names:
        header = ["network", "removed", "lowered", "params left", "dense ms", "ms", "speed-up", "these layers"]
        table([*header, "difference", "bar", "channels as fast"], rows())


if __name__ == "__main__":
    main()
