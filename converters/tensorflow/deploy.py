"""A deployable file is believed when its zeros are there and onnxruntime computes what the framework does."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, load
from onnxprune.graph.weights import Weight, find

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """A file that was written and holds what was asked.

    Attributes:
        path: the file.
        difference: largest difference between onnxruntime and the framework, as a share of the output's largest
            magnitude.
        sparsity: share of zeros over the weights that are pruned.
        zeros: number of these zeros.
    """

    path: Path
    difference: float
    sparsity: float
    zeros: int

    def __str__(self) -> str:
        """One line for a log."""
        return (
            f"'{self.path}': sparsity {self.sparsity:.4f} ({self.zeros} zeros), "
            f"onnxruntime within {self.difference:.1e} of the framework"
        )


def deploy(
    proto: onnx.ModelProto,
    path: str | os.PathLike[str],
    weights: Iterable[Weight],
    kept: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray],
    expected: Sequence[np.ndarray],
    tolerance: float = TOLERANCE,
    record: Callable[[Model], None] | None = None,
) -> Exported:
    """Check an exported model and write it: beside the target first, then renamed.

    Args:
        proto: the model as the framework's exporter made it.
        path: the target.
        weights: the framework's weights.
        kept: masks of those that are pruned, in the stored shape, True is kept.
        feeds: an example for each input of the graph.
        expected: the framework's outputs for it, in the graph's order.
        tolerance: largest difference allowed, in units of an output's largest magnitude.
        record: writes into the model what is to be known about it.

    Raises:
        PruneError: a pruned entry is not 0 in the file, or onnxruntime computes something else; nothing is written.
    """
    from onnxprune.runtime.session import open_session

    model = load(proto)
    pruned = [w for w in weights if w.name in kept]
    check_zeros(model, pruned, kept)
    if record is not None:
        record(model)
    with model.stage(Path(path)) as staged:
        results = open_session(staged.path, threads=1, label="the exported model").run(dict(feeds))
        apart = max((difference(a, b) for a, b in zip(results, expected, strict=True)), default=0.0)
        if not apart <= tolerance:
            raise PruneError(
                f"the exported model computes something else than the framework: outputs differ by {apart:.2g} of "
                f"their largest magnitude, {tolerance:.1g} is allowed; '{path}' was not written. Give example inputs "
                "as they occur in use; if it differs on them as well, the exporter changed the model"
            )
        written = staged.commit()
    size = sum(w.size for w in pruned)
    zeros = sum(int(np.count_nonzero(w.values() == 0)) for w in pruned)
    return Exported(written, apart, zeros / size if size else 0.0, zeros)


def difference(result: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, in units of the largest magnitude expected; inf where shapes differ."""
    result, expected = np.asarray(result), np.asarray(expected)
    if result.shape != expected.shape:
        return float("inf")
    if result.size == 0:
        return 0.0
    result, expected = result.astype(np.float64), expected.astype(np.float64)
    scale = float(np.max(np.abs(expected))) or 1.0
    return float(np.max(np.abs(result - expected))) / scale


def check_zeros(model: Model, weights: Iterable[Weight], kept: Mapping[str, np.ndarray]) -> None:
    """Find the zeros of every pruned weight again in an exported model.

    Exporters fold, transpose, rename, merge (the two directions of an LSTM) and split (its gates) weights; what remains
    is that each output of a weight is a row of some weight in role order. Every row's zero pattern must be there.

    Raises:
        PruneError: naming the weight whose pattern is missing.
    """
    rows: Counter[bytes] = Counter()
    for found in find(model)[0]:
        patterns = _rows(found.values() == 0)
        rows.update(pattern.tobytes() for pattern in patterns)
    for weight in weights:
        if kept[weight.name].all():
            continue
        zero = weight.values() == 0
        zero |= ~weight.role(kept[weight.name])
        wanted = Counter(pattern.tobytes() for pattern in _rows(zero))
        missing = wanted - rows
        rows -= wanted
        if lost := sum(missing.values()):
            raise PruneError(
                f"weight '{weight.name}' {list(weight.shape)} is not in the exported model with its zeros: {lost} of "
                f"{len(zero)} outputs have another pattern there; the exporter merged it with something that is not "
                "pruned, or the model does not use it"
            )


def _rows(zero: np.ndarray) -> np.ndarray:
    """(outputs, bytes): the zero pattern of every output, with its length, so that rows of two lengths never agree."""
    flat = zero.reshape(len(zero), -1)
    length = np.frombuffer(np.int64(flat.shape[1]).tobytes(), np.uint8)
    return np.concatenate([np.broadcast_to(length, (len(flat), 8)), np.packbits(flat, axis=1)], 1)
