"""Two choices for the open dims of a model's inputs: what comes out different varies from run to run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper

from onnxprune.graph.model import Model
from onnxprune.runtime.feeds import resolve_shapes
from onnxprune.runtime.session import ModelInput

Sizes = dict[str, tuple[int, ...]]

STEP = 32
"""By how much the second choice is larger: images keep multiples that strides divide."""


def choose(model: Model, shapes: Mapping[str, Sequence[int]] | None = None) -> tuple[Sizes, Sizes]:
    """A shape for each graph input, and another one that differs in every open dim.

    Args:
        model: the model.
        shapes: given shapes.

    Raises:
        PruneError: a shape is given for no input, or contradicts the declared one.
    """
    stored = {tensor.name for tensor in model.proto.graph.initializer}
    inputs = [_input(value) for value in model.proto.graph.input if value.name not in stored]
    first, _ = resolve_shapes(inputs, dict(shapes or {}))
    named: dict[str, int] = {}
    second: Sizes = {}
    for value in inputs:
        sizes = list(first[value.name])
        for axis, dim in enumerate(value.shape):
            if isinstance(dim, int):
                continue
            larger = sizes[axis] + (1 if axis == 0 or sizes[axis] == 1 else STEP)  # 1: a batch, wherever it stands
            sizes[axis] = named.setdefault(dim, larger) if dim else larger
        second[value.name] = tuple(sizes)
    return first, second


def _input(value: onnx.ValueInfoProto) -> ModelInput:
    kind = value.type.tensor_type
    dims = [
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else (d.dim_param or None) for d in kind.shape.dim
    ]
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type) if kind.elem_type else np.dtype(np.float32)
    return ModelInput(value.name, np.dtype(dtype), tuple(dims))
