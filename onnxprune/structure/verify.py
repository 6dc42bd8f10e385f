"""Holding a shrunk model against the masked one it came from, under onnxruntime."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model

TOLERANCE = 1e-4
"""Largest difference, as a share of the largest output, unless the model's own rounding is worse."""

SHAKE = 1e-5
"""Relative change of every stored real number when the rounding of a coarse model is measured: larger than what a sum
is off by, so that what tips over rarely is seen to. Of other models the last place is changed."""

SHAKES = 2
MARGIN = 2.0
"""How often it is measured, and how many times the largest is allowed."""

LIMIT, COARSE_LIMIT = 1e-3, 0.1
"""What is allowed at most: beyond it, rounding cannot be told from a fault."""

REAL = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
COARSE = {
    *(ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
    *(ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16),
    *(ir.DataType.INT4, ir.DataType.UINT4),
}
"""Types of stored tensors that say that a model rounds to less than 32 bits."""

SHAPING = {"Resize", "Upsample", "Range", "OneHot", "NonMaxSuppression"}
"""Operators whose real numbers say sizes, or what is looked for."""

SEED = 20


def difference(
    masked: Model, shrunk: Model, shapes: Mapping[str, Sequence[int]], *others: Mapping[str, Sequence[int]]
) -> float:
    """The largest difference of any output on random inputs, as a share of that output's largest value.

    Args:
        masked: the model with zeros in it.
        shrunk: the model with the zeros cut out.
        shapes: a shape for each input.
        others: more of them; left out where the masked model does not run: not all sizes that are open fit each other.

    Raises:
        PruneError: onnxruntime cannot run one of them; their outputs differ in shape or in where they are finite.
    """
    from onnxprune.runtime.feeds import random_feeds
    from onnxprune.runtime.session import open_session
    from onnxprune.runtime.stream import parse_memory

    worst = 0.0
    with contextlib.ExitStack() as stack:
        staged = [stack.enter_context(model.stage(None)) for model in (masked, shrunk)]
        paths = [model.path for model in staged]
        lean = any(model.size > parse_memory(None) for model in staged)
        labels = "the masked model", "what was made of the masked model"
        before, after = (
            open_session(path, label=what, lean=lean, exact=True) for path, what in zip(paths, labels, strict=True)
        )
        for sizes in (shapes, *(other for other in others if other != shapes)):
            feed, _ = random_feeds(paths[0], sizes, SEED, inputs=before.inputs)
            try:
                expected = before.run(feed)
            except PruneError:
                if sizes is shapes:
                    raise
                continue
            worst = max(worst, _apart(before.outputs, expected, after.run(feed)))
    return worst


def _apart(names: Sequence[str], expected: Sequence[np.ndarray], results: Sequence[np.ndarray]) -> float:
    worst = 0.0
    for name, left, right in zip(names, expected, results, strict=True):
        if left.shape != right.shape:
            raise PruneError(f"output '{name}' has the shape {right.shape} in the shrunk model, {left.shape} before")
        a, b = np.asarray(left, np.float64), np.asarray(right, np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(finite, np.isfinite(b)):
            raise PruneError(f"output '{name}' is not finite in other places than in the masked model")
        a, b = a[finite], b[finite]
        worst = max(worst, float(np.abs(a - b).max(initial=0.0)) / (float(np.abs(a).max(initial=0.0)) or 1.0))
    return worst


def tolerance(masked: Model, shapes: Mapping[str, Sequence[int]]) -> float:
    """How far masked and shrunk may be apart: what rounding can explain.

    Sums without the zeros are taken in another order, and are off by some last places of a 32-bit float. Where a later
    step rounds to 16 bits, or to an integer, that may tip an entry over to the next step, and the steps after it carry
    that on: how far depends on the model. So does how much of a difference of large numbers is left of 32-bit floats.
    So it is measured, on the masked model itself, with its real numbers changed by a last place of theirs; by `SHAKE`
    where it is larger and the model is a coarse one.
    """
    step, limit = (SHAKE, COARSE_LIMIT) if _is_coarse(masked) else (0.0, LIMIT)
    moved = max(_moved(masked, shapes, step, seed) for seed in range(SHAKES))
    return min(max(TOLERANCE, MARGIN * moved), limit)


def _is_coarse(model: Model) -> bool:
    values = model.graph.graph.initializers.values()
    return any(v.const_value is not None and v.const_value.dtype in COARSE for v in values)


def _moved(model: Model, shapes: Mapping[str, Sequence[int]], least: float, seed: int) -> float:
    """How far the outputs move when the real numbers stored are a little off."""
    rng = np.random.default_rng(seed)
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    copy = model.made(proto)
    for name, value in copy.graph.graph.initializers.items():
        tensor, stored = value.const_value, model.graph.graph.initializers[name].const_value
        assert tensor is not None
        assert stored is not None
        if stored.dtype not in REAL or any(node.op_type in SHAPING for node, _ in value.uses()):
            continue
        array = model.current(stored)
        step = max(least, float(ml_dtypes.finfo(array.dtype).eps))  # type: ignore[no-untyped-call]
        sign = rng.integers(0, 2, array.shape) * 2 - 1
        shaken = (array.astype(np.float64) * (1 + step * sign)).astype(array.dtype)
        copy.edit(tensor, lambda _, shaken=shaken: shaken)  # type: ignore[misc]
    try:
        return difference(model, copy, shapes)
    except PruneError:  # sizes or infinities that hang on a last place
        return COARSE_LIMIT
