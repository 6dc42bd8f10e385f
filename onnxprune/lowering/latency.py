"""How long a layer takes, dense and in each of its forms: measured here, measured elsewhere, or estimated."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.errors import PruneError
from onnxprune.graph import saving
from onnxprune.lowering.forms import Piece, candidates
from onnxprune.lowering.layers import CONVOLUTIONS, PRODUCTS, RECURRENT, Layer
from onnxprune.runtime.turns import in_turns, machine

FORMAT = "onnxprune latency table 1"
DENSE = "dense"

MOVE = 48
"""Multiplications in whose time one element is gathered, between two layouts of blocked kernels; for the estimate."""

TURN = 16
"""The same for an element that is transposed."""


@dataclass
class Latencies:
    """Where times come from.

    Attributes:
        threads: of onnxruntime.
        table: key -> milliseconds, what is known.
        timing: whether what is not known is measured; else it is estimated.
        file: where the table is written to; None for nowhere.
        changed: whether something was measured.
    """

    threads: int = 1
    table: dict[str, float] = field(default_factory=dict)
    timing: bool = True
    file: Path | None = None
    changed: bool = False

    @classmethod
    def open(cls, threads: int = 1, table: str | os.PathLike[str] | None = None, timing: bool = True) -> Latencies:
        """Times of this machine, from its cache and by measuring; or those of a table, where that file exists.

        A table that does not exist is written by `save`, with what is measured here.

        Raises:
            PruneError: the file holds no table, or one for another number of threads.
        """
        if table is not None:
            path = Path(table)
            if path.exists():
                return cls(threads, _read(path, threads), False)
            if not path.parent.is_dir():
                raise PruneError(f"cannot write the latency table '{path}': its folder does not exist; create it first")
            return cls(threads, {}, timing, path)
        if not timing:
            return cls(threads, {}, False)
        cache = _cache(threads)
        known: dict[str, float] = {}
        if cache is not None and cache.is_file():
            try:
                known = _read(cache, threads)
            except PruneError:  # of another version: it is written anew
                known = {}
        return cls(threads, known, True, cache)

    def of(self, layer: Layer) -> tuple[dict[str, float], str]:
        """Milliseconds of a layer, dense and by form, and where they are from: 'measured', 'table' or 'estimated'."""
        keys = {name: key(layer, name) for name in (DENSE, *candidates(layer))}
        missing = [name for name in keys if keys[name] not in self.table]
        if missing and self.timing:
            self._measure(layer, keys)
            missing = []
        if DENSE in missing or len(missing) == len(keys) - 1:
            return estimate(layer), "estimated"
        times = {name: self.table[keys[name]] for name in keys if name not in missing}
        return times, "measured" if self.timing else "table"

    def save(self) -> None:
        """Write what was measured: to the table's file, or to the cache, where that can be had."""
        if self.file is None or not self.changed:
            return
        content = {"format": FORMAT, "threads": self.threads, "machine": machine(), "milliseconds": self.table}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with saving.replacing(self.file) as staged:
                staged.write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
        except (OSError, PruneError):
            if self.file != _cache(self.threads):
                raise
        self.changed = False

    def _measure(self, layer: Layer, keys: Mapping[str, str]) -> None:
        """Time a layer's dense node and all its forms in turns: only times taken together can be compared."""
        forms = candidates(layer)
        pieces = {DENSE: dense(layer), **{name: form(layer) for name, form in forms.items()}}
        models = [alone(layer, piece) for piece in pieces.values()]
        data = np.random.default_rng(0).normal(size=layer.data).astype(layer.weight.dtype)
        for name, time in zip(pieces, in_turns(models, {"data": data}, self.threads), strict=True):
            self.table[keys[name]] = round(time, 6)
        self.changed = True


def key(layer: Layer, form: str) -> str:
    """What a time is filed under. The dense layer is timed with each cover anew: only times taken together compare."""
    attributes = [
        f"{a.name}={helper.get_attribute_value(a)}" for a in sorted(layer.node.attribute, key=lambda a: str(a.name))
    ]
    sizes = [f"data {_sizes(layer.data)}", f"weight {_sizes(layer.operand.shape)}", *attributes]
    if layer.bias is not None:
        sizes.append("bias")
    cover = layer.cover
    order = "" if cover.ordered else " in another order"
    kept = f"{cover.groups} groups of {cover.size} outputs and {cover.kept} inputs{order}"
    return "; ".join([layer.node.op_type, layer.weight.dtype.name, *sizes, kept, form])


