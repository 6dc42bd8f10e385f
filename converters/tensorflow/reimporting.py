"""A file pruned elsewhere goes on training here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.graph.weights import Weight, check_finite, find

from ..deploy import difference, tolerance
from ..match import Match, match
from ..reimport import resumed
from .binding import bind, input_names, signature
from .export import outputs, type_names
from .hold import KerasHolder
from .layers import variable_names, walk
from .pruners import AGPPruner, LevelPruner, SensitivityPruner, TensorFlowPruner

PRUNERS: dict[str, type[TensorFlowPruner]] = {"level": LevelPruner, "agp": AGPPruner, "sensitivity": SensitivityPruner}


def reimport(model: Any, source: ModelSource, example_inputs: Any = None, config_list: Any = None) -> TensorFlowPruner:
    """Load a pruned file's weights into a Keras model, and hold its masks from now on.

    The file may be any export of the model. One made by `bind` brings every variable. Of any other, weights are matched
    by surviving values, name and shape (see `onnxprune.converters.match`); where a BatchNormalization was folded into a
    weight, its zeros carry over and the values stay the model's, as do biases and statistics.

    Args:
        model: a Keras 3 model.
        source: the file's path, an onnx.ModelProto or an onnx_ir.Model.
        example_inputs: what the model is called with, where it does not say so itself (a subclassed model).
        config_list: how to prune on from here, as the pruners take it (a mapping with a `pruner` says which one;
            otherwise level); weights that no entry names keep the file's zeros. Unless given, that is all.

    Returns:
        The pruner that holds the masks.

    Raises:
        PruneError: a weight cannot be matched, or is not finite; or onnxruntime's outputs for the file differ from the
            model's where all values carried over. The model's values are unchanged.
    """
    file = load(source)
    theirs = find(file)[0]
    for weight in theirs:
        check_finite(weight, weight.values())
    try:
        binding = bind(model, example_inputs)
        holder = KerasHolder.of_graph(model, binding, example_inputs)
    except PruneError:
        if example_inputs is not None or not model.built:
            raise
        binding = None  # nobody says what the model is called with; its layers have to do
        holder = KerasHolder.of_layers(model)
    variables = holder.variables
    before = {name: variable.numpy() for name, variable in variables.items()}
    pruner: TensorFlowPruner | None = None
    try:
        complete = True
        if binding is not None and not binding.difference(file):
            masks = binding.push(source)
        else:
            matches = _matched(model, holder.weights, theirs)
            for name, one in matches.items():
                values = before[name] if one.values is None else one.values
                variables[name].assign(np.where(one.keep, values, np.zeros((), values.dtype)))
            masks = Masks({name: one.keep for name, one in matches.items()})
            complete = binding is not None and all(one.values is not None for one in matches.values())
        pruner = resumed(PRUNERS, holder.weights, masks, config_list)
        pruner._start(holder)
        if complete and not any(weight.dtype.kind in "iu" for weight in theirs):
            _compare(model, source, file, example_inputs)
    except BaseException:
        if pruner is not None:
            pruner.remove()
        for name, values in before.items():
            variables[name].assign(values)
        raise
    return pruner


def _matched(model: Any, weights: Sequence[Weight], theirs: Sequence[Weight]) -> dict[str, Match]:
    """Match the weights of a file exported the ordinary way, in which an LSTM may have its gates in ONNX' order."""
    normalised = _normalised(model)
    if any(weight.op_type == "LSTM" for weight in theirs):
        reordered = [_reordered(weight) if "LSTM" in weight.op_types else weight for weight in weights]
        with suppress(PruneError):
            return match(reordered, theirs, normalised)
    return match(weights, theirs, normalised)


def _compare(model: Any, source: ModelSource, file: Model, example_inputs: Any) -> None:
    """Check that the model computes what the file computes."""
    from onnxprune.runtime.feeds import random_feeds
    from onnxprune.runtime.session import open_session

    specs = tf.nest.flatten(signature(model, example_inputs))
    names = [value.name for value in file.graph.graph.inputs if value.name not in file.graph.graph.initializers]
    if len(names) != len(specs):  # an input that the file does not read
        return
    own = input_names(model, len(specs))
    order = own if set(own) == set(names) else [str(name) for name in names]
    if example_inputs is None:
        given = random_feeds(source)[0]
        arrays = [np.asarray(given[name], spec.dtype.as_numpy_dtype) for name, spec in zip(order, specs, strict=True)]
    else:
        arrays = [np.asarray(a) for a in tf.nest.flatten(example_inputs)]
    session = open_session(source, label="the pruned file")
    types = {value.name: value.dtype for value in session.inputs}
    results = session.run({name: a.astype(types[name]) for name, a in zip(order, arrays, strict=True)})
    expected = outputs(model, signature(model, example_inputs), arrays)
    apart = difference(expected[: len(results)], results[: len(expected)])
    allowed = tolerance(type_names(model))
    if not apart <= allowed:
        raise PruneError(
            f"with the file's weights the model's outputs differ from the file's by {apart:.1e} of their largest "
            f"magnitude (at most {allowed:.0e} is accepted), so the model was left as it was: biases or statistics, "
            "which an ordinary file does not name, are others there. Load the weights that the file was exported from "
            "into the model, or prune a file made by bind"
        )


def _reordered(weight: Weight) -> Weight:
    """A Keras LSTM's weight with its gates (i, f, c, o) in the order of ONNX' LSTM, (i, o, f, c)."""

    def view(x: np.ndarray, plain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        rows = plain(x)
        return rows.reshape(4, -1, *rows.shape[1:])[[0, 3, 1, 2]].reshape(rows.shape)

    return replace(weight, uses=tuple(replace(use, view=partial(view, plain=use.view)) for use in weight.uses))


def _normalised(model: Any) -> set[str]:
    """Names of the variables of layers whose outputs go to a BatchNormalization, which exporters fold into them."""
    names = variable_names(model)
    layers = [layer for layer, _ in walk(model)]
    anywhere = any(isinstance(layer, keras.layers.BatchNormalization) for layer in layers)
    found = set()
    for layer in layers:
        if layer._inbound_nodes:
            after = [node.operation for node in layer._outbound_nodes]
            followed = any(isinstance(operation, keras.layers.BatchNormalization) for operation in after)
        else:  # called by code, not in a graph of layers: nobody knows what follows
            followed = anywhere
        if followed:
            found |= {names[id(variable)] for variable in layer._trainable_variables if id(variable) in names}
    return found
