"""A file pruned elsewhere goes on training here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from onnxprune.errors import PruneError
from onnxprune.graph.masks import Masks
from onnxprune.graph.model import Model, ModelSource, load
from onnxprune.graph.weights import Weight, find

from ..match import match  # noqa: TID252
from .binding import bind
from .layers import layer_weights, variable_names, walk
from .pruners import LevelPruner


def reimport(model: Any, file: ModelSource, example_inputs: Any = None) -> LevelPruner:
    """Load an ONNX file's weights into a Keras model and hold its zeros from now on.

    Args:
        model: the Keras model that the file was exported from, built.
        file: the file or model, pruned elsewhere; exported unfolded (`bind`) or the ordinary way.
        example_inputs: what the model is called with, where its layers alone do not say what its weights are.

    Returns:
        A pruner that holds the masks; it prunes nothing further.

    Raises:
        PruneError: a weight of the model is not found in the file, or cannot be told from another; the message lists
            the candidates. The model is unchanged.
    """
    theirs = load(file)
    try:
        binding = bind(model, example_inputs)
    except PruneError:
        if example_inputs is not None or not model.built:
            raise
        binding = None  # nobody says what the model is called with; its layers have to do
    if binding is not None and not binding.difference(theirs):
        masks = binding.push(file)
    elif binding is not None:
        masks = _matched(model, binding.weights, binding.variables, theirs)
    else:
        weights, _, variables = layer_weights(model)
        masks = _matched(model, weights, variables, theirs)
    held = {name: masks[name] for name in masks if not masks[name].all()}
    if not held:
        raise PruneError("no weight in the file has a zero: there is nothing to hold; prune it first")
    pruner = LevelPruner([{"op_names": list(held), "sparsity": 0.0}])
    pruner.load_state_dict({"epoch": 0, "step": 0, "masks": held})
    pruner(model, example_inputs)
    return pruner


def _matched(model: Any, weights: Sequence[Weight], variables: Mapping[str, Any], theirs: Model) -> Masks:
    """Write the weights of a file exported the ordinary way; only zeros where a normalisation was folded in."""
    matches = match(weights, find(theirs)[0], _normalised(model))
    for name, found in matches.items():
        current = variables[name].numpy()
        variables[name].assign(np.where(found.keep, current if found.values is None else found.values, 0))
    return Masks({name: found.keep for name, found in matches.items()})


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
