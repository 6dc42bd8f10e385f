"""Masks held in a Keras model: a constraint on each variable, which the optimizer itself applies after every update."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from onnxprune.errors import PruneError
from onnxprune.graph.weights import Skipped, Weight

from ..deploy import Candidate
from .binding import Binding, check_backend
from .export import candidate
from .layers import layer_weights, walk


class Hold(keras.constraints.Constraint):  # type: ignore[misc]  # Keras has no types
    """After the user's own constraint, a variable's pruned entries become +0.0, whatever they were, NaN included.

    Args:
        variable: the Keras variable.
        kept: True is kept.
        model: the model that trains it.
    """

    def __init__(self, variable: Any, kept: np.ndarray, model: Any) -> None:
        """Put itself on the variable."""
        self.variable = variable
        self.inner = variable.constraint
        self.model = weakref.ref(model)
        plain = not isinstance(variable.value, tf.distribute.DistributedValues)
        strategy = nullcontext() if plain else variable.value.distribute_strategy.scope()
        with tf.init_scope(), strategy:  # one copy per replica, beside the variable's own
            first = tf.VariableAggregation.ONLY_FIRST_REPLICA
            self.mask = tf.Variable(kept, trainable=False, aggregation=first, name="kept")
        variable.constraint = self
        self.raw = variable.value if plain else None
        self.raw_inner = None if self.raw is None else self.raw.constraint
        if self.raw is not None:  # a loop that hands the optimizer tf.Variables never asks the Keras variable
            self.raw._constraint = self

    def __call__(self, value: Any) -> Any:
        """The value with its pruned entries at zero."""
        value = tf.convert_to_tensor(value if self.inner is None else self.inner(value))
        self._mask_average()
        return self._masked(value)

    def apply(self, kept: np.ndarray) -> None:
        """Hold another mask from now on."""
        self.mask.assign(kept)
        self.zero()

    def zero(self) -> None:
        """Zero the pruned entries now."""
        self._mask_average()
        self.variable.assign(self._masked(tf.convert_to_tensor(self.variable.value)))

    def revived(self) -> bool:
        """Whether a pruned entry is no longer zero."""
        value = tf.convert_to_tensor(self.variable.value)
        gone = tf.logical_not(tf.convert_to_tensor(self.mask))
        return bool(tf.reduce_any(tf.logical_and(gone, tf.not_equal(value, tf.zeros((), value.dtype)))))

    def release(self) -> None:
        """Hold nothing from now on, in functions that were traced with this constraint as well."""
        self.mask.assign(np.ones(self.mask.shape, np.bool_))
        if self.variable.constraint is self:
            self.variable.constraint = self.inner
        if self.raw is not None and self.raw.constraint is self:
            self.raw._constraint = self.raw_inner

    def _masked(self, value: Any) -> Any:
        return tf.math.multiply_no_nan(value, tf.cast(self.mask, value.dtype))  # half the time of a tf.where

    def _mask_average(self) -> None:
        """Zero the optimizer's moving average of the variable too: at the end of `fit` it replaces the variable."""
        model = self.model()
        optimizer: Any = getattr(model, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not getattr(optimizer, "use_ema", False) or not optimizer.built:
            return
        index = optimizer._trainable_variables_indices.get(optimizer._var_key(self.variable))
        if index is not None:
            average = optimizer._model_variables_moving_average[index]
            average.assign(self._masked(tf.convert_to_tensor(average)))


class KerasHolder:
    """A Keras model's weights, and the masks held on them.

    Args:
        model: a Keras 3 model on the TensorFlow backend.
        weights: its weights.
        skipped: what is left alone, with reasons.
        variables: name -> Keras variable, of the weights at least.
        example_inputs: what the model is called with, where it was given.
    """

    def __init__(
        self,
        model: Any,
        weights: Sequence[Weight],
        skipped: Sequence[Skipped],
        variables: Mapping[str, Any],
        example_inputs: Any = None,
    ) -> None:
        """Nothing is held yet."""
        self.model, self.example_inputs = model, example_inputs
        self.weights, self.skipped, self.variables = tuple(weights), tuple(skipped), variables
        self._holds: dict[str, Hold] = {}

    @classmethod
    def of_layers(cls, model: Any) -> KerasHolder:
        """The weights that the classes of a built model's layers say.

        Raises:
            PruneError: the model has no variables yet.
        """
        check_backend()
        if not model.built:
            raise PruneError(
                f"the model '{model.name}' has no weights yet: build it, call it once, or give example inputs"
            )
        return cls(model, *layer_weights(model))

    @classmethod
    def of_graph(cls, model: Any, binding: Binding, example_inputs: Any = None) -> KerasHolder:
        """The weights that the exported graph says."""
        return cls(model, binding.weights, binding.skipped, binding.variables, example_inputs)

    @contextmanager
    def at(self, sess: Any) -> Iterator[None]:
        """Check that no training that escaped the constraints has revived pruned entries."""
        if sess is not None:
            raise PruneError("a session was given, but the pruner holds a Keras model, which has none; leave it out")
        revived = [name for name, hold in self._holds.items() if hold.revived()]
        if revived:
            listed = ", ".join([*(f"'{name}'" for name in revived[:8]), *(["..."] if len(revived) > 8 else [])])
            warnings.warn(
                f"pruned entries of {listed} were no longer zero and have been zeroed again: weights were loaded or "
                "assigned, or a training function that was traced before the pruner was called goes on without the "
                "masks; trace it again",
                stacklevel=4,
            )
            for name in revived:
                self._holds[name].zero()
        yield

    def hold(self, kept: Mapping[str, np.ndarray]) -> None:
        """Zero what masks remove, and keep it zero from now on."""
        stated = {id(v) for layer, _ in walk(self.model) for v in layer._non_trainable_variables}
        averages = {name for name in kept if id(self.variables[name]) in stated}
        for name in averages:  # no optimizer moves them, and what they are of a channel that is zero does not matter
            value = tf.convert_to_tensor(self.variables[name].value)
            self.variables[name].assign(tf.math.multiply_no_nan(value, tf.cast(kept[name], value.dtype)))
        held = {name: mask for name, mask in kept.items() if name not in averages}
        fresh = [name for name in held if name not in self._holds]
        for name in fresh:
            self._holds[name] = Hold(self.variables[name], held[name], self.model)
        for name, mask in held.items():
            self._holds[name].apply(mask)
        if fresh:
            self._retrace()

    def remove(self) -> None:
        """Take the constraints off; the zeros stay until training moves them."""
        for hold in self._holds.values():
            hold.release()
        if self._holds:
            self._retrace()
        self._holds.clear()

    def candidate(self, kept: Mapping[str, np.ndarray], example_inputs: Any, outputs: Any, sess: Any) -> Candidate:
        """The model as exported to be deployed, to be checked."""
        if outputs is not None:
            raise PruneError("outputs were named, but a Keras model has its own; leave them out")
        example = self.example_inputs if example_inputs is None else example_inputs
        return candidate(self.model, [w for w in self.weights if w.name in kept], kept, example)

    def _retrace(self) -> None:
        """A train function that `fit` made earlier knows nothing of the constraints."""
        if getattr(self.model, "train_function", None) is not None:
            self.model.make_train_function(force=True)
