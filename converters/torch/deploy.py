"""The deployable file: exported, checked, then put in place."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from onnxprune.api import Report
from onnxprune.errors import PruneError
from onnxprune.graph.model import Model, load
from onnxprune.graph.weights import Weight, find

from . import exporting

TOLERANCE = 1e-4
"""Largest difference between onnxruntime and torch, as a share of the output's scale, for 32-bit weights."""


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Attributes:
        path: the file.
        difference: largest difference between onnxruntime and torch on the example inputs, as a share of the output's
            scale.
        sparsity: share of zeros over the weights that are pruned, as it is in the module.
        zeros: number of these zeros.
        absent: pruned weights the file does not hold: not used in evaluation, or folded into something smaller.
    """

    path: Path
    difference: float
    sparsity: float
    zeros: int
    absent: tuple[str, ...]


def write(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    weights: Sequence[Weight],
    kept: Mapping[str, np.ndarray],
    report: Report,
    record: Callable[[Model], None],
    dynamic_shapes: Any = None,
) -> Exported:
    """Export a module, check the file under onnxruntime and against the masks, and rename it into place.

    Args:
        module: the module.
        example_inputs: see `exporting.arguments`.
        path: the file.
        weights: the module's weights.
        kept: the masks of those that are governed.
        report: what the masks amount to.
        record: writes what was done into the model's metadata.
        dynamic_shapes: see `exporting.export`.

    Raises:
        PruneError: nothing was written.
    """
    target = Path(path)
    if target.is_dir():
        raise PruneError(f"the output '{target}' is a folder; give the name of a file in it")
    model = exporting.export(module, example_inputs, optimize=True, dynamic_shapes=dynamic_shapes)
    record(model)
    with model.stage(target) as staged:
        absent = check_zeros(load(staged.path), weights, kept)
        difference = check_outputs(module, model, staged.path, example_inputs)
        written = staged.commit()
    return Exported(written, difference, report.sparsity, report.zeros, absent)


def check_outputs(module: nn.Module, model: Model, path: Path, example_inputs: Any) -> float:
    """The largest difference between onnxruntime on a file and the module, as a share of the output's scale.

    Raises:
        PruneError: it is larger than what the weights' type allows.
    """
    from onnxprune.runtime.session import open_session

    session = open_session(path, label="the exported model")
    theirs = session.run(exporting.feeds(model, example_inputs))
    found = exporting.difference(exporting.outputs(module, example_inputs), theirs)
    narrow = any(p.element_size() < 4 and p.is_floating_point() for p in module.parameters())
    allowed = 1e-2 if narrow else TOLERANCE  # ten units in the last place of half precision
    if not found <= allowed:
        raise PruneError(
            f"onnxruntime's outputs differ from the module's by {found:.1e} of their scale (at most {allowed:.0e} is "
            "accepted); the exported model does not compute what the module does, so it was not written. Is the "
            "forward pass random in eval mode?"
        )
    return found


def check_zeros(model: Model, weights: Sequence[Weight], kept: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Check that every pruned entry is zero in a file whose weights are renamed, stacked, transposed and folded.

    What survives all that is the zero pattern of each output (a row in role order): so the rows of the module and of
    the file are matched as multisets. A row that folding scaled to zero throughout fits any.

    Returns:
        Names of pruned weights that the file does not hold at all.

    Raises:
        PruneError: rows with pruned entries are missing, while the file has rows that nothing explains.
    """
    rows: dict[tuple[int, ...], Counter[bytes]] = {}
    for weight in find(model)[0]:
        for shape, patterns in _rows(weight).items():
            rows.setdefault(shape, Counter()).update(patterns)
    missing: list[tuple[Weight, tuple[int, ...], int]] = []
    for weight in weights:
        for shape, patterns in _rows(weight).items():
            left = rows.setdefault(shape, Counter())
            lacking = patterns - left
            left.subtract(patterns - lacking)
            if weight.name in kept and not kept[weight.name].all() and lacking:
                missing.append((weight, shape, lacking.total()))
    absent = []
    for weight, shape, count in missing:
        empty = np.packbits(np.zeros(shape, np.bool_)).tobytes()
        spare = min(rows[shape][empty], count)
        rows[shape][empty] -= spare
        strange = (+rows[shape]).total()
        if weight.op_types[0] != "Embedding" and count > spare and strange:
            raise PruneError(
                f"the exported model lost zeros of weight '{weight.name}' {list(weight.shape)}: {count - spare} of its "
                "outputs have another zero pattern there; it was not written"
            )
        if count > spare:
            absent.append(weight.name)
    return tuple(absent)


def _rows(weight: Weight) -> dict[tuple[int, ...], Counter[bytes]]:
    """The patterns of non-zero entries of a weight's outputs, counted, by the shape of an output."""
    live = weight.values() != 0
    flat = np.packbits(live.reshape(live.shape[0], -1), axis=1)
    return {live.shape[1:]: Counter(row.tobytes() for row in flat)}