def estimate(layer: Layer) -> dict[str, float]:
    """Times without a clock, in units that only compare: multiplications, and elements moved.

    A form multiplies what its groups keep, gathers the inputs of every group, and puts outputs into order. Matrix
    products are transposed on the way in and out.
    """
    cover, positions = layer.cover, _positions(layer)
    kernel = int(np.prod(layer.weight.shape[2:], dtype=np.int64))
    outputs, inputs = layer.weight.shape[:2]
    once = kernel * positions
    moved = MOVE * cover.groups * cover.kept + (0 if cover.ordered else MOVE * outputs)
    if layer.node.op_type in CONVOLUTIONS:
        channels = int(np.prod(layer.data[2:], dtype=np.int64)) * layer.data[0]
        moved = moved * channels // positions
    elif layer.node.op_type in PRODUCTS:
        moved += TURN * (inputs * layer.batch + outputs)
    scale = 1e-6
    states = outputs * layer.attribute("hidden_size") * once if layer.node.op_type in RECURRENT else 0
    first = next(iter(candidates(layer)))
    lowered = outputs * cover.kept * once + states + moved * positions
    return {DENSE: (outputs * inputs * once + states) * scale, first: lowered * scale}


def _positions(layer: Layer) -> int:
    """How often each entry of the weight is multiplied."""
    if layer.node.op_type not in CONVOLUTIONS:
        return int(np.prod(layer.data[:-1], dtype=np.int64)) // layer.batch
    positions = layer.data[0]
    steps = next((list(a.ints) for a in layer.node.attribute if a.name == "strides"), [1] * (len(layer.data) - 2))
    for size, step in zip(layer.data[2:], steps, strict=True):
        positions *= size if layer.node.op_type == "ConvTranspose" else -(-size // step)
    return positions


def dense(layer: Layer) -> Piece:
    """The node as it stands in the graph."""
    piece = Piece(layer.result, layer.node.input[0])
    node = onnx.NodeProto.FromString(layer.node.SerializeToString())
    node.input[1] = piece.store(layer.operand, "weight")
    if layer.bias is not None:
        node.input[2] = piece.store(layer.bias, "bias")
    piece.nodes.append(node)
    return piece


def alone(layer: Layer, piece: Piece) -> onnx.ModelProto:
    """A model of one layer only, in the layout that its neighbours give it in a network.

    Convolutions of images stand between others that work on blocks of channels, so a pooling of 1x1, which works on
    these as well, is put on either side: what a Gather costs to get out of that layout, and back, is so measured.
    """
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in piece.nodes]
    given, result, tensors = piece.data, layer.result, dict(piece.tensors)
    for node in nodes:
        if node.op_type in RECURRENT:  # states and lengths take no time
            del node.input[2:]
            node.input.append("recurrent")
            directions, rows = layer.operand.shape[:2]
            tensors["recurrent"] = np.zeros((directions, rows, layer.attribute("hidden_size")), layer.weight.dtype)
    kind = helper.np_dtype_to_tensor_dtype(layer.weight.dtype)
    first, last = "data", result
    if layer.node.op_type in CONVOLUTIONS and len(layer.data) == 4 and kind == onnx.TensorProto.FLOAT:
        nodes.insert(0, helper.make_node("MaxPool", ["data"], [given], kernel_shape=[1, 1]))
        last = f"{result}/result"
        nodes.append(helper.make_node("MaxPool", [result], [last], kernel_shape=[1, 1]))
        first = given
    for node in nodes:
        node.input[:] = [first if name == given else name for name in node.input]
    if first != "data":
        nodes[0].input[0] = "data"
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("data", kind, layer.data)],
        [onnx.ValueInfoProto(name=last)],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", layer.opset)], ir_version=8)


def _cache(threads: int) -> Path | None:
    """The file in which this machine's times are kept between runs; ONNXPRUNE_CACHE names its folder, '' none."""
    named = os.environ.get("ONNXPRUNE_CACHE")
    if named == "":
        return None
    try:
        base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxprune"
    except RuntimeError:  # nobody's home
        return None
    return base / f"latency-{hashlib.sha256(machine().encode()).hexdigest()[:12]}-{threads}.json"


def _read(path: Path, threads: int) -> dict[str, float]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        table = {str(name): float(time) for name, time in content["milliseconds"].items()}
        found = int(content["threads"])
        if not all(0 < time < float("inf") for time in table.values()):
            raise ValueError("a time is not positive")
    except Exception as error:  # whatever stands there instead
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise PruneError(f"'{path}' holds no latency table ({reason}); give one that --latency-table wrote") from error
    if found != threads:
        raise PruneError(f"the latency table '{path}' is for {found} threads, not {threads}; give --threads {found}")
    return table


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
