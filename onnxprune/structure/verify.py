"""Holding a shrunk model against the masked one it came from, under onnxruntime."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest output, for models of 32-bit floats or better."""

COARSE = 2e-2
"""The same for 16-bit floats and integers: sums round differently when zeros are left out."""

SEED = 20


def difference(masked: Model, shrunk: Model, shapes: Mapping[str, Sequence[int]]) -> float:
    """The largest difference of any output on random inputs, as a share of that output's largest value.

    Args:
        masked: the model with zeros in it.
        shrunk: the model with the zeros cut out.
        shapes: a shape for each input.

    Raises:
        PruneError: onnxruntime cannot run one of them; their outputs differ in shape or in where they are finite.
    """
    from onnxprune.runtime.feeds import random_feeds
    from onnxprune.runtime.session import open_session

    with contextlib.ExitStack() as stack:
        paths = [stack.enter_context(model.stage(None)).path for model in (masked, shrunk)]
        sessions = [open_session(path) for path in paths]
        feed, _ = random_feeds(paths[0], shapes, SEED, inputs=sessions[0].inputs)
        results = [session.run(feed) for session in sessions]
    worst = 0.0
    for name, left, right in zip(sessions[0].outputs, *results, strict=True):
        if left.shape != right.shape:
            raise PruneError(f"output '{name}' has the shape {right.shape} in the shrunk model, {left.shape} before")
        a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            raise PruneError(f"output '{name}' is not finite in other places than in the masked model")
        finite = np.isfinite(a)
        scale = float(np.abs(a[finite]).max(initial=0.0))
        worst = max(worst, float(np.abs(a - b)[finite].max(initial=0.0)) / (scale or 1.0))
    return worst


def tolerance(model: Model) -> float:
    """How far masked and shrunk may be apart."""
    coarse = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT8, ir.DataType.UINT8}
    kinds = {v.const_value.dtype for v in model.graph.graph.initializers.values() if v.const_value is not None}
    return COARSE if kinds & coarse else TOLERANCE
