"""The deployable ONNX file of a Keras model: tf2onnx with its folding on, checked before it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from onnxprune.errors import PruneError
from onnxprune.graph.model import Model
from onnxprune.graph.weights import Weight

from .binding import input_names, output_names, signature
from .convert import convert, rename
from .deploy import TOLERANCE, Exported, deploy
from .layers import walk


def export(
    model: Any,
    path: str | os.PathLike[str],
    weights: Sequence[Weight] = (),
    kept: Mapping[str, np.ndarray] | None = None,
    example_inputs: Any = None,
    record: Callable[[Model], None] | None = None,
) -> Exported:
    """Write the deployable ONNX file of a Keras model.

    Args:
        model: a Keras 3 model; Functional and Sequential models need no example.
        path: the target; written beside it first, then renamed.
        weights: its weights.
        kept: masks of those that are pruned.
        example_inputs: what onnxruntime and Keras are compared on; random unless given.
        record: writes into the file what is to be known about it.

    Raises:
        PruneError: a zero was lost, onnxruntime and Keras disagree, or there is no ONNX for the model.
    """
    from onnxprune.runtime.feeds import random_feeds

    specs = signature(model, example_inputs)
    flat = tf.nest.flatten(specs)

    def call(*args: Any) -> list[Any]:
        results = model(tf.nest.pack_sequence_as(specs, list(args)), training=False)
        return [tf.identity(tensor) for tensor in tf.nest.flatten(results)]

    proto = convert(call, [tf.TensorSpec(spec.shape, spec.dtype, name=f"x{i}") for i, spec in enumerate(flat)])
    inputs = input_names(model, len(flat))
    table = {f"x{i}": name for i, name in enumerate(inputs)}
    made = [output.name for output in proto.graph.output]
    names = [f"{n}__out" if n in inputs else n for n in output_names(model, len(made))]
    rename(proto.graph, table | dict(zip(made, names, strict=True)))
    if example_inputs is None:
        random = random_feeds(proto, seed=0)[0]
        example = [random.get(name, np.zeros(_sizes(spec))) for name, spec in zip(inputs, flat, strict=True)]
    else:
        example = tf.nest.flatten(example_inputs)
    arrays = [np.asarray(a, spec.dtype.as_numpy_dtype) for a, spec in zip(example, flat, strict=True)]
    expected = outputs(model, specs, arrays)
    used = {value.name for value in proto.graph.input}
    feeds = {name: array for name, array in zip(inputs, arrays, strict=True) if name in used}
    return deploy(proto, path, weights, kept or {}, feeds, expected, tolerance(model), record)


def outputs(model: Any, specs: Any, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """What a model computes from the inputs of its signature, flattened, when it does not train.

    Raises:
        PruneError: it fails on them.
    """
    try:
        results = model(tf.nest.pack_sequence_as(specs, [tf.constant(a) for a in arrays]), training=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:400]
        raise PruneError(
            f"the model '{model.name}' fails on the example inputs (random ones, unless they were given): {reason}"
        ) from error
    return [tensor.numpy() for tensor in tf.nest.flatten(results)]


def _sizes(spec: Any) -> tuple[int, ...]:
    """The shape of an input that the graph does not read."""
    return tuple(1 if size is None else size for size in spec.shape)


def tolerance(model: Any) -> float:
    """1e-4, or what a model that computes in 16 bits can be held to."""
    kinds = {layer.compute_dtype for layer, _ in walk(model)}
    return max([TOLERANCE, *(16 * _EPSILON[kind] for kind in kinds if kind in _EPSILON)])


_EPSILON = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
