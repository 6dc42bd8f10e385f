"""The deployable ONNX model of a Keras model: tf2onnx with its folding on, and what Keras computes beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from onnxprune.errors import PruneError
from onnxprune.graph.model import load
from onnxprune.graph.weights import Weight

from ..deploy import Candidate, tolerance
from .binding import input_names, output_names, signature
from .convert import convert, rename
from .layers import walk


def candidate(
    model: Any, weights: Sequence[Weight], kept: Mapping[str, np.ndarray], example_inputs: Any = None
) -> Candidate:
    """A Keras model as tf2onnx makes it when it folds and fuses, with Keras' own outputs beside it.

    Args:
        model: a Keras 3 model; Functional and Sequential models need no example.
        weights: its weights that are pruned.
        kept: their masks.
        example_inputs: what onnxruntime and Keras are compared on; random unless given.

    Raises:
        PruneError: there is no ONNX for the model, or it fails on the example.
    """
    types = type_names(model)
    if "bfloat16" in types:
        raise PruneError(
            f"layers of the model '{model.name}' compute in bfloat16, which tf2onnx does not convert and onnxruntime "
            "does not run on the CPU. Where the variables are float32 (mixed_bfloat16), set dtype_policy = 'float32' "
            "on the model and on every layer in it, and export again: values and masks stay what they are. Where they "
            "are bfloat16 as well, load them into a model that was built with float32"
        )
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
    return Candidate(load(proto), weights, kept, feeds, expected, tolerance(types))


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


def type_names(model: Any) -> set[str]:
    """Names of the types that a model's layers compute in."""
    return {str(layer.compute_dtype) for layer, _ in walk(model)}
