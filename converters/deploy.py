"""A deployable file is believed when its zeros are there and onnxruntime computes what the framework does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, graphs, load
from onnxprune.graph.weights import Weight, find

TOLERANCE = 1e-4
"""Largest difference between onnxruntime and a framework in 32 bits, as a share of an output's largest magnitude."""

Smaller = Callable[[Model, Mapping[str, Sequence[int]]], Model]
"""Takes a model and the shapes of its inputs."""

_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}


@dataclass(frozen=True, eq=False)
class Candidate:
    """A model as a framework's exporter made it, and what it has to live up to.

    Attributes:
        model: the exported model.
        weights: the framework's weights whose zeros are looked for.
        kept: the masks of those that are pruned, in the stored shape, True is kept.
        feeds: an example for each input of the graph.
        expected: the framework's outputs for it, in the graph's order.
        tolerance: see `tolerance`.
    """

    model: Model = field(repr=False)
    weights: Sequence[Weight]
    kept: Mapping[str, np.ndarray]
    feeds: Mapping[str, np.ndarray]
    expected: Sequence[np.ndarray]
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Exported:
    """A file that was written and holds what was asked.

    Attributes:
        path: the file.
        difference: largest difference between onnxruntime and the framework on the example inputs, as a share of an
            output's largest magnitude.
        sparsity: share of zeros over the weights that are pruned, as it is in the framework.
        zeros: number of these zeros.
        absent: pruned weights the file does not hold: not used in evaluation, or folded into something smaller.
    """

    path: Path
    difference: float
    sparsity: float
    zeros: int
    absent: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line for a log."""
        absent = f"; not in the file: {', '.join(self.absent)}" if self.absent else ""
        return (
            f"'{self.path}': sparsity {self.sparsity:.4f} ({self.zeros} zeros), "
            f"onnxruntime within {self.difference:.1e} of the framework{absent}"
        )


def tolerance(types: Iterable[str]) -> float:
    """`TOLERANCE`, or what a model that computes in one of these types can be held to: 16 units in the last place."""
    return max([TOLERANCE, *(16 * _EPSILON[name] for name in types if name in _EPSILON)])


def write(
    candidate: Candidate, path: str | os.PathLike[str], record: Callable[[Model], None], smaller: Smaller | None = None
) -> Exported:
    """Check an exported model, and write it: beside the target first, then renamed.

    Args:
        candidate: the model.
        path: the target.
        record: writes into the model what is to be known about it.
        smaller: makes of the checked model one that computes the same with less, which is checked as well.

    Raises:
        PruneError: a pruned entry is not 0 in the file, or onnxruntime cannot run it or computes something else;
            nothing was written.
    """
    target = Path(path)
    if target.is_dir():
        raise PruneError(f"the output '{target}' is a folder; give the name of a file in it")
    record(candidate.model)
    with candidate.model.stage(target) as staged:
        absent = check_zeros(load(staged.path), candidate.weights, candidate.kept)
        apart = check_outputs(staged.path, candidate)
        written = target if smaller is not None else staged.commit()
    if smaller is not None:
        shapes = {name: array.shape for name, array in candidate.feeds.items()}
        cut = replace(candidate, model=smaller(candidate.model, shapes))
        record(cut.model)
        with cut.model.stage(target) as staged:
            apart = check_outputs(staged.path, cut)
            written = staged.commit()
    pruned = [w for w in candidate.weights if w.name in candidate.kept]
    size = sum(w.size for w in pruned)
    zeros = sum(int(np.count_nonzero(~_live(w, candidate.kept))) for w in pruned)
    return Exported(written, apart, zeros / size if size else 0.0, zeros, absent)


def compacted(model: Model, shapes: Mapping[str, Sequence[int]]) -> Model:
    """Without the channels that zeros have made dead."""
    from onnxprune.structure.compact import compact

    return compact(model, shapes)[0]


def lowered(model: Model, shapes: Mapping[str, Sequence[int]]) -> Model:
    """With grouped inputs as smaller operators, where these are measured to be faster on one thread."""
    from onnxprune.lowering.latency import Latencies
    from onnxprune.lowering.lower import lowered as lower

    return lower(model, shapes, Latencies.open())[0]


def check_outputs(path: Path, candidate: Candidate) -> float:
    """How far onnxruntime is from the framework, as a share of an output's largest magnitude.

    Raises:
        PruneError: by more than the tolerance, or it cannot run the file.
    """
    from onnxprune.runtime.session import open_session

    try:
        results = open_session(path, label="the exported model").run(candidate.feeds)
    except PruneError as error:
        if not _has_bfloat16(candidate.model):
            raise
        raise PruneError(
            "the exported model computes in bfloat16, which onnxruntime does not do on the CPU, so that it can be "
            "neither checked nor run there, and it was not written. Make the model float32 first (in torch: "
            f"model.float(), and float32 example inputs): values and masks stay what they are. {error}"
        ) from error
    apart = difference(candidate.expected, results)
    if not apart <= candidate.tolerance:
        raise PruneError(
            f"onnxruntime's outputs for the exported model differ from the framework's by {apart:.1e} of their largest "
            f"magnitude (at most {candidate.tolerance:.0e} is accepted), so it was not written. Is the forward pass "
            "random in evaluation, or were the example inputs none that occur in use? If neither, the exporter changed "
            "the model"
        )
    return apart


def difference(expected: Sequence[Any], found: Sequence[Any]) -> float:
    """The largest difference between two lists of outputs, in units of each expected output's largest magnitude.

    Infinite where they do not fit, or other entries than in the first are NaN or infinite in the second.
    """
    if len(expected) != len(found):
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        x, y = np.asarray(a), np.asarray(b)
        if x.shape != y.shape:
            return float("inf")
        x, y = x.astype(np.float64), y.astype(np.float64)
        finite = np.isfinite(x)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True) or not np.isfinite(y[finite]).all():
            return float("inf")
        if finite.any():
            scale = float(np.abs(x[finite]).max())
            worst = max(worst, float(np.abs(x[finite] - y[finite]).max()) / (scale or 1.0))
    return worst


def check_zeros(model: Model, weights: Sequence[Weight], kept: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Check that every pruned entry is zero in a file whose weights are renamed, stacked, transposed and folded.

    What survives all that is the zero pattern of each output (a row in role order): so the rows of the framework and of
    the file are matched as multisets. A row that folding scaled to zero throughout fits any.

    Returns:
        Names of pruned weights that the file does not hold at all.

    Raises:
        PruneError: rows with pruned entries are missing, while the file has rows that nothing explains.
    """
    rows: dict[int, Counter[bytes]] = {}
    for weight in find(model)[0]:
        live = weight.values() != 0
        rows.setdefault(_length(live), Counter()).update(_patterns(live))
    missing: list[tuple[Weight, int, int]] = []
    for weight in weights:
        live = _live(weight, kept)
        patterns = Counter(_patterns(live))
        left = rows.setdefault(_length(live), Counter())
        lacking = patterns - left
        left.subtract(patterns - lacking)
        if weight.name in kept and not kept[weight.name].all() and lacking:
            missing.append((weight, _length(live), lacking.total()))
    absent = []
    for weight, length, count in missing:
        empty = np.packbits(np.zeros(length, np.bool_)).tobytes()
        spare = min(rows[length][empty], count)
        rows[length][empty] -= spare
        strange = (+rows[length]).total()
        if weight.op_types[0] != "Embedding" and count > spare and strange:
            raise PruneError(
                f"the exported model lost zeros of weight '{weight.name}' {list(weight.shape)}: {count - spare} of its "
                f"{weight.role_shape[0]} outputs have another zero pattern there; it was not written"
            )
        if count > spare:
            absent.append(weight.name)
    return tuple(absent)


def _live(weight: Weight, kept: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which entries of a weight, in role order, are neither zero nor removed by its mask."""
    live: np.ndarray = weight.values() != 0
    return live & weight.role(kept[weight.name]) if weight.name in kept else live


def _patterns(live: np.ndarray) -> list[bytes]:
    """Every output's pattern of entries that are not zero."""
    return [row.tobytes() for row in np.packbits(live.reshape(live.shape[0], -1), axis=1)]


def _length(live: np.ndarray) -> int:
    """Entries of an output; axes of length 1 come and go with the operator."""
    return int(np.prod(live.shape[1:]))


def _has_bfloat16(model: Model) -> bool:
    """Whether a model holds bfloat16 tensors, or casts to it."""
    kind = onnx.TensorProto.BFLOAT16
    for graph in graphs(model.proto):
        if any(tensor.data_type == kind for tensor in graph.initializer):
            return True
        if any(a.name in ("to", "dtype") and a.i == kind for node in graph.node for a in node.attribute):
            return True
    return False
